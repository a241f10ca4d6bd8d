//! A running `baton serve` and clients that time its tokens, for the benches that measure whole clusters.

#![allow(dead_code, reason = "each bench uses its part")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use baton_proto::cluster::operator_client::OperatorClient;
use baton_proto::cluster::{ListInstancesRequest, ListRequestsRequest, MoveOneRequest, MoveOneResponse, RequestStatus};
use futures::StreamExt as _;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for tokens that should come.
const PATIENCE: Duration = Duration::from_secs(300);

/// Writes the configuration of a thin random model: layers, heads and head size of Llama-3.2-1B, so its KV; few and narrow
/// weights, so that a step is mostly attention at long contexts and some tens of milliseconds at short ones.
pub fn write_thin_model(folder: &Path) -> anyhow::Result<()> {
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

/// Of [`write_thin_model`].
pub const KV_BYTES_PER_TOKEN: u64 = 16 * 8 * 64 * 2 * 2;

/// Prompt ids of the thin model, other ones for each `seed`.
pub fn prompt(n_tokens: u32, seed: u32) -> Vec<u32> {
    let id = |i: u32| 10 + (i.wrapping_add(seed << 16).wrapping_mul(2_654_435_761) >> 8) % 2000;
    (0..n_tokens).map(id).collect()
}

/// `baton serve`, ended on drop.
pub struct Cluster {
    process: Child,
    pub url: String,
    pub http: reqwest::Client,
    pub operator: OperatorClient<Channel>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

impl Cluster {
    /// Random weights on one thread an instance; `arguments` say the rest.
    pub fn start(model: &Path, arguments: &[&str]) -> anyhow::Result<Cluster> {
        // Another build of the program may be measured with the same clients.
        let program = std::env::var_os("BATON").unwrap_or_else(|| env!("CARGO_BIN_EXE_baton").into());
        let mut command = Command::new(program);
        command
            .args(["serve", "--port", "0", "--threads", "1", "--load-format", "dummy"])
            .args(["--log-level", "error", "--model"])
            .arg(model)
            .args(arguments)
            .stdout(Stdio::piped());
        let mut process = command.spawn().context("starting baton serve")?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready: ")));
        let line = line.context("baton serve ended before it was ready")?;
        let url = line.rsplit(' ').next().unwrap_or_default().to_owned();
        std::thread::spawn(move || lines.count());
        let operator = OperatorClient::new(Endpoint::from_shared(url.clone())?.connect_lazy());
        Ok(Cluster {
            process,
            url,
            http: reqwest::Client::new(),
            operator,
        })
    }

    /// Sum of a counter over the instances, as of their latest reports.
    pub async fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let instances = self.operator.clone().list_instances(ListInstancesRequest {}).await?;
        let statuses = instances.into_inner().instances.into_iter();
        let loads = statuses.filter_map(|status| status.load);
        Ok(loads.filter_map(|load| load.counters.get(name).copied()).sum())
    }

    /// Sum of the front door's series whose names and labels begin so.
    pub async fn metric(&self, beginning: &str) -> anyhow::Result<f64> {
        let text = self
            .http
            .get(format!("{}/metrics", self.url))
            .send()
            .await?
            .text()
            .await?;
        let values = text.lines().filter(|line| line.starts_with(beginning));
        let values = values.map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<f64>());
        values
            .sum::<Result<f64, _>>()
            .with_context(|| format!("{beginning} in the metrics"))
    }

    pub async fn requests(&self) -> anyhow::Result<Vec<RequestStatus>> {
        let mut operator = self.operator.clone();
        Ok(operator
            .list_requests(ListRequestsRequest {})
            .await?
            .into_inner()
            .requests)
    }

    /// Moves a request, by its identity or label, where the policy likes; answers when that has settled.
    pub async fn move_one(&self, request_id: &str) -> anyhow::Result<MoveOneResponse> {
        let wanted = MoveOneRequest {
            request_id: request_id.to_owned(),
            to: String::new(),
        };
        Ok(self
            .operator
            .clone()
            .move_one(wanted)
            .await
            .context("moving")?
            .into_inner())
    }

    /// Sends a streamed completion of `prompt` and stamps its tokens as they come.
    pub async fn complete(&self, label: &str, prompt: &[u32], n_tokens: u32) -> anyhow::Result<TokenStream> {
        let body = json!({
            "prompt": prompt, "max_tokens": n_tokens, "ignore_eos": true, "stream": true, "temperature": 0
        });
        let sent_at = Instant::now();
        let request = self
            .http
            .post(format!("{}/v1/completions", self.url))
            .header("x-request-id", label);
        let response = request.json(&body).send().await?;
        ensure!(response.status() == 200, "{}", response.text().await?);
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let stamped = Arc::clone(&arrivals);
        let reading = tokio::spawn(async move {
            let mut chunks = response.bytes_stream();
            while let Some(Ok(chunk)) = chunks.next().await {
                let now = Instant::now();
                let n_events = chunk.windows(7).filter(|window| window == b"data: {").count();
                stamped.lock().extend(std::iter::repeat_n(now, n_events));
            }
        });
        Ok(TokenStream {
            sent_at,
            arrivals,
            reading,
        })
    }
}

/// A request whose tokens are stamped as they come. Its drop ends it.
pub struct TokenStream {
    pub sent_at: Instant,
    arrivals: Arc<Mutex<Vec<Instant>>>,
    reading: JoinHandle<()>,
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl TokenStream {
    /// When each token came.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.arrivals.lock().clone()
    }

    pub fn n_tokens(&self) -> usize {
        self.arrivals.lock().len()
    }

    pub async fn has_tokens(&self, n: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.n_tokens() < n {
            if self.reading.is_finished() && self.n_tokens() < n || began.elapsed() > PATIENCE {
                bail!("the stream has {} tokens, expected {n}", self.n_tokens());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// To the end of the stream.
    pub async fn ended(&mut self) -> anyhow::Result<()> {
        tokio::time::timeout(PATIENCE, &mut self.reading)
            .await
            .context("the stream does not end")??;
        Ok(())
    }

    pub fn time_to_first_token(&self) -> Option<Duration> {
        Some(*self.arrivals.lock().first()? - self.sent_at)
    }
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// In milliseconds.
pub fn intervals(arrivals: &[Instant]) -> Vec<f64> {
    arrivals.windows(2).map(|pair| ms(pair[1] - pair[0])).collect()
}

/// The value below which this share of the values lies; NaN of none.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

pub fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// Writes what was measured, with the machine's load.
pub fn write_report(path: &Path, bench: &str, rows: &[Value]) -> anyhow::Result<()> {
    let report = json!({
        "bench": bench, "kv_bytes_per_token": KV_BYTES_PER_TOKEN, "rows": rows,
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    });
    std::fs::write(path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())
}
