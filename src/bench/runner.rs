//! Sends the requests of a workload when they are due, and turns what came back into a report.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;

use super::BenchConfig;
use super::provenance;
use super::report::{BenchReport, Details, RequestRate};
use super::request::{Completion, LoadClient, RequestFailure};
use super::statistics::{Summary, max_overlap};
use super::workload::{Arrivals, Workload};

/// Warm-up prompts come from here, so that no measured prompt is in a prefix cache because of them.
const WARMUP_INDEX: u64 = 1 << 40;

/// One measured request.
#[derive(Clone, Debug)]
struct Sample {
    /// When it was sent, from the benchmark's start.
    started: Duration,
    /// How much later than it was due.
    delay: Duration,
    /// When its last byte came, from the benchmark's start.
    ended: Duration,
    outcome: Result<Completion, RequestFailure>,
}

/// A finished benchmark: one sample per request, in the order of their indexes.
pub struct Run {
    samples: Vec<Sample>,
}

/// Warms up, then sends the workload.
pub async fn run(config: &BenchConfig, workload: &Workload) -> anyhow::Result<Run> {
    let url = format!("http://{}{}", config.server, workload.endpoint.path());
    let client = LoadClient::new(url, config.api_key.as_ref(), config.timeout)?;
    for index in 0..config.n_warmup as u64 {
        let body = Bytes::from(workload.body(WARMUP_INDEX + index).to_string());
        client
            .send(body, Instant::now())
            .await
            .with_context(|| format!("server {}: warm-up request", config.server))?;
    }
    // Bodies are made before the clock starts: making them is not what is measured.
    let bodies: Arc<[Bytes]> = (0..config.n_prompts as u64)
        .map(|index| workload.body(index).to_string().into())
        .collect();
    let progress = ProgressBar::new(config.n_prompts as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {elapsed_precise}, {per_sec}")
            .context("progress bar")?,
    );
    let mut samples = match config.arrivals {
        Arrivals::Closed { concurrency } => closed(&client, bodies, concurrency, &progress).await?,
        Arrivals::Open { rate } => open(&client, bodies, workload.poisson(rate, config.n_prompts), &progress).await?,
    };
    progress.finish_and_clear();
    samples.sort_by_key(|(index, _)| *index);
    Ok(Run {
        samples: samples.into_iter().map(|(_, sample)| sample).collect(),
    })
}

/// Sends request `index`, due at `due` after `origin`.
async fn sample(client: &LoadClient, body: Bytes, origin: Instant, due: Duration) -> Sample {
    let now = Instant::now();
    let outcome = client.send(body, now).await;
    let started = now - origin;
    Sample {
        started,
        delay: started.saturating_sub(due),
        ended: origin.elapsed(),
        outcome,
    }
}

async fn closed(
    client: &LoadClient,
    bodies: Arc<[Bytes]>,
    concurrency: usize,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<(usize, Sample)>> {
    let next = Arc::new(AtomicUsize::new(0));
    let origin = Instant::now();
    let mut lanes = JoinSet::new();
    for _ in 0..concurrency.min(bodies.len()) {
        let (client, bodies, next, progress) = (client.clone(), bodies.clone(), next.clone(), progress.clone());
        lanes.spawn(async move {
            let mut samples = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(body) = bodies.get(index) else { return samples };
                // In a closed loop a request is due when the one before it has ended.
                let due = origin.elapsed();
                samples.push((index, sample(&client, body.clone(), origin, due).await));
                progress.inc(1);
            }
        });
    }
    let mut samples = Vec::with_capacity(bodies.len());
    while let Some(lane) = lanes.join_next().await {
        samples.extend(lane.context("a lane of the load generator panicked")?);
    }
    Ok(samples)
}

async fn open(
    client: &LoadClient,
    bodies: Arc<[Bytes]>,
    starts: Vec<Duration>,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<(usize, Sample)>> {
    let origin = Instant::now();
    let mut requests = JoinSet::new();
    for (index, due) in starts.into_iter().enumerate() {
        tokio::time::sleep_until((origin + due).into()).await;
        let (client, body, progress) = (client.clone(), bodies[index].clone(), progress.clone());
        requests.spawn(async move {
            let sample = sample(&client, body, origin, due).await;
            progress.inc(1);
            (index, sample)
        });
    }
    let mut samples = Vec::with_capacity(bodies.len());
    while let Some(request) = requests.join_next().await {
        samples.push(request.context("a request of the load generator panicked")?);
    }
    Ok(samples)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Run {
    /// The report of this run.
    pub fn report(
        &self,
        config: &BenchConfig,
        workload: &Workload,
        date: String,
        commit: Option<String>,
    ) -> BenchReport {
        let completions: Vec<(&Sample, &Completion)> = self
            .samples
            .iter()
            .filter_map(|sample| Some((sample, sample.outcome.as_ref().ok()?)))
            .collect();
        let sum =
            |count: fn(&Completion) -> u64| completions.iter().map(|(_, completion)| count(completion)).sum::<u64>();
        let (n_input, n_output) = (sum(|c| c.n_input_tokens), sum(|c| c.n_output_tokens));
        let first_start = self
            .samples
            .iter()
            .map(|sample| sample.started)
            .min()
            .unwrap_or_default();
        let last_end = self.samples.iter().map(|sample| sample.ended).max().unwrap_or_default();
        // A run shorter than the clock can see has no rate.
        let duration = (last_end - first_start).as_secs_f64().max(f64::MIN_POSITIVE);
        let per_second = |count: f64| count / duration;

        let times = |completion: &Completion| completion.token_times.clone();
        let ttft = completions
            .iter()
            .filter_map(|(_, c)| times(c).first().copied().map(ms))
            .collect();
        let e2el = completions
            .iter()
            .filter_map(|(_, c)| times(c).last().copied().map(ms))
            .collect();
        let itl = completions.iter().flat_map(|(_, c)| gaps(c)).map(ms).collect();
        let tpot = completions.iter().filter_map(|(_, c)| {
            let generating = *c.token_times.last()? - *c.token_times.first()?;
            (c.n_output_tokens > 1).then(|| ms(generating) / (c.n_output_tokens - 1) as f64)
        });

        let mut error_counts = BTreeMap::new();
        for failure in self.samples.iter().filter_map(|sample| sample.outcome.as_ref().err()) {
            *error_counts.entry(failure.kind()).or_insert(0) += 1;
        }
        let intervals: Vec<(f64, f64)> = self
            .samples
            .iter()
            .map(|sample| (sample.started.as_secs_f64(), sample.ended.as_secs_f64()))
            .collect();
        let (request_rate, max_concurrency) = match config.arrivals {
            Arrivals::Closed { concurrency } => (RequestRate::Unlimited("inf".into()), Some(concurrency)),
            Arrivals::Open { rate } if rate.is_finite() => (RequestRate::PerSecond(rate), None),
            Arrivals::Open { .. } => (RequestRate::Unlimited("inf".into()), None),
        };
        BenchReport {
            date,
            backend: workload
                .endpoint
                .path()
                .trim_start_matches("/v1/")
                .split('/')
                .next()
                .unwrap_or_default()
                .to_owned(),
            model_id: workload.model.clone(),
            num_prompts: self.samples.len(),
            request_rate,
            burstiness: 1.0,
            max_concurrency,
            duration,
            completed: completions.len(),
            failed: self.samples.len() - completions.len(),
            total_input_tokens: n_input,
            total_output_tokens: n_output,
            request_throughput: per_second(completions.len() as f64),
            request_goodput: None,
            output_throughput: per_second(n_output as f64),
            total_token_throughput: per_second((n_input + n_output) as f64),
            max_output_tokens_per_s: fullest_second(&completions),
            max_concurrent_requests: max_overlap(&intervals),
            ttft: Summary::of(ttft).into(),
            tpot: Summary::of(tpot.collect()).into(),
            itl: Summary::of(itl).into(),
            e2el: Summary::of(e2el).into(),
            input_len: config.input_len,
            output_len: config.output_len,
            prefix_len: config.prefix_len,
            total_cached_tokens: sum(|c| c.n_cached_tokens),
            wrong_length: completions
                .iter()
                .filter(|(_, c)| c.n_output_tokens != u64::from(config.output_len))
                .count(),
            max_start_delay_ms: self.samples.iter().map(|sample| ms(sample.delay)).fold(0.0, f64::max),
            num_warmup: config.n_warmup,
            seed: config.seed,
            error_counts,
            command: provenance::command(std::env::args()),
            commit,
            baton_version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: provenance::machine(),
            details: config.details.then(|| self.details()),
        }
    }

    fn details(&self) -> Details {
        let mut details = Details::default();
        for sample in &self.samples {
            let completion = sample.outcome.as_ref().ok();
            details.input_lens.push(completion.map_or(0, |c| c.n_input_tokens));
            details.output_lens.push(completion.map_or(0, |c| c.n_output_tokens));
            details.start_times.push(sample.started.as_secs_f64());
            let first = completion.and_then(|c| c.token_times.first().copied());
            details.ttfts.push(first.unwrap_or_default().as_secs_f64());
            details.itls.push(
                completion
                    .into_iter()
                    .flat_map(gaps)
                    .map(|gap| gap.as_secs_f64())
                    .collect(),
            );
            details.errors.push(
                sample
                    .outcome
                    .as_ref()
                    .err()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            );
        }
        details
    }
}

fn gaps(completion: &Completion) -> impl Iterator<Item = Duration> {
    completion.token_times.windows(2).map(|pair| pair[1] - pair[0])
}

/// Token events of the fullest whole second since the start.
fn fullest_second(completions: &[(&Sample, &Completion)]) -> f64 {
    let mut per_second: BTreeMap<u64, u64> = BTreeMap::new();
    for (sample, completion) in completions {
        for time in &completion.token_times {
            *per_second.entry((sample.started + *time).as_secs()).or_default() += 1;
        }
    }
    per_second.values().copied().max().unwrap_or(0) as f64
}
