//! `/v1/completions` and `/v1/chat/completions`: the body, and what the server-sent events of the answer mean.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};

use super::sse::SseParser;
use super::{Asking, Completion, RequestFailure, TextOfAnswers, root_cause};
use crate::bench::workload::{PromptMaker, Speaker, Turn};
use crate::config::{Address, Secret};

/// A refusal's body is read up to this length; the rest says nothing more.
const REFUSAL_LIMIT_BYTES: usize = 4096;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenAiApi {
    /// Prompts are token ids.
    Completions,
    /// Prompts are messages of words.
    Chat,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(flatten)]
    prompt: Prompt,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Prompt {
    Completions {
        prompt: Vec<u32>,
        max_tokens: u32,
    },
    Chat {
        messages: Vec<ChatMessage>,
        max_completion_tokens: u32,
    },
}

#[derive(Serialize)]
struct ChatMessage {
    role: &'static str,
    content: String,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
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

/// Sends requests to one of the two.
#[derive(Clone, Debug)]
pub struct OpenAiClient {
    http: reqwest::Client,
    api: OpenAiApi,
    url: String,
    headers: HeaderMap,
}

impl OpenAiClient {
    /// A client of `server`.
    ///
    /// # Errors
    /// A key that no header can hold.
    pub fn new(server: &Address, api: OpenAiApi, api_key: Option<&Secret>) -> anyhow::Result<OpenAiClient> {
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
        let path = match api {
            OpenAiApi::Completions => "/v1/completions",
            OpenAiApi::Chat => "/v1/chat/completions",
        };
        Ok(OpenAiClient {
            http,
            api,
            url: format!("http://{server}{path}"),
            headers,
        })
    }

    /// The body that asks for `turn`.
    pub fn body(&self, turn: &Turn, maker: &PromptMaker, asking: &Asking) -> Bytes {
        let prompt = match self.api {
            OpenAiApi::Completions => Prompt::Completions {
                prompt: maker.ids(&turn.messages),
                max_tokens: turn.output_len,
            },
            OpenAiApi::Chat => {
                let messages = turn.messages.iter().map(|message| ChatMessage {
                    role: match message.speaker {
                        Speaker::User => "user",
                        Speaker::Assistant => "assistant",
                    },
                    content: maker.text(message),
                });
                Prompt::Chat {
                    messages: messages.collect(),
                    max_completion_tokens: turn.output_len,
                }
            }
        };
        let body = Body {
            model: &asking.model,
            prompt,
            stream: true,
            stream_options: StreamOptions { include_usage: true },
            ignore_eos: asking.ignore_eos,
            temperature: asking.temperature,
        };
        serde_json::to_vec(&body).expect("numbers and texts are JSON").into()
    }

    /// Sends `body` and reads the answer to its end.
    pub async fn send(&self, body: Bytes, started: Instant, text: TextOfAnswers) -> Result<Completion, RequestFailure> {
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
        let mut answer = Answer::new(text);
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
struct Answer {
    token_times: Vec<Duration>,
    keeping: TextOfAnswers,
    text: String,
    /// The last event had a finish reason and no text: it may not have been a token.
    ends_bare: bool,
    usage: Option<Usage>,
    is_done: bool,
    failure: Option<RequestFailure>,
}

impl Answer {
    fn new(keeping: TextOfAnswers) -> Answer {
        Answer {
            token_times: Vec::new(),
            keeping,
            text: String::new(),
            ends_bare: false,
            usage: None,
            is_done: false,
            failure: None,
        }
    }

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
            let text = text.unwrap_or_default();
            self.ends_bare = choice.finish_reason.is_some() && text.is_empty();
            self.keeping.add(&mut self.text, text);
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
            text: self.text,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::bench::workload::{Message, Segment, Source};

    fn body(api: OpenAiApi) -> Value {
        let server = Address::Tcp {
            host: "h".into(),
            port: 1,
        };
        let client = OpenAiClient::new(&server, api, None).expect("a client");
        let says = |speaker, source| Message {
            speaker,
            segments: vec![Segment { source, n_tokens: 20 }],
        };
        let turn = Turn {
            index: 1,
            pause: Duration::ZERO,
            messages: vec![
                says(Speaker::User, Source::Request(0)),
                says(Speaker::Assistant, Source::Answer(0)),
                says(Speaker::User, Source::Request(1)),
            ],
            output_len: 5,
        };
        let maker = PromptMaker {
            vocabulary: (0..9).collect(),
            seed: 1,
        };
        let asking = Asking {
            model: "m".into(),
            ignore_eos: true,
            temperature: Some(0.0),
            text: TextOfAnswers::Kept,
        };
        serde_json::from_slice(&client.body(&turn, &maker, &asking)).expect("JSON")
    }

    #[test]
    fn bodies_ask_for_a_stream_with_usage() {
        let completions = body(OpenAiApi::Completions);
        assert_eq!(completions["stream_options"]["include_usage"], true);
        assert_eq!(completions["prompt"].as_array().map(Vec::len), Some(60));
        assert_eq!(
            (
                &completions["max_tokens"],
                &completions["ignore_eos"],
                &completions["temperature"]
            ),
            (&json!(5), &json!(true), &json!(0.0))
        );
        let chat = body(OpenAiApi::Chat);
        let roles: Vec<&Value> = (0..3).map(|i| &chat["messages"][i]["role"]).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        let content = chat["messages"][2]["content"].as_str().expect("a text");
        assert_eq!(content.split(' ').count(), 20);
        assert_eq!(
            (&chat["max_completion_tokens"], &chat["max_tokens"]),
            (&json!(5), &Value::Null)
        );
        assert_eq!((&chat["stream"], &chat["model"]), (&json!(true), &json!("m")));
    }

    fn answer(events: &[&str]) -> Result<Completion, RequestFailure> {
        let mut answer = Answer::new(TextOfAnswers::Kept);
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
        assert_eq!((with_last.token_times.len(), &*with_last.text), (2, "ab"));
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
