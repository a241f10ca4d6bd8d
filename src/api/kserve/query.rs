//! What a request of the Open Inference Protocol asks, whether it came as tensors or as JSON: which model, which text, which
//! options. The names that Triton's backends for language models use are known too.

use std::sync::Arc;

use baton_proto::inference as wire;
use baton_scheduler::ids::Nanos;
use serde_json::{Map, Value};
use tokio::time::{Duration, Instant};

use super::super::ApiState;
use super::super::error::{ApiError, ErrorKind};
use super::super::field_table::{FieldRow, On};
use super::super::fields::Fields;
use super::super::metrics::Endpoint;
use super::super::neutral::UNSUPPORTED;
use super::super::options::DEFAULT_MAX_TOKENS;
use super::super::output::Job;
use super::super::plain_request::{PlainJob, PlainPrompt, PlainRequest};
use super::super::request_label::RequestLabel;
use super::outputs::{self, OutputKind, REPORTS};
use super::tensors;

/// The input that holds the prompt.
pub(super) const TEXT_INPUT: &str = "text_input";
/// The only version of a model.
pub(in super::super) const VERSION: &str = "1";

/// Inputs that other servers call otherwise, and their names here.
const ALIASES: [(&str, &str); 3] = [("streaming", "stream"), ("stop_words", "stop"), ("random_seed", "seed")];

/// Inputs that only this protocol has, besides `text_input`, those that ask for outputs, and the options of
/// `/v1/completions`.
const OWN: [&str; 2] = ["sampling_parameters", "exclude_input_in_output"];

/// Options that are lists even when they have one element.
const LISTS: [&str; 3] = ["stop_token_ids", "allowed_token_ids", "bad_words"];

/// What was asked, in neutral form.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) endpoint: Endpoint,
    pub(super) model_name: String,
    pub(super) version: String,
    /// Comes back in each response.
    pub(super) id: String,
    pub(super) values: Map<String, Value>,
    pub(super) received: Nanos,
    pub(super) deadline: Option<Instant>,
}

/// How the answer is to be written.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) id: String,
    pub(super) model_name: Arc<str>,
    /// What comes before the answer.
    pub(super) prefix: String,
    /// What is wanted.
    pub(super) outputs: Vec<OutputKind>,
    /// Raw contents in the response.
    pub(super) is_raw: bool,
    /// Tokens as they come.
    pub(super) is_streamed: bool,
}

impl Query {
    /// Of a gRPC request.
    pub(super) fn from_wire(
        message: &mut wire::ModelInferRequest,
        received: Nanos,
        deadline: Option<Instant>,
    ) -> Result<Query, ApiError> {
        let mut values = Map::new();
        let n_raw = message.raw_input_contents.len();
        if n_raw > 0 && n_raw != message.inputs.len() {
            let expected = format!("one for each of {} inputs", message.inputs.len());
            return Err(ApiError::expected("raw_input_contents", n_raw, expected));
        }
        for (idx, input) in message.inputs.iter().enumerate() {
            let raw = message.raw_input_contents.get(idx).map(Vec::as_slice);
            if raw.is_some() && input.contents.is_some() {
                let found = "raw and typed at once";
                return Err(ApiError::expected("raw_input_contents", found, "one or the other"));
            }
            let name = name_of(&input.name)?;
            let mut elements = tensors::elements(input, raw)?;
            let value = match elements.len() {
                1 if !LISTS.contains(&name) => elements.remove(0),
                0 => Value::Null,
                _ => Value::Array(elements),
            };
            insert(&mut values, name, value)?;
        }
        for (name, parameter) in std::mem::take(&mut message.parameters) {
            if let Some(value) = tensors::parameter(parameter) {
                insert(&mut values, canonical(&name), value)?;
            }
        }
        Ok(Query {
            endpoint: Endpoint::Infer,
            model_name: std::mem::take(&mut message.model_name),
            version: std::mem::take(&mut message.model_version),
            id: message.id.clone(),
            values,
            received,
            deadline,
        })
    }

    /// Of a JSON body: every member is an input, but `id` and `parameters`, whose members are options.
    pub(super) fn from_json(
        model_name: String,
        version: String,
        body: &[u8],
        received: Nanos,
    ) -> Result<Query, ApiError> {
        let mut fields = Fields::parse(body)?;
        let id = fields.string("id")?.unwrap_or_default();
        let parameters = fields.object("parameters")?.map(Fields::into_inner).unwrap_or_default();
        let mut values = Map::new();
        for (name, value) in fields.into_inner().into_iter().chain(parameters) {
            insert(&mut values, canonical(&name), value)?;
        }
        Ok(Query {
            endpoint: Endpoint::GenerateV2,
            model_name,
            version,
            id,
            values,
            received,
            deadline: None,
        })
    }

    /// Checks everything. `outputs` are the wanted ones, or none for all.
    pub(super) fn understand(
        self,
        state: &ApiState,
        outputs: &[&str],
        is_raw: bool,
        is_streamed: Option<bool>,
    ) -> Result<(Job, Shape), ApiError> {
        let Query {
            endpoint,
            model_name,
            version,
            id,
            mut values,
            received,
            deadline,
        } = self;
        check_model(state, &model_name, &version)?;
        let sampling = sampling_parameters(values.remove("sampling_parameters"))?;
        for (name, value) in sampling {
            insert(&mut values, canonical(&name), value)?;
        }
        // An HTTP path says by itself whether the answer is a stream.
        if let Some(is_streamed) = is_streamed {
            values.insert("stream".to_owned(), is_streamed.into());
        }
        let mut fields = Fields::new(values);
        let text = fields.string(TEXT_INPUT)?;
        let text = text.ok_or_else(|| ApiError::expected(TEXT_INPUT, "missing", "a text"))?;
        let excludes_input = fields.boolean("exclude_input_in_output")?.unwrap_or(true);
        let outputs = outputs::wanted(&mut fields, outputs)?;
        refuse_sequences(&mut fields)?;
        let deadline = deadline_of(&mut fields)?.into_iter().chain(deadline).min();
        let label = match id.as_str() {
            "" => None,
            id => Some(RequestLabel::parse("id", id)?),
        };
        let prompt = PlainPrompt::Text(TEXT_INPUT, text.clone());
        let request = PlainRequest {
            endpoint,
            prompt,
            fields,
            label,
            received,
            deadline,
            default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        };
        let PlainJob { mut job, is_streamed } = request.understand(state)?;
        if let Some(n_top) = job.sampling.prompt_logprobs {
            let expected = "nothing: this protocol does not report it";
            return Err(ApiError::expected("prompt_logprobs", n_top, expected));
        }
        match (
            job.sampling.logprobs,
            outputs.iter().any(|output| output.needs_logprobs()),
        ) {
            (Some(n_top), false) => {
                return Err(ApiError::expected("logprobs", n_top, "return_logprobs to be true, too"));
            }
            (n_top, true) => job.sampling.logprobs = Some(n_top.unwrap_or(0)),
            (None, false) => {}
        }
        let shape = Shape {
            id,
            model_name: model_name.into(),
            prefix: if excludes_input { String::new() } else { text },
            outputs,
            is_raw,
            is_streamed,
        };
        Ok((job, shape))
    }
}

/// Refuses a model, or a version of it, that is not served.
pub(super) fn check_model(state: &ApiState, name: &str, version: &str) -> Result<(), ApiError> {
    if !state.model().answers_to(name) {
        return Err(ApiError::unknown_model(name));
    }
    if !["", VERSION].contains(&version) {
        let version: String = version.chars().take(32).collect();
        let message = format!("the model has no version {version}, only {VERSION}");
        return Err(ApiError::new(ErrorKind::NotFound, message));
    }
    Ok(())
}

fn canonical(name: &str) -> &str {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    alias.map_or(name, |(_, name)| name)
}

/// The name of an input that there is.
fn name_of(name: &str) -> Result<&str, ApiError> {
    let name = canonical(name);
    let is_known = name == TEXT_INPUT
        || OWN.contains(&name)
        || REPORTS.contains(&name)
        || FieldRow::of(On::Completions).any(|row| row.name == name)
        || UNSUPPORTED.iter().any(|row| row.name == name);
    match is_known {
        true => Ok(name),
        false => {
            let name: String = name.chars().take(64).collect();
            let message = format!("{name} is not an input of this model");
            Err(ApiError::field("inputs", message))
        }
    }
}

fn insert(values: &mut Map<String, Value>, name: &str, value: Value) -> Result<(), ApiError> {
    if values.contains_key(name) {
        let name: String = name.chars().take(64).collect();
        let message = format!("{name} is given twice");
        return Err(ApiError::field(name, message));
    }
    let value = from_text(name, value);
    values.insert(name.to_owned(), value);
    Ok(())
}

/// Clients of Triton write numbers and booleans as text where there is only room for text; such a value is read as what its
/// option is.
fn from_text(name: &str, value: Value) -> Value {
    let Value::String(text) = &value else { return value };
    let json_type = FieldRow::of(On::Completions)
        .find(|row| row.name == name)
        .and_then(FieldRow::json_type);
    let read = match json_type.as_deref() {
        Some("number" | "integer") => serde_json::from_str(text).ok().filter(Value::is_number),
        Some("boolean") => text.to_ascii_lowercase().parse::<bool>().ok().map(Value::Bool),
        _ => None,
    };
    read.unwrap_or(value)
}

/// The input `sampling_parameters`: a JSON object, or one written as text.
fn sampling_parameters(value: Option<Value>) -> Result<Map<String, Value>, ApiError> {
    const NAME: &str = "sampling_parameters";
    let wrong = |found: &str| ApiError::expected(NAME, found, "a JSON object");
    match value {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(Value::String(text)) if text.is_empty() => Ok(Map::new()),
        Some(Value::String(text)) => {
            let fields = Fields::parse(text.as_bytes()).map_err(|_| wrong("text that is not one"))?;
            Ok(fields.into_inner())
        }
        Some(other) => Err(wrong(super::super::fields::kind_of(&other))),
    }
}

/// Sequences of Triton are not known here: asked for, they are refused by name.
fn refuse_sequences(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(id) = fields.take("sequence_id").filter(|id| *id != 0 && *id != "") {
        let found = super::super::fields::shown(&id);
        return Err(ApiError::expected("sequence_id", found, "0: requests have no sequence"));
    }
    Ok(())
}

/// Triton's `timeout`, in microseconds; 0 is none.
fn deadline_of(fields: &mut Fields) -> Result<Option<Instant>, ApiError> {
    let timeout_us = fields.integer("timeout", 0..=i64::MAX)?.filter(|us| *us > 0);
    Ok(timeout_us.and_then(|us| Instant::now().checked_add(Duration::from_micros(us as u64))))
}
