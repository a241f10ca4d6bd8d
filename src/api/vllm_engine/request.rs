//! A generate request of the engine service as a plain request: fields that have no `optional` say "default" by their zero.

use baton_proto::vllm::grpc::engine as wire;
use baton_proto::vllm::grpc::engine::generate_request::Input;
use baton_proto::vllm::grpc::engine::sampling_params::Constraint;
use baton_scheduler::ids::Nanos;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::metrics::Endpoint;
use super::super::plain_request::{PlainPrompt, PlainRequest};
use super::super::request_label::RequestLabel;

/// What the request asks, by the names of `/v1/completions`. What cannot be done is refused there, by name.
pub(super) fn plain_request(
    request: wire::GenerateRequest,
    received: Nanos,
    deadline: Option<Instant>,
) -> Result<PlainRequest, ApiError> {
    let label = match request.request_id.as_str() {
        "" => None,
        id => Some(RequestLabel::parse("request_id", id)?),
    };
    if request.mm_inputs.is_some() {
        return Err(ApiError::expected("mm_inputs", "set", "nothing: this model reads text"));
    }
    if let Some(rank) = request.data_parallel_rank.filter(|rank| *rank != 0) {
        return Err(ApiError::expected(
            "data_parallel_rank",
            rank,
            "0: the cluster is one rank",
        ));
    }
    if request.kv_transfer_params.is_some() || request.kv_transfer_params_json.is_some() {
        let expected = "nothing: prefill and decode meet behind the front door";
        return Err(ApiError::expected("kv_transfer_params", "set", expected));
    }
    let prompt = match request.input {
        Some(Input::Text(text)) => PlainPrompt::Text("text", text),
        Some(Input::Tokenized(tokenized)) => PlainPrompt::Ids("input_ids", tokenized.input_ids),
        None => return Err(ApiError::expected("input", "missing", "tokenized or text")),
    };
    let mut values = sampling(request.sampling_params.unwrap_or_default())?;
    values.insert("stream".to_owned(), request.stream.into());
    Ok(PlainRequest {
        endpoint: Endpoint::VllmGenerate,
        prompt,
        fields: Fields::new(values),
        label,
        received,
        deadline,
        default_max_tokens: None,
    })
}

fn sampling(params: wire::SamplingParams) -> Result<Map<String, Value>, ApiError> {
    let mut values = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            values.insert(name.to_owned(), value);
        }
    };
    set(
        "temperature",
        params
            .temperature
            .map(|value| number("temperature", value))
            .transpose()?,
    );
    for (name, value) in [
        ("top_p", params.top_p),
        ("min_p", params.min_p),
        ("frequency_penalty", params.frequency_penalty),
        ("presence_penalty", params.presence_penalty),
        ("repetition_penalty", params.repetition_penalty),
    ] {
        let value = (value != 0.0).then(|| number(name, value));
        set(name, value.transpose()?);
    }
    for (name, value) in [
        ("top_k", params.top_k),
        ("min_tokens", params.min_tokens),
        ("n", params.n),
    ] {
        set(name, (value != 0).then(|| value.into()));
    }
    set("max_tokens", params.max_tokens.map(Value::from));
    set("stop", (!params.stop.is_empty()).then(|| params.stop.into()));
    set(
        "stop_token_ids",
        (!params.stop_token_ids.is_empty()).then(|| params.stop_token_ids.into()),
    );
    set("skip_special_tokens", Some(params.skip_special_tokens.into()));
    set("ignore_eos", Some(params.ignore_eos.into()));
    set(
        "include_stop_str_in_output",
        Some(params.include_stop_str_in_output.into()),
    );
    set("logprobs", params.logprobs.map(Value::from));
    set("prompt_logprobs", params.prompt_logprobs.map(Value::from));
    set("seed", params.seed.map(Value::from));
    set("truncate_prompt_tokens", params.truncate_prompt_tokens.map(Value::from));
    if !params.logit_bias.is_empty() {
        let bias = params.logit_bias.into_iter();
        let bias = bias.map(|(id, bias)| Ok((id.to_string(), number("logit_bias", bias)?)));
        set(
            "logit_bias",
            Some(Value::Object(bias.collect::<Result<_, ApiError>>()?)),
        );
    }
    set("structured_outputs", params.constraint.map(structured_outputs));
    Ok(values)
}

/// A float of the wire as the decimal that was meant; JSON has none for what is not finite.
fn number(name: &'static str, value: f32) -> Result<Value, ApiError> {
    let decimal = value.to_string().parse::<f64>().ok().filter(|value| value.is_finite());
    decimal
        .map(Value::from)
        .ok_or_else(|| ApiError::expected(name, value, "a finite number"))
}

/// The constraint in the words of the HTTP field `structured_outputs`.
fn structured_outputs(constraint: Constraint) -> Value {
    match constraint {
        Constraint::JsonSchema(schema) => json!({ "json": schema }),
        Constraint::Regex(regex) => json!({ "regex": regex }),
        Constraint::Grammar(grammar) => json!({ "grammar": grammar }),
        Constraint::StructuralTag(tag) => json!({ "structural_tag": tag }),
        Constraint::JsonObject(is_asked) => json!({ "json_object": is_asked }),
        Constraint::Choice(choice) => json!({ "choice": choice.choices }),
    }
}
