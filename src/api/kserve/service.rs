//! `inference.GRPCInferenceService`.

use std::pin::Pin;

use baton_proto::inference as wire;
use baton_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use futures::stream::BoxStream;
use futures::{FutureExt as _, Stream, StreamExt as _};
use http::HeaderMap;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::super::ApiState;
use super::super::call::{beside_runtime, work_of};
use super::super::error::ApiError;
use super::super::grpc::deadline;
use super::super::metrics::Endpoint;
use super::super::output::Job;
use super::answer::Pieces;
use super::describe;
use super::query::{Query, Shape, check_model};

/// Requests of one stream that run at once; the next is read when one has ended.
const MAX_REQUESTS_OF_A_STREAM: usize = 64;

type StreamResponse = Result<wire::ModelStreamInferResponse, Status>;

/// The service.
#[derive(Clone, Debug)]
pub(in super::super) struct InferenceService {
    state: ApiState,
}

impl InferenceService {
    pub(in super::super) fn new(state: ApiState) -> InferenceService {
        InferenceService { state }
    }

    async fn understand(
        &self,
        mut message: wire::ModelInferRequest,
        deadline: Option<Instant>,
    ) -> Result<(Job, Shape), ApiError> {
        let received = self.state.generator().now();
        let n_bytes = n_bytes(&message);
        let state = self.state.clone();
        let work = move || {
            let query = Query::from_wire(&mut message, received, deadline)?;
            let outputs: Vec<&str> = message.outputs.iter().map(|output| output.name.as_str()).collect();
            query.understand(&state, &outputs, !message.raw_input_contents.is_empty(), None)
        };
        let understood = beside_runtime(&self.state, n_bytes, work).await.and_then(|done| done);
        understood.inspect_err(|error| self.state.metrics().refused(Endpoint::Infer, error))
    }

    async fn infer(
        &self,
        headers: &HeaderMap,
        message: wire::ModelInferRequest,
    ) -> Result<wire::ModelInferResponse, ApiError> {
        let (job, shape) = self.understand(message, deadline(headers)?).await?;
        if shape.is_streamed {
            let error = ApiError::expected("stream", true, "false, or ModelStreamInfer");
            self.state.metrics().refused(Endpoint::Infer, &error);
            return Err(error);
        }
        let whole = Pieces::start(&self.state, job, &shape).await?.whole().await?;
        Ok(whole.into_response(&shape))
    }

    /// The responses to one request of a stream.
    fn answers(
        self,
        message: wire::ModelInferRequest,
        deadline: Option<Instant>,
    ) -> BoxStream<'static, StreamResponse> {
        let id = message.id.clone();
        let started = async move {
            let (job, shape) = self.understand(message, deadline).await?;
            let pieces = Pieces::start(&self.state, job, &shape).await?;
            Ok((pieces, shape))
        };
        started
            .map(move |started: Result<(Pieces, Shape), ApiError>| match started {
                Ok((pieces, shape)) => futures::stream::unfold((pieces, shape), |(mut pieces, shape)| async move {
                    let response = match pieces.next().await? {
                        Ok(piece) => wire::ModelStreamInferResponse {
                            error_message: String::new(),
                            infer_response: Some(piece.into_response(&shape)),
                        },
                        Err(error) => failed(shape.id.clone(), &error),
                    };
                    Some((Ok(response), (pieces, shape)))
                })
                .boxed(),
                Err(error) => futures::stream::iter([Ok(failed(id, &error))]).boxed(),
            })
            .flatten_stream()
            .boxed()
    }
}

/// How much work there is, in both forms, in the bytes of [`beside_runtime`].
fn n_bytes(message: &wire::ModelInferRequest) -> usize {
    let typed = message.inputs.iter().filter_map(|input| input.contents.as_ref());
    let elements = typed.flat_map(|contents| &contents.bytes_contents);
    let names = message.inputs.iter().map(|input| input.name.as_bytes());
    let names = names.chain(message.parameters.keys().map(String::as_bytes));
    let pieces = message.raw_input_contents.iter().chain(elements).map(Vec::as_slice);
    let works = pieces.chain(names).map(work_of);
    works.fold(0, usize::saturating_add)
}

/// A request of a stream has failed; the others go on.
fn failed(id: String, error: &ApiError) -> wire::ModelStreamInferResponse {
    let error_message = match error.message.is_empty() {
        true => error.kind.codes().kind.to_owned(),
        false => error.message.clone(),
    };
    wire::ModelStreamInferResponse {
        error_message,
        infer_response: Some(wire::ModelInferResponse {
            id,
            ..wire::ModelInferResponse::default()
        }),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for InferenceService {
    async fn server_live(
        &self,
        _request: Request<wire::ServerLiveRequest>,
    ) -> Result<Response<wire::ServerLiveResponse>, Status> {
        let live = !self.state.is_stopping();
        Ok(Response::new(wire::ServerLiveResponse { live }))
    }

    async fn server_ready(
        &self,
        _request: Request<wire::ServerReadyRequest>,
    ) -> Result<Response<wire::ServerReadyResponse>, Status> {
        let ready = self.state.not_ready().is_none();
        Ok(Response::new(wire::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<wire::ModelReadyRequest>,
    ) -> Result<Response<wire::ModelReadyResponse>, Status> {
        let asked = request.into_inner();
        let is_known = check_model(&self.state, &asked.name, &asked.version).is_ok();
        let ready = is_known && self.state.not_ready().is_none();
        Ok(Response::new(wire::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<wire::ServerMetadataRequest>,
    ) -> Result<Response<wire::ServerMetadataResponse>, Status> {
        Ok(Response::new(describe::server()))
    }

    async fn model_metadata(
        &self,
        request: Request<wire::ModelMetadataRequest>,
    ) -> Result<Response<wire::ModelMetadataResponse>, Status> {
        let asked = request.into_inner();
        check_model(&self.state, &asked.name, &asked.version).map_err(|error| error.to_status())?;
        Ok(Response::new(describe::metadata(self.state.model())))
    }

    async fn model_config(
        &self,
        request: Request<wire::ModelConfigRequest>,
    ) -> Result<Response<wire::ModelConfigResponse>, Status> {
        let asked = request.into_inner();
        check_model(&self.state, &asked.name, &asked.version).map_err(|error| error.to_status())?;
        let config = Some(describe::config(self.state.model()));
        Ok(Response::new(wire::ModelConfigResponse { config }))
    }

    async fn model_infer(
        &self,
        request: Request<wire::ModelInferRequest>,
    ) -> Result<Response<wire::ModelInferResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let answered = self.infer(metadata.as_ref(), message).await;
        answered.map(Response::new).map_err(|error| error.to_status())
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = StreamResponse> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<wire::ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let deadline = deadline(request.metadata().as_ref()).map_err(|error| error.to_status())?;
        let service = self.clone();
        let answers = request.into_inner().map(move |message| match message {
            Ok(message) => service.clone().answers(message, deadline),
            // The stream itself is broken: it ends with that.
            Err(status) => futures::stream::iter([Err(status)]).boxed(),
        });
        let answers = answers.flatten_unordered(MAX_REQUESTS_OF_A_STREAM);
        Ok(Response::new(answers.boxed()))
    }
}
