//! `baton.v1` over gRPC: the same requests as the OpenAI endpoints, typed. The other gRPC services of the port, health and
//! reflection among them, are added here too.

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use baton_proto::api::baton_server::{Baton, BatonServer};
use baton_proto::api::{self as wire, generate_request};
use baton_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer as InferenceServer;
use baton_proto::vllm::grpc::engine::vllm_engine_server::VllmEngineServer;
use baton_scheduler::request::{Constraint, SamplingParams, TokenLogprobs};
use futures::Stream;
use http::HeaderMap;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_server::HealthServer;
use tower::{Service, ServiceExt as _};

use super::ApiState;
use super::adjustments::{MIN_P_RANGE, allowed_token_ids, bad_words, check_min_tokens, is_min_p, logit_bias};
use super::call::beside_runtime;
use super::constraints::{choice, constrain, json_schema};
use super::embed::{EmbedOptions, embed, embed_job, normalized};
use super::encode::{SpecialTokens, encode};
use super::error::{ApiError, ErrorKind};
use super::health::HealthService;
use super::kserve::InferenceService;
use super::metrics::Endpoint;
use super::model_limits::{check_prompt_ids, resolve_max_tokens};
use super::objectives;
use super::options::{
    DEFAULT_MAX_TOKENS, MAX_CHOICES, MAX_LOGPROBS, MAX_PENALTY, check_stop_strings, fresh_seed, parse_grpc_timeout,
    stop_token_ids,
};
use super::output::{ChoiceEnd, FinishReason, Job, Output, OutputStream, OutputToken, TextOptions, timeline_from};
use super::request_label::RequestLabel;
use super::served_model::ServedModel;
use super::vllm_engine::EngineService;
use crate::door::Usage;

/// Adds the gRPC services to the routes of the port.
pub(super) fn add_services(router: Router, state: &ApiState) -> Router {
    let limit = state.options().max_body_bytes;
    let router = add(
        router,
        BatonServer::new(BatonService::new(state.clone())).max_decoding_message_size(limit),
    );
    let inference = InferenceServer::new(InferenceService::new(state.clone()));
    let router = add(router, inference.max_decoding_message_size(limit));
    let engine = VllmEngineServer::new(EngineService::new(state.clone()));
    let router = add(router, engine.max_decoding_message_size(limit));
    let router = add(router, HealthServer::new(HealthService::new(state.clone())));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(baton_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // Between instances only, and on other ports.
            .with_service_name(<BatonServer<BatonService> as NamedService>::NAME)
            .with_service_name(<InferenceServer<InferenceService> as NamedService>::NAME)
            .with_service_name(<VllmEngineServer<EngineService> as NamedService>::NAME)
            .with_service_name(<HealthServer<HealthService> as NamedService>::NAME)
    };
    let valid = "the descriptors are built with this program";
    let router = add(router, reflection().build_v1().expect(valid));
    add(router, reflection().build_v1alpha().expect(valid))
}

/// Adds a gRPC service to the routes of a port.
pub(crate) fn add<S>(router: Router, service: S) -> Router
where
    S: Service<http::Request<Body>, Error = std::convert::Infallible> + NamedService + Clone + Send + Sync + 'static,
    S::Response: axum::response::IntoResponse,
    S::Future: Send + 'static,
{
    let path = format!("/{}/{{*method}}", S::NAME);
    router.route_service(
        &path,
        service.map_request(|request: http::Request<axum::body::Body>| request.map(Body::new)),
    )
}

/// The service.
#[derive(Clone, Debug)]
struct BatonService {
    state: ApiState,
}

impl BatonService {
    fn new(state: ApiState) -> BatonService {
        BatonService { state }
    }

    async fn job(&self, headers: &HeaderMap, request: wire::GenerateRequest) -> Result<Job, ApiError> {
        let received = self.state.generator().now();
        let deadline = deadline(headers)?;
        let objectives = objectives::from_headers(headers)?;
        let label = label(headers, &request.request_id)?;
        let is_constrained = request
            .sampling
            .as_ref()
            .is_some_and(|sampling| sampling.constraint.is_some());
        let n_bytes = match &request.prompt {
            _ if is_constrained => usize::MAX,
            Some(generate_request::Prompt::Text(text)) => text.len(),
            Some(generate_request::Prompt::TokenIds(_)) | None => 0,
        };
        let state = self.state.clone();
        let job = move || {
            let model = state.model();
            if !request.model.is_empty() && !model.answers_to(&request.model) {
                return Err(ApiError::unknown_model(&request.model));
            }
            let prompt_ids = match request.prompt {
                Some(generate_request::Prompt::Text(text)) => encode(model, "text", &text, SpecialTokens::Added, None)?,
                Some(generate_request::Prompt::TokenIds(ids)) => ids.ids,
                None => return Err(ApiError::expected("prompt", "missing", "text or token_ids")),
            };
            check_prompt_ids("prompt", &prompt_ids, model)?;
            let mut wire = request.sampling.unwrap_or_default();
            let stop = wire.stop.clone();
            check_stop_strings(&stop, model)?;
            let constraint = wire.constraint.take();
            let mut sampling = sampling(wire, prompt_ids.len(), model)?;
            if let Some(constraint) = constraint {
                let constraint = constraint_from_wire(constraint)?;
                constrain(&state, &mut sampling, "sampling.constraint", constraint)?;
            }
            Ok(Job {
                endpoint: Endpoint::Generate,
                label,
                sampling,
                prompt_ids: prompt_ids.into(),
                text: TextOptions {
                    stop,
                    ..TextOptions::default()
                },
                cache_salt: 0,
                priority: 0,
                deadline,
                objectives,
                timeline: timeline_from(&state, received),
            })
        };
        beside_runtime(&self.state, n_bytes, job).await?
    }

    async fn embed_job(&self, headers: &HeaderMap, request: wire::EmbedRequest) -> Result<Job, ApiError> {
        use wire::embed_request::Prompt;
        let received = self.state.generator().now();
        let deadline = deadline(headers)?;
        let label = label(headers, &request.request_id)?;
        let n_bytes = match &request.prompt {
            Some(Prompt::Text(text)) => text.len(),
            Some(Prompt::TokenIds(_)) | None => 0,
        };
        let state = self.state.clone();
        let job = move || {
            let model = state.model();
            if !request.model.is_empty() && !model.answers_to(&request.model) {
                return Err(ApiError::unknown_model(&request.model));
            }
            let prompt_ids = match request.prompt {
                Some(Prompt::Text(text)) => encode(model, "text", &text, SpecialTokens::Added, None)?,
                Some(Prompt::TokenIds(ids)) => ids.ids,
                None => return Err(ApiError::expected("prompt", "missing", "text or token_ids")),
            };
            check_prompt_ids("prompt", &prompt_ids, model)?;
            let options = EmbedOptions {
                endpoint: Endpoint::Embed,
                label,
                cache_salt: 0,
                priority: 0,
                deadline,
                received,
            };
            embed_job(&state, options, prompt_ids.into())
        };
        beside_runtime(&self.state, n_bytes, job).await?
    }
}

/// The name in the message, else in the header, else a fresh one.
pub(super) fn label(headers: &HeaderMap, request_id: &str) -> Result<RequestLabel, ApiError> {
    match request_id {
        "" => Ok(RequestLabel::from_headers(headers)?.unwrap_or_else(RequestLabel::fresh)),
        text => RequestLabel::parse("request_id", text),
    }
}

/// When the client gives up, by its `grpc-timeout`.
pub(super) fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, ApiError> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse_grpc_timeout);
    let timeout =
        timeout.ok_or_else(|| ApiError::expected("grpc-timeout", format!("{value:?}"), "1 to 8 digits and a unit"))?;
    // A time too far away to be represented is none.
    Ok(Instant::now().checked_add(timeout))
}

fn sampling(wire: wire::SamplingParams, n_prompt: usize, model: &ServedModel) -> Result<SamplingParams, ApiError> {
    if wire.max_tokens == Some(0) {
        return Err(ApiError::expected("sampling.max_tokens", 0, "at least 1"));
    }
    let temperature = wire.temperature.unwrap_or(1.0);
    if !(temperature.is_finite() && temperature >= 0.0) {
        return Err(ApiError::expected(
            "sampling.temperature",
            temperature,
            "a finite number, at least 0",
        ));
    }
    let top_p = wire.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(ApiError::expected(
            "sampling.top_p",
            top_p,
            "a number above 0, at most 1",
        ));
    }
    let n = wire.n.unwrap_or(1);
    if !(1..=MAX_CHOICES).contains(&n) {
        return Err(ApiError::expected("sampling.n", n, format!("1 to {MAX_CHOICES}")));
    }
    let penalty = |field: &'static str, penalty: Option<f32>| match penalty.unwrap_or(0.0) {
        penalty if penalty.abs() <= MAX_PENALTY => Ok(penalty),
        penalty => Err(ApiError::expected(
            field,
            penalty,
            format!("-{MAX_PENALTY} to {MAX_PENALTY}"),
        )),
    };
    let repetition_penalty = wire.repetition_penalty.unwrap_or(1.0);
    if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
        return Err(ApiError::expected(
            "sampling.repetition_penalty",
            repetition_penalty,
            "a finite number above 0",
        ));
    }
    let n_top = |field: &'static str, n: Option<u32>| match n {
        None => Ok(None),
        Some(n) if n <= u32::from(MAX_LOGPROBS) => Ok(Some(n as u8)),
        Some(n) => Err(ApiError::expected(field, n, format!("0 to {MAX_LOGPROBS}"))),
    };
    let min_p = wire.min_p.unwrap_or(0.0);
    if !is_min_p(min_p) {
        return Err(ApiError::expected("sampling.min_p", min_p, MIN_P_RANGE));
    }
    let biases = wire.logit_bias.into_iter().collect();
    let sampling = SamplingParams {
        max_tokens: resolve_max_tokens(wire.max_tokens, Some(DEFAULT_MAX_TOKENS), n_prompt, model)?,
        min_tokens: wire.min_tokens.unwrap_or(0),
        min_p,
        logit_bias: logit_bias("sampling.logit_bias", biases, model)?,
        allowed_token_ids: allowed_token_ids("sampling.allowed_token_ids", wire.allowed_token_ids, model)?,
        bad_words: bad_words("sampling.bad_words", &wire.bad_words, model)?,
        constraint: None,
        temperature,
        top_k: wire.top_k.unwrap_or(0),
        top_p,
        seed: wire.seed.unwrap_or_else(fresh_seed),
        stop_token_ids: stop_token_ids(wire.stop_token_ids, model, wire.ignore_eos)?,
        logprobs: n_top("sampling.logprobs", wire.logprobs)?,
        prompt_logprobs: n_top("sampling.prompt_logprobs", wire.prompt_logprobs)?,
        n,
        presence_penalty: penalty("sampling.presence_penalty", wire.presence_penalty)?,
        frequency_penalty: penalty("sampling.frequency_penalty", wire.frequency_penalty)?,
        repetition_penalty,
    };
    check_min_tokens("sampling.min_tokens", &sampling)?;
    Ok(sampling)
}

fn constraint_from_wire(wire: wire::Constraint) -> Result<Constraint, ApiError> {
    use wire::constraint::Language;
    let not_json = |error| {
        ApiError::field(
            "sampling.constraint.json_schema",
            format!("sampling.constraint.json_schema is not valid JSON: {error}"),
        )
    };
    match wire.language {
        Some(Language::JsonSchema(text)) => {
            let schema = serde_json::from_str(&text).map_err(not_json)?;
            json_schema("sampling.constraint.json_schema", schema)
        }
        Some(Language::Regex(regex)) => Ok(Constraint::Regex(regex.into())),
        Some(Language::Choices(choices)) => choice("sampling.constraint.choices", &choices.texts),
        Some(Language::Grammar(grammar)) => Ok(Constraint::Grammar(grammar.into())),
        None => Err(ApiError::expected(
            "sampling.constraint",
            "empty",
            "json_schema, regex, choices or grammar",
        )),
    }
}

/// Outputs of one request as the messages of its stream.
struct Messages {
    output: OutputStream,
    request_id: Arc<str>,
    n_open: u32,
    /// The end of the last choice waits here for the counts, so that one message has both.
    last: Option<(u32, ChoiceEnd)>,
}

impl Messages {
    async fn next(&mut self) -> Option<Result<wire::GenerateResponse, Status>> {
        loop {
            match self.output.next().await? {
                Err(error) => return Some(Err(error.to_status())),
                Ok(output) => {
                    if let Some(message) = self.message(output) {
                        return Some(Ok(message));
                    }
                }
            }
        }
    }

    fn message(&mut self, output: Output) -> Option<wire::GenerateResponse> {
        let mut message = wire::GenerateResponse {
            request_id: self.request_id.to_string(),
            ..Default::default()
        };
        match output {
            Output::PromptLogprobs(logprobs) => {
                let first = std::iter::once(wire::Logprobs::default());
                let tokens = first.chain(logprobs.into_iter().map(logprobs_to_wire)).collect();
                message.prompt_logprobs = Some(wire::PromptLogprobs { tokens });
            }
            Output::Token {
                choice,
                token: OutputToken { token, text, .. },
            } => {
                message.tokens = vec![wire::GeneratedToken {
                    index: token.index,
                    id: token.id,
                    logprobs: token.logprobs.map(logprobs_to_wire),
                    choice,
                }];
                message.text = text;
                message.choice = choice;
            }
            Output::ChoiceEnded { choice, end } => {
                self.n_open -= 1;
                if self.n_open == 0 {
                    self.last = Some((choice, end));
                    return None;
                }
                set_choice_end(&mut message, choice, end);
            }
            Output::Finished(usage) => {
                if let Some((choice, end)) = self.last.take() {
                    set_choice_end(&mut message, choice, end);
                }
                message.finish = message.choice_finish;
                message.usage = Some(usage_to_wire(usage));
            }
        }
        Some(message)
    }
}

fn set_choice_end(message: &mut wire::GenerateResponse, choice: u32, end: ChoiceEnd) {
    let reason = match end.reason {
        FinishReason::Stop => wire::FinishReason::Stop,
        FinishReason::Length => wire::FinishReason::Length,
        FinishReason::Abort => wire::FinishReason::Abort,
    };
    message.choice = choice;
    message.text = end.text;
    message.choice_finish = reason.into();
}

fn logprobs_to_wire(logprobs: TokenLogprobs) -> wire::Logprobs {
    let top = logprobs
        .top
        .into_iter()
        .map(|(id, logprob)| wire::TokenLogprob { id, logprob })
        .collect();
    wire::Logprobs {
        logprob: logprobs.logprob,
        rank: logprobs.rank,
        top,
    }
}

fn usage_to_wire(usage: Usage) -> wire::Usage {
    wire::Usage {
        prompt_tokens: usage.n_prompt_tokens,
        completion_tokens: usage.n_completion_tokens,
        cached_tokens: usage.n_cached_tokens,
    }
}

#[tonic::async_trait]
impl Baton for BatonService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<wire::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let job = self.job(metadata.as_ref(), request).await.map_err(|error| {
            self.state.metrics().refused(Endpoint::Generate, &error);
            error.to_status()
        })?;
        let (label, n) = (job.label.clone(), job.sampling.n);
        let output = OutputStream::start(&self.state, job)
            .await
            .map_err(|error| error.to_status())?;
        let messages = Messages {
            output,
            request_id: label.shared(),
            n_open: n,
            last: None,
        };
        let messages = futures::stream::unfold(messages, |mut messages| async move {
            let next = messages.next().await?;
            Some((next, messages))
        });
        let mut response = Response::new(Box::pin(messages) as Self::GenerateStream);
        let value = label
            .as_str()
            .parse()
            .map_err(|_| Status::internal("request id is not ASCII"))?;
        response.metadata_mut().insert("x-request-id", value);
        Ok(response)
    }

    async fn embed(&self, request: Request<wire::EmbedRequest>) -> Result<Response<wire::EmbedResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let normalize = request.normalize.unwrap_or(true);
        let job = self.embed_job(metadata.as_ref(), request).await.map_err(|error| {
            self.state.metrics().refused(Endpoint::Embed, &error);
            error.to_status()
        })?;
        let (label, n_tokens) = (job.label.clone(), job.prompt_ids.len());
        let embedding = embed(&self.state, job).await.map_err(|error| error.to_status())?;
        Ok(Response::new(wire::EmbedResponse {
            request_id: label.as_str().to_owned(),
            embedding: if normalize { normalized(embedding) } else { embedding },
            usage: Some(wire::Usage {
                prompt_tokens: n_tokens as u32,
                ..wire::Usage::default()
            }),
        }))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<wire::AbortResponse>, Status> {
        let ids = request.into_inner().request_ids;
        let n_aborted = ids.iter().filter(|id| self.state.running().abort(id)).count();
        Ok(Response::new(wire::AbortResponse {
            n_aborted: n_aborted as u32,
        }))
    }

    async fn model_info(
        &self,
        _request: Request<wire::ModelInfoRequest>,
    ) -> Result<Response<wire::ModelInfoResponse>, Status> {
        let model = self.state.model();
        Ok(Response::new(wire::ModelInfoResponse {
            model: model.name().to_owned(),
            max_model_len: model.max_model_len,
            vocab_size: model.vocab_size,
            dtype: model.dtype.clone(),
            eos_token_ids: model.eos_token_ids.clone(),
            has_tokenizer: model.tokenizer.is_some(),
            has_chat_template: model.chat_template.is_some(),
        }))
    }

    async fn load(&self, _request: Request<wire::LoadRequest>) -> Result<Response<wire::LoadResponse>, Status> {
        let load = self.state.generator().load();
        let instances = load.instances.into_iter().map(|instance| wire::InstanceLoad {
            instance_id: instance.id.to_string(),
            role: instance.role.to_string(),
            n_running: instance.n_running,
            n_waiting: instance.n_waiting,
            n_blocks_total: instance.n_blocks_total,
            n_blocks_free: instance.n_blocks_free,
            ready: instance.ready,
        });
        let n_queued = u32::try_from(load.n_queued)
            .map_err(|_| ApiError::new(ErrorKind::Internal, "the queue is longer than its bound").to_status())?;
        Ok(Response::new(wire::LoadResponse {
            n_queued,
            instances: instances.collect(),
        }))
    }
}
