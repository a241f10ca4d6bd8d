//! The load generator: sends a workload to a running server, times every token as it arrives, and reports. It measures from
//! outside, over the same API as any client, and works with any OpenAI-compatible or `baton.v1` server.

pub mod compare;
mod endpoint;
mod html;
mod objectives;
mod provenance;
mod random;
pub mod report;
mod runner;
mod samples;
mod server;
mod statistics;
pub mod sweep;
mod table;
pub mod workload;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;

use crate::announce;
use crate::config::{Address, Secret};
use compare::{CompareReport, Round};
pub use endpoint::EndpointKind;
pub use objectives::Objectives;
use report::BenchReport;
use samples::Run;
use server::Target;
use sweep::{Search, SweepOptions, SweepReport};
use workload::{Arrivals, WorkloadSpec};

/// A measurement of more requests than this would keep too many samples in memory.
pub const N_REQUESTS_LIMIT: usize = 10_000_000;

/// What is done with a workload.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// It is sent once.
    Once,
    /// It is sent to both servers in turn.
    Compare {
        /// The second server.
        other: Address,
        /// How often, at least 1.
        n_rounds: u32,
    },
    /// It is sent at several rates; its arrivals are open, and objectives are set.
    Sweep(SweepOptions),
}

/// Everything `baton bench` is told.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// The server, reached by TCP.
    pub server: Address,
    /// Which API.
    pub endpoint: EndpointKind,
    /// The model's name; the server's first when absent.
    pub model: Option<String>,
    /// What is sent.
    pub workload: WorkloadSpec,
    /// Where its trace comes from.
    pub trace_path: Option<PathBuf>,
    /// Once, to two servers, or at several rates.
    pub mode: Mode,
    /// What counts as good.
    pub objectives: Objectives,
    /// Requests sent before, one after the other.
    pub n_warmup: usize,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Sampling temperature; the server's default when absent.
    pub temperature: Option<f64>,
    /// Draw prompt ids below this; asked of the server when absent.
    pub vocab_size: Option<u32>,
    /// Most time for one request.
    pub timeout: Duration,
    /// Shown as a bearer token.
    pub api_key: Option<Secret>,
    /// Print the report as JSON rather than as a table.
    pub json: bool,
    /// Write the report as JSON here.
    pub output: Option<PathBuf>,
    /// Write a page with plots here.
    pub html: Option<PathBuf>,
    /// Put one entry per request into the JSON.
    pub details: bool,
    /// What the user calls this measurement.
    pub label: Option<String>,
    /// The commit to report; found in the working directory when absent.
    pub commit: Option<String>,
}

/// `baton bench`: measures, prints, writes.
///
/// # Errors
/// A server that cannot be asked, a file that cannot be written, or no request that was completed.
pub async fn run(config: BenchConfig) -> anyhow::Result<()> {
    match &config.mode {
        Mode::Once => {
            let (report, run) = measure_run(&config).await?;
            publish(&config, &report, table::single(&report), || html::single(&report, &run))?;
            completed(&[&report])
        }
        Mode::Compare { other, n_rounds } => {
            let (report, runs) = compare(&config, other, *n_rounds).await?;
            publish(&config, &report, table::compare(&report), || {
                html::compare(&report, &runs)
            })?;
            report
                .rounds
                .iter()
                .try_for_each(|round| completed(&[&round.a]).and(completed(&[&round.b])))
        }
        Mode::Sweep(options) => {
            let (report, runs) = sweep(&config, *options).await?;
            publish(&config, &report, table::sweep(&report), || html::sweep(&report, &runs))?;
            completed(&report.points.iter().collect::<Vec<_>>())
        }
    }
}

/// An error if all of `reports` together completed nothing.
fn completed(reports: &[&BenchReport]) -> anyhow::Result<()> {
    let errors = || {
        let counts = reports.iter().flat_map(|report| &report.error_counts);
        counts
            .map(|(kind, n)| format!("{n} {kind}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let n_completed: usize = reports.iter().map(|report| report.completed).sum();
    anyhow::ensure!(n_completed > 0, "no request was completed: {}", errors());
    Ok(())
}

fn publish(
    config: &BenchConfig,
    report: &impl Serialize,
    table: String,
    page: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    let write = |flag: &str, path: &Path, text: String| {
        std::fs::write(path, text).with_context(|| format!("{flag} {}", path.display()))
    };
    if let Some(path) = &config.output {
        write("output", path, format!("{json}\n"))?;
    }
    if let Some(path) = &config.html {
        write("html", path, page())?;
    }
    announce::print(&if config.json { json } else { table });
    Ok(())
}

/// Sends the load once and reports what came back.
///
/// # Errors
/// A server that cannot be asked or does not answer the warm-up.
pub async fn measure(config: &BenchConfig) -> anyhow::Result<BenchReport> {
    Ok(measure_run(config).await?.0)
}

async fn measure_run(config: &BenchConfig) -> anyhow::Result<(BenchReport, Run)> {
    let target = Target::open(config, &config.server).await?;
    send(config, &target, &config.workload).await
}

async fn send(config: &BenchConfig, target: &Target, spec: &WorkloadSpec) -> anyhow::Result<(BenchReport, Run)> {
    let commit = config.commit.clone().or_else(provenance::commit);
    let date = provenance::date(std::time::SystemTime::now());
    let run = runner::run(target, spec, config.n_warmup).await?;
    Ok((run.report(config, target, spec, date, commit), run))
}

/// The workload with prompts that no other round has, so that no round finds those of another in a prefix cache.
fn of_round(spec: &WorkloadSpec, round: u64) -> WorkloadSpec {
    WorkloadSpec {
        seed: spec.seed.wrapping_add(round),
        ..spec.clone()
    }
}

async fn compare(
    config: &BenchConfig,
    other: &Address,
    n_rounds: u32,
) -> anyhow::Result<(CompareReport, [Vec<Run>; 2])> {
    let a = Target::open(config, &config.server).await?;
    let mut b = Target::open(config, other).await?;
    if config.endpoint.needs_vocabulary() {
        anyhow::ensure!(
            a.vocabulary.len() == b.vocabulary.len(),
            "the servers have vocabularies of {} and {} tokens; give both the same prompts with --vocab-size",
            a.vocabulary.len(),
            b.vocabulary.len()
        );
        b.vocabulary = a.vocabulary.clone();
    }
    let (mut rounds, mut runs) = (Vec::new(), [Vec::new(), Vec::new()]);
    for round in 0..n_rounds {
        let spec = of_round(&config.workload, round.into());
        let (report_a, run_a) = send(config, &a, &spec).await?;
        let (report_b, run_b) = send(config, &b, &spec).await?;
        rounds.push(Round {
            a: report_a,
            b: report_b,
        });
        runs[0].push(run_a);
        runs[1].push(run_b);
    }
    Ok((
        CompareReport::new(a.address.to_string(), b.address.to_string(), rounds),
        runs,
    ))
}

async fn sweep(config: &BenchConfig, options: SweepOptions) -> anyhow::Result<(SweepReport, Vec<Run>)> {
    let Arrivals::Open { process, .. } = config.workload.arrivals else {
        anyhow::bail!("a sweep needs an arrival process");
    };
    let target = Target::open(config, &config.server).await?;
    let mut search = Search::new(options);
    let (mut points, mut runs) = (Vec::new(), Vec::new());
    while let Some(rate) = search.next_rate() {
        let lasting = (rate * options.point_seconds).ceil() as usize;
        let most = config
            .workload
            .trace
            .as_ref()
            .map_or(N_REQUESTS_LIMIT, |trace| trace.len());
        let spec = WorkloadSpec {
            n_requests: config.workload.n_requests.max(lasting).min(most),
            arrivals: Arrivals::Open { rate, process },
            ..of_round(&config.workload, points.len() as u64)
        };
        let (report, run) = send(config, &target, &spec).await?;
        search.record(rate, run.share_met(&config.objectives) >= options.attainment);
        points.push(report);
        runs.push(run);
    }
    let report = SweepReport {
        kind: "sweep".into(),
        goodput_objectives: config.objectives.to_string(),
        attainment: options.attainment,
        goodput_rate: search.highest_met(),
        lowest_rate_missed: search.lowest_missed(),
        points,
    };
    Ok((report, runs))
}

#[cfg(test)]
mod tests;
