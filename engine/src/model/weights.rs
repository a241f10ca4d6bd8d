//! Which packed weights a decoder needs, and where they come from: the model's files, or a seeded generator.
//! The packing itself is the device's; what a part needs beyond a tensor's bytes is in `derived`.

use std::borrow::Cow;
use std::path::PathBuf;

use baton_kernels::{ExpertNames, SourceTensor, WeightKind, WeightSource, WeightSpec};
use safetensors::Dtype;

use super::architecture::{ExpertLayers, ExpertTensors};
use super::config::{MXFP4_BLOCK, ModelConfig};
use super::derived::Derivation;
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

/// Names of the packed weights of one layer; which of them there are, the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerWeightNames {
    pub(crate) attention_norm: String,
    pub(crate) qkv: String,
    pub(crate) qkv_bias: String,
    pub(crate) query_norm: String,
    pub(crate) key_norm: String,
    pub(crate) sinks: String,
    pub(crate) attention_out: String,
    pub(crate) attention_out_bias: String,
    pub(crate) post_attention_norm: String,
    pub(crate) ffn_norm: String,
    pub(crate) gate_up: String,
    pub(crate) down: String,
    pub(crate) post_ffn_norm: String,
    pub(crate) router: String,
    pub(crate) router_bias: String,
    layer: usize,
}

impl LayerWeightNames {
    pub(crate) fn new(layer: usize) -> LayerWeightNames {
        let name = |weight: &str| format!("layers.{layer}.{weight}");
        LayerWeightNames {
            attention_norm: name("attention_norm"),
            qkv: name("qkv"),
            qkv_bias: name("qkv_bias"),
            query_norm: name("query_norm"),
            key_norm: name("key_norm"),
            sinks: name("sinks"),
            attention_out: name("o"),
            attention_out_bias: name("o_bias"),
            post_attention_norm: name("post_attention_norm"),
            ffn_norm: name("ffn_norm"),
            gate_up: name("gate_up"),
            down: name("down"),
            post_ffn_norm: name("post_ffn_norm"),
            router: name("router"),
            router_bias: name("router_bias"),
            layer,
        }
    }

    /// Of one expert; those of architectures that stack their experts have biases.
    pub(crate) fn expert(&self, expert: usize, experts: &ExpertLayers) -> ExpertNames {
        let name = |weight: &str| format!("layers.{}.experts.{expert}.{weight}", self.layer);
        let has_bias = matches!(experts.tensors, ExpertTensors::Stacked { .. });
        ExpertNames {
            gate_up: name("gate_up"),
            gate_up_bias: has_bias.then(|| name("gate_up_bias")),
            down: name("down"),
            down_bias: has_bias.then(|| name("down_bias")),
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
    /// Bytes that are no numbers of their own, such as packed fours bits; else f32, f16 or bf16.
    pub(crate) is_bytes: bool,
}

/// One part of a packed weight: what the packer asks for, and the model's tensors it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The name the packer asks for; a tensor's own name where nothing is derived.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) derivation: Derivation,
    pub(crate) tensors: Vec<RequiredTensor>,
}

impl Part {
    fn plain(name: String, shape: Vec<usize>) -> Part {
        let required = RequiredTensor {
            name: name.clone(),
            shape: shape.clone(),
            is_bytes: false,
        };
        Part {
            name,
            shape,
            derivation: Derivation::None,
            tensors: vec![required],
        }
    }

    /// Norms of some families store the difference from one.
    fn norm(config: &ModelConfig, name: String, len: usize) -> Part {
        let plain = Part::plain(name, vec![len]);
        if !config.architecture.norm_adds_one {
            return plain;
        }
        Part {
            name: format!("{} + 1", plain.name),
            derivation: Derivation::PlusOne,
            ..plain
        }
    }

    fn stacked(
        name: &str,
        expert: usize,
        n_experts: usize,
        stored: &[usize],
        shape: Vec<usize>,
        derivation: Derivation,
    ) -> Part {
        let tensor = RequiredTensor {
            name: name.to_owned(),
            shape: [&[n_experts], stored].concat(),
            is_bytes: false,
        };
        Part {
            name: format!("{name}[{expert}]"),
            shape,
            derivation,
            tensors: vec![tensor],
        }
    }

    fn mxfp4(name: &str, expert: usize, n_experts: usize, shape: [usize; 2], derivation: Derivation) -> Part {
        let n_blocks = shape[1] / MXFP4_BLOCK;
        let tensor = |suffix: &str, last: &[usize]| RequiredTensor {
            name: format!("{name}_{suffix}"),
            shape: [&[n_experts, shape[0], n_blocks], last].concat(),
            is_bytes: true,
        };
        Part {
            name: format!("{name}[{expert}]"),
            shape: shape.to_vec(),
            derivation,
            tensors: vec![tensor("blocks", &[MXFP4_BLOCK / 2]), tensor("scales", &[])],
        }
    }
}

/// Everything the decoder multiplies with: packed weights in the order of use, each with its parts.
pub(crate) fn weight_specs(config: &ModelConfig) -> Vec<(WeightSpec, Vec<Part>)> {
    let names = &config.architecture.tensors;
    let (hidden, ffn, head_dim) = (config.hidden_size, config.ffn_size, config.head_dim);
    let (query_width, kv_width) = (config.n_heads * head_dim, config.n_kv_heads * head_dim);
    let [qkv_has_bias, out_has_bias] = config.attention_bias;
    let norm = |name: &str, part: String, len: usize| vector(name, vec![Part::norm(config, part, len)]);
    let mut specs = vec![matrix(EMBED, hidden, &[(names.embed.to_owned(), config.vocab_size)])];
    for (layer, of_layer) in config.layers.iter().enumerate() {
        let source = |template: &str| template.replacen("{}", &layer.to_string(), 1);
        // One tensor holds all widths, or each its own.
        let split = |templates: &[&str], widths: &[usize]| -> Vec<(String, usize)> {
            match templates {
                [fused] => vec![(source(fused), widths.iter().sum())],
                each => each
                    .iter()
                    .map(|name| source(name))
                    .zip(widths.iter().copied())
                    .collect(),
            }
        };
        let packed = LayerWeightNames::new(layer);
        let optional_norm = |name: &str, part: Option<&str>| part.map(|part| norm(name, source(part), hidden));
        specs.extend(optional_norm(&packed.attention_norm, names.attention_norm));
        let qkv = split(names.qkv, &[query_width, kv_width, kv_width]);
        specs.push(matrix(&packed.qkv, hidden, &qkv));
        if qkv_has_bias {
            let bias = |(name, width): &(String, usize)| Part::plain(bias_of(name), vec![*width]);
            specs.push(vector(&packed.qkv_bias, qkv.iter().map(bias).collect()));
        }
        if let Some(qk_norm) = &names.qk_norm {
            let len = |width: usize| if qk_norm.is_whole { width } else { head_dim };
            specs.push(norm(&packed.query_norm, source(qk_norm.query), len(query_width)));
            specs.push(norm(&packed.key_norm, source(qk_norm.key), len(kv_width)));
        }
        if let Some(sinks) = names.sinks {
            specs.push(vector(
                &packed.sinks,
                vec![Part::plain(source(sinks), vec![config.n_heads])],
            ));
        }
        let out = source(names.attention_out);
        specs.push(matrix(&packed.attention_out, query_width, &[(out.clone(), hidden)]));
        if out_has_bias {
            specs.push(vector(
                &packed.attention_out_bias,
                vec![Part::plain(bias_of(&out), vec![hidden])],
            ));
        }
        specs.extend(optional_norm(&packed.post_attention_norm, names.post_attention_norm));
        specs.extend(optional_norm(&packed.ffn_norm, names.ffn_norm));
        match &config.architecture.experts {
            Some(experts) if of_layer.has_experts => expert_specs(&mut specs, config, experts, layer),
            _ => {
                specs.push(matrix(&packed.gate_up, hidden, &split(names.gate_up, &[ffn, ffn])));
                specs.push(matrix(&packed.down, ffn, &[(source(names.down), hidden)]));
            }
        }
        specs.extend(optional_norm(&packed.post_ffn_norm, names.post_ffn_norm));
    }
    specs.push(norm(FINAL_NORM, names.final_norm.to_owned(), hidden));
    if !config.tie_word_embeddings {
        specs.push(matrix(
            LM_HEAD,
            hidden,
            &[(names.lm_head.to_owned(), config.vocab_size)],
        ));
    }
    specs
}

/// The router and the experts of one layer.
fn expert_specs(
    specs: &mut Vec<(WeightSpec, Vec<Part>)>,
    config: &ModelConfig,
    architecture: &ExpertLayers,
    layer: usize,
) {
    let Some(experts) = &config.experts else { return };
    let (hidden, ffn, n_experts) = (config.hidden_size, experts.ffn_size, experts.n_experts);
    let packed = LayerWeightNames::new(layer);
    let source = |template: &str| template.replacen("{}", &layer.to_string(), 1);
    specs.push(matrix(
        &packed.router,
        hidden,
        &[(source(architecture.router), n_experts)],
    ));
    if let Some(bias) = architecture.router_bias {
        specs.push(vector(
            &packed.router_bias,
            vec![Part::plain(source(bias), vec![n_experts])],
        ));
    }
    for expert in 0..n_experts {
        let names = packed.expert(expert, architecture);
        match &architecture.tensors {
            ExpertTensors::Each { gate, up, down } => {
                let source = |template: &str| source(template).replacen("{}", &expert.to_string(), 1);
                specs.push(matrix(
                    &names.gate_up,
                    hidden,
                    &[(source(gate), ffn), (source(up), ffn)],
                ));
                specs.push(matrix(&names.down, ffn, &[(source(down), hidden)]));
            }
            ExpertTensors::Stacked { prefix } => {
                let prefix = source(prefix);
                let (gate_up, down) = (format!("{prefix}gate_up_proj"), format!("{prefix}down_proj"));
                let (gate_up_part, down_part) = if experts.is_mxfp4 {
                    (
                        Part::mxfp4(
                            &gate_up,
                            expert,
                            n_experts,
                            [2 * ffn, hidden],
                            Derivation::Mxfp4 {
                                expert,
                                is_alternating: true,
                            },
                        ),
                        Part::mxfp4(
                            &down,
                            expert,
                            n_experts,
                            [hidden, ffn],
                            Derivation::Mxfp4 {
                                expert,
                                is_alternating: false,
                            },
                        ),
                    )
                } else {
                    let transposed = |is_alternating| Derivation::Transposed { expert, is_alternating };
                    (
                        Part::stacked(
                            &gate_up,
                            expert,
                            n_experts,
                            &[hidden, 2 * ffn],
                            vec![2 * ffn, hidden],
                            transposed(true),
                        ),
                        Part::stacked(
                            &down,
                            expert,
                            n_experts,
                            &[ffn, hidden],
                            vec![hidden, ffn],
                            transposed(false),
                        ),
                    )
                };
                let row = |is_alternating| Derivation::Row { expert, is_alternating };
                let bias = |name: &str, len: usize, is_alternating| {
                    Part::stacked(
                        &format!("{name}_bias"),
                        expert,
                        n_experts,
                        &[len],
                        vec![len],
                        row(is_alternating),
                    )
                };
                specs.push(matrix_of(&names.gate_up, hidden, vec![gate_up_part]));
                specs.push(matrix_of(&names.down, ffn, vec![down_part]));
                specs.extend(
                    names
                        .gate_up_bias
                        .map(|name| vector(&name, vec![bias(&gate_up, 2 * ffn, true)])),
                );
                specs.extend(
                    names
                        .down_bias
                        .map(|name| vector(&name, vec![bias(&down, hidden, false)])),
                );
            }
        }
    }
}

/// The name of a projection's bias.
fn bias_of(weight: &str) -> String {
    format!("{}bias", weight.strip_suffix("weight").unwrap_or(weight))
}

fn matrix(name: &str, n_in: usize, parts: &[(String, usize)]) -> (WeightSpec, Vec<Part>) {
    let part = |(name, n_out): &(String, usize)| Part::plain(name.clone(), vec![*n_out, n_in]);
    matrix_of(name, n_in, parts.iter().map(part).collect())
}

fn matrix_of(name: &str, n_in: usize, parts: Vec<Part>) -> (WeightSpec, Vec<Part>) {
    let n_out = parts.iter().map(|part| part.shape[0]).sum();
    spec(name, WeightKind::Matrix { n_out, n_in }, parts)
}

fn vector(name: &str, parts: Vec<Part>) -> (WeightSpec, Vec<Part>) {
    let len = parts.iter().map(|part| part.shape[0]).sum();
    spec(name, WeightKind::Vector { len }, parts)
}

fn spec(name: &str, kind: WeightKind, parts: Vec<Part>) -> (WeightSpec, Vec<Part>) {
    let spec = WeightSpec {
        name: name.to_owned(),
        kind,
        parts: parts.iter().map(|part| part.name.clone()).collect(),
    };
    (spec, parts)
}

/// Checks that every tensor is there with its shape and a dtype we read, before anything is packed.
pub(crate) fn check_tensors(config: &ModelConfig, table: &TensorTable) -> Result<(), ModelError> {
    let parts = weight_specs(config).into_iter().flat_map(|(_, parts)| parts);
    for required in parts.flat_map(|part| part.tensors) {
        let RequiredTensor { name, shape, is_bytes } = required;
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
        let (expected, is_right) = match is_bytes {
            true => ("dtype U8", tensor.dtype == Dtype::U8),
            false => ("dtype F32, F16 or BF16", weight_dtype(tensor.dtype).is_some()),
        };
        if !is_right {
            let found = format!("{:?}", tensor.dtype);
            return wrong(tensor.file.to_owned(), expected.to_owned(), found);
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
        let parts = weight_specs(config).into_iter().flat_map(|(_, parts)| parts);
        DummyWeights {
            seed,
            shapes: parts.map(|part| (part.name, part.shape)).collect(),
        }
    }
}

impl WeightSource for DummyWeights {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let shape = self.shapes.get(name).ok_or("the model has no such tensor")?;
        let n_elements = shape.iter().product();
        // Vectors are norm weights, ones, but for what would shift a sum.
        let data = match shape.len() {
            1 if name.contains("bias") || name.ends_with("sinks") => dummy::zeros(n_elements),
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
