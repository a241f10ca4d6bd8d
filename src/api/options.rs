//! The fields that both OpenAI endpoints share, checked and resolved against the model's defaults.

use std::time::Duration;

use baton_scheduler::ids::TokenId;
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::request::SamplingParams;
use serde_json::Value;
use uuid::Uuid;

use super::adjustments::Adjustments;
use super::constraints;
use super::error::ApiError;
use super::fields::{Fields, kind_of, shown};
use super::objectives;
use super::output::TextOptions;
use super::request_label::RequestLabel;
use super::served_model::ServedModel;
use super::truncation::{Cut, Truncation};

/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, bytes: what is held back while one may be beginning.
pub const LONGEST_STOP_STRING: usize = 1024;
/// Most stop ids of a request.
pub const MAX_STOP_TOKEN_IDS: usize = 128;
/// Most alternatives reported for a token.
pub const MAX_LOGPROBS: u8 = 20;
/// Most choices of a prompt.
pub const MAX_CHOICES: u32 = 128;
/// Presence and frequency penalties lie between this and its negative.
pub const MAX_PENALTY: f32 = 2.0;
/// Completion length when a completions client names none.
pub const DEFAULT_MAX_TOKENS: u32 = 16;

/// How a stream is shaped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// One more event with the usage, at the end.
    pub include_usage: bool,
    /// The usage so far in every event.
    pub continuous_usage_stats: bool,
}

/// The shared fields of a request.
#[derive(Clone, Debug)]
pub struct CommonOptions {
    /// Everything but `max_tokens`, `logprobs`, `prompt_logprobs` and `constraint` is final.
    pub sampling: SamplingParams,
    /// Not compiled yet.
    pub constraint: Option<constraints::Asked>,
    /// The client named a seed, so equal prompts have equal answers.
    pub is_seeded: bool,
    /// As asked; `None` means the endpoint's default.
    pub max_tokens: Option<u32>,
    /// How ids become text.
    pub text: TextOptions,
    /// `Some` when the answer is a stream.
    pub stream: Option<StreamOptions>,
    /// Report the ids of prompt and output.
    pub return_token_ids: bool,
    /// In log-probabilities, write tokens as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Separates prefix caches; 0 when not asked for.
    pub cache_salt: u64,
    /// Lower is more urgent.
    pub priority: i32,
    /// Report how long each part of the request took.
    pub timeline: bool,
    /// Latencies the request should have.
    pub objectives: RequestObjectives,
    /// `prompt_logprobs`, as asked.
    pub prompt_logprobs: Option<u8>,
    /// Encode text prompts with the tokenizer's own special tokens; `None` means the endpoint's default.
    pub add_special_tokens: Option<bool>,
    /// How much of the prompt stays; all of it where absent.
    pub truncation: Option<Truncation>,
    /// The `request_id` field.
    pub label: Option<RequestLabel>,
}

impl CommonOptions {
    /// Takes the shared fields out of `fields`.
    pub fn take(fields: &mut Fields, model: &ServedModel) -> Result<CommonOptions, ApiError> {
        check_model(fields, model)?;
        let max_tokens = fields.integer("max_tokens", 0..=i64::from(u32::MAX))?.map(|n| n as u32);
        let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
        let defaults = model.default_sampling;
        let temperature = fields.number("temperature", |n| n >= 0.0, "a finite number, at least 0")?;
        let top_p = fields.number("top_p", |n| n > 0.0 && n <= 1.0, "a number above 0, at most 1")?;
        // vLLM's clients write -1 for "all".
        let top_k = fields
            .integer("top_k", -1..=i64::from(u32::MAX))?
            .map(|k| k.max(0) as u32);
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
        let n = fields.integer("n", 1..=i64::from(MAX_CHOICES))?;
        let presence_penalty = penalty(fields, "presence_penalty")?;
        let frequency_penalty = penalty(fields, "frequency_penalty")?;
        let repetition_penalty = fields.number("repetition_penalty", |n| n > 0.0, "a number above 0")?;
        let Adjustments {
            min_p,
            min_tokens,
            logit_bias,
            allowed_token_ids,
            bad_words,
        } = Adjustments::take(fields, model)?;
        let sampling = SamplingParams {
            max_tokens: DEFAULT_MAX_TOKENS,
            min_tokens,
            temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k: top_k.or(defaults.top_k).unwrap_or(0),
            top_p: top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p,
            seed: seed.map_or_else(fresh_seed, |seed| seed as u64),
            stop_token_ids: stop_token_ids(
                fields.token_ids("stop_token_ids")?.unwrap_or_default(),
                model,
                ignore_eos,
            )?,
            logprobs: None,
            prompt_logprobs: None,
            n: n.map_or(1, |n| n as u32),
            presence_penalty,
            frequency_penalty,
            repetition_penalty: repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias,
            allowed_token_ids,
            bad_words,
            constraint: None,
        };
        let stop = stop_strings(fields.take("stop"))?;
        check_stop_strings(&stop, model)?;
        Ok(CommonOptions {
            sampling,
            constraint: constraints::take(fields, model)?,
            is_seeded: seed.is_some(),
            max_tokens,
            text: TextOptions {
                stop,
                include_stop_str_in_output: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
                skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
                ..TextOptions::default()
            },
            stream: stream_options(fields)?,
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
            cache_salt: cache_salt(fields)?,
            priority: priority(fields)?,
            timeline: fields.boolean("timeline")?.unwrap_or(false),
            objectives: objectives::take(fields)?,
            prompt_logprobs: fields
                .integer("prompt_logprobs", 0..=i64::from(MAX_LOGPROBS))?
                .map(|n| n as u8),
            add_special_tokens: fields.boolean("add_special_tokens")?,
            truncation: Truncation::take(fields)?,
            label: label(fields)?,
        })
    }

    /// What stays of a prompt when `max_tokens` are asked for. `default` is what the endpoint gives when the client names
    /// none; it yields to the model's length.
    pub fn cut(
        &self,
        max_tokens: Option<u32>,
        default: Option<u32>,
        model: &ServedModel,
    ) -> Result<Option<Cut>, ApiError> {
        let longest_default = model.max_model_len.saturating_sub(1);
        let n_completion = max_tokens.unwrap_or(default.unwrap_or(1).min(longest_default));
        let cut = |truncation: Truncation| truncation.resolve(model.max_model_len, n_completion);
        self.truncation.map(cut).transpose()
    }

    /// Prompt log-probabilities come in one piece, so not in a stream.
    pub fn refuse_streamed_prompt_logprobs(&self) -> Result<(), ApiError> {
        match (self.prompt_logprobs, self.stream) {
            (Some(n), Some(_)) => {
                let message = format!("prompt_logprobs is {n} and stream is true, expected one or the other");
                Err(ApiError::field("prompt_logprobs", message))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses the name of another model.
pub fn check_model(fields: &mut Fields, model: &ServedModel) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if !name.is_empty() && !model.answers_to(&name) => Err(ApiError::unknown_model(&name)),
        Some(_) | None => Ok(()),
    }
}

/// What separates prefix caches; 0 when not asked for.
pub fn cache_salt(fields: &mut Fields) -> Result<u64, ApiError> {
    match fields.string("cache_salt")? {
        None => Ok(0),
        Some(salt) if salt.is_empty() => Err(ApiError::expected(
            "cache_salt",
            "an empty string",
            "a string that is not empty",
        )),
        Some(salt) => Ok(salt_of(&salt)),
    }
}

/// Lower is more urgent; 0 when not asked for.
pub fn priority(fields: &mut Fields) -> Result<i32, ApiError> {
    let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?;
    Ok(priority.map_or(0, |priority| priority as i32))
}

/// The request's name in its body.
pub fn label(fields: &mut Fields) -> Result<Option<RequestLabel>, ApiError> {
    let text = fields.string("request_id")?;
    text.map(|text| RequestLabel::parse("request_id", &text)).transpose()
}

fn penalty(fields: &mut Fields, name: &'static str) -> Result<f32, ApiError> {
    let range = format!("a number from -{MAX_PENALTY} to {MAX_PENALTY}");
    let asked = fields.number(name, |n| n.abs() <= MAX_PENALTY, &range)?;
    Ok(asked.unwrap_or(0.0))
}

/// A seed for a request that named none.
pub fn fresh_seed() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    // Each half has fixed version bits; together they have none.
    high.rotate_left(32) ^ low
}

/// The cache salt of a client's text: 64 bits of its BLAKE3 hash, never 0.
fn salt_of(text: &str) -> u64 {
    let hash = blake3::hash(text.as_bytes());
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes")).max(1)
}

/// The ids that end generation: the model's unless ignored, and the client's own.
pub fn stop_token_ids(own: Vec<TokenId>, model: &ServedModel, ignore_eos: bool) -> Result<Vec<TokenId>, ApiError> {
    if own.len() > MAX_STOP_TOKEN_IDS {
        let expected = format!("at most {MAX_STOP_TOKEN_IDS} ids");
        return Err(ApiError::expected(
            "stop_token_ids",
            format!("an array of {}", own.len()),
            expected,
        ));
    }
    if let Some(id) = own.iter().find(|id| **id >= model.vocab_size) {
        let expected = format!("ids below the vocabulary size {}", model.vocab_size);
        return Err(ApiError::expected("stop_token_ids", id, expected));
    }
    let mut ids = if ignore_eos {
        Vec::new()
    } else {
        model.eos_token_ids.clone()
    };
    ids.extend(own);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn stop_strings(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(values)) => values
            .into_iter()
            .enumerate()
            .map(|(idx, value)| match value {
                Value::String(stop) => Ok(stop),
                other => Err(ApiError::field(
                    "stop",
                    format!("stop[{idx}] is {}, expected a string", shown(&other)),
                )),
            })
            .collect(),
        Some(other) => Err(ApiError::expected(
            "stop",
            kind_of(&other),
            "a string or an array of strings",
        )),
    }
}

/// Bounds of stop strings; without a tokenizer there is no text to look in.
pub fn check_stop_strings(stop: &[String], model: &ServedModel) -> Result<(), ApiError> {
    if stop.len() > MAX_STOP_STRINGS {
        let found = format!("an array of {}", stop.len());
        return Err(ApiError::expected(
            "stop",
            found,
            format!("at most {MAX_STOP_STRINGS} strings"),
        ));
    }
    if let Some(text) = stop
        .iter()
        .find(|text| text.is_empty() || text.len() > LONGEST_STOP_STRING)
    {
        let found = format!("a string of {} bytes", text.len());
        return Err(ApiError::expected(
            "stop",
            found,
            format!("strings of 1 to {LONGEST_STOP_STRING} bytes"),
        ));
    }
    if !stop.is_empty() && model.tokenizer.is_none() {
        return Err(ApiError::field(
            "stop",
            "stop needs text, and this model has no tokenizer; use stop_token_ids",
        ));
    }
    Ok(())
}

fn stream_options(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    match (stream, options) {
        (false, None) => Ok(None),
        (false, Some(_)) => Err(ApiError::field(
            "stream_options",
            "stream_options needs stream to be true",
        )),
        (true, None) => Ok(Some(StreamOptions::default())),
        (true, Some(mut options)) => Ok(Some(StreamOptions {
            include_usage: options.boolean("include_usage")?.unwrap_or(false),
            continuous_usage_stats: options.boolean("continuous_usage_stats")?.unwrap_or(false),
        })),
    }
}

/// The time a `grpc-timeout` value names: 1 to 8 digits and a unit.
pub fn parse_grpc_timeout(value: &str) -> Option<Duration> {
    let unit = value.chars().last()?;
    let digits = &value[..value.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ServedModel {
        ServedModel {
            names: vec!["m".into(), "alias".into()],
            root: "/models/m".into(),
            folder: None,
            tokenizer: None,
            chat_template: None,
            eos_token_ids: vec![2, 7],
            default_sampling: DefaultSampling {
                temperature: Some(0.6),
                top_k: Some(50),
                top_p: None,
                repetition_penalty: Some(1.1),
            },
            max_model_len: 100,
            vocab_size: 64,
            hidden_size: 4,
            dtype: "f32".into(),
            parsers: OutputParsers::default(),
        }
    }

    use super::super::parsers::OutputParsers;
    use super::super::served_model::DefaultSampling;

    fn take(json: &str) -> Result<CommonOptions, ApiError> {
        CommonOptions::take(&mut Fields::parse(json.as_bytes()).unwrap(), &model())
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        let cases = [
            (r#"{"max_tokens": -1}"#, "max_tokens"),
            (r#"{"max_tokens": "5"}"#, "max_tokens"),
            (r#"{"max_tokens": 1.5}"#, "max_tokens"),
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"temperature": 1e39}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"seed": 1.5}"#, "seed"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 129}"#, "n"),
            (r#"{"n": 1.5}"#, "n"),
            (r#"{"presence_penalty": 2.1}"#, "presence_penalty"),
            (r#"{"presence_penalty": "x"}"#, "presence_penalty"),
            (r#"{"frequency_penalty": -2.1}"#, "frequency_penalty"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"repetition_penalty": -1}"#, "repetition_penalty"),
            (r#"{"stop": ""}"#, "stop"),
            (r#"{"stop": 5}"#, "stop"),
            (r#"{"stop": ["a", 5]}"#, "stop"),
            (r#"{"stop": "text without a tokenizer"}"#, "stop"),
            (r#"{"stop_token_ids": [64]}"#, "stop_token_ids"),
            (r#"{"stop_token_ids": [-1]}"#, "stop_token_ids"),
            (r#"{"stop_token_ids": 3}"#, "stop_token_ids"),
            (r#"{"ignore_eos": 1}"#, "ignore_eos"),
            (r#"{"stream": "yes"}"#, "stream"),
            (r#"{"stream_options": {"include_usage": true}}"#, "stream_options"),
            (
                r#"{"stream": true, "stream_options": {"include_usage": 1}}"#,
                "include_usage",
            ),
            (r#"{"cache_salt": ""}"#, "cache_salt"),
            (r#"{"prompt_logprobs": 21}"#, "prompt_logprobs"),
            (r#"{"prompt_logprobs": -1}"#, "prompt_logprobs"),
            (r#"{"request_id": "a\nb"}"#, "request_id"),
            (r#"{"timeline": "yes"}"#, "timeline"),
            (r#"{"model": 5}"#, "model"),
            (r#"{"slo": 5}"#, "slo"),
            (r#"{"slo": {"ttft_ms": 0}}"#, "ttft_ms"),
            (r#"{"slo": {"tpot_ms": "5"}}"#, "tpot_ms"),
            (r#"{"slo": {"ttft": 5}}"#, "slo"),
            (r#"{"min_p": 1.1}"#, "min_p"),
            (r#"{"min_p": -0.1}"#, "min_p"),
            (r#"{"min_tokens": -1}"#, "min_tokens"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
            (r#"{"logit_bias": {"x": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"5": "1"}}"#, "logit_bias"),
            (r#"{"logit_bias": {"5": 101}}"#, "logit_bias"),
            (r#"{"logit_bias": {"64": 1}}"#, "logit_bias"),
            (r#"{"allowed_token_ids": []}"#, "allowed_token_ids"),
            (r#"{"allowed_token_ids": [64]}"#, "allowed_token_ids"),
            (r#"{"bad_words": "x"}"#, "bad_words"),
            (r#"{"bad_words": [5]}"#, "bad_words"),
            (r#"{"bad_words": ["text without a tokenizer"]}"#, "bad_words"),
            (r#"{"response_format": "json"}"#, "response_format"),
            (r#"{"response_format": {}}"#, "response_format"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format"),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}"#,
                "response_format",
            ),
            (r#"{"structured_outputs": {"json": 5}}"#, "structured_outputs"),
            (r#"{"structured_outputs": {"regex": 5}}"#, "structured_outputs"),
            (r#"{"structured_outputs": {"choice": []}}"#, "structured_outputs"),
            (r#"{"structured_outputs": {"choice": [""]}}"#, "structured_outputs"),
            (
                r#"{"structured_outputs": {"regex": "a", "grammar": "b"}}"#,
                "structured_outputs",
            ),
            (
                r#"{"structured_outputs": {"structural_tag": "x"}}"#,
                "structured_outputs",
            ),
            (r#"{"guided_json": "{"}"#, "guided_json"),
            (r#"{"guided_choice": [1]}"#, "guided_choice"),
            (r#"{"guided_regex": 1}"#, "guided_regex"),
            (r#"{"guided_regex": "a", "guided_choice": ["b"]}"#, "guided_choice"),
            (
                r#"{"guided_regex": "a", "response_format": {"type": "json_object"}}"#,
                "guided_regex",
            ),
        ];
        for (json, param) in cases {
            let error = take(json).expect_err(json);
            assert_eq!(error.param.as_deref(), Some(param), "{json}: {error}");
            assert!(error.message.contains(param), "{json}: {error}");
        }
        assert_eq!(
            take(r#"{"model": "other"}"#).unwrap_err().kind,
            super::super::error::ErrorKind::NotFound
        );
    }

    #[test]
    fn defaults_are_the_models_and_the_client_wins() {
        let options = take("{}").unwrap();
        assert_eq!(
            (
                options.sampling.temperature,
                options.sampling.top_k,
                options.sampling.top_p
            ),
            (0.6, 50, 1.0)
        );
        assert_eq!(options.sampling.stop_token_ids, [2, 7]);
        let options = take(r#"{"temperature": 0, "top_k": -1, "top_p": 0.5, "seed": -1, "model": "alias"}"#).unwrap();
        assert_eq!(
            (
                options.sampling.temperature,
                options.sampling.top_k,
                options.sampling.top_p
            ),
            (0.0, 0, 0.5)
        );
        assert_eq!(options.sampling.seed, u64::MAX);
        let options = take(r#"{"ignore_eos": true, "stop_token_ids": [9, 3, 9]}"#).unwrap();
        assert_eq!(options.sampling.stop_token_ids, [3, 9]);
        assert_ne!(take("{}").unwrap().sampling.seed, take("{}").unwrap().sampling.seed);
    }

    #[test]
    fn choices_and_penalties_are_off_unless_asked_for() {
        let of = |json: &str| {
            let sampling = take(json).unwrap().sampling;
            let penalties = (
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty,
            );
            (sampling.n, penalties)
        };
        assert_eq!(of("{}"), (1, (0.0, 0.0, 1.1)), "1.1 is the model's own");
        let json = r#"{"n": 128, "presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1}"#;
        assert_eq!(of(json), (128, (-2.0, 2.0, 1.0)));
        assert!(!take("{}").unwrap().is_seeded && take(r#"{"seed": 0}"#).unwrap().is_seeded);
    }

    #[test]
    fn salts_separate_and_are_never_zero() {
        let salt = |text: &str| take(&format!(r#"{{"cache_salt": "{text}"}}"#)).unwrap().cache_salt;
        assert_eq!(salt("a"), salt("a"));
        assert_ne!(salt("a"), salt("b"));
        assert_ne!(salt("a"), 0);
    }

    #[test]
    fn grpc_timeouts() {
        assert_eq!(parse_grpc_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(
            parse_grpc_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        assert_eq!(parse_grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_grpc_timeout("7u"), Some(Duration::from_micros(7)));
        for bad in ["", "S", "5", "5s", "-5S", "123456789S", "5é", "+1S"] {
            assert_eq!(parse_grpc_timeout(bad), None, "{bad}");
        }
    }
}
