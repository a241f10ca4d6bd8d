//! config.json in both spellings -> the numbers the decoder needs. Validates everything; reads no other file.

use std::path::Path;

use baton_kernels::{DType, RopeParams};
use serde_json::Value;

use super::architecture::{ARCHITECTURES, Architecture, supported_names};
use super::error::ModelError;
use super::fields::{Fields, brief};

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which tensors it has.
    pub architecture: &'static Architecture,
    /// Rows of the embedding, and logits of one position.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
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
    /// Rotary embedding.
    pub rope: RopeConfig,
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

/// Rotary position embedding over the whole head.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of frequencies.
    pub theta: f64,
    /// How frequencies are changed for contexts longer than the pre-training's.
    pub scaling: RopeScaling,
}

/// Variants of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_max_position_embeddings: f64,
    },
}

// Far above any published model; they keep products of sizes inside usize and allocations sane.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 28;

impl ModelConfig {
    /// Reads the bytes of config.json; `file` is for messages.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<ModelConfig, ModelError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| ModelError::malformed(file, error))?;
        let fields = Fields::new(file, &value)?;
        let architecture = architecture_of(&fields)?;
        refuse_what_would_change_the_result(&fields, architecture)?;

        let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
        let n_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
        let n_kv_heads = fields.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(fields.wrong(
                "num_key_value_heads",
                format_args!("a divisor of num_attention_heads ({n_heads})"),
                n_kv_heads,
            ));
        }
        let head_dim = match fields.size("head_dim", MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(n_heads) && hidden_size / n_heads <= MAX_HEAD_DIM => {
                hidden_size / n_heads
            }
            None => {
                let expected = format!("head_dim, or a hidden_size that num_attention_heads ({n_heads}) divides");
                return Err(fields.wrong("hidden_size", expected, hidden_size));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(fields.wrong("head_dim", "an even number", head_dim));
        }
        let dtype = match fields.spelling(&["dtype", "torch_dtype"]) {
            Some(spelling) => {
                let name = fields.string(spelling)?.unwrap_or_default();
                let dtype = name
                    .parse()
                    .map_err(|_| fields.wrong(spelling, "float32, float16 or bfloat16", name))?;
                Some(dtype)
            }
            None => None,
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: fields.required_size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            ffn_size: fields.required_size("intermediate_size", MAX_WIDTH)?,
            n_layers: fields.required_size("num_hidden_layers", MAX_LAYERS)?,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: fields.positive_float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: rope_of(&fields)?,
            max_position_embeddings: fields.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(2048),
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            dtype,
            bos_token_id: fields.ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
            eos_token_ids: fields.ids("eos_token_id")?.unwrap_or_default(),
        })
    }

    /// Parameters of all tensors.
    pub fn n_parameters(&self) -> usize {
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size * self.hidden_size;
        let attention = self.hidden_size * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads);
        let ffn = 3 * self.hidden_size * self.ffn_size;
        embeddings + self.n_layers * (attention + ffn + 2 * self.hidden_size) + self.hidden_size
    }
}

impl RopeConfig {
    /// Inverse frequencies for heads of `head_dim` elements, `head_dim / 2` of them.
    pub fn params(&self, head_dim: usize) -> RopeParams {
        let inv_freq = (0..head_dim / 2)
            .map(|pair| {
                let inv_freq = self.theta.powf(-((2 * pair) as f64) / head_dim as f64);
                self.scaling.apply(inv_freq) as f32
            })
            .collect();
        RopeParams {
            inv_freq,
            attention_factor: 1.0,
        }
    }
}

impl RopeScaling {
    fn apply(&self, inv_freq: f64) -> f64 {
        match *self {
            RopeScaling::Default => inv_freq,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / inv_freq;
                if wavelength > original / low_freq_factor {
                    inv_freq / factor
                } else if wavelength < original / high_freq_factor {
                    inv_freq
                } else {
                    let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * inv_freq / factor + kept * inv_freq
                }
            }
        }
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

fn refuse_what_would_change_the_result(fields: &Fields<'_>, architecture: &Architecture) -> Result<(), ModelError> {
    for &field in architecture.must_be_false {
        if fields.boolean(field)? == Some(true) {
            return Err(fields.wrong(field, format_args!("false (for {})", architecture.name), true));
        }
    }
    if let Some(activation) = fields.string("hidden_act")?
        && activation != "silu"
    {
        return Err(fields.wrong("hidden_act", "silu", activation));
    }
    if let Some(quantization) = fields.get("quantization_config") {
        return Err(fields.wrong(
            "quantization_config",
            "none (f32, f16 or bf16 weights)",
            brief(quantization),
        ));
    }
    if let Some(factor) = fields.float("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(fields.wrong("partial_rotary_factor", "1", factor));
    }
    if let Some(layer_types) = fields.get("layer_types") {
        let all_full = layer_types.as_array().is_some_and(|types| {
            types
                .iter()
                .all(|layer_type| layer_type.as_str() == Some("full_attention"))
        });
        if !all_full {
            return Err(fields.wrong("layer_types", "a list of full_attention", brief(layer_types)));
        }
    }
    Ok(())
}

/// `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both.
fn rope_of(fields: &Fields<'_>) -> Result<RopeConfig, ModelError> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let parameters = fields.object("rope_parameters")?;
    let theta = match parameters {
        Some(parameters) => parameters.positive_float("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.positive_float("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    let scaling = match parameters {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let Some(scaling) = scaling else {
        return Ok(RopeConfig {
            theta,
            scaling: RopeScaling::Default,
        });
    };
    if let Some(factor) = scaling.float("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(scaling.wrong("partial_rotary_factor", "1", factor));
    }
    let spelling = scaling.spelling(&["rope_type", "type"]).unwrap_or("rope_type");
    let scaling = match scaling.string(spelling)? {
        None | Some("default") => RopeScaling::Default,
        Some("llama3") => {
            let low_freq_factor = scaling.required_positive_float("low_freq_factor")?;
            let high_freq_factor = scaling.required_positive_float("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("a number above low_freq_factor ({low_freq_factor})");
                return Err(scaling.wrong("high_freq_factor", expected, high_freq_factor));
            }
            RopeScaling::Llama3 {
                factor: scaling.required_positive_float("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: scaling
                    .required_positive_float("original_max_position_embeddings")?,
            }
        }
        Some(other) => return Err(scaling.wrong(spelling, "default or llama3", format_args!("{other:?}"))),
    };
    Ok(RopeConfig { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { factor, .. } if factor == 8.0));
        assert_eq!(
            with(r#""rope_scaling":null"#).unwrap().rope,
            with(r#""rope_parameters":{"rope_type":"default","rope_theta":1e4}"#)
                .unwrap()
                .rope
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
            (r#""attention_bias":true"#, ["attention_bias", "false", "true"]),
            (r#""mlp_bias":true"#, ["mlp_bias", "false", "true"]),
            (r#""hidden_act":"gelu""#, ["hidden_act", "silu", "gelu"]),
            (r#""torch_dtype":"int8""#, ["torch_dtype", "bfloat16", "int8"]),
            (
                r#""rope_scaling":{"rope_type":"yarn","factor":2.0}"#,
                ["rope_scaling.rope_type", "llama3", "yarn"],
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
}
