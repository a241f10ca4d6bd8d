//! A request's tokens on their way to text: detokenization, stop strings, the reason of the end, and the front door's
//! measurements. One [`OutputStream`] is one sequence; how it is written on the wire belongs to the endpoints.

use std::sync::Arc;

use baton_engine::text::{DetokenizeStream, StopStrings, TokenizerError};
use baton_scheduler::ids::{RequestId, TokenId};
use baton_scheduler::request::{Failure, Finish, Request, SamplingParams, Token, TokenLogprobs};
use baton_scheduler::timeline::{Moment, Timeline};
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::ApiState;
use super::error::{ApiError, ErrorKind};
use super::metrics::{Endpoint, Recorder};
use super::request_label::RequestLabel;
use super::running::RunningGuard;
use crate::door::{DoorEvent, RequestStream, Submission, Usage};

/// How ids become the text a client sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextOptions {
    /// Texts that end generation.
    pub stop: Vec<String>,
    /// Keep the stop text, or the stop id's text, at the end.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for TextOptions {
    fn default() -> TextOptions {
        TextOptions {
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
        }
    }
}

/// One validated prompt, ready to run.
#[derive(Clone, Debug)]
pub struct Job {
    /// Which endpoint it came from.
    pub endpoint: Endpoint,
    /// The client's name for it.
    pub label: RequestLabel,
    /// The prompt.
    pub prompt_ids: Arc<[TokenId]>,
    /// Resolved sampling.
    pub sampling: SamplingParams,
    /// Text side.
    pub text: TextOptions,
    /// Separates prefix caches.
    pub cache_salt: u64,
    /// When the client gives up.
    pub deadline: Option<Instant>,
    /// Moments so far.
    pub timeline: Timeline,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id or a stop text.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
    /// Aborted by its name.
    Abort,
}

impl FinishReason {
    /// The word of the OpenAI API (`abort` is vLLM's).
    pub const fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
        }
    }
}

/// What exactly stopped a sequence, when it was not the model's own end.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of the client's stop ids.
    Id(TokenId),
    /// One of the client's stop texts.
    Text(String),
}

/// One token with the text that became final with it.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// The token.
    pub token: Token,
    /// Text that may be sent now; often empty.
    pub text: String,
    /// It is already known that no token follows, so the end can travel with it.
    pub is_last: bool,
}

/// The end of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// What, if the client asked for it.
    pub stop_reason: Option<StopReason>,
    /// Text that was still held back; empty unless the end came unannounced.
    pub text: String,
    /// Counts.
    pub usage: Usage,
}

/// What an [`OutputStream`] gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Log-probabilities of each prompt token after the first.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// The next token.
    Token(OutputToken),
    /// The end; nothing follows.
    Finished(Finished),
}

/// One running sequence. Dropping it cancels the request everywhere.
#[derive(Debug)]
pub struct OutputStream {
    state: ApiState,
    /// `None` once nothing more is wanted from it.
    events: Option<RequestStream>,
    running: RunningGuard,
    recorder: Recorder,
    text: TextSide,
    n_prompt_tokens: u32,
    n_tokens: u32,
    max_tokens: u32,
    stop_token_ids: Vec<TokenId>,
    ended: bool,
    /// A stop text was found: the end to report.
    stopped: Option<StopReason>,
}

/// Ids in, text out; the text of a model without a tokenizer is empty.
#[derive(Debug)]
struct TextSide {
    detokenize: Option<DetokenizeStream>,
    stop: StopStrings,
    stop_texts: Vec<String>,
    include_stop: bool,
}

/// Text that became final, and the stop text found in it.
#[derive(Debug, Default)]
struct Piece {
    text: String,
    stopped_by: Option<StopReason>,
}

impl TextSide {
    fn push(&mut self, id: TokenId) -> Result<Piece, TokenizerError> {
        let Some(detokenize) = &mut self.detokenize else {
            return Ok(Piece::default());
        };
        let decoded = detokenize.push(id)?;
        Ok(self.cut(&decoded))
    }

    /// What is still held back, at the end.
    fn flush(&mut self) -> Result<Piece, TokenizerError> {
        let Some(detokenize) = &mut self.detokenize else {
            return Ok(Piece::default());
        };
        let tail = detokenize.flush()?;
        let mut piece = self.cut(&tail);
        if piece.stopped_by.is_none() {
            piece.text.push_str(&self.stop.flush());
        }
        Ok(piece)
    }

    fn cut(&mut self, text: &str) -> Piece {
        let output = self.stop.push(text);
        let stopped_by = output
            .stopped_by
            .map(|idx| StopReason::Text(self.stop_texts[idx].clone()));
        Piece {
            text: output.text,
            stopped_by,
        }
    }
}

impl OutputStream {
    /// Hands `job` to the generator and waits until it is admitted.
    pub async fn start(state: &ApiState, job: Job) -> Result<OutputStream, ApiError> {
        let mut stream = OutputStream::waiting(state, &job);
        match stream.admit(job).await {
            Ok(()) => Ok(stream),
            Err(error) => {
                stream.recorder.failed(&error);
                Err(error)
            }
        }
    }

    fn waiting(state: &ApiState, job: &Job) -> OutputStream {
        let tokenizer = state.model().tokenizer.as_ref();
        OutputStream {
            state: state.clone(),
            events: None,
            running: state.running().enter(job.label.shared()),
            recorder: Recorder::new(state, job),
            text: TextSide {
                detokenize: tokenizer.map(|tokenizer| match job.text.skip_special_tokens {
                    true => tokenizer.stream(),
                    false => tokenizer.stream_with_special_tokens(),
                }),
                stop: StopStrings::new(job.text.stop.clone(), job.text.include_stop_str_in_output),
                stop_texts: job.text.stop.clone(),
                include_stop: job.text.include_stop_str_in_output,
            },
            n_prompt_tokens: job.prompt_ids.len() as u32,
            n_tokens: 0,
            max_tokens: job.sampling.max_tokens,
            stop_token_ids: job.sampling.stop_token_ids.clone(),
            ended: false,
            stopped: None,
        }
    }

    async fn admit(&mut self, job: Job) -> Result<(), ApiError> {
        if self.state.is_stopping() {
            return Err(ApiError::new(ErrorKind::Unavailable, "the server is shutting down"));
        }
        let deadline = job.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if deadline == Some(Duration::ZERO) {
            return Err(Failure::DeadlineExceeded.into());
        }
        let id = RequestId(Uuid::new_v4().as_u128());
        let (label, n_prompt_tokens, max_tokens) = (job.label.as_str(), self.n_prompt_tokens, self.max_tokens);
        tracing::debug!(request_id = label, %id, n_prompt_tokens, max_tokens, "request accepted");
        let submission = Submission {
            request: Request {
                id,
                prompt_ids: job.prompt_ids,
                sampling: job.sampling,
                cache_salt: job.cache_salt,
            },
            deadline,
            label: job.label.shared(),
            timeline: job.timeline,
        };
        // Aborted while it waits: the stream stays without events, and ends as aborted.
        tokio::select! {
            biased;
            () = self.running.aborted() => {}
            events = self.state.generator().submit(submission) => self.events = Some(events?),
        }
        Ok(())
    }

    /// The next output; `None` after the end or an error. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Output, ApiError>> {
        if self.ended {
            return None;
        }
        let output = self.advance().await;
        match &output {
            Ok(Output::Finished(finished)) => {
                self.end();
                self.recorder.finished(finished);
            }
            Err(error) => {
                self.end();
                self.recorder.failed(error);
            }
            Ok(_) => {}
        }
        Some(output)
    }

    fn end(&mut self) {
        self.ended = true;
        self.events = None;
    }

    async fn advance(&mut self) -> Result<Output, ApiError> {
        if let Some(stop_reason) = self.stopped.take() {
            return Ok(Output::Finished(self.finish(
                FinishReason::Stop,
                Some(stop_reason),
                String::new(),
            )));
        }
        let event = match &mut self.events {
            None => return self.abort(),
            Some(events) => tokio::select! {
                biased;
                () = self.running.aborted() => return self.abort(),
                event = events.next() => event,
            },
        };
        match event {
            Some(DoorEvent::PromptLogprobs(logprobs)) => Ok(Output::PromptLogprobs(logprobs)),
            Some(DoorEvent::Token(token)) => self.token(token).map(Output::Token),
            Some(DoorEvent::Ended {
                finish,
                usage,
                timeline,
            }) => {
                self.recorder.set_timeline(timeline);
                self.ended_well(finish, usage).map(Output::Finished)
            }
            Some(DoorEvent::Failed(failure)) => Err(failure.into()),
            None => Err(ApiError::new(
                ErrorKind::Internal,
                "the request's stream ended without a terminal state",
            )),
        }
    }

    fn token(&mut self, token: Token) -> Result<OutputToken, ApiError> {
        if token.index != self.n_tokens || self.n_tokens >= self.max_tokens {
            let (index, expected) = (token.index, self.n_tokens);
            let message = format!(
                "token {index} came where {expected} of {} was expected",
                self.max_tokens
            );
            return Err(ApiError::new(ErrorKind::Internal, message));
        }
        self.recorder.token(self.n_prompt_tokens);
        self.n_tokens += 1;
        let is_stop_id = self.stop_token_ids.binary_search(&token.id).is_ok();
        let mut piece = match is_stop_id && !self.text.include_stop {
            true => Piece::default(),
            false => self.text.push(token.id).map_err(internal)?,
        };
        let is_last = is_stop_id || self.n_tokens == self.max_tokens;
        if is_last && piece.stopped_by.is_none() {
            let tail = self.text.flush().map_err(internal)?;
            piece.text.push_str(&tail.text);
            piece.stopped_by = tail.stopped_by;
        }
        let is_last = is_last || piece.stopped_by.is_some();
        if piece.stopped_by.is_some() {
            // Nothing more is wanted: dropping the stream cancels the request, if it has not ended by itself.
            self.stopped = piece.stopped_by;
            self.events = None;
        }
        Ok(OutputToken {
            token,
            text: piece.text,
            is_last,
        })
    }

    fn ended_well(&mut self, finish: Finish, usage: Usage) -> Result<Finished, ApiError> {
        if usage.n_completion_tokens != self.n_tokens {
            let message = format!(
                "{} tokens came of {} generated",
                self.n_tokens, usage.n_completion_tokens
            );
            return Err(ApiError::new(ErrorKind::Internal, message));
        }
        let tail = self.text.flush().map_err(internal)?;
        let (reason, stop_reason) = match (tail.stopped_by, finish) {
            (Some(stop_reason), _) => (FinishReason::Stop, Some(stop_reason)),
            (None, Finish::Length) => (FinishReason::Length, None),
            (None, Finish::Stop(id)) => {
                let is_eos = self.state.model().eos_token_ids.contains(&id);
                (FinishReason::Stop, (!is_eos).then_some(StopReason::Id(id)))
            }
        };
        Ok(Finished {
            usage,
            ..self.finish(reason, stop_reason, tail.text)
        })
    }

    fn abort(&mut self) -> Result<Output, ApiError> {
        let tail = self.text.flush().map_err(internal)?;
        Ok(Output::Finished(self.finish(FinishReason::Abort, None, tail.text)))
    }

    fn finish(&self, reason: FinishReason, stop_reason: Option<StopReason>, text: String) -> Finished {
        let usage = Usage {
            n_prompt_tokens: self.n_prompt_tokens,
            n_completion_tokens: self.n_tokens,
            n_cached_tokens: 0,
        };
        Finished {
            reason,
            stop_reason,
            text,
            usage,
        }
    }

    /// Counts so far.
    pub fn usage(&self) -> Usage {
        self.finish(FinishReason::Length, None, String::new()).usage
    }
}

fn internal(error: TokenizerError) -> ApiError {
    ApiError::new(ErrorKind::Internal, format!("detokenization failed: {error}"))
}

/// A timeline that starts at `received`.
pub fn timeline_from(state: &ApiState, received: baton_scheduler::ids::Nanos) -> Timeline {
    let mut timeline = Timeline::default();
    timeline.mark(Moment::Received, received);
    timeline.mark(Moment::Tokenized, state.generator().now());
    timeline
}
