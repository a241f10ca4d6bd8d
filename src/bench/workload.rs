//! What is sent and when: prompts of a fixed length, and arrival times. All of it follows from the seed.

use std::time::Duration;

use serde_json::{Value, json};

use super::random::SplitMix64;

/// How requests arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// This many at any time: the next one starts when one ends.
    Closed {
        /// Requests in flight, at least 1.
        concurrency: usize,
    },
    /// A Poisson process, however many are in flight.
    Open {
        /// Requests per second, above 0; infinite sends all at once.
        rate: f64,
    },
}

/// Which API is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointKind {
    /// `/v1/completions`, prompts as token ids.
    Completions,
    /// `/v1/chat/completions`, prompts as words.
    Chat,
}

impl EndpointKind {
    /// The path below the server's URL.
    pub const fn path(self) -> &'static str {
        match self {
            EndpointKind::Completions => "/v1/completions",
            EndpointKind::Chat => "/v1/chat/completions",
        }
    }
}

/// The requests of a benchmark.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Which API.
    pub endpoint: EndpointKind,
    /// The model's name.
    pub model: String,
    /// Tokens (chat: words) of each prompt, at least 1.
    pub input_len: usize,
    /// Leading tokens or words that all prompts share, at most `input_len`.
    pub prefix_len: usize,
    /// Most tokens to generate.
    pub output_len: u32,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Sampling temperature; the server's default when absent.
    pub temperature: Option<f64>,
    /// Token ids to draw prompts from; not used by chat. Not empty.
    pub vocabulary: Vec<u32>,
    /// Where everything random comes from.
    pub seed: u64,
}

/// Streams of the seed; prompts use their own index.
const PREFIX_STREAM: u64 = u64::MAX;
const ARRIVALS_STREAM: u64 = u64::MAX - 1;

const WORDS: [&str; 32] = [
    "runner", "hands", "the", "next", "stone", "river", "light", "seven", "under", "green", "walks", "north", "paper",
    "sound", "early", "bread", "glass", "small", "house", "tree", "water", "moves", "over", "quiet", "field", "clock",
    "wind", "open", "door", "road", "blue", "near",
];

impl Workload {
    /// The body of request `index`.
    pub fn body(&self, index: u64) -> Value {
        let mut body = match self.endpoint {
            EndpointKind::Completions => json!({
                "model": self.model,
                "prompt": self.prompt_ids(index),
                "max_tokens": self.output_len,
            }),
            EndpointKind::Chat => json!({
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt_text(index)}],
                "max_completion_tokens": self.output_len,
            }),
        };
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        body
    }

    /// `input_len` draws below `bound`: the shared ones first, then the request's own.
    fn draws(&self, index: u64, bound: usize) -> impl Iterator<Item = usize> {
        let bound = u32::try_from(bound).unwrap_or(u32::MAX);
        let streams = [
            (PREFIX_STREAM, self.prefix_len),
            (index, self.input_len - self.prefix_len),
        ];
        let seed = self.seed;
        streams.into_iter().flat_map(move |(stream, n_draws)| {
            let mut random = SplitMix64::new(seed, stream);
            (0..n_draws).map(move |_| random.below(bound) as usize)
        })
    }

    fn prompt_ids(&self, index: u64) -> Vec<u32> {
        self.draws(index, self.vocabulary.len())
            .map(|draw| self.vocabulary[draw])
            .collect()
    }

    fn prompt_text(&self, index: u64) -> String {
        self.draws(index, WORDS.len())
            .map(|draw| WORDS[draw])
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// When each of `n_requests` of a Poisson process of `rate` per second starts, from the first, which starts at 0.
    pub fn poisson(&self, rate: f64, n_requests: usize) -> Vec<Duration> {
        let mut random = SplitMix64::new(self.seed, ARRIVALS_STREAM);
        let mut at_seconds = 0.0;
        let mut starts = Vec::with_capacity(n_requests);
        for _ in 0..n_requests {
            starts.push(Duration::try_from_secs_f64(at_seconds).unwrap_or(Duration::MAX));
            at_seconds += -random.open_unit().ln() / rate;
        }
        starts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(endpoint: EndpointKind, prefix_len: usize) -> Workload {
        Workload {
            endpoint,
            model: "m".into(),
            input_len: 20,
            prefix_len,
            output_len: 5,
            ignore_eos: true,
            temperature: Some(0.0),
            vocabulary: (100..200).collect(),
            seed: 7,
        }
    }

    #[test]
    fn prompts_have_their_length_share_their_prefix_and_differ_after_it() {
        let workload = workload(EndpointKind::Completions, 8);
        let (a, b) = (workload.prompt_ids(0), workload.prompt_ids(1));
        assert_eq!((a.len(), b.len()), (20, 20));
        assert_eq!(a[..8], b[..8]);
        assert_ne!(a[8..], b[8..]);
        assert!(a.iter().all(|id| (100..200).contains(id)));
        assert_eq!(a, workload.prompt_ids(0), "the same again");
    }

    #[test]
    fn bodies_ask_for_a_stream_with_usage() {
        let body = workload(EndpointKind::Completions, 0).body(3);
        assert_eq!(body["stream_options"]["include_usage"], true);
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(5), &json!(true)));
        let body = workload(EndpointKind::Chat, 0).body(3);
        let content = body["messages"][0]["content"].as_str().expect("a text");
        assert_eq!(content.split(' ').count(), 20);
        assert_eq!(body["max_completion_tokens"], 5);
    }

    #[test]
    fn arrivals_have_the_asked_rate_and_repeat() {
        let workload = workload(EndpointKind::Completions, 0);
        let starts = workload.poisson(50.0, 20_000);
        assert!(starts.is_sorted());
        let mean_gap = starts.last().expect("starts").as_secs_f64() / 19_999.0;
        // The mean of 20,000 exponential gaps strays from 1/rate by 0.7 % (one standard deviation).
        assert!((mean_gap * 50.0 - 1.0).abs() < 0.03, "{mean_gap}");
        let gaps: Vec<f64> = starts
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 50.0)
            .collect();
        let variance = gaps.iter().map(|gap| (gap - 1.0).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!(
            (variance - 1.0).abs() < 0.1,
            "exponential gaps have the variance of their mean squared: {variance}"
        );
        assert_eq!(starts, workload.poisson(50.0, 20_000));
        assert!(workload.poisson(f64::INFINITY, 9).iter().all(Duration::is_zero));
    }
}
