//! What a migration costs the client: the gap in its stream, for contexts of 256 to 32k tokens, on each transport; beside it
//! the same move as a blocking copy, and the context computed again.
//!
//! `cargo bench --bench migration -- [--transports grpc,shared-memory,in-process] [--lengths 256,4096] [--moves N]
//! [--output FILE]`. Two mixed instances of a thin model with the KV of Llama-3.2-1B (32 KiB a token), in one process for
//! `in-process` and else in two, their prefix caches off, so that every move carries the whole context. One request decodes
//! and is moved to and fro; nothing else runs. The extra gap of a move is the longest interval between tokens from the
//! asking to the fifth token after the answer, less the median interval.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use baton_proto::cluster::operator_client::OperatorClient;
use baton_proto::cluster::{ListInstancesRequest, ListRequestsRequest, MoveOneRequest};
use futures::StreamExt as _;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

/// Layers, heads and head size of Llama-3.2-1B, so its KV; few and narrow weights, so that a step is mostly attention at
/// long contexts and some tens of milliseconds at short ones.
fn write_model(folder: &Path) -> anyhow::Result<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 2048, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    Ok(())
}
const KV_BYTES_PER_TOKEN: u64 = 16 * 8 * 64 * 2 * 2;

struct Options {
    transports: Vec<String>,
    lengths: Vec<u32>,
    n_moves: usize,
    output: Option<PathBuf>,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        transports: ["grpc", "shared-memory", "in-process"].map(str::to_owned).to_vec(),
        lengths: vec![256, 1024, 4096, 16_384, 32_000],
        n_moves: 11,
        output: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            "--transports" => options.transports = value()?.split(',').map(str::to_owned).collect(),
            "--lengths" => {
                options.lengths = value()?
                    .split(',')
                    .map(str::parse)
                    .collect::<Result<_, _>>()
                    .context("--lengths")?;
            }
            "--moves" => options.n_moves = value()?.parse().context("--moves")?,
            "--output" => options.output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --transports, --lengths, --moves or --output"),
        }
    }
    Ok(options)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = options()?;
    let folder = tempfile::tempdir()?;
    write_model(folder.path())?;
    let mut rows = Vec::new();
    for transport in &options.transports {
        for (way, stages) in [("live", "8"), ("blocking copy", "0")] {
            let cluster = Cluster::start(folder.path(), transport, stages).await?;
            for &length in &options.lengths {
                let row = measure(&cluster, length, options.n_moves).await?;
                let row = json!({ "transport": transport, "way": way, "context_tokens": length, "measured": row });
                println!("{row}");
                rows.push(row);
            }
        }
    }
    if let Some(path) = options.output {
        let report = json!({
            "bench": "migration", "kv_bytes_per_token": KV_BYTES_PER_TOKEN, "rows": rows,
            "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        });
        std::fs::write(&path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// `baton serve` with two mixed instances, ended on drop.
struct Cluster {
    process: Child,
    url: String,
    http: reqwest::Client,
    operator: OperatorClient<Channel>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

impl Cluster {
    async fn start(model: &Path, transport: &str, stages: &str) -> anyhow::Result<Cluster> {
        // Another build of the program may be measured with the same clients.
        let program = std::env::var_os("BATON").unwrap_or_else(|| env!("CARGO_BIN_EXE_baton").into());
        let mut command = Command::new(program);
        command
            .args(["serve", "--port", "0", "--threads", "1", "--load-format", "dummy"])
            .args([
                "--kv-memory",
                "2200MiB",
                "--max-model-len",
                "40000",
                "--max-batch-tokens",
                "512",
            ])
            .args(["--prefix-caching", "off", "--rebalance", "off", "--log-level", "warn"])
            .args(["--kv-transport", transport, "--move-stages", stages, "--model"])
            .arg(model)
            .args(["--mixed", "2"])
            .stdout(Stdio::piped());
        if transport == "in-process" {
            command.arg("--colocate");
        }
        let mut process = command.spawn().context("starting baton serve")?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready: ")));
        let line = line.context("baton serve ended before it was ready")?;
        let url = line.rsplit(' ').next().unwrap_or_default().to_owned();
        std::thread::spawn(move || lines.count());
        let operator = OperatorClient::new(Endpoint::from_shared(url.clone())?.connect_lazy());
        let http = reqwest::Client::new();
        Ok(Cluster {
            process,
            url,
            http,
            operator,
        })
    }

    /// Sum of a counter over the instances.
    async fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let instances = self.operator.clone().list_instances(ListInstancesRequest {}).await?;
        let loads = instances
            .into_inner()
            .instances
            .into_iter()
            .filter_map(|status| status.load);
        Ok(loads.filter_map(|load| load.counters.get(name).copied()).sum())
    }
}

/// When each token of the stream came.
type Arrivals = Arc<Mutex<Vec<Instant>>>;

async fn n_arrived(arrivals: &Arrivals, n: usize) {
    while arrivals.lock().len() < n {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn measure(cluster: &Cluster, length: u32, n_moves: usize) -> anyhow::Result<Value> {
    let prompt: Vec<u32> = (0..length)
        .map(|i| 10 + (i.wrapping_mul(2_654_435_761) >> 8) % 2000)
        .collect();
    let body = json!({
        "prompt": prompt, "max_tokens": 100_000.min(39_000 - length), "ignore_eos": true, "stream": true,
        "temperature": 0
    });
    let sent_at = Instant::now();
    let response = cluster
        .http
        .post(format!("{}/v1/completions", cluster.url))
        .json(&body)
        .send()
        .await?;
    ensure!(response.status() == 200, "{}", response.text().await?);
    let arrivals = Arrivals::default();
    let stamped = Arc::clone(&arrivals);
    // Dropping the stream ends the request.
    let reading = tokio::spawn(async move {
        let mut chunks = response.bytes_stream();
        while let Some(Ok(chunk)) = chunks.next().await {
            let now = Instant::now();
            let n_events = chunk.windows(6).filter(|window| window == b"data: ").count();
            stamped.lock().extend(std::iter::repeat_n(now, n_events));
        }
    });
    n_arrived(&arrivals, 16).await;
    let recompute_ms = ms(arrivals.lock()[0] - sent_at);
    let (mut extra, mut round_trips, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    let mut operator = cluster.operator.clone();
    let requests = operator
        .list_requests(ListRequestsRequest {})
        .await?
        .into_inner()
        .requests;
    let request_id = requests.first().context("one request runs")?.request_id.clone();
    let bytes_before = cluster.counter("kv_bytes_received_total").await?;
    for _ in 0..n_moves {
        let began = arrivals.lock().len();
        let asked_at = Instant::now();
        operator
            .move_one(MoveOneRequest {
                request_id: request_id.clone(),
                to: String::new(),
            })
            .await
            .context("moving")?;
        seconds.push(asked_at.elapsed().as_secs_f64());
        let settled = arrivals.lock().len();
        n_arrived(&arrivals, settled + 5).await;
        let longest = longest_interval(&arrivals.lock()[began.saturating_sub(1)..settled + 5]);
        let pinged_at = Instant::now();
        operator.list_instances(ListInstancesRequest {}).await?;
        round_trips.push(ms(pinged_at.elapsed()));
        n_arrived(&arrivals, settled + 20).await;
        let quiet = intervals(&arrivals.lock()[settled + 6..settled + 20]);
        extra.push((longest, median(quiet)));
    }
    // Reports of counters come every tenth of a second.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let bytes = cluster.counter("kv_bytes_received_total").await? - bytes_before;
    reading.abort();
    let gaps: Vec<f64> = extra.iter().map(|(longest, step)| longest - step).collect();
    let step_ms = median(extra.iter().map(|(_, step)| *step).collect());
    Ok(json!({
        "extra_gap_ms_p50": median(gaps.clone()), "extra_gap_ms_max": gaps.iter().copied().fold(0.0, f64::max),
        "step_ms": step_ms, "extra_gap_in_steps_p50": median(gaps.clone()) / step_ms,
        "round_trip_ms": median(round_trips), "move_seconds_p50": median(seconds),
        "recompute_ms": recompute_ms, "n_moves": n_moves,
        "bytes_per_move": bytes / n_moves as u64, "extra_gaps_ms": gaps,
    }))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn intervals(arrivals: &[Instant]) -> Vec<f64> {
    arrivals.windows(2).map(|pair| ms(pair[1] - pair[0])).collect()
}

fn longest_interval(arrivals: &[Instant]) -> f64 {
    intervals(arrivals).into_iter().fold(0.0, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
