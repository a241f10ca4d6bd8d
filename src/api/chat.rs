//! `POST /v1/chat/completions`: one conversation, one or several answers to it, whole or as a stream.

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
use super::call::{Call, understand, with_label};
use super::chat_prompt::ChatPrompt;
use super::encode::{SpecialTokens, encode, text_of};
use super::error::ApiError;
use super::fan_in::{Item, Outputs};
use super::fields::Fields;
use super::forced_calls;
use super::logprobs::{ChatLogprobs, PromptLogprobsBody, TokenWriter, prompt_logprobs};
use super::message::{CallPart, Message, MessageBody, MessageParser, MessagePart, MessageShape};
use super::metrics::Endpoint;
use super::model_limits::{check_prompt_ids, resolve_max_tokens};
use super::neutral::refuse_unsupported;
use super::options::{MAX_LOGPROBS, StreamOptions};
use super::output::{ChoiceEnd, FinishReason, Job, Output, OutputToken, StopReason, timeline_from};
use super::parsers::ToolCalls;
use super::sse::{self, EventBuffer};
use super::timeline_body::TimelineBody;
use super::usage::UsageBody;
use super::{ApiState, unix_time_s};
use crate::door::Usage;

/// A validated request.
struct ChatRequest {
    job: Job,
    shape: Shape,
    stream: Option<StreamOptions>,
}

/// How the answer is to be written.
struct Shape {
    id: String,
    created: u64,
    /// Number of answers.
    n: u32,
    /// Alternatives per token; `None` reports no log-probabilities.
    n_top: Option<u8>,
    /// Alternatives per prompt token in `prompt_logprobs`.
    n_prompt_top: Option<u8>,
    return_token_ids: bool,
    /// The prompt as it was rendered and cut, to be shown.
    prompt_text: Option<String>,
    tokens_as_ids: bool,
    /// Report how long its parts took.
    has_timeline: bool,
    message: MessageShape,
}

pub(super) async fn handle(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    match understand(&state, Endpoint::Chat, &headers, body, parse).await {
        Ok((label, request)) => {
            let response = answer(&state, request).await;
            with_label(&label, response.unwrap_or_else(ApiError::into_response))
        }
        Err(refused) => refused,
    }
}

fn parse(state: &ApiState, call: Call) -> Result<ChatRequest, ApiError> {
    let Call {
        mut fields,
        common,
        label,
        received,
    } = call;
    let model = state.model();
    common.refuse_streamed_prompt_logprobs()?;
    let max_completion_tokens = fields.integer("max_completion_tokens", 1..=i64::from(u32::MAX))?;
    let max_tokens = max_completion_tokens.map(|n| n as u32).or(common.max_tokens);
    if max_tokens == Some(0) {
        return Err(ApiError::expected("max_tokens", 0, "at least 1"));
    }
    let n_top = n_top(&mut fields)?;
    let prompt = ChatPrompt::take(&mut fields, state.options().client_chat_templates)?;
    let shows_reasoning = fields.boolean("include_reasoning")?.unwrap_or(true);
    let returns_prompt_text = fields.boolean("return_prompt_text")?.unwrap_or(false);
    refuse_unsupported(&fields)?;
    let special_tokens = SpecialTokens::asked(common.add_special_tokens, SpecialTokens::AsWritten);
    let prompt_text = prompt.render(model)?;
    if prompt.tools().is_some() && model.parsers.tool_calls == ToolCalls::Unknown {
        let message = "tools is set, and it is not known how this model writes calls; start with --tool-call-parser";
        return Err(ApiError::field("tools", message));
    }
    let cut = common.cut(max_tokens, None, model)?;
    let prompt_ids = encode(model, "messages", &prompt_text, special_tokens, cut)?;
    check_prompt_ids("messages", &prompt_ids, model)?;
    let read_text = match cut {
        Some(_) => text_of(model, &prompt_ids),
        None => prompt_text,
    };
    let message = MessageShape::new(&model.parsers, &read_text, prompt.tools(), shows_reasoning);
    let mut sampling = common.sampling;
    sampling.max_tokens = resolve_max_tokens(max_tokens, None, prompt_ids.len(), model)?;
    check_min_tokens("min_tokens", &sampling)?;
    if let Some(tools) = prompt.tools() {
        forced_calls::apply(state, &mut sampling, tools, message.is_in_reasoning())?;
    }
    sampling.logprobs = n_top;
    sampling.prompt_logprobs = common.prompt_logprobs;
    let shape = Shape {
        id: format!("chatcmpl-{}", label.as_str()),
        created: unix_time_s(),
        n: sampling.n,
        n_top,
        n_prompt_top: common.prompt_logprobs,
        return_token_ids: common.return_token_ids,
        prompt_text: returns_prompt_text.then_some(read_text),
        tokens_as_ids: common.tokens_as_ids,
        has_timeline: common.timeline,
        message,
    };
    let mut text = common.text;
    text.shown_special_tokens = shape.message.shown_special_tokens(&model.parsers);
    let job = Job {
        endpoint: Endpoint::Chat,
        label,
        prompt_ids: prompt_ids.into(),
        sampling,
        text,
        cache_salt: common.cache_salt,
        priority: common.priority,
        deadline: None,
        objectives: common.objectives,
        timeline: timeline_from(state, received),
    };
    Ok(ChatRequest {
        job,
        shape,
        stream: common.stream,
    })
}

/// `logprobs` switches reports on, `top_logprobs` says how many alternatives they have.
fn n_top(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let n_top = fields
        .integer("top_logprobs", 0..=i64::from(MAX_LOGPROBS))?
        .map(|n| n as u8);
    match (logprobs, n_top) {
        (true, n_top) => Ok(Some(n_top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(n)) => Err(ApiError::expected("top_logprobs", n, "0, or logprobs to be true")),
    }
}

async fn answer(state: &ApiState, request: ChatRequest) -> Result<Response, ApiError> {
    let ChatRequest { job, shape, stream } = request;
    let prompt_ids = job.prompt_ids.clone();
    let outputs = Outputs::start(state, vec![job]).await?;
    let Some(options) = stream else {
        return whole(state, outputs, &prompt_ids, &shape).await;
    };
    let (first, outputs) = outputs.first(state.options().ping_interval).await?;
    let mut stream = ChatStream {
        prompt_ids: shape.return_token_ids.then(|| prompt_ids.to_vec()),
        state: state.clone(),
        has_begun: vec![false; shape.n as usize],
        parsers: (0..shape.n).map(|_| shape.message.parser()).collect(),
        shape,
        options,
        buffer: EventBuffer::default(),
    };
    Ok(sse::response(outputs.into_events(
        first,
        state.options().ping_interval,
        move |item| stream.write(item),
    )))
}

#[derive(Serialize)]
struct ChatBody<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChatChoice<'a>],
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobsBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<TimelineBody>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: MessageBody<'a>,
    logprobs: Option<&'a ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

/// One answer as it grows.
struct Answer {
    parser: MessageParser,
    message: Message,
    token_ids: Option<Vec<TokenId>>,
    logprobs: Option<ChatLogprobs>,
    end: Option<ChoiceEnd>,
}

impl Answer {
    fn new(shape: &Shape) -> Answer {
        Answer {
            parser: shape.message.parser(),
            message: Message::default(),
            token_ids: shape.return_token_ids.then(Vec::new),
            logprobs: shape.n_top.map(|_| ChatLogprobs::default()),
            end: None,
        }
    }

    fn token(&mut self, output: OutputToken, writer: TokenWriter<'_>, shape: &Shape) {
        let token = output.token;
        self.message.add(self.parser.push(output.text));
        if let Some(ids) = &mut self.token_ids {
            ids.push(token.id);
        }
        push_logprobs(&mut self.logprobs, writer, token.id, token.logprobs.as_ref(), shape);
    }

    fn body(&self, index: u32) -> ChatChoice<'_> {
        ChatChoice {
            index,
            message: self.message.body(),
            logprobs: self.logprobs.as_ref(),
            finish_reason: self.end.as_ref().map(|end| finish_reason(end, &self.parser)),
            stop_reason: self.end.as_ref().and_then(|end| end.stop_reason.as_ref()),
            token_ids: self.token_ids.as_deref(),
        }
    }
}

/// An answer that called tools and then stopped says so; one that was cut says that.
fn finish_reason(end: &ChoiceEnd, parser: &MessageParser) -> &'static str {
    match end.reason {
        FinishReason::Stop if parser.n_calls() > 0 => "tool_calls",
        reason => reason.as_str(),
    }
}

async fn whole(
    state: &ApiState,
    mut outputs: Outputs,
    prompt_ids: &[TokenId],
    shape: &Shape,
) -> Result<Response, ApiError> {
    let writer = TokenWriter::new(state, shape.tokens_as_ids);
    let mut answers: Vec<Answer> = (0..shape.n).map(|_| Answer::new(shape)).collect();
    let mut prompt: Vec<TokenLogprobs> = Vec::new();
    let (usage, timeline): (Usage, Option<TimelineBody>) = loop {
        let item = outputs.required().await?;
        match item.output? {
            Output::PromptLogprobs(logprobs) => prompt = logprobs,
            Output::Token { choice, token } => answers[choice as usize].token(token, writer, shape),
            Output::ChoiceEnded { choice, mut end } => {
                let answer = &mut answers[choice as usize];
                answer.message.add(answer.parser.finish(std::mem::take(&mut end.text)));
                answer.end = Some(end);
            }
            Output::Finished(usage) => break (usage, item.timeline),
        }
    };
    let choices: Vec<ChatChoice<'_>> = (0..).zip(&answers).map(|(index, answer)| answer.body(index)).collect();
    let body = ChatBody {
        id: &shape.id,
        object: "chat.completion",
        created: shape.created,
        model: state.model().name(),
        choices: &choices,
        usage: usage.into(),
        prompt_logprobs: shape
            .n_prompt_top
            .map(|n_top| prompt_logprobs(writer, prompt_ids, &prompt, n_top)),
        prompt_token_ids: shape.return_token_ids.then_some(prompt_ids),
        prompt_text: shape.prompt_text.as_deref(),
        timeline: timeline.filter(|_| shape.has_timeline),
    };
    Ok(Json(body).into_response())
}

fn push_logprobs(
    to: &mut Option<ChatLogprobs>,
    writer: TokenWriter<'_>,
    id: TokenId,
    logprobs: Option<&TokenLogprobs>,
    shape: &Shape,
) {
    if let (Some(to), Some(logprobs)) = (to, logprobs) {
        to.push(writer, id, logprobs, shape.n_top.unwrap_or(0));
    }
}

#[derive(Serialize)]
struct ChunkBody<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<TimelineBody>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<[TokenId; 1]>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [CallPart],
}

impl<'a> Delta<'a> {
    /// `says_content` also where it is empty.
    fn new(role: Option<&'static str>, part: &'a MessagePart, says_content: bool) -> Delta<'a> {
        let reasoning = (!part.reasoning.is_empty()).then_some(part.reasoning.as_str());
        Delta {
            role,
            content: (says_content || !part.content.is_empty()).then_some(part.content.as_str()),
            reasoning_content: reasoning,
            reasoning,
            tool_calls: &part.calls,
        }
    }
}

/// Writes outputs as chunks.
struct ChatStream {
    state: ApiState,
    shape: Shape,
    options: StreamOptions,
    buffer: EventBuffer,
    /// Sent with the first chunk, when asked for; as is the prompt's text, in `shape`.
    prompt_ids: Option<Vec<TokenId>>,
    /// Of each choice: its first chunk, which names the role, has gone.
    has_begun: Vec<bool>,
    /// Of each choice.
    parsers: Vec<MessageParser>,
}

impl ChatStream {
    fn write(&mut self, item: Item) -> ControlFlow<Bytes, Bytes> {
        match item.output {
            // Asked for only without a stream.
            Ok(Output::PromptLogprobs(_)) => {}
            Ok(Output::Token { choice, token }) => self.token(choice, token, item.usage.into()),
            Ok(Output::ChoiceEnded { choice, end }) => self.choice_ended(choice, end, item.usage.into()),
            Ok(Output::Finished(usage)) => {
                let timeline = item.timeline.filter(|_| self.shape.has_timeline);
                if self.options.include_usage || timeline.is_some() {
                    let usage = self.options.include_usage.then(|| usage.into());
                    self.chunk(&[], usage, timeline);
                }
                self.buffer.done();
                return ControlFlow::Break(self.buffer.take());
            }
            Err(error) => {
                self.buffer.error(&error);
                self.buffer.done();
                return ControlFlow::Break(self.buffer.take());
            }
        }
        ControlFlow::Continue(self.buffer.take())
    }

    /// The role, for the first chunk of a choice.
    fn role(&mut self, choice: u32) -> Option<&'static str> {
        let has_begun = std::mem::replace(&mut self.has_begun[choice as usize], true);
        (!has_begun).then_some("assistant")
    }

    fn token(&mut self, choice: u32, OutputToken { token, text, .. }: OutputToken, so_far: UsageBody) {
        let role = self.role(choice);
        let writer = TokenWriter::new(&self.state, self.shape.tokens_as_ids);
        let mut logprobs = self.shape.n_top.map(|_| ChatLogprobs::default());
        push_logprobs(&mut logprobs, writer, token.id, token.logprobs.as_ref(), &self.shape);
        let part = self.parsers[choice as usize].push(text);
        let choice = ChunkChoice {
            index: choice,
            delta: Delta::new(role, &part, role.is_some() || !self.shape.message.is_parsed()),
            logprobs,
            finish_reason: None,
            stop_reason: None,
            token_ids: self.shape.return_token_ids.then_some([token.id]),
        };
        let so_far = self.options.continuous_usage_stats.then_some(so_far);
        self.chunk(&[choice], so_far, None);
    }

    /// The reason of the end goes alone, with an empty delta unless text was still held back.
    fn choice_ended(&mut self, choice: u32, mut end: ChoiceEnd, so_far: UsageBody) {
        let role = self.role(choice);
        let parser = &mut self.parsers[choice as usize];
        let part = parser.finish(std::mem::take(&mut end.text));
        let choice = ChunkChoice {
            index: choice,
            delta: Delta::new(role, &part, role.is_some()),
            logprobs: None,
            finish_reason: Some(finish_reason(&end, parser)),
            stop_reason: end.stop_reason,
            token_ids: None,
        };
        let so_far = self.options.continuous_usage_stats.then_some(so_far);
        self.chunk(&[choice], so_far, None);
    }

    fn chunk(&mut self, choices: &[ChunkChoice<'_>], usage: Option<UsageBody>, timeline: Option<TimelineBody>) {
        let (prompt_token_ids, prompt_text) = (self.prompt_ids.take(), self.shape.prompt_text.take());
        self.buffer.event(&ChunkBody {
            id: &self.shape.id,
            object: "chat.completion.chunk",
            created: self.shape.created,
            model: self.state.model().name(),
            choices,
            usage,
            prompt_token_ids,
            prompt_text,
            timeline,
        });
    }
}

/// Whether a body is understood, for tests of the fields.
#[cfg(test)]
pub(super) fn parses(state: &ApiState, body: &[u8]) -> bool {
    super::call::call_of(state, body)
        .and_then(|call| parse(state, call))
        .is_ok()
}
