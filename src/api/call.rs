//! What the OpenAI endpoints do alike with a call: its name, its body, and understanding it without holding up the runtime.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use baton_scheduler::ids::Nanos;
use http::{HeaderMap, HeaderValue};

use super::ApiState;
use super::constraints::{Asked, constrain};
use super::error::{ApiError, ErrorKind};
use super::fields::Fields;
use super::metrics::Endpoint;
use super::objectives;
use super::options::CommonOptions;
use super::request_label::{REQUEST_ID_HEADER, RequestLabel};

/// A body whose shared fields have been taken out.
pub(super) struct Call {
    /// What is left of the body.
    pub(super) fields: Fields,
    /// The shared fields.
    pub(super) common: CommonOptions,
    /// The request's name.
    pub(super) label: RequestLabel,
    /// When it came.
    pub(super) received: Nanos,
}

/// Bodies up to this many bytes are parsed, rendered and tokenized in place: about a quarter of a millisecond.
const SHORT_BODY_BYTES: usize = 2048;

/// What stands in a body whose understanding takes longer than its length says: constraints are compiled, and a template that
/// a client brings is a program.
const LONG_FIELDS: [&str; 5] = [
    "response_format",
    "structured_outputs",
    "guided_",
    "tool_choice",
    "\"chat_template\"",
];

/// How much work understanding a body, or part of one, may be, in the bytes of [`beside_runtime`].
pub(super) fn work_of(body: &[u8]) -> usize {
    let text = std::str::from_utf8(body).unwrap_or_default();
    match LONG_FIELDS.iter().any(|name| text.contains(name)) {
        true => usize::MAX,
        false => body.len(),
    }
}

/// Runs work that takes time in proportion to `n_bytes` (`usize::MAX`: long in any case): in place when that is short, else on a blocking thread, as many
/// at once as there are cores.
pub(super) async fn beside_runtime<T: Send + 'static>(
    state: &ApiState,
    n_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if n_bytes <= SHORT_BODY_BYTES {
        return Ok(work());
    }
    let _permit = state
        .inner
        .long_bodies
        .acquire()
        .await
        .expect("the semaphore is never closed");
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| ApiError::new(ErrorKind::Internal, "understanding the request failed"))
}

/// Understands a call by `parse`, or gives the response that says why not. Either way the request has a name.
pub(super) async fn understand<T: Send + 'static>(
    state: &ApiState,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    parse: fn(&ApiState, Call) -> Result<T, ApiError>,
) -> Result<(RequestLabel, T), Response> {
    let received = state.generator().now();
    let refuse = |label: Option<RequestLabel>, error: ApiError| {
        state.metrics().refused(endpoint, &error);
        let label = label.unwrap_or_else(RequestLabel::fresh);
        tracing::debug!(request_id = label.as_str(), param = error.param.as_deref(), kind = ?error.kind, "refused");
        with_label(&label, error.into_response())
    };
    let label = RequestLabel::from_headers(headers).map_err(|error| refuse(None, error))?;
    let body = body.map_err(|rejection| refuse(label.clone(), rejection.into()))?;
    let of_headers = objectives::from_headers(headers).map_err(|error| refuse(label.clone(), error))?;
    let (worker_state, named) = (state.clone(), label.clone());
    let n_bytes = work_of(&body);
    let work = move || {
        let mut fields = Fields::parse(&body).map_err(|error| (named.clone(), error))?;
        let mut common =
            CommonOptions::take(&mut fields, worker_state.model()).map_err(|error| (named.clone(), error))?;
        common.objectives = objectives::prefer(of_headers, common.objectives);
        let label = named.or(common.label.clone()).unwrap_or_else(RequestLabel::fresh);
        if let Some(Asked { field, constraint }) = common.constraint.take() {
            constrain(&worker_state, &mut common.sampling, field, constraint)
                .map_err(|error| (Some(label.clone()), error))?;
        }
        let call = Call {
            fields,
            common,
            label: label.clone(),
            received,
        };
        match parse(&worker_state, call) {
            Ok(parsed) => Ok((label, parsed)),
            Err(error) => Err((Some(label), error)),
        }
    };
    let understood = beside_runtime(state, n_bytes, work).await;
    understood
        .map_err(|error| refuse(label, error))?
        .map_err(|(label, error)| refuse(label, error))
}

/// A call with this body, understood as far as the endpoints do alike.
#[cfg(test)]
pub(super) fn call_of(state: &ApiState, body: &[u8]) -> Result<Call, ApiError> {
    let mut fields = Fields::parse(body)?;
    let common = CommonOptions::take(&mut fields, state.model())?;
    Ok(Call {
        fields,
        common,
        label: RequestLabel::fresh(),
        received: Nanos::ZERO,
    })
}

/// Adds the request's name to its response.
pub(super) fn with_label(label: &RequestLabel, mut response: Response) -> Response {
    let value = HeaderValue::from_str(label.as_str()).expect("labels are printable ASCII");
    response.headers_mut().insert(REQUEST_ID_HEADER, value);
    response
}
