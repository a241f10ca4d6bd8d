//! `baton worker`: one instance.

use baton_scheduler::ids::{InstanceId, Role};
use clap::Args;

use super::groups::{EngineFlags, LinkFlags, ModelFlags, ProcessFlags};
use crate::config::{Address, ConfigError, Layers, Machine, Setting as _, flag};
use crate::logging::LogConfig;
use crate::worker_process::WorkerConfig;

const EXAMPLES: &str = "\
Examples:
  A prefill and a decode instance of a scheduler on the same machine:
    baton worker --role prefill --scheduler 127.0.0.1:8000 --model models/Llama-3.2-1B-Instruct
    baton worker --role decode  --scheduler 127.0.0.1:8000 --model models/Llama-3.2-1B-Instruct
  On another machine, reachable by the others as node-3:
    baton worker --role decode --id decode-3 --listen node-3:7000 --scheduler node-0:8000 --model ...

Every worker of a cluster must be given the same model, dtype, block size and BATON_CLUSTER_SECRET.";

/// Flags of `baton worker`.
#[derive(Args, Debug, Default)]
#[command(after_long_help = EXAMPLES)]
pub struct WorkerFlags {
    /// What the instance is used for: prefill, decode or mixed
    #[arg(long, value_parser = flag::<Role>)]
    pub role: Option<Role>,
    /// Where the scheduler process is: host:port or unix:/path
    #[arg(long, value_name = "ADDR", value_parser = flag::<Address>)]
    pub scheduler: Option<Address>,
    /// Name of the instance, unique in the cluster [default: the role and the process id]
    #[arg(long, value_name = "NAME", value_parser = flag::<String>)]
    pub id: Option<String>,
    /// Where other processes reach this one: host:port or unix:/path [default: 127.0.0.1:0, a free port]
    #[arg(long, value_name = "ADDR", value_parser = flag::<Address>)]
    pub listen: Option<Address>,
    /// Where others are told to reach this one, when that is not where it listens (a proxy, say) [default: --listen]
    #[arg(long, value_name = "ADDR", value_parser = flag::<Address>)]
    pub advertise: Option<Address>,
    /// Set by `baton serve`: end when stdin ends
    #[arg(long, hide = true)]
    pub(super) supervised: bool,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    links: LinkFlags,
    #[command(flatten)]
    pub(super) process: ProcessFlags,
}

impl WorkerFlags {
    /// The process these flags describe.
    pub fn resolve(self, layers: &Layers, machine: &Machine) -> Result<(WorkerConfig, LogConfig), ConfigError> {
        let log = self.process.resolve(layers)?;
        let missing =
            |name: &str, expected: &str| ConfigError::Impossible(format!("{name}: missing, expected {expected}"));
        let role = layers
            .pick("role", self.role)?
            .ok_or_else(|| missing("role", Role::EXPECTED))?;
        let scheduler = layers
            .pick("scheduler", self.scheduler)?
            .ok_or_else(|| missing("scheduler", Address::EXPECTED))?;
        let id = layers
            .pick("id", self.id)?
            .unwrap_or_else(|| format!("{role}-{}", std::process::id()));
        let is_plain = id.len() <= 64
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !is_plain {
            let message = format!("id: found {id:?}, expected up to 64 letters, digits, '-', '_' and '.'");
            return Err(ConfigError::Impossible(message));
        }
        let default_listen = || Address::Tcp {
            host: "127.0.0.1".into(),
            port: 0,
        };
        let listen = layers.pick("listen", self.listen)?.unwrap_or_else(default_listen);
        let advertise = layers.pick("advertise", self.advertise)?;
        let links = self.links.resolve(layers)?;
        if !listen.is_local() && links.cluster_secret.is_none() {
            let message =
                format!("cluster_secret: missing, expected one because {listen} can be reached from the network");
            return Err(ConfigError::Impossible(message));
        }
        let (model, max_model_len) = self.model.resolve(layers)?;
        let engine = self.engine.resolve(layers, machine, 1, max_model_len)?;
        Ok((
            WorkerConfig {
                id: InstanceId::new(&id),
                role,
                listen,
                advertise,
                scheduler,
                model,
                engine,
                links,
            },
            log,
        ))
    }
}
