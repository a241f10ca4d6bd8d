//! What one instance is told about its model, device and limits. Shared by workers and by the front door, which needs the
//! same model's tokenizer. Loads nothing.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use baton_engine::cuda::{CudaMode, ImageFolders};
use baton_engine::model::LoadFormat as WeightsFrom;
use baton_engine::worker::{TransportChoice, TransportKind};
use baton_engine::{DType, Isa};
use baton_proto::link::{ClusterSecret, LinkError, LinkOptions};

use crate::config::{
    ByteSize, ComputeDtype, ConfigError, Folders, HubEnvironment, InstructionSet, KvMemory, KvTransportKind, Layers,
    LoadFormat, ModelSource, Percent, ReasoningParserKind, Secret, Switch, ToolCallParserKind,
};

/// Which model, and where its files come from and go to.
#[derive(Clone, Debug)]
pub struct ModelSelection {
    /// The model.
    pub source: ModelSource,
    /// The name clients use.
    pub served_name: String,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// How to reach the model hub.
    pub hub: HubEnvironment,
    /// Where packed weights are kept for all processes of the host.
    pub packed_dir: PathBuf,
}

/// What is looked for in the model's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParserSelection {
    /// Calls of tools.
    pub tool_calls: ToolCallParserKind,
    /// Reasoning.
    pub reasoning: ReasoningParserKind,
}

impl ParserSelection {
    /// What the model's files tell.
    pub const AUTO: ParserSelection = ParserSelection {
        tool_calls: ToolCallParserKind::Auto,
        reasoning: ReasoningParserKind::Auto,
    };
}

/// Compute, memory and limits of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Element type of weights, KV cache and the inputs of matrix products.
    pub dtype: ComputeDtype,
    /// What computes.
    pub device: DeviceConfig,
    /// The instruction set to compute with, on the CPU.
    pub isa: InstructionSet,
    /// Threads that compute, the step loop's own included.
    pub n_threads: u32,
    /// Memory of the KV cache.
    pub kv_memory: KvMemory,
    /// Whether the KV cache gets its pages before they are needed.
    pub kv_prefault: Switch,
    /// Tokens of a block.
    pub block_size: u32,
    /// Longest prompt plus output; the model's own limit when absent.
    pub max_model_len: Option<u32>,
    /// Most sequences in a batch.
    pub max_num_seqs: u32,
    /// Most tokens computed in one step.
    pub max_batch_tokens: u32,
    /// Whether the KV of earlier prompts is used again.
    pub prefix_caching: Switch,
    /// Whether the next step is scheduled and launched while one runs, where the device can take it.
    pub async_scheduling: Switch,
}

/// The device of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// The processor.
    Cpu,
    /// The first card that the driver shows (CUDA_VISIBLE_DEVICES chooses).
    Cuda(CudaConfig),
}

/// What a card computes with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaConfig {
    /// Whether a row's bits must not depend on what else is in the batch.
    pub deterministic: Switch,
    /// Whether decode steps are recorded as CUDA graphs.
    pub graphs: Switch,
    /// Sequences of the largest of them.
    pub graph_max_seqs: NonZeroU32,
    /// Folders with CUDA's libraries, looked through before the system's own.
    pub libraries: Folders,
    /// Folder of compiled kernels that came with the installation.
    pub kernels: Option<PathBuf>,
    /// Where kernels that are compiled here are kept.
    pub image_cache: PathBuf,
    /// Share of the card's multiprocessors that prefill instances compute on.
    pub prefill_sm_share: Percent,
}

/// What flags say of a card.
#[derive(Clone, Debug, Default)]
pub struct CudaFlagValues {
    /// [`CudaConfig::deterministic`].
    pub deterministic: Option<Switch>,
    /// [`CudaConfig::graphs`].
    pub graphs: Option<Switch>,
    /// [`CudaConfig::graph_max_seqs`].
    pub graph_max_seqs: Option<NonZeroU32>,
    /// [`CudaConfig::libraries`].
    pub libraries: Option<Folders>,
    /// [`CudaConfig::kernels`].
    pub kernels: Option<PathBuf>,
    /// [`CudaConfig::prefill_sm_share`].
    pub prefill_sm_share: Option<Percent>,
}

impl CudaConfig {
    /// As many sequences as a step gives logits of at once.
    pub const DEFAULT_GRAPH_MAX_SEQS: NonZeroU32 = NonZeroU32::new(256).expect("256 is not zero");

    /// [`CudaConfig::deterministic`] as the device is told.
    pub fn mode(&self) -> CudaMode {
        match self.deterministic {
            Switch::On => CudaMode::Deterministic,
            Switch::Off => CudaMode::Fast,
        }
    }

    /// Where compiled kernels are looked for.
    pub fn images(&self) -> ImageFolders {
        ImageFolders {
            packaged: self.kernels.clone(),
            cache: Some(self.image_cache.clone()),
        }
    }

    /// Sequences of the largest decode step that is recorded; 0 if none is.
    pub fn max_graph_seqs(&self) -> usize {
        match self.graphs {
            Switch::On => self.graph_max_seqs.get() as usize,
            Switch::Off => 0,
        }
    }

    /// From the flags given, and the places below them.
    ///
    /// # Errors
    /// A value of a variable or file that cannot be read.
    pub fn resolve(layers: &Layers, flags: CudaFlagValues) -> Result<CudaConfig, ConfigError> {
        Ok(CudaConfig {
            deterministic: layers
                .pick("deterministic", flags.deterministic)?
                .unwrap_or(Switch::Off),
            graphs: layers.pick("cuda_graphs", flags.graphs)?.unwrap_or(Switch::On),
            graph_max_seqs: layers
                .pick("cuda_graph_max_seqs", flags.graph_max_seqs)?
                .unwrap_or(CudaConfig::DEFAULT_GRAPH_MAX_SEQS),
            libraries: layers.pick("cuda_libraries", flags.libraries)?.unwrap_or_default(),
            kernels: layers
                .pick("cuda_kernels", flags.kernels)?
                .or_else(crate::device::packaged_kernels),
            image_cache: layers.environment.image_cache_dir(),
            prefill_sm_share: layers
                .pick("prefill_sm_share", flags.prefill_sm_share)?
                .unwrap_or(Percent(100)),
        })
    }
}

impl From<ComputeDtype> for DType {
    fn from(dtype: ComputeDtype) -> DType {
        match dtype {
            ComputeDtype::Bf16 => DType::Bf16,
            ComputeDtype::F16 => DType::F16,
            ComputeDtype::F32 => DType::F32,
        }
    }
}

impl From<LoadFormat> for WeightsFrom {
    fn from(format: LoadFormat) -> WeightsFrom {
        match format {
            LoadFormat::Auto => WeightsFrom::Safetensors,
            LoadFormat::Dummy => WeightsFrom::Dummy { seed: 0 },
        }
    }
}

impl InstructionSet {
    /// The kernels' name for it; `None` takes the best there is.
    pub fn isa(self) -> Option<Isa> {
        match self {
            InstructionSet::Auto => None,
            InstructionSet::Avx512Bf16 => Some(Isa::Avx512Bf16),
            InstructionSet::Avx512 => Some(Isa::Avx512),
            InstructionSet::Avx2 => Some(Isa::Avx2),
            InstructionSet::Portable => Some(Isa::Portable),
        }
    }
}

impl KvTransportKind {
    /// The worker's word for it.
    pub fn choice(self) -> TransportChoice {
        match self {
            KvTransportKind::Auto => TransportChoice::Auto,
            KvTransportKind::Grpc => TransportChoice::Only(TransportKind::Grpc),
            KvTransportKind::SharedMemory => TransportChoice::Only(TransportKind::SharedMemory),
            KvTransportKind::CudaIpc => TransportChoice::Only(TransportKind::CudaIpc),
            KvTransportKind::InProcess => TransportChoice::Only(TransportKind::InProcess),
        }
    }
}

impl EngineConfig {
    /// The defaults that do not depend on the machine.
    pub const DEFAULT_BLOCK_SIZE: u32 = 16;
    /// Sequences in a batch.
    pub const DEFAULT_MAX_NUM_SEQS: NonZeroU32 = NonZeroU32::new(128).expect("128 is not zero");
    /// Tokens in one step: a prefill chunk of this size keeps a CPU's step, and so the wait of running decodes, short.
    pub const DEFAULT_MAX_BATCH_TOKENS: NonZeroU32 = NonZeroU32::new(512).expect("512 is not zero");
    /// KV memory where the machine has room.
    pub const DEFAULT_KV_MEMORY: ByteSize = ByteSize(2 << 30);
    /// Of a card's free memory; the rest is for what the driver and the libraries take on their way.
    pub const DEFAULT_CARD_PERCENT: u8 = 90;
}

/// How processes of a cluster watch and trust each other.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// A silent connection is dropped after this long.
    pub keepalive: Duration,
    /// A peer that answers but makes no step with a request in hand is given up after this long.
    pub progress_deadline: Duration,
    /// What every process of the cluster must show.
    pub cluster_secret: Option<Secret>,
    /// How KV travels.
    pub kv_transport: KvTransportKind,
    /// KV bytes a second that the moves out of an instance may send while their requests decode.
    pub move_rate: ByteSize,
    /// Stages of a move before its request pauses.
    pub move_stages: u32,
    /// How long an instance that is told to end may take to hand its requests over.
    pub drain_timeout: Duration,
}

impl LinkConfig {
    /// The connections these describe.
    ///
    /// # Errors
    /// A secret that cannot travel.
    pub fn options(&self) -> Result<LinkOptions, LinkError> {
        let secret = self
            .cluster_secret
            .as_ref()
            .map(|secret| ClusterSecret::new(secret.expose()))
            .transpose()?;
        Ok(LinkOptions {
            keepalive: self.keepalive,
            secret,
            ..LinkOptions::default()
        })
    }

    /// Drops a silent cut after this long.
    pub const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(5);
    /// A tenth or so of what loopback or a fast network carries: other requests' handoffs come first.
    pub const DEFAULT_MOVE_RATE: ByteSize = ByteSize(256 << 20);
    /// Long enough for many long contexts over a slow link.
    pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
    /// Longer than any single step of a machine that still works.
    pub const DEFAULT_PROGRESS_DEADLINE: Duration = Duration::from_secs(30);
}
