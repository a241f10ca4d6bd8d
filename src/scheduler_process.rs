//! The process that clients talk to: front door, registry and placement. What it is told, and how it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use baton_proto::cluster::operator_server::OperatorServer;
use baton_proto::cluster::registry_server::RegistryServer;
use baton_proto::link::{LinkOptions, MAX_MESSAGE_BYTES};
use baton_scheduler::placement::{Disaggregation, SloObjectives, policy_with_objectives};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

use crate::api::metrics::MetricsRegistry;
use crate::api::{self, ApiKey, ApiOptions, ApiState, ServeOptions, grpc};
use crate::config::{ComputeDtype, MetricsAliases, PolicyKind, RebalanceMode, Secret, Switch};
use crate::door::{
    Cluster, EmptyingTotals, FrontDoor, FrontDoorOptions, Generator as _, Rebalancing, keep_balanced, keep_emptying,
};
use crate::engine_config::{LinkConfig, ModelSelection, ParserSelection};
use crate::operator::OperatorService;
use crate::registry::RegistryService;
use crate::{announce, cluster_metrics, model_files, registry};

/// Everything a scheduler process is told.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Where clients, and workers of other machines, connect. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// A Unix socket for the workers of this machine, besides `listen`.
    pub cluster_socket: Option<PathBuf>,
    /// The model: the front door needs its tokenizer and chat template.
    pub model: ModelSelection,
    /// Longest prompt plus output; the model's own limit when absent.
    pub max_model_len: Option<u32>,
    /// What the instances compute in, for clients who ask; absent where the workers are told elsewhere.
    pub dtype: Option<ComputeDtype>,
    /// What is looked for in the model's text.
    pub parsers: ParserSelection,
    /// How instances are picked.
    pub policy: PolicyKind,
    /// What the slo-aware policy aims at.
    pub objectives: SloObjectives,
    /// What is done with uneven load.
    pub rebalance: RebalanceMode,
    /// How long a request may stand still for a move.
    pub move_deadline: Duration,
    /// Prompts with fewer uncached tokens are computed where they are decoded; predicted cost decides when absent.
    pub disaggregation_threshold: Option<u32>,
    /// Most requests that wait for admission.
    pub max_queue: usize,
    /// Whose names the metrics have besides their own.
    pub metrics_aliases: MetricsAliases,
    /// Whether requests may bring chat templates.
    pub client_chat_templates: Switch,
    /// What clients must show as a bearer token.
    pub api_key: Option<Secret>,
    /// Links to workers.
    pub links: LinkConfig,
    /// Instances that must have joined before the ready line, besides one that can generate.
    pub n_awaited_instances: usize,
    /// How long open requests may take to end once the process is told to stop.
    pub drain_timeout: Duration,
}

impl SchedulerConfig {
    /// Requests that may wait for admission.
    pub const DEFAULT_MAX_QUEUE: usize = 1024;
    /// Many times what the last frames of a move take.
    pub const DEFAULT_MOVE_DEADLINE: Duration = Duration::from_secs(2);
    /// Time for open requests to end.
    pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
}

/// How often readiness is looked at before the ready line.
const READY_POLL: Duration = Duration::from_millis(20);

/// Serves until `shutdown`; then refuses new requests and lets open ones end, within the drain timeout. Prints the ready
/// line when a request could first be served.
///
/// # Errors
/// A model that cannot be used, an address that cannot be listened on.
pub async fn run_scheduler(config: SchedulerConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let folder = model_files::open(&config.model).await?;
    let model = model_files::served_model(
        &config.model,
        &folder,
        config.max_model_len,
        config
            .dtype
            .map_or_else(|| "unknown".to_owned(), |dtype| dtype.to_string()),
        config.parsers,
    )?;
    drop(folder);
    let link = config.links.options()?;
    let disaggregation = config
        .disaggregation_threshold
        .map_or(Disaggregation::Auto, Disaggregation::Threshold);
    let policy = policy_with_objectives(config.policy.as_str(), disaggregation, config.objectives);
    let policy = policy.context("the policy has no implementation")?;
    let cluster = Arc::new(Cluster::new(policy, link.clone()));
    let options = FrontDoorOptions {
        max_queue: config.max_queue,
        move_deadline: config.move_deadline,
        ..FrontDoorOptions::default()
    };
    let door = FrontDoor::new(Arc::clone(&cluster), options);

    let api_key = config.api_key.as_ref().map(|key| ApiKey::new(key.expose()));
    let metrics = MetricsRegistry::default();
    cluster_metrics::register(&metrics, &cluster, door.move_metrics());
    if config.metrics_aliases == MetricsAliases::Vllm {
        cluster_metrics::register_aliases(&metrics, &cluster, model.name());
    }
    let api_options = ApiOptions {
        api_key,
        metrics_aliases: config.metrics_aliases,
        client_chat_templates: config.client_chat_templates,
        ..ApiOptions::default()
    };
    let state = ApiState::new(Arc::new(door.clone()), model, api_options, metrics, shutdown.clone());
    let registry = RegistryService::new(Arc::clone(&cluster), shutdown.clone());
    let registry = RegistryServer::new(registry).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let registry = InterceptedService::new(registry, link.require_secret());
    let emptying = EmptyingTotals::default();
    let emptied = keep_emptying(
        Arc::clone(&cluster),
        door.requests(),
        emptying.clone(),
        shutdown.clone(),
    );
    let emptied = tokio::spawn(emptied);
    let rebalancing = match config.rebalance {
        RebalanceMode::Off => None,
        RebalanceMode::Advise => Some(Rebalancing::Advise),
        RebalanceMode::Act => Some(Rebalancing::Act),
    };
    let balanced = rebalancing.map(|rebalancing| {
        let cluster = Arc::clone(&cluster);
        let metrics = door.move_metrics().clone();
        tokio::spawn(keep_balanced(
            cluster,
            door.requests(),
            rebalancing,
            metrics,
            shutdown.clone(),
        ))
    });
    let operator = OperatorService::new(Arc::clone(&cluster), door.requests(), emptying);
    let operator = OperatorServer::new(operator);
    let operator = grpc::add(axum::Router::new(), operator);
    let router = api::router(state.clone(), operator).merge(registry::route(registry.clone()));

    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {}", config.listen))?;
    let address = listener.local_addr()?;
    let socket = serve_socket(&config, &link, registry, shutdown.clone())?;
    let announced = announce_when_ready(&door, config.n_awaited_instances, address, &shutdown);
    let half_keepalive = config.links.keepalive / 2;
    let serve_options = ServeOptions {
        drain_timeout: config.drain_timeout,
        keepalive_interval: half_keepalive,
        keepalive_timeout: half_keepalive,
        ..ServeOptions::default()
    };
    let (served, ()) = tokio::join!(api::serve(listener, router, &state, serve_options), announced);
    served?;
    // Open requests have ended or were cut with their connections, which ends their tasks.
    let _ = tokio::time::timeout(config.drain_timeout, door.drained()).await;
    if let Some(balanced) = balanced {
        balanced.await.context("the rebalancing task panicked")?;
    }
    emptied.await.context("the task that empties instances panicked")?;
    match socket {
        Some(serving) => serving.await.context("the registry's socket panicked")?,
        None => Ok(()),
    }
}

/// The registry on a Unix socket, for the workers of this machine.
fn serve_socket(
    config: &SchedulerConfig,
    link: &LinkOptions,
    registry: registry::Guarded,
    shutdown: CancellationToken,
) -> anyhow::Result<Option<JoinHandle<anyhow::Result<()>>>> {
    let Some(path) = &config.cluster_socket else {
        return Ok(None);
    };
    let socket = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    let serving =
        link.server()
            .add_service(registry)
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(socket),
                async move { shutdown.cancelled().await },
            );
    Ok(Some(tokio::spawn(async move { Ok(serving.await?) })))
}

async fn announce_when_ready(
    door: &FrontDoor,
    n_awaited_instances: usize,
    address: SocketAddr,
    shutdown: &CancellationToken,
) {
    let mut ticks = tokio::time::interval(READY_POLL);
    let is_ready = || {
        let load = door.load();
        load.not_ready.is_none() && load.instances.len() >= n_awaited_instances
    };
    while !is_ready() {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
    }
    announce::print(&announce::ready_line(address));
}
