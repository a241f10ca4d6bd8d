//! The JSON of a benchmark: one flat object with the keys of `vllm bench serve`, so that the same tools read both, and ours
//! for what makes a number worth keeping: command, commit, machine. Append only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::statistics::Summary;

macro_rules! latency_keys {
    ($($(#[$doc:meta])* $kind:ident { $mean:ident $median:ident $std:ident $p50:ident $p90:ident $p95:ident $p99:ident })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct $kind {
            /// Arithmetic mean.
            pub $mean: f64,
            /// Median, the same as p50.
            pub $median: f64,
            /// Standard deviation of the population.
            pub $std: f64,
            /// 50th percentile.
            pub $p50: f64,
            /// 90th percentile.
            pub $p90: f64,
            /// 95th percentile.
            pub $p95: f64,
            /// 99th percentile.
            pub $p99: f64,
        }

        impl From<Summary> for $kind {
            fn from(summary: Summary) -> Self {
                $kind {
                    $mean: summary.mean,
                    $median: summary.p50,
                    $std: summary.std,
                    $p50: summary.p50,
                    $p90: summary.p90,
                    $p95: summary.p95,
                    $p99: summary.p99,
                }
            }
        }
    )*};
}

latency_keys! {
    /// Time to first token, in milliseconds: from sending a request to its first token's event.
    TtftMs { mean_ttft_ms median_ttft_ms std_ttft_ms p50_ttft_ms p90_ttft_ms p95_ttft_ms p99_ttft_ms }
    /// Time per output token after the first, in milliseconds: one value per request of at least two tokens.
    TpotMs { mean_tpot_ms median_tpot_ms std_tpot_ms p50_tpot_ms p90_tpot_ms p95_tpot_ms p99_tpot_ms }
    /// Time between two token events, in milliseconds: one value per pair.
    ItlMs { mean_itl_ms median_itl_ms std_itl_ms p50_itl_ms p90_itl_ms p95_itl_ms p99_itl_ms }
    /// Time from sending a request to its last token's event, in milliseconds.
    E2elMs { mean_e2el_ms median_e2el_ms std_e2el_ms p50_e2el_ms p90_e2el_ms p95_e2el_ms p99_e2el_ms }
}

/// What a benchmark measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// When it began, UTC: `20260131-235959`.
    pub date: String,
    /// The API measured: `completions` or `chat`.
    pub backend: String,
    /// The model's name.
    pub model_id: String,
    /// Requests sent, warm-up not counted.
    pub num_prompts: usize,
    /// Requests per second of the Poisson process; `"inf"` in a closed loop.
    pub request_rate: RequestRate,
    /// 1: gaps are exponential.
    pub burstiness: f64,
    /// Requests in flight of the closed loop.
    pub max_concurrency: Option<usize>,
    /// Seconds from the first request's start to the last one's end.
    pub duration: f64,
    /// Requests that ended well.
    pub completed: usize,
    /// Requests that did not.
    pub failed: usize,
    /// Prompt tokens of completed requests, as the server counted them.
    pub total_input_tokens: u64,
    /// Generated tokens of completed requests, as the server counted them.
    pub total_output_tokens: u64,
    /// Completed requests per second.
    pub request_throughput: f64,
    /// Completed requests per second within a latency goal; none is set.
    pub request_goodput: Option<f64>,
    /// Generated tokens per second.
    pub output_throughput: f64,
    /// Prompt and generated tokens per second.
    pub total_token_throughput: f64,
    /// Token events of the fullest second.
    pub max_output_tokens_per_s: f64,
    /// Most requests in flight at one time.
    pub max_concurrent_requests: usize,
    /// Time to first token.
    #[serde(flatten)]
    pub ttft: TtftMs,
    /// Time per output token.
    #[serde(flatten)]
    pub tpot: TpotMs,
    /// Inter-token latency.
    #[serde(flatten)]
    pub itl: ItlMs,
    /// End-to-end latency.
    #[serde(flatten)]
    pub e2el: E2elMs,

    /// Prompt tokens asked for.
    pub input_len: usize,
    /// Output tokens asked for.
    pub output_len: u32,
    /// Prompt tokens that all requests share.
    pub prefix_len: usize,
    /// Prompt tokens that a prefix cache held, as the server counted them.
    pub total_cached_tokens: u64,
    /// Completed requests whose output was shorter or longer than asked for.
    pub wrong_length: usize,
    /// The latest any request started after its time: a large value means that the load generator was the bottleneck.
    pub max_start_delay_ms: f64,
    /// Requests sent before measuring.
    pub num_warmup: usize,
    /// The seed of prompts and arrivals.
    pub seed: u64,
    /// Failures by kind.
    pub error_counts: BTreeMap<String, usize>,
    /// The command line, keys left out.
    pub command: String,
    /// The commit of the working directory; `-dirty` when it has changes.
    pub commit: Option<String>,
    /// The version of this program.
    pub baton_version: String,
    /// Where the load generator ran.
    pub machine: MachineReport,
    /// One entry per request, when asked for.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

/// Requests per second, as other tools write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RequestRate {
    /// Of the Poisson process.
    PerSecond(f64),
    /// `"inf"`: no pause between arrivals.
    Unlimited(String),
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineReport {
    /// The processor's name.
    pub cpu: String,
    /// Cores this process may use.
    pub n_cores: usize,
    /// Memory of the machine, in bytes.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
}

/// Raw data, one entry per request in the order of their indexes; failed requests have zeros.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Details {
    /// Prompt tokens.
    pub input_lens: Vec<u64>,
    /// Generated tokens.
    pub output_lens: Vec<u64>,
    /// Seconds from the benchmark's start.
    pub start_times: Vec<f64>,
    /// Seconds.
    pub ttfts: Vec<f64>,
    /// Seconds.
    pub itls: Vec<Vec<f64>>,
    /// Empty when the request ended well.
    pub errors: Vec<String>,
}
