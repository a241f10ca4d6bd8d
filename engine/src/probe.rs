//! Moves the KV of a real cache by the real transports, between processes or within one, to see how fast that is here; and
//! the same amount through plain sockets and plain copies, to compare. No model, no state machine, no scheduling.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_kernels::cuda::Cuda;
use baton_kernels::{DType, KernelError, KvCache, KvLayout, KvRead, KvWrite};
use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::cluster::worker_server::Worker;
use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_proto::link::{KV_FRAME_BYTES, LinkError, LinkOptions, MAX_MESSAGE_BYTES};
use baton_proto::{PROTOCOL_VERSION, RawFrames};
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId};
use baton_scheduler::transfer::{EndsBy, KvRange, TransferId};
use futures::stream::Empty;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

use crate::worker::{Identity, KvTransports, Offer, TransportChoice, TransportError};

/// As many as a handoff's source has on the link.
const MAX_IN_FLIGHT: usize = 2;
const RAW_WRITE_BYTES: usize = 1 << 20;

/// Why a measurement did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Sockets.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// KV memory.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A transport that cannot be had, or a frame that does not land.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The other end's answer.
    #[error("{}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
    /// An address that is none.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other end is not what it should be.
    #[error("the other end: {0}")]
    Peer(String),
}

impl From<Status> for ProbeError {
    fn from(status: Status) -> ProbeError {
        ProbeError::Status(Box::new(status))
    }
}

/// What is moved: every block of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Blocks of the cache.
    pub n_blocks: u32,
}

impl Shape {
    /// KV of Llama-3.2-1B in bf16, blocks of 16 tokens.
    const LAYOUT: KvLayout = KvLayout {
        n_layers: 16,
        n_kv_heads: 8,
        block_size: 16,
        head_dim: 64,
        dtype: DType::Bf16,
    };

    /// Of a frame that carries them.
    const BLOCKS_PER_FRAME: usize = KV_FRAME_BYTES / Shape::LAYOUT.layer_block_bytes();

    /// About `n_bytes`.
    pub fn of_bytes(n_bytes: u64) -> Shape {
        let per_frame = Shape::BLOCKS_PER_FRAME;
        let n_blocks = n_bytes as usize / Shape::LAYOUT.block_bytes();
        Shape {
            n_blocks: n_blocks.next_multiple_of(per_frame).max(per_frame) as u32,
        }
    }

    /// Bytes of one pull.
    pub fn n_bytes(&self) -> usize {
        self.n_blocks as usize * Shape::LAYOUT.block_bytes()
    }

    /// As a handoff's.
    fn blocks_per_frame(frame_bytes: usize) -> u32 {
        (frame_bytes / Shape::LAYOUT.layer_block_bytes()).max(1) as u32
    }
}

/// Where an end has its KV.
#[derive(Clone, Copy)]
pub enum Memory<'a> {
    /// In memory of the host that other processes can map.
    Host,
    /// On a card.
    Card(&'a Cuda),
}

impl Memory<'_> {
    fn cache(self, shape: Shape) -> Result<KvCache, KernelError> {
        let n_blocks = shape.n_blocks as usize;
        match self {
            Memory::Host => KvCache::shared(Shape::LAYOUT, n_blocks),
            Memory::Card(cuda) => cuda.kv_cache(Shape::LAYOUT, n_blocks),
        }
    }
}

/// What the sending end says to whoever connects to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    grpc_port: u16,
    incarnation: u64,
    shape: Shape,
}

/// Contents of one part, another for each (layer, block, part).
fn part(layer: usize, block: u32, part: usize) -> Vec<u8> {
    let seed = (layer << 20 | block as usize) * 2 + part;
    (0..Shape::LAYOUT.part_bytes())
        .map(|i| (seed * 31 + i * 7 + (seed >> 8)) as u8)
        .collect()
}

/// One layer of blocks as a frame has it: K of all, then V of all.
fn frame_of(layer: usize, blocks: impl Iterator<Item = u32> + Clone) -> Vec<u8> {
    let parts = [0, 1].into_iter();
    parts
        .flat_map(|kind| blocks.clone().flat_map(move |block| part(layer, block, kind)))
        .collect()
}

fn identity(name: &str) -> Identity {
    // Each is another life, also within a process.
    static N_LIVES: AtomicU64 = AtomicU64::new(0);
    let life = (
        u64::from(std::process::id()),
        N_LIVES.fetch_add(1, Relaxed),
        std::time::SystemTime::now(),
    );
    let digest = blake3::hash(format!("{life:?}").as_bytes());
    let incarnation = u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("eight bytes"));
    Identity {
        instance: InstanceId::new(name),
        incarnation: Incarnation(incarnation),
        fingerprint: Fingerprint([0; 32]),
        numerics_class: "probe".to_owned(),
    }
}

/// The sending end. Serves until dropped.
pub struct ProbeSource {
    address: std::net::SocketAddr,
    grpc: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl ProbeSource {
    /// Fills a cache and listens on `address`, and on a free port beside it; within a runtime.
    ///
    /// # Errors
    /// Memory or sockets that cannot be had.
    pub fn start(address: &str, shape: Shape, memory: Memory<'_>) -> Result<ProbeSource, ProbeError> {
        let mut kv = memory.cache(shape)?;
        let blocks: Vec<u32> = (0..shape.n_blocks).collect();
        for blocks in blocks.chunks(Shape::BLOCKS_PER_FRAME) {
            blocks.iter().for_each(|&block| kv.set_generation(block, 1));
            let mut writers = kv.reserve_write(blocks)?;
            for layer in 0..Shape::LAYOUT.n_layers {
                KvWrite::scatter(&mut writers, layer, &frame_of(layer, blocks.iter().copied()))?;
            }
        }
        let identity = identity("probe-source");
        let link = LinkOptions::default();
        let transports = KvTransports::new(&identity, Shape::LAYOUT, TransportChoice::Auto, &link, kv.share())?;
        let raw = TcpListener::bind(address)?;
        let address = raw.local_addr()?;
        let grpc = TcpListener::bind((address.ip(), 0))?;
        grpc.set_nonblocking(true)?;
        let hello = Hello {
            grpc_port: grpc.local_addr()?.port(),
            incarnation: identity.incarnation.0,
            shape,
        };
        let service = Service {
            kv: Arc::new(Mutex::new(kv)),
            transports: Arc::new(transports),
            identity,
            shape,
        };
        let grpc = TcpListenerStream::new(tokio::net::TcpListener::from_std(grpc)?).map(|stream| {
            let stream = stream?;
            // As a worker does: without it the last of the small frames waits for a delayed acknowledgement, 40 ms.
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(stream)
        });
        let server = link.server().add_service(RawFrames::new(service));
        let grpc = tokio::spawn(server.serve_with_incoming(grpc));
        // Ends with the process: a blocking accept cannot be woken.
        std::thread::spawn(move || {
            for socket in raw.incoming().map_while(Result::ok) {
                let hello = hello.clone();
                // A receiver that has gone needs nothing.
                std::thread::spawn(move || serve_raw(socket, &hello));
            }
        });
        Ok(ProbeSource { address, grpc })
    }

    /// Where it listens.
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }
}

impl Drop for ProbeSource {
    fn drop(&mut self) {
        self.grpc.abort();
    }
}

/// Says hello, then answers each byte with a pull's worth of bytes.
fn serve_raw(mut socket: TcpStream, hello: &Hello) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut line = serde_json::to_vec(hello)?;
    line.push(b'\n');
    socket.write_all(&line)?;
    let buffer = vec![1; RAW_WRITE_BYTES];
    while socket.read(&mut [0])? == 1 {
        let mut n_left = hello.shape.n_bytes();
        while n_left > 0 {
            let n = n_left.min(buffer.len());
            socket.write_all(&buffer[..n])?;
            n_left -= n;
        }
    }
    Ok(())
}

struct Service {
    kv: Arc<Mutex<KvCache>>,
    transports: Arc<KvTransports>,
    identity: Identity,
    shape: Shape,
}

fn only_kv<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("this process only sends KV"))
}

#[tonic::async_trait]
impl Worker for Service {
    type GenerateStream = Empty<Result<cluster::GenerateEvent, Status>>;
    type PrefillStream = ReceiverStream<Result<cluster::TransferFrame, Status>>;
    type AttachStream = Empty<Result<cluster::GenerateEvent, Status>>;
    type KvEventsStream = Empty<Result<cluster::KvChanges, Status>>;
    type StandingStream = Empty<Result<cluster::StandingResponse, Status>>;
    type MigrateStream = Empty<Result<cluster::TransferFrame, Status>>;

    async fn generate(&self, _: Request<cluster::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        only_kv()
    }

    async fn attach(&self, _: Request<cluster::AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        only_kv()
    }

    async fn migrate(&self, _: Request<cluster::MigrateRequest>) -> Result<Response<Self::MigrateStream>, Status> {
        only_kv()
    }

    async fn standing(&self, _: Request<cluster::StandingRequest>) -> Result<Response<Self::StandingStream>, Status> {
        only_kv()
    }

    async fn resume(&self, _: Request<cluster::ResumeRequest>) -> Result<Response<cluster::ResumeResponse>, Status> {
        only_kv()
    }

    async fn kv_events(&self, _: Request<cluster::KvEventsRequest>) -> Result<Response<Self::KvEventsStream>, Status> {
        only_kv()
    }

    async fn embed(&self, _: Request<cluster::EmbedRequest>) -> Result<Response<cluster::EmbedResponse>, Status> {
        only_kv()
    }

    /// Sends the whole cache, layer by layer, as a handoff's source does.
    async fn prefill(
        &self,
        request: Request<cluster::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let request = request.into_inner();
        let transfer = TransferId(request.transfer_id);
        let sender = self.transports.sender(transfer, request.offer.as_ref(), "the prober");
        let mut sender = sender.map_err(|error| Status::failed_precondition(error.to_string()))?;
        let (frames, receiver) = mpsc::channel(MAX_IN_FLIGHT);
        let accepted = cluster::Accepted {
            incarnation: self.identity.incarnation.0,
            protocol_version: PROTOCOL_VERSION,
            transport: sender.kind().to_string(),
            ..cluster::Accepted::default()
        };
        let (kv, shape) = (Arc::clone(&self.kv), self.shape);
        tokio::spawn(async move {
            let frame = |frame| Ok(cluster::TransferFrame { frame: Some(frame) });
            if frames.send(frame(Frame::Accepted(accepted))).await.is_err() {
                return;
            }
            let per_frame = Shape::blocks_per_frame(sender.frame_bytes());
            let mut held = Vec::new();
            for layer in 0..Shape::LAYOUT.n_layers {
                for first_block in (0..shape.n_blocks).step_by(per_frame as usize) {
                    // A frame is packed when there is room for it.
                    let Ok(room) = frames.reserve().await else { return };
                    let n_blocks = per_frame.min(shape.n_blocks - first_block);
                    let range = KvRange {
                        choice: 0,
                        layer: layer as u32,
                        first_block,
                        n_blocks,
                    };
                    let reads = {
                        let mut kv = kv.lock();
                        (first_block..range.end_block())
                            .map(|block| kv.pin(layer, block))
                            .collect()
                    };
                    let Ok(packed) = sender.pack(range, reads) else { return };
                    held.extend(packed.pins);
                    room.send(frame(Frame::Kv(packed.frame)));
                }
            }
            let ended = Frame::Ended(cluster::PrefillEnded { failure: None });
            // A receiver that has gone needs no end.
            let _ = frames.send(frame(ended)).await;
            if sender.kind().ends_by() == EndsBy::Destination {
                frames.closed().await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Where the received blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, as in the source.
    Consecutive,
    /// No two neighbours of the source are neighbours here.
    Scattered,
}

/// The receiving end of one transport.
pub struct Prober {
    transports: KvTransports,
    client: WorkerClient<tonic::transport::Channel>,
    source: cluster::Peer,
    raw: TcpStream,
    shape: Shape,
    kv: KvCache,
    order: Vec<u32>,
    writers: Vec<KvWrite>,
    buffer: Vec<u8>,
}

impl Prober {
    /// Connects to a [`ProbeSource`]; within a runtime.
    ///
    /// # Errors
    /// Nobody there, or no memory.
    pub fn connect(
        address: &str,
        choice: TransportChoice,
        order: Order,
        memory: Memory<'_>,
    ) -> Result<Prober, ProbeError> {
        let raw = TcpStream::connect(address)?;
        raw.set_nodelay(true)?;
        let mut line = String::new();
        // It says no more than this line before it is asked.
        BufReader::new(raw.try_clone()?).read_line(&mut line)?;
        let hello: Hello = serde_json::from_str(&line).map_err(|error| ProbeError::Peer(error.to_string()))?;
        let grpc = std::net::SocketAddr::new(raw.peer_addr()?.ip(), hello.grpc_port).to_string();
        let link = LinkOptions::default();
        let client = WorkerClient::new(link.channel(&grpc)?).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let source = cluster::Peer {
            instance_id: "probe-source".to_owned(),
            incarnation: hello.incarnation,
            address: grpc,
            protocol_version: PROTOCOL_VERSION,
        };
        let shape = hello.shape;
        let mut kv = memory.cache(shape)?;
        let order: Vec<u32> = match order {
            Order::Consecutive => (0..shape.n_blocks).collect(),
            Order::Scattered => (0..shape.n_blocks)
                .step_by(2)
                .chain((1..shape.n_blocks).step_by(2))
                .collect(),
        };
        let writers = kv.reserve_write(&order)?;
        let share = kv.share();
        Ok(Prober {
            transports: KvTransports::new(&identity("prober"), Shape::LAYOUT, choice, &link, share)?,
            client,
            source,
            raw,
            shape,
            kv,
            order,
            writers,
            buffer: vec![0; RAW_WRITE_BYTES],
        })
    }

    /// What is moved by one pull.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What this end can take from the source.
    ///
    /// # Errors
    /// The transport asked for cannot be had.
    pub async fn offer(&self) -> Result<Offer, ProbeError> {
        Ok(self.transports.offer(&self.source).await?)
    }

    /// Pulls everything once; how long from asking to the last byte landed.
    ///
    /// # Errors
    /// Whatever fails.
    pub async fn pull(&mut self) -> Result<Duration, ProbeError> {
        let began = Instant::now();
        let offer = self.offer().await?;
        let request = cluster::PrefillRequest {
            transfer_id: 1,
            offer: Some(offer.to_wire()),
            ..cluster::PrefillRequest::default()
        };
        let mut frames = self.client.prefill(request).await?.into_inner();
        let mut receiver = None;
        let mut n_bytes = 0;
        while let Some(frame) = frames.message().await? {
            match frame.frame {
                Some(Frame::Accepted(accepted)) => receiver = Some(self.transports.receiver(&offer, &accepted)?),
                Some(Frame::Kv(frame)) => {
                    let first = frame.first_block as usize;
                    let writers = self.writers.get_mut(first..first + frame.n_blocks as usize);
                    let (Some(receiver), Some(writers)) = (receiver.as_mut(), writers) else {
                        return Err(ProbeError::Peer(format!("a frame of block {first} out of turn")));
                    };
                    n_bytes += receiver.land(&frame, frame.layer as usize, writers)?;
                }
                Some(Frame::Ended(_)) => break,
                other => return Err(ProbeError::Peer(format!("unexpected frame {other:?}"))),
            }
        }
        if n_bytes as usize != self.shape.n_bytes() {
            let message = format!("it sent {n_bytes} bytes, expected {}", self.shape.n_bytes());
            return Err(ProbeError::Peer(message));
        }
        Ok(began.elapsed())
    }

    /// The same amount through the plain socket.
    ///
    /// # Errors
    /// The connection broke.
    pub fn pull_raw(&mut self) -> Result<Duration, ProbeError> {
        let began = Instant::now();
        self.raw.write_all(&[1])?;
        let mut n_left = self.shape.n_bytes();
        while n_left > 0 {
            let n = self.raw.read(&mut self.buffer)?;
            if n == 0 {
                return Err(ProbeError::Peer("it closed the plain connection".to_owned()));
            }
            n_left -= n;
        }
        Ok(began.elapsed())
    }

    /// Whether every byte that landed is the one the source holds.
    ///
    /// # Errors
    /// Memory that is in use.
    pub fn verify(&mut self) -> Result<bool, ProbeError> {
        self.writers.clear();
        let mut is_whole = true;
        let mut blocks = 0..;
        for here in self.order.chunks(Shape::BLOCKS_PER_FRAME) {
            let blocks: Vec<u32> = blocks.by_ref().take(here.len()).collect();
            for layer in 0..Shape::LAYOUT.n_layers {
                let reads: Vec<KvRead> = here.iter().map(|&block| self.kv.pin(layer, block)).collect();
                is_whole &= KvRead::gather(&reads).as_ref() == frame_of(layer, blocks.iter().copied());
            }
        }
        self.writers = self.kv.reserve_write(&self.order)?;
        Ok(is_whole)
    }
}

/// A plain copy within the process, of as much as a pull moves.
pub struct PlainCopy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl PlainCopy {
    /// Touches its memory once.
    pub fn new(shape: Shape) -> PlainCopy {
        PlainCopy {
            from: vec![1; shape.n_bytes()],
            to: vec![2; shape.n_bytes()],
        }
    }

    /// Copies once.
    pub fn copy(&mut self) -> Duration {
        let began = Instant::now();
        self.to.copy_from_slice(std::hint::black_box(&self.from));
        std::hint::black_box(&self.to);
        began.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::TransportKind;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_transport_delivers_every_byte() {
        let shape = Shape::of_bytes(1);
        let source = ProbeSource::start("127.0.0.1:0", shape, Memory::Host).unwrap();
        for kind in TransportKind::ALL.into_iter().filter(|kind| !kind.needs_card()) {
            for order in [Order::Consecutive, Order::Scattered] {
                let address = source.address().to_string();
                let prober = Prober::connect(&address, TransportChoice::Only(kind), order, Memory::Host);
                let mut prober = prober.unwrap();
                assert!(!prober.verify().unwrap(), "nothing has come yet");
                assert_eq!(prober.offer().await.unwrap().kinds(), [kind]);
                prober.pull().await.unwrap();
                prober.pull().await.unwrap();
                assert!(prober.verify().unwrap(), "by {kind}, {order:?}");
                prober.pull_raw().unwrap();
            }
        }
        assert!(PlainCopy::new(shape).copy() > Duration::ZERO);
    }
}
