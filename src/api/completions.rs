//! `POST /v1/completions`: one or several prompts, each continued once or several times, whole or as a stream.

use std::ops::ControlFlow;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::TokenLogprobs;
use http::HeaderMap;
use serde::Serialize;

use super::adjustments::check_min_tokens;
use super::best_of::{BestOf, Score};
use super::call::{Call, understand, with_label};
use super::completion_choice::{ChoiceWriter, Piece, Reports};
use super::completion_prompt::CompletionPrompt;
use super::encode::SpecialTokens;
use super::error::ApiError;
use super::fan_in::{Item, Outputs};
use super::logprobs::{CompletionLogprobs, PromptLogprobsBody};
use super::metrics::Endpoint;
use super::model_limits::resolve_max_tokens;
use super::neutral::refuse_unsupported;
use super::options::{CommonOptions, DEFAULT_MAX_TOKENS, MAX_LOGPROBS, StreamOptions, fresh_seed};
use super::output::{ChoiceEnd, Job, Output, StopReason, timeline_from};
use super::sse::{self, EventBuffer};
use super::timeline_body::TimelineBody;
use super::usage::{UsageBody, total};
use super::{ApiState, unix_time_s};
use crate::door::Usage;

/// A validated request: a job for each prompt, a writer for each choice. Choices are numbered prompt by prompt.
struct CompletionRequest {
    jobs: Vec<Job>,
    writers: Vec<ChoiceWriter>,
    /// Choices of each prompt.
    best_of: BestOf,
    only_prompt: bool,
    /// Report how long its parts took.
    has_timeline: bool,
    id: String,
    stream: Option<StreamOptions>,
}

pub(super) async fn handle(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    match understand(&state, Endpoint::Completions, &headers, body, parse).await {
        Ok((label, request)) => {
            let response = answer(&state, request).await;
            with_label(&label, response.unwrap_or_else(ApiError::into_response))
        }
        Err(refused) => refused,
    }
}

fn parse(state: &ApiState, call: Call) -> Result<CompletionRequest, ApiError> {
    let Call {
        mut fields,
        common,
        label,
        received,
    } = call;
    let model = state.model();
    common.refuse_streamed_prompt_logprobs()?;
    let n_top = fields
        .integer("logprobs", 0..=i64::from(MAX_LOGPROBS))?
        .map(|n| n as u8);
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let best_of = BestOf::take(&mut fields, common.sampling.n, common.stream.is_some())?;
    let prompts = CompletionPrompt::take(&mut fields, state.options().max_prompts)?;
    refuse_unsupported(&fields)?;
    // Scoring a prompt is `echo` without new tokens. The engine makes one at least, which is not shown.
    let only_prompt = echo && common.max_tokens == Some(0);
    if common.max_tokens == Some(0) && !only_prompt {
        return Err(ApiError::expected("max_tokens", 0, "at least 1, or echo to be true"));
    }
    if common.timeline && prompts.len() > 1 {
        let message = format!("timeline is true with {} prompts, expected one", prompts.len());
        return Err(ApiError::field("timeline", message));
    }
    let asked = common.max_tokens.map(|n| n.max(1));
    let cut = common.cut(asked, Some(DEFAULT_MAX_TOKENS), model)?;
    let CommonOptions {
        mut sampling,
        is_seeded,
        text,
        cache_salt,
        priority,
        objectives,
        stream,
        timeline: has_timeline,
        ..
    } = common;
    let reports = Reports {
        n_top,
        n_prompt_top: common.prompt_logprobs,
        token_ids: common.return_token_ids,
        tokens_as_ids: common.tokens_as_ids,
        only_prompt,
    };
    sampling.n = best_of.n_generated;
    sampling.logprobs = n_top.or(best_of.chooses().then_some(0));
    sampling.prompt_logprobs = common.prompt_logprobs.max(n_top.filter(|_| echo));
    let special_tokens = SpecialTokens::asked(common.add_special_tokens, SpecialTokens::Added);
    let mut request = CompletionRequest {
        jobs: Vec::with_capacity(prompts.len()),
        writers: Vec::with_capacity(prompts.len() * sampling.n as usize),
        best_of,
        only_prompt,
        has_timeline,
        id: format!("cmpl-{}", label.as_str()),
        stream,
    };
    for prompt in prompts {
        let prompt_ids: std::sync::Arc<[TokenId]> = prompt.ids("prompt", model, special_tokens, cut)?.into();
        sampling.max_tokens = resolve_max_tokens(asked, Some(DEFAULT_MAX_TOKENS), prompt_ids.len(), model)?;
        check_min_tokens("min_tokens", &sampling)?;
        if !is_seeded {
            // Equal prompts of one request need not have equal answers.
            sampling.seed = fresh_seed();
        }
        let echoed = echo.then(|| prompt.text(model, &prompt_ids, cut));
        let writer = || ChoiceWriter::new(state, prompt_ids.clone(), echoed.clone(), reports);
        let n_writers = best_of.n_generated as usize;
        request.writers.extend(std::iter::repeat_with(writer).take(n_writers));
        request.jobs.push(Job {
            endpoint: Endpoint::Completions,
            label: label.clone(),
            prompt_ids,
            sampling: sampling.clone(),
            text: text.clone(),
            cache_salt,
            priority,
            deadline: None,
            objectives,
            timeline: timeline_from(state, received),
        });
    }
    Ok(request)
}

async fn answer(state: &ApiState, request: CompletionRequest) -> Result<Response, ApiError> {
    let CompletionRequest {
        jobs,
        writers,
        best_of,
        only_prompt,
        has_timeline,
        id,
        stream,
    } = request;
    let totals = Totals::new(jobs.len(), only_prompt);
    let outputs = Outputs::start(state, jobs).await?;
    let Some(options) = stream else {
        return whole(state, outputs, writers, best_of, totals, &id, has_timeline).await;
    };
    let (first, outputs) = outputs.first(state.options().ping_interval).await?;
    let mut stream = CompletionStream {
        state: state.clone(),
        id,
        created: unix_time_s(),
        options,
        buffer: EventBuffer::default(),
        last_pieces: writers.iter().map(|_| None).collect(),
        writers,
        n: best_of.n_generated as usize,
        totals,
        has_timeline,
    };
    Ok(sse::response(outputs.into_events(
        first,
        state.options().ping_interval,
        move |item| stream.write(item),
    )))
}

/// Counts of the prompts that have ended.
struct Totals {
    usages: Vec<Option<Usage>>,
    /// The one token that was made is not counted: only the prompt was to be scored.
    only_prompt: bool,
}

impl Totals {
    fn new(n_prompts: usize, only_prompt: bool) -> Totals {
        Totals {
            usages: vec![None; n_prompts],
            only_prompt,
        }
    }

    /// As the client sees the counts.
    fn shown(&self, usage: Usage) -> Usage {
        match self.only_prompt {
            true => Usage {
                n_completion_tokens: 0,
                ..usage
            },
            false => usage,
        }
    }

    /// Takes the counts of a prompt that ended; says whether all have.
    fn ended(&mut self, prompt: usize, usage: Usage) -> bool {
        self.usages[prompt] = Some(self.shown(usage));
        self.usages.iter().all(Option::is_some)
    }

    fn body(&self) -> UsageBody {
        total(self.usages.iter().copied().flatten()).into()
    }
}

#[derive(Serialize)]
struct CompletionBody<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [CompletionChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<TimelineBody>,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<&'a CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobsBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

impl<'a> CompletionChoice<'a> {
    fn new(index: usize, piece: &'a Piece, end: Option<&'a ChoiceEnd>) -> CompletionChoice<'a> {
        CompletionChoice {
            index,
            text: &piece.text,
            logprobs: piece.logprobs.as_ref(),
            finish_reason: end.map(|end| end.reason.as_str()),
            stop_reason: end.and_then(|end| end.stop_reason.as_ref()),
            prompt_logprobs: None,
            prompt_token_ids: piece.prompt_token_ids.as_deref(),
            token_ids: piece.token_ids.as_deref(),
        }
    }
}

const OBJECT: &str = "text_completion";

async fn whole(
    state: &ApiState,
    mut outputs: Outputs,
    mut writers: Vec<ChoiceWriter>,
    best_of: BestOf,
    mut totals: Totals,
    id: &str,
    has_timeline: bool,
) -> Result<Response, ApiError> {
    let created = unix_time_s();
    let mut pieces: Vec<Piece> = writers.iter().map(ChoiceWriter::piece).collect();
    let mut ends: Vec<Option<ChoiceEnd>> = writers.iter().map(|_| None).collect();
    let mut scores = vec![Score::default(); writers.len()];
    let n = best_of.n_generated as usize;
    let timeline = loop {
        let Item {
            prompt,
            output,
            timeline,
            ..
        } = outputs.required().await?;
        let first = prompt * n;
        match output? {
            Output::PromptLogprobs(logprobs) => prompt_logprobs(&mut writers[first..first + n], &logprobs),
            Output::Token { choice, token } => {
                let index = first + choice as usize;
                writers[index].token(&mut pieces[index], &token);
                scores[index].add(&token);
            }
            Output::ChoiceEnded { choice, end } => {
                let index = first + choice as usize;
                ends[index] = Some(writers[index].ended(&mut pieces[index], end));
            }
            Output::Finished(usage) => {
                if totals.ended(prompt, usage) {
                    break timeline;
                }
            }
        }
    };
    let shown = best_of.shown(&scores);
    let choices: Vec<CompletionChoice<'_>> = (0..)
        .zip(shown)
        .map(|(index, from)| CompletionChoice {
            prompt_logprobs: writers[from].prompt_logprobs_body(),
            ..CompletionChoice::new(index, &pieces[from], ends[from].as_ref())
        })
        .collect();
    let body = CompletionBody {
        id,
        object: OBJECT,
        created,
        model: state.model().name(),
        choices: &choices,
        usage: Some(totals.body()),
        timeline: timeline.filter(|_| has_timeline),
    };
    Ok(Json(body).into_response())
}

/// Every choice of a prompt may have to show what is known of it.
fn prompt_logprobs(writers: &mut [ChoiceWriter], logprobs: &[TokenLogprobs]) {
    for writer in writers {
        writer.prompt_logprobs(logprobs.to_vec());
    }
}

/// Writes outputs as chunks.
struct CompletionStream {
    state: ApiState,
    id: String,
    created: u64,
    options: StreamOptions,
    buffer: EventBuffer,
    writers: Vec<ChoiceWriter>,
    /// Choices of each prompt.
    n: usize,
    /// A choice's last token waits here for the reason of the end, so that there is exactly one event per token.
    last_pieces: Vec<Option<Piece>>,
    totals: Totals,
    has_timeline: bool,
}

impl CompletionStream {
    fn write(&mut self, item: Item) -> ControlFlow<Bytes, Bytes> {
        let Item {
            prompt,
            output,
            usage,
            timeline,
        } = item;
        let first = prompt * self.n;
        match output {
            Ok(Output::PromptLogprobs(logprobs)) => {
                prompt_logprobs(&mut self.writers[first..first + self.n], &logprobs);
            }
            Ok(Output::Token { choice, token }) => {
                let index = first + choice as usize;
                let mut piece = self.writers[index].piece();
                self.writers[index].token(&mut piece, &token);
                match token.is_last {
                    true => self.last_pieces[index] = Some(piece),
                    false => self.chunk(index, &piece, None, usage),
                }
            }
            Ok(Output::ChoiceEnded { choice, end }) => {
                let index = first + choice as usize;
                let writer = &mut self.writers[index];
                let mut piece = self.last_pieces[index].take().unwrap_or_else(|| writer.piece());
                let end = writer.ended(&mut piece, end);
                self.chunk(index, &piece, Some(&end), usage);
            }
            Ok(Output::Finished(usage)) => {
                if self.totals.ended(prompt, usage) {
                    self.end(timeline);
                    return ControlFlow::Break(self.buffer.take());
                }
            }
            Err(error) => {
                // Tokens that came are shown before what went wrong.
                for index in first..first + self.n {
                    if let Some(piece) = self.last_pieces[index].take() {
                        self.chunk(index, &piece, None, usage);
                    }
                }
                self.buffer.error(&error);
                self.buffer.done();
                return ControlFlow::Break(self.buffer.take());
            }
        }
        ControlFlow::Continue(self.buffer.take())
    }

    fn chunk(&mut self, index: usize, piece: &Piece, end: Option<&ChoiceEnd>, usage: Usage) {
        let so_far = self
            .options
            .continuous_usage_stats
            .then(|| self.totals.shown(usage).into());
        self.buffer.event(&CompletionBody {
            id: &self.id,
            object: OBJECT,
            created: self.created,
            model: self.state.model().name(),
            choices: &[CompletionChoice::new(index, piece, end)],
            usage: so_far,
            timeline: None,
        });
    }

    fn end(&mut self, timeline: Option<TimelineBody>) {
        let timeline = timeline.filter(|_| self.has_timeline);
        if self.options.include_usage || timeline.is_some() {
            self.buffer.event(&CompletionBody {
                id: &self.id,
                object: OBJECT,
                created: self.created,
                model: self.state.model().name(),
                choices: &[],
                usage: self.options.include_usage.then(|| self.totals.body()),
                timeline,
            });
        }
        self.buffer.done();
    }
}

/// Whether a body is understood, for tests of the fields.
#[cfg(test)]
pub(super) fn parses(state: &ApiState, body: &[u8]) -> bool {
    super::call::call_of(state, body)
        .and_then(|call| parse(state, call))
        .is_ok()
}
