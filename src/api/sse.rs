//! Server-sent events: events written into one reused buffer, and the response that carries them. Knows no endpoint.

use std::convert::Infallible;

use axum::body::Body;
use axum::response::Response;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use serde::Serialize;

use super::error::ApiError;

/// A comment that keeps proxies from giving up on a stream that has nothing to say yet.
pub const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// Events in order, handed on in pieces.
#[derive(Debug, Default)]
pub struct EventBuffer {
    buffer: BytesMut,
}

impl EventBuffer {
    /// Adds one event.
    pub fn event(&mut self, value: &impl Serialize) {
        self.buffer.put_slice(b"data: ");
        serde_json::to_writer((&mut self.buffer).writer(), value).expect("responses always serialise");
        self.buffer.put_slice(b"\n\n");
    }

    /// Adds an error. The status has been sent, so this is how a stream says it.
    pub fn error(&mut self, error: &ApiError) {
        self.buffer.put_slice(b"data: ");
        self.buffer.put_slice(&error.to_json());
        self.buffer.put_slice(b"\n\n");
    }

    /// Adds the end.
    pub fn done(&mut self) {
        self.buffer.put_slice(b"data: [DONE]\n\n");
    }

    /// Takes what has been added. The memory is used again once the connection has written it.
    pub fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }
}

/// A response of events.
pub fn response(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    use futures::StreamExt as _;
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx holds responses back unless told not to.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_one_line_each() {
        let mut buffer = EventBuffer::default();
        assert!(buffer.take().is_empty());
        buffer.event(&serde_json::json!({"text": "a\nb\u{2028}"}));
        buffer.done();
        let text = String::from_utf8(buffer.take().to_vec()).unwrap();
        assert_eq!(text, "data: {\"text\":\"a\\nb\u{2028}\"}\n\ndata: [DONE]\n\n");
        assert!(buffer.take().is_empty());
        buffer.error(&ApiError::new(super::super::ErrorKind::Internal, "x"));
        assert_eq!(
            buffer.take(),
            "data: {\"error\":{\"message\":\"x\",\"type\":\"InternalServerError\",\"param\":null,\"code\":500}}\n\n"
        );
    }
}
