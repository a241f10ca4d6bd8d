//! `baton bench`: flags of the load generator.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::bench::{Arrivals, BenchConfig, EndpointKind};
use crate::config::{Address, ConfigError, Layers, Secret, Span, flag};

/// A benchmark of more requests than this would keep too many samples in memory.
const N_PROMPTS_LIMIT: usize = 10_000_000;

const EXAMPLES: &str = "\
Examples:
  Eight requests in flight, 512 tokens in, 128 out:
    baton bench --concurrency 8 --num-prompts 64 --input-len 512 --output-len 128
  A Poisson process of 2.5 requests per second, and a JSON report:
    baton bench --rate 2.5 --num-prompts 200 --output results/rate-2.5.json
  All prompts begin with the same 256 tokens:
    baton bench --concurrency 4 --input-len 512 --prefix-len 256
  Another kind of server:
    baton bench --server http://127.0.0.1:9000 --endpoint chat --concurrency 4

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
    /// Which API to measure: prompts are token ids (completions) or words (chat)
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    endpoint: Endpoint,
    /// Model to ask for [default: the first that the server names]
    #[arg(long)]
    model: Option<String>,

    /// Closed loop: this many requests in flight [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "rate", help_heading = "Load", value_parser = flag::<NonZeroUsize>)]
    concurrency: Option<NonZeroUsize>,
    /// Open loop: a Poisson process of this many requests per second; inf sends all at once
    #[arg(long, value_name = "PER_SECOND", help_heading = "Load", value_parser = rate)]
    rate: Option<f64>,
    /// Requests to measure
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Load", value_parser = flag::<NonZeroUsize>)]
    num_prompts: NonZeroUsize,
    /// Requests to send before, one after the other
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    warmup: usize,
    /// Tokens (chat: words) of each prompt
    #[arg(long, value_name = "N", default_value = "128", help_heading = "Load", value_parser = flag::<NonZeroUsize>)]
    input_len: NonZeroUsize,
    /// Leading tokens that all prompts share
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Load")]
    prefix_len: usize,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    output_len: NonZeroU32,
    /// Let an end-of-sequence token end an output before its length
    #[arg(long, help_heading = "Load")]
    stop_at_eos: bool,
    /// Sampling temperature, 0 to 2 [default: the server's]
    #[arg(long, help_heading = "Load", value_parser = temperature)]
    temperature: Option<f64>,
    /// Draw token ids below this [default: the server's vocabulary]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = flag::<NonZeroU32>)]
    vocab_size: Option<NonZeroU32>,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    seed: u64,
    /// Most time for one request
    #[arg(long, value_name = "DURATION", default_value = "10m", help_heading = "Load", value_parser = flag::<Span>)]
    timeout: Span,

    /// Print the report as JSON
    #[arg(long, help_heading = "Report")]
    json: bool,
    /// Write the report as JSON to this file
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    output: Option<PathBuf>,
    /// Put one entry per request into the JSON
    #[arg(long, help_heading = "Report")]
    details: bool,
    /// Commit to report [default: the one checked out in the working directory]
    #[arg(long, help_heading = "Report")]
    commit: Option<String>,
}

/// The APIs, as the flag names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Endpoint {
    Completions,
    Chat,
}

impl From<Endpoint> for EndpointKind {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Completions => EndpointKind::Completions,
            Endpoint::Chat => EndpointKind::Chat,
        }
    }
}

fn rate(text: &str) -> Result<f64, &'static str> {
    let rate: f64 = text.parse().map_err(|_| "expected a number above 0, or inf")?;
    if rate > 0.0 {
        Ok(rate)
    } else {
        Err("expected a number above 0, or inf")
    }
}

fn temperature(text: &str) -> Result<f64, &'static str> {
    let temperature: f64 = text.parse().map_err(|_| "expected a number from 0 to 2")?;
    if (0.0..=2.0).contains(&temperature) {
        Ok(temperature)
    } else {
        Err("expected a number from 0 to 2")
    }
}

impl BenchFlags {
    /// The benchmark these flags describe.
    pub fn resolve(self, layers: &Layers) -> Result<BenchConfig, ConfigError> {
        let default_server = || Address::Tcp {
            host: "127.0.0.1".into(),
            port: 8000,
        };
        let server = layers.pick("server", self.server)?.unwrap_or_else(default_server);
        let impossible = |message: String| Err(ConfigError::Impossible(message));
        if let Address::Unix(_) = server {
            return impossible(format!(
                "server: found {server}, expected host:port or http://host:port"
            ));
        }
        if self.prefix_len > self.input_len.get() {
            return impossible(format!(
                "prefix-len: found {}, expected at most input-len ({})",
                self.prefix_len, self.input_len
            ));
        }
        if self.num_prompts.get() > N_PROMPTS_LIMIT {
            return impossible(format!(
                "num-prompts: found {}, expected at most {N_PROMPTS_LIMIT}",
                self.num_prompts
            ));
        }
        let concurrency = self.concurrency.map_or(1, NonZeroUsize::get);
        Ok(BenchConfig {
            server,
            endpoint: self.endpoint.into(),
            model: self.model,
            arrivals: self
                .rate
                .map_or(Arrivals::Closed { concurrency }, |rate| Arrivals::Open { rate }),
            n_prompts: self.num_prompts.get(),
            n_warmup: self.warmup,
            input_len: self.input_len.get(),
            prefix_len: self.prefix_len,
            output_len: self.output_len.get(),
            ignore_eos: !self.stop_at_eos,
            temperature: self.temperature,
            vocab_size: self.vocab_size.map(NonZeroU32::get),
            seed: self.seed,
            timeout: self.timeout.0,
            api_key: layers.pick("api_key", self.api_key)?,
            json: self.json,
            output: self.output,
            details: self.details,
            commit: self.commit,
        })
    }
}
