//! `baton ctl`: the operator's questions to a running cluster.

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::config::{Address, ConfigError, Layers, Secret, Span, flag};
use crate::ctl::CtlConfig;

const EXAMPLES: &str = "\
Examples:
  baton ctl instances
  baton ctl --server http://node-0:8000 --json instances";

/// Flags of `baton ctl`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CtlFlags {
    /// URL of the scheduler process [default: http://127.0.0.1:8000] [env: BATON_SERVER]
    #[arg(long, value_name = "URL", value_parser = flag::<Address>)]
    pub server: Option<Address>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Give up after this long
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = flag::<Span>)]
    pub timeout: Span,
    /// The server's API key [env: BATON_API_KEY]
    #[arg(long, value_name = "KEY", value_parser = flag::<Secret>)]
    pub api_key: Option<Secret>,
    /// The cluster's shared secret [env: BATON_CLUSTER_SECRET]
    #[arg(long, value_name = "SECRET", value_parser = flag::<Secret>)]
    pub cluster_secret: Option<Secret>,
    #[command(subcommand)]
    pub(super) command: CtlCommand,
}

/// What to ask.
#[derive(Subcommand, Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtlCommand {
    /// The instances of the cluster, their roles and loads
    Instances,
}

impl CtlFlags {
    /// Whom to ask, and how.
    pub fn resolve(self, layers: &Layers) -> Result<(CtlConfig, CtlCommand), ConfigError> {
        let default_server = || Address::Tcp {
            host: "127.0.0.1".into(),
            port: 8000,
        };
        let config = CtlConfig {
            server: layers.pick("server", self.server)?.unwrap_or_else(default_server),
            json: self.json,
            timeout: Duration::min(self.timeout.0, Duration::from_secs(3600)),
            api_key: layers.pick("api_key", self.api_key)?,
            cluster_secret: layers.pick("cluster_secret", self.cluster_secret)?,
        };
        Ok((config, self.command))
    }
}
