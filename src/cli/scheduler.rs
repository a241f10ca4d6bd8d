//! `baton scheduler`: the front door of a cluster whose workers run elsewhere.

use clap::Args;

use super::groups::{FrontDoorFlags, LinkFlags, ModelFlags, ProcessFlags};
use crate::config::{ConfigError, Layers};
use crate::logging::LogConfig;
use crate::scheduler_process::SchedulerConfig;

const EXAMPLES: &str = "\
Examples:
  On one machine:
    baton scheduler --model models/Llama-3.2-1B-Instruct
  For workers on other machines:
    BATON_CLUSTER_SECRET=$(openssl rand -hex 32) baton scheduler --host 0.0.0.0 --model models/Llama-3.2-1B-Instruct

The same port serves OpenAI HTTP, gRPC, and the registry that workers join.";

/// Flags of `baton scheduler`.
#[derive(Args, Debug, Default)]
#[command(after_long_help = EXAMPLES)]
pub struct SchedulerFlags {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    front_door: FrontDoorFlags,
    #[command(flatten)]
    links: LinkFlags,
    #[command(flatten)]
    pub(super) process: ProcessFlags,
}

impl SchedulerFlags {
    /// The process these flags describe.
    pub fn resolve(self, layers: &Layers) -> Result<(SchedulerConfig, LogConfig), ConfigError> {
        let log = self.process.resolve(layers)?;
        let (model, max_model_len) = self.model.resolve(layers)?;
        let links = self.links.resolve(layers)?;
        let config = self.front_door.resolve(layers, model, max_model_len, links)?;
        if !config.listen.ip().is_loopback() && config.links.cluster_secret.is_none() {
            let message = format!(
                "cluster_secret: missing, expected one because host {} is not loopback and any process that reaches the port could join as a worker",
                config.listen.ip()
            );
            return Err(ConfigError::Impossible(message));
        }
        Ok((config, log))
    }
}
