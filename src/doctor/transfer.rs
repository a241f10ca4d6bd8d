//! `baton doctor transfer`: how fast KV moves from another process to this one, by each transport, beside a plain copy and
//! a plain socket in the same run; and which transport is used, and why.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use baton_engine::cuda::Cuda;
use baton_engine::probe::{Memory, Order, PlainCopy, ProbeSource, Prober, Shape};
use baton_engine::worker::{TransportChoice, TransportKind};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::config::ByteSize;
use crate::engine_config::CudaConfig;

/// What a run of the doctor is told.
#[derive(Clone, Debug)]
pub struct TransferConfig {
    /// Measured pulls of each path; one more warms up.
    pub n_rounds: usize,
    /// KV bytes of one pull.
    pub n_bytes: u64,
    /// The sending end: a `--listen`ing doctor elsewhere. `None` starts one here.
    pub peer: Option<String>,
    /// Print JSON.
    pub json: bool,
    /// The card that both ends have their KV on, unless the host has it.
    pub card: Option<CudaConfig>,
}

/// One way for bytes from there to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Memcpy,
    RawTcp,
    Kv(TransportKind, Order),
}

impl Path {
    /// Those that there are for KV on the host, or on a card.
    fn all(on_card: bool) -> Vec<Path> {
        let kinds = TransportKind::ALL.into_iter().rev();
        let kinds = kinds.filter(|kind| on_card || !kind.needs_card());
        let is_scattered = |kind: TransportKind| match kind {
            // A card's blocks are gathered before they leave it.
            TransportKind::SharedMemory => !on_card,
            TransportKind::InProcess | TransportKind::CudaIpc => true,
            TransportKind::Grpc => false,
        };
        let orders = |kind| match is_scattered(kind) {
            true => &[Order::Consecutive, Order::Scattered][..],
            false => &[Order::Consecutive],
        };
        let moved = kinds.flat_map(|kind| orders(kind).iter().map(move |&order| Path::Kv(kind, order)));
        [Path::Memcpy, Path::RawTcp].into_iter().chain(moved).collect()
    }

    fn name(self) -> String {
        match self {
            Path::Memcpy => "memcpy".to_owned(),
            Path::RawTcp => "raw tcp".to_owned(),
            Path::Kv(kind, Order::Consecutive) => kind.to_string(),
            Path::Kv(kind, Order::Scattered) => format!("{kind}, scattered blocks"),
        }
    }
}

/// A path's rates, or why it has none.
#[derive(Clone, Debug, Serialize)]
pub struct PathReport {
    /// The path.
    pub path: String,
    /// Median rate; absent if the path cannot be used.
    pub gb_per_s: Option<f64>,
    /// Median over the rounds of its rate over the plain copy's in the same round.
    pub of_memcpy: Option<f64>,
    /// As above, over the plain socket's.
    pub of_raw_tcp: Option<f64>,
    /// Rates of the rounds.
    pub samples_gb_per_s: Vec<f64>,
    /// Why it cannot be used.
    pub missing: Option<String>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct TransferReport {
    /// The sending end.
    pub peer: String,
    /// KV bytes of each pull.
    pub bytes_per_pull: usize,
    /// The card that this end has its KV on, unless the host has it.
    pub card: Option<String>,
    /// Load of this machine when the run began.
    pub load_average: String,
    /// The transport that `--kv-transport auto` uses between the two processes.
    pub used: String,
    /// Why no better one is used.
    pub why: String,
    /// By path.
    pub paths: Vec<PathReport>,
}

/// The sending end in a process of its own, ended with this value.
struct SourceProcess {
    child: Child,
    address: String,
}

impl SourceProcess {
    fn start(mut command: Command) -> anyhow::Result<SourceProcess> {
        // Its standard input stays open as long as we live, and ends it with us.
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting the sending process")?;
        let stdout = child.stdout.take().expect("its output is piped");
        let mut source = SourceProcess {
            child,
            address: String::new(),
        };
        BufReader::new(stdout).read_line(&mut source.address)?;
        source.address = source.address.trim().to_owned();
        ensure!(!source.address.is_empty(), "the sending process did not start");
        Ok(source)
    }
}

impl Drop for SourceProcess {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It ends when its input does; whether well or not changes nothing measured.
        let _ = self.child.wait();
    }
}

/// The sending end: prints where it listens, and serves until its standard input ends or, at a terminal, a signal comes.
///
/// # Errors
/// Memory or sockets that cannot be had.
pub fn listen(address: &str, n_bytes: u64, card: Option<&CudaConfig>) -> anyhow::Result<()> {
    baton_engine::keep_freed_memory();
    let card = card.map(super::cuda::open).transpose()?;
    let runtime = runtime()?;
    let _context = runtime.enter();
    let source = ProbeSource::start(address, Shape::of_bytes(n_bytes), memory(card.as_ref()))?;
    println!("{}", source.address());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Measures and prints.
///
/// # Errors
/// A sending end that cannot be started or reached.
pub fn run(config: &TransferConfig) -> anyhow::Result<()> {
    let sender = || -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        let n_bytes = ByteSize(config.n_bytes).to_string();
        command.args(["doctor", "transfer", "--listen", "127.0.0.1:0", "--size", &n_bytes]);
        if let Some(card) = &config.card {
            command.args(["--device", "cuda"]);
            if !card.libraries.0.is_empty() {
                command
                    .arg("--cuda-libraries")
                    .arg(std::env::join_paths(&card.libraries.0)?);
            }
            if let Some(kernels) = &card.kernels {
                command.arg("--cuda-kernels").arg(kernels);
            }
        }
        Ok(command)
    };
    let report = measure(config, sender)?;
    if config.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

/// Measures every path, interleaved, against a sending end that `sender` starts unless the configuration names one.
///
/// # Errors
/// As [`run`].
pub fn measure(
    config: &TransferConfig,
    sender: impl FnOnce() -> anyhow::Result<Command>,
) -> anyhow::Result<TransferReport> {
    baton_engine::keep_freed_memory();
    let load_average = std::fs::read_to_string("/proc/loadavg")
        .unwrap_or_default()
        .trim()
        .to_owned();
    let card = config.card.as_ref().map(super::cuda::open).transpose()?;
    let memory = memory(card.as_ref());
    let runtime = runtime()?;
    let _context = runtime.enter();
    let process = match &config.peer {
        Some(_) => None,
        None => Some(SourceProcess::start(sender()?)?),
    };
    let address = config
        .peer
        .as_ref()
        .or(process.as_ref().map(|process| &process.address));
    let address = address.expect("one of the two").clone();
    let reach = || format!("reaching the sending end at {address}");
    let auto = Prober::connect(&address, TransportChoice::Auto, Order::Consecutive, memory).with_context(reach)?;
    let shape = auto.shape();
    let offer = runtime.block_on(auto.offer())?;
    let used = *offer.kinds().first().expect("an offer names something");
    let why = match (used, offer.missing()) {
        (TransportKind::Grpc, Some(reason)) => format!("shared memory: {reason}"),
        (TransportKind::SharedMemory, Some(reason)) => format!("in place: {reason}"),
        (TransportKind::Grpc, None) => "the processes are on different hosts".to_owned(),
        _ => "the processes share this host".to_owned(),
    };
    drop((offer, auto));
    // For the transport within a process, the sending end is here as well.
    let here = ProbeSource::start("127.0.0.1:0", shape, memory)?;
    let here_address = here.address().to_string();
    let mut lanes: Vec<Lane> = Path::all(card.is_some())
        .into_iter()
        .map(|path| {
            let is_within = matches!(path, Path::Kv(TransportKind::InProcess, _));
            let address = if is_within { &here_address } else { &address };
            Lane::open(path, address, shape, memory, &runtime)
        })
        .collect();
    let bar = ProgressBar::new(((config.n_rounds + 1) * lanes.len()) as u64);
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{msg:32} [{bar:30}] {pos}/{len}").expect("a constant template"));
    for round in 0..=config.n_rounds {
        for lane in &mut lanes {
            bar.set_message(lane.path.name());
            lane.pull(&runtime, shape, round > 0);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for lane in &mut lanes {
        lane.verify();
    }
    let (memcpy, raw_tcp) = (lanes[0].rates.clone(), lanes[1].rates.clone());
    let report = |lane: &Lane| PathReport {
        path: lane.path.name(),
        gb_per_s: median(lane.rates.clone()),
        of_memcpy: ratio(&lane.rates, &memcpy),
        of_raw_tcp: ratio(&lane.rates, &raw_tcp),
        samples_gb_per_s: lane.rates.clone(),
        missing: lane.trouble.clone(),
    };
    Ok(TransferReport {
        peer: address.clone(),
        bytes_per_pull: shape.n_bytes(),
        card: card.as_ref().map(|card| card.card().name.clone()),
        load_average,
        used: used.to_string(),
        why,
        paths: lanes.iter().map(report).collect(),
    })
}

/// One path, and what it has reached.
struct Lane {
    path: Path,
    end: Option<End>,
    rates: Vec<f64>,
    trouble: Option<String>,
}

enum End {
    Copy(PlainCopy),
    Prober(Box<Prober>),
}

impl Lane {
    fn open(path: Path, address: &str, shape: Shape, memory: Memory<'_>, runtime: &Runtime) -> Lane {
        let connect = |choice, order| Prober::connect(address, choice, order, memory).map(Box::new);
        let opened = match path {
            Path::Memcpy => Ok(End::Copy(PlainCopy::new(shape))),
            Path::RawTcp => connect(TransportChoice::Auto, Order::Consecutive).map(End::Prober),
            Path::Kv(kind, order) => connect(TransportChoice::Only(kind), order).and_then(|prober| {
                runtime.block_on(prober.offer())?;
                Ok(End::Prober(prober))
            }),
        };
        let (end, trouble) = match opened {
            Ok(end) => (Some(end), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Lane {
            path,
            end,
            rates: Vec::new(),
            trouble,
        }
    }

    fn pull(&mut self, runtime: &Runtime, shape: Shape, counts: bool) {
        let pulled = match &mut self.end {
            None => return,
            Some(End::Copy(copy)) => Ok(copy.copy()),
            Some(End::Prober(prober)) if self.path == Path::RawTcp => prober.pull_raw(),
            Some(End::Prober(prober)) => runtime.block_on(prober.pull()),
        };
        match pulled {
            Ok(took) if counts => self.rates.push(shape.n_bytes() as f64 / took.as_secs_f64() / 1e9),
            // The first round warms up.
            Ok(_) => {}
            Err(error) => self.fail(error.to_string()),
        }
    }

    /// A rate of bytes that did not arrive is none.
    fn verify(&mut self) {
        let verified = match (&mut self.end, self.path) {
            (Some(End::Prober(prober)), Path::Kv(..)) => prober.verify(),
            _ => return,
        };
        match verified {
            Ok(true) => {}
            Ok(false) => self.fail("what arrived is not what was sent".to_owned()),
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn fail(&mut self, reason: String) {
        self.trouble = Some(reason);
        self.end = None;
        self.rates.clear();
    }
}

fn table(report: &TransferReport) -> String {
    use std::fmt::Write as _;
    let mut text = format!(
        "KV from {}, {} MiB a pull{}; load {}\n\n{:<32} {:>8} {:>10} {:>10}\n",
        report.peer,
        report.bytes_per_pull >> 20,
        report
            .card
            .as_ref()
            .map_or(String::new(), |card| format!(", on {card}")),
        report.load_average,
        "path",
        "GB/s",
        "of memcpy",
        "of raw tcp"
    );
    let percent = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.0} %", ratio * 100.0));
    for path in &report.paths {
        // Writing to a String does not fail.
        let _ = match (&path.missing, path.gb_per_s) {
            (None, Some(rate)) => writeln!(
                text,
                "{:<32} {rate:>8.2} {:>10} {:>10}",
                path.path,
                percent(path.of_memcpy),
                percent(path.of_raw_tcp)
            ),
            (missing, _) => writeln!(
                text,
                "{:<32} not measured: {}",
                path.path,
                missing.as_deref().unwrap_or("no rounds")
            ),
        };
    }
    let _ = writeln!(text, "\nauto uses {}: {}", report.used, report.why);
    text
}

fn memory(card: Option<&Cuda>) -> Memory<'_> {
    card.map_or(Memory::Host, Memory::Card)
}

fn runtime() -> std::io::Result<Runtime> {
    // As many threads as carry a transfer in a worker: one moves, one receives.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

fn ratio(over: &[f64], under: &[f64]) -> Option<f64> {
    median(over.iter().zip(under).map(|(a, b)| a / b).collect())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (n > 0).then(|| (values[(n - 1) / 2] + values[n / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_measures_and_verifies_every_path() {
        // The sending end of this test is in its own process, which is this one: in-process is then the best.
        let serving = runtime().unwrap();
        let source = {
            let _context = serving.enter();
            ProbeSource::start("127.0.0.1:0", Shape::of_bytes(1), Memory::Host).unwrap()
        };
        let config = TransferConfig {
            n_rounds: 2,
            n_bytes: 1,
            peer: Some(source.address().to_string()),
            json: false,
            card: None,
        };
        let report = measure(&config, || anyhow::bail!("a peer is named")).unwrap();
        assert_eq!(report.used, "in-process");
        for path in &report.paths {
            assert_eq!(path.missing, None, "{}", path.path);
            assert!(
                path.samples_gb_per_s.len() == 2 && path.gb_per_s.unwrap() > 0.0,
                "{}",
                path.path
            );
        }
        let text = table(&report);
        assert!(
            text.contains("shared-memory, scattered blocks") && text.contains("auto uses in-process"),
            "{text}"
        );
        serde_json::to_string(&report).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_had_says_why() {
        let serving = runtime().unwrap();
        let _context = serving.enter();
        let lane = Lane::open(
            Path::Kv(TransportKind::Grpc, Order::Consecutive),
            "127.0.0.1:1",
            Shape::of_bytes(1),
            Memory::Host,
            &serving,
        );
        assert!(lane.end.is_none() && lane.trouble.is_some());
    }
}
