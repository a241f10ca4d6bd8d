//! `baton serve`: a whole cluster on one machine.

use baton_scheduler::ids::{InstanceId, Role};
use clap::Args;

use super::groups::{EngineFlags, FrontDoorFlags, LinkFlags, ModelFlags, ProcessFlags};
use crate::config::{Address, ConfigError, Layers, Machine, Secret, Switch, flag};
use crate::scheduler_process::SchedulerConfig;
use crate::supervisor::{InstancePlan, ProcessPlan, ServeConfig};
use crate::worker_process::{HostedInstance, WorkerConfig};

/// More instances than this on one machine is a typing error.
const N_INSTANCES_LIMIT: u32 = 256;

const EXAMPLES: &str = "\
Examples:
  The built-in toy model, one prefill and one decode process:
    baton serve
  A model folder, two prefill processes and one decode process:
    baton serve --model models/Llama-3.2-1B-Instruct --prefill 2 --decode 1
  The same pair in one process, where KV is handed over without leaving it:
    baton serve --colocate
  Ask it:
    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{\"model\": \"baton-demo\", \"messages\": [{\"role\": \"user\", \"content\": \"What is 37 + 58?\"}]}'
  Another port, from the environment, and logs as JSON:
    BATON_PORT=9000 baton serve --log-format json

Each flag is also a variable and a key of the --config file: --kv-memory is BATON_KV_MEMORY and kv_memory.
A flag wins over the variable, the variable over the file.
Exit codes: 0 stopped, 1 failed while running, 2 wrong usage or configuration.";

/// Flags of `baton serve`.
#[derive(Args, Debug, Default)]
#[command(after_long_help = EXAMPLES, after_help = "Examples: baton serve --help")]
pub struct ServeFlags {
    /// Prefill instances [default: 1 if none of --prefill, --decode and --mixed is given]
    #[arg(long, value_name = "N", value_parser = flag::<u16>, help_heading = "Pools")]
    pub prefill: Option<u16>,
    /// Decode instances [default: 1 if none of --prefill, --decode and --mixed is given]
    #[arg(long, value_name = "N", value_parser = flag::<u16>, help_heading = "Pools")]
    pub decode: Option<u16>,
    /// Instances that do both phases [default: 0]
    #[arg(long, value_name = "N", value_parser = flag::<u16>, help_heading = "Pools")]
    pub mixed: Option<u16>,
    /// Two instances to a process: each prefill instance with a decode instance, mixed ones with each other; what is left
    /// over has its own [default: off]
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "on",
          help_heading = "Pools")]
    pub colocate: Option<Switch>,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    front_door: FrontDoorFlags,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    links: LinkFlags,
    #[command(flatten)]
    pub(super) process: ProcessFlags,
}

impl ServeFlags {
    /// The cluster these flags describe.
    pub fn resolve(self, layers: &Layers, machine: &Machine) -> Result<ServeConfig, ConfigError> {
        let log = self.process.resolve(layers)?;
        let counts = [
            (Role::Prefill, layers.pick("prefill", self.prefill)?),
            (Role::Decode, layers.pick("decode", self.decode)?),
            (Role::Mixed, layers.pick("mixed", self.mixed)?),
        ];
        let instances = plan(counts)?;
        let n_instances = instances.len();
        let processes = match layers.pick("colocate", self.colocate)?.unwrap_or(Switch::Off) {
            Switch::On => in_pairs(instances),
            Switch::Off => instances.into_iter().map(|plan| ProcessPlan(vec![plan])).collect(),
        };
        let (model, max_model_len) = self.model.resolve(layers)?;
        let mut links = self.links.resolve(layers)?;
        // Other users of the machine must not be able to join, and nobody needs to know the secret but the children.
        links.cluster_secret.get_or_insert_with(Secret::random);
        let engine = self.engine.resolve(layers, machine, n_instances, max_model_len)?;
        let front_door = self
            .front_door
            .resolve(layers, model.clone(), max_model_len, links.clone())?;
        let scheduler = SchedulerConfig {
            dtype: Some(engine.dtype),
            n_awaited_instances: n_instances,
            ..front_door
        };
        let unset = Address::Unix("/unset".into());
        let worker = WorkerConfig {
            instances: vec![HostedInstance {
                id: InstanceId::new("unset"),
                role: Role::Mixed,
                listen: unset.clone(),
                advertise: None,
            }],
            scheduler: unset,
            model,
            engine,
            links,
        };
        Ok(ServeConfig {
            scheduler,
            worker,
            processes,
            log,
            runtime_dir: layers.environment.runtime_dir.clone(),
        })
    }
}

/// The instances to start, in order: prefill, decode, mixed.
fn plan(counts: [(Role, Option<u16>); 3]) -> Result<Vec<InstancePlan>, ConfigError> {
    let none_given = counts.iter().all(|(_, count)| count.is_none());
    let count_of = |role, count: Option<u16>| count.unwrap_or(u16::from(none_given && role != Role::Mixed));
    let counts = counts.map(|(role, count)| (role, count_of(role, count)));
    let [(_, n_prefill), (_, n_decode), (_, n_mixed)] = counts;
    let total = u32::from(n_prefill) + u32::from(n_decode) + u32::from(n_mixed);
    let found = format!("prefill {n_prefill}, decode {n_decode}, mixed {n_mixed}");
    if n_mixed == 0 && (n_prefill == 0 || n_decode == 0) {
        let expected = "expected a mixed instance, or a prefill and a decode instance";
        return Err(ConfigError::Impossible(format!("{found}: {expected}")));
    }
    if total > N_INSTANCES_LIMIT {
        return Err(ConfigError::Impossible(format!(
            "{found}: expected at most {N_INSTANCES_LIMIT} instances in all"
        )));
    }
    let named = |(role, count): (Role, u16)| {
        (0..count).map(move |index| InstancePlan {
            role,
            id: InstanceId::new(&format!("{role}-{index}")),
        })
    };
    Ok(counts.into_iter().flat_map(named).collect())
}

/// The instances of each process when two share one: prefill with decode in order, mixed with mixed.
fn in_pairs(instances: Vec<InstancePlan>) -> Vec<ProcessPlan> {
    let of = |role| instances.iter().filter(move |plan| plan.role == role).cloned();
    let (mut prefill, mut decode) = (of(Role::Prefill), of(Role::Decode));
    let mut processes = Vec::new();
    loop {
        let pair: Vec<InstancePlan> = prefill.next().into_iter().chain(decode.next()).collect();
        if pair.is_empty() {
            break;
        }
        processes.push(ProcessPlan(pair));
    }
    let mixed: Vec<InstancePlan> = of(Role::Mixed).collect();
    processes.extend(mixed.chunks(2).map(|pair| ProcessPlan(pair.to_vec())));
    processes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colocated_instances_are_paired_and_none_is_lost() {
        let pairs = |prefill, decode, mixed| {
            let counts = [(Role::Prefill, prefill), (Role::Decode, decode), (Role::Mixed, mixed)];
            let instances = plan(counts.map(|(role, count)| (role, Some(count)))).expect("a cluster");
            let names: Vec<String> = in_pairs(instances).iter().map(|plan| plan.name().to_string()).collect();
            names.join(" ")
        };
        assert_eq!(pairs(1, 1, 0), "prefill-0+decode-0");
        assert_eq!(pairs(1, 3, 0), "prefill-0+decode-0 decode-1 decode-2");
        assert_eq!(pairs(2, 1, 3), "prefill-0+decode-0 prefill-1 mixed-0+mixed-1 mixed-2");
    }

    fn names(prefill: Option<u16>, decode: Option<u16>, mixed: Option<u16>) -> Result<String, String> {
        plan([(Role::Prefill, prefill), (Role::Decode, decode), (Role::Mixed, mixed)])
            .map(|plans| {
                plans
                    .iter()
                    .map(|plan| plan.id.to_string())
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn one_of_each_is_the_default_only_when_no_count_is_given() {
        assert_eq!(names(None, None, None).as_deref(), Ok("prefill-0 decode-0"));
        assert_eq!(names(None, None, Some(1)).as_deref(), Ok("mixed-0"));
        assert_eq!(
            names(Some(2), Some(1), None).as_deref(),
            Ok("prefill-0 prefill-1 decode-0")
        );
        assert_eq!(
            names(Some(1), None, Some(2)).as_deref(),
            Ok("prefill-0 mixed-0 mixed-1")
        );
    }

    #[test]
    fn pools_that_cannot_serve_are_refused_with_their_counts() {
        for (prefill, decode, mixed) in [
            (Some(2), None, None),
            (None, Some(1), None),
            (Some(0), Some(0), Some(0)),
        ] {
            let message = names(prefill, decode, mixed).expect_err("cannot serve");
            assert!(message.contains("expected a mixed instance, or"), "{message}");
        }
        assert!(
            names(Some(200), Some(100), None)
                .expect_err("too many")
                .contains("at most 256")
        );
    }
}
