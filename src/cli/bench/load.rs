//! The flags that say what load to send, and the workload they mean.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{number, or_number};
use crate::bench::N_REQUESTS_LIMIT;
use crate::bench::workload::{
    ArrivalProcess, Arrivals, LENGTH_LIMIT, Lengths, SHAREGPT_OUTPUTS, SHAREGPT_PROMPTS, WorkloadSpec, read_trace,
};
use crate::config::{ConfigError, Span, flag};

/// Requests to measure without a trace.
const DEFAULT_N_REQUESTS: usize = 32;
/// The first rate of a sweep.
const DEFAULT_SWEEP_START: f64 = 1.0;

/// What to send.
#[derive(Args, Debug)]
pub struct LoadFlags {
    /// Closed loop: this many requests (of conversations: conversations) in flight [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "rate", help_heading = "Load", value_parser = flag::<NonZeroUsize>)]
    concurrency: Option<NonZeroUsize>,
    /// Open loop: this many requests (conversations) per second on average; inf sends all at once
    #[arg(long, value_name = "PER_SECOND", help_heading = "Load", value_parser = rate)]
    rate: Option<f64>,
    /// How an open loop spreads them: poisson, gamma:CV, uniform (equal gaps), bursts:N or on-off:SECONDS,SECONDS
    #[arg(long, value_name = "PROCESS", default_value = "poisson", help_heading = "Load", value_parser = process)]
    arrivals: ArrivalProcess,
    /// Requests to measure [default: 32; of a trace: all]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = flag::<NonZeroUsize>)]
    num_prompts: Option<NonZeroUsize>,
    /// Tokens (chat: words) of each prompt: N, uniform:LOW-HIGH, lognormal:MEAN,CV or sharegpt
    #[arg(long, value_name = "LENGTHS", default_value = "128", help_heading = "Load", value_parser = input_lengths)]
    input_len: Lengths,
    /// Tokens to generate: N, uniform:LOW-HIGH, lognormal:MEAN,CV or sharegpt
    #[arg(long, value_name = "LENGTHS", default_value = "32", help_heading = "Load", value_parser = output_lengths)]
    output_len: Lengths,
    /// Cut longer prompts to this
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    max_input_len: Option<NonZeroU32>,
    /// Cut longer outputs to this
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    max_output_len: Option<NonZeroU32>,
    /// Leading tokens that prompts share
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Load")]
    prefix_len: u32,
    /// Different prefixes; each conversation has one of them
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    num_prefixes: NonZeroU32,
    /// Turns of a conversation: N or a distribution; each repeats what was said before, with answers of the asked length
    #[arg(long, value_name = "LENGTHS", default_value = "1", help_heading = "Load", value_parser = input_lengths)]
    turns: Lengths,
    /// Tokens that the user adds with each further turn
    #[arg(long, value_name = "LENGTHS", default_value = "32", help_heading = "Load", value_parser = input_lengths)]
    turn_len: Lengths,
    /// Mean pause, exponential, between an answer and the next turn [default: none]
    #[arg(long, value_name = "DURATION", help_heading = "Load", value_parser = flag::<Span>)]
    think_time: Option<Span>,
    /// Lengths, arrivals and shared prefixes of a recorded trace: CSV of Azure or JSON lines of Mooncake; with --rate or
    /// --concurrency its arrivals are not used
    #[arg(long, value_name = "FILE", conflicts_with = "turns", help_heading = "Load")]
    pub(super) trace: Option<PathBuf>,
    /// Multiply the trace's times by this: 0.5 plays it twice as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, help_heading = "Load", value_parser = scale)]
    time_scale: f64,
    /// Seed of prompts, lengths and arrivals
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    seed: u64,
}

const LENGTHS_EXPECTED: &str = "expected a number from 1 on, uniform:LOW-HIGH, lognormal:MEAN,CV or sharegpt";

fn input_lengths(text: &str) -> Result<Lengths, &'static str> {
    Lengths::parse(text, SHAREGPT_PROMPTS).ok_or(LENGTHS_EXPECTED)
}

fn output_lengths(text: &str) -> Result<Lengths, &'static str> {
    Lengths::parse(text, SHAREGPT_OUTPUTS).ok_or(LENGTHS_EXPECTED)
}

fn process(text: &str) -> Result<ArrivalProcess, &'static str> {
    ArrivalProcess::parse(text)
        .ok_or("expected poisson, gamma:CV with a CV from 0.01 to 100, uniform, bursts:N or on-off:SECONDS,SECONDS")
}

fn rate(text: &str) -> Result<f64, &'static str> {
    number(text, "expected a number above 0, or inf", |rate| rate > 0.0)
}

fn scale(text: &str) -> Result<f64, &'static str> {
    number(text, "expected a number above 0", |scale| {
        scale > 0.0 && scale.is_finite()
    })
}

impl LoadFlags {
    /// The workload they mean.
    pub(super) fn resolve(self, is_sweep: bool) -> Result<WorkloadSpec, ConfigError> {
        let impossible = |message: String| Err(ConfigError::Impossible(message));
        if let Lengths::Fixed(input_len) = self.input_len
            && self.trace.is_none()
            && self.prefix_len > input_len
        {
            return impossible(format!(
                "prefix-len: found {}, expected at most input-len ({input_len})",
                self.prefix_len
            ));
        }
        if is_sweep && self.rate.is_some_and(f64::is_infinite) {
            return impossible("rate: found inf, expected the first rate of the sweep".into());
        }
        let trace = match &self.trace {
            Some(path) => Some(read_trace(path).map_err(|error| ConfigError::Impossible(error.to_string()))?),
            None => None,
        };
        let most = trace
            .as_ref()
            .map_or(N_REQUESTS_LIMIT, |trace| trace.len().min(N_REQUESTS_LIMIT));
        let default = if trace.is_some() { most } else { DEFAULT_N_REQUESTS };
        let n_requests = or_number(self.num_prompts, default);
        if n_requests > most {
            return impossible(format!("num-prompts: found {n_requests}, expected at most {most}"));
        }
        let process = self.arrivals;
        let arrivals = match (self.rate, self.concurrency) {
            (Some(rate), _) => Arrivals::Open { rate, process },
            (None, _) if is_sweep => Arrivals::Open {
                rate: DEFAULT_SWEEP_START,
                process,
            },
            (None, None) if trace.is_some() => Arrivals::Recorded { scale: self.time_scale },
            (None, concurrency) => Arrivals::Closed {
                concurrency: or_number(concurrency, 1),
            },
        };
        Ok(WorkloadSpec {
            n_requests,
            arrivals,
            input: self.input_len,
            output: self.output_len,
            max_input_len: self.max_input_len.map_or(LENGTH_LIMIT, NonZeroU32::get),
            max_output_len: self.max_output_len.map_or(LENGTH_LIMIT, NonZeroU32::get),
            prefix_len: self.prefix_len,
            n_prefixes: self.num_prefixes.get(),
            turns: self.turns,
            turn_input: self.turn_len,
            think_time: self.think_time.map_or(Duration::ZERO, |span| span.0),
            trace: trace.map(Into::into),
            seed: self.seed,
        })
    }
}
