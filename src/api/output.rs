//! A running request as the APIs see it: its choices' outputs in the order they come, its terminal state, and the front
//! door's measurements. One [`OutputStream`] is one prompt; how it is written on the wire belongs to the endpoints.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_scheduler::ids::{RequestId, TokenId};
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::request::{Failure, Finish, Request, SamplingParams, Token, TokenLogprobs};
use baton_scheduler::timeline::{Moment, Timeline};
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::ApiState;
pub use super::choice_output::{ChoiceEnd, FinishReason, OutputToken, StopReason, TextOptions};
use super::choice_output::{ChoiceOutput, Limits};
use super::error::{ApiError, ErrorKind};
use super::metrics::{Endpoint, Recorder};
use super::request_label::RequestLabel;
use super::running::RunningGuard;
use crate::door::{DoorEvent, RequestStream, Submission, Usage};

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
    /// Lower is more urgent.
    pub priority: i32,
    /// When the client gives up.
    pub deadline: Option<Instant>,
    /// Latencies it should have.
    pub objectives: RequestObjectives,
    /// Moments so far.
    pub timeline: Timeline,
}

impl Job {
    /// What the generator is asked, unless it is too late.
    pub fn submission(self, state: &ApiState) -> Result<Submission, ApiError> {
        if state.is_stopping() {
            return Err(ApiError::new(ErrorKind::Unavailable, "the server is shutting down"));
        }
        let deadline = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if deadline == Some(Duration::ZERO) {
            return Err(Failure::DeadlineExceeded.into());
        }
        let id = RequestId(Uuid::new_v4().as_u128());
        let (n, max_tokens) = (self.sampling.n, self.sampling.max_tokens);
        let (label, n_prompt_tokens) = (self.label.as_str(), self.prompt_ids.len());
        tracing::debug!(request_id = label, %id, n_prompt_tokens, n, max_tokens, "request accepted");
        Ok(Submission {
            request: Request {
                id,
                prompt_ids: self.prompt_ids,
                sampling: self.sampling,
                cache_salt: self.cache_salt,
            },
            priority: self.priority,
            deadline,
            objectives: self.objectives,
            label: self.label.shared(),
            timeline: self.timeline,
        })
    }
}

/// What an [`OutputStream`] gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Log-probabilities of each prompt token after the first.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// The next token of a choice.
    Token {
        /// Which choice.
        choice: u32,
        /// Its token and text.
        token: OutputToken,
    },
    /// A choice has ended; others may go on.
    ChoiceEnded {
        /// Which choice.
        choice: u32,
        /// How.
        end: ChoiceEnd,
    },
    /// Every choice has ended; nothing follows. The counts are of all choices together.
    Finished(Usage),
}

/// One running request. Dropping it cancels the request everywhere.
#[derive(Debug)]
pub struct OutputStream {
    state: ApiState,
    /// `None` once nothing more is wanted from it.
    events: Option<RequestStream>,
    running: RunningGuard,
    recorder: Recorder,
    choices: Vec<ChoiceOutput>,
    limits: Limits,
    n_prompt_tokens: u32,
    /// Tokens that came for choices which had ended here; they are not shown.
    n_unwanted: u32,
    /// Known, and not given out yet.
    pending: VecDeque<Output>,
    ended: bool,
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
        let choice = |_| ChoiceOutput::new(tokenizer, &job.text, job.sampling.min_tokens);
        OutputStream {
            state: state.clone(),
            events: None,
            running: state.running().enter(job.label.shared()),
            recorder: Recorder::new(state, job),
            choices: (0..job.sampling.n).map(choice).collect(),
            limits: Limits {
                max_tokens: job.sampling.max_tokens,
                stop_token_ids: job.sampling.stop_token_ids.clone(),
            },
            n_prompt_tokens: job.prompt_ids.len() as u32,
            n_unwanted: 0,
            pending: VecDeque::new(),
            ended: false,
        }
    }

    async fn admit(&mut self, job: Job) -> Result<(), ApiError> {
        let submission = job.submission(&self.state)?;
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
        let output = match self.pending.pop_front() {
            Some(output) => Ok(output),
            None => self.advance().await,
        };
        match &output {
            Ok(Output::Finished(usage)) => {
                self.end();
                let reasons = self.choices.iter().filter_map(ChoiceOutput::ended);
                let worst = reasons.max().expect("every choice has ended");
                self.recorder.finished(usage, worst);
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
        self.pending.clear();
    }

    async fn advance(&mut self) -> Result<Output, ApiError> {
        loop {
            let event = match &mut self.events {
                None => return self.abort(),
                Some(events) => tokio::select! {
                    biased;
                    () = self.running.aborted() => return self.abort(),
                    event = events.next() => event,
                },
            };
            let output = match event {
                Some(DoorEvent::PromptLogprobs(logprobs)) => Some(Output::PromptLogprobs(logprobs)),
                Some(DoorEvent::Token { choice, token }) => self.token(choice, token)?,
                Some(DoorEvent::ChoiceFinished { choice, finish }) => self.choice_finished(choice, finish)?,
                Some(DoorEvent::Ended { usage, timeline, .. }) => {
                    self.recorder.set_timeline(timeline);
                    Some(self.ended_well(usage)?)
                }
                Some(DoorEvent::Failed(failure)) => return Err(failure.into()),
                None => return Err(bug("the request's stream ended without a terminal state")),
            };
            if let Some(output) = output {
                return Ok(output);
            }
        }
    }

    /// `None` when the choice was cut here and its engine does not know yet.
    fn token(&mut self, choice: u32, token: Token) -> Result<Option<Output>, ApiError> {
        let own = choice_of(&mut self.choices, choice)?;
        if own.was_cut() {
            self.n_unwanted += 1;
            return Ok(None);
        }
        let (token, end) = own.token(token, &self.limits)?;
        self.recorder.token(choice, self.n_prompt_tokens);
        if let Some(end) = end {
            self.pending.push_back(Output::ChoiceEnded { choice, end });
            self.close_if_all_have_ended();
        }
        Ok(Some(Output::Token { choice, token }))
    }

    fn choice_finished(&mut self, choice: u32, finish: Finish) -> Result<Option<Output>, ApiError> {
        let own = choice_of(&mut self.choices, choice)?;
        if own.was_cut() {
            return Ok(None);
        }
        if own.ended().is_some() {
            return Err(bug(format!("choice {choice} ended twice")));
        }
        let end = own.finish(finish, &self.state.model().eos_token_ids)?;
        self.close_if_all_have_ended();
        Ok(Some(Output::ChoiceEnded { choice, end }))
    }

    /// With a choice that was cut here the request may run on for nothing. Dropping the stream cancels it everywhere, if it
    /// has not ended by itself.
    fn close_if_all_have_ended(&mut self) {
        let all_ended = self.choices.iter().all(|choice| choice.ended().is_some());
        if all_ended && self.choices.iter().any(ChoiceOutput::was_cut) {
            self.events = None;
            self.pending.push_back(Output::Finished(self.usage()));
        }
    }

    fn ended_well(&mut self, usage: Usage) -> Result<Output, ApiError> {
        if let Some(choice) = self.choices.iter().position(|choice| choice.ended().is_none()) {
            return Err(bug(format!("the request ended before its choice {choice}")));
        }
        let (n_shown, n_generated) = (self.usage().n_completion_tokens, usage.n_completion_tokens);
        let n_came = n_shown + self.n_unwanted;
        if n_generated != n_came {
            return Err(bug(format!("{n_came} tokens came of {n_generated} generated")));
        }
        Ok(Output::Finished(Usage {
            n_completion_tokens: n_shown,
            ..usage
        }))
    }

    fn abort(&mut self) -> Result<Output, ApiError> {
        self.events = None;
        for (choice, own) in (0..).zip(&mut self.choices) {
            if own.ended().is_none() {
                let end = own.abort()?;
                self.pending.push_back(Output::ChoiceEnded { choice, end });
            }
        }
        let finished = Output::Finished(self.usage());
        match self.pending.pop_front() {
            None => Ok(finished),
            Some(first) => {
                self.pending.push_back(finished);
                Ok(first)
            }
        }
    }

    /// Moments so far; all of them once the request has ended.
    pub fn timeline(&self) -> &Timeline {
        self.recorder.timeline()
    }

    /// Counts so far, of all choices together.
    pub fn usage(&self) -> Usage {
        Usage {
            n_prompt_tokens: self.n_prompt_tokens,
            n_completion_tokens: self.choices.iter().map(ChoiceOutput::n_tokens).sum(),
            n_cached_tokens: 0,
        }
    }
}

fn choice_of(choices: &mut [ChoiceOutput], choice: u32) -> Result<&mut ChoiceOutput, ApiError> {
    let n = choices.len();
    let found = choices.get_mut(choice as usize);
    found.ok_or_else(|| bug(format!("an event of choice {choice} came to a request of {n}")))
}

fn bug(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Internal, message.into())
}

/// A timeline that starts at `received`.
pub fn timeline_from(state: &ApiState, received: baton_scheduler::ids::Nanos) -> Timeline {
    let mut timeline = Timeline::default();
    timeline.mark(Moment::Received, received);
    timeline.mark(Moment::Tokenized, state.generator().now());
    timeline
}
