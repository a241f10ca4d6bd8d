//! A worker process, which hosts one instance or several: what it is told, on which command line, and how it starts.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use baton_engine::constraint::ConstraintCompiler;
use baton_engine::cuda::{CudaKvArena, CudaPlace, CudaTurn};
use baton_engine::engine::{AsyncScheduling, EngineConfig, Health, start};
use baton_engine::forward::ForwardPass as _;
use baton_engine::model::{Decoder, ModelFolder};
use baton_engine::worker::{
    Identity, KvTransports, Membership, Standing, WorkerOptions, WorkerService, join_registry, serve,
};
use baton_engine::{Backend, KvPrefault, keep_freed_memory};
use baton_scheduler::ids::{Incarnation, InstanceId, Role};
use futures::future::{join_all, try_join_all};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;

use crate::config::{Address, LoadFormat, Span, Switch};
use crate::engine_config::{CudaConfig, DeviceConfig, EngineConfig as Limits, LinkConfig, ModelSelection};
use crate::model_loading::{batch_config, load_on_card, load_on_cpu};
use crate::{announce, model_files};

/// One of the instances of a worker process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostedInstance {
    /// The instance's name, unique in the cluster.
    pub id: InstanceId,
    /// What it is used for.
    pub role: Role,
    /// Where other processes reach it. Port 0 lets the system choose.
    pub listen: Address,
    /// Where other processes are told to reach it, when that is not where it listens (behind a proxy, say).
    pub advertise: Option<Address>,
}

/// Everything a worker process is told.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Its instances, at least one. They live and leave together.
    pub instances: Vec<HostedInstance>,
    /// Where the scheduler process is.
    pub scheduler: Address,
    /// The model.
    pub model: ModelSelection,
    /// Compute, memory and limits of each instance.
    pub engine: Limits,
    /// Links to the scheduler and to other workers.
    pub links: LinkConfig,
}

impl WorkerConfig {
    /// The command line that gives a child this configuration, after the program's name. Secrets are not in it: they
    /// travel in the child's environment.
    pub fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["worker".into()];
        let mut flag = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        let list = |of: &dyn Fn(&HostedInstance) -> Option<String>| -> OsString {
            self.instances
                .iter()
                .filter_map(of)
                .collect::<Vec<_>>()
                .join(",")
                .into()
        };
        flag("--role", list(&|instance| Some(instance.role.to_string())));
        flag("--id", list(&|instance| Some(instance.id.to_string())));
        flag("--scheduler", self.scheduler.to_string().into());
        flag("--listen", list(&|instance| Some(instance.listen.to_string())));
        let advertise = list(&|instance| instance.advertise.as_ref().map(Address::to_string));
        if !advertise.is_empty() {
            flag("--advertise", advertise);
        }
        flag("--model", self.model.source.to_argument());
        flag("--served-model-name", self.model.served_name.clone().into());
        if self.model.load_format != LoadFormat::Auto {
            flag("--load-format", self.model.load_format.as_str().into());
        }
        flag("--dtype", self.engine.dtype.as_str().into());
        match &self.engine.device {
            DeviceConfig::Cpu => flag("--device", "cpu".into()),
            DeviceConfig::Cuda(cuda) => {
                flag("--device", "cuda".into());
                flag("--deterministic", cuda.deterministic.as_str().into());
                flag("--cuda-graphs", cuda.graphs.as_str().into());
                flag("--cuda-graph-max-seqs", cuda.graph_max_seqs.to_string().into());
                if !cuda.libraries.0.is_empty() {
                    flag("--cuda-libraries", cuda.libraries.to_argument());
                }
                if let Some(kernels) = &cuda.kernels {
                    flag("--cuda-kernels", kernels.into());
                }
                flag("--prefill-sm-share", cuda.prefill_sm_share.to_string().into());
            }
        }
        flag("--isa", self.engine.isa.as_str().into());
        flag("--threads", self.engine.n_threads.to_string().into());
        flag("--kv-memory", self.engine.kv_memory.to_string().into());
        flag("--kv-prefault", self.engine.kv_prefault.as_str().into());
        flag("--block-size", self.engine.block_size.to_string().into());
        if let Some(max_model_len) = self.engine.max_model_len {
            flag("--max-model-len", max_model_len.to_string().into());
        }
        flag("--max-num-seqs", self.engine.max_num_seqs.to_string().into());
        flag("--max-batch-tokens", self.engine.max_batch_tokens.to_string().into());
        flag("--keepalive", Span(self.links.keepalive).to_string().into());
        flag(
            "--progress-deadline",
            Span(self.links.progress_deadline).to_string().into(),
        );
        flag("--prefix-caching", self.engine.prefix_caching.as_str().into());
        flag("--async-scheduling", self.engine.async_scheduling.as_str().into());
        flag("--kv-transport", self.links.kv_transport.as_str().into());
        flag("--move-rate", self.links.move_rate.to_string().into());
        flag("--move-stages", self.links.move_stages.to_string().into());
        flag("--drain-timeout", Span(self.links.drain_timeout).to_string().into());
        arguments
    }
}

/// How long open streams may go on once the worker is told to stop.
const STREAM_GRACE: Duration = Duration::from_secs(4);

/// Joins the cluster with every instance and serves until `shutdown`. Prints an instance's ready line each time the
/// registry accepts it. The process ends with an error as soon as one of its instances cannot go on.
///
/// # Errors
/// A model or limits that cannot work, an address that cannot be listened on, an instance that does not compute any more.
pub async fn run_worker(config: WorkerConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    keep_freed_memory();
    let folder = Arc::new(model_files::open(&config.model).await?);
    // One vocabulary for all, read when the first constrained request comes.
    let constraints = constraints(&folder);
    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let mut running = Vec::new();
    // On a card they have one allocation for their caches.
    let arena = Arc::new(CudaKvArena::new(config.instances.len()));
    // One after the other: the first packs the weights, if nobody has, and the others map the same file; on a card, the
    // first uploads them and the others use them.
    for hosted in &config.instances {
        let (folder, arena) = (Arc::clone(&folder), Arc::clone(&arena));
        running.push(RunningInstance::start(hosted, &config, folder, arena, &constraints, &stop).await?);
    }
    let joining = try_join_all(running.iter().map(|instance| instance.join(&stop)));
    let health = try_join_all(running.iter().map(|instance| instance.watch(&stop)));
    let left = leave(&running, config.links.drain_timeout, &shutdown);
    tokio::select! {
        joined = joining => drop(joined?),
        died = health => drop(died?),
        () = left => {}
    }
    stop.cancel();
    let served = join_all(running.into_iter().map(|instance| instance.serving)).await;
    for served in served {
        served.context("the worker service panicked")??;
    }
    Ok(())
}

/// Compiles what outputs of this model may be constrained to.
fn constraints(folder: &Arc<ModelFolder>) -> ConstraintCompiler {
    let of = Arc::clone(folder);
    let load = move || match of.tokenizer() {
        Ok(Some(tokenizer)) => {
            let eos_token_ids = of.eos_token_ids(Some(&tokenizer));
            Ok((tokenizer, eos_token_ids))
        }
        Ok(None) => Err("it has no tokenizer".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    ConstraintCompiler::new(load, folder.config.vocab_size)
}

/// An instance's place on a card that others may use besides: clients wait for each step of one that generates, and for the
/// last of the many that one takes for a prompt.
fn place(role: Role, cuda: &CudaConfig, arena: Arc<CudaKvArena>) -> CudaPlace {
    let (turn, multiprocessor_percent) = match role {
        Role::Prefill => (CudaTurn::Last, Some(cuda.prefill_sm_share.0)),
        Role::Decode | Role::Mixed => (CudaTurn::First, None),
    };
    CudaPlace {
        arena: Some(arena),
        turn,
        multiprocessor_percent,
    }
}

/// An instance that can be reached.
struct RunningInstance {
    service: WorkerService,
    membership: Membership,
    serving: JoinHandle<anyhow::Result<()>>,
}

impl RunningInstance {
    /// Loads the model and listens.
    async fn start(
        hosted: &HostedInstance,
        config: &WorkerConfig,
        folder: Arc<ModelFolder>,
        arena: Arc<CudaKvArena>,
        constraints: &ConstraintCompiler,
        stop: &CancellationToken,
    ) -> anyhow::Result<RunningInstance> {
        let limits = config.engine.clone();
        let selection = config.model.clone();
        let device = config.engine.device.clone();
        match device {
            DeviceConfig::Cpu => {
                let decoder = tokio::task::spawn_blocking(move || load_on_cpu(&folder, &selection, &limits)).await??;
                RunningInstance::serve(decoder, hosted, config, constraints, stop).await
            }
            DeviceConfig::Cuda(cuda) => {
                let place = place(hosted.role, &cuda, arena);
                let load = move || load_on_card(&folder, &selection, &limits, &cuda, place);
                let decoder = tokio::task::spawn_blocking(load).await??;
                RunningInstance::serve(decoder, hosted, config, constraints, stop).await
            }
        }
    }

    /// Starts the step loop over a loaded model, and listens.
    async fn serve<B: Backend>(
        mut decoder: Decoder<B>,
        hosted: &HostedInstance,
        config: &WorkerConfig,
        constraints: &ConstraintCompiler,
        stop: &CancellationToken,
    ) -> anyhow::Result<RunningInstance> {
        let layout = decoder.layout();
        let identity = Identity {
            instance: hosted.id.clone(),
            incarnation: Incarnation(uuid::Uuid::new_v4().as_u64_pair().0),
            fingerprint: decoder.transfer_fingerprint(),
            numerics_class: decoder.numerics_class(),
        };
        let share = decoder.kv_cache().share();
        if config.engine.kv_prefault == Switch::On {
            prefault(decoder.kv_cache().prefault())?;
        }
        let batch = batch_config(&config.engine, &mut decoder);
        let engine_config = EngineConfig {
            async_scheduling: match config.engine.async_scheduling {
                Switch::On => AsyncScheduling::On,
                Switch::Off => AsyncScheduling::Off,
            },
            ..EngineConfig::new(batch)
        };
        let engine = start(decoder, engine_config)?.with_constraints(constraints.clone());
        let options = WorkerOptions {
            link: config.links.options()?,
            progress_deadline: config.links.progress_deadline,
            move_bytes_per_second: Some(config.links.move_rate.0),
            move_stages: config.links.move_stages,
            ..WorkerOptions::default()
        };
        let choice = config.links.kv_transport.choice();
        let transports = KvTransports::new(&identity, layout, choice, &options.link, share)?;
        let service = WorkerService::new(engine, identity, transports, options);
        let (address, serving) = listen(&hosted.listen, service.clone(), stop.clone()).await?;
        tracing::info!(instance = %hosted.id, address, "serving");
        let membership = Membership {
            scheduler: config.scheduler.to_string(),
            advertise: hosted.advertise.as_ref().map_or(address, Address::to_string),
            model: config.model.served_name.clone(),
            standing: Arc::new(Standing::new(hosted.role)),
        };
        Ok(RunningInstance {
            service,
            membership,
            serving,
        })
    }

    /// Keeps the membership until `stop`.
    async fn join(&self, stop: &CancellationToken) -> anyhow::Result<()> {
        let ready_line = announce::worker_ready_line(&self.service.identity().instance.to_string());
        let say_ready = || announce::print(&ready_line);
        Ok(join_registry(&self.service, &self.membership, stop.clone(), say_ready).await?)
    }

    /// Ends with an error when the step thread has died or comes round no more: its streams break, its requests are placed
    /// again, and a process that cannot compute is replaced.
    async fn watch(&self, stop: &CancellationToken) -> anyhow::Result<()> {
        let name = &self.service.identity().instance;
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                _ = ticks.tick() => match self.service.engine().health() {
                    Health::Well => {}
                    Health::Stuck(since) => {
                        anyhow::bail!("{name}: no step for {:.1} s although work is pending", since.as_secs_f64())
                    }
                    Health::Dead(words) => anyhow::bail!("{name}: the step thread has ended: {words}"),
                },
                () = stop.cancelled() => return Ok(()),
            }
        }
    }

    /// Waits until the requests here have gone on elsewhere: as long as they may take, or until nothing is open and no
    /// scheduler process is there that could say so.
    async fn emptied(&self, drain_timeout: Duration) {
        let (service, standing) = (&self.service, &self.membership.standing);
        let instance = &service.identity().instance;
        let alone = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            loop {
                ticks.tick().await;
                if service.n_open() == 0 && !standing.is_member() {
                    return;
                }
            }
        };
        tokio::select! {
            () = standing.drained() => tracing::info!(%instance, "empty"),
            () = alone => {}
            () = tokio::time::sleep(drain_timeout) => {
                let n_open = service.n_open();
                tracing::warn!(%instance, n_open, "ending with requests open: they are replayed elsewhere");
            }
        }
    }
}

/// Once told to end, waits until every instance here is empty. They leave together: none takes over what another hands
/// over, and none ends while another may still be sending from it.
async fn leave(running: &[RunningInstance], drain_timeout: Duration, shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    for instance in running {
        instance.service.refuse_moves();
    }
    for instance in running {
        instance.membership.standing.leave();
        let n_open = instance.service.n_open();
        tracing::info!(instance = %instance.service.identity().instance, n_open, "told to end");
    }
    join_all(running.iter().map(|instance| instance.emptied(drain_timeout))).await;
}

/// Touches the KV cache on a thread that runs when nothing else wants to.
fn prefault(kv: KvPrefault) -> std::io::Result<()> {
    let run = move || {
        // Of this thread alone, as Linux has it.
        let _ = rustix::process::setpriority_process(None, 19);
        let began = std::time::Instant::now();
        match kv.run() {
            Ok(n_bytes) => {
                let seconds = began.elapsed().as_secs_f64();
                tracing::info!(n_bytes, seconds, "KV cache touched");
            }
            Err(error) => tracing::warn!(%error, "the KV cache is not touched beforehand"),
        }
    };
    std::thread::Builder::new().name("kv-prefault".into()).spawn(run)?;
    Ok(())
}

/// Starts serving; answers the address that others can use, with the real port.
async fn listen(
    address: &Address,
    service: WorkerService,
    stop: CancellationToken,
) -> anyhow::Result<(String, JoinHandle<anyhow::Result<()>>)> {
    let cannot = || format!("listening on {address}");
    match address {
        Address::Unix(path) => {
            let listener = UnixListener::bind(path).with_context(cannot)?;
            let incoming = UnixListenerStream::new(listener);
            let serving = async move { Ok(serve(service, incoming, stop, STREAM_GRACE).await?) };
            Ok((address.to_string(), tokio::spawn(serving)))
        }
        Address::Tcp { host, port } => {
            let listener = TcpListener::bind((host.as_str(), *port)).await.with_context(cannot)?;
            let port = listener.local_addr()?.port();
            let advertise = Address::Tcp {
                host: host.clone(),
                port,
            }
            .to_string();
            let incoming = TcpListenerStream::new(listener).map(|stream| {
                let stream = stream?;
                stream.set_nodelay(true)?;
                Ok::<_, std::io::Error>(stream)
            });
            let serving = async move { Ok(serve(service, incoming, stop, STREAM_GRACE).await?) };
            Ok((advertise, tokio::spawn(serving)))
        }
    }
}
