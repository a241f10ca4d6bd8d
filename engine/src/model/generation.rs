//! generation_config.json: what ends generation, and the sampling values the model's makers suggest. It applies none of them.

use std::path::Path;

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;

/// What generation_config.json says; every field may be absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end generation.
    pub eos_token_ids: Vec<u32>,
    /// False asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// Suggested temperature.
    pub temperature: Option<f32>,
    /// Suggested top-k; 0 keeps all.
    pub top_k: Option<u32>,
    /// Suggested top-p.
    pub top_p: Option<f32>,
    /// Suggested repetition penalty; 1 is off.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the bytes of generation_config.json; `file` is for messages.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<GenerationConfig, ModelError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| ModelError::malformed(file, error))?;
        let fields = Fields::new(file, &value)?;
        let temperature = fields.float("temperature")?;
        if let Some(temperature) = temperature.filter(|temperature| *temperature < 0.0) {
            return Err(fields.wrong("temperature", "a number of at least 0", temperature));
        }
        let top_p = fields.positive_float("top_p")?;
        if let Some(top_p) = top_p.filter(|top_p| *top_p > 1.0) {
            return Err(fields.wrong("top_p", "a number above 0 and at most 1", top_p));
        }
        let repetition_penalty = fields.positive_float("repetition_penalty")?;
        let top_k = match fields.get("top_k").and_then(Value::as_i64) {
            // transformers writes 0, vLLM -1, for no limit.
            Some(0 | -1) => Some(0),
            _ => fields.size("top_k", u32::MAX as usize)?.map(|top_k| top_k as u32),
        };
        Ok(GenerationConfig {
            eos_token_ids: fields.ids("eos_token_id")?.unwrap_or_default(),
            do_sample: fields.boolean("do_sample")?,
            temperature: temperature.map(|temperature| temperature as f32),
            top_k,
            top_p: top_p.map(|top_p| top_p as f32),
            repetition_penalty: repetition_penalty.map(|penalty| penalty as f32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig, ModelError> {
        GenerationConfig::parse(Path::new("generation_config.json"), text.as_bytes())
    }

    #[test]
    fn eos_is_one_id_or_several() {
        assert_eq!(parse(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
        assert_eq!(parse(r#"{"eos_token_id": [3, 4]}"#).unwrap().eos_token_ids, [3, 4]);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn suggestions_are_read_and_checked() {
        let config = parse(r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": -1}"#).unwrap();
        assert_eq!(config.repetition_penalty, None);
        assert_eq!(
            parse(r#"{"repetition_penalty": 1.05}"#).unwrap().repetition_penalty,
            Some(1.05)
        );
        assert_eq!(
            (config.do_sample, config.temperature, config.top_p, config.top_k),
            (Some(true), Some(0.6), Some(0.9), Some(0))
        );
        for wrong in [
            r#"{"top_p": 1.5}"#,
            r#"{"top_p": 0}"#,
            r#"{"temperature": -1}"#,
            r#"{"top_k": -7}"#,
            r#"{"repetition_penalty": 0}"#,
            r#"{"eos_token_id": "x"}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
