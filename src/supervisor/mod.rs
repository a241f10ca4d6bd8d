//! `baton serve`: one process that runs the front door and keeps the instances' processes alive. Nothing here knows
//! requests.

mod child;
mod fleet;
pub mod lifeline;
mod restart;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use baton_scheduler::ids::{InstanceId, Role};
use futures::future::try_join_all;
use tokio_util::sync::CancellationToken;

use crate::config::{Address, ConfigError, ModelSource, UNIX_PATH_LIMIT};
use crate::logging::LogConfig;
use crate::scheduler_process::{SchedulerConfig, run_scheduler};
use crate::worker_process::{HostedInstance, WorkerConfig};
use crate::{announce, model_files};
use child::ChildCommand;
pub use fleet::{ChildEvent, GaveUp, Supervision};
pub use restart::{Backoff, Exit, GiveUp, RestartPolicy, Verdict};

/// How long a worker may take to end when asked to; then it is killed.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long after its own drain timeout the front door is waited for.
const DRAIN_SLACK: Duration = Duration::from_secs(2);

/// One instance to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstancePlan {
    /// Its name.
    pub id: InstanceId,
    /// What it is used for.
    pub role: Role,
}

/// The instances that one process hosts, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessPlan(pub Vec<InstancePlan>);

impl ProcessPlan {
    /// What the process is called in logs: its instances' names.
    pub fn name(&self) -> InstanceId {
        let names: Vec<String> = self.0.iter().map(|plan| plan.id.to_string()).collect();
        InstanceId::new(&names.join("+"))
    }
}

/// Everything `baton serve` is told.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// The front door, run in this process.
    pub scheduler: SchedulerConfig,
    /// What every worker is told; its instances are filled in for each.
    pub worker: WorkerConfig,
    /// The child processes.
    pub processes: Vec<ProcessPlan>,
    /// Logs of this process and of its children.
    pub log: LogConfig,
    /// Where the private folder of sockets is made.
    pub runtime_dir: PathBuf,
}

/// Serves until `shutdown`, or until an instance cannot be kept alive.
pub async fn run_serve(mut config: ServeConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    // Once here, with one progress bar, rather than by every process at the same time.
    if let Some(path) = model_files::folder(&config.worker.model).await? {
        config.scheduler.model.source = ModelSource::Folder(path.clone());
        config.worker.model.source = ModelSource::Folder(path);
    }
    let sockets = private_dir(
        &config.runtime_dir,
        config.processes.iter().flat_map(|process| &process.0),
    )?;
    let scheduler_socket = sockets.path().join("scheduler.sock");
    config.scheduler.cluster_socket = Some(scheduler_socket.clone());
    config.worker.scheduler = Address::Unix(scheduler_socket);

    let stop_scheduler = CancellationToken::new();
    let stop_children = CancellationToken::new();
    let _stop_on_return = (stop_scheduler.clone().drop_guard(), stop_children.clone().drop_guard());
    let drain = config.scheduler.drain_timeout + DRAIN_SLACK;
    let mut scheduler = tokio::spawn(run_scheduler(config.scheduler.clone(), stop_scheduler.clone()));
    let program = own_program()?;
    let children = config.processes.iter().map(|plan| {
        let name = plan.name();
        let command = |n_starts| child_command(&config, plan, &program, sockets.path(), n_starts);
        let stop_children = &stop_children;
        let log_format = config.log.format;
        async move {
            let policy = RestartPolicy::of_serve();
            let supervision = Supervision {
                id: &name,
                command: &command,
                policy,
                stop_grace: STOP_GRACE,
                log_format,
            };
            supervision.run(stop_children, |_| {}).await
        }
    });
    // Polled here, on the main thread, not spawned: see `Supervision::run`.
    let mut children = std::pin::pin!(try_join_all(children));

    let outcome = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        ended = &mut scheduler => {
            stop_children.cancel();
            let _stopped = children.await;
            let error = ended.context("the front door panicked")?;
            return error.and_then(|()| Err(anyhow::anyhow!("the front door ended by itself")));
        }
        gave_up = &mut children => match gave_up {
            Ok(_) => Err(anyhow::anyhow!("all instances ended by themselves")),
            Err(gave_up) if gave_up.why == GiveUp::Configuration => {
                Err(ConfigError::Impossible(gave_up.to_string()).into())
            }
            Err(gave_up) => Err(gave_up.into()),
        },
    };

    // The front door first, so that open requests can end on living instances.
    stop_scheduler.cancel();
    let drained = tokio::time::timeout(drain, &mut scheduler);
    match &outcome {
        // `children` has ended; those still running were killed when it dropped them.
        Err(_) => drop(drained.await),
        Ok(()) => {
            let children_ended = tokio::select! {
                ended = drained => {
                    match ended {
                        Ok(Ok(Ok(()))) => {}
                        Ok(Ok(Err(error))) => tracing::error!("front door: {error:#}"),
                        Ok(Err(error)) => tracing::error!("front door: {error}"),
                        Err(_) => tracing::warn!("front door still busy after {drain:?}; stopping anyway"),
                    }
                    false
                }
                _ = &mut children => true,
            };
            scheduler.abort();
            if children_ended {
                return outcome;
            }
            stop_children.cancel();
            let _stopped = children.await;
        }
    }
    outcome
}

/// This very executable, even if its file has been replaced since: restarted instances speak the same protocol.
fn own_program() -> anyhow::Result<PathBuf> {
    let own = Path::new("/proc/self/exe");
    if own.exists() {
        Ok(own.to_owned())
    } else {
        std::env::current_exe().context("own executable")
    }
}

/// The command of the n-th start of a process. Each start of an instance has its own socket, so none meets what an earlier one left.
fn child_command(
    config: &ServeConfig,
    plan: &ProcessPlan,
    program: &Path,
    sockets: &Path,
    n_starts: u32,
) -> ChildCommand {
    let hosted = |instance: &InstancePlan| HostedInstance {
        id: instance.id.clone(),
        role: instance.role,
        listen: Address::Unix(sockets.join(socket_name(&instance.id, n_starts))),
        advertise: None,
    };
    let worker = WorkerConfig {
        instances: plan.0.iter().map(hosted).collect(),
        ..config.worker.clone()
    };
    let mut arguments = worker.to_arguments();
    let log = [
        "--log-level",
        &config.log.level,
        "--log-format",
        config.log.format.as_str(),
        "--supervised",
    ];
    arguments.extend(log.map(Into::into));
    let secret = worker
        .links
        .cluster_secret
        .map(|secret| ("BATON_CLUSTER_SECRET".to_owned(), secret));
    ChildCommand {
        program: program.to_owned(),
        arguments,
        secrets: secret.into_iter().collect(),
        ready_lines: plan
            .0
            .iter()
            .map(|plan| announce::worker_ready_line(&plan.id.to_string()))
            .collect(),
    }
}

fn socket_name(id: &InstanceId, n_starts: u32) -> String {
    format!("{id}.{n_starts}.sock")
}

/// A folder that only this user can enter, with a path short enough for the names of all sockets.
fn private_dir<'a>(
    runtime_dir: &Path,
    instances: impl Iterator<Item = &'a InstancePlan>,
) -> anyhow::Result<tempfile::TempDir> {
    let longest = instances
        .map(|plan| socket_name(&plan.id, u32::MAX).len())
        .max()
        .unwrap_or(0);
    // Addresses of several instances have commas between.
    let runtime_dir_fits = !runtime_dir.as_os_str().as_encoded_bytes().contains(&b',');
    for parent in [runtime_dir, Path::new("/tmp")]
        .into_iter()
        .skip(usize::from(!runtime_dir_fits))
    {
        let dir = tempfile::Builder::new()
            .prefix("baton-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(parent);
        match dir {
            Ok(dir) if dir.path().as_os_str().len() + 1 + longest <= UNIX_PATH_LIMIT => return Ok(dir),
            Ok(_) => {}
            Err(error) if parent == Path::new("/tmp") => return Err(error).context("/tmp: no folder for sockets"),
            Err(error) => tracing::debug!("{}: no folder for sockets: {error}", parent.display()),
        }
    }
    anyhow::bail!(
        "{}: too long for Unix sockets, and /tmp cannot be used",
        runtime_dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_private_and_their_paths_fit() {
        let plans = [InstancePlan {
            id: InstanceId::new("prefill-255"),
            role: Role::Prefill,
        }];
        let base = tempfile::tempdir().expect("a temporary folder");
        let long = base.path().join("x".repeat(90));
        std::fs::create_dir(&long).expect("created");
        for runtime_dir in [base.path(), &long, Path::new("/no/such/folder")] {
            let dir = private_dir(runtime_dir, plans.iter()).expect("a folder");
            let mode = std::fs::metadata(dir.path()).expect("exists").permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
            assert!(dir.path().join(socket_name(&plans[0].id, u32::MAX)).as_os_str().len() <= UNIX_PATH_LIMIT);
        }
    }
}
