//! What the server says of itself: `/v1/models`, `/version`, `/metrics`, and the answers to routes that are not there.

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse as _, Response};
use http::header::CONTENT_TYPE;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde::Serialize;

use super::ApiState;
use super::auth::is_grpc;
use super::error::{ApiError, ErrorKind};
use super::metrics::{EXPOSITION_TYPE, MetricsRegistry};
use super::served_model::ServedModel;
use crate::metric_names;

#[derive(Serialize)]
struct ModelBody<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<&'static str>,
    max_model_len: u32,
}

#[derive(Serialize)]
struct ModelsBody<'a> {
    object: &'static str,
    data: Vec<ModelBody<'a>>,
}

fn body<'a>(state: &'a ApiState, id: &'a str) -> ModelBody<'a> {
    ModelBody {
        id,
        object: "model",
        created: state.inner.created_s,
        owned_by: "baton",
        root: &state.model().root,
        parent: None,
        max_model_len: state.model().max_model_len,
    }
}

/// `GET /v1/models`.
pub(super) async fn list(State(state): State<ApiState>) -> Response {
    let data = state.model().names.iter().map(|name| body(&state, name)).collect();
    Json(ModelsBody { object: "list", data }).into_response()
}

/// `GET /v1/models/{name}`; names may hold slashes.
pub(super) async fn retrieve(State(state): State<ApiState>, Path(name): Path<String>) -> Response {
    match state.model().answers_to(&name) {
        true => Json(body(&state, &name)).into_response(),
        false => ApiError::unknown_model(&name).into_response(),
    }
}

/// `GET /version`.
pub(super) async fn version() -> Response {
    Json(serde_json::json!({ "version": env!("CARGO_PKG_VERSION") })).into_response()
}

/// `GET /metrics`.
pub(super) async fn metrics(State(state): State<ApiState>) -> Response {
    match state.inner.registry.encode() {
        Ok(text) => ([(CONTENT_TYPE, EXPOSITION_TYPE)], text).into_response(),
        Err(error) => ApiError::new(ErrorKind::Internal, format!("metrics: {error}")).into_response(),
    }
}

/// Any other path.
pub(super) async fn no_route(request: Request) -> Response {
    if is_grpc(&request) {
        return tonic::Status::unimplemented("no such gRPC service").into_http();
    }
    let path: String = request.uri().path().chars().take(128).collect();
    ApiError::new(ErrorKind::NotFound, format!("there is no {path} here")).into_response()
}

/// A known path by another method.
pub(super) async fn no_method(request: Request) -> Response {
    let message = format!("{} is not a method of this path", request.method());
    ApiError::new(ErrorKind::MethodNotAllowed, message).into_response()
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    model: String,
    dtype: String,
}

/// Registers what was built and is served.
pub(super) fn register_build_info(registry: &MetricsRegistry, model: &ServedModel) {
    let info = Family::<BuildLabels, Gauge>::default();
    let labels = BuildLabels {
        version: env!("CARGO_PKG_VERSION"),
        model: model.name().to_owned(),
        dtype: model.dtype.clone(),
    };
    info.get_or_create(&labels).set(1);
    registry.register(metric_names::BUILD_INFO, "What was built and is served", info);
}
