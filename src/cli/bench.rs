//! `baton bench`: flags of the load generator.

mod load;

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use self::load::LoadFlags;
use crate::bench::sweep::SweepOptions;
use crate::bench::workload::Arrivals;
use crate::bench::{BenchConfig, EndpointKind, Mode, Objectives};
use crate::config::{Address, ConfigError, Layers, Secret, Span, flag};

const EXAMPLES: &str = "\
Examples:
  Eight requests in flight, 512 tokens in, 128 out:
    baton bench --concurrency 8 --num-prompts 64 --input-len 512 --output-len 128
  A Poisson process of 2.5 requests per second, and a JSON report and a page with plots:
    baton bench --rate 2.5 --num-prompts 200 --output results/rate-2.5.json --html results/rate-2.5.html
  Bursty arrivals, lengths like ShareGPT's, and how many requests were good:
    baton bench --rate 4 --arrivals gamma:2.5 --input-len sharegpt --output-len sharegpt --goodput ttft:500ms,tpot:50ms
  Conversations of two to six turns, each of which repeats what was said before:
    baton bench --rate 1 --turns uniform:2-6 --turn-len 64 --think-time 2s --endpoint chat
  A recorded trace at twice its speed:
    baton bench --trace conversation_trace.jsonl --time-scale 0.5 --num-prompts 1000
  The highest rate at which 90 % of the requests meet the objectives:
    baton bench --sweep --rate 1 --goodput ttft:500ms,tpot:50ms --sweep-seconds 60
  Two servers in turn:
    baton bench --server http://127.0.0.1:8000 --compare http://127.0.0.1:9000 --rounds 5 --vocab-size 32000

TTFT: sending to first token. TPOT: time per token after the first, one value per request. ITL: between two tokens.
E2E: sending to last token. Exit code 1 if no request was completed.";

/// Flags of `baton bench`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct BenchFlags {
    /// URL of the server [default: http://127.0.0.1:8000] [env: BATON_SERVER]
    #[arg(long, value_name = "URL", value_parser = flag::<Address>)]
    server: Option<Address>,
    /// The server's API key [env: BATON_API_KEY]
    #[arg(long, value_name = "KEY", value_parser = flag::<Secret>)]
    api_key: Option<Secret>,
    /// Which API to measure: prompts are token ids (completions, baton.v1) or words (chat)
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    endpoint: Endpoint,
    /// Model to ask for [default: the first that the server names]
    #[arg(long)]
    model: Option<String>,

    #[command(flatten)]
    load: LoadFlags,
    /// Requests to send before, one after the other
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    warmup: usize,
    /// Let an end-of-sequence token end an output before its length
    #[arg(long, help_heading = "Load")]
    stop_at_eos: bool,
    /// Sampling temperature, 0 to 2 [default: the server's]
    #[arg(long, help_heading = "Load", value_parser = temperature)]
    temperature: Option<f64>,
    /// Draw token ids below this [default: the server's vocabulary]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    vocab_size: Option<NonZeroU32>,
    /// Most time for one request
    #[arg(long, value_name = "DURATION", default_value = "10m", help_heading = "Load", value_parser = flag::<Span>)]
    timeout: Span,

    /// Count the requests that meet all of these: ttft:DURATION,tpot:DURATION,e2e:DURATION; a bare number is milliseconds
    #[arg(long, value_name = "OBJECTIVE", num_args = 1.., value_delimiter = ',', help_heading = "Goodput")]
    goodput: Vec<String>,
    /// Find the highest rate at which enough requests meet the objectives, from --rate on (DistServe's goodput)
    #[arg(long, conflicts_with_all = ["concurrency", "compare"], requires = "goodput", help_heading = "Goodput")]
    sweep: bool,
    /// Share of requests that must meet the objectives at a rate
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share, help_heading = "Goodput")]
    attainment: f64,
    /// Most rates to try
    #[arg(long, value_name = "N", default_value = "12", value_parser = flag::<NonZeroU32>, help_heading = "Goodput")]
    sweep_points: NonZeroU32,
    /// Arrivals of each rate last at least so long
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds, help_heading = "Goodput")]
    sweep_seconds: f64,
    /// Stop when the lowest rate missed is above the highest met by at most this share
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = share, help_heading = "Goodput")]
    sweep_precision: f64,

    /// Measure this server in turn with the other, A B A B, and print ratios
    #[arg(long, value_name = "URL", value_parser = flag::<Address>, help_heading = "Comparison")]
    compare: Option<Address>,
    /// How often
    #[arg(long, value_name = "N", default_value = "3", value_parser = flag::<NonZeroU32>, help_heading = "Comparison")]
    rounds: NonZeroU32,

    /// Print the report as JSON
    #[arg(long, help_heading = "Report")]
    json: bool,
    /// Write the report as JSON to this file
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    output: Option<PathBuf>,
    /// Write a page with plots to this file; it needs nothing else to be shown
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    html: Option<PathBuf>,
    /// Put one entry per request into the JSON
    #[arg(long, help_heading = "Report")]
    details: bool,
    /// What to call this measurement in the report
    #[arg(long, help_heading = "Report")]
    label: Option<String>,
    /// Commit to report [default: the one checked out in the working directory]
    #[arg(long, help_heading = "Report")]
    commit: Option<String>,
}

/// The APIs, as the flag names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Endpoint {
    Completions,
    Chat,
    #[value(name = "baton.v1")]
    BatonV1,
}

impl From<Endpoint> for EndpointKind {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Completions => EndpointKind::Completions,
            Endpoint::Chat => EndpointKind::Chat,
            Endpoint::BatonV1 => EndpointKind::BatonV1,
        }
    }
}

/// A number for which `holds`.
fn number(text: &str, expected: &'static str, holds: impl Fn(f64) -> bool) -> Result<f64, &'static str> {
    text.parse().ok().filter(|number| holds(*number)).ok_or(expected)
}

fn temperature(text: &str) -> Result<f64, &'static str> {
    number(text, "expected a number from 0 to 2", |number| {
        (0.0..=2.0).contains(&number)
    })
}

fn share(text: &str) -> Result<f64, &'static str> {
    number(text, "expected a number above 0 and at most 1", |number| {
        number > 0.0 && number <= 1.0
    })
}

fn seconds(text: &str) -> Result<f64, &'static str> {
    number(text, "expected seconds, from 0 to 86400", |number| {
        (0.0..=86_400.0).contains(&number)
    })
}

impl BenchFlags {
    /// The benchmark these flags describe.
    pub fn resolve(self, layers: &Layers) -> Result<BenchConfig, ConfigError> {
        let default_server = || Address::Tcp {
            host: "127.0.0.1".into(),
            port: 8000,
        };
        let server = layers.pick("server", self.server)?.unwrap_or_else(default_server);
        for (name, address) in [("server", Some(&server)), ("compare", self.compare.as_ref())] {
            if let Some(Address::Unix(_)) = address {
                let found = address.map(ToString::to_string).unwrap_or_default();
                return Err(ConfigError::Impossible(format!(
                    "{name}: found {found}, expected host:port or http://host:port"
                )));
            }
        }
        let objectives = objectives(&self.goodput)?;
        let is_sweep = self.sweep;
        let trace_path = self.load.trace.clone();
        let workload = self.load.resolve(is_sweep)?;
        let mode = match (self.compare, workload.arrivals) {
            (Some(other), _) => Mode::Compare {
                other,
                n_rounds: self.rounds.get(),
            },
            (None, Arrivals::Open { rate, .. }) if is_sweep => Mode::Sweep(SweepOptions {
                start: rate,
                attainment: self.attainment,
                max_points: self.sweep_points.get(),
                precision: self.sweep_precision,
                point_seconds: self.sweep_seconds,
            }),
            (None, _) => Mode::Once,
        };
        Ok(BenchConfig {
            server,
            endpoint: self.endpoint.into(),
            model: self.model,
            workload,
            trace_path,
            mode,
            objectives,
            n_warmup: self.warmup,
            ignore_eos: !self.stop_at_eos,
            temperature: self.temperature,
            vocab_size: self.vocab_size.map(NonZeroU32::get),
            timeout: self.timeout.0,
            api_key: layers.pick("api_key", self.api_key)?,
            json: self.json,
            output: self.output,
            html: self.html,
            details: self.details,
            label: self.label,
            commit: self.commit,
        })
    }
}

fn objectives(texts: &[String]) -> Result<Objectives, ConfigError> {
    let mut objectives = Objectives::default();
    for text in texts {
        if objectives.add(text).is_none() {
            return Err(ConfigError::Impossible(format!(
                "goodput: found {text:?}, expected {}",
                <Objectives as crate::config::Setting>::EXPECTED
            )));
        }
    }
    Ok(objectives)
}

/// `Some` number, or `default`.
fn or_number(flag: Option<NonZeroUsize>, default: usize) -> usize {
    flag.map_or(default, NonZeroUsize::get)
}
