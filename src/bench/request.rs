//! One measured request: sent, its events timed as they arrive, its end judged. Never retried.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;

use super::sse::SseParser;
use crate::config::Secret;

/// A refusal's body is read up to this length; the rest says nothing more.
const REFUSAL_LIMIT_BYTES: usize = 4096;

/// How a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFailure {
    /// No connection, or it broke.
    #[error("connection: {0}")]
    Connection(String),
    /// The server refused it.
    #[error("HTTP {status}: {message}")]
    Refused {
        /// The status.
        status: u16,
        /// The body's beginning.
        message: String,
    },
    /// The server reported an error in a stream that had started.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// The stream is not what an OpenAI-compatible server sends.
    #[error("not understood: {0}")]
    NotUnderstood(String),
    /// The stream ended early: no token, no `[DONE]` or no usage.
    #[error("incomplete: {0}")]
    Incomplete(&'static str),
    /// It took too long.
    #[error("no end within {0:?}")]
    TimedOut(Duration),
}

impl RequestFailure {
    /// The key under which it is counted.
    pub fn kind(&self) -> String {
        match self {
            RequestFailure::Connection(_) => "connection".into(),
            RequestFailure::Refused { status, .. } => format!("http_{status}"),
            RequestFailure::InStream(_) => "in_stream".into(),
            RequestFailure::NotUnderstood(_) => "not_understood".into(),
            RequestFailure::Incomplete(_) => "incomplete".into(),
            RequestFailure::TimedOut(_) => "timed_out".into(),
        }
    }
}

/// A request that ended well.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// When each token's event arrived, after the request was sent; not empty.
    pub token_times: Vec<Duration>,
    /// Prompt tokens, as the server counted them.
    pub n_input_tokens: u64,
    /// Generated tokens, as the server counted them.
    pub n_output_tokens: u64,
    /// Prompt tokens that a prefix cache held, as the server counted them.
    pub n_cached_tokens: u64,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Deserialize)]
struct PromptTokensDetails {
    cached_tokens: Option<u64>,
}

/// Sends requests to one endpoint.
#[derive(Clone, Debug)]
pub struct LoadClient {
    http: reqwest::Client,
    url: String,
    headers: HeaderMap,
    timeout: Duration,
}

impl LoadClient {
    /// A client of `url`; each request may take `timeout` in all.
    pub fn new(url: String, api_key: Option<&Secret>, timeout: Duration) -> anyhow::Result<LoadClient> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = api_key {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        // Every connection stays open, so that only the first requests pay for connecting.
        let http = reqwest::Client::builder()
            .no_proxy()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(usize::MAX)
            .build()?;
        Ok(LoadClient {
            http,
            url,
            headers,
            timeout,
        })
    }

    /// Sends `body` and reads the answer to its end. `started` is when the request counts as sent.
    pub async fn send(&self, body: Bytes, started: Instant) -> Result<Completion, RequestFailure> {
        let within = tokio::time::timeout(self.timeout, self.stream(body, started)).await;
        within.unwrap_or(Err(RequestFailure::TimedOut(self.timeout)))
    }

    async fn stream(&self, body: Bytes, started: Instant) -> Result<Completion, RequestFailure> {
        let broken = |error: reqwest::Error| RequestFailure::Connection(root_cause(&error));
        let request = self.http.post(&self.url).headers(self.headers.clone()).body(body);
        let mut response = request.send().await.map_err(broken)?;
        let status = response.status();
        if !status.is_success() {
            let mut message = Vec::new();
            while let Ok(Some(chunk)) = response.chunk().await {
                message.extend_from_slice(&chunk);
                if message.len() >= REFUSAL_LIMIT_BYTES {
                    message.truncate(REFUSAL_LIMIT_BYTES);
                    break;
                }
            }
            let message = String::from_utf8_lossy(&message).into_owned();
            return Err(RequestFailure::Refused {
                status: status.as_u16(),
                message,
            });
        }
        let mut parser = SseParser::default();
        let mut answer = Answer::default();
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            let arrived = started.elapsed();
            parser
                .push(&chunk, |data| answer.event(data, arrived))
                .map_err(|error| RequestFailure::NotUnderstood(error.to_string()))?;
        }
        answer.end()
    }
}

/// What has come of a stream so far.
#[derive(Default)]
struct Answer {
    token_times: Vec<Duration>,
    /// The last event had a finish reason and no text: it may not have been a token.
    ends_bare: bool,
    usage: Option<Usage>,
    is_done: bool,
    failure: Option<RequestFailure>,
}

impl Answer {
    fn event(&mut self, data: &[u8], arrived: Duration) {
        if data == b"[DONE]" {
            self.is_done = true;
            return;
        }
        let event: Event = match serde_json::from_slice(data) {
            Ok(event) => event,
            Err(error) => {
                self.failure
                    .get_or_insert(RequestFailure::NotUnderstood(error.to_string()));
                return;
            }
        };
        if let Some(error) = event.error {
            let message = error
                .get("message")
                .and_then(|message| message.as_str())
                .unwrap_or("without a message");
            self.failure.get_or_insert(RequestFailure::InStream(message.to_owned()));
            return;
        }
        if let Some(choice) = event.choices.first() {
            self.token_times.push(arrived);
            let text = choice
                .text
                .as_deref()
                .or(choice.delta.as_ref().and_then(|delta| delta.content.as_deref()));
            self.ends_bare = choice.finish_reason.is_some() && text.unwrap_or("").is_empty();
        }
        if event.usage.is_some() {
            self.usage = event.usage;
        }
    }

    fn end(mut self) -> Result<Completion, RequestFailure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let usage = self.usage.ok_or(RequestFailure::Incomplete("no usage"))?;
        if !self.is_done {
            return Err(RequestFailure::Incomplete("no [DONE]"));
        }
        // Some servers end with an event of its own for the finish reason, which would count as a token that came at once.
        if self.ends_bare && self.token_times.len() as u64 == usage.completion_tokens + 1 {
            self.token_times.pop();
        }
        if self.token_times.is_empty() {
            return Err(RequestFailure::Incomplete("no token"));
        }
        Ok(Completion {
            token_times: self.token_times,
            n_input_tokens: usage.prompt_tokens,
            n_output_tokens: usage.completion_tokens,
            n_cached_tokens: usage
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens)
                .unwrap_or(0),
        })
    }
}

/// The innermost cause, which names the system's error; the outer ones only repeat the URL.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: &[&str]) -> Result<Completion, RequestFailure> {
        let mut answer = Answer::default();
        for (index, event) in events.iter().enumerate() {
            answer.event(event.as_bytes(), Duration::from_millis(index as u64));
        }
        answer.end()
    }

    const TOKEN: &str = r#"{"choices":[{"text":"a","finish_reason":null}]}"#;
    const LAST_TOKEN: &str = r#"{"choices":[{"text":"b","finish_reason":"length"}],"usage":null}"#;
    const BARE_END: &str = r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#;
    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#;

    #[test]
    fn tokens_are_counted_by_events_and_a_bare_end_is_none() {
        let with_last = answer(&[TOKEN, LAST_TOKEN, USAGE, "[DONE]"]).expect("complete");
        assert_eq!(with_last.token_times.len(), 2);
        assert_eq!(
            (
                with_last.n_input_tokens,
                with_last.n_output_tokens,
                with_last.n_cached_tokens
            ),
            (3, 2, 1)
        );
        let with_bare = answer(&[TOKEN, TOKEN, BARE_END, USAGE, "[DONE]"]).expect("complete");
        assert_eq!(with_bare.token_times, [Duration::ZERO, Duration::from_millis(1)]);
        let empty_text = answer(&[TOKEN, BARE_END, USAGE, "[DONE]"]).expect("complete");
        assert_eq!(empty_text.token_times.len(), 2, "the second token's text was empty");
    }

    #[test]
    fn every_early_end_is_a_failure() {
        let in_stream = r#"{"error":{"message":"instance lost","code":503}}"#;
        for (events, kind) in [
            (&[TOKEN, USAGE][..], "incomplete"),
            (&[TOKEN, "[DONE]"][..], "incomplete"),
            (&[USAGE, "[DONE]"][..], "incomplete"),
            (&[TOKEN, in_stream, "[DONE]"][..], "in_stream"),
            (&[TOKEN, "{", USAGE, "[DONE]"][..], "not_understood"),
        ] {
            assert_eq!(answer(events).expect_err("failed").kind(), kind, "{events:?}");
        }
    }
}
