//! The load generator: sends a workload to a running server, times every token as it arrives, and reports. It measures from
//! outside, over the same API as any client, and works with any OpenAI-compatible server.

mod provenance;
mod random;
pub mod report;
mod request;
mod runner;
mod server;
mod sse;
mod statistics;
mod workload;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use crate::announce;
use crate::config::{Address, Secret};
use report::BenchReport;
pub use workload::{Arrivals, EndpointKind};

/// Everything `baton bench` is told.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// The server, reached by TCP.
    pub server: Address,
    /// Which API.
    pub endpoint: EndpointKind,
    /// The model's name; the server's first when absent.
    pub model: Option<String>,
    /// How requests arrive.
    pub arrivals: Arrivals,
    /// Requests measured, at least 1.
    pub n_prompts: usize,
    /// Requests sent before, one after the other.
    pub n_warmup: usize,
    /// Tokens (chat: words) of each prompt, at least 1.
    pub input_len: usize,
    /// Leading ones that all prompts share, at most `input_len`.
    pub prefix_len: usize,
    /// Tokens to generate.
    pub output_len: u32,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Sampling temperature; the server's default when absent.
    pub temperature: Option<f64>,
    /// Draw prompt ids below this; asked of the server when absent.
    pub vocab_size: Option<u32>,
    /// Seed of prompts and arrivals.
    pub seed: u64,
    /// Most time for one request.
    pub timeout: Duration,
    /// Shown as a bearer token.
    pub api_key: Option<Secret>,
    /// Print the report as JSON rather than as a table.
    pub json: bool,
    /// Write the report as JSON here.
    pub output: Option<PathBuf>,
    /// Put one entry per request into the JSON.
    pub details: bool,
    /// The commit to report; found in the working directory when absent.
    pub commit: Option<String>,
}

/// `baton bench`: measures, prints, writes. An error if no request was completed.
pub async fn run(config: BenchConfig) -> anyhow::Result<()> {
    let report = measure(&config).await?;
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &config.output {
        std::fs::write(path, format!("{json}\n")).with_context(|| format!("output {}", path.display()))?;
    }
    announce::print(&if config.json { json } else { table(&report) });
    let errors = || {
        report
            .error_counts
            .iter()
            .map(|(kind, n)| format!("{n} {kind}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    anyhow::ensure!(report.completed > 0, "no request was completed: {}", errors());
    Ok(())
}

/// Sends the load and reports what came back.
pub async fn measure(config: &BenchConfig) -> anyhow::Result<BenchReport> {
    let commit = config.commit.clone().or_else(provenance::commit);
    let date = provenance::date(std::time::SystemTime::now());
    let workload = server::workload(config).await?;
    let run = runner::run(config, &workload).await?;
    Ok(run.report(config, &workload, date, commit))
}

fn table(report: &BenchReport) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<34}{value:>14}");
    };
    line("completed requests", report.completed.to_string());
    line("failed requests", report.failed.to_string());
    for (kind, count) in &report.error_counts {
        line(&format!("  {kind}"), count.to_string());
    }
    if report.wrong_length > 0 {
        line("outputs of another length", report.wrong_length.to_string());
    }
    line("duration (s)", format!("{:.2}", report.duration));
    line("prompt tokens", report.total_input_tokens.to_string());
    line("  of them cached", report.total_cached_tokens.to_string());
    line("generated tokens", report.total_output_tokens.to_string());
    line("requests per second", format!("{:.3}", report.request_throughput));
    line(
        "generated tokens per second",
        format!("{:.2}", report.output_throughput),
    );
    line("tokens per second", format!("{:.2}", report.total_token_throughput));
    line("most requests in flight", report.max_concurrent_requests.to_string());
    line("latest start (ms)", format!("{:.2}", report.max_start_delay_ms));
    let _ = writeln!(
        text,
        "\n{:<6}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "ms", "mean", "std", "p50", "p90", "p95", "p99"
    );
    let BenchReport {
        ttft, tpot, itl, e2el, ..
    } = report;
    for (name, values) in [
        (
            "TTFT",
            [
                ttft.mean_ttft_ms,
                ttft.std_ttft_ms,
                ttft.p50_ttft_ms,
                ttft.p90_ttft_ms,
                ttft.p95_ttft_ms,
                ttft.p99_ttft_ms,
            ],
        ),
        (
            "TPOT",
            [
                tpot.mean_tpot_ms,
                tpot.std_tpot_ms,
                tpot.p50_tpot_ms,
                tpot.p90_tpot_ms,
                tpot.p95_tpot_ms,
                tpot.p99_tpot_ms,
            ],
        ),
        (
            "ITL",
            [
                itl.mean_itl_ms,
                itl.std_itl_ms,
                itl.p50_itl_ms,
                itl.p90_itl_ms,
                itl.p95_itl_ms,
                itl.p99_itl_ms,
            ],
        ),
        (
            "E2E",
            [
                e2el.mean_e2el_ms,
                e2el.std_e2el_ms,
                e2el.p50_e2el_ms,
                e2el.p90_e2el_ms,
                e2el.p95_e2el_ms,
                e2el.p99_e2el_ms,
            ],
        ),
    ] {
        let _ = write!(text, "{name:<6}");
        for value in values {
            let _ = write!(text, "{value:>10.2}");
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests;
