//! The fields that the OpenAI endpoints take, as JSON Schema: what `/openapi.json` shows, and what other protocols may
//! name. Values are checked where they are parsed, not here.

use serde_json::{Value, json};

use super::adjustments::{LONGEST_BAD_WORD, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES};
use super::chat_prompt::REASONING_EFFORTS;
use super::constraints::MAX_CHOICE_TEXTS;
use super::embeddings::MAX_INPUTS;
use super::options::{
    LONGEST_STOP_STRING, MAX_CHOICES, MAX_LOGPROBS, MAX_PENALTY, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS,
};
use super::request_label::LONGEST_LABEL;

/// The endpoints that have a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// These two.
    Both,
    /// `/v1/embeddings`.
    Embeddings,
}

/// One field.
#[derive(Clone, Copy)]
pub struct FieldRow {
    /// Its name.
    pub name: &'static str,
    /// Where it is known.
    pub on: On,
    /// What it does; the default.
    pub about: &'static str,
    schema: fn() -> Value,
}

const fn row(name: &'static str, on: On, about: &'static str, schema: fn() -> Value) -> FieldRow {
    FieldRow {
        name,
        on,
        about,
        schema,
    }
}

/// Every field that does something. Those that are only accepted with a value that changes nothing are in
/// [`UNSUPPORTED`](super::neutral::UNSUPPORTED).
pub const FIELDS: &[FieldRow] = &[
    row(
        "model",
        On::Both,
        "A name of the served model; may be left out.",
        || json!({"anyOf": [{"$ref": "#/components/schemas/Model"}]}),
    ),
    row(
        "messages",
        On::Chat,
        "The conversation, oldest first. Required.",
        || json!({"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}}),
    ),
    row(
        "prompt",
        On::Completions,
        "A text or its token ids, or an array of such prompts. Required.",
        || {
            json!({"anyOf": [
                {"type": "string"},
                token_ids(1),
                {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, token_ids(0)]}},
            ]})
        },
    ),
    row(
        "max_tokens",
        On::Both,
        "Most tokens generated. Default: 16 for completions, what the model's length leaves for chat. 0 is for completions with echo.",
        || integer(0, i64::from(u32::MAX)),
    ),
    row(
        "max_completion_tokens",
        On::Chat,
        "The same under its newer name, which wins.",
        || integer(1, i64::from(u32::MAX)),
    ),
    row(
        "temperature",
        On::Both,
        "0 is greedy. Default: the model's own, else 1.",
        || json!({"type": "number", "minimum": 0, "maximum": f32::MAX}),
    ),
    row(
        "top_p",
        On::Both,
        "Keep the smallest set of tokens with this probability. Default: the model's own, else 1.",
        || json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    ),
    row(
        "top_k",
        On::Both,
        "Keep this many tokens; 0 and -1 keep all. Default: the model's own, else all.",
        || integer(-1, i64::from(u32::MAX)),
    ),
    row(
        "seed",
        On::Both,
        "Equal seeds give equal answers. Default: a fresh one.",
        || json!({"type": "integer", "format": "int64"}),
    ),
    row("n", On::Both, "Choices for each prompt. Default: 1.", || {
        integer(1, i64::from(MAX_CHOICES))
    }),
    row(
        "presence_penalty",
        On::Both,
        "Taken from the logit of each token generated before. Default: 0.",
        penalty,
    ),
    row(
        "frequency_penalty",
        On::Both,
        "Taken from a token's logit for each time it was generated before. Default: 0.",
        penalty,
    ),
    row(
        "repetition_penalty",
        On::Both,
        "Divides positive and multiplies negative logits of tokens seen before. Default: the model's own, else 1.",
        || json!({"type": "number", "exclusiveMinimum": 0, "maximum": f32::MAX}),
    ),
    row(
        "stop",
        On::Both,
        "Texts that end a choice; they are not part of the answer.",
        || {
            let text = json!({"type": "string", "minLength": 1, "maxLength": LONGEST_STOP_STRING});
            json!({"anyOf": [text, {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": text}]})
        },
    ),
    row("stop_token_ids", On::Both, "Token ids that end a choice.", || {
        let mut ids = token_ids(0);
        ids["maxItems"] = json!(MAX_STOP_TOKEN_IDS);
        ids
    }),
    row(
        "ignore_eos",
        On::Both,
        "Go on after the model's own end. Default: false.",
        boolean,
    ),
    row(
        "include_stop_str_in_output",
        On::Both,
        "Keep the stop text at the end. Default: false.",
        boolean,
    ),
    row(
        "skip_special_tokens",
        On::Both,
        "Leave special tokens out of the text. Default: true.",
        boolean,
    ),
    row(
        "add_special_tokens",
        On::Both,
        "Encode with the tokenizer's own special tokens. Default: true for completions, false for chat.",
        boolean,
    ),
    row(
        "truncate_prompt_tokens",
        On::Both,
        "Leave at most this many tokens of the prompt; -1: what the model's length leaves beside max_tokens. Default: all.",
        || json!({"type": "integer", "minimum": -1, "not": {"const": 0}}),
    ),
    row(
        "truncation_side",
        On::Both,
        "Where truncate_prompt_tokens takes tokens away: left keeps the last ones. Default: left.",
        || json!({"type": "string", "pattern": "^(left|right)$"}),
    ),
    row(
        "stream",
        On::Both,
        "Answer in server-sent events. Default: false.",
        boolean,
    ),
    row(
        "stream_options",
        On::Both,
        "Only with stream: include_usage adds an event with the usage, continuous_usage_stats the usage so far to each.",
        || {
            json!({"type": "object", "properties": {
                "include_usage": {"type": ["boolean", "null"]},
                "continuous_usage_stats": {"type": ["boolean", "null"]},
            }})
        },
    ),
    row(
        "logprobs",
        On::Chat,
        "Report log-probabilities. Default: false.",
        boolean,
    ),
    row(
        "top_logprobs",
        On::Chat,
        "Alternatives for each token; needs logprobs.",
        n_top,
    ),
    row(
        "logprobs",
        On::Completions,
        "Report log-probabilities with this many alternatives.",
        n_top,
    ),
    row(
        "prompt_logprobs",
        On::Both,
        "The same for the prompt's tokens; not in a stream.",
        n_top,
    ),
    row(
        "echo",
        On::Completions,
        "Begin the answer with the prompt. Default: false.",
        boolean,
    ),
    row(
        "return_token_ids",
        On::Both,
        "Report the ids of prompt and output. Default: false.",
        boolean,
    ),
    row(
        "return_tokens_as_token_ids",
        On::Both,
        "In log-probabilities, write tokens as token_id:N. Default: false.",
        boolean,
    ),
    row(
        "return_prompt_text",
        On::Chat,
        "Report the prompt as it was rendered. Default: false.",
        boolean,
    ),
    row(
        "timeline",
        On::Both,
        "Report how long each part of the request took; for one prompt. Default: false.",
        boolean,
    ),
    row(
        "add_generation_prompt",
        On::Chat,
        "Let the template begin the answer. Default: true.",
        boolean,
    ),
    row(
        "chat_template_kwargs",
        On::Chat,
        "Variables for the template; messages and tools are not among them.",
        || json!({"type": "object"}),
    ),
    row(
        "chat_template",
        On::Chat,
        "A template in place of the model's own; only where the server is started to take it.",
        text,
    ),
    row(
        "reasoning_effort",
        On::Chat,
        "How much the model may think, for templates that know it; none sets enable_thinking to false for those that do not.",
        || json!({"type": "string", "pattern": format!("^({})$", REASONING_EFFORTS.join("|"))}),
    ),
    row(
        "cache_salt",
        On::Both,
        "Only requests with the same salt share cached prefixes.",
        || json!({"type": "string", "minLength": 1}),
    ),
    row(
        "best_of",
        On::Completions,
        "Generate this many choices and show the n most likely ones; not more than n in a stream. Default: n.",
        || integer(1, i64::from(MAX_CHOICES)),
    ),
    row(
        "min_p",
        On::Both,
        "Keep tokens at least this many times as probable as the most probable one. Default: 0.",
        || json!({"type": "number", "minimum": 0, "maximum": 1}),
    ),
    row(
        "min_tokens",
        On::Both,
        "No end before this many tokens; at most max_tokens. Default: 0.",
        || integer(0, i64::from(u32::MAX)),
    ),
    row(
        "logit_bias",
        On::Both,
        "Added to the logits of these token ids.",
        || {
            let bias = json!({"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS});
            json!({
                "type": "object", "maxProperties": MAX_LOGIT_BIASES, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                "additionalProperties": bias,
            })
        },
    ),
    row(
        "allowed_token_ids",
        On::Both,
        "The only token ids that may be generated.",
        || token_ids(1),
    ),
    row("bad_words", On::Both, "Texts that are not generated.", || {
        let word = json!({"type": "string", "minLength": 1, "maxLength": LONGEST_BAD_WORD});
        json!({"type": "array", "maxItems": MAX_BAD_WORDS, "items": word})
    }),
    row(
        "response_format",
        On::Both,
        "What the text must be: any, a JSON object, a document valid against a JSON Schema, or free text with such parts.",
        || {
            json!({
                "type": "object",
                "required": ["type"],
                "properties": {
                    "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
                    "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}},
                    "format": {"type": "object", "required": ["type"]},
                    "structures": {"type": "array", "items": {
                        "type": "object",
                        "required": ["begin", "end"],
                        "properties": {"begin": text(), "schema": {"type": "object"}, "end": text()},
                    }},
                    "triggers": {"type": "array", "items": text()},
                },
            })
        },
    ),
    row(
        "structured_outputs",
        On::Both,
        "What the text must be, in one of vLLM's forms.",
        || {
            json!({
                "type": "object",
                "properties": {
                    "json": {"type": ["object", "string"]},
                    "json_object": boolean(),
                    "regex": {"type": "string"},
                    "choice": texts(),
                    "grammar": {"type": "string"},
                    "structural_tag": {"type": ["object", "string"]},
                    "disable_any_whitespace": boolean(),
                    "disable_additional_properties": boolean(),
                    "whitespace_pattern": {"type": "string"},
                },
            })
        },
    ),
    row(
        "guided_json",
        On::Both,
        "As structured_outputs.json.",
        || json!({"anyOf": [{"type": "object"}, {"type": "string"}]}),
    ),
    row(
        "guided_json_object",
        On::Both,
        "As structured_outputs.json_object.",
        boolean,
    ),
    row("guided_regex", On::Both, "As structured_outputs.regex.", text),
    row("guided_choice", On::Both, "As structured_outputs.choice.", texts),
    row("guided_grammar", On::Both, "As structured_outputs.grammar.", text),
    row(
        "guided_whitespace_pattern",
        On::Both,
        "As structured_outputs.whitespace_pattern, for the guided fields.",
        text,
    ),
    row("tools", On::Chat, "Functions that the model may call.", || {
        json!({"type": "array", "items": {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1},
                        "description": {"type": "string"},
                        "parameters": {"type": ["object", "null"]},
                    },
                },
            },
        }})
    }),
    row(
        "tool_choice",
        On::Chat,
        "Whether the model may, must or must not call a tool, or which one it must. Default: auto.",
        || {
            json!({"anyOf": [
                {"enum": ["none", "auto", "required"]},
                {"type": "object", "required": ["type", "function"], "properties": {
                    "type": {"const": "function"},
                    "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                }},
            ]})
        },
    ),
    row(
        "parallel_tool_calls",
        On::Chat,
        "Show more than the first call. Default: true.",
        boolean,
    ),
    row(
        "include_reasoning",
        On::Chat,
        "Show the model's reasoning, in a field of its own. Default: true.",
        boolean,
    ),
    row(
        "documents",
        On::Chat,
        "For the template.",
        || json!({"type": "array", "items": {"type": "object"}}),
    ),
    row(
        "continue_final_message",
        On::Chat,
        "Go on with the last message instead of beginning another. Default: false.",
        boolean,
    ),
    row(
        "slo",
        On::Both,
        "Latencies that placement aims at; the headers x-slo-ttft-ms and x-slo-tpot-ms win.",
        || {
            let milliseconds = json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 86_400_000});
            json!({
                "type": "object",
                "properties": {"ttft_ms": milliseconds, "tpot_ms": milliseconds},
                "additionalProperties": false,
            })
        },
    ),
    row("priority", On::Both, "Lower is more urgent. Default: 0.", || {
        integer(i64::from(i32::MIN), i64::from(i32::MAX))
    }),
    row(
        "request_id",
        On::Both,
        "The request's name in answers and logs; the header x-request-id wins.",
        label,
    ),
    row(
        "model",
        On::Embeddings,
        "A name of the served model; may be left out.",
        || json!({"anyOf": [{"$ref": "#/components/schemas/Model"}]}),
    ),
    row(
        "input",
        On::Embeddings,
        "A text or its token ids, or an array of such inputs. Required.",
        || {
            json!({"anyOf": [
                {"type": "string"},
                token_ids(1),
                {
                    "type": "array", "minItems": 1, "maxItems": MAX_INPUTS,
                    "items": {"anyOf": [{"type": "string"}, token_ids(0)]},
                },
            ]})
        },
    ),
    row(
        "encoding_format",
        On::Embeddings,
        "Numbers, or the base64 of their 32-bit floats, little endian. Default: float.",
        || json!({"enum": ["float", "base64", null]}),
    ),
    row(
        "dimensions",
        On::Embeddings,
        "Only the length that the model's embeddings have.",
        || integer(1, i64::from(u32::MAX)),
    ),
    row(
        "normalize",
        On::Embeddings,
        "Scale each embedding to length 1. Default: true.",
        boolean,
    ),
    row(
        "truncate_prompt_tokens",
        On::Embeddings,
        "Leave at most this many tokens of each input; -1: as many as the model's length. Default: all.",
        || json!({"type": "integer", "minimum": -1, "not": {"const": 0}}),
    ),
    row(
        "truncation_side",
        On::Embeddings,
        "Where truncate_prompt_tokens takes tokens away: left keeps the last ones. Default: left.",
        || json!({"type": "string", "pattern": "^(left|right)$"}),
    ),
    row(
        "add_special_tokens",
        On::Embeddings,
        "Encode with the tokenizer's own special tokens. Default: true.",
        boolean,
    ),
    row("user", On::Embeddings, "Not read.", text),
    row(
        "cache_salt",
        On::Embeddings,
        "Only requests with the same salt share cached prefixes.",
        || json!({"type": "string", "minLength": 1}),
    ),
    row("priority", On::Embeddings, "Lower is more urgent. Default: 0.", || {
        integer(i64::from(i32::MIN), i64::from(i32::MAX))
    }),
    row(
        "request_id",
        On::Embeddings,
        "The request's name in answers and logs; the header x-request-id wins.",
        label,
    ),
];

impl FieldRow {
    /// The rows of an endpoint.
    pub fn of(on: On) -> impl Iterator<Item = &'static FieldRow> {
        let is_taken = move |row: &&FieldRow| match on {
            On::Embeddings => row.on == On::Embeddings,
            On::Chat | On::Completions | On::Both => row.on == On::Both || row.on == on,
        };
        FIELDS.iter().filter(is_taken)
    }

    /// Its JSON Schema with its description; `null` always means absent.
    pub fn schema(&self) -> Value {
        let mut schema = (self.schema)();
        if let Some(kind) = schema.get("type").cloned() {
            schema["type"] = json!([kind, "null"]);
        } else if let Some(Value::Array(forms)) = schema.get_mut("anyOf") {
            forms.push(json!({"type": "null"}));
        }
        schema["description"] = json!(self.about);
        schema
    }

    /// Its JSON type where it has just one.
    pub fn json_type(&self) -> Option<String> {
        (self.schema)()["type"].as_str().map(str::to_owned)
    }
}

fn boolean() -> Value {
    json!({"type": "boolean"})
}

fn integer(minimum: i64, maximum: i64) -> Value {
    json!({"type": "integer", "minimum": minimum, "maximum": maximum})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn texts() -> Value {
    json!({"type": "array", "minItems": 1, "maxItems": MAX_CHOICE_TEXTS, "items": {"type": "string", "minLength": 1}})
}

fn label() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": LONGEST_LABEL, "pattern": "^[ -~]*[!-~][ -~]*$"})
}

fn penalty() -> Value {
    json!({"type": "number", "minimum": -MAX_PENALTY, "maximum": MAX_PENALTY})
}

fn n_top() -> Value {
    integer(0, i64::from(MAX_LOGPROBS))
}

/// An array of at least `n` ids; which ids there are depends on the model.
fn token_ids(n: u32) -> Value {
    json!({"type": "array", "minItems": n, "items": integer(0, i64::from(u32::MAX))})
}
