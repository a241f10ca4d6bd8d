//! Health on both protocols. `/health` and the gRPC services that generate are ready when a request could be served; the gRPC
//! service `""` says that the process lives and is not stopping.

use std::pin::Pin;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response as HttpResponse};
use futures::{Stream, StreamExt as _};
use http::StatusCode;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::ApiState;
use super::error::{ApiError, ErrorKind};

/// The services whose status is readiness.
pub const READINESS_SERVICES: [&str; 3] = [
    "baton.v1.Baton",
    "inference.GRPCInferenceService",
    "vllm.grpc.engine.VllmEngine",
];

/// How often a watcher's status is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// `GET /health`: 200 without a body, or 503 and the reason.
pub(super) async fn http(State(state): State<ApiState>) -> HttpResponse {
    match state.not_ready() {
        None => StatusCode::OK.into_response(),
        Some(reason) => ApiError::new(ErrorKind::Unavailable, reason).into_response(),
    }
}

/// `grpc.health.v1`.
#[derive(Clone, Debug)]
pub(super) struct HealthService {
    state: ApiState,
}

impl HealthService {
    pub(super) fn new(state: ApiState) -> HealthService {
        HealthService { state }
    }
}

/// The status of a service; `None` when there is no such service.
fn status_of(state: &ApiState, service: &str) -> Option<ServingStatus> {
    let is_serving = match service {
        "" => !state.is_stopping(),
        service if READINESS_SERVICES.contains(&service) => state.not_ready().is_none(),
        _ => return None,
    };
    Some(if is_serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    })
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        status_of(&self.state, service)
            .map(|status| Response::new(answer(status)))
            .ok_or_else(|| Status::not_found("no such service"))
    }

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (state, service) = (self.state.clone(), request.into_inner().service);
        // A service that is not known may come to be, says the protocol; here none does, so the watch only says so.
        let status = move || status_of(&state, &service).unwrap_or(ServingStatus::ServiceUnknown);
        let ticks = tokio::time::interval(WATCH_INTERVAL);
        let changes = futures::stream::unfold((ticks, None), move |(mut ticks, last)| {
            let status = status.clone();
            async move {
                loop {
                    ticks.tick().await;
                    let now = status();
                    if last != Some(now) {
                        return Some((Ok(answer(now)), (ticks, Some(now))));
                    }
                }
            }
        });
        Ok(Response::new(changes.boxed()))
    }
}
