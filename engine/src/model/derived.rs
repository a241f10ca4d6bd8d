//! Parts of packed weights that are not a tensor as it lies in the files: norms stored as their difference from one, and the
//! experts of models that stack them, transposed, de-interleaved, or unpacked from MXFP4.

use std::borrow::Cow;
use std::collections::HashMap;

use baton_kernels::{DType, SourceTensor, WeightSource};
use half::bf16;

use super::config::{MXFP4_BLOCK, ModelConfig};
use super::safetensors::TensorTable;
use super::weights::{Part, weight_specs};

/// How a part comes from its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Derivation {
    /// It is its tensor.
    None,
    /// One is added to each element.
    PlusOne,
    /// One expert's matrix of `[n_experts, n_in, n_out]`.
    Transposed {
        expert: usize,
        /// Outputs alternate between gate and up; gate comes first.
        is_alternating: bool,
    },
    /// One expert's vector of `[n_experts, len]`.
    Row { expert: usize, is_alternating: bool },
    /// One expert's matrix of `[n_experts, n_out, n_blocks, 16]` pairs of values and `[n_experts, n_out, n_blocks]` scales.
    Mxfp4 { expert: usize, is_alternating: bool },
}

/// The values of the four bits of E2M1: a sign, two bits of exponent and one of mantissa.
const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Bias of the exponent that is a scale (E8M0).
const E8M0_BIAS: i32 = 127;

/// A model's files as the packer asks for them.
pub(crate) struct DerivedWeights<'a> {
    table: &'a TensorTable,
    derived: HashMap<String, Part>,
}

impl<'a> DerivedWeights<'a> {
    pub(crate) fn new(config: &ModelConfig, table: &'a TensorTable) -> DerivedWeights<'a> {
        let parts = weight_specs(config).into_iter().flat_map(|(_, parts)| parts);
        DerivedWeights {
            table,
            derived: parts
                .filter(|part| part.derivation != Derivation::None)
                .map(|part| (part.name.clone(), part))
                .collect(),
        }
    }
}

impl WeightSource for DerivedWeights<'_> {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let Some(part) = self.derived.get(name) else {
            return self.table.tensor(name);
        };
        let (dtype, data) = match part.derivation {
            Derivation::None => return self.table.tensor(name),
            Derivation::PlusOne => {
                let tensor = self.table.tensor(&part.tensors[0].name)?;
                // In f32: one plus a bf16 is no bf16.
                let sums = elements(&tensor).map(|weight| 1.0 + weight);
                (DType::F32, sums.flat_map(f32::to_le_bytes).collect())
            }
            Derivation::Transposed { expert, is_alternating } => {
                let tensor = self.table.tensor(&part.tensors[0].name)?;
                (tensor.dtype, transposed(&tensor, expert, is_alternating))
            }
            Derivation::Row { expert, is_alternating } => {
                let tensor = self.table.tensor(&part.tensors[0].name)?;
                let size = tensor.dtype.size();
                let len = part.shape[0];
                let row = &tensor.data[expert * len * size..][..len * size];
                let out = (0..len).flat_map(|at| {
                    let at = source_of(at, len, is_alternating);
                    &row[at * size..][..size]
                });
                (tensor.dtype, out.copied().collect())
            }
            Derivation::Mxfp4 { expert, is_alternating } => {
                let [blocks, scales] = [0, 1].map(|idx| {
                    let name = &part.tensors[idx].name;
                    let tensor = self.table.get(name);
                    tensor
                        .map(|tensor| tensor.data)
                        .ok_or_else(|| format!("no tensor {name}"))
                });
                (
                    DType::Bf16,
                    unpacked(blocks?, scales?, &part.shape, expert, is_alternating),
                )
            }
        };
        Ok(SourceTensor {
            dtype,
            shape: part.shape.clone(),
            data: Cow::Owned(data),
        })
    }
}

/// Which stored output is the `at`-th of `len`: where gate and up alternate, the even ones come first.
fn source_of(at: usize, len: usize, is_alternating: bool) -> usize {
    match is_alternating {
        false => at,
        true if at < len / 2 => 2 * at,
        true => 2 * (at - len / 2) + 1,
    }
}

fn elements(tensor: &SourceTensor<'_>) -> impl Iterator<Item = f32> {
    let dtype = tensor.dtype;
    tensor.data.chunks_exact(dtype.size()).map(move |bytes| match dtype {
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        DType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    })
}

/// `[n_out, n_in]` of one expert, in the tensor's dtype.
fn transposed(tensor: &SourceTensor<'_>, expert: usize, is_alternating: bool) -> Vec<u8> {
    let (n_in, n_out, size) = (tensor.shape[1], tensor.shape[2], tensor.dtype.size());
    let matrix = &tensor.data[expert * n_in * n_out * size..][..n_in * n_out * size];
    let mut out = vec![0; matrix.len()];
    for (to, row) in out.chunks_exact_mut(n_in * size).enumerate() {
        let from = source_of(to, n_out, is_alternating);
        for (input, element) in row.chunks_exact_mut(size).enumerate() {
            element.copy_from_slice(&matrix[(input * n_out + from) * size..][..size]);
        }
    }
    out
}

/// `[n_out, n_in]` of one expert in bf16, which holds every value of MXFP4 but those of the smallest scales exactly.
fn unpacked(blocks: &[u8], scales: &[u8], shape: &[usize], expert: usize, is_alternating: bool) -> Vec<u8> {
    let (n_out, n_blocks) = (shape[0], shape[1] / MXFP4_BLOCK);
    let mut out = Vec::with_capacity(n_out * shape[1] * 2);
    for to in 0..n_out {
        let row = expert * n_out + source_of(to, n_out, is_alternating);
        for block in row * n_blocks..(row + 1) * n_blocks {
            let scale = (i32::from(scales[block]) - E8M0_BIAS) as f32;
            for pair in &blocks[block * MXFP4_BLOCK / 2..][..MXFP4_BLOCK / 2] {
                for code in [pair & 15, pair >> 4] {
                    let value = E2M1[usize::from(code)] * scale.exp2();
                    out.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes
            .chunks_exact(2)
            .map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32())
            .collect()
    }

    #[test]
    fn alternating_outputs_are_sorted_into_gate_and_up() {
        assert_eq!(
            (0..6).map(|at| source_of(at, 6, true)).collect::<Vec<_>>(),
            [0, 2, 4, 1, 3, 5]
        );
        // Two experts of two inputs and four outputs, numbered as they lie.
        let data: Vec<u8> = (0..16).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
        let tensor = SourceTensor {
            dtype: DType::Bf16,
            shape: vec![2, 2, 4],
            data: Cow::Owned(data),
        };
        let found = values(&transposed(&tensor, 1, true));
        assert_eq!(found, [8.0, 12.0, 10.0, 14.0, 9.0, 13.0, 11.0, 15.0]);
        assert_eq!(values(&transposed(&tensor, 0, false))[..4], [0.0, 4.0, 1.0, 5.0]);
    }

    #[test]
    fn mxfp4_is_a_value_of_four_bits_times_a_power_of_two() {
        // Two outputs of one block: the low half of a byte comes first.
        let blocks: Vec<u8> = (0..32).map(|i| if i < 16 { i << 4 } else { 0x97 }).collect();
        let found = values(&unpacked(&blocks, &[128, 126], &[2, 32], 0, false));
        let codes: Vec<f32> = (0..16).flat_map(|i| [0.0, 2.0 * E2M1[i]]).collect();
        assert_eq!(found[..32], codes);
        assert!(found[32..].chunks(2).all(|pair| pair == [3.0, -0.25]));
    }
}
