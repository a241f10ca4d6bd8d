//! `baton top`: a live view of a running cluster.

use std::time::Duration;

use clap::Args;

use super::ctl::ServerFlags;
use crate::config::{ConfigError, Layers, Span, flag};
use crate::top::TopConfig;

/// Polling faster would show the same reports again.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  baton top
  baton top --server http://node-0:8000 --interval 2s
  baton top --once

Keys: q quits, p pauses, s changes the order of requests, the arrows scroll.";

/// Flags of `baton top`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct TopFlags {
    #[command(flatten)]
    server: ServerFlags,
    /// Time from one look to the next, at least 100ms
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = flag::<Span>)]
    interval: Span,
    /// Print one frame as text, and end
    #[arg(long)]
    once: bool,
}

impl TopFlags {
    /// Whose cluster to show, and how.
    pub fn resolve(self, layers: &Layers) -> Result<TopConfig, ConfigError> {
        Ok(TopConfig {
            ctl: self.server.resolve(false, layers)?,
            interval: self.interval.0.clamp(SHORTEST_INTERVAL, Duration::from_secs(3600)),
            once: self.once,
        })
    }
}
