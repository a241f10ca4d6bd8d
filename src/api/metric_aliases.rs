//! The front door's observations under the names, types, labels and buckets of vLLM, so that boards, alerts and autoscalers
//! made for it work here. Registered only when asked for; what only vLLM has is left out rather than made up.

use std::sync::Arc;

use baton_scheduler::timeline::{Moment, Timeline};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;

use super::metrics::{E2E_BUCKETS, MetricsRegistry, TTFT_BUCKETS, one_engine};
use super::output::FinishReason;
use crate::door::{Generator, Usage};
use crate::metric_names::vllm as names;

const ITL_BUCKETS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const N_BUCKETS: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    finished_reason: &'static str,
}

/// The metrics; clones share them.
#[derive(Clone, Debug)]
pub(super) struct MetricAliases {
    request_success: Family<ReasonLabels, Counter>,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_cache_queries: Counter,
    prefix_cache_hits: Counter,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_request_latency: Histogram,
    request_queue_time: Histogram,
    request_prefill_time: Histogram,
    request_decode_time: Histogram,
    request_inference_time: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_num_generation_tokens: Histogram,
    request_params_n: Histogram,
    request_params_max_tokens: Histogram,
}

/// What a request asked for, as far as it is observed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) n: u32,
    pub(super) max_tokens: u32,
}

impl MetricAliases {
    /// Makes the metrics and registers them, with the gauges of `generator`. `max_model_len` bounds the buckets of lengths.
    pub(super) fn register(
        registry: &MetricsRegistry,
        generator: Arc<dyn Generator>,
        model_name: &str,
        max_model_len: u32,
    ) -> MetricAliases {
        let seconds = || Histogram::new(E2E_BUCKETS);
        let lengths = || Histogram::new(one_two_five(max_model_len));
        let metrics = MetricAliases {
            request_success: Family::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            prefix_cache_queries: Counter::default(),
            prefix_cache_hits: Counter::default(),
            time_to_first_token: Histogram::new(TTFT_BUCKETS),
            inter_token_latency: Histogram::new(ITL_BUCKETS),
            e2e_request_latency: seconds(),
            request_queue_time: seconds(),
            request_prefill_time: seconds(),
            request_decode_time: seconds(),
            request_inference_time: seconds(),
            request_prompt_tokens: lengths(),
            request_generation_tokens: lengths(),
            request_max_num_generation_tokens: lengths(),
            request_params_n: Histogram::new(N_BUCKETS),
            request_params_max_tokens: lengths(),
        };
        let all = metrics.clone();
        registry.with_labels(one_engine(model_name), |registry| {
            registry.register(names::REQUEST_SUCCESS, "Requests that ended well", all.request_success);
            for (name, help, counter) in [
                (names::PROMPT_TOKENS, "Prompt tokens, once each", all.prompt_tokens),
                (
                    names::GENERATION_TOKENS,
                    "Tokens generated, once each",
                    all.generation_tokens,
                ),
                (
                    names::PREFIX_CACHE_QUERIES,
                    "Prompt tokens looked for in a prefix cache",
                    all.prefix_cache_queries,
                ),
                (
                    names::PREFIX_CACHE_HITS,
                    "Prompt tokens found in a prefix cache",
                    all.prefix_cache_hits,
                ),
            ] {
                registry.register(name, help, counter);
            }
            let itl = &all.inter_token_latency;
            for (name, help, histogram) in [
                (
                    names::TIME_TO_FIRST_TOKEN,
                    "Seconds to the first token",
                    all.time_to_first_token,
                ),
                (names::INTER_TOKEN_LATENCY, "Seconds from token to token", itl.clone()),
                (names::TIME_PER_OUTPUT_TOKEN, "Seconds from token to token", itl.clone()),
                (
                    names::E2E_REQUEST_LATENCY,
                    "Seconds of whole requests",
                    all.e2e_request_latency,
                ),
                (
                    names::REQUEST_QUEUE_TIME,
                    "Seconds until the prompt was first computed",
                    all.request_queue_time,
                ),
                (
                    names::REQUEST_PREFILL_TIME,
                    "Seconds from then to the first token",
                    all.request_prefill_time,
                ),
                (
                    names::REQUEST_DECODE_TIME,
                    "Seconds from the first token to the end",
                    all.request_decode_time,
                ),
                (
                    names::REQUEST_INFERENCE_TIME,
                    "Seconds from the start of the prefill to the end",
                    all.request_inference_time,
                ),
                (names::REQUEST_PROMPT_TOKENS, "Prompt length", all.request_prompt_tokens),
                (
                    names::REQUEST_GENERATION_TOKENS,
                    "Completion length",
                    all.request_generation_tokens,
                ),
                (
                    names::REQUEST_MAX_NUM_GENERATION_TOKENS,
                    "Longest choice that a request may have had",
                    all.request_max_num_generation_tokens,
                ),
                (names::REQUEST_PARAMS_N, "Choices asked for", all.request_params_n),
                (
                    names::REQUEST_PARAMS_MAX_TOKENS,
                    "Most tokens a choice may have",
                    all.request_params_max_tokens,
                ),
            ] {
                registry.register(name, help, histogram);
            }
            registry.register_collector(Box::new(Gauges(generator)));
        });
        metrics
    }

    pub(super) fn first_token(&self, ttft_s: Option<f64>, n_prompt_tokens: u32) {
        if let Some(ttft_s) = ttft_s {
            self.time_to_first_token.observe(ttft_s);
        }
        self.prompt_tokens.inc_by(u64::from(n_prompt_tokens));
    }

    pub(super) fn token(&self, since_last_s: Option<f64>) {
        if let Some(since_last_s) = since_last_s {
            self.inter_token_latency.observe(since_last_s);
        }
        self.generation_tokens.inc();
    }

    /// A prompt was embedded, so that nothing of it was generated.
    pub(super) fn embedded(&self, n_prompt_tokens: u32, timeline: &Timeline) {
        let finished_reason = FinishReason::Stop.as_str();
        self.request_success
            .get_or_create(&ReasonLabels { finished_reason })
            .inc();
        self.prompt_tokens.inc_by(u64::from(n_prompt_tokens));
        self.request_prompt_tokens.observe(f64::from(n_prompt_tokens));
        if let Some(length) = timeline.between(Moment::Received, Moment::Finished) {
            self.e2e_request_latency.observe(length.as_secs_f64());
        }
    }

    /// A request ended well.
    pub(super) fn finished(
        &self,
        usage: &Usage,
        n_tokens: u32,
        reason: FinishReason,
        timeline: &Timeline,
        asked: Asked,
    ) {
        let finished_reason = reason.as_str();
        self.request_success
            .get_or_create(&ReasonLabels { finished_reason })
            .inc();
        self.prefix_cache_queries.inc_by(u64::from(usage.n_prompt_tokens));
        self.prefix_cache_hits.inc_by(u64::from(usage.n_cached_tokens));
        self.request_prompt_tokens.observe(f64::from(usage.n_prompt_tokens));
        self.request_generation_tokens.observe(f64::from(n_tokens));
        self.request_max_num_generation_tokens
            .observe(f64::from(asked.max_tokens));
        self.request_params_max_tokens.observe(f64::from(asked.max_tokens));
        self.request_params_n.observe(f64::from(asked.n));
        // Without a word from an instance, computing began with the admission.
        let scheduled = match timeline.at(Moment::PrefillStarted) {
            Some(_) => Moment::PrefillStarted,
            None => Moment::Admitted,
        };
        for (histogram, from, to) in [
            (&self.e2e_request_latency, Moment::Received, Moment::Finished),
            (&self.request_queue_time, Moment::Received, scheduled),
            (&self.request_prefill_time, scheduled, Moment::FirstToken),
            (&self.request_decode_time, Moment::FirstToken, Moment::Finished),
            (&self.request_inference_time, scheduled, Moment::Finished),
        ] {
            if let Some(length) = timeline.between(from, to) {
                histogram.observe(length.as_secs_f64());
            }
        }
    }
}

/// 1, 2, 5, 10, 20, 50 ... up to `largest`.
fn one_two_five(largest: u32) -> impl Iterator<Item = f64> {
    let all = (0..10).flat_map(|exponent| [1_u64, 2, 5].map(|mantissa| mantissa * 10_u64.pow(exponent)));
    all.take_while(move |bucket| *bucket <= u64::from(largest))
        .map(|bucket| bucket as f64)
}

/// Gauges read when somebody scrapes.
struct Gauges(Arc<dyn Generator>);

impl std::fmt::Debug for Gauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gauges").finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    block_size: u32,
    num_gpu_blocks: u64,
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let load = self.0.load();
        for (name, help, value) in [
            (
                names::NUM_REQUESTS_RUNNING,
                "Requests admitted and not ended",
                load.n_running as f64,
            ),
            (
                names::NUM_REQUESTS_WAITING,
                "Requests that wait for admission",
                load.n_queued as f64,
            ),
            (
                names::KV_CACHE_USAGE_PERC,
                "Part of the KV blocks in use, 0 to 1",
                load.kv_usage(),
            ),
            (
                names::GPU_CACHE_USAGE_PERC,
                "Part of the KV blocks in use, 0 to 1",
                load.kv_usage(),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let help = "Block size and number of blocks of all instances";
        let mut family = encoder.encode_descriptor(names::CACHE_CONFIG_INFO, help, None, MetricType::Gauge)?;
        let labels = CacheLabels {
            block_size: load.instances.iter().map(|one| one.block_size).max().unwrap_or(0),
            num_gpu_blocks: load.instances.iter().map(|one| u64::from(one.n_blocks_total)).sum(),
        };
        ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_buckets_up_to_the_models() {
        assert_eq!(
            one_two_five(100).collect::<Vec<_>>(),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
        );
        assert_eq!(one_two_five(1).collect::<Vec<_>>(), [1.0]);
        assert_eq!(one_two_five(u32::MAX).last(), Some(2e9));
    }
}
