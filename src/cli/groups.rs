//! Flags that several commands share, each group with the function that turns it into configuration. Defaults are here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use baton_scheduler::ids::Nanos;
use baton_scheduler::placement::SloObjectives;
use baton_scheduler::transfer::MAX_STAGES;
use clap::Args;

use crate::config::{
    ByteSize, ComputeDtype, ConfigError, Device, Folders, InstructionSet, KvMemory, KvTransportKind, Layers,
    LoadFormat, LogFormat, Machine, MetricsAliases, ModelSource, Percent, PolicyKind, ReasoningParserKind,
    RebalanceMode, Secret, Span, Switch, ToolCallParserKind, flag,
};
use crate::engine_config::{
    CudaConfig, CudaFlagValues, DeviceConfig, EngineConfig, LinkConfig, ModelSelection, ParserSelection,
};
use crate::logging::LogConfig;
use crate::scheduler_process::SchedulerConfig;

/// Most tokens of a block; larger ones waste memory at the end of every sequence and make prefix hits rare.
const BLOCK_SIZE_LIMIT: u32 = 256;

/// Logs and the configuration file: flags of every command that runs a process.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Process")]
pub struct ProcessFlags {
    /// TOML file of settings, named as the flags with underscores [env: BATON_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to log: a level, or directives such as info,baton::door=debug [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = flag::<String>)]
    pub log_level: Option<String>,
    /// Form of the log lines on stderr [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
}

impl ProcessFlags {
    /// What to log.
    pub fn resolve(&self, layers: &Layers) -> Result<LogConfig, ConfigError> {
        let log = LogConfig {
            level: layers
                .pick("log_level", self.log_level.clone())?
                .unwrap_or_else(|| "info".into()),
            format: layers.pick("log_format", self.log_format)?.unwrap_or(LogFormat::Text),
        };
        log.validate()?;
        Ok(log)
    }
}

/// Which model.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct ModelFlags {
    /// Model folder, or ORG/NAME to download from the hub [default: the built-in toy model, baton-demo]
    #[arg(long, value_name = "DIR|ORG/NAME", value_parser = flag::<ModelSource>)]
    pub model: Option<ModelSource>,
    /// Name that clients use [default: the folder's name or the hub id]
    #[arg(long, value_name = "NAME", value_parser = flag::<String>)]
    pub served_model_name: Option<String>,
    /// Where weights come from: the model's files, or random numbers for measurements [default: auto]
    #[arg(long, value_enum)]
    pub load_format: Option<LoadFormat>,
    /// Longest prompt plus output, in tokens [default: the model's limit]
    #[arg(long, value_name = "TOKENS", value_parser = flag::<NonZeroU32>)]
    pub max_model_len: Option<NonZeroU32>,
}

impl ModelFlags {
    /// The model, and the longest sequence if one was set.
    pub fn resolve(self, layers: &Layers) -> Result<(ModelSelection, Option<u32>), ConfigError> {
        let source = layers.pick("model", self.model)?.unwrap_or(ModelSource::Demo);
        let served_name = layers.pick("served_model_name", self.served_model_name)?;
        let load_format = layers
            .pick("load_format", self.load_format)?
            .unwrap_or(LoadFormat::Auto);
        let selection = ModelSelection {
            served_name: served_name.unwrap_or_else(|| source.default_served_name()),
            source,
            load_format,
            hub: layers.environment.hub.clone(),
            packed_dir: layers.environment.packed_dir(),
        };
        let max_model_len = layers.pick("max_model_len", self.max_model_len)?;
        Ok((selection, max_model_len.map(NonZeroU32::get)))
    }
}

/// Compute, memory and limits of each instance.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Instances")]
pub struct EngineFlags {
    /// Element type of weights, KV cache and matrix inputs [default: bf16; f16 on CUDA only]
    #[arg(long, value_enum)]
    pub dtype: Option<ComputeDtype>,
    /// What to compute on [default: auto]
    #[arg(long, value_enum)]
    pub device: Option<Device>,
    /// Give a request the same bits whatever else is in the batch, at some cost; on the CPU it always does [default: off]
    #[arg(long, value_enum)]
    pub deterministic: Option<Switch>,
    /// Record decode steps as CUDA graphs when the model is loaded, each launched as one [default: on]
    #[arg(long, value_enum)]
    pub cuda_graphs: Option<Switch>,
    /// Sequences of the largest decode step that is recorded; larger ones are launched kernel by kernel [default: 256]
    #[arg(long, value_name = "N", value_parser = flag::<NonZeroU32>)]
    pub cuda_graph_max_seqs: Option<NonZeroU32>,
    /// Folders with the libraries of CUDA, with ':' between them, looked through before the system's own
    #[arg(long, value_name = "FOLDERS", value_parser = flag::<Folders>)]
    pub cuda_libraries: Option<Folders>,
    /// Folder of compiled CUDA kernels [default: cuda-kernels beside the program, if it is there]
    #[arg(long, value_name = "FOLDER", value_parser = flag::<PathBuf>)]
    pub cuda_kernels: Option<PathBuf>,
    /// Share of a card's multiprocessors that prefill instances compute on, such as 60%; decode instances have all of them
    /// and go first [default: 100%]
    #[arg(long, value_name = "SHARE", value_parser = flag::<Percent>)]
    pub prefill_sm_share: Option<Percent>,
    /// CPU instruction set [default: auto]
    #[arg(long, value_enum)]
    pub isa: Option<InstructionSet>,
    /// Threads of each instance [default: the cores this process may use, divided between the instances]
    #[arg(long, value_name = "N", value_parser = flag::<NonZeroU32>)]
    pub threads: Option<NonZeroU32>,
    /// KV cache of each instance [default: on the CPU 2GiB, or less: all instances together take at most half of the free
    /// memory; on a card 90% of what it has left, divided between the instances]
    #[arg(long, value_name = "SIZE", value_parser = flag::<KvMemory>)]
    pub kv_memory: Option<KvMemory>,
    /// Touch all of the KV cache in the background, so that no request waits for memory to be used for the first time
    /// [default: on when kv_memory is given]
    #[arg(long, value_enum)]
    pub kv_prefault: Option<Switch>,
    /// Tokens of a KV block: a power of two up to 256 [default: 16]
    #[arg(long, value_name = "TOKENS", value_parser = flag::<NonZeroU32>)]
    pub block_size: Option<NonZeroU32>,
    /// Most sequences in a batch [default: 128]
    #[arg(long, value_name = "N", value_parser = flag::<NonZeroU32>)]
    pub max_num_seqs: Option<NonZeroU32>,
    /// Most tokens computed in one step; longer prompts are computed in chunks [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = flag::<NonZeroU32>)]
    pub max_batch_tokens: Option<NonZeroU32>,
    /// Use the KV of earlier prompts with the same beginning again [default: on]
    #[arg(long, value_enum)]
    pub prefix_caching: Option<Switch>,
    /// Schedule and launch the next step while one runs; on CUDA only [default: on]
    #[arg(long, value_enum)]
    pub async_scheduling: Option<Switch>,
}

impl EngineFlags {
    /// Limits of each of `n_instances` on `machine`.
    pub fn resolve(
        self,
        layers: &Layers,
        machine: &Machine,
        n_instances: usize,
        max_model_len: Option<u32>,
    ) -> Result<EngineConfig, ConfigError> {
        let asked = layers.pick("device", self.device)?.unwrap_or(Device::Auto);
        let cuda = CudaFlagValues {
            deterministic: self.deterministic,
            graphs: self.cuda_graphs,
            graph_max_seqs: self.cuda_graph_max_seqs,
            libraries: self.cuda_libraries,
            kernels: self.cuda_kernels,
            prefill_sm_share: self.prefill_sm_share,
        };
        let cuda = CudaConfig::resolve(layers, cuda)?;
        let device = crate::device::choose(asked, cuda)?;
        let dtype = layers.pick("dtype", self.dtype)?.unwrap_or(ComputeDtype::Bf16);
        if (&device, dtype) == (&DeviceConfig::Cpu, ComputeDtype::F16) {
            let message = "dtype: found f16, expected bf16 or f32 on the CPU";
            return Err(ConfigError::Impossible(message.into()));
        }
        let block_size = layers
            .pick("block_size", self.block_size)?
            .map_or(EngineConfig::DEFAULT_BLOCK_SIZE, NonZeroU32::get);
        if !block_size.is_power_of_two() || block_size > BLOCK_SIZE_LIMIT {
            let message = format!("block_size: found {block_size}, expected a power of two up to {BLOCK_SIZE_LIMIT}");
            return Err(ConfigError::Impossible(message));
        }
        let n_threads = match layers.pick("threads", self.threads)? {
            Some(n_threads) => n_threads.get(),
            None => u32::try_from(machine.threads_per_instance(n_instances)).unwrap_or(u32::MAX),
        };
        let kv_memory = layers.pick("kv_memory", self.kv_memory)?;
        // A default size is a guess, and a guess must not fill the machine.
        let kv_prefault = layers
            .pick("kv_prefault", self.kv_prefault)?
            .unwrap_or(if kv_memory.is_some() { Switch::On } else { Switch::Off });
        let kv_memory = match (&device, kv_memory) {
            (DeviceConfig::Cpu, Some(KvMemory::PercentOfFree(percent))) => {
                let message = format!("kv_memory: found {percent}%, expected a size such as 2GiB on the CPU");
                return Err(ConfigError::Impossible(message));
            }
            (_, Some(kv_memory)) => kv_memory,
            (DeviceConfig::Cpu, None) => {
                // A machine this full will fail later and say where; a cache of zero bytes would only hide it.
                let share = machine.kv_share_bytes(n_instances).max(1 << 20);
                KvMemory::Size(EngineConfig::DEFAULT_KV_MEMORY.min(ByteSize(share >> 20 << 20)))
            }
            (DeviceConfig::Cuda(_), None) => {
                let share = EngineConfig::DEFAULT_CARD_PERCENT as usize / n_instances.max(1);
                KvMemory::PercentOfFree(share.max(1) as u8)
            }
        };
        let max_num_seqs = layers
            .pick("max_num_seqs", self.max_num_seqs)?
            .unwrap_or(EngineConfig::DEFAULT_MAX_NUM_SEQS);
        let max_batch_tokens = layers.pick("max_batch_tokens", self.max_batch_tokens)?;
        Ok(EngineConfig {
            device,
            dtype,
            isa: layers.pick("isa", self.isa)?.unwrap_or(InstructionSet::Auto),
            n_threads,
            kv_memory,
            kv_prefault,
            block_size,
            max_model_len,
            max_num_seqs: max_num_seqs.get(),
            max_batch_tokens: max_batch_tokens.unwrap_or(EngineConfig::DEFAULT_MAX_BATCH_TOKENS).get(),
            prefix_caching: layers
                .pick("prefix_caching", self.prefix_caching)?
                .unwrap_or(Switch::On),
            async_scheduling: layers
                .pick("async_scheduling", self.async_scheduling)?
                .unwrap_or(Switch::On),
        })
    }
}

/// How processes of the cluster watch and trust each other.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Cluster")]
pub struct LinkFlags {
    /// Drop a connection that has been silent for this long [default: 5s]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub keepalive: Option<Span>,
    /// Give up a peer that answers but makes no progress with a request for this long [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub progress_deadline: Option<Span>,
    /// Secret that all processes of the cluster share; better given as BATON_CLUSTER_SECRET, which no process list shows
    #[arg(long, value_name = "SECRET", value_parser = flag::<Secret>)]
    pub cluster_secret: Option<Secret>,
    /// How KV travels between instances [default: auto, the best that both ends can do]
    #[arg(long, value_enum)]
    pub kv_transport: Option<KvTransportKind>,
    /// Most KV a second that moves out of an instance send while their requests decode [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = flag::<ByteSize>)]
    pub move_rate: Option<ByteSize>,
    /// Stages of a move before its request pauses; with 0 everything is copied while it stands still [default: 8]
    #[arg(long, value_name = "N", value_parser = flag::<u32>)]
    pub move_stages: Option<u32>,
    /// How long an instance that is told to end may take to hand its requests over [default: 60s]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub drain_timeout: Option<Span>,
}

impl LinkFlags {
    /// Deadlines and secret of the cluster's links.
    pub fn resolve(self, layers: &Layers) -> Result<LinkConfig, ConfigError> {
        let keepalive = layers.pick("keepalive", self.keepalive)?;
        let progress_deadline = layers.pick("progress_deadline", self.progress_deadline)?;
        Ok(LinkConfig {
            keepalive: keepalive.map_or(LinkConfig::DEFAULT_KEEPALIVE, |span| span.0),
            progress_deadline: progress_deadline.map_or(LinkConfig::DEFAULT_PROGRESS_DEADLINE, |span| span.0),
            cluster_secret: layers.pick("cluster_secret", self.cluster_secret)?,
            kv_transport: layers
                .pick("kv_transport", self.kv_transport)?
                .unwrap_or(KvTransportKind::Auto),
            move_rate: layers
                .pick("move_rate", self.move_rate)?
                .unwrap_or(LinkConfig::DEFAULT_MOVE_RATE),
            move_stages: layers.pick("move_stages", self.move_stages)?.unwrap_or(MAX_STAGES),
            drain_timeout: layers
                .pick("drain_timeout", self.drain_timeout)?
                .map_or(LinkConfig::DEFAULT_DRAIN_TIMEOUT, |span| span.0),
        })
    }
}

/// The front door and its policy.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Front door")]
pub struct FrontDoorFlags {
    /// Address to listen on; 0.0.0.0 opens the port to the network [default: 127.0.0.1]
    #[arg(long, value_name = "IP", value_parser = flag::<IpAddr>)]
    pub host: Option<IpAddr>,
    /// Port of HTTP and gRPC; 0 lets the system choose [default: 8000]
    #[arg(long, value_parser = flag::<u16>)]
    pub port: Option<u16>,
    /// Key that clients must send as a bearer token; better given as BATON_API_KEY, which no process list shows
    #[arg(long, value_name = "KEY", value_parser = flag::<Secret>)]
    pub api_key: Option<Secret>,
    /// How the model writes calls of tools, where its answers are parsed for them [default: auto, told by its chat template]
    #[arg(long, value_enum)]
    pub tool_call_parser: Option<ToolCallParserKind>,
    /// Whether the model's reasoning is parted from its answers [default: auto, told by its chat template]
    #[arg(long, value_enum)]
    pub reasoning_parser: Option<ReasoningParserKind>,
    /// Render the chat templates that requests bring; for servers whose clients are trusted [default: off]
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub trust_request_chat_template: Option<Switch>,
    /// How instances are picked for a request [default: prefix-aware]
    #[arg(long, value_enum)]
    pub policy: Option<PolicyKind>,
    /// Time to the first token that the slo-aware policy aims at [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub ttft_objective: Option<Span>,
    /// Time between tokens that the slo-aware policy aims at [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub tpot_objective: Option<Span>,
    /// Move running requests from crowded instances to free ones: off, advise (log what should move) or act
    /// [default: advise]
    #[arg(long, value_enum)]
    pub rebalance: Option<RebalanceMode>,
    /// How long a request may stand still for a move before it goes on where it was [default: 2s]
    #[arg(long, value_name = "DURATION", value_parser = flag::<Span>)]
    pub move_deadline: Option<Span>,
    /// Compute prompts with fewer uncached tokens on the decode instance itself; 0 always hands over
    /// [default: predicted cost decides]
    #[arg(long, value_name = "TOKENS", value_parser = flag::<u32>)]
    pub disaggregation_threshold: Option<u32>,
    /// Metrics under the names of another server too: none or vllm [default: none]
    #[arg(long, value_enum)]
    pub metrics_aliases: Option<MetricsAliases>,
    /// Most requests that wait for admission; more are answered 429 [default: 1024]
    #[arg(long, value_name = "N", value_parser = flag::<NonZeroUsize>)]
    pub max_queue: Option<NonZeroUsize>,
}

impl FrontDoorFlags {
    /// A scheduler process with these flags.
    pub fn resolve(
        self,
        layers: &Layers,
        model: ModelSelection,
        max_model_len: Option<u32>,
        links: LinkConfig,
    ) -> Result<SchedulerConfig, ConfigError> {
        let host = layers
            .pick("host", self.host)?
            .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let port = layers.pick("port", self.port)?.unwrap_or(8000);
        let max_queue = layers.pick("max_queue", self.max_queue)?;
        let objectives = SloObjectives::default();
        let objective = |given: Option<Span>, default| given.map_or(default, |span| Nanos(span.0.as_nanos() as u64));
        Ok(SchedulerConfig {
            listen: SocketAddr::new(host, port),
            cluster_socket: None,
            model,
            max_model_len,
            dtype: None,
            parsers: ParserSelection {
                tool_calls: layers
                    .pick("tool_call_parser", self.tool_call_parser)?
                    .unwrap_or(ToolCallParserKind::Auto),
                reasoning: layers
                    .pick("reasoning_parser", self.reasoning_parser)?
                    .unwrap_or(ReasoningParserKind::Auto),
            },
            policy: layers.pick("policy", self.policy)?.unwrap_or(PolicyKind::PrefixAware),
            objectives: SloObjectives {
                ttft: objective(layers.pick("ttft_objective", self.ttft_objective)?, objectives.ttft),
                tpot: objective(layers.pick("tpot_objective", self.tpot_objective)?, objectives.tpot),
            },
            rebalance: layers
                .pick("rebalance", self.rebalance)?
                .unwrap_or(RebalanceMode::Advise),
            move_deadline: layers
                .pick("move_deadline", self.move_deadline)?
                .map_or(SchedulerConfig::DEFAULT_MOVE_DEADLINE, |span| span.0),
            disaggregation_threshold: layers.pick("disaggregation_threshold", self.disaggregation_threshold)?,
            max_queue: max_queue.map_or(SchedulerConfig::DEFAULT_MAX_QUEUE, NonZeroUsize::get),
            metrics_aliases: layers
                .pick("metrics_aliases", self.metrics_aliases)?
                .unwrap_or(MetricsAliases::None),
            client_chat_templates: layers
                .pick("trust_request_chat_template", self.trust_request_chat_template)?
                .unwrap_or(Switch::Off),
            api_key: layers.pick("api_key", self.api_key)?,
            links,
            n_awaited_instances: 0,
            drain_timeout: SchedulerConfig::DEFAULT_DRAIN_TIMEOUT,
        })
    }
}
