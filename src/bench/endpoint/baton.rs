//! `baton.v1.Baton/Generate` over gRPC, all requests on one connection.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::generate_request::Prompt;
use baton_proto::api::{FinishReason, GenerateRequest, GenerateResponse, SamplingParams, TokenIds, Usage};
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use super::{Asking, Completion, RequestFailure, TextOfAnswers, status_failure};
use crate::bench::workload::{PromptMaker, Turn};
use crate::config::{Address, Secret};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends requests.
#[derive(Clone, Debug)]
pub struct BatonV1Client {
    client: BatonClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

impl BatonV1Client {
    /// A client of `server`, which connects with its first request.
    ///
    /// # Errors
    /// An address that is no URI, a key that no metadata can hold.
    pub fn new(server: &Address, api_key: Option<&Secret>) -> anyhow::Result<BatonV1Client> {
        let endpoint = Endpoint::from_shared(server.to_uri()).with_context(|| format!("server {server}"))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .connect_lazy();
        Ok(BatonV1Client {
            client: BatonClient::new(channel),
            authorization: api_key.map(super::bearer).transpose()?,
        })
    }

    /// The message that asks for `turn`.
    pub fn message(&self, turn: &Turn, maker: &PromptMaker, asking: &Asking) -> GenerateRequest {
        GenerateRequest {
            model: asking.model.clone(),
            prompt: Some(Prompt::TokenIds(TokenIds {
                ids: maker.ids(&turn.messages),
            })),
            sampling: Some(SamplingParams {
                max_tokens: Some(turn.output_len),
                temperature: asking.temperature.map(|temperature| temperature as f32),
                ignore_eos: asking.ignore_eos,
                ..SamplingParams::default()
            }),
            ..GenerateRequest::default()
        }
    }

    /// Sends `message` and reads the stream to its end.
    pub async fn send(
        &self,
        message: GenerateRequest,
        started: Instant,
        text: TextOfAnswers,
    ) -> Result<Completion, RequestFailure> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            request.metadata_mut().insert("authorization", value.clone());
        }
        let mut client = self.client.clone();
        let mut stream = client.generate(request).await.map_err(status_failure)?.into_inner();
        let mut answer = Answer::new(text);
        while let Some(message) = stream.message().await.map_err(status_failure)? {
            answer.message(message, started.elapsed());
        }
        answer.end()
    }
}

/// What has come of a stream so far.
struct Answer {
    token_times: Vec<Duration>,
    keeping: TextOfAnswers,
    text: String,
    usage: Option<Usage>,
    finish: FinishReason,
}

impl Answer {
    fn new(keeping: TextOfAnswers) -> Answer {
        Answer {
            token_times: Vec::new(),
            keeping,
            text: String::new(),
            usage: None,
            finish: FinishReason::Unspecified,
        }
    }

    fn message(&mut self, message: GenerateResponse, arrived: Duration) {
        self.token_times.extend(message.tokens.iter().map(|_| arrived));
        self.keeping.add(&mut self.text, &message.text);
        if message.finish() != FinishReason::Unspecified {
            self.finish = message.finish();
            self.usage = message.usage;
        }
    }

    fn end(self) -> Result<Completion, RequestFailure> {
        match self.finish {
            FinishReason::Stop | FinishReason::Length => {}
            FinishReason::Unspecified => return Err(RequestFailure::Incomplete("no finish")),
            FinishReason::Abort => return Err(RequestFailure::InStream("aborted".into())),
        }
        let usage = self.usage.ok_or(RequestFailure::Incomplete("no usage"))?;
        if self.token_times.is_empty() {
            return Err(RequestFailure::Incomplete("no token"));
        }
        Ok(Completion {
            token_times: self.token_times,
            n_input_tokens: usage.prompt_tokens.into(),
            n_output_tokens: usage.completion_tokens.into(),
            n_cached_tokens: usage.cached_tokens.into(),
            text: self.text,
        })
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::api::GeneratedToken;

    use super::*;

    fn answer(messages: Vec<GenerateResponse>) -> Result<Completion, RequestFailure> {
        let mut answer = Answer::new(TextOfAnswers::Kept);
        for (index, message) in messages.into_iter().enumerate() {
            answer.message(message, Duration::from_millis(index as u64));
        }
        answer.end()
    }

    fn token() -> GenerateResponse {
        GenerateResponse {
            tokens: vec![GeneratedToken::default()],
            ..GenerateResponse::default()
        }
    }

    fn last(finish: FinishReason, usage: Option<Usage>) -> GenerateResponse {
        GenerateResponse {
            finish: finish.into(),
            usage,
            ..token()
        }
    }

    const USAGE: Option<Usage> = Some(Usage {
        prompt_tokens: 3,
        completion_tokens: 2,
        cached_tokens: 1,
    });

    #[test]
    fn tokens_are_timed_by_their_messages() {
        let completion = answer(vec![token(), last(FinishReason::Length, USAGE)]).expect("complete");
        assert_eq!(completion.token_times, [Duration::ZERO, Duration::from_millis(1)]);
        assert_eq!((completion.n_input_tokens, completion.n_cached_tokens), (3, 1));
        assert_eq!(completion.tpot(), Some(Duration::from_millis(1)));
    }

    #[test]
    fn every_early_end_is_a_failure() {
        for (messages, kind) in [
            (vec![token()], "incomplete"),
            (vec![token(), last(FinishReason::Stop, None)], "incomplete"),
            (vec![last(FinishReason::Abort, USAGE)], "in_stream"),
        ] {
            assert_eq!(answer(messages).expect_err("failed").kind(), kind);
        }
    }
}
