//! `baton worker`: one process of one instance, or of several.

use baton_scheduler::ids::{InstanceId, Role};
use clap::Args;

use super::groups::{EngineFlags, LinkFlags, ModelFlags, ProcessFlags};
use crate::config::{Address, Addresses, ConfigError, Layers, Machine, Roles, Setting as _, flag};
use crate::logging::LogConfig;
use crate::worker_process::{HostedInstance, WorkerConfig};

const EXAMPLES: &str = "\
Examples:
  A prefill and a decode instance of a scheduler on the same machine:
    baton worker --role prefill --scheduler 127.0.0.1:8000 --model models/Llama-3.2-1B-Instruct
    baton worker --role decode  --scheduler 127.0.0.1:8000 --model models/Llama-3.2-1B-Instruct
  Both in one process, where KV is handed over without leaving it; --threads and --kv-memory are of each instance:
    baton worker --role prefill,decode --id node-3 --scheduler 127.0.0.1:8000 --model ...
  On another machine, reachable by the others as node-3:
    baton worker --role decode --id decode-3 --listen node-3:7000 --scheduler node-0:8000 --model ...

Every worker of a cluster must be given the same model, dtype, block size and BATON_CLUSTER_SECRET.";

/// Flags of `baton worker`.
#[derive(Args, Debug, Default)]
#[command(after_long_help = EXAMPLES)]
pub struct WorkerFlags {
    /// What the instance is used for: prefill, decode or mixed; several with commas between are one instance each, all in
    /// this process, each with its own --threads and --kv-memory
    #[arg(long, value_name = "ROLE[,ROLE]", value_parser = flag::<Roles>)]
    pub role: Option<Roles>,
    /// Where the scheduler process is: host:port or unix:/path
    #[arg(long, value_name = "ADDR", value_parser = flag::<Address>)]
    pub scheduler: Option<Address>,
    /// Name of the instance, unique in the cluster; of several instances, a name for each with commas between, or one that
    /// their roles are added to: NAME-prefill, NAME-decode, NAME-decode-2 [default: the role and the process id]
    #[arg(long, value_name = "NAME", value_parser = flag::<String>)]
    pub id: Option<String>,
    /// Where other processes reach this one: host:port or unix:/path; of several instances, an address for each with commas
    /// between, or one with port 0 [default: 127.0.0.1:0, a free port]
    #[arg(long, value_name = "ADDR", value_parser = flag::<Addresses>)]
    pub listen: Option<Addresses>,
    /// Where others are told to reach this one, when that is not where it listens (a proxy, say); an address for each
    /// instance [default: --listen]
    #[arg(long, value_name = "ADDR", value_parser = flag::<Addresses>)]
    pub advertise: Option<Addresses>,
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
        let Roles(roles) = layers
            .pick("role", self.role)?
            .ok_or_else(|| missing("role", Roles::EXPECTED))?;
        let scheduler = layers
            .pick("scheduler", self.scheduler)?
            .ok_or_else(|| missing("scheduler", Address::EXPECTED))?;
        let ids = names(&roles, layers.pick("id", self.id)?.as_deref())?;
        let listen = layers.pick("listen", self.listen)?;
        let listen = addresses("listen", listen.unwrap_or_else(free_port), &roles)?;
        let advertise = match layers.pick("advertise", self.advertise)? {
            Some(given) => addresses("advertise", given, &roles)?.into_iter().map(Some).collect(),
            None => vec![None; roles.len()],
        };
        let links = self.links.resolve(layers)?;
        if links.cluster_secret.is_none()
            && let Some(open) = listen.iter().find(|address| !address.is_local())
        {
            let message =
                format!("cluster_secret: missing, expected one because {open} can be reached from the network");
            return Err(ConfigError::Impossible(message));
        }
        let n_instances = roles.len();
        let hosted = roles.into_iter().zip(ids).zip(listen.into_iter().zip(advertise));
        let instances = hosted.map(|((role, id), (listen, advertise))| HostedInstance {
            id,
            role,
            listen,
            advertise,
        });
        let (model, max_model_len) = self.model.resolve(layers)?;
        let engine = self.engine.resolve(layers, machine, n_instances, max_model_len)?;
        Ok((
            WorkerConfig {
                instances: instances.collect(),
                scheduler,
                model,
                engine,
                links,
            },
            log,
        ))
    }
}

fn free_port() -> Addresses {
    Addresses(vec![Address::Tcp {
        host: "127.0.0.1".into(),
        port: 0,
    }])
}

/// The names of the instances: each its own, or `given` with the roles added.
fn names(roles: &[Role], given: Option<&str>) -> Result<Vec<InstanceId>, ConfigError> {
    let impossible = |message: String| Err(ConfigError::Impossible(message));
    let own: Vec<&str> = given.map_or_else(Vec::new, |given| given.split(',').collect());
    let ids: Vec<String> = match own[..] {
        [] | [_] if roles.len() > 1 || own.is_empty() => {
            let of_role = |(idx, role): (usize, &Role)| {
                let nth = 1 + roles[..idx].iter().filter(|before| *before == role).count();
                let name = match given {
                    Some(base) => format!("{base}-{role}"),
                    None => format!("{role}-{}", std::process::id()),
                };
                if nth == 1 { name } else { format!("{name}-{nth}") }
            };
            roles.iter().enumerate().map(of_role).collect()
        }
        _ => own.iter().map(|id| (*id).to_owned()).collect(),
    };
    if ids.len() != roles.len() {
        let n_roles = roles.len();
        return impossible(format!(
            "id: found {} names, expected one for each of {n_roles} roles, or one",
            ids.len()
        ));
    }
    for (idx, id) in ids.iter().enumerate() {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if id.is_empty() || id.len() > 64 || !id.bytes().all(plain) {
            return impossible(format!(
                "id: found {id:?}, expected up to 64 letters, digits, '-', '_' and '.'"
            ));
        }
        if ids[..idx].contains(id) {
            return impossible(format!("id: found {id:?} twice, expected a name for each instance"));
        }
    }
    Ok(ids.iter().map(|id| InstanceId::new(id)).collect())
}

/// One address for each role.
fn addresses(name: &str, given: Addresses, roles: &[Role]) -> Result<Vec<Address>, ConfigError> {
    match &given.0[..] {
        all if all.len() == roles.len() => Ok(given.0),
        [any_port @ Address::Tcp { port: 0, .. }] => Ok(vec![any_port.clone(); roles.len()]),
        others => {
            let found: Vec<String> = others.iter().map(Address::to_string).collect();
            let (found, n_roles) = (found.join(","), roles.len());
            Err(ConfigError::Impossible(format!(
                "{name}: found {found}, expected an address for each of {n_roles} roles, or one with port 0"
            )))
        }
    }
}
