//! What the APIs answer when they cannot do what was asked: one error type, and one function that gives each kind its HTTP
//! status, OpenAI `type` and gRPC code. Nothing is logged here, and no message carries a prompt.

use std::borrow::Cow;
use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use baton_scheduler::request::Failure;
use http::header::{HeaderValue, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tonic::Code;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::door::{EmbedError, Rejection};

/// What kind of error; decides every code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is wrong and stays wrong.
    Invalid,
    /// The API key is missing or wrong.
    Unauthorized,
    /// No such model, or no such route.
    NotFound,
    /// The route exists for another method.
    MethodNotAllowed,
    /// The body is longer than the limit.
    TooLarge,
    /// No room now; comes with a retry hint.
    OverCapacity,
    /// The client went away or the request was aborted.
    Cancelled,
    /// Nothing can serve it now, or what served it died.
    Unavailable,
    /// The request's own deadline passed.
    Deadline,
    /// A bug.
    Internal,
}

/// The codes of one [`ErrorKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codes {
    /// HTTP status, also the `code` of the JSON error.
    pub http: u16,
    /// `type` of the JSON error.
    pub kind: &'static str,
    /// gRPC code.
    pub grpc: Code,
    /// The metric's `outcome`.
    pub outcome: &'static str,
}

impl ErrorKind {
    /// Every kind.
    pub const ALL: [ErrorKind; 10] = [
        ErrorKind::Invalid,
        ErrorKind::Unauthorized,
        ErrorKind::NotFound,
        ErrorKind::MethodNotAllowed,
        ErrorKind::TooLarge,
        ErrorKind::OverCapacity,
        ErrorKind::Cancelled,
        ErrorKind::Unavailable,
        ErrorKind::Deadline,
        ErrorKind::Internal,
    ];

    /// The one place where an error gets its codes. 499 is nginx's "client closed request".
    pub const fn codes(self) -> Codes {
        const fn codes(http: u16, kind: &'static str, grpc: Code, outcome: &'static str) -> Codes {
            Codes {
                http,
                kind,
                grpc,
                outcome,
            }
        }
        match self {
            ErrorKind::Invalid => codes(400, "BadRequestError", Code::InvalidArgument, "invalid"),
            ErrorKind::Unauthorized => codes(401, "AuthenticationError", Code::Unauthenticated, "unauthorized"),
            ErrorKind::NotFound => codes(404, "NotFoundError", Code::NotFound, "not_found"),
            ErrorKind::MethodNotAllowed => codes(405, "MethodNotAllowedError", Code::Unimplemented, "invalid"),
            ErrorKind::TooLarge => codes(413, "RequestTooLargeError", Code::InvalidArgument, "invalid"),
            ErrorKind::OverCapacity => codes(429, "RateLimitError", Code::ResourceExhausted, "over_capacity"),
            ErrorKind::Cancelled => codes(499, "CancelledError", Code::Cancelled, "cancelled"),
            ErrorKind::Unavailable => codes(503, "ServiceUnavailableError", Code::Unavailable, "unavailable"),
            ErrorKind::Deadline => codes(504, "TimeoutError", Code::DeadlineExceeded, "deadline"),
            ErrorKind::Internal => codes(500, "InternalServerError", Code::Internal, "internal"),
        }
    }
}

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind.
    pub kind: ErrorKind,
    /// One line for the client.
    pub message: String,
    /// The field at fault, when there is one.
    pub param: Option<Cow<'static, str>>,
    /// When to come back.
    pub retry_after: Option<Duration>,
}

/// How long a client should wait when the cluster gave no better hint.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

impl ApiError {
    /// An error of `kind` that is no field's fault.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> ApiError {
        ApiError {
            kind,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// A wrong field.
    pub fn field(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> ApiError {
        ApiError {
            param: Some(param.into()),
            ..ApiError::new(ErrorKind::Invalid, message)
        }
    }

    /// A field with a value outside what it may hold.
    pub fn expected(
        param: impl Into<Cow<'static, str>>,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> ApiError {
        let param = param.into();
        let message = format!("{param} is {found}, expected {expected}");
        ApiError::field(param, message)
    }

    /// A model that is not served.
    pub fn unknown_model(name: &str) -> ApiError {
        let name: String = name.chars().take(128).collect();
        let message = format!("The model `{name}` does not exist.");
        ApiError {
            param: Some(Cow::Borrowed("model")),
            ..ApiError::new(ErrorKind::NotFound, message)
        }
    }

    /// The JSON body `{"error": {...}}`.
    pub fn to_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Body<'a>,
        }
        #[derive(Serialize)]
        struct Body<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let codes = self.kind.codes();
        let body = Body {
            message: &self.message,
            r#type: codes.kind,
            param: self.param.as_deref(),
            code: codes.http,
        };
        serde_json::to_vec(&Envelope { error: body }).expect("strings and numbers always serialise")
    }

    /// The gRPC status, with the field or the retry delay as `google.rpc` details.
    pub fn to_status(&self) -> tonic::Status {
        let mut details = ErrorDetails::new();
        let mut metadata = MetadataMap::new();
        if let Some(param) = &self.param {
            details.add_bad_request_violation(param.as_ref(), self.message.as_str());
        }
        if let Some(delay) = self.retry_after {
            details.set_retry_info(Some(delay));
            // gRPC proposal A6: the server's word on when a client library may retry by itself.
            let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            metadata.insert("grpc-retry-pushback-ms", MetadataValue::from(delay_ms));
        }
        let code = self.kind.codes().grpc;
        tonic::Status::with_error_details_and_metadata(code, self.message.as_str(), details, metadata)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.codes().http).expect("every code above is a status");
        let mut headers = HeaderMap::new();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(delay) = self.retry_after {
            // The header has whole seconds: rounded up, so that nobody comes back early.
            let seconds = delay.as_millis().div_ceil(1000).max(1);
            headers.insert(
                RETRY_AFTER,
                HeaderValue::from(u64::try_from(seconds).unwrap_or(u64::MAX)),
            );
            let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            headers.insert("retry-after-ms", HeaderValue::from(delay_ms));
        }
        if self.kind == ErrorKind::Unauthorized {
            headers.insert(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        (status, headers, self.to_json()).into_response()
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> ApiError {
        let is_too_long = rejection.status() == StatusCode::PAYLOAD_TOO_LARGE;
        let kind = if is_too_long {
            ErrorKind::TooLarge
        } else {
            ErrorKind::Invalid
        };
        ApiError::new(kind, rejection.body_text())
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let message = failure.to_string();
        match failure {
            Failure::Invalid(message) => ApiError::new(ErrorKind::Invalid, message),
            Failure::Busy(_) => ApiError {
                retry_after: Some(DEFAULT_RETRY_AFTER),
                ..ApiError::new(ErrorKind::OverCapacity, message)
            },
            Failure::InstanceLost(_) => ApiError {
                retry_after: Some(DEFAULT_RETRY_AFTER),
                ..ApiError::new(ErrorKind::Unavailable, message)
            },
            Failure::Incompatible(_) => ApiError::new(ErrorKind::Unavailable, message),
            Failure::DeadlineExceeded => ApiError::new(ErrorKind::Deadline, message),
            Failure::Cancelled => ApiError::new(ErrorKind::Cancelled, message),
            Failure::Internal(_) => ApiError::new(ErrorKind::Internal, message),
        }
    }
}

impl From<EmbedError> for ApiError {
    fn from(error: EmbedError) -> ApiError {
        match error {
            EmbedError::Rejected(rejection) => rejection.into(),
            EmbedError::Failed(failure) => failure.into(),
        }
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> ApiError {
        let message = rejection.to_string();
        match rejection {
            Rejection::OverCapacity { retry_after, .. } => ApiError {
                retry_after: Some(retry_after),
                ..ApiError::new(ErrorKind::OverCapacity, message)
            },
            Rejection::Invalid(_) => ApiError::new(ErrorKind::Invalid, message),
            Rejection::Unavailable(_) => ApiError {
                retry_after: Some(DEFAULT_RETRY_AFTER),
                ..ApiError::new(ErrorKind::Unavailable, message)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_and_rejection_has_its_codes() {
        let over = Rejection::OverCapacity {
            n_queued: 9,
            limit: 8,
            retry_after: Duration::from_millis(1500),
        };
        let cases: Vec<(ApiError, u16, Code)> = vec![
            (Failure::Invalid("x".into()).into(), 400, Code::InvalidArgument),
            (Failure::Busy("x".into()).into(), 429, Code::ResourceExhausted),
            (Failure::InstanceLost("x".into()).into(), 503, Code::Unavailable),
            (Failure::Incompatible("x".into()).into(), 503, Code::Unavailable),
            (Failure::DeadlineExceeded.into(), 504, Code::DeadlineExceeded),
            (Failure::Cancelled.into(), 499, Code::Cancelled),
            (Failure::Internal("x".into()).into(), 500, Code::Internal),
            (over.into(), 429, Code::ResourceExhausted),
            (Rejection::Invalid("x".into()).into(), 400, Code::InvalidArgument),
            (Rejection::Unavailable("x".into()).into(), 503, Code::Unavailable),
        ];
        for (error, http, grpc) in cases {
            assert_eq!(error.clone().into_response().status().as_u16(), http, "{error:?}");
            assert_eq!(error.to_status().code(), grpc, "{error:?}");
            let json: serde_json::Value = serde_json::from_slice(&error.to_json()).unwrap();
            assert_eq!(json["error"]["code"], http, "{error:?}");
        }
    }

    #[test]
    fn over_capacity_says_when_to_come_back_on_both_protocols() {
        let error = ApiError::from(Rejection::OverCapacity {
            n_queued: 9,
            limit: 8,
            retry_after: Duration::from_millis(1500),
        });
        let response = error.clone().into_response();
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1500");
        let status = error.to_status();
        assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1500");
        let delay = status.get_details_retry_info().unwrap().retry_delay;
        assert_eq!(delay, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn a_wrong_field_is_named_on_both_protocols() {
        let error = ApiError::expected("top_p", 1.5, "above 0, at most 1");
        let json: serde_json::Value = serde_json::from_slice(&error.to_json()).unwrap();
        assert_eq!(json["error"]["param"], "top_p");
        assert_eq!(json["error"]["message"], "top_p is 1.5, expected above 0, at most 1");
        assert_eq!(json["error"]["type"], "BadRequestError");
        let violations = error.to_status().get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "top_p");
    }

    #[test]
    fn kinds_have_distinct_types() {
        let types: std::collections::HashSet<_> = ErrorKind::ALL.iter().map(|kind| kind.codes().kind).collect();
        assert_eq!(types.len(), ErrorKind::ALL.len());
    }
}
