//! Which packed weights a decoder needs, and where they come from: the model's files, or a seeded generator.
//! The packing itself is the device's.

use std::borrow::Cow;
use std::path::PathBuf;

use baton_kernels::{SourceTensor, WeightKind, WeightSource, WeightSpec};

use super::config::ModelConfig;
use super::dummy;
use super::error::ModelError;
use super::safetensors::{TensorTable, weight_dtype};

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The model's safetensors files.
    #[default]
    Safetensors,
    /// Seeded random numbers in the shapes of config.json; for measuring.
    Dummy {
        /// Seed of the generator.
        seed: u64,
    },
}

impl std::str::FromStr for LoadFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<LoadFormat, String> {
        match name {
            "safetensors" | "auto" => Ok(LoadFormat::Safetensors),
            "dummy" => Ok(LoadFormat::Dummy { seed: 0 }),
            other => Err(format!("unknown load format {other:?}, expected safetensors or dummy")),
        }
    }
}

/// Names of the packed weights of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerWeightNames {
    pub(crate) attention_norm: String,
    pub(crate) qkv: String,
    pub(crate) attention_out: String,
    pub(crate) ffn_norm: String,
    pub(crate) gate_up: String,
    pub(crate) down: String,
}

impl LayerWeightNames {
    pub(crate) fn new(layer: usize) -> LayerWeightNames {
        let name = |weight: &str| format!("layers.{layer}.{weight}");
        LayerWeightNames {
            attention_norm: name("attention_norm"),
            qkv: name("qkv"),
            attention_out: name("o"),
            ffn_norm: name("ffn_norm"),
            gate_up: name("gate_up"),
            down: name("down"),
        }
    }
}

pub(crate) const EMBED: &str = "embed";
pub(crate) const FINAL_NORM: &str = "final_norm";
pub(crate) const LM_HEAD: &str = "lm_head";

/// A tensor of the model files that must be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequiredTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

/// Everything the decoder multiplies with: packed weights in the order of use, each with its source tensors.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<(WeightSpec, Vec<RequiredTensor>)> {
    let names = &config.architecture.tensors;
    let (hidden, ffn) = (config.hidden_size, config.ffn_size);
    let (query_width, kv_width) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    let mut specs = vec![matrix(EMBED, hidden, &[(names.embed.to_owned(), config.vocab_size)])];
    for layer in 0..config.n_layers {
        let source = |template: &str| template.replace("{}", &layer.to_string());
        let packed = LayerWeightNames::new(layer);
        specs.extend([
            vector(&packed.attention_norm, source(names.attention_norm), hidden),
            matrix(
                &packed.qkv,
                hidden,
                &[
                    (source(names.query), query_width),
                    (source(names.key), kv_width),
                    (source(names.value), kv_width),
                ],
            ),
            matrix(
                &packed.attention_out,
                query_width,
                &[(source(names.attention_out), hidden)],
            ),
            vector(&packed.ffn_norm, source(names.ffn_norm), hidden),
            matrix(
                &packed.gate_up,
                hidden,
                &[(source(names.gate), ffn), (source(names.up), ffn)],
            ),
            matrix(&packed.down, ffn, &[(source(names.down), hidden)]),
        ]);
    }
    specs.push(vector(FINAL_NORM, names.final_norm.to_owned(), hidden));
    if !config.tie_word_embeddings {
        specs.push(matrix(
            LM_HEAD,
            hidden,
            &[(names.lm_head.to_owned(), config.vocab_size)],
        ));
    }
    specs
}

fn matrix(name: &str, n_in: usize, parts: &[(String, usize)]) -> (WeightSpec, Vec<RequiredTensor>) {
    let n_out = parts.iter().map(|(_, n_out)| n_out).sum();
    let required = parts
        .iter()
        .map(|(name, n_out)| RequiredTensor {
            name: name.clone(),
            shape: vec![*n_out, n_in],
        })
        .collect();
    let parts = parts.iter().map(|(name, _)| name.clone()).collect();
    (
        WeightSpec {
            name: name.to_owned(),
            kind: WeightKind::Matrix { n_out, n_in },
            parts,
        },
        required,
    )
}

fn vector(name: &str, part: String, len: usize) -> (WeightSpec, Vec<RequiredTensor>) {
    let required = vec![RequiredTensor {
        name: part.clone(),
        shape: vec![len],
    }];
    (
        WeightSpec {
            name: name.to_owned(),
            kind: WeightKind::Vector { len },
            parts: vec![part],
        },
        required,
    )
}

/// Checks that every tensor is there with its shape and a dtype we read, before anything is packed.
pub(crate) fn check_tensors(config: &ModelConfig, table: &TensorTable) -> Result<(), ModelError> {
    for required in weight_specs(config).into_iter().flat_map(|(_, required)| required) {
        let RequiredTensor { name, shape } = required;
        let wrong = |file: PathBuf, expected: String, found: String| {
            Err(ModelError::Tensor {
                file,
                tensor: name.clone(),
                expected,
                found,
            })
        };
        let Some(tensor) = table.get(&name) else {
            return wrong(table.location(), format!("shape {shape:?}"), "none".to_owned());
        };
        if tensor.shape != shape {
            return wrong(
                tensor.file.to_owned(),
                format!("shape {shape:?}"),
                format!("{:?}", tensor.shape),
            );
        }
        if weight_dtype(tensor.dtype).is_none() {
            let expected = "dtype F32, F16 or BF16".to_owned();
            return wrong(tensor.file.to_owned(), expected, format!("{:?}", tensor.dtype));
        }
    }
    Ok(())
}

impl WeightSource for TensorTable {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let tensor = self
            .get(name)
            .ok_or_else(|| format!("{}: no such tensor", self.location().display()))?;
        let dtype = weight_dtype(tensor.dtype)
            .ok_or_else(|| format!("{}: dtype {:?} is not read", tensor.file.display(), tensor.dtype))?;
        Ok(SourceTensor {
            dtype,
            shape: tensor.shape.to_vec(),
            data: Cow::Borrowed(tensor.data),
        })
    }
}

/// Random weights of a model's shapes.
#[derive(Debug)]
pub(crate) struct DummyWeights {
    seed: u64,
    shapes: std::collections::HashMap<String, Vec<usize>>,
}

impl DummyWeights {
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> DummyWeights {
        let required = weight_specs(config).into_iter().flat_map(|(_, required)| required);
        DummyWeights {
            seed,
            shapes: required.map(|tensor| (tensor.name, tensor.shape)).collect(),
        }
    }
}

impl WeightSource for DummyWeights {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let shape = self.shapes.get(name).ok_or("the model has no such tensor")?;
        let n_elements = shape.iter().product();
        // Vectors are norm weights: ones.
        let data = match shape.len() {
            1 => dummy::ones(n_elements),
            _ => dummy::random_tensor(self.seed, name, n_elements),
        };
        Ok(SourceTensor {
            dtype: baton_kernels::DType::Bf16,
            shape: shape.clone(),
            data: Cow::Owned(data),
        })
    }
}
