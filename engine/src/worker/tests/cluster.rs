//! Instances on loopback ports, a front door's stream, and a prefill service that follows a script. No tests.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use baton_proto::PROTOCOL_VERSION;
use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::cluster::worker_server::{self, WorkerServer};
use baton_proto::cluster::{self, ended::How, generate_event::Event, transfer_frame::Frame};
use baton_proto::convert::token_from_wire;
use baton_scheduler::batch::BatchConfig;
use baton_scheduler::ids::{Epoch, Fingerprint, Incarnation, InstanceId, RequestId, TokenId};
use baton_scheduler::request::{Failure, Finish, PortableState, Request, SamplingParams, Token};
use baton_scheduler::timeline::Moment;
use crossbeam::channel;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::super::{
    Identity, KvTransports, TransferTotals, TransportChoice, TransportKind, WorkerOptions, WorkerService, serve,
};
use crate::engine::hash_model::{self, HashModel};
use crate::engine::{EngineConfig, LoadReport, start};

pub(super) const BLOCK_SIZE: usize = 16;
pub(super) const N_BLOCKS: usize = 64;
pub(super) const FINGERPRINT: [u8; 32] = [7; 32];
/// Far above what anything here takes, far below what a lost wake-up would.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Setup {
    pub(super) name: &'static str,
    pub(super) incarnation: u64,
    pub(super) fingerprint: [u8; 32],
    pub(super) numerics_class: &'static str,
    pub(super) n_blocks: usize,
    pub(super) options: WorkerOptions,
}

impl Setup {
    pub(super) fn new(name: &'static str) -> Setup {
        Setup {
            name,
            incarnation: 11,
            fingerprint: FINGERPRINT,
            numerics_class: "hash",
            n_blocks: N_BLOCKS,
            // The bytes themselves cross the connection.
            options: WorkerOptions {
                kv_transport: TransportChoice::Only(TransportKind::Grpc),
                ..WorkerOptions::default()
            },
        }
    }

    /// One that moves KV by `kind` alone, and of a life that no other test has.
    pub(super) fn by(name: &'static str, kind: TransportKind) -> Setup {
        Setup {
            incarnation: NEXT_LIFE.fetch_add(1, SeqCst) ^ u64::from(std::process::id()) << 32,
            options: WorkerOptions {
                kv_transport: TransportChoice::Only(kind),
                ..WorkerOptions::default()
            },
            ..Setup::new(name)
        }
    }

    fn service(self, gate: Option<channel::Receiver<()>>) -> WorkerService {
        let batch = BatchConfig {
            max_num_seqs: 8,
            max_batch_tokens: 64,
            ..BatchConfig::new(self.n_blocks, BLOCK_SIZE, Fingerprint(self.fingerprint))
        };
        let model = HashModel::new(self.n_blocks, BLOCK_SIZE);
        let model = match gate {
            Some(gate) => model.gated(gate),
            None => model,
        };
        let share = model.kv_share();
        let engine = start(model, EngineConfig::new(batch)).unwrap();
        let identity = Identity {
            instance: InstanceId::new(self.name),
            incarnation: Incarnation(self.incarnation),
            fingerprint: Fingerprint(self.fingerprint),
            numerics_class: self.numerics_class.to_owned(),
        };
        let link = &self.options.link;
        let choice = self.options.kv_transport;
        let share = share.filter(|_| choice == TransportChoice::Only(TransportKind::SharedMemory));
        let transports = KvTransports::new(&identity, engine.layout(), choice, link, share).unwrap();
        WorkerService::new(engine, identity, transports, self.options)
    }

    pub(super) async fn start(self) -> Instance {
        Instance::listen(self.service(None)).await
    }

    /// An instance that makes a step for each permit, and freely once the sender is dropped.
    pub(super) async fn start_gated(self) -> (Instance, channel::Sender<()>) {
        let (permits, gate) = channel::unbounded();
        (Instance::listen(self.service(Some(gate))).await, permits)
    }

    pub(super) fn unserved(self) -> WorkerService {
        self.service(None)
    }
}

/// A worker that serves.
pub(super) struct Instance {
    pub(super) service: WorkerService,
    pub(super) address: String,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Instance {
    async fn listen(service: WorkerService) -> Instance {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        Instance::serve_on(service, address, TcpListenerStream::new(listener))
    }

    pub(super) fn serve_on<L, IO>(service: WorkerService, address: String, incoming: L) -> Instance
    where
        L: Stream<Item = std::io::Result<IO>> + Send + 'static,
        IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + tonic::transport::server::Connected + Unpin + Send + 'static,
    {
        let shutdown = CancellationToken::new();
        // Stopping would take this long if a stream or a task were left.
        let grace = 2 * PATIENCE;
        let serving = tokio::spawn(serve(service.clone(), incoming, shutdown.clone(), grace));
        Instance {
            service,
            address,
            shutdown,
            serving,
        }
    }

    pub(super) fn peer(&self) -> cluster::Peer {
        cluster::Peer {
            instance_id: self.service.identity().instance.to_string(),
            incarnation: self.service.identity().incarnation.0,
            address: self.address.clone(),
            protocol_version: PROTOCOL_VERSION,
        }
    }

    /// What a front door that knows this instance says first.
    pub(super) fn handshake(&self) -> cluster::Handshake {
        self.service.identity().handshake(&self.peer())
    }

    pub(super) fn client(&self) -> WorkerClient<Channel> {
        let channel = baton_proto::link::LinkOptions::default()
            .channel(&self.address)
            .unwrap();
        WorkerClient::new(channel)
    }

    pub(super) fn request(&self, state: &PortableState, source: Option<cluster::Peer>) -> cluster::GenerateRequest {
        cluster::GenerateRequest {
            handshake: Some(self.handshake()),
            state: Some(state.into()),
            prefill: source,
        }
    }

    pub(super) fn prefill_request(&self, state: &PortableState) -> cluster::PrefillRequest {
        cluster::PrefillRequest {
            handshake: Some(self.handshake()),
            state: Some(state.into()),
            transfer_id: 3,
            first_block: 0,
            offer: None,
            first_blocks: Vec::new(),
        }
    }

    pub(super) async fn open(&self, request: cluster::GenerateRequest) -> Streaming<cluster::GenerateEvent> {
        self.client().generate(request).await.unwrap().into_inner()
    }

    /// Generates here, with the prompt from `source` or computed here.
    pub(super) async fn generate(&self, state: &PortableState, source: Option<cluster::Peer>) -> Said {
        self.say(self.request(state, source)).await
    }

    pub(super) async fn say(&self, request: cluster::GenerateRequest) -> Said {
        let epoch = request.state.as_ref().map_or(0, |state| state.epoch);
        let stream = self.open(request).await;
        let said = timeout(PATIENCE, listen(stream)).await.expect("a stream ends");
        assert!(
            said.epochs.iter().all(|&found| found == epoch),
            "an event of another epoch"
        );
        said
    }

    pub(super) fn totals(&self) -> TransferTotals {
        self.service.totals()
    }

    pub(super) fn load(&self) -> LoadReport {
        self.service.engine().load()
    }

    /// Rounds of the step loop until `is_so`.
    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Instance) -> bool) {
        let began = Instant::now();
        while !is_so(self) {
            // The answer comes from the step loop; one that waits at its gate answers later.
            let _ = timeout(Duration::from_millis(20), self.service.engine().take_prefix_events()).await;
            assert!(
                began.elapsed() < PATIENCE,
                "{}: not {what}: {:?} {:?}",
                self.service.identity().instance,
                self.load(),
                self.totals()
            );
        }
    }

    /// Whether no stream is served any more.
    pub(super) fn is_idle(&self) -> bool {
        self.service.worker.tasks.is_empty()
    }

    /// Until no stream is served and nobody holds a block.
    pub(super) async fn settle(&self) {
        self.until("idle", Instance::is_idle).await;
        // What its streams dropped is seen by the round that answers next; the round after it has published that.
        for _ in 0..2 {
            let answer = timeout(PATIENCE, self.service.engine().take_prefix_events()).await;
            answer.expect("the step loop comes round").unwrap();
        }
        self.until("whole", |instance| {
            let batch = instance.load().batch;
            let n_open = batch.n_running + batch.n_waiting + batch.n_reserved + batch.n_handing_over;
            batch.ledger.is_whole() && n_open == 0
        })
        .await;
    }

    /// Settles, stops, and asserts that no stream and no task was left open.
    pub(super) async fn stop(self) {
        self.settle().await;
        self.shutdown.cancel();
        let served = timeout(PATIENCE, self.serving).await;
        served.expect("streams or tasks are left").unwrap().unwrap();
    }
}

/// Stops them one after the other; a decode instance before those that it holds connections to.
pub(super) async fn stop<const N: usize>(instances: [Instance; N]) {
    for instance in instances {
        instance.stop().await;
    }
}

/// What a front door heard.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) accepted: Option<cluster::Accepted>,
    pub(super) moments: Vec<Moment>,
    pub(super) prompt_logprobs: Option<usize>,
    pub(super) tokens: Vec<Token>,
    pub(super) end: Option<cluster::Ended>,
    epochs: Vec<u32>,
}

impl Said {
    pub(super) fn finish(&self) -> Finish {
        match self.end.as_ref().and_then(|end| end.how.clone()) {
            Some(How::Finish(finish)) => finish.try_into().unwrap(),
            other => panic!("expected a finish, got {other:?}"),
        }
    }

    /// The failure, and who is blamed for it.
    pub(super) fn failure(&self) -> (Failure, String) {
        match self.end.as_ref().and_then(|end| end.how.clone()) {
            Some(How::Failure(failure)) => (failure.clone().into(), failure.instance_id),
            other => panic!("expected a failure, got {other:?}"),
        }
    }

    pub(super) fn kv_bytes(&self) -> u64 {
        self.end.as_ref().unwrap().kv_bytes_received
    }

    pub(super) fn assert_as_alone(&self, state: &PortableState) {
        let (tokens, finish) = hash_model::alone(state, N_BLOCKS * BLOCK_SIZE);
        assert_eq!(self.tokens, tokens[state.choices[0].output.len()..]);
        assert_eq!(self.finish(), finish);
    }
}

/// Hears a stream to its end; asserts that the answer comes first and the end last.
pub(super) async fn listen(mut stream: Streaming<cluster::GenerateEvent>) -> Said {
    let mut said = Said::default();
    while let Some(event) = stream.message().await.unwrap() {
        said.take(event);
    }
    said
}

impl Said {
    fn take(&mut self, event: cluster::GenerateEvent) {
        assert!(self.end.is_none(), "{event:?} follows the end");
        self.epochs.push(event.epoch);
        match event.event.expect("a known event") {
            Event::Accepted(accepted) => {
                assert_eq!(self.epochs.len(), 1, "the answer comes first");
                self.accepted = Some(accepted);
            }
            Event::Moment(moment) => self.moments.push(Moment::ALL[moment.moment as usize]),
            Event::PromptLogprobs(logprobs) => {
                assert!(
                    self.tokens.is_empty(),
                    "the prompt's log-probabilities come before tokens"
                );
                self.prompt_logprobs = Some(logprobs.tokens.len());
            }
            Event::Token(token) => self.tokens.push(token_from_wire(token).1),
            Event::Ended(ended) => self.end = Some(ended),
            Event::ChoiceFinished(_) | Event::Moving(_) | Event::MoveCancelled(_) => {}
        }
    }
}

/// Hears a stream until an event that `is_it`.
pub(super) async fn hear(stream: &mut Streaming<cluster::GenerateEvent>, is_it: impl Fn(&Event) -> bool) {
    let heard = async {
        while let Some(event) = stream.message().await.unwrap() {
            if is_it(event.event.as_ref().unwrap()) {
                return;
            }
        }
        panic!("the stream ended before");
    };
    timeout(PATIENCE, heard).await.expect("the event comes");
}

pub(super) fn is_moment(moment: Moment) -> impl Fn(&Event) -> bool {
    move |event| matches!(event, Event::Moment(reached) if reached.moment == moment as u32)
}

pub(super) fn prompt(seed: u32, n: usize) -> Vec<TokenId> {
    (0..n as u32).map(|i| (seed * 7 + i * 11 + i * i) % 40).collect()
}

pub(super) fn greedy(prompt: &[TokenId], max_tokens: u32) -> PortableState {
    let sampling = SamplingParams {
        max_tokens,
        ..SamplingParams::default()
    };
    state(prompt, sampling)
}

pub(super) fn state(prompt: &[TokenId], sampling: SamplingParams) -> PortableState {
    let request = Request {
        id: RequestId(77),
        prompt_ids: Arc::from(prompt),
        sampling,
        cache_salt: 0,
    };
    PortableState::fresh(request, Epoch(5))
}

/// KV of `n_blocks` blocks in all layers, as the test model has it.
pub(super) fn kv_bytes(n_blocks: usize) -> u64 {
    // K and V of two 32-bit words for each token.
    (n_blocks * hash_model::N_LAYERS * 2 * BLOCK_SIZE * 8) as u64
}

pub(super) type FrameResult = Result<cluster::TransferFrame, Status>;
type FrameStream = Pin<Box<dyn Stream<Item = FrameResult> + Send>>;
type Script = Box<dyn Fn(cluster::PrefillRequest) -> FrameStream + Send + Sync>;

static NEXT_LIFE: AtomicU64 = AtomicU64::new(1 << 63);
static NEXT_INCARNATION: AtomicU64 = AtomicU64::new(100);

/// A prefill service that answers each call with what its script makes of it.
pub(super) struct FakeSource {
    address: String,
    /// Each is another life, so that no connection outlives its test.
    incarnation: u64,
    pub(super) n_calls: Arc<AtomicUsize>,
    /// Streams that the destination still holds.
    pub(super) n_open: Arc<AtomicUsize>,
}

#[derive(Clone)]
struct FakeService {
    script: Arc<Mutex<Script>>,
    n_calls: Arc<AtomicUsize>,
    n_open: Arc<AtomicUsize>,
    answers: bool,
}

/// Counts one as long as it lives.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[tonic::async_trait]
impl worker_server::Worker for FakeService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<cluster::GenerateEvent, Status>> + Send>>;
    type PrefillStream = FrameStream;

    async fn generate(
        &self,
        _: tonic::Request<cluster::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    type AttachStream = Self::GenerateStream;
    type KvEventsStream = futures::stream::Empty<Result<cluster::KvChanges, Status>>;
    type MigrateStream = FrameStream;
    type StandingStream = futures::stream::Empty<Result<cluster::StandingResponse, Status>>;

    async fn attach(&self, _: tonic::Request<cluster::AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn migrate(&self, _: tonic::Request<cluster::MigrateRequest>) -> Result<Response<FrameStream>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn standing(
        &self,
        _: tonic::Request<cluster::StandingRequest>,
    ) -> Result<Response<Self::StandingStream>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn resume(
        &self,
        _: tonic::Request<cluster::ResumeRequest>,
    ) -> Result<Response<cluster::ResumeResponse>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn kv_events(
        &self,
        _: tonic::Request<cluster::KvEventsRequest>,
    ) -> Result<Response<Self::KvEventsStream>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn embed(
        &self,
        _: tonic::Request<cluster::EmbedRequest>,
    ) -> Result<Response<cluster::EmbedResponse>, Status> {
        Err(Status::unimplemented("a prefill service only"))
    }

    async fn prefill(&self, request: tonic::Request<cluster::PrefillRequest>) -> Result<Response<FrameStream>, Status> {
        self.n_calls.fetch_add(1, SeqCst);
        self.n_open.fetch_add(1, SeqCst);
        let open = Open(Arc::clone(&self.n_open));
        if !self.answers {
            std::future::pending::<()>().await;
        }
        let frames = (self.script.lock())(request.into_inner());
        let frames = frames.map(move |frame| {
            let _open = &open;
            frame
        });
        Ok(Response::new(Box::pin(frames)))
    }
}

impl FakeSource {
    pub(super) async fn start<S>(script: impl Fn(cluster::PrefillRequest) -> S + Send + Sync + 'static) -> FakeSource
    where
        S: Stream<Item = FrameResult> + Send + 'static,
    {
        FakeSource::listen(Box::new(move |request| Box::pin(script(request))), true).await
    }

    /// One that takes the call and never answers it.
    pub(super) async fn silent() -> FakeSource {
        FakeSource::listen(Box::new(|_| Box::pin(futures::stream::empty())), false).await
    }

    async fn listen(script: Script, answers: bool) -> FakeSource {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = FakeService {
            script: Arc::new(Mutex::new(script)),
            n_calls: Arc::default(),
            n_open: Arc::default(),
            answers,
        };
        let (n_calls, n_open) = (Arc::clone(&service.n_calls), Arc::clone(&service.n_open));
        let server = tonic::transport::Server::builder().add_service(WorkerServer::new(service));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        FakeSource {
            address,
            incarnation: NEXT_INCARNATION.fetch_add(1, SeqCst),
            n_calls,
            n_open,
        }
    }

    pub(super) fn peer(&self) -> cluster::Peer {
        cluster::Peer {
            instance_id: "fake-0".to_owned(),
            incarnation: self.incarnation,
            address: self.address.clone(),
            protocol_version: PROTOCOL_VERSION,
        }
    }
}

pub(super) fn frame(frame: Frame) -> FrameResult {
    Ok(cluster::TransferFrame { frame: Some(frame) })
}

/// The answer of a source that agrees in everything.
pub(super) fn accepted(request: &cluster::PrefillRequest) -> cluster::Accepted {
    cluster::Accepted {
        incarnation: request.handshake.as_ref().unwrap().callee_incarnation,
        protocol_version: PROTOCOL_VERSION,
        fingerprint: FINGERPRINT.to_vec(),
        numerics_class: "hash".to_owned(),
        transport: String::new(),
    }
}

pub(super) fn kv(request: &cluster::PrefillRequest, layer: u32, first_block: u32, n_blocks: u32) -> cluster::KvFrame {
    cluster::KvFrame {
        transfer_id: request.transfer_id,
        layer,
        first_block,
        n_blocks,
        data: vec![0; kv_bytes(n_blocks as usize) as usize / hash_model::N_LAYERS].into(),
        ..cluster::KvFrame::default()
    }
}

pub(super) fn first_token(id: TokenId, finish: Option<Finish>) -> Frame {
    let token = cluster::Token {
        index: 0,
        id,
        logprobs: None,
        choice: 0,
    };
    Frame::FirstToken(cluster::FirstToken {
        token: Some(token),
        finish: finish.map(Into::into),
        n_cached_tokens: 0,
        ..cluster::FirstToken::default()
    })
}

pub(super) fn ended(failure: Option<&Failure>) -> Frame {
    Frame::Ended(cluster::PrefillEnded {
        failure: failure.map(Into::into),
    })
}
