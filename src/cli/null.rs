//! `baton null`: the front door over a generator without a model. Hidden: for development only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::Args;

use super::groups::{ModelFlags, ProcessFlags};
use crate::config::{ConfigError, Layers, Span, flag};
use crate::logging::LogConfig;
use crate::null_generator::NullOptions;
use crate::null_process::NullConfig;

/// Flags of `baton null`.
#[derive(Args, Debug, Default)]
pub struct NullFlags {
    #[command(flatten)]
    model: ModelFlags,
    /// Port on 127.0.0.1; 0: a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// From a request to its first token [default: at once]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    first_token_after: Option<Span>,
    /// From one token to the next [default: at once]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    token_every: Option<Span>,
    #[command(flatten)]
    pub(super) process: ProcessFlags,
}

impl NullFlags {
    /// The process these flags describe.
    pub fn resolve(self, layers: &Layers) -> Result<(NullConfig, LogConfig), ConfigError> {
        let log = self.process.resolve(layers)?;
        let (model, max_model_len) = self.model.resolve(layers)?;
        let span = |flag: Option<Span>| flag.map_or(Duration::ZERO, |span| span.0);
        let config = NullConfig {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.port),
            model,
            max_model_len,
            options: NullOptions {
                first_token_after: span(self.first_token_after),
                token_every: span(self.token_every),
                ..NullOptions::default()
            },
        };
        Ok((config, log))
    }
}
