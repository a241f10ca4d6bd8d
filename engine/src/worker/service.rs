//! The gRPC service itself: checks the caller, and gives each stream to the file that serves it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use baton_proto::cluster::generate_event::Event;
use baton_proto::cluster::worker_server;
use baton_proto::convert::{embedding_to_wire, request_id_from_wire};
use baton_proto::{RawFrames, cluster};
use baton_scheduler::ids::Epoch;
use baton_scheduler::pacer::Pacer;
use baton_scheduler::request::{Failure, PortableState, Request as Prompted};
use baton_scheduler::timeline::Moment;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::counters::{TransferCounters, TransferTotals, add};
use super::destination::Taken;
use super::identity::Identity;
use super::open_requests::OpenRequests;
use super::outlet::{Outlet, Used};
use super::peers::Peers;
use super::transport::{KvTransports, TransportTotals};
use super::{WorkerOptions, destination, kv_events, local, mover, source};
use crate::engine::EngineHandle;

/// How long a request may be held for a destination that makes room for it.
const HOLD_DEADLINE: Duration = Duration::from_secs(10);

/// What the tasks of a worker share.
pub(super) struct Worker {
    pub(super) engine: EngineHandle,
    pub(super) identity: Identity,
    pub(super) options: WorkerOptions,
    pub(super) transports: KvTransports,
    pub(super) peers: Peers,
    pub(super) open: OpenRequests,
    /// Nothing moves in any more.
    refuses_moves: AtomicBool,
    /// Of the background frames of all moves out of here.
    pub(super) pacer: Mutex<Pacer>,
    pub(super) started_at: Instant,
    pub(super) counters: TransferCounters,
    pub(super) tasks: TaskTracker,
    /// No stream that only listens holds up the end.
    pub(super) stopping: CancellationToken,
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
        transports: KvTransports,
        options: WorkerOptions,
    ) -> WorkerService {
        let peers = Peers::new(options.link.clone());
        let pacer = Pacer::new(options.move_bytes_per_second);
        let worker = Worker {
            engine,
            identity,
            options,
            transports,
            peers,
            open: OpenRequests::default(),
            refuses_moves: AtomicBool::new(false),
            pacer: Mutex::new(pacer),
            started_at: Instant::now(),
            counters: TransferCounters::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        };
        WorkerService {
            worker: Arc::new(worker),
        }
    }

    /// What was moved and refused so far.
    pub fn totals(&self) -> TransferTotals {
        self.worker.counters.totals()
    }

    /// What was moved by which transport so far.
    pub fn transport_totals(&self) -> TransportTotals {
        self.worker.transports.totals()
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

    /// From now on nothing moves in. Instances that leave together say this before any of them asks to be emptied, so that
    /// none takes over what another hands over.
    pub fn refuse_moves(&self) {
        self.worker.refuses_moves.store(true, Relaxed);
    }

    pub(super) fn options(&self) -> &WorkerOptions {
        &self.worker.options
    }
}

type EventReceiver = mpsc::Receiver<Result<cluster::GenerateEvent, Status>>;
type EventStream = Pin<Box<dyn Stream<Item = Result<cluster::GenerateEvent, Status>> + Send>>;
type StandingStream = Pin<Box<dyn Stream<Item = Result<cluster::StandingResponse, Status>> + Send>>;
type FrameStream = Pin<Box<dyn Stream<Item = Result<cluster::TransferFrame, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for WorkerService {
    type GenerateStream = EventStream;
    type PrefillStream = FrameStream;

    type KvEventsStream = kv_events::ChangeStream;
    type AttachStream = EventStream;
    type StandingStream = StandingStream;
    type MigrateStream = FrameStream;

    async fn generate(&self, request: Request<cluster::GenerateRequest>) -> Result<Response<EventStream>, Status> {
        let request = request.into_inner();
        let (outlet, events) = self.outlet(request.state.as_ref());
        let worker = Arc::clone(&self.worker);
        self.worker.tasks.spawn(async move {
            let accepted = worker.identity.accepted(request.handshake.as_ref());
            let state = worker.check(request.handshake.as_ref(), request.state);
            match (state, request.prefill) {
                (Err(failure), _) => outlet.fail(&failure, "", Used::default()).await,
                // The last token may have been told before its end was; then nothing is left to hand over.
                (Ok(state), Some(source)) if !worker.engine.has_ended(&state) => {
                    let taken = worker.take(state, source, accepted, outlet);
                    destination::receive(&worker, taken).await;
                }
                (Ok(state), _) => generate_here(&worker, state, accepted, outlet).await,
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn attach(&self, request: Request<cluster::AttachRequest>) -> Result<Response<EventStream>, Status> {
        let request = request.into_inner();
        let (outlet, events) = self.outlet(request.state.as_ref());
        let worker = Arc::clone(&self.worker);
        self.worker.tasks.spawn(async move {
            let accepted = worker.identity.accepted(request.handshake.as_ref());
            let state = worker
                .check(request.handshake.as_ref(), request.state)
                .and_then(|state| worker.takes_moves().map(|()| state));
            let source = request
                .source
                .ok_or_else(|| Failure::Invalid("field source is missing".into()));
            match state.and_then(|state| Ok((state, source?))) {
                Err(failure) => outlet.fail(&failure, "", Used::default()).await,
                Ok((state, source)) => {
                    let taken = worker.take(state, source, accepted, outlet);
                    destination::attach(&worker, taken).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn prefill(&self, request: Request<cluster::PrefillRequest>) -> Result<Response<FrameStream>, Status> {
        Ok(Response::new(Box::pin(source::serve_prefill(
            &self.worker,
            request.into_inner(),
        ))))
    }

    async fn migrate(&self, request: Request<cluster::MigrateRequest>) -> Result<Response<FrameStream>, Status> {
        Ok(Response::new(Box::pin(mover::serve_migrate(
            &self.worker,
            request.into_inner(),
        ))))
    }

    async fn standing(&self, request: Request<cluster::StandingRequest>) -> Result<Response<StandingStream>, Status> {
        let request = request.into_inner();
        let held = async {
            self.worker.identity.check_caller(request.handshake.as_ref())?;
            let id = request_id_from_wire("request_id", &request.request_id)
                .map_err(|error| Failure::Invalid(error.to_string()))?;
            let n_tokens = match request.n_more_tokens {
                0 => usize::MAX,
                n => n as usize,
            };
            self.worker.engine.hold(id, n_tokens).await
        };
        let held = held.await;
        let answer = match &held {
            Ok(held) => cluster::StandingResponse {
                n_output_tokens: held.n_output_tokens().iter().map(|&n| n as u32).collect(),
                failure: None,
            },
            Err(failure) => cluster::StandingResponse {
                n_output_tokens: Vec::new(),
                failure: Some(failure.into()),
            },
        };
        let held = held.ok().filter(|_| request.n_more_tokens > 0);
        let stopping = self.worker.stopping.clone();
        let until_given_up = futures::stream::once(async move {
            if held.is_some() {
                tokio::select! {
                    () = tokio::time::sleep(HOLD_DEADLINE) => {}
                    () = stopping.cancelled() => {}
                }
            }
        });
        let nothing_more = until_given_up.filter_map(|()| std::future::ready(None));
        let answers = futures::stream::iter([Ok(answer)]).chain(nothing_more);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn resume(
        &self,
        request: Request<cluster::ResumeRequest>,
    ) -> Result<Response<cluster::ResumeResponse>, Status> {
        let request = request.into_inner();
        let resumed = self
            .worker
            .identity
            .check_caller(request.handshake.as_ref())
            .and_then(|()| {
                let id = request_id_from_wire("request_id", &request.request_id);
                id.map_err(|error| Failure::Invalid(error.to_string()))
            })
            .and_then(|id| self.worker.open.resume(id, Epoch(request.epoch)));
        if resumed.is_ok() {
            add(&self.worker.counters.n_resumed, 1);
        }
        let failure = resumed.err().map(|failure| (&failure).into());
        Ok(Response::new(cluster::ResumeResponse { failure }))
    }

    async fn kv_events(
        &self,
        request: Request<cluster::KvEventsRequest>,
    ) -> Result<Response<Self::KvEventsStream>, Status> {
        let handshake = request.into_inner().handshake;
        kv_events::listen(&self.worker, handshake.as_ref()).map(Response::new)
    }

    async fn embed(&self, request: Request<cluster::EmbedRequest>) -> Result<Response<cluster::EmbedResponse>, Status> {
        let request = request.into_inner();
        let embedding = async {
            self.worker.identity.check_caller(request.handshake.as_ref())?;
            let request = Prompted::try_from(request).map_err(|error| Failure::Invalid(error.to_string()))?;
            self.worker.engine.embed(request).await
        };
        // A caller that goes away takes this call with it, and the engine notices.
        let embedded = self.worker.tasks.track_future(embedding).await;
        Ok(Response::new(embedding_to_wire(embedded)))
    }
}

impl WorkerService {
    fn outlet(&self, state: Option<&cluster::PortableState>) -> (Arc<Outlet>, EventReceiver) {
        let epoch = Epoch(state.map_or(0, |state| state.epoch));
        let (outlet, events) = Outlet::new(epoch, self.worker.options.stall_deadline);
        (Arc::new(outlet), events)
    }
}

impl Worker {
    fn check(
        &self,
        handshake: Option<&cluster::Handshake>,
        state: Option<cluster::PortableState>,
    ) -> Result<PortableState, Failure> {
        self.identity.check_caller(handshake)?;
        let state = state.ok_or_else(|| Failure::Invalid("field state is missing".into()))?;
        PortableState::try_from(state).map_err(|error| Failure::Invalid(error.to_string()))
    }

    fn takes_moves(&self) -> Result<(), Failure> {
        match self.refuses_moves.load(Relaxed) {
            true => Err(Failure::Busy(format!("{} is leaving", self.identity.instance))),
            false => Ok(()),
        }
    }

    fn take(
        &self,
        state: PortableState,
        source: cluster::Peer,
        accepted: cluster::Accepted,
        outlet: Arc<Outlet>,
    ) -> Taken {
        let registered = self.open.register(state.request.id, outlet);
        Taken {
            state,
            source,
            accepted,
            registered,
        }
    }
}

async fn generate_here(worker: &Arc<Worker>, state: PortableState, accepted: cluster::Accepted, outlet: Arc<Outlet>) {
    let registered = worker.open.register(state.request.id, Arc::clone(&outlet));
    let prepared = match worker.engine.prepare(state).await {
        Ok(prepared) => prepared,
        Err(failure) => return outlet.fail(&failure, "", Used::default()).await,
    };
    let mut generation = match worker.engine.generate(prepared) {
        Ok(generation) => generation,
        Err(failure) => return outlet.fail(&failure, "", Used::default()).await,
    };
    let answered = async {
        outlet.send(Event::Accepted(accepted)).await?;
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
            failure = registered.open.given_up() => return outlet.fail(&failure, "", used).await,
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
    let server = RawFrames::new(service);
    let server = tonic::service::interceptor::InterceptedService::new(server, worker.options.link.require_secret());
    let (stopping, listeners) = (shutdown.clone(), worker.stopping.clone());
    let serving = worker
        .options
        .link
        .server()
        .add_service(server)
        .serve_with_incoming_shutdown(incoming, async move {
            stopping.cancelled().await;
            listeners.cancel();
        });
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
