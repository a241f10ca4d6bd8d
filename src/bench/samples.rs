//! What came back from a run, request by request, and the report made of it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::BenchConfig;
use super::endpoint::{Completion, RequestFailure};
use super::objectives::Objectives;
use super::provenance;
use super::report::{BenchReport, Details, E2elMs, ItlMs, RequestRate, TpotMs, TtftMs};
use super::server::Target;
use super::statistics::{Summary, intervals, max_overlap, wilson};
use super::workload::{Arrivals, WorkloadSpec};

/// One measured request.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its number among all requests.
    pub index: usize,
    /// The number of its session.
    pub session: usize,
    /// Prompt tokens asked for.
    pub input_len: u64,
    /// Output tokens asked for.
    pub output_len: u32,
    /// When it was sent, from the benchmark's start.
    pub started: Duration,
    /// How much later than it was due.
    pub delay: Duration,
    /// When its last byte came, from the benchmark's start.
    pub ended: Duration,
    /// What came of it.
    pub outcome: Result<Completion, RequestFailure>,
}

/// A finished measurement.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// One per request, in the order of their indexes.
    pub samples: Vec<Sample>,
    /// Sessions sent.
    pub n_sessions: usize,
}

/// In milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Run {
    /// The requests that ended well.
    pub fn completions(&self) -> impl Iterator<Item = (&Sample, &Completion)> {
        self.samples
            .iter()
            .filter_map(|sample| Some((sample, sample.outcome.as_ref().ok()?)))
    }

    /// How many met all `objectives`; a request that failed met none.
    pub fn n_met(&self, objectives: &Objectives) -> usize {
        self.completions()
            .filter(|(_, completion)| objectives.are_met_by(completion))
            .count()
    }

    /// Share of all requests that met all `objectives`.
    pub fn share_met(&self, objectives: &Objectives) -> f64 {
        self.n_met(objectives) as f64 / self.samples.len().max(1) as f64
    }

    /// The report of this run of `spec` against `target`.
    pub fn report(
        &self,
        config: &BenchConfig,
        target: &Target,
        spec: &WorkloadSpec,
        date: String,
        commit: Option<String>,
    ) -> BenchReport {
        let n_completed = self.completions().count();
        let sum = |count: fn(&Completion) -> u64| self.completions().map(|(_, c)| count(c)).sum::<u64>();
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

        let mut ci95 = BTreeMap::new();
        let mut summary = |keys: [&'static str; 6], values: fn(&Completion) -> Vec<f64>| {
            let groups: Vec<Vec<f64>> = self.completions().map(|(_, completion)| values(completion)).collect();
            if let Some(found) = intervals(&groups, spec.seed) {
                let [p50, p90, p95, p99] = found.percentiles;
                let [mean_key, _, p50_key, p90_key, p95_key, p99_key] = keys;
                for (key, interval) in [
                    (mean_key, found.mean),
                    (p50_key, p50),
                    (p90_key, p90),
                    (p95_key, p95),
                    (p99_key, p99),
                ] {
                    ci95.insert(key.to_owned(), interval);
                }
            }
            Summary::of(groups.into_iter().flatten().collect())
        };
        let ttft = summary(TtftMs::KEYS, |c| vec![ms(c.ttft())]);
        let tpot = summary(TpotMs::KEYS, |c| c.tpot().map(ms).into_iter().collect());
        let itl = summary(ItlMs::KEYS, |c| c.gaps().map(ms).collect());
        let e2el = summary(E2elMs::KEYS, |c| vec![ms(c.e2e())]);

        let mut error_counts = BTreeMap::new();
        for failure in self.samples.iter().filter_map(|sample| sample.outcome.as_ref().err()) {
            *error_counts.entry(failure.kind()).or_insert(0) += 1;
        }
        let spans: Vec<(f64, f64)> = self
            .samples
            .iter()
            .map(|sample| (sample.started.as_secs_f64(), sample.ended.as_secs_f64()))
            .collect();
        let objectives = Some(config.objectives).filter(Objectives::is_set);
        let n_met = objectives.map(|objectives| self.n_met(&objectives));
        let mean = |length: fn(&Sample) -> u64| {
            let n_samples = self.samples.len().max(1) as u64;
            (self.samples.iter().map(length).sum::<u64>() + n_samples / 2) / n_samples
        };
        BenchReport {
            date,
            backend: config.endpoint.as_str().to_owned(),
            endpoint_type: config.endpoint.endpoint_type().to_owned(),
            label: config.label.clone(),
            model_id: target.model.clone(),
            tokenizer_id: target.model.clone(),
            server: target.address.to_string(),
            num_prompts: self.samples.len(),
            request_rate: request_rate(spec, self.n_sessions),
            burstiness: match spec.arrivals {
                Arrivals::Open { process, .. } => process.burstiness(),
                Arrivals::Closed { .. } => Some(1.0),
                Arrivals::Recorded { .. } => None,
            },
            arrivals: spec.arrivals.to_string(),
            max_concurrency: match spec.arrivals {
                Arrivals::Closed { concurrency } => Some(concurrency),
                Arrivals::Open { .. } | Arrivals::Recorded { .. } => None,
            },
            duration,
            completed: n_completed,
            failed: self.samples.len() - n_completed,
            total_input_tokens: n_input,
            total_output_tokens: n_output,
            request_throughput: per_second(n_completed as f64),
            request_goodput: n_met.map(|n_met| per_second(n_met as f64)),
            goodput_objectives: objectives.map(|objectives| objectives.to_string()),
            goodput_share: objectives.map(|objectives| self.share_met(&objectives)),
            goodput_share_ci95: n_met.and_then(|n_met| wilson(n_met, self.samples.len())),
            output_throughput: per_second(n_output as f64),
            total_token_throughput: per_second((n_input + n_output) as f64),
            max_output_tokens_per_s: self.tokens_per_second().into_iter().max().unwrap_or(0) as f64,
            max_concurrent_requests: max_overlap(&spans),
            ttft: ttft.into(),
            tpot: tpot.into(),
            itl: itl.into(),
            e2el: e2el.into(),
            ci95,
            input_len: usize::try_from(mean(|sample| sample.input_len)).unwrap_or(usize::MAX),
            output_len: u32::try_from(mean(|sample| sample.output_len.into())).unwrap_or(u32::MAX),
            lengths: match &config.trace_path {
                Some(path) => format!("trace {}", path.display()),
                None => format!("in {}, out {}", spec.input, spec.output),
            },
            turns: spec.turns.to_string(),
            num_sessions: self.n_sessions,
            prefix_len: spec.prefix_len as usize,
            total_cached_tokens: sum(|c| c.n_cached_tokens),
            wrong_length: self
                .completions()
                .filter(|(sample, c)| c.n_output_tokens != u64::from(sample.output_len))
                .count(),
            max_start_delay_ms: self.samples.iter().map(|sample| ms(sample.delay)).fold(0.0, f64::max),
            num_warmup: config.n_warmup,
            seed: spec.seed,
            error_counts,
            command: provenance::command(std::env::args()),
            commit,
            baton_version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: provenance::machine(),
            details: config.details.then(|| self.details()),
        }
    }

    /// Token events of each whole second since the start.
    pub fn tokens_per_second(&self) -> Vec<u64> {
        let mut per_second = Vec::new();
        for (sample, completion) in self.completions() {
            for time in &completion.token_times {
                let second = (sample.started + *time).as_secs() as usize;
                if per_second.len() <= second {
                    per_second.resize(second + 1, 0);
                }
                per_second[second] += 1;
            }
        }
        per_second
    }

    fn details(&self) -> Details {
        let mut details = Details::default();
        for sample in &self.samples {
            let completion = sample.outcome.as_ref().ok();
            details.input_lens.push(completion.map_or(0, |c| c.n_input_tokens));
            details.output_lens.push(completion.map_or(0, |c| c.n_output_tokens));
            details.sessions.push(sample.session);
            details.start_times.push(sample.started.as_secs_f64());
            details.ttfts.push(completion.map_or(0.0, |c| c.ttft().as_secs_f64()));
            details
                .latencies
                .push(completion.map_or(0.0, |c| c.e2e().as_secs_f64()));
            let gaps = completion.into_iter().flat_map(Completion::gaps);
            details.itls.push(gaps.map(|gap| gap.as_secs_f64()).collect());
            let error = sample.outcome.as_ref().err().map(ToString::to_string);
            details.errors.push(error.unwrap_or_default());
            details.queue_times.push(sample.delay.as_secs_f64());
            let text = completion.map(|completion| completion.text.clone());
            details.generated_texts.push(text.unwrap_or_default());
        }
        details
    }
}

fn request_rate(spec: &WorkloadSpec, n_sessions: usize) -> RequestRate {
    let unlimited = || RequestRate::Unlimited("inf".into());
    match (spec.arrivals, &spec.trace) {
        (Arrivals::Open { rate, .. }, _) if rate.is_finite() => RequestRate::PerSecond(rate),
        (Arrivals::Recorded { scale }, Some(trace)) if n_sessions > 1 => {
            let last = trace[n_sessions - 1].at.as_secs_f64() * scale;
            match last > 0.0 {
                true => RequestRate::PerSecond((n_sessions - 1) as f64 / last),
                false => unlimited(),
            }
        }
        (Arrivals::Closed { .. } | Arrivals::Open { .. } | Arrivals::Recorded { .. }, _) => unlimited(),
    }
}
