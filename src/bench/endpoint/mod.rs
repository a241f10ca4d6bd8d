//! The APIs that can be measured, one file each: how a turn is asked for, and how what comes back is timed and judged. Times
//! are taken when bytes arrive, before they are understood. Nothing is retried.

mod baton;
mod kserve;
mod openai;
mod sse;

use std::time::{Duration, Instant};

use bytes::Bytes;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Status};

use self::baton::BatonV1Client;
use self::kserve::{KServeClient, KServeRequest};
use self::openai::{OpenAiApi, OpenAiClient};
use super::workload::{PromptMaker, Turn};
use crate::config::{Address, Secret};

/// Which API is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointKind {
    /// `/v1/completions`, prompts as token ids.
    Completions,
    /// `/v1/chat/completions`, prompts as words.
    Chat,
    /// `baton.v1.Baton/Generate` over gRPC, prompts as token ids.
    BatonV1,
    /// `inference.GRPCInferenceService/ModelStreamInfer` over gRPC, prompts as words.
    KServe,
}

impl EndpointKind {
    /// Its name in reports and flags.
    pub const fn as_str(self) -> &'static str {
        match self {
            EndpointKind::Completions => "completions",
            EndpointKind::Chat => "chat",
            EndpointKind::BatonV1 => "baton.v1",
            EndpointKind::KServe => "kserve",
        }
    }

    /// What `vllm bench serve` calls it, where it knows it.
    pub const fn endpoint_type(self) -> &'static str {
        match self {
            EndpointKind::Completions => "openai",
            EndpointKind::Chat => "openai-chat",
            EndpointKind::BatonV1 => "baton.v1",
            EndpointKind::KServe => "kserve",
        }
    }

    /// Whether prompts are made of the model's token ids.
    pub const fn needs_vocabulary(self) -> bool {
        match self {
            EndpointKind::Completions | EndpointKind::BatonV1 => true,
            EndpointKind::Chat | EndpointKind::KServe => false,
        }
    }
}

/// What is the same in every request.
#[derive(Clone, Debug)]
pub struct Asking {
    /// The model's name.
    pub model: String,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Sampling temperature; the server's default when absent.
    pub temperature: Option<f64>,
    /// What becomes of the text of answers.
    pub text: TextOfAnswers,
}

/// What becomes of the text of answers: a long run has much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextOfAnswers {
    /// Kept for the report.
    Kept,
    /// Read and dropped.
    Dropped,
}

impl TextOfAnswers {
    /// Adds `new` to `text`.
    fn add(self, text: &mut String, new: &str) {
        match self {
            TextOfAnswers::Kept => text.push_str(new),
            TextOfAnswers::Dropped => {}
        }
    }
}

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
    /// The server ended it with a gRPC status.
    #[error("gRPC {code}: {message}")]
    Status {
        /// In lower case with underscores.
        code: String,
        /// The server's words.
        message: String,
    },
    /// The server reported an error in a stream that had started.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// The stream is not what such a server sends.
    #[error("not understood: {0}")]
    NotUnderstood(String),
    /// The stream ended early: no token, no end or no usage.
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
            RequestFailure::Status { code, .. } => format!("grpc_{code}"),
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
    /// The answer; empty unless it is kept.
    pub text: String,
}

impl Completion {
    /// Time to the first token.
    pub fn ttft(&self) -> Duration {
        self.token_times.first().copied().unwrap_or_default()
    }

    /// Time to the last token.
    pub fn e2e(&self) -> Duration {
        self.token_times.last().copied().unwrap_or_default()
    }

    /// Mean time per token after the first; absent if there is none.
    pub fn tpot(&self) -> Option<Duration> {
        let n_further = self.n_output_tokens.checked_sub(1).filter(|n| *n > 0)?;
        Some((self.e2e() - self.ttft()).div_f64(n_further as f64))
    }

    /// Times between two token events.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.token_times.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// A request that only needs to be sent.
#[derive(Clone, Debug)]
pub enum Prepared {
    /// A body of JSON.
    Http(Bytes),
    /// A message.
    BatonV1(Box<baton_proto::api::GenerateRequest>),
    /// A message of the other protocol.
    KServe(Box<KServeRequest>),
}

#[derive(Clone, Debug)]
enum Client {
    OpenAi(OpenAiClient),
    BatonV1(BatonV1Client),
    KServe(KServeClient),
}

/// Sends requests to one endpoint of one server.
#[derive(Clone, Debug)]
pub struct LoadClient {
    client: Client,
    asking: Asking,
    timeout: Duration,
}

impl LoadClient {
    /// A client of `server`; each request may take `timeout` in all.
    ///
    /// # Errors
    /// A key that no header can hold.
    pub fn new(
        server: &Address,
        kind: EndpointKind,
        asking: Asking,
        api_key: Option<&Secret>,
        timeout: Duration,
    ) -> anyhow::Result<LoadClient> {
        let openai = |api| OpenAiClient::new(server, api, api_key).map(Client::OpenAi);
        let client = match kind {
            EndpointKind::Completions => openai(OpenAiApi::Completions)?,
            EndpointKind::Chat => openai(OpenAiApi::Chat)?,
            EndpointKind::BatonV1 => Client::BatonV1(BatonV1Client::new(server, api_key)?),
            EndpointKind::KServe => Client::KServe(KServeClient::new(server, api_key)?),
        };
        Ok(LoadClient {
            client,
            asking,
            timeout,
        })
    }

    /// What asks for `turn`.
    pub fn prepare(&self, turn: &Turn, maker: &PromptMaker) -> Prepared {
        match &self.client {
            Client::OpenAi(client) => Prepared::Http(client.body(turn, maker, &self.asking)),
            Client::BatonV1(client) => Prepared::BatonV1(Box::new(client.message(turn, maker, &self.asking))),
            Client::KServe(client) => Prepared::KServe(Box::new(client.message(turn, maker, &self.asking))),
        }
    }

    /// Sends what this client prepared and reads the answer to its end. `started` is when the request counts as sent.
    ///
    /// # Errors
    /// Whatever is no complete answer.
    pub async fn send(&self, prepared: Prepared, started: Instant) -> Result<Completion, RequestFailure> {
        let text = self.asking.text;
        let answer = async {
            match (&self.client, prepared) {
                (Client::OpenAi(client), Prepared::Http(body)) => client.send(body, started, text).await,
                (Client::BatonV1(client), Prepared::BatonV1(message)) => client.send(*message, started, text).await,
                (Client::KServe(client), Prepared::KServe(request)) => client.send(*request, started, text).await,
                (Client::OpenAi(_) | Client::BatonV1(_) | Client::KServe(_), _) => {
                    unreachable!("a client is given what it prepared")
                }
            }
        };
        let within = tokio::time::timeout(self.timeout, answer).await;
        within.unwrap_or(Err(RequestFailure::TimedOut(self.timeout)))
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

/// The value of an `authorization` entry.
fn bearer(key: &Secret) -> anyhow::Result<MetadataValue<Ascii>> {
    let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.expose()).parse()?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a status says of the request that it ended.
fn status_failure(status: Status) -> RequestFailure {
    // A status that the transport made has a cause; the server's own has none.
    match std::error::Error::source(&status) {
        Some(cause) => RequestFailure::Connection(root_cause(cause)),
        None => RequestFailure::Status {
            code: code_name(status.code()),
            message: status.message().to_owned(),
        },
    }
}

/// `ResourceExhausted` as `resource_exhausted`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for (index, letter) in format!("{code:?}").chars().enumerate() {
        if index > 0 && letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_counted_by_their_codes() {
        for (status, kind) in [
            (Status::resource_exhausted("full"), "grpc_resource_exhausted"),
            (Status::ok(""), "grpc_ok"),
        ] {
            assert_eq!(status_failure(status).kind(), kind);
        }
    }
}
