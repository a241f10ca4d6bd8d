//! `POST /v1/completions`: one or several prompts, each continued, whole or as a stream.

use std::ops::ControlFlow;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use baton_scheduler::ids::TokenId;
use http::HeaderMap;
use serde::Serialize;

use super::call::{Call, understand, with_label};
use super::completion_choice::{ChoiceWriter, Piece, Reports};
use super::completion_prompt::CompletionPrompt;
use super::encode::SpecialTokens;
use super::error::ApiError;
use super::fan_in::{Item, Outputs};
use super::logprobs::{CompletionLogprobs, PromptLogprobsBody};
use super::metrics::Endpoint;
use super::neutral::refuse_unsupported;
use super::options::{CommonOptions, DEFAULT_MAX_TOKENS, MAX_LOGPROBS, StreamOptions, resolve_max_tokens};
use super::output::{Finished, Job, Output, StopReason, timeline_from};
use super::sse::{self, EventBuffer};
use super::usage::{UsageBody, total};
use super::{ApiState, unix_time_s};
use crate::door::Usage;

/// A validated request: a job and a writer for each prompt.
struct CompletionRequest {
    jobs: Vec<Job>,
    writers: Vec<ChoiceWriter>,
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
    let prompts = CompletionPrompt::take(&mut fields, state.options().max_prompts)?;
    refuse_unsupported(&fields)?;
    // Scoring a prompt is `echo` without new tokens. The engine makes one at least, which is not shown.
    let only_prompt = echo && common.max_tokens == Some(0);
    if common.max_tokens == Some(0) && !only_prompt {
        return Err(ApiError::expected("max_tokens", 0, "at least 1, or echo to be true"));
    }
    let CommonOptions {
        mut sampling,
        text,
        cache_salt,
        stream,
        ..
    } = common;
    let reports = Reports {
        n_top,
        n_prompt_top: common.prompt_logprobs,
        token_ids: common.return_token_ids,
        tokens_as_ids: common.tokens_as_ids,
        only_prompt,
    };
    sampling.logprobs = n_top;
    sampling.prompt_logprobs = common.prompt_logprobs.max(n_top.filter(|_| echo));
    let special_tokens = SpecialTokens::asked(common.add_special_tokens, SpecialTokens::Added);
    let mut request = CompletionRequest {
        jobs: Vec::with_capacity(prompts.len()),
        writers: Vec::with_capacity(prompts.len()),
        id: format!("cmpl-{}", label.as_str()),
        stream,
    };
    for prompt in prompts {
        let prompt_ids: std::sync::Arc<[TokenId]> = prompt.ids(model, special_tokens)?.into();
        let asked = common.max_tokens.map(|n| n.max(1));
        sampling.max_tokens = resolve_max_tokens(asked, Some(DEFAULT_MAX_TOKENS), prompt_ids.len(), model)?;
        let echoed = echo.then(|| prompt.text(model));
        request
            .writers
            .push(ChoiceWriter::new(state, prompt_ids.clone(), echoed, reports));
        request.jobs.push(Job {
            endpoint: Endpoint::Completions,
            label: label.clone(),
            prompt_ids,
            sampling: sampling.clone(),
            text: text.clone(),
            cache_salt,
            deadline: None,
            timeline: timeline_from(state, received),
        });
    }
    Ok(request)
}

async fn answer(state: &ApiState, request: CompletionRequest) -> Result<Response, ApiError> {
    let CompletionRequest {
        jobs,
        writers,
        id,
        stream,
    } = request;
    let outputs = Outputs::start(state, jobs).await?;
    let Some(options) = stream else {
        return whole(state, outputs, writers, &id).await;
    };
    let (first, outputs) = outputs.first(state.options().ping_interval).await?;
    let mut stream = CompletionStream {
        state: state.clone(),
        id,
        created: unix_time_s(),
        options,
        buffer: EventBuffer::default(),
        last_pieces: writers.iter().map(|_| None).collect(),
        usages: vec![None; writers.len()],
        writers,
    };
    Ok(sse::response(outputs.into_events(
        first,
        state.options().ping_interval,
        move |item| stream.write(item),
    )))
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
    fn new(index: usize, piece: &'a Piece, finished: Option<&'a Finished>) -> CompletionChoice<'a> {
        CompletionChoice {
            index,
            text: &piece.text,
            logprobs: piece.logprobs.as_ref(),
            finish_reason: finished.map(|finished| finished.reason.as_str()),
            stop_reason: finished.and_then(|finished| finished.stop_reason.as_ref()),
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
    id: &str,
) -> Result<Response, ApiError> {
    let created = unix_time_s();
    let mut pieces: Vec<Piece> = writers.iter().map(ChoiceWriter::piece).collect();
    let mut ends: Vec<Option<Finished>> = writers.iter().map(|_| None).collect();
    while ends.iter().any(Option::is_none) {
        let Item { choice, output, .. } = outputs.required().await?;
        let (writer, piece) = (&mut writers[choice], &mut pieces[choice]);
        match output? {
            Output::PromptLogprobs(logprobs) => writer.prompt_logprobs(logprobs),
            Output::Token(token) => writer.token(piece, &token),
            Output::Finished(finished) => ends[choice] = Some(writer.finished(piece, finished)),
        }
    }
    let ends: Vec<Finished> = ends.into_iter().flatten().collect();
    let choices = writers.iter().zip(&pieces).zip(&ends).enumerate();
    let choices: Vec<CompletionChoice<'_>> = choices
        .map(|(index, ((writer, piece), finished))| CompletionChoice {
            prompt_logprobs: writer.prompt_logprobs_body(),
            ..CompletionChoice::new(index, piece, Some(finished))
        })
        .collect();
    let body = CompletionBody {
        id,
        object: OBJECT,
        created,
        model: state.model().name(),
        choices: &choices,
        usage: Some(total(ends.iter().map(|finished| finished.usage)).into()),
    };
    Ok(Json(body).into_response())
}

/// Writes outputs as chunks.
struct CompletionStream {
    state: ApiState,
    id: String,
    created: u64,
    options: StreamOptions,
    buffer: EventBuffer,
    writers: Vec<ChoiceWriter>,
    /// A choice's last token waits here for the reason of the end, so that there is exactly one event per token.
    last_pieces: Vec<Option<Piece>>,
    /// Of choices that have ended.
    usages: Vec<Option<Usage>>,
}

impl CompletionStream {
    fn write(&mut self, item: Item) -> ControlFlow<Bytes, Bytes> {
        let Item { choice, output, usage } = item;
        match output {
            Ok(Output::PromptLogprobs(logprobs)) => self.writers[choice].prompt_logprobs(logprobs),
            Ok(Output::Token(token)) => {
                let writer = &mut self.writers[choice];
                let mut piece = self.last_pieces[choice].take().unwrap_or_else(|| writer.piece());
                writer.token(&mut piece, &token);
                match token.is_last {
                    true => self.last_pieces[choice] = Some(piece),
                    false => self.chunk(choice, &piece, None, usage),
                }
            }
            Ok(Output::Finished(finished)) => {
                let writer = &mut self.writers[choice];
                let mut piece = self.last_pieces[choice].take().unwrap_or_else(|| writer.piece());
                let finished = writer.finished(&mut piece, finished);
                self.usages[choice] = Some(finished.usage);
                self.chunk(choice, &piece, Some(&finished), finished.usage);
                if self.usages.iter().all(Option::is_some) {
                    self.end();
                    return ControlFlow::Break(self.buffer.take());
                }
            }
            Err(error) => {
                // Tokens that came are shown before what went wrong.
                if let Some(piece) = self.last_pieces[choice].take() {
                    self.chunk(choice, &piece, None, usage);
                }
                self.buffer.error(&error);
                self.buffer.done();
                return ControlFlow::Break(self.buffer.take());
            }
        }
        ControlFlow::Continue(self.buffer.take())
    }

    fn chunk(&mut self, choice: usize, piece: &Piece, finished: Option<&Finished>, usage: Usage) {
        self.buffer.event(&CompletionBody {
            id: &self.id,
            object: OBJECT,
            created: self.created,
            model: self.state.model().name(),
            choices: &[CompletionChoice::new(choice, piece, finished)],
            usage: self.options.continuous_usage_stats.then_some(usage.into()),
        });
    }

    fn end(&mut self) {
        if self.options.include_usage {
            self.buffer.event(&CompletionBody {
                id: &self.id,
                object: OBJECT,
                created: self.created,
                model: self.state.model().name(),
                choices: &[],
                usage: Some(total(self.usages.iter().copied().flatten()).into()),
            });
        }
        self.buffer.done();
    }
}
