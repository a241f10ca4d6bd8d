//! Every operator, on every instruction set this machine has: close to the reference, and the same bits whatever the
//! batch, the chunking and the number of threads.

mod attention;
mod moe;

use std::borrow::Cow;
use std::collections::HashMap;

use super::*;
use crate::backend::{QkNorm, RaggedSequence, WINDOW_GRAIN};
use crate::layout::KvLayout;
use crate::packed::{Packing, SourceTensor, WeightKind, WeightSource, WeightSpec};
use crate::reference;

/// A small generator of our own: the tests need values, not quality.
struct Values(u64);

impl Values {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1_u64 << 23) as f32) - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn devices(dtype: DType, n_threads: usize) -> impl Iterator<Item = Cpu> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(move |isa| {
        Cpu::new(CpuOptions {
            n_threads,
            dtype,
            isa: Some(isa),
        })
        .unwrap()
    })
}

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

struct Tensors(HashMap<&'static str, (Vec<usize>, Vec<f32>)>);

impl WeightSource for Tensors {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let (shape, values) = self.0.get(name).ok_or("no such tensor")?;
        let data = Cow::Borrowed(bytemuck::cast_slice(values));
        Ok(SourceTensor {
            dtype: DType::F32,
            shape: shape.clone(),
            data,
        })
    }
}

fn weights(dtype: DType, w: &[f32], n_out: usize, n_in: usize) -> std::sync::Arc<PackedWeights> {
    let source = Tensors(
        [
            ("w", (vec![n_out, n_in], w.to_vec())),
            ("v", (vec![n_in], w[..n_in].to_vec())),
        ]
        .into(),
    );
    let spec = |name: &str, kind| WeightSpec {
        name: name.to_owned(),
        kind,
        parts: vec![name.to_owned()],
    };
    let specs = [
        spec("w", WeightKind::Matrix { n_out, n_in }),
        spec("v", WeightKind::Vector { len: n_in }),
    ];
    PackedWeights::in_memory(Packing::Panels, dtype, &specs, &source).unwrap()
}

fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> CpuTensor {
    let mut tensor = cpu.tensor(values.len() / cols, cols).unwrap();
    tensor.set(values);
    tensor
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[track_caller]
fn assert_close(cpu: &Cpu, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(
            close,
            "{}: element {i} is {found}, expected {expected}",
            cpu.numerics_class()
        );
    }
}

fn linear(cpu: &Cpu, x: &[f32], w: &CpuMatrix) -> Vec<f32> {
    let x = tensor(cpu, w.n_in, x);
    let mut out = cpu.tensor(x.rows(), w.n_out).unwrap();
    cpu.linear(&mut out, &x, w);
    out.as_slice().to_vec()
}

#[test]
fn linear_is_close_to_the_reference_on_odd_sizes() {
    let mut values = Values(1);
    for (rows, n_in, n_out) in [
        (1, 1, 1),
        (1, 2, 3),
        (3, 7, 65),
        (2, 64, 64),
        (5, 129, 63),
        (7, 127, 130),
        (13, 257, 192),
        (40, 300, 67),
    ] {
        let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
        for dtype in DTYPES {
            let expected = reference::linear(&reference::round(dtype, &x), &reference::round(dtype, &w), n_in);
            let packed = weights(dtype, &w, n_out, n_in);
            for cpu in devices(dtype, 2) {
                let w = cpu.matrix(&packed, "w").unwrap();
                // Sums of n_in products below 1, added in f32 one after the other.
                assert_close(&cpu, &linear(&cpu, &x, &w), &expected, 3e-7 * n_in as f32);
            }
        }
    }
}

#[test]
fn a_row_of_linear_has_the_same_bits_in_any_batch_and_on_any_threads() {
    let mut values = Values(2);
    let (rows, n_in, n_out) = (61, 391, 200);
    let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
    for dtype in DTYPES {
        let packed = weights(dtype, &w, n_out, n_in);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let device = |n_threads| {
                Cpu::new(CpuOptions {
                    n_threads,
                    dtype,
                    isa: Some(isa),
                })
                .unwrap()
            };
            let alone = device(1);
            let matrix = alone.matrix(&packed, "w").unwrap();
            let expected: Vec<f32> = x
                .chunks_exact(n_in)
                .flat_map(|row| linear(&alone, row, &matrix))
                .collect();
            for n_threads in [1, 2, 3] {
                let cpu = device(n_threads);
                for batch in [2, 3, 5, 6, 7, 8, 13, 32, 61] {
                    let found: Vec<f32> = x.chunks(batch * n_in).flat_map(|x| linear(&cpu, x, &matrix)).collect();
                    assert!(
                        bits(&found) == bits(&expected),
                        "{isa} {dtype}: {batch} rows on {n_threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn row_operators_are_close_to_the_reference_and_row_independent() {
    let mut values = Values(3);
    for (rows, cols) in [(1, 1), (3, 17), (5, 64), (130, 523), (2, 4096)] {
        let (x, y, weight) = (values.vec(rows * cols), values.vec(rows * cols), values.vec(cols));
        let gate_up: Vec<f32> = values.vec(rows * 2 * cols).iter().map(|x| 12.0 * x).collect();
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        for cpu in devices(DType::F32, 2) {
            let packed = weights(DType::F32, &weight, 1, cols);
            let vector = cpu.vector(&packed, "v").unwrap();
            let mut out = cpu.tensor(rows, cols).unwrap();
            cpu.rms_norm(&mut out, &tensor(&cpu, cols, &x), &vector, 1e-5);
            assert_close(&cpu, out.as_slice(), &reference::rms_norm(&x, &weight, 1e-5), 1e-5);

            let mut residual = tensor(&cpu, cols, &x);
            cpu.add_rms_norm(&mut out, &mut residual, &tensor(&cpu, cols, &y), &vector, 1e-5);
            assert_eq!(bits(residual.as_slice()), bits(&sums));
            assert_close(&cpu, out.as_slice(), &reference::rms_norm(&sums, &weight, 1e-5), 1e-5);
            let batch = out.as_slice().to_vec();
            for (row_idx, row) in sums.chunks_exact(cols).enumerate() {
                let mut one = cpu.tensor(1, cols).unwrap();
                cpu.rms_norm(&mut one, &tensor(&cpu, cols, row), &vector, 1e-5);
                assert_eq!(bits(one.as_slice()), bits(&batch[row_idx * cols..][..cols]));
            }

            for activation in [
                Activation::Silu,
                Activation::GeluTanh,
                Activation::ClampedSwish {
                    alpha: 1.702,
                    limit: 7.0,
                },
            ] {
                cpu.gated(&mut out, &tensor(&cpu, 2 * cols, &gate_up), activation);
                assert_close(
                    &cpu,
                    out.as_slice(),
                    &reference::gated(&gate_up, cols, activation),
                    2e-6,
                );
            }

            let mut capped = tensor(&cpu, 2 * cols, &gate_up);
            cpu.soft_cap(&mut capped, 8.0);
            let expected: Vec<f32> = gate_up
                .iter()
                .map(|x| (8.0 * (f64::from(*x) / 8.0).tanh()) as f32)
                .collect();
            assert_close(&cpu, capped.as_slice(), &expected, 4e-6);

            let mut sum = tensor(&cpu, cols, &x);
            cpu.add(&mut sum, &tensor(&cpu, cols, &y));
            assert_eq!(bits(sum.as_slice()), bits(&sums));
            cpu.add_bias(&mut sum, &vector);
            let biased: Vec<f32> = sums
                .iter()
                .zip(weight.iter().cycle())
                .map(|(x, bias)| x + bias)
                .collect();
            assert_eq!(bits(sum.as_slice()), bits(&biased));
        }
    }
}

/// Runs the vector exponential on slices of any length.
struct ExpAll<'a>(&'a mut [f32]);

impl simd::Kernel for ExpAll<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: simd::Simd>(self, simd: S) {
        for chunk in self.0.chunks_mut(simd::LANES) {
            // SAFETY: chunk.len() <= 16.
            unsafe {
                let x = simd.load_partial(chunk.as_ptr(), chunk.len(), 0.0);
                simd.store_partial(chunk.as_mut_ptr(), chunk.len(), simd.exp(x));
            }
        }
    }
}

#[test]
fn exp_is_accurate_over_its_range_and_exact_at_its_ends() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let x: Vec<f32> = (0..100_003).map(|i| -87.3 + 175.6 * i as f32 / 100_003.0).collect();
        let mut y = x.clone();
        dispatch::dispatch(isa, ExpAll(&mut y));
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - exact).abs() <= 3e-7 * exact,
                "{isa}: exp({x}) = {y}, expected {exact}"
            );
        }
        let mut ends = [f32::NEG_INFINITY, -88.0, 0.0, f32::INFINITY, f32::NAN];
        dispatch::dispatch(isa, ExpAll(&mut ends));
        assert_eq!(ends[..3], [0.0, 0.0, 1.0], "{isa}");
        assert!(ends[3] > 2e38 && ends[4].is_nan(), "{isa}: {ends:?}");
    }
}

#[test]
fn embed_and_gather_return_the_rows_asked_for() {
    let mut values = Values(4);
    let (vocab, hidden) = (131, 37);
    let table = values.vec(vocab * hidden);
    let ids = [0, 130, 64, 63, 64, 7];
    for dtype in DTYPES {
        let packed = weights(dtype, &table, vocab, hidden);
        let rounded = reference::round(dtype, &table);
        for cpu in devices(dtype, 2) {
            let mut out = cpu.tensor(6, hidden).unwrap();
            cpu.embed(&mut out, &cpu.matrix(&packed, "w").unwrap(), &ids, 1.0);
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|id| rounded[*id as usize * hidden..][..hidden].to_vec())
                .collect();
            assert_eq!(cpu.to_host(&out), expected);
            let mut twice = cpu.tensor(6, hidden).unwrap();
            cpu.embed(&mut twice, &cpu.matrix(&packed, "w").unwrap(), &ids, 2.0);
            assert_eq!(
                cpu.to_host(&twice),
                expected.iter().map(|x| 2.0 * x).collect::<Vec<f32>>()
            );
            let mut some = cpu.tensor(3, hidden).unwrap();
            cpu.gather_rows(&mut some, &out, &[5, 0]);
            assert_eq!(some.rows(), 2);
            assert_eq!(some.as_slice(), [&expected[5 * hidden..], &expected[..hidden]].concat());
        }
    }
}

#[test]
fn options_that_cannot_work_are_refused() {
    let options = CpuOptions {
        n_threads: 1,
        dtype: DType::F16,
        isa: None,
    };
    assert!(matches!(
        Cpu::new(options),
        Err(KernelError::UnsupportedDType { dtype: DType::F16, .. })
    ));
    assert!(matches!(
        Cpu::new(CpuOptions {
            n_threads: 0,
            dtype: DType::F32,
            isa: None
        }),
        Err(KernelError::Threads { .. })
    ));
    let cpu = Cpu::new(CpuOptions {
        n_threads: 2,
        dtype: DType::Bf16,
        isa: Some(Isa::Portable),
    })
    .unwrap();
    assert_eq!(
        (cpu.numerics_class().as_str(), cpu.n_threads()),
        ("cpu-portable-bf16", 2)
    );
    let packed = weights(DType::F32, &[1.0], 1, 1);
    assert!(matches!(
        cpu.matrix(&packed, "w"),
        Err(KernelError::DTypeMismatch { .. })
    ));
    assert!(matches!(
        cpu.vector(&packed, "w"),
        Err(KernelError::MissingWeight { kind: "vector", .. })
    ));
}
