//! The client's name for a request: taken from `x-request-id` or made here, echoed, and used in ids and logs.

use std::sync::Arc;

use http::HeaderMap;
use http::header::HeaderName;
use uuid::Uuid;

use super::error::ApiError;

/// The header that carries a request's name, both ways.
pub const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The longest name taken from a client, in bytes.
pub const LONGEST_LABEL: usize = 128;

/// A request's name in responses and logs. Clients may repeat one, so it identifies nothing inside.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestLabel(Arc<str>);

impl RequestLabel {
    /// A fresh name.
    pub fn fresh() -> RequestLabel {
        RequestLabel(Uuid::new_v4().simple().to_string().into())
    }

    /// A client's name, or an error that names `field`: 1 to 128 printable ASCII characters, so that it is safe in headers
    /// and in one line of a log.
    pub fn parse(field: &'static str, text: &str) -> Result<RequestLabel, ApiError> {
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if printable && !text.trim().is_empty() && text.len() <= LONGEST_LABEL {
            return Ok(RequestLabel(text.into()));
        }
        let found = format!("{} bytes that are too long, empty or not printable", text.len());
        Err(ApiError::expected(field, found, "1 to 128 printable ASCII characters"))
    }

    /// The name in the headers, if there is one.
    pub fn from_headers(headers: &HeaderMap) -> Result<Option<RequestLabel>, ApiError> {
        let Some(value) = headers.get(REQUEST_ID_HEADER) else {
            return Ok(None);
        };
        let text = value.to_str().unwrap_or_default();
        RequestLabel::parse("x-request-id", text).map(Some)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, shared.
    pub fn shared(&self) -> Arc<str> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_printable_and_short() {
        let longest = "x".repeat(128);
        for good in ["a", "req 7", "chat/5-ü".split('-').next().unwrap(), longest.as_str()] {
            assert_eq!(RequestLabel::parse("x-request-id", good).unwrap().as_str(), good);
        }
        for bad in ["", "   ", "a\nb", "a\tb", "ü", &"x".repeat(129)] {
            assert!(RequestLabel::parse("x-request-id", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fresh_labels_differ() {
        assert_ne!(RequestLabel::fresh(), RequestLabel::fresh());
    }
}
