//! config.json in both spellings -> the numbers the decoder needs. Validates everything; reads no other file.

use std::path::Path;

use baton_kernels::{Activation, DType};
use baton_scheduler::layer_groups::LayerGroups;
use serde_json::Value;

use super::architecture::{ARCHITECTURES, Architecture, AttentionBias, ExpertTensors, Windows, supported_names};
use super::error::ModelError;
use super::fields::{Fields, brief};
use super::rope::{RopeConfig, ropes_of};

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which tensors it has, and what is particular to its family.
    pub architecture: &'static Architecture,
    /// Rows of the embedding, and logits of one position.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part of ordinary layers.
    pub ffn_size: usize,
    /// Layers.
    pub n_layers: usize,
    /// Query heads of a layer.
    pub n_heads: usize,
    /// KV heads of a layer; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f32,
    /// Rotary embeddings, as the layers number them.
    pub ropes: Vec<RopeConfig>,
    /// What differs between layers.
    pub layers: Vec<LayerConfig>,
    /// Factor on q k.
    pub attention_scale: f32,
    /// `cap * tanh(score / cap)` before attention's softmax.
    pub attention_soft_cap: Option<f32>,
    /// The same on the logits.
    pub logit_soft_cap: Option<f32>,
    /// Which projections of attention have a bias: query, key and value together, and the output.
    pub attention_bias: [bool; 2],
    /// Of the feed-forward parts and the experts.
    pub activation: Activation,
    /// Factor on the embedding.
    pub embedding_scale: f32,
    /// Of the layers that have experts.
    pub experts: Option<ExpertsConfig>,
    /// The longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// What the files store, by the configuration's own word.
    pub dtype: Option<DType>,
    /// Begins a text.
    pub bos_token_id: Option<u32>,
    /// End generation, where generation_config.json does not say.
    pub eos_token_ids: Vec<u32>,
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// A query sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// Index in [`ModelConfig::ropes`].
    pub rope: usize,
    /// A mixture of experts in place of the feed-forward part.
    pub has_experts: bool,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Width inside an expert.
    pub ffn_size: usize,
    /// The chosen experts' weights sum to one.
    pub renormalize: bool,
    /// The experts' matrices are stored as MXFP4.
    pub is_mxfp4: bool,
}

// Far above any published model; they keep products of sizes inside usize and allocations sane.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_EXPERTS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 28;

/// Values of MXFP4 that share a scale (OCP Microscaling Formats, version 1.0).
pub(crate) const MXFP4_BLOCK: usize = 32;

impl ModelConfig {
    /// Reads the bytes of config.json; `file` is for messages.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<ModelConfig, ModelError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| ModelError::malformed(file, error))?;
        let fields = Fields::new(file, &value)?;
        let architecture = architecture_of(&fields)?;
        for &field in architecture.must_be_false {
            if fields.boolean(field)? == Some(true) {
                return Err(fields.wrong(field, format_args!("false (for {})", architecture.name), true));
            }
        }
        let defaults = &architecture.defaults;
        let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
        let n_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
        let (n_heads, n_kv_heads, head_dim) = heads(&fields, architecture, hidden_size)?;
        let is_mxfp4 = is_mxfp4(&fields, architecture)?;
        let experts = experts(&fields, architecture, is_mxfp4)?;
        let ffn_size = fields.required_size("intermediate_size", MAX_WIDTH)?;
        if is_mxfp4 {
            for (field, size) in [("hidden_size", hidden_size), ("intermediate_size", ffn_size)] {
                if !size.is_multiple_of(MXFP4_BLOCK) {
                    return Err(fields.wrong(
                        field,
                        format_args!("a multiple of {MXFP4_BLOCK} for mxfp4 weights"),
                        size,
                    ));
                }
            }
        }
        let windows = windows(&fields, architecture, n_layers)?;
        let ropes = ropes_of(&fields, architecture, head_dim, windows.iter().any(Option::is_some))?;
        let has_experts = has_experts(&fields, architecture, n_layers)?;
        let layers = (0..n_layers)
            .map(|layer| LayerConfig {
                window: windows[layer],
                // Windowed layers take the last, which may be the only one.
                rope: if windows[layer].is_some() { ropes.len() - 1 } else { 0 },
                has_experts: has_experts[layer],
            })
            .collect();
        let scale_of = match architecture.attention_scale_field {
            Some(field) => fields.positive_float(field)?.unwrap_or(head_dim as f64),
            None => head_dim as f64,
        };
        let soft_cap = |field| match architecture.has_soft_caps {
            true => Ok(fields.positive_float(field)?.map(|cap| cap as f32)),
            false => Ok(None),
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: fields.required_size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            ffn_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: fields.positive_float("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps) as f32,
            ropes,
            layers,
            attention_scale: (1.0 / scale_of.sqrt()) as f32,
            attention_soft_cap: soft_cap("attn_logit_softcapping")?,
            logit_soft_cap: soft_cap("final_logit_softcapping")?,
            attention_bias: match architecture.attention_bias {
                AttentionBias::Never => [false, false],
                AttentionBias::QueryKeyValue => [true, false],
                AttentionBias::ByField { default } => [fields.boolean("attention_bias")?.unwrap_or(default); 2],
            },
            activation: activation(&fields, architecture)?,
            embedding_scale: if architecture.scales_embedding {
                (hidden_size as f64).sqrt() as f32
            } else {
                1.0
            },
            experts,
            max_position_embeddings: fields.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(2048),
            tie_word_embeddings: fields
                .boolean("tie_word_embeddings")?
                .unwrap_or(defaults.tie_word_embeddings),
            dtype: dtype(&fields)?,
            bos_token_id: fields.ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
            eos_token_ids: fields.ids("eos_token_id")?.unwrap_or_default(),
        })
    }

    /// Longest sequence for which the rotary factors of short contexts are right, where the model has two kinds.
    pub fn short_context(&self) -> Option<usize> {
        self.ropes.iter().find_map(RopeConfig::short_context)
    }

    /// Which layers share blocks: those of one window.
    pub fn layer_groups(&self) -> LayerGroups {
        LayerGroups::of_windows(&self.layers.iter().map(|layer| layer.window).collect::<Vec<_>>())
    }
}

fn architecture_of(fields: &Fields<'_>) -> Result<&'static Architecture, ModelError> {
    let wrong = |found: String| {
        let expected = format!("one of the supported architectures ({})", supported_names());
        Err(fields.wrong("architectures", expected, found))
    };
    let Some(value) = fields.get("architectures") else {
        return wrong("nothing".to_owned());
    };
    let names: Vec<&str> = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    match ARCHITECTURES
        .iter()
        .find(|architecture| names.contains(&architecture.name))
    {
        Some(architecture) => Ok(architecture),
        None => wrong(brief(value)),
    }
}

/// Query heads, KV heads, and elements of a head.
fn heads(
    fields: &Fields<'_>,
    architecture: &Architecture,
    hidden_size: usize,
) -> Result<(usize, usize, usize), ModelError> {
    let n_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
    let n_kv_heads = fields.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(n_heads);
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(fields.wrong(
            "num_key_value_heads",
            format_args!("a divisor of num_attention_heads ({n_heads})"),
            n_kv_heads,
        ));
    }
    let head_dim = match (fields.size("head_dim", MAX_HEAD_DIM)?, architecture.defaults.head_dim) {
        (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
        (None, None) if hidden_size.is_multiple_of(n_heads) && hidden_size / n_heads <= MAX_HEAD_DIM => {
            hidden_size / n_heads
        }
        (None, None) => {
            let expected = format!("head_dim, or a hidden_size that num_attention_heads ({n_heads}) divides");
            return Err(fields.wrong("hidden_size", expected, hidden_size));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "an even number", head_dim));
    }
    Ok((n_heads, n_kv_heads, head_dim))
}

fn dtype(fields: &Fields<'_>) -> Result<Option<DType>, ModelError> {
    let Some(spelling) = fields.spelling(&["dtype", "torch_dtype"]) else {
        return Ok(None);
    };
    let name = fields.string(spelling)?.unwrap_or_default();
    let dtype = name
        .parse()
        .map_err(|_| fields.wrong(spelling, "float32, float16 or bfloat16", name))?;
    Ok(Some(dtype))
}

/// The window of each layer.
fn windows(
    fields: &Fields<'_>,
    architecture: &Architecture,
    n_layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let is_switched_on = match architecture.windows {
        Windows::Never => false,
        Windows::FromLayer => fields.boolean("use_sliding_window")?.unwrap_or(false),
        Windows::All | Windows::AllButEvery { .. } => true,
    };
    let window = match is_switched_on {
        true => fields.size("sliding_window", MAX_POSITIONS)?,
        false => None,
    };
    let is_windowed: Vec<bool> = if let Some(types) = fields.get("layer_types") {
        let types: Option<Vec<&str>> = types
            .as_array()
            .and_then(|types| types.iter().map(Value::as_str).collect());
        let known = |types: &Vec<&str>| {
            types.len() == n_layers
                && types
                    .iter()
                    .all(|kind| *kind == "full_attention" || (*kind == "sliding_attention" && window.is_some()))
        };
        match types.filter(known) {
            Some(types) => types.iter().map(|kind| *kind == "sliding_attention").collect(),
            None => {
                let expected = match window {
                    Some(_) => format!("{n_layers} of full_attention and sliding_attention"),
                    None => format!("{n_layers} of full_attention"),
                };
                let found = brief(fields.get("layer_types").unwrap_or(&Value::Null));
                return Err(fields.wrong("layer_types", expected, found));
            }
        }
    } else {
        let first = match architecture.windows {
            Windows::FromLayer => match fields.get("max_window_layers").map(Value::as_u64) {
                None => n_layers,
                Some(Some(first)) => usize::try_from(first).unwrap_or(n_layers),
                Some(None) => {
                    let found = brief(fields.get("max_window_layers").unwrap_or(&Value::Null));
                    return Err(fields.wrong("max_window_layers", "an integer, at least 0", found));
                }
            },
            _ => 0,
        };
        let full_every = match architecture.windows {
            Windows::AllButEvery { field, default } => {
                // Older files of some families have an underscore before it.
                let old = format!("_{field}");
                let found = match fields.size(field, MAX_LAYERS)? {
                    Some(every) => Some(every),
                    None => fields.size(&old, MAX_LAYERS)?,
                };
                found.unwrap_or(default)
            }
            _ => usize::MAX,
        };
        (0..n_layers)
            .map(|layer| layer >= first && !(layer + 1).is_multiple_of(full_every))
            .collect()
    };
    Ok(is_windowed
        .into_iter()
        .map(|is_windowed| window.filter(|_| is_windowed))
        .collect())
}

fn activation(fields: &Fields<'_>, architecture: &Architecture) -> Result<Activation, ModelError> {
    if let Some(activation) = architecture.activation {
        return Ok(match activation {
            Activation::ClampedSwish { alpha, limit } => Activation::ClampedSwish {
                alpha,
                limit: fields.positive_float("swiglu_limit")?.unwrap_or(f64::from(limit)) as f32,
            },
            other => other,
        });
    }
    let field = fields
        .spelling(&["hidden_activation", "hidden_act"])
        .unwrap_or("hidden_act");
    match fields.string(field)? {
        // Gemma's first files say gelu and mean the approximation, and that is also its default.
        Some("gelu_pytorch_tanh" | "gelu") if architecture.scales_embedding => Ok(Activation::GeluTanh),
        None if architecture.scales_embedding => Ok(Activation::GeluTanh),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(fields.wrong(field, "silu or gelu_pytorch_tanh", format_args!("{other:?}"))),
    }
}

/// Whether the experts are stored as MXFP4; any other quantization is refused.
fn is_mxfp4(fields: &Fields<'_>, architecture: &Architecture) -> Result<bool, ModelError> {
    let Some(quantization) = fields.get("quantization_config") else {
        return Ok(false);
    };
    let is_stacked = architecture
        .experts
        .as_ref()
        .is_some_and(|experts| matches!(experts.tensors, ExpertTensors::Stacked { .. }));
    if is_stacked && quantization.get("quant_method").and_then(Value::as_str) == Some("mxfp4") {
        return Ok(true);
    }
    let expected = match is_stacked {
        true => "none (f32, f16 or bf16 weights) or quant_method mxfp4",
        false => "none (f32, f16 or bf16 weights)",
    };
    Err(fields.wrong("quantization_config", expected, brief(quantization)))
}

fn experts(
    fields: &Fields<'_>,
    architecture: &Architecture,
    is_mxfp4: bool,
) -> Result<Option<ExpertsConfig>, ModelError> {
    let Some(experts) = &architecture.experts else {
        return Ok(None);
    };
    let n_experts = fields.required_size(experts.n_experts_field, MAX_EXPERTS)?;
    let top_k = fields.required_size("num_experts_per_tok", MAX_EXPERTS)?;
    if top_k > n_experts {
        let expected = format!("at most {} ({n_experts})", experts.n_experts_field);
        return Err(fields.wrong("num_experts_per_tok", expected, top_k));
    }
    Ok(Some(ExpertsConfig {
        n_experts,
        top_k,
        ffn_size: fields.required_size(experts.ffn_size_field, MAX_WIDTH)?,
        renormalize: match experts.renormalize_field {
            Some(field) => fields.boolean(field)?.unwrap_or(false),
            None => true,
        },
        is_mxfp4,
    }))
}

/// Which layers have experts.
fn has_experts(fields: &Fields<'_>, architecture: &Architecture, n_layers: usize) -> Result<Vec<bool>, ModelError> {
    let Some(experts) = &architecture.experts else {
        return Ok(vec![false; n_layers]);
    };
    if !experts.has_dense_layers {
        return Ok(vec![true; n_layers]);
    }
    let dense = fields.ids("mlp_only_layers")?.unwrap_or_default();
    let step = fields.size("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
    Ok((0..n_layers)
        .map(|layer| !dense.contains(&(layer as u32)) && (layer + 1).is_multiple_of(step))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RopeScaling;

    fn parse(text: &str) -> Result<ModelConfig, ModelError> {
        ModelConfig::parse(Path::new("config.json"), text.as_bytes())
    }

    const SMALL: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":176,
        "num_attention_heads":4,"num_hidden_layers":3,"vocab_size":4096,"rms_norm_eps":1e-6"#;

    fn with(more: &str) -> Result<ModelConfig, ModelError> {
        parse(&format!("{SMALL},{more}}}"))
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let llama3 =
            r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let old = with(&format!(
            r#""torch_dtype":"bfloat16","rope_theta":5e5,"rope_scaling":{{"rope_type":"llama3",{llama3}}}"#
        ))
        .unwrap();
        let older = with(&format!(
            r#""torch_dtype":"bfloat16","rope_theta":5e5,"rope_scaling":{{"type":"llama3",{llama3}}}"#
        ))
        .unwrap();
        let new = with(&format!(
            r#""dtype":"bfloat16","layer_types":["full_attention","full_attention","full_attention"],
            "rope_parameters":{{"rope_theta":5e5,"rope_type":"llama3",{llama3}}}"#
        ))
        .unwrap();
        assert_eq!(old, older);
        assert_eq!(old, new);
        assert_eq!(old.dtype, Some(DType::Bf16));
        assert!(matches!(old.ropes[0].scaling, RopeScaling::Llama3 { factor, .. } if factor == 8.0));
        assert_eq!(
            with(r#""rope_scaling":null"#).unwrap().ropes,
            with(r#""rope_parameters":{"rope_type":"default","rope_theta":1e4}"#)
                .unwrap()
                .ropes
        );
    }

    #[test]
    fn derived_values() {
        let config = with(r#""eos_token_id":2"#).unwrap();
        assert_eq!(
            (config.head_dim, config.n_kv_heads, config.eos_token_ids),
            (16, 4, vec![2])
        );
        assert_eq!(with(r#""eos_token_id":[4,5],"head_dim":32"#).unwrap().head_dim, 32);
    }

    /// Wrong input is refused in one line that names file, field and value.
    #[test]
    fn refusals() {
        for (more, parts) in [
            (r#""num_key_value_heads":3"#, ["num_key_value_heads", "divisor", "3"]),
            (r#""num_attention_heads":0"#, ["num_attention_heads", "from 1", "0"]),
            (r#""num_attention_heads":-4"#, ["num_attention_heads", "integer", "-4"]),
            (
                r#""num_attention_heads":"4""#,
                ["num_attention_heads", "integer", "\"4\""],
            ),
            (r#""hidden_size":65"#, ["hidden_size", "divides", "65"]),
            (r#""head_dim":15"#, ["head_dim", "even", "15"]),
            (r#""vocab_size":99999999999"#, ["vocab_size", "integer", "99999999999"]),
            (r#""mlp_bias":true"#, ["mlp_bias", "false", "true"]),
            (r#""hidden_act":"relu""#, ["hidden_act", "silu", "relu"]),
            (r#""torch_dtype":"int8""#, ["torch_dtype", "bfloat16", "int8"]),
            (
                r#""rope_scaling":{"rope_type":"dynamic","factor":2.0}"#,
                ["rope_scaling.rope_type", "llama3", "dynamic"],
            ),
            (
                r#""rope_scaling":{"rope_type":"yarn"}"#,
                ["rope_scaling.factor", "above 0", "nothing"],
            ),
            (
                r#""rope_scaling":{"type":"longrope","short_factor":[1.0]}"#,
                ["rope_scaling.short_factor", "8 numbers", "1"],
            ),
            (
                r#""rope_scaling":{"type":"longrope","short_factor":[1.0, 0]}"#,
                ["rope_scaling.short_factor", "above 0", "[1.0,0]"],
            ),
            (
                r#""partial_rotary_factor":0.2"#,
                ["partial_rotary_factor", "even number", "0.2"],
            ),
            (
                r#""rope_scaling":{"type":"llama3"}"#,
                ["rope_scaling.low_freq_factor", "above 0", "nothing"],
            ),
            (r#""rope_scaling":[1]"#, ["rope_scaling", "object", "[1]"]),
            (r#""rope_theta":-1"#, ["rope_theta", "above 0", "-1"]),
            (
                r#""quantization_config":{"bits":4}"#,
                ["quantization_config", "none", "bits"],
            ),
            (
                r#""layer_types":["sliding_attention"]"#,
                ["layer_types", "full_attention", "sliding_attention"],
            ),
            (
                r#""architectures":["FalconForCausalLM"]"#,
                ["architectures", "LlamaForCausalLM", "FalconForCausalLM"],
            ),
            (
                r#""architectures":null"#,
                ["architectures", "LlamaForCausalLM", "nothing"],
            ),
            (r#""eos_token_id":[1,-2]"#, ["eos_token_id", "token id", "-2"]),
        ] {
            let message = with(more).unwrap_err().to_string();
            assert!(message.starts_with("config.json: "), "{message}");
            assert!(!message.contains('\n'), "{message}");
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
        for broken in ["", "{", "[]", "null", "\u{0}", "{\"architectures\": 3}"] {
            assert!(parse(broken).is_err(), "{broken:?}");
        }
        assert!(
            parse(r#"{"architectures":["LlamaForCausalLM"]}"#)
                .unwrap_err()
                .to_string()
                .contains("hidden_size")
        );
    }

    /// One architecture, with fields beyond the small model's.
    fn of(name: &str, more: &str) -> ModelConfig {
        let more = if more.is_empty() {
            String::new()
        } else {
            format!(",{more}")
        };
        parse(&format!("{}{more}}}", SMALL.replace("LlamaForCausalLM", name))).unwrap()
    }

    fn windows_of(config: &ModelConfig) -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn windows_follow_the_family_or_the_list_of_layers() {
        let window = r#""sliding_window":8"#;
        assert_eq!(windows_of(&of("LlamaForCausalLM", window)), [None; 3]);
        assert_eq!(windows_of(&of("MistralForCausalLM", window)), [Some(8); 3]);
        assert_eq!(
            windows_of(&of("MistralForCausalLM", r#""sliding_window":null"#)),
            [None; 3]
        );
        assert_eq!(of("MistralForCausalLM", window).layer_groups().windows(), [Some(8)]);
        let qwen = r#""sliding_window":8,"max_window_layers":1"#;
        assert_eq!(windows_of(&of("Qwen2ForCausalLM", qwen)), [None; 3]);
        assert_eq!(
            windows_of(&of("Qwen2ForCausalLM", &format!("{qwen},\"use_sliding_window\":true"))),
            [None, Some(8), Some(8)]
        );
        let gemma = of("Gemma2ForCausalLM", window);
        assert_eq!(windows_of(&gemma), [Some(8), None, Some(8)]);
        assert_eq!(gemma.layer_groups().windows(), [None, Some(8), Some(8)]);
        let listed = r#""sliding_window":8,"layer_types":["full_attention","sliding_attention","full_attention"]"#;
        assert_eq!(windows_of(&of("Gemma2ForCausalLM", listed)), [None, Some(8), None]);
        let pattern = r#""sliding_window":8,"_sliding_window_pattern":3"#;
        assert_eq!(windows_of(&of("Gemma3ForCausalLM", pattern)), [Some(8), Some(8), None]);
    }

    #[test]
    fn gemma_3_turns_windowed_layers_by_a_rope_of_their_own() {
        let old = r#""sliding_window":8,"sliding_window_pattern":3,"rope_theta":2e6,"rope_local_base_freq":5e4,
            "rope_scaling":{"rope_type":"linear","factor":8.0}"#;
        let new = r#""sliding_window":8,"sliding_window_pattern":3,"rope_parameters":{
            "full_attention":{"rope_type":"linear","factor":8.0,"rope_theta":2e6},
            "sliding_attention":{"rope_type":"default","rope_theta":5e4}}"#;
        let config = of("Gemma3ForCausalLM", old);
        assert_eq!(config, of("Gemma3ForCausalLM", new));
        assert_eq!(
            config.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(),
            [1, 1, 0]
        );
        assert_eq!((config.ropes[0].theta, config.ropes[1].theta), (2e6, 5e4));
        assert_eq!(config.ropes[0].variants()[0].inv_freq[0], 0.125);
        assert!(config.tie_word_embeddings && config.embedding_scale == 8.0);
    }

    #[test]
    fn longrope_has_two_tables_and_a_length_that_decides() {
        let factors = |first: f64| format!("[{first},1,1,1,1,1,1,2]");
        let more = format!(
            r#""max_position_embeddings":4096,"original_max_position_embeddings":256,
            "rope_scaling":{{"type":"longrope","short_factor":{},"long_factor":{}}}"#,
            factors(1.0),
            factors(4.0)
        );
        let config = of("Phi3ForCausalLM", &more);
        assert_eq!(config.short_context(), Some(256));
        let [short, long] = &config.ropes[0].variants()[..] else {
            panic!("two tables")
        };
        assert_eq!((short.inv_freq[0], long.inv_freq[0]), (1.0, 0.25));
        // sqrt(1 + ln(4096 / 256) / ln(256))
        assert!((short.attention_factor - 1.5_f32.sqrt()).abs() < 1e-6);
        assert_eq!(short.attention_factor, long.attention_factor);
    }

    #[test]
    fn experts_and_their_layers() {
        let moe =
            r#""num_experts":8,"num_experts_per_tok":3,"moe_intermediate_size":48,"mlp_only_layers":[1],"head_dim":16"#;
        let config = of("Qwen3MoeForCausalLM", moe);
        assert_eq!(
            config.layers.iter().map(|layer| layer.has_experts).collect::<Vec<_>>(),
            [true, false, true]
        );
        let experts = config.experts.unwrap();
        assert_eq!((experts.n_experts, experts.top_k, experts.ffn_size), (8, 3, 48));
        assert!(!experts.renormalize, "norm_topk_prob is false where it is absent");
        let message = parse(&format!(
            "{},\"num_local_experts\":2,\"num_experts_per_tok\":3}}",
            SMALL.replace("LlamaForCausalLM", "MixtralForCausalLM")
        ));
        let message = message.unwrap_err().to_string();
        assert!(
            message.contains("num_experts_per_tok") && message.contains('3'),
            "{message}"
        );
        let mxfp4 = r#""hidden_act":"silu","quantization_config":{"quant_method":"mxfp4"},"num_local_experts":4,
            "num_experts_per_tok":2,"swiglu_limit":5.0"#;
        let parsed = parse(&format!(
            "{},{mxfp4}}}",
            SMALL
                .replace("LlamaForCausalLM", "GptOssForCausalLM")
                .replace("176", "192")
        ))
        .unwrap();
        assert!(
            parsed
                .experts
                .is_some_and(|experts| experts.is_mxfp4 && experts.renormalize)
        );
        assert!(matches!(parsed.activation, Activation::ClampedSwish { limit: 5.0, .. }));
    }
}
