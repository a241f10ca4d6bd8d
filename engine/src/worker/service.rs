//! The gRPC service itself: checks the caller, and gives each stream to the file that serves it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster;
use baton_proto::cluster::generate_event::Event;
use baton_proto::cluster::worker_server::{self, WorkerServer};
use baton_proto::link::MAX_MESSAGE_BYTES;
use baton_scheduler::request::{Failure, PortableState};
use baton_scheduler::timeline::Moment;
use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::counters::{TransferCounters, TransferTotals};
use super::identity::Identity;
use super::outlet::{Outlet, Used};
use super::peers::Peers;
use super::transport::KvTransport;
use super::{WorkerOptions, destination, local, source};
use crate::engine::EngineHandle;

/// What the tasks of a worker share.
pub(super) struct Worker {
    pub(super) engine: EngineHandle,
    pub(super) identity: Identity,
    pub(super) options: WorkerOptions,
    pub(super) transport: Box<dyn KvTransport>,
    pub(super) peers: Peers,
    pub(super) counters: TransferCounters,
    pub(super) tasks: TaskTracker,
}

/// The worker service of one instance.
#[derive(Clone)]
pub struct WorkerService {
    pub(super) worker: Arc<Worker>,
}

impl WorkerService {
    /// A service over a running engine.
    pub fn new(
        engine: EngineHandle,
        identity: Identity,
        transport: Box<dyn KvTransport>,
        options: WorkerOptions,
    ) -> WorkerService {
        let peers = Peers::new(options.link.clone());
        let worker = Worker {
            engine,
            identity,
            options,
            transport,
            peers,
            counters: TransferCounters::default(),
            tasks: TaskTracker::new(),
        };
        WorkerService {
            worker: Arc::new(worker),
        }
    }

    /// What was moved and refused so far.
    pub fn totals(&self) -> TransferTotals {
        self.worker.counters.totals()
    }

    /// The engine behind the service.
    pub fn engine(&self) -> &EngineHandle {
        &self.worker.engine
    }

    /// Who this instance is.
    pub fn identity(&self) -> &Identity {
        &self.worker.identity
    }

    /// Streams served now: requests that run or are received here, and prefills and moves under way.
    pub fn n_open(&self) -> usize {
        self.worker.tasks.len()
    }

    pub(super) fn options(&self) -> &WorkerOptions {
        &self.worker.options
    }
}

type EventStream = Pin<Box<dyn Stream<Item = Result<cluster::GenerateEvent, Status>> + Send>>;
type FrameStream = Pin<Box<dyn Stream<Item = Result<cluster::TransferFrame, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for WorkerService {
    type GenerateStream = EventStream;
    type PrefillStream = FrameStream;

    type AttachStream = EventStream;
    type MigrateStream = FrameStream;

    async fn attach(&self, _request: Request<cluster::AttachRequest>) -> Result<Response<EventStream>, Status> {
        Err(Status::unimplemented("attach"))
    }

    async fn migrate(&self, _request: Request<cluster::MigrateRequest>) -> Result<Response<FrameStream>, Status> {
        Err(Status::unimplemented("migrate"))
    }

    async fn resume(
        &self,
        _request: Request<cluster::ResumeRequest>,
    ) -> Result<Response<cluster::ResumeResponse>, Status> {
        Err(Status::unimplemented("resume"))
    }

    async fn generate(&self, request: Request<cluster::GenerateRequest>) -> Result<Response<EventStream>, Status> {
        let request = request.into_inner();
        let epoch = request.state.as_ref().map_or(0, |state| state.epoch);
        let stall_deadline = self.worker.options.stall_deadline;
        let (outlet, events) = Outlet::new(baton_scheduler::ids::Epoch(epoch), stall_deadline);
        let worker = Arc::clone(&self.worker);
        self.worker
            .tasks
            .spawn(async move { generate(&worker, request, outlet).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn prefill(&self, request: Request<cluster::PrefillRequest>) -> Result<Response<FrameStream>, Status> {
        Ok(Response::new(Box::pin(source::serve_prefill(
            &self.worker,
            request.into_inner(),
        ))))
    }
}

async fn generate(worker: &Arc<Worker>, request: cluster::GenerateRequest, outlet: Outlet) {
    let state = worker.identity.check_caller(request.handshake.as_ref()).and_then(|()| {
        let state = request
            .state
            .ok_or_else(|| Failure::Invalid("field state is missing".into()))?;
        PortableState::try_from(state).map_err(|error| Failure::Invalid(error.to_string()))
    });
    match (state, request.prefill) {
        (Err(failure), _) => outlet.fail(&failure, "", Used::default()).await,
        (Ok(state), Some(source)) => destination::receive(worker, state, source, outlet).await,
        (Ok(state), None) => generate_here(worker, state, outlet).await,
    }
}

async fn generate_here(worker: &Arc<Worker>, state: PortableState, outlet: Outlet) {
    let mut generation = match worker.engine.generate(state) {
        Ok(generation) => generation,
        Err(failure) => return outlet.fail(&failure, "", Used::default()).await,
    };
    let answered = async {
        outlet.send(Event::Accepted(worker.identity.accepted())).await?;
        outlet.moment(Moment::Reserved).await
    };
    if answered.await.is_err() {
        return;
    }
    let mut used = Used::default();
    loop {
        let timed = tokio::select! {
            timed = generation.next() => timed,
            () = outlet.closed() => return,
        };
        let Some(timed) = timed else { return };
        match local::forward(&outlet, timed, &mut used).await {
            Ok(false) => {}
            // Ended, or nobody listens.
            Ok(true) | Err(_) => return,
        }
    }
}

/// Serves until `shutdown`, then refuses new streams, waits for open ones at most `grace`, and stops the engine.
///
/// # Errors
/// When the listener fails.
pub async fn serve<L, IO>(
    service: WorkerService,
    incoming: L,
    shutdown: CancellationToken,
    grace: Duration,
) -> Result<(), tonic::transport::Error>
where
    L: Stream<Item = std::io::Result<IO>>,
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let worker = Arc::clone(&service.worker);
    let server = WorkerServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let server = tonic::service::interceptor::InterceptedService::new(server, worker.options.link.require_secret());
    let stopping = shutdown.clone();
    let serving = worker
        .options
        .link
        .server()
        .add_service(server)
        .serve_with_incoming_shutdown(incoming, async move { stopping.cancelled().await });
    let limit = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    let served = tokio::select! {
        served = serving => served,
        () = limit => Ok(()),
    };
    worker.tasks.close();
    worker.engine.shutdown().await;
    let _ = tokio::time::timeout(grace, worker.tasks.wait()).await;
    served
}
