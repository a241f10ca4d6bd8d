//! `POST /v1/embeddings`: one or several inputs, each the mean of its last hidden states, as numbers or as base64.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use baton_scheduler::ids::Nanos;
use futures::{StreamExt as _, TryStreamExt as _};
use http::HeaderMap;
use serde::Serialize;

use super::call::{beside_runtime, with_label};
use super::completion_prompt::CompletionPrompt;
use super::embed::{EmbedOptions, embed, embed_job, normalized};
use super::encode::SpecialTokens;
use super::error::ApiError;
use super::fields::Fields;
use super::metrics::Endpoint;
use super::neutral::refuse_unsupported;
use super::options::{cache_salt, check_model, label, priority};
use super::output::Job;
use super::request_label::RequestLabel;
use super::truncation::Truncation;
use super::{ApiState, unix_time_s};

/// Most inputs of a request, as in OpenAI's API.
pub const MAX_INPUTS: usize = 2048;
/// Inputs of one request that are admitted at a time: more would take the queue from other clients.
const MAX_AT_ONCE: usize = 32;

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Float,
    /// Of 32-bit floats, little endian.
    Base64,
}

struct EmbeddingRequest {
    jobs: Vec<Job>,
    encoding: Encoding,
    normalize: bool,
}

pub(super) async fn handle(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let received = state.generator().now();
    let mut named = None;
    let understood = understand(&state, &headers, body, received, &mut named).await;
    let name = named.unwrap_or_else(RequestLabel::fresh);
    let answered = match understood {
        Ok(request) => answer(&state, &name, request).await,
        Err(error) => {
            state.metrics().refused(Endpoint::Embeddings, &error);
            Err(error)
        }
    };
    with_label(&name, answered.unwrap_or_else(ApiError::into_response))
}

/// Leaves the request's name in `named` as soon as it is known, whatever else is wrong.
async fn understand(
    state: &ApiState,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    received: Nanos,
    named: &mut Option<RequestLabel>,
) -> Result<EmbeddingRequest, ApiError> {
    *named = RequestLabel::from_headers(headers)?;
    let body = body?;
    let (worker_state, of_header, n_bytes) = (state.clone(), named.clone(), body.len());
    let work = move || {
        let mut fields = Fields::parse(&body)?;
        let of_body = label(&mut fields)?;
        let label = of_header.or(of_body).unwrap_or_else(RequestLabel::fresh);
        Ok((label.clone(), parse(&worker_state, fields, label, received)))
    };
    let understood: Result<_, ApiError> = beside_runtime(state, n_bytes, work).await?;
    let (label, request) = understood?;
    *named = Some(label);
    request
}

fn parse(
    state: &ApiState,
    mut fields: Fields,
    label: RequestLabel,
    received: Nanos,
) -> Result<EmbeddingRequest, ApiError> {
    let model = state.model();
    check_model(&mut fields, model)?;
    let encoding = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            let found = serde_json::Value::from(other);
            let expected = "\"float\" or \"base64\"";
            return Err(ApiError::expected(
                "encoding_format",
                super::fields::shown(&found),
                expected,
            ));
        }
    };
    let size = i64::from(model.hidden_size);
    if let Some(asked) = fields
        .integer("dimensions", 1..=i64::from(u32::MAX))?
        .filter(|n| *n != size)
    {
        let expected = format!("{size}, the model's hidden size: a part of a mean hidden state is no embedding");
        return Err(ApiError::expected("dimensions", asked, expected));
    }
    let normalize = fields.boolean("normalize")?.unwrap_or(true);
    let cut = match Truncation::take(&mut fields)? {
        Some(truncation) => Some(truncation.resolve_alone(model.max_model_len)?),
        None => None,
    };
    let special_tokens = SpecialTokens::asked(fields.boolean("add_special_tokens")?, SpecialTokens::Added);
    fields.string("user")?;
    let options = EmbedOptions {
        endpoint: Endpoint::Embeddings,
        label,
        cache_salt: cache_salt(&mut fields)?,
        priority: priority(&mut fields)?,
        deadline: None,
        received,
    };
    let inputs = CompletionPrompt::take_named(&mut fields, "input", MAX_INPUTS)?;
    refuse_unsupported(&fields)?;
    let jobs = inputs.iter().map(|input| {
        let ids = input.ids("input", model, special_tokens, cut)?;
        embed_job(state, options.clone(), ids.into())
    });
    Ok(EmbeddingRequest {
        jobs: jobs.collect::<Result<_, _>>()?,
        encoding,
        normalize,
    })
}

#[derive(Serialize)]
struct EmbeddingsBody<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    data: Vec<EmbeddingBody>,
    usage: UsageBody,
}

#[derive(Serialize)]
struct EmbeddingBody {
    object: &'static str,
    index: usize,
    embedding: Written,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Written {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct UsageBody {
    prompt_tokens: usize,
    total_tokens: usize,
}

async fn answer(state: &ApiState, label: &RequestLabel, request: EmbeddingRequest) -> Result<Response, ApiError> {
    let EmbeddingRequest {
        jobs,
        encoding,
        normalize,
    } = request;
    let n_tokens = jobs.iter().map(|job| job.prompt_ids.len()).sum();
    let embedded = futures::stream::iter(jobs)
        .map(|job| embed(state, job))
        .buffered(MAX_AT_ONCE);
    let written = embedded.map_ok(|embedding| {
        let embedding = if normalize { normalized(embedding) } else { embedding };
        match encoding {
            Encoding::Float => Written::Float(embedding),
            Encoding::Base64 => Written::Base64(BASE64_STANDARD.encode(little_endian(&embedding))),
        }
    });
    // The first failure ends the request, and what still runs of it is cancelled.
    let written: Vec<Written> = written.try_collect().await?;
    let data = written.into_iter().enumerate().map(|(index, embedding)| EmbeddingBody {
        object: "embedding",
        index,
        embedding,
    });
    Ok(Json(EmbeddingsBody {
        id: format!("embd-{}", label.as_str()),
        object: "list",
        created: unix_time_s(),
        model: state.model().name(),
        data: data.collect(),
        usage: UsageBody {
            prompt_tokens: n_tokens,
            total_tokens: n_tokens,
        },
    })
    .into_response())
}

fn little_endian(embedding: &[f32]) -> Vec<u8> {
    embedding.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Whether a body is understood, for tests of the fields.
#[cfg(test)]
pub(super) fn parses(state: &ApiState, body: &[u8]) -> bool {
    let mut fields = Fields::parse(body).unwrap();
    let of_body = label(&mut fields).unwrap().unwrap_or_else(RequestLabel::fresh);
    parse(state, fields, of_body, Nanos::ZERO).is_ok()
}
