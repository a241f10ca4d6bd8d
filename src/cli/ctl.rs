//! `baton ctl`: the operator's questions to a running cluster, and what an operator changes in it.

use std::time::Duration;

use baton_scheduler::ids::Role;
use clap::{Args, Subcommand};

use crate::config::{Address, ConfigError, Layers, Secret, Span, flag};
use crate::ctl::{CtlConfig, Order};

const EXAMPLES: &str = "\
Examples:
  baton ctl instances
  baton ctl --server http://node-0:8000 --json requests
  baton ctl migrate 0198c9e2-7a54-7cc1-b2e1-5d6c1f0a9b33 --to decode-1
  baton ctl drain decode-0
  baton ctl drain decode-0 --undo
  baton ctl role decode-0 prefill";

/// The scheduler process to ask, and what is shown to it.
#[derive(Args, Debug)]
pub struct ServerFlags {
    /// URL of the scheduler process [default: http://127.0.0.1:8000] [env: BATON_SERVER]
    #[arg(long, value_name = "URL", value_parser = flag::<Address>)]
    pub server: Option<Address>,
    /// Give up after this long
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = flag::<Span>)]
    pub timeout: Span,
    /// The server's API key [env: BATON_API_KEY]
    #[arg(long, value_name = "KEY", value_parser = flag::<Secret>)]
    pub api_key: Option<Secret>,
    /// The cluster's shared secret [env: BATON_CLUSTER_SECRET]
    #[arg(long, value_name = "SECRET", value_parser = flag::<Secret>)]
    pub cluster_secret: Option<Secret>,
}

/// Flags of `baton ctl`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CtlFlags {
    #[command(flatten)]
    server: ServerFlags,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CtlCommand,
}

/// What to ask.
#[derive(Subcommand, Clone, Debug, PartialEq, Eq)]
pub enum CtlCommand {
    /// The instances of the cluster, their roles, loads and moves
    Instances,
    /// The requests that are open, and where they run
    Requests,
    /// Move a running request to another instance; answers when it has settled
    Migrate {
        /// The request's id, as `requests` shows it
        #[arg(value_parser = flag::<String>)]
        id: String,
        /// Name of the instance [default: the policy's choice]
        #[arg(long, value_name = "INSTANCE", value_parser = flag::<String>)]
        to: Option<String>,
    },
    /// Empty an instance by moving its requests away; answers when nothing is left there
    Drain {
        /// Name of the instance
        #[arg(value_name = "INSTANCE", value_parser = flag::<String>)]
        id: String,
        /// Take it back into use instead
        #[arg(long)]
        undo: bool,
    },
    /// Change what an instance is used for: prefill, decode or mixed
    Role {
        /// Name of the instance
        #[arg(value_name = "INSTANCE", value_parser = flag::<String>)]
        id: String,
        /// prefill, decode or mixed
        #[arg(value_parser = flag::<Role>)]
        role: Role,
    },
}

impl ServerFlags {
    /// Whom to ask, and how.
    pub fn resolve(self, json: bool, layers: &Layers) -> Result<CtlConfig, ConfigError> {
        let default_server = || Address::Tcp {
            host: "127.0.0.1".into(),
            port: 8000,
        };
        Ok(CtlConfig {
            server: layers.pick("server", self.server)?.unwrap_or_else(default_server),
            json,
            timeout: Duration::min(self.timeout.0, Duration::from_secs(3600)),
            api_key: layers.pick("api_key", self.api_key)?,
            cluster_secret: layers.pick("cluster_secret", self.cluster_secret)?,
        })
    }
}

impl CtlFlags {
    /// Whom to ask, and what.
    pub fn resolve(self, layers: &Layers) -> Result<(CtlConfig, Order), ConfigError> {
        let order = match self.command {
            CtlCommand::Instances => Order::Instances,
            CtlCommand::Requests => Order::Requests,
            CtlCommand::Migrate { id, to } => Order::Migrate { id, to },
            CtlCommand::Drain { id, undo } => Order::Drain { id, undo },
            CtlCommand::Role { id, role } => Order::Role { id, role },
        };
        Ok((self.server.resolve(self.json, layers)?, order))
    }
}
