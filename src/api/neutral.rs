//! Fields that other servers know and this one does not do: each is accepted only with the value that changes nothing, and
//! otherwise refused by name. Fields that nobody here has heard of pass.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, shown};

/// The value of an unsupported field that changes nothing. `null` always does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neutral {
    /// Only `null`.
    Null,
    /// The number 0.
    Zero,
    /// The number 1.
    One,
    /// The number -1.
    MinusOne,
    /// `false`.
    False,
    /// `true`.
    True,
    /// Either boolean: it changes nothing here.
    AnyBoolean,
    /// `""`.
    EmptyString,
    /// `[]` or `{}`.
    Empty,
    /// One of these strings.
    OneOf(&'static [&'static str]),
    /// `["text"]`.
    TextModality,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Unsupported {
    /// The field.
    pub name: &'static str,
    /// What it may say.
    pub neutral: Neutral,
}

const fn row(name: &'static str, neutral: Neutral) -> Unsupported {
    Unsupported { name, neutral }
}

/// Fields of the OpenAI API and of vLLM's extensions that are known and not supported by either endpoint, or that only the
/// other endpoint has. An endpoint takes what it supports before this table is asked.
pub const UNSUPPORTED: &[Unsupported] = &[
    // Searches among choices.
    row("best_of", Neutral::One),
    row("use_beam_search", Neutral::False),
    row("length_penalty", Neutral::One),
    // Changes to the distribution.
    row("logits_processors", Neutral::Empty),
    row("repetition_detection", Neutral::Null),
    row("thinking_token_budget", Neutral::MinusOne),
    row("watermarking", Neutral::False),
    // Reports.
    row("logprob_token_ids", Neutral::Null),
    row("return_prompt_text", Neutral::False),
    row("routed_experts_prompt_start", Neutral::Zero),
    row("stream_interval", Neutral::One),
    // Structure of the output.
    row("guided_decoding_backend", Neutral::OneOf(&["auto", "guidance"])),
    row("structural_tag", Neutral::Null),
    // The older form of tools.
    row("functions", Neutral::Empty),
    row("function_call", Neutral::OneOf(&["none", "auto"])),
    // Other media, reasoning and services.
    row("modalities", Neutral::TextModality),
    row("audio", Neutral::Null),
    row("prediction", Neutral::Null),
    row("prompt_embeds", Neutral::Null),
    row("mm_processor_kwargs", Neutral::Empty),
    row("media_io_kwargs", Neutral::Empty),
    row("reasoning_effort", Neutral::OneOf(&["none"])),
    row("web_search_options", Neutral::Null),
    row("store", Neutral::False),
    // The prompt.
    row("suffix", Neutral::EmptyString),
    row("chat_template", Neutral::Null),
    // The other endpoint's, or what is fixed here.
    row("messages", Neutral::Null),
    row("tools", Neutral::Empty),
    row("tool_choice", Neutral::OneOf(&["none", "auto"])),
    row("parallel_tool_calls", Neutral::AnyBoolean),
    row("include_reasoning", Neutral::AnyBoolean),
    row("documents", Neutral::Empty),
    row("chat_template_kwargs", Neutral::Empty),
    row("continue_final_message", Neutral::False),
    row("add_generation_prompt", Neutral::True),
    row("prompt", Neutral::Null),
    row("max_completion_tokens", Neutral::Null),
    row("echo", Neutral::False),
    row("top_logprobs", Neutral::Zero),
    row("detokenize", Neutral::True),
    row("spaces_between_special_tokens", Neutral::AnyBoolean),
    row("allowed_media_domains", Neutral::Empty),
    // Scheduling.
    row("kv_transfer_params", Neutral::Null),
    row("ec_transfer_params", Neutral::Null),
    row("vllm_xargs", Neutral::Empty),
    row("lora_request", Neutral::Null),
    row("data_parallel_rank", Neutral::Null),
];

impl Neutral {
    /// Whether `value` changes nothing.
    pub fn accepts(self, value: &Value) -> bool {
        let number = |expected: f64| value.as_f64() == Some(expected);
        match self {
            _ if value.is_null() => true,
            Neutral::Null => false,
            Neutral::Zero => number(0.0),
            Neutral::One => number(1.0),
            Neutral::MinusOne => number(-1.0),
            Neutral::False => value == &Value::Bool(false),
            Neutral::True => value == &Value::Bool(true),
            Neutral::AnyBoolean => value.is_boolean(),
            Neutral::EmptyString => value.as_str() == Some(""),
            Neutral::Empty => match value {
                Value::Array(values) => values.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            },
            Neutral::OneOf(allowed) => value.as_str().is_some_and(|text| allowed.contains(&text)),
            Neutral::TextModality => value
                .as_array()
                .is_some_and(|list| list.iter().all(|item| item == "text")),
        }
    }

    /// What the field may say, for the error.
    fn described(self) -> String {
        match self {
            Neutral::Null => "null".to_owned(),
            Neutral::Zero => "0".to_owned(),
            Neutral::One => "1".to_owned(),
            Neutral::MinusOne => "-1".to_owned(),
            Neutral::False => "false".to_owned(),
            Neutral::True => "true".to_owned(),
            Neutral::AnyBoolean => "a boolean".to_owned(),
            Neutral::EmptyString => "an empty string".to_owned(),
            Neutral::Empty => "empty".to_owned(),
            Neutral::OneOf(allowed) => allowed
                .iter()
                .map(|text| format!("\"{text}\""))
                .collect::<Vec<_>>()
                .join(" or "),
            Neutral::TextModality => r#"["text"]"#.to_owned(),
        }
    }
}

/// Judges what an endpoint has not taken: a known field that asks for something is an error that names it.
pub fn refuse_unsupported(rest: &Fields) -> Result<(), ApiError> {
    let mut n_unknown = 0;
    for (name, value) in rest.rest() {
        match UNSUPPORTED.iter().find(|row| row.name == name) {
            Some(row) if row.neutral.accepts(value) => {}
            Some(row) => {
                let (found, neutral) = (shown(value), row.neutral.described());
                let message = format!("{name} is {found}, which is not supported here; leave it out or {neutral}");
                return Err(ApiError::field(row.name, message));
            }
            None => n_unknown += 1,
        }
    }
    if n_unknown > 0 {
        // Names come from outside, so only their number is logged.
        tracing::debug!(n_unknown, "fields that are not known were ignored");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judge(name: &str, value: Value) -> Result<(), ApiError> {
        let body = serde_json::to_vec(&Value::Object([(name.to_owned(), value)].into_iter().collect())).unwrap();
        refuse_unsupported(&Fields::parse(&body).unwrap())
    }

    /// Values that change nothing and values that ask for something.
    fn samples(neutral: Neutral) -> (Vec<Value>, Vec<Value>) {
        match neutral {
            Neutral::Null => (vec![], vec![json!(1), json!("x"), json!({"a": 1}), json!([])]),
            Neutral::Zero => (
                vec![json!(0), json!(0.0)],
                vec![json!(1), json!(-0.5), json!("0"), json!(true)],
            ),
            Neutral::One => (
                vec![json!(1), json!(1.0)],
                vec![json!(2), json!(0), json!(1.1), json!("1")],
            ),
            Neutral::MinusOne => (vec![json!(-1)], vec![json!(0), json!(100), json!("-1")]),
            Neutral::False => (vec![json!(false)], vec![json!(true), json!(0)]),
            Neutral::True => (vec![json!(true)], vec![json!(false), json!(1)]),
            Neutral::AnyBoolean => (vec![json!(true), json!(false)], vec![json!(1)]),
            Neutral::EmptyString => (vec![json!("")], vec![json!(" "), json!([])]),
            Neutral::Empty => (
                vec![json!([]), json!({})],
                vec![json!([1]), json!({"5": 1}), json!(""), json!(0)],
            ),
            Neutral::OneOf(allowed) => (
                allowed.iter().map(|text| json!(text)).collect(),
                vec![json!("required"), json!({"type": "function"})],
            ),
            Neutral::TextModality => (vec![json!(["text"])], vec![json!(["text", "audio"]), json!("text")]),
        }
    }

    #[test]
    fn each_row_passes_its_neutral_value_and_refuses_others_by_name() {
        for row in UNSUPPORTED {
            let (neutral, asking) = samples(row.neutral);
            for value in neutral.into_iter().chain([Value::Null]) {
                assert_eq!(judge(row.name, value.clone()), Ok(()), "{} {value}", row.name);
            }
            for value in asking {
                let error = judge(row.name, value.clone()).expect_err(&format!("{} {value}", row.name));
                assert_eq!(error.param.as_deref(), Some(row.name));
                assert!(error.message.contains(row.name), "{}", error.message);
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let names: std::collections::HashSet<_> = UNSUPPORTED.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), UNSUPPORTED.len());
    }

    #[test]
    fn unknown_fields_pass() {
        assert_eq!(judge("a_field_of_tomorrow", json!({"x": [1, 2]})), Ok(()));
    }
}
