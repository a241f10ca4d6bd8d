//! `vllm.grpc.engine.VllmEngine`.

use std::pin::Pin;

use baton_proto::smg::grpc::common;
use baton_proto::vllm::grpc::engine as wire;
use baton_proto::vllm::grpc::engine::vllm_engine_server::VllmEngine;
use futures::{Stream, StreamExt as _};
use http::HeaderMap;
use tonic::{Request, Response, Status};

use super::super::ApiState;
use super::super::call::beside_runtime;
use super::super::embed::{EmbedOptions, embed, embed_job, normalized};
use super::super::error::{ApiError, ErrorKind};
use super::super::grpc::{deadline, label};
use super::super::metrics::Endpoint;
use super::super::model_limits::check_prompt_ids;
use super::super::output::{Job, OutputStream};
use super::super::plain_request::PlainJob;
use super::answer::Responses;
use super::describe;
use super::kv_events::Numbering;
use super::request::plain_request;
use super::tokenizer_bundle::{CHUNK_BYTES, archive};

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Clone, Debug)]
pub(in super::super) struct EngineService {
    state: ApiState,
}

impl EngineService {
    pub(in super::super) fn new(state: ApiState) -> EngineService {
        EngineService { state }
    }

    async fn understand(&self, headers: &HeaderMap, request: wire::GenerateRequest) -> Result<PlainJob, ApiError> {
        let received = self.state.generator().now();
        let deadline = deadline(headers)?;
        let is_constrained = |params: &wire::SamplingParams| params.constraint.is_some();
        let n_bytes = match &request.input {
            _ if request.sampling_params.as_ref().is_some_and(is_constrained) => usize::MAX,
            Some(wire::generate_request::Input::Text(text)) => text.len(),
            _ => 0,
        };
        let state = self.state.clone();
        let work = move || plain_request(request, received, deadline)?.understand(&state);
        beside_runtime(&self.state, n_bytes, work).await?
    }

    fn embed_job(&self, headers: &HeaderMap, request: wire::EmbedRequest) -> Result<Job, ApiError> {
        let received = self.state.generator().now();
        let options = EmbedOptions {
            endpoint: Endpoint::VllmEmbed,
            label: label(headers, &request.request_id)?,
            cache_salt: 0,
            priority: 0,
            deadline: deadline(headers)?,
            received,
        };
        let input = request
            .tokenized
            .ok_or_else(|| ApiError::expected("tokenized", "missing", "token ids"))?;
        check_prompt_ids("input_ids", &input.input_ids, self.state.model())?;
        embed_job(&self.state, options, input.input_ids.into())
    }

    async fn start(&self, headers: &HeaderMap, request: wire::GenerateRequest) -> Result<Responses, ApiError> {
        let understood = self.understand(headers, request).await;
        let PlainJob { job, is_streamed } =
            understood.inspect_err(|error| self.state.metrics().refused(Endpoint::VllmGenerate, error))?;
        let (prompt_ids, n) = (job.prompt_ids.clone(), job.sampling.n);
        let output = OutputStream::start(&self.state, job).await?;
        Ok(Responses::new(output, is_streamed, prompt_ids, n))
    }
}

#[tonic::async_trait]
impl VllmEngine for EngineService {
    type GenerateStream = Boxed<wire::GenerateResponse>;
    type GetTokenizerStream = Boxed<common::GetTokenizerChunk>;
    type SubscribeKvEventsStream = Boxed<common::KvEventBatch>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let started = self.start(metadata.as_ref(), request).await;
        let responses = started.map_err(|error| error.to_status())?;
        let responses = futures::stream::unfold(responses, |mut responses| async move {
            let next = responses.next().await?;
            Some((next.map_err(|error| error.to_status()), responses))
        });
        Ok(Response::new(responses.boxed()))
    }

    async fn embed(&self, request: Request<wire::EmbedRequest>) -> Result<Response<wire::EmbedResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let job = self.embed_job(metadata.as_ref(), request).map_err(|error| {
            self.state.metrics().refused(Endpoint::VllmEmbed, &error);
            error.to_status()
        })?;
        let n_tokens = job.prompt_ids.len();
        let embedding = embed(&self.state, job).await.map_err(|error| error.to_status())?;
        Ok(Response::new(wire::EmbedResponse {
            embedding_dim: embedding.len() as u32,
            embedding: normalized(embedding),
            prompt_tokens: n_tokens as u32,
        }))
    }

    async fn health_check(
        &self,
        _request: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<wire::HealthCheckResponse>, Status> {
        let not_ready = self.state.not_ready();
        Ok(Response::new(wire::HealthCheckResponse {
            healthy: not_ready.is_none(),
            message: not_ready.unwrap_or_default(),
        }))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<wire::AbortResponse>, Status> {
        for id in request.into_inner().request_ids {
            self.state.running().abort(&id);
        }
        Ok(Response::new(wire::AbortResponse {}))
    }

    async fn get_model_info(
        &self,
        _request: Request<wire::GetModelInfoRequest>,
    ) -> Result<Response<wire::GetModelInfoResponse>, Status> {
        let described = describe::model(self.state.model());
        described.map(Response::new).map_err(|error| error.to_status())
    }

    async fn get_server_info(
        &self,
        _request: Request<wire::GetServerInfoRequest>,
    ) -> Result<Response<wire::GetServerInfoResponse>, Status> {
        Ok(Response::new(describe::server(&self.state)))
    }

    async fn get_loads(
        &self,
        _request: Request<wire::GetLoadsRequest>,
    ) -> Result<Response<wire::GetLoadsResponse>, Status> {
        Ok(Response::new(describe::loads(&self.state)))
    }

    async fn get_tokenizer(
        &self,
        _request: Request<common::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let model = self.state.model();
        let Some(folder) = model.folder.clone().filter(|_| model.tokenizer.is_some()) else {
            return Err(Status::failed_precondition("GetTokenizer: this model has no tokenizer"));
        };
        // Reading and packing take tens of milliseconds, so never on the runtime.
        let packed = beside_runtime(&self.state, usize::MAX, move || archive(&folder)).await;
        let (mut bytes, sha256) = packed.and_then(|packed| packed).map_err(|error| error.to_status())?;
        let mut chunks = Vec::with_capacity(bytes.len().div_ceil(CHUNK_BYTES));
        while !bytes.is_empty() {
            let data = bytes.split_to(CHUNK_BYTES.min(bytes.len()));
            let sha256 = if bytes.is_empty() {
                sha256.clone()
            } else {
                String::new()
            };
            chunks.push(Ok(common::GetTokenizerChunk { data, sha256 }));
        }
        if chunks.is_empty() {
            let error = ApiError::new(ErrorKind::Internal, "the archive of the tokenizer is empty");
            return Err(error.to_status());
        }
        Ok(Response::new(futures::stream::iter(chunks).boxed()))
    }

    async fn subscribe_kv_events(
        &self,
        request: Request<common::SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        let from = request.into_inner().start_sequence_number;
        if from != 0 {
            // What a subscriber does on this code is to begin again.
            return Err(Status::out_of_range(format!(
                "start_sequence_number is {from}, expected 0: past events are not kept; a subscription begins with all that \
                 is cached"
            )));
        }
        if self.state.is_stopping() {
            return Err(ApiError::new(ErrorKind::Unavailable, "the server is shutting down").to_status());
        }
        let events = self.state.generator().kv_events();
        let events = events.map_err(|failure| ApiError::from(failure).to_status())?;
        let mut numbering = Numbering::default();
        let batches = events.map(move |events| Ok(numbering.batch(events)));
        let stopping = self.state.inner.stopping.clone();
        let stopped = async move {
            stopping.cancelled().await;
            Err(Status::unavailable("the server is shutting down"))
        };
        Ok(Response::new(until(batches.boxed(), stopped).boxed()))
    }
}

/// A stream until something else happens, which is its last item.
fn until<T: Send + 'static>(
    stream: Boxed<T>,
    end: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    futures::stream::unfold(Some((stream, Box::pin(end))), |state| async move {
        let (mut stream, mut end) = state?;
        tokio::select! {
            last = &mut end => Some((last, None)),
            next = stream.next() => next.map(|next| (next, Some((stream, end)))),
        }
    })
}
