//! The rate of the KV stream over loopback, as a handoff sends it, against plain blocking sockets in the same run.
//!
//! `cargo bench --bench kv_stream -- [--rounds N] [--frame-bytes N] [--output FILE]`. Two processes: this one pulls, its child sends. A transfer
//! is the KV of 16,384 tokens of Llama-3.2-1B, 512 MiB in frames of 1 MiB, packed from a real cache and landed in the
//! reserved blocks of another. Not measured: the computing, and the state machines around the frames.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use baton_engine::worker::{GrpcTransport, KvTransport as _};
use baton_kernels::{DType, KvCache, KvLayout, KvWrite};
use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::cluster::worker_server::{Worker, WorkerServer};
use baton_proto::cluster::{
    GenerateEvent, GenerateRequest, PrefillEnded, PrefillRequest, TransferFrame, transfer_frame::Frame,
};
use baton_proto::link::{KV_FRAME_BYTES, LinkOptions, MAX_MESSAGE_BYTES};
use baton_scheduler::transfer::{KvRange, TransferId};
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tonic::{Request, Response, Status};

const LAYOUT: KvLayout = KvLayout {
    n_layers: 16,
    n_kv_heads: 8,
    block_size: 16,
    head_dim: 64,
    dtype: DType::Bf16,
};
const N_BLOCKS: u32 = 1024;
const N_BYTES: usize = N_BLOCKS as usize * LAYOUT.block_bytes();
const RAW_WRITE_BYTES: usize = 1 << 20;
/// As many as a handoff's source has on the link.
const MAX_IN_FLIGHT: usize = 2;
const N_RUNTIME_THREADS: usize = 2;
/// The argument that makes this program the sending process.
const SEND: &str = "--send-from";

const PATHS: [&str; 4] = ["raw tcp", "grpc tcp", "raw unix", "grpc unix"];

fn main() -> anyhow::Result<()> {
    // Both ends, as a worker does.
    baton_kernels::keep_freed_memory();
    let (mut n_rounds, mut frame_bytes, mut output) = (9, KV_FRAME_BYTES, None::<PathBuf>);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            SEND => return send_from(Path::new(&value()?)),
            "--frame-bytes" => frame_bytes = value()?.parse().context("--frame-bytes")?,
            "--rounds" => n_rounds = value()?.parse().context("--rounds")?,
            "--output" => output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --rounds, --frame-bytes or --output"),
        }
    }
    let mut puller = Puller::start(frame_bytes)?;
    puller.verify()?;
    let mut rates: [Vec<f64>; PATHS.len()] = Default::default();
    for round in 0..=n_rounds {
        for (path, rates) in PATHS.into_iter().zip(&mut rates) {
            let gb_s = puller.pull(path)?;
            // The first round warms up.
            if round > 0 {
                rates.push(gb_s);
            }
        }
    }
    let report = report(frame_bytes, &rates);
    println!("{}", serde_json::to_string_pretty(&report["summary"])?);
    if let Some(path) = output {
        std::fs::write(&path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn report(frame_bytes: usize, rates: &[Vec<f64>; PATHS.len()]) -> Value {
    let ratio = |over: usize, under: usize| median(rates[over].iter().zip(&rates[under]).map(|(a, b)| a / b).collect());
    let medians: Vec<f64> = rates.iter().map(|rates| median(rates.clone())).collect();
    json!({
        "bench": "kv_stream",
        "bytes_per_transfer": N_BYTES,
        "frame_bytes": frame_bytes,
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "summary": {
            "gb_per_s": PATHS.into_iter().zip(&medians).map(|(path, rate)| (path.to_owned(), json!(rate)))
                .collect::<serde_json::Map<_, _>>(),
            "grpc tcp / raw tcp": ratio(1, 0),
            "grpc unix / raw unix": ratio(3, 2),
            "grpc unix / raw tcp": ratio(3, 0),
        },
        "samples_gb_per_s": PATHS.into_iter().zip(rates).map(|(path, rates)| (path.to_owned(), json!(rates)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

/// The receiving process.
struct Puller {
    runtime: tokio::runtime::Runtime,
    tcp: WorkerClient<tonic::transport::Channel>,
    unix: WorkerClient<tonic::transport::Channel>,
    raw_tcp: TcpStream,
    raw_unix: UnixStream,
    transport: GrpcTransport,
    kv: KvCache,
    writers: Vec<KvWrite>,
    buffer: Vec<u8>,
    blocks_per_frame: u32,
    sender: Child,
    _folder: tempfile::TempDir,
}

impl Puller {
    fn start(frame_bytes: usize) -> anyhow::Result<Puller> {
        let blocks_per_frame = u32::try_from((frame_bytes / LAYOUT.layer_block_bytes()).max(1))?;
        ensure!(
            N_BLOCKS.is_multiple_of(blocks_per_frame),
            "frame-bytes: found {frame_bytes}, expected a power of two"
        );
        let folder = tempfile::tempdir()?;
        // Its standard input stays open as long as we live, and ends it with us.
        let mut sender = Command::new(std::env::current_exe()?)
            .arg(SEND)
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = sender.stdout.take().context("the sender has no output")?;
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready)?;
        let (grpc, raw) = ready.trim().split_once(' ').context("the sender did not start")?;

        let runtime = runtime()?;
        let link = LinkOptions::default();
        let client = |address: &str| -> anyhow::Result<_> {
            let _context = runtime.enter();
            Ok(WorkerClient::new(link.channel(address)?).max_decoding_message_size(MAX_MESSAGE_BYTES))
        };
        let mut kv = KvCache::new(LAYOUT, N_BLOCKS as usize)?;
        let writers = kv.reserve_write(&Vec::from_iter(0..N_BLOCKS))?;
        Ok(Puller {
            tcp: client(grpc)?,
            unix: client(&format!("unix:{}", folder.path().join("grpc").display()))?,
            raw_tcp: TcpStream::connect(raw)?,
            raw_unix: UnixStream::connect(folder.path().join("raw"))?,
            runtime,
            transport: GrpcTransport::new(LAYOUT),
            kv,
            writers,
            buffer: vec![0; RAW_WRITE_BYTES],
            blocks_per_frame,
            sender,
            _folder: folder,
        })
    }

    /// Pulls once; returns GB/s from asking to the last byte landed.
    fn pull(&mut self, path: &str) -> anyhow::Result<f64> {
        let started = Instant::now();
        match path {
            "raw tcp" => pull_raw(&mut self.raw_tcp, &mut self.buffer)?,
            "raw unix" => pull_raw(&mut self.raw_unix, &mut self.buffer)?,
            "grpc tcp" => self.runtime.block_on(pull_kv(
                &mut self.tcp,
                self.blocks_per_frame,
                self.transport,
                &mut self.writers,
            ))?,
            "grpc unix" => self.runtime.block_on(pull_kv(
                &mut self.unix,
                self.blocks_per_frame,
                self.transport,
                &mut self.writers,
            ))?,
            other => bail!("no path {other:?}"),
        }
        Ok(N_BYTES as f64 / started.elapsed().as_secs_f64() / 1e9)
    }

    /// What landed is what the sender holds.
    fn verify(&mut self) -> anyhow::Result<()> {
        self.pull("grpc tcp")?;
        self.writers.clear();
        for layer in 0..LAYOUT.n_layers {
            for block in 0..N_BLOCKS {
                let read = self.kv.pin(layer, block);
                ensure!(
                    read.key() == part(layer, block, 0),
                    "K of layer {layer}, block {block} differs"
                );
                ensure!(
                    read.value() == part(layer, block, 1),
                    "V of layer {layer}, block {block} differs"
                );
            }
        }
        self.writers = self.kv.reserve_write(&Vec::from_iter(0..N_BLOCKS))?;
        Ok(())
    }
}

impl Drop for Puller {
    fn drop(&mut self) {
        drop(self.sender.stdin.take());
        // It ends when its input does; whether well or not changes nothing measured.
        let _ = self.sender.wait();
    }
}

fn pull_raw(socket: &mut (impl Read + Write), buffer: &mut [u8]) -> anyhow::Result<()> {
    socket.write_all(&[1])?;
    let mut n_left = N_BYTES;
    while n_left > 0 {
        let n = socket.read(buffer)?;
        ensure!(n > 0, "the sender closed the connection");
        n_left -= n;
    }
    Ok(())
}

async fn pull_kv(
    client: &mut WorkerClient<tonic::transport::Channel>,
    blocks_per_frame: u32,
    transport: GrpcTransport,
    writers: &mut [KvWrite],
) -> anyhow::Result<()> {
    // Nothing precedes the blocks sent, so the field is free to say how many go into a frame.
    let request = PrefillRequest {
        first_block: blocks_per_frame,
        ..PrefillRequest::default()
    };
    let mut frames = client.prefill(request).await?.into_inner();
    let mut n_bytes = 0;
    while let Some(frame) = frames.message().await? {
        match frame.frame {
            Some(Frame::Kv(frame)) => {
                let first = frame.first_block as usize;
                n_bytes += transport.land(&frame, &mut writers[first..first + frame.n_blocks as usize])?;
            }
            Some(Frame::Ended(_)) => break,
            other => bail!("unexpected frame {other:?}"),
        }
    }
    ensure!(
        n_bytes as usize == N_BYTES,
        "received {n_bytes} bytes, expected {N_BYTES}"
    );
    Ok(())
}

/// The sending process: serves until its standard input ends.
fn send_from(folder: &Path) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let _context = runtime.enter();
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    tcp.set_nonblocking(true)?;
    let grpc_address = tcp.local_addr()?;
    let tcp = tokio::net::TcpListener::from_std(tcp)?;
    let unix = tokio::net::UnixListener::bind(folder.join("grpc"))?;
    let sender = std::sync::Arc::new(Sender::new()?);
    let service = |sender: &std::sync::Arc<Sender>| {
        WorkerServer::from_arc(std::sync::Arc::clone(sender)).max_encoding_message_size(MAX_MESSAGE_BYTES)
    };
    let link = LinkOptions::default();
    runtime.spawn(
        link.server()
            .add_service(service(&sender))
            .serve_with_incoming(TcpListenerStream::new(tcp)),
    );
    runtime.spawn(
        link.server()
            .add_service(service(&sender))
            .serve_with_incoming(UnixListenerStream::new(unix)),
    );

    let raw_tcp = TcpListener::bind("127.0.0.1:0")?;
    let raw_address = raw_tcp.local_addr()?;
    let raw_unix = UnixListener::bind(folder.join("raw"))?;
    std::thread::spawn(move || send_raw(raw_tcp.accept()?.0));
    std::thread::spawn(move || send_raw(raw_unix.accept()?.0));

    println!("{grpc_address} {raw_address}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn send_raw(mut socket: impl Read + Write) -> std::io::Result<()> {
    let buffer = vec![1; RAW_WRITE_BYTES];
    while socket.read(&mut [0])? == 1 {
        for _ in 0..N_BYTES / RAW_WRITE_BYTES {
            socket.write_all(&buffer)?;
        }
    }
    Ok(())
}

struct Sender {
    kv: std::sync::Arc<Mutex<KvCache>>,
    transport: GrpcTransport,
}

impl Sender {
    fn new() -> anyhow::Result<Sender> {
        let mut kv = KvCache::new(LAYOUT, N_BLOCKS as usize)?;
        for block in 0..N_BLOCKS {
            let mut writer = kv.write_handle(block)?;
            for layer in 0..LAYOUT.n_layers {
                writer.write(layer, &part(layer, block, 0), &part(layer, block, 1))?;
            }
        }
        Ok(Sender {
            kv: std::sync::Arc::new(Mutex::new(kv)),
            transport: GrpcTransport::new(LAYOUT),
        })
    }
}

#[tonic::async_trait]
impl Worker for Sender {
    type GenerateStream = ReceiverStream<Result<GenerateEvent, Status>>;
    type PrefillStream = ReceiverStream<Result<TransferFrame, Status>>;

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("this process only sends KV"))
    }

    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        let request = request.into_inner();
        let (transfer, per_frame) = (TransferId(request.transfer_id), request.first_block);
        let (frames, receiver) = mpsc::channel(MAX_IN_FLIGHT);
        let (kv, transport) = (std::sync::Arc::clone(&self.kv), self.transport);
        tokio::spawn(async move {
            for layer in 0..LAYOUT.n_layers {
                for first_block in (0..N_BLOCKS).step_by(per_frame as usize) {
                    // A frame is packed when there is room for it, as a handoff's source does.
                    let Ok(room) = frames.reserve().await else { return };
                    let range = KvRange {
                        layer: layer as u32,
                        first_block,
                        n_blocks: per_frame,
                    };
                    let mut kv = kv.lock().await;
                    let reads = (first_block..range.end_block())
                        .map(|block| kv.pin(layer, block))
                        .collect();
                    let frame = Frame::Kv(transport.pack(transfer, range, reads));
                    room.send(Ok(TransferFrame { frame: Some(frame) }));
                }
            }
            let ended = Frame::Ended(PrefillEnded { failure: None });
            // A receiver that has gone needs no end.
            let _ = frames.send(Ok(TransferFrame { frame: Some(ended) })).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Contents of one part, different for each (layer, block, part).
fn part(layer: usize, block: u32, part: usize) -> Vec<u8> {
    let seed = (layer * N_BLOCKS as usize + block as usize) * 2 + part;
    (0..LAYOUT.part_bytes())
        .map(|i| (seed * 31 + i * 7 + (seed >> 8)) as u8)
        .collect()
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(N_RUNTIME_THREADS)
        .enable_all()
        .build()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}
