//! Outputs of a request as messages of the engine service.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_proto::vllm::grpc::engine as wire;
use baton_proto::vllm::grpc::engine::generate_complete::MatchedStop;
use baton_proto::vllm::grpc::engine::generate_response::Response;
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Token, TokenLogprobs};

use super::super::error::ApiError;
use super::super::output::{ChoiceEnd, Output, OutputStream, StopReason};
use crate::door::Usage;

/// One choice so far.
#[derive(Clone, Debug, Default)]
struct Choice {
    ids: Vec<TokenId>,
    logprobs: Option<wire::OutputLogProbs>,
    end: Option<ChoiceEnd>,
    has_begun: bool,
}

/// The messages of one running request. Dropping it cancels the request.
#[derive(Debug)]
pub(super) struct Responses {
    output: OutputStream,
    is_streamed: bool,
    prompt_ids: Arc<[TokenId]>,
    input_logprobs: Option<wire::InputLogProbs>,
    choices: Vec<Choice>,
    /// The completes, once every choice has ended.
    completes: VecDeque<wire::GenerateComplete>,
}

impl Responses {
    pub(super) fn new(output: OutputStream, is_streamed: bool, prompt_ids: Arc<[TokenId]>, n: u32) -> Responses {
        Responses {
            output,
            is_streamed,
            prompt_ids,
            input_logprobs: None,
            choices: vec![Choice::default(); n as usize],
            completes: VecDeque::new(),
        }
    }

    /// The next message; `None` after the last or an error.
    pub(super) async fn next(&mut self) -> Option<Result<wire::GenerateResponse, ApiError>> {
        loop {
            if let Some(complete) = self.completes.pop_front() {
                return Some(Ok(response(Response::Complete(complete))));
            }
            match self.output.next().await? {
                Ok(Output::PromptLogprobs(logprobs)) => {
                    self.input_logprobs = Some(input_logprobs(&self.prompt_ids, &logprobs));
                }
                Ok(Output::Token { choice, token }) => {
                    let chunk = self.token(choice, token.token);
                    if self.is_streamed {
                        return Some(Ok(response(Response::Chunk(chunk))));
                    }
                }
                Ok(Output::ChoiceEnded { choice, end }) => self.choices[choice as usize].end = Some(end),
                Ok(Output::Finished(usage)) => self.finished(usage),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn token(&mut self, choice: u32, token: Token) -> wire::GenerateStreamChunk {
        let own = &mut self.choices[choice as usize];
        own.ids.push(token.id);
        let is_first = !std::mem::replace(&mut own.has_begun, true);
        let logprobs = token.logprobs.map(|logprobs| {
            let mut one = wire::OutputLogProbs::default();
            push(&mut one, token.id, &logprobs);
            push(own.logprobs.get_or_insert_default(), token.id, &logprobs);
            one
        });
        wire::GenerateStreamChunk {
            token_ids: vec![token.id],
            prompt_tokens: self.prompt_ids.len() as u32,
            completion_tokens: own.ids.len() as u32,
            cached_tokens: 0,
            output_logprobs: logprobs,
            input_logprobs: self.input_logprobs.clone().filter(|_| is_first),
            index: choice,
        }
    }

    fn finished(&mut self, usage: Usage) {
        for (index, own) in (0..).zip(std::mem::take(&mut self.choices)) {
            let (reason, stop_reason) = own.end.map_or(("", None), |end| (end.reason.as_str(), end.stop_reason));
            self.completes.push_back(wire::GenerateComplete {
                finish_reason: reason.to_owned(),
                prompt_tokens: usage.n_prompt_tokens,
                completion_tokens: own.ids.len() as u32,
                cached_tokens: usage.n_cached_tokens,
                output_logprobs: own.logprobs,
                input_logprobs: self.input_logprobs.clone(),
                index,
                matched_stop: stop_reason.map(|reason| match reason {
                    StopReason::Id(id) => MatchedStop::MatchedTokenId(id),
                    StopReason::Text(text) => MatchedStop::MatchedStopStr(text),
                }),
                output_ids: own.ids,
                ..wire::GenerateComplete::default()
            });
        }
    }
}

fn response(response: Response) -> wire::GenerateResponse {
    wire::GenerateResponse {
        response: Some(response),
    }
}

fn top(logprobs: &TokenLogprobs) -> wire::TopLogProbs {
    let (token_ids, values) = logprobs.top.iter().copied().unzip();
    wire::TopLogProbs { values, token_ids }
}

fn push(to: &mut wire::OutputLogProbs, id: TokenId, logprobs: &TokenLogprobs) {
    to.token_logprobs.push(logprobs.logprob);
    to.token_ids.push(id);
    to.top_logprobs.push(top(logprobs));
}

/// An entry for each prompt token; the first has no log-probability.
fn input_logprobs(prompt_ids: &[TokenId], logprobs: &[TokenLogprobs]) -> wire::InputLogProbs {
    let values = logprobs.iter().map(|logprobs| Some(logprobs.logprob));
    let tops = logprobs.iter().map(top);
    wire::InputLogProbs {
        token_logprobs: std::iter::once(None)
            .chain(values)
            .map(|value| wire::InputTokenLogProb { value })
            .collect(),
        token_ids: prompt_ids.to_vec(),
        top_logprobs: std::iter::once(wire::TopLogProbs::default()).chain(tops).collect(),
    }
}
