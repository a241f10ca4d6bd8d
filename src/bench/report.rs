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

        impl $kind {
            /// The keys of `values`, in their order.
            pub const KEYS: [&str; 6] = [
                stringify!($mean), stringify!($std), stringify!($p50), stringify!($p90), stringify!($p95), stringify!($p99),
            ];

            /// Mean, deviation, and the percentiles 50, 90, 95 and 99.
            pub fn values(&self) -> [f64; 6] {
                [self.$mean, self.$std, self.$p50, self.$p90, self.$p95, self.$p99]
            }
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
    /// The API measured: `completions`, `chat`, `baton.v1` or `kserve`.
    pub backend: String,
    /// The same, as `vllm bench serve` names it where it knows it.
    #[serde(default)]
    pub endpoint_type: String,
    /// What the user calls this measurement.
    #[serde(default)]
    pub label: Option<String>,
    /// Tokens are counted by the server, so it is the model's name.
    #[serde(default)]
    pub tokenizer_id: String,
    /// Where the server is.
    #[serde(default)]
    pub server: String,
    /// The model's name.
    pub model_id: String,
    /// Requests sent, warm-up not counted.
    pub num_prompts: usize,
    /// Mean arrivals per second of an open loop, of sessions where they have several turns; of a trace, as it was played.
    /// `"inf"` in a closed loop.
    pub request_rate: RequestRate,
    /// Shape of the gamma distribution of gaps between arrivals, 1 of a Poisson process; null if they have another.
    pub burstiness: Option<f64>,
    /// How requests arrive: closed loop, process or trace.
    #[serde(default)]
    pub arrivals: String,
    /// Sessions in flight of the closed loop.
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
    /// Completed requests per second that met all objectives; null without objectives. `vllm bench serve` means the same.
    pub request_goodput: Option<f64>,
    /// The objectives, such as `ttft:500ms`.
    #[serde(default)]
    pub goodput_objectives: Option<String>,
    /// Requests that met all objectives over all that were sent; a failed one met none. Whether a rate counts towards the
    /// goodput that DistServe means (the highest rate at which a share of 90 % does) is told by this.
    #[serde(default)]
    pub goodput_share: Option<f64>,
    /// Its 95 % interval (Wilson 1927).
    #[serde(default)]
    pub goodput_share_ci95: Option<[f64; 2]>,
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

    /// 95 % intervals of means and percentiles, under the same keys: of resampled requests (Efron's bootstrap), so that the
    /// tokens of one request count as one observation. Absent for fewer than two requests.
    #[serde(default)]
    pub ci95: BTreeMap<String, [f64; 2]>,

    /// Prompt tokens asked for, the mean of all requests.
    pub input_len: usize,
    /// Output tokens asked for, the mean of all requests.
    pub output_len: u32,
    /// Their distributions, or the trace they come from.
    #[serde(default)]
    pub lengths: String,
    /// Requests of a session, each of which repeats what was said before.
    #[serde(default)]
    pub turns: String,
    /// Sessions sent.
    #[serde(default)]
    pub num_sessions: usize,
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
    /// Of the open loop.
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
    /// Number of the session of which it is a turn.
    #[serde(default)]
    pub sessions: Vec<usize>,
    /// Seconds from the benchmark's start.
    pub start_times: Vec<f64>,
    /// Seconds from a request's start to its end.
    #[serde(default)]
    pub latencies: Vec<f64>,
    /// Seconds.
    pub ttfts: Vec<f64>,
    /// Seconds.
    pub itls: Vec<Vec<f64>>,
    /// Empty when the request ended well.
    pub errors: Vec<String>,
    /// Seconds from when a request was due to when it was sent.
    #[serde(default)]
    pub queue_times: Vec<f64>,
    /// What the server answered, where the API says it as text.
    #[serde(default)]
    pub generated_texts: Vec<String>,
}
