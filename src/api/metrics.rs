//! The front door's own measurements: counters and histograms of requests as clients see them, and gauges read from the
//! generator at each scrape. Other parts register theirs into the same [`MetricsRegistry`].

use std::borrow::Cow;
use std::sync::Arc;

use baton_scheduler::ids::Nanos;
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::timeline::{Moment, Timeline};
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use super::ApiState;
use super::error::{ApiError, ErrorKind};
use super::metric_aliases::{Asked, MetricAliases};
use super::objectives::{ChoicePace, Verdict};
use super::output::{FinishReason, Job};
use crate::door::{DoorLoad, Generator, Usage};
use crate::metric_names as names;

/// Media type of the exposition.
pub const EXPOSITION_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Buckets of time to first token, seconds: those of vLLM, so that boards and rules carry over.
pub const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Buckets of whole requests, seconds: those of vLLM.
pub const E2E_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const ITL_BUCKETS: [f64; 17] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 10.0,
];
const PHASE_BUCKETS: [f64; 18] = [
    0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
];
const LENGTH_BUCKETS: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 1e6,
];

/// Names and values of labels.
pub type Labels<const N: usize> = [(Cow<'static, str>, Cow<'static, str>); N];

/// The labels of vLLM's metrics; the cluster is one engine to those who ask by its names.
pub fn one_engine(model_name: &str) -> Labels<2> {
    let labels = [("model_name", model_name.to_owned()), ("engine", "0".to_owned())];
    labels.map(|(name, value)| (Cow::Borrowed(name), Cow::Owned(value)))
}

/// Where all parts of the process register what `/metrics` shows. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MetricsRegistry {
    registry: Arc<RwLock<Registry>>,
}

impl MetricsRegistry {
    /// A registry with nothing in it.
    pub fn new() -> MetricsRegistry {
        MetricsRegistry::default()
    }

    /// Registers a metric under a name of [`crate::metric_names`].
    pub fn register(&self, name: &'static str, help: &str, metric: impl Metric) {
        self.registry.write().register(name, help, metric);
    }

    /// Registers what is worked out at each scrape.
    pub fn register_collector(&self, collector: Box<dyn Collector>) {
        self.registry.write().register_collector(collector);
    }

    /// Gives `register` a part of the registry whose metrics all have these labels.
    pub fn with_labels<const N: usize>(&self, labels: Labels<N>, register: impl FnOnce(&mut Registry)) {
        register(self.registry.write().sub_registry_with_labels(labels.into_iter()));
    }

    /// Everything, in the exposition format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.read())?;
        Ok(text)
    }
}

/// Which endpoint a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `baton.v1.Baton/Generate`.
    Generate,
    /// `inference.GRPCInferenceService`: `ModelInfer` and `ModelStreamInfer`.
    Infer,
    /// `/v2/models/{model}/generate` and `generate_stream`.
    GenerateV2,
    /// `vllm.grpc.engine.VllmEngine/Generate`.
    VllmGenerate,
    /// `/v1/embeddings`.
    Embeddings,
    /// `baton.v1.Baton/Embed`.
    Embed,
    /// `vllm.grpc.engine.VllmEngine/Embed`.
    VllmEmbed,
}

impl Endpoint {
    const fn as_str(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
            Endpoint::Generate => "generate",
            Endpoint::Infer => "infer",
            Endpoint::GenerateV2 => "v2_generate",
            Endpoint::VllmGenerate => "vllm_generate",
            Endpoint::Embeddings => "embeddings",
            Endpoint::Embed => "embed",
            Endpoint::VllmEmbed => "vllm_embed",
        }
    }
}

impl EncodeLabelValue for Endpoint {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.as_str().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: Endpoint,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ObjectiveLabels {
    objective: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SloLabels {
    outcome: &'static str,
}

const fn met(is_met: bool) -> &'static str {
    if is_met { "met" } else { "missed" }
}

/// Phases of a timeline and the moments they lie between.
const PHASES: [(&str, Moment, Moment); 10] = [
    (names::phase::TOKENIZE, Moment::Received, Moment::Tokenized),
    (names::phase::QUEUE, Moment::Tokenized, Moment::Admitted),
    (names::phase::PLACE, Moment::Admitted, Moment::Placed),
    (names::phase::RESERVE, Moment::Placed, Moment::Reserved),
    (names::phase::PREFILL_WAIT, Moment::Reserved, Moment::PrefillStarted),
    (names::phase::PREFILL, Moment::PrefillStarted, Moment::PrefillFinished),
    (
        names::phase::TRANSFER,
        Moment::TransferStarted,
        Moment::TransferFinished,
    ),
    (
        names::phase::TRANSFER_EXPOSED,
        Moment::PrefillFinished,
        Moment::TransferFinished,
    ),
    (names::phase::JOIN, Moment::TransferFinished, Moment::Joined),
    (names::phase::DECODE, Moment::FirstToken, Moment::Finished),
];

type PhaseFamily = Family<PhaseLabels, Histogram, fn() -> Histogram>;

/// The front door's metrics; clones share them.
#[derive(Clone, Debug)]
pub struct ApiMetrics {
    requests: Family<RequestLabels, Counter>,
    prompt_tokens: Counter,
    cached_prompt_tokens: Counter,
    generation_tokens: Counter,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_request_latency: Histogram,
    request_phase: PhaseFamily,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    slo_objectives: Family<ObjectiveLabels, Counter>,
    slo_requests: Family<SloLabels, Counter>,
    /// Connections open on the port.
    pub(super) connections: Gauge,
    aliases: Option<MetricAliases>,
}

impl ApiMetrics {
    /// Makes the metrics and registers them; `aliases` are registered already and observe the same.
    pub(super) fn register(registry: &MetricsRegistry, aliases: Option<MetricAliases>) -> ApiMetrics {
        let metrics = ApiMetrics {
            requests: Family::default(),
            prompt_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            time_to_first_token: Histogram::new(TTFT_BUCKETS),
            inter_token_latency: Histogram::new(ITL_BUCKETS),
            e2e_request_latency: Histogram::new(E2E_BUCKETS),
            request_phase: Family::new_with_constructor(|| Histogram::new(PHASE_BUCKETS)),
            request_prompt_tokens: Histogram::new(LENGTH_BUCKETS),
            request_generation_tokens: Histogram::new(LENGTH_BUCKETS),
            slo_objectives: Family::default(),
            slo_requests: Family::default(),
            connections: Gauge::default(),
            aliases,
        };
        let all = metrics.clone();
        registry.register(names::REQUESTS, "Requests that ended", all.requests);
        registry.register(
            names::PROMPT_TOKENS,
            "Prompt tokens of requests that produced a token or an embedding",
            all.prompt_tokens,
        );
        registry.register(
            names::CACHED_PROMPT_TOKENS,
            "Prompt tokens that a prefix cache held",
            all.cached_prompt_tokens,
        );
        registry.register(names::GENERATION_TOKENS, "Tokens generated", all.generation_tokens);
        registry.register(
            names::TIME_TO_FIRST_TOKEN,
            "Seconds to the first token",
            all.time_to_first_token,
        );
        registry.register(
            names::INTER_TOKEN_LATENCY,
            "Seconds from token to token",
            all.inter_token_latency,
        );
        registry.register(
            names::E2E_REQUEST_LATENCY,
            "Seconds of whole requests",
            all.e2e_request_latency,
        );
        registry.register(
            names::REQUEST_PHASE,
            "Seconds of each phase of a request",
            all.request_phase,
        );
        registry.register(names::REQUEST_PROMPT_TOKENS, "Prompt length", all.request_prompt_tokens);
        registry.register(
            names::REQUEST_GENERATION_TOKENS,
            "Completion length",
            all.request_generation_tokens,
        );
        registry.register(
            names::SLO_OBJECTIVES,
            "Latencies that requests asked for",
            all.slo_objectives,
        );
        registry.register(
            names::SLO_REQUESTS,
            "Requests that asked for latencies",
            all.slo_requests,
        );
        registry.register(
            names::CONNECTIONS,
            "Connections open on the front door's port",
            all.connections,
        );
        metrics
    }

    /// Counts a request that ended before it reached the generator.
    pub fn refused(&self, endpoint: Endpoint, error: &ApiError) {
        self.outcome(endpoint, error.kind.codes().outcome);
    }

    fn outcome(&self, endpoint: Endpoint, outcome: &'static str) {
        self.requests.get_or_create(&RequestLabels { endpoint, outcome }).inc();
    }
}

/// Measures one request from the moment it was read. Counts it once, as cancelled if it is dropped before an end.
#[derive(Debug)]
pub struct Recorder {
    state: ApiState,
    endpoint: Endpoint,
    label: Arc<str>,
    timeline: Timeline,
    /// Of each choice.
    paces: Vec<ChoicePace>,
    objectives: RequestObjectives,
    n_prompt_tokens: u32,
    n_tokens: u32,
    asked: Asked,
    is_counted: bool,
}

impl Recorder {
    /// Starts measuring `job`.
    pub fn new(state: &ApiState, job: &Job) -> Recorder {
        Recorder {
            state: state.clone(),
            endpoint: job.endpoint,
            label: job.label.shared(),
            timeline: job.timeline.clone(),
            paces: vec![ChoicePace::default(); job.sampling.n as usize],
            objectives: job.objectives,
            n_prompt_tokens: job.prompt_ids.len() as u32,
            n_tokens: 0,
            asked: Asked {
                n: job.sampling.n,
                max_tokens: job.sampling.max_tokens,
            },
            is_counted: false,
        }
    }

    /// Moments known so far.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Takes the cluster's moments; those only the front door knows are kept.
    pub fn set_timeline(&mut self, mut timeline: Timeline) {
        for moment in [Moment::Received, Moment::Tokenized, Moment::FirstToken] {
            if let Some(at) = self.timeline.at(moment) {
                timeline.mark(moment, at);
            }
        }
        self.timeline = timeline;
    }

    /// A token of `choice` came.
    pub fn token(&mut self, choice: u32, n_prompt_tokens: u32) {
        let now = self.state.generator().now();
        let metrics = self.state.metrics();
        if self.n_tokens == 0 {
            self.timeline.mark(Moment::FirstToken, now);
            let ttft = self.timeline.between(Moment::Received, Moment::FirstToken);
            let ttft_s = ttft.map(Nanos::as_secs_f64);
            if let Some(ttft_s) = ttft_s {
                metrics.time_to_first_token.observe(ttft_s);
            }
            metrics.prompt_tokens.inc_by(u64::from(n_prompt_tokens));
            if let Some(aliases) = &metrics.aliases {
                aliases.first_token(ttft_s, n_prompt_tokens);
            }
        }
        let last = self.paces[choice as usize].token(now);
        let since_last_s = last.map(|last| now.saturating_sub(last).as_secs_f64());
        if let Some(since_last_s) = since_last_s {
            metrics.inter_token_latency.observe(since_last_s);
        }
        if let Some(aliases) = &metrics.aliases {
            aliases.token(since_last_s);
        }
        metrics.generation_tokens.inc();
        self.n_tokens += 1;
    }

    /// Every choice ended well; `reason` is that of the one that ended worst.
    pub fn finished(&mut self, usage: &Usage, reason: FinishReason) {
        let metrics = self.state.metrics();
        self.timeline.mark(Moment::Finished, self.state.generator().now());
        for (phase, from, to) in PHASES {
            if let Some(length) = self.timeline.between(from, to) {
                metrics
                    .request_phase
                    .get_or_create(&PhaseLabels { phase })
                    .observe(length.as_secs_f64());
            }
        }
        metrics.cached_prompt_tokens.inc_by(u64::from(usage.n_cached_tokens));
        metrics.request_prompt_tokens.observe(f64::from(usage.n_prompt_tokens));
        metrics.request_generation_tokens.observe(f64::from(self.n_tokens));
        if let Some(length) = self.timeline.between(Moment::Received, Moment::Finished) {
            metrics.e2e_request_latency.observe(length.as_secs_f64());
        }
        if let Some(aliases) = &metrics.aliases {
            aliases.finished(usage, self.n_tokens, reason, &self.timeline, self.asked);
        }
        // One that its client aborted says nothing of the server.
        if reason != FinishReason::Abort {
            self.judge(false);
        }
        self.count(reason.as_str());
    }

    /// The prompt was embedded.
    pub fn embedded(&mut self) {
        let metrics = self.state.metrics();
        self.timeline.mark(Moment::Finished, self.state.generator().now());
        metrics.prompt_tokens.inc_by(u64::from(self.n_prompt_tokens));
        metrics.request_prompt_tokens.observe(f64::from(self.n_prompt_tokens));
        if let Some(length) = self.timeline.between(Moment::Received, Moment::Finished) {
            metrics.e2e_request_latency.observe(length.as_secs_f64());
        }
        if let Some(aliases) = &metrics.aliases {
            aliases.embedded(self.n_prompt_tokens, &self.timeline);
        }
        self.count(FinishReason::Stop.as_str());
    }

    /// Counts the latencies that were asked for. Of several choices the slowest counts.
    fn judge(&self, has_failed: bool) {
        let ttft = self.timeline.between(Moment::Received, Moment::FirstToken);
        let tpot = self.paces.iter().filter_map(ChoicePace::time_per_token).max();
        let verdict = Verdict::of(self.objectives, ttft, tpot, has_failed);
        let metrics = self.state.metrics();
        for (objective, is_met) in [("ttft", verdict.ttft), ("tpot", verdict.tpot)] {
            if let Some(is_met) = is_met {
                let outcome = met(is_met);
                metrics
                    .slo_objectives
                    .get_or_create(&ObjectiveLabels { objective, outcome })
                    .inc();
            }
        }
        if let Some(is_met) = verdict.all() {
            metrics
                .slo_requests
                .get_or_create(&SloLabels { outcome: met(is_met) })
                .inc();
        }
    }

    /// The request ended badly.
    pub fn failed(&mut self, error: &ApiError) {
        // What a client did wrong says nothing of the server; what ran into its deadline was too slow.
        let is_ours = match error.kind {
            ErrorKind::OverCapacity | ErrorKind::Unavailable | ErrorKind::Deadline | ErrorKind::Internal => true,
            ErrorKind::Invalid
            | ErrorKind::Unauthorized
            | ErrorKind::NotFound
            | ErrorKind::MethodNotAllowed
            | ErrorKind::TooLarge
            | ErrorKind::Cancelled => false,
        };
        if is_ours && !self.is_counted {
            self.judge(true);
        }
        self.count(error.kind.codes().outcome);
    }

    fn count(&mut self, outcome: &'static str) {
        if std::mem::replace(&mut self.is_counted, true) {
            return;
        }
        self.state.metrics().outcome(self.endpoint, outcome);
        let ms = |from, to| self.timeline.between(from, to).map(|length| length.as_secs_f64() * 1e3);
        tracing::info!(
            request_id = &*self.label,
            endpoint = self.endpoint.as_str(),
            outcome,
            n_prompt_tokens = self.n_prompt_tokens,
            n_tokens = self.n_tokens,
            ttft_ms = ms(Moment::Received, Moment::FirstToken),
            e2e_ms = ms(Moment::Received, Moment::Finished),
            "request ended"
        );
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.count("cancelled");
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabels {
    instance: String,
    role: &'static str,
}

/// Gauges read from a generator when somebody scrapes.
pub(super) struct LoadCollector {
    generator: Arc<dyn Generator>,
}

impl LoadCollector {
    pub(super) fn new(generator: Arc<dyn Generator>) -> LoadCollector {
        LoadCollector { generator }
    }

    fn instances(
        encoder: &mut DescriptorEncoder<'_>,
        load: &DoorLoad,
        name: &str,
        help: &str,
        value: fn(&crate::door::InstanceView) -> u32,
    ) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for instance in &load.instances {
            let labels = InstanceLabels {
                instance: instance.id.to_string(),
                role: instance.role.as_str(),
            };
            ConstGauge::new(value(instance)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for LoadCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadCollector").finish_non_exhaustive()
    }
}

impl Collector for LoadCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let load = self.generator.load();
        let simple = [
            (
                names::QUEUE_DEPTH,
                "Requests that wait for admission",
                load.n_queued as i64,
            ),
            (
                names::REQUESTS_RUNNING,
                "Requests admitted and not ended",
                load.n_running as i64,
            ),
            (
                names::READY,
                "1 when a request could be served",
                i64::from(load.not_ready.is_none()),
            ),
        ];
        for (name, help, value) in simple {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        type Row = (&'static str, &'static str, fn(&crate::door::InstanceView) -> u32);
        let rows: [Row; 5] = [
            (
                names::INSTANCE_RUNNING,
                "Sequences in an instance's batches",
                |instance| instance.n_running,
            ),
            (
                names::INSTANCE_WAITING,
                "Sequences that wait at an instance",
                |instance| instance.n_waiting,
            ),
            (names::INSTANCE_BLOCKS, "Blocks an instance has", |instance| {
                instance.n_blocks_total
            }),
            (
                names::INSTANCE_BLOCKS_FREE,
                "Blocks neither held nor cached",
                |instance| instance.n_blocks_free,
            ),
            (names::INSTANCE_READY, "1 when an instance takes requests", |instance| {
                u32::from(instance.ready)
            }),
        ];
        rows.iter()
            .try_for_each(|(name, help, value)| LoadCollector::instances(&mut encoder, &load, name, help, *value))
    }
}
