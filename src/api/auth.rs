//! The API key: asked of every call but health checks, on HTTP and gRPC alike. No users, no rights.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::header::AUTHORIZATION;
use subtle::ConstantTimeEq as _;

use super::ApiState;
use super::error::{ApiError, ErrorKind};

/// A secret that clients must show. Only its hash is kept, so comparing takes the same time for every guess, and printing
/// shows nothing.
#[derive(Clone)]
pub struct ApiKey {
    hash: [u8; 32],
}

impl ApiKey {
    /// A key.
    pub fn new(key: &str) -> ApiKey {
        ApiKey {
            hash: *blake3::hash(key.as_bytes()).as_bytes(),
        }
    }

    fn matches(&self, shown: &[u8]) -> bool {
        self.hash.ct_eq(blake3::hash(shown).as_bytes()).into()
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Whether anyone may call this path: probes have no key.
fn is_open(path: &str) -> bool {
    path == "/health" || path.starts_with("/grpc.health.v1.Health/")
}

/// Refuses calls without the key.
pub(super) async fn require_key(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    let Some(key) = &state.options().api_key else {
        return next.run(request).await;
    };
    if is_open(request.uri().path()) || bearer(&request).is_some_and(|shown| key.matches(shown)) {
        return next.run(request).await;
    }
    let error = ApiError::new(ErrorKind::Unauthorized, "the API key is missing or wrong");
    match is_grpc(&request) {
        true => error.to_status().into_http(),
        false => error.into_response(),
    }
}

fn bearer(request: &Request) -> Option<&[u8]> {
    let value = request.headers().get(AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// Whether the caller speaks gRPC, and so understands a status better than JSON.
pub(super) fn is_grpc<B>(request: &http::Request<B>) -> bool {
    let content_type = request.headers().get(http::header::CONTENT_TYPE);
    content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}
