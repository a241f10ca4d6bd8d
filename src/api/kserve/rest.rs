//! `POST /v2/models/{model}/generate` and `generate_stream`: the Open Inference Protocol's text generation as JSON, as Triton
//! answers it. Errors are `{"error": "..."}`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use futures::stream;
use http::HeaderMap;

use super::super::ApiState;
use super::super::call::{beside_runtime, with_label, work_of};
use super::super::error::ApiError;
use super::super::metrics::Endpoint;
use super::super::output::Job;
use super::super::request_label::RequestLabel;
use super::super::sse::{self, EventBuffer};
use super::answer::Pieces;
use super::query::{Query, Shape};

type Body = Result<Bytes, BytesRejection>;

pub(in super::super) async fn generate(
    State(state): State<ApiState>,
    Path(model): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, (model, String::new()), &headers, body, false).await
}

pub(in super::super) async fn generate_version(
    State(state): State<ApiState>,
    Path(model): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, model, &headers, body, false).await
}

pub(in super::super) async fn generate_stream(
    State(state): State<ApiState>,
    Path(model): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, (model, String::new()), &headers, body, true).await
}

pub(in super::super) async fn generate_stream_version(
    State(state): State<ApiState>,
    Path(model): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, model, &headers, body, true).await
}

async fn respond(
    state: &ApiState,
    model: (String, String),
    headers: &HeaderMap,
    body: Body,
    is_streamed: bool,
) -> Response {
    let (job, shape) = match understand(state, model, headers, body, is_streamed).await {
        Ok(understood) => understood,
        Err(error) => {
            state.metrics().refused(Endpoint::GenerateV2, &error);
            return refused(error);
        }
    };
    let label = job.label.clone();
    let response = match Pieces::start(state, job, &shape).await {
        Err(error) => refused(error),
        Ok(pieces) if is_streamed => events(pieces, shape),
        Ok(pieces) => match pieces.whole().await {
            Ok(piece) => Json(piece.into_json(&shape)).into_response(),
            Err(error) => refused(error),
        },
    };
    with_label(&label, response)
}

async fn understand(
    state: &ApiState,
    (model, version): (String, String),
    headers: &HeaderMap,
    body: Body,
    is_streamed: bool,
) -> Result<(Job, Shape), ApiError> {
    let received = state.generator().now();
    let header = RequestLabel::from_headers(headers)?;
    let body = body?;
    let (worker_state, n_bytes) = (state.clone(), work_of(&body));
    let work = move || {
        let query = Query::from_json(model, version, &body, received)?;
        query.understand(&worker_state, &[], false, Some(is_streamed))
    };
    let (mut job, shape) = beside_runtime(state, n_bytes, work).await??;
    if let Some(header) = header {
        job.label = header;
    }
    Ok((job, shape))
}

/// An error as this protocol writes it: status and headers are those of the other endpoints.
fn refused(error: ApiError) -> Response {
    let body = error_body(&error);
    let mut response = error.into_response();
    response.headers_mut().remove(http::header::CONTENT_LENGTH);
    *response.body_mut() = serde_json::to_vec(&body).expect("text always serialises").into();
    response
}

fn error_body(error: &ApiError) -> serde_json::Value {
    serde_json::json!({ "error": error.message })
}

fn events(pieces: Pieces, shape: Shape) -> Response {
    let state = (pieces, shape, EventBuffer::default());
    sse::response(stream::unfold(state, |(mut pieces, shape, mut buffer)| async move {
        match pieces.next().await? {
            Ok(piece) => buffer.event(&piece.into_json(&shape)),
            Err(error) => buffer.event(&error_body(&error)),
        }
        Some((buffer.take(), (pieces, shape, buffer)))
    }))
}
