//! A model folder -> a decoder on the CPU: check the tensors, pack them or map what another process packed, set the cache up.

use std::path::PathBuf;

use baton_kernels::{
    Cpu, CpuOptions, DType, Isa, KernelError, KvCache, KvLayout, PackedWeights, WINDOW_GRAIN, WeightSource, WeightSpec,
};
use baton_scheduler::batch::SlidingWindow;

use super::config::ModelConfig;
use super::decoder::{Decoder, DecoderLimits};
use super::derived::DerivedWeights;
use super::error::ModelError;
use super::fingerprint::ModelFingerprint;
use super::folder::ModelFolder;
use super::weights::{DummyWeights, LoadFormat, check_tensors, weight_specs};

/// How to load a model on the CPU.
#[derive(Clone, Debug)]
pub struct CpuLoadOptions {
    /// Compute and KV dtype: f32 or bf16.
    pub dtype: DType,
    /// Threads of the step, its own included.
    pub n_threads: usize,
    /// Instruction set; `None` takes the best there is.
    pub isa: Option<Isa>,
    /// Blocks of the KV cache.
    pub n_kv_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// What one step and one sequence may hold.
    pub limits: DecoderLimits,
    /// Where packed weights are shared between processes; `None` packs into private memory.
    pub packed_dir: Option<PathBuf>,
    /// Files or random numbers.
    pub load_format: LoadFormat,
}

impl ModelConfig {
    /// Of each layer group, how far back its queries see, where it has a window.
    pub fn sliding_windows(&self) -> Vec<Option<SlidingWindow>> {
        /// Far more tokens than are on their way from an instance to the front door at any time.
        const SLACK: usize = 128;
        let window = |n_tokens| SlidingWindow {
            n_tokens,
            grain: WINDOW_GRAIN,
            slack: SLACK,
        };
        let windows = self.layer_groups();
        windows.windows().iter().map(|kind| kind.map(window)).collect()
    }

    /// Shape of a KV cache for this model: a block has the layers of one group.
    pub fn kv_layout(&self, block_size: usize, dtype: DType) -> KvLayout {
        KvLayout {
            n_layers: self.layer_groups().n_slots(),
            n_kv_heads: self.n_kv_heads,
            block_size,
            head_dim: self.head_dim,
            dtype,
        }
    }
}

/// Loads a model. `progress` hears of bytes packed so far and in all; it is not called when they were packed before.
///
/// # Errors
/// Whatever is missing, misshapen or unsupported in the folder, or a device that lacks what was asked for.
pub fn load_cpu(
    folder: &ModelFolder,
    options: &CpuLoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Decoder<Cpu>, ModelError> {
    let kernel = |source: KernelError| ModelError::Kernel {
        model: folder.location().display().to_string(),
        source,
    };
    let config = &folder.config;
    let max_model_len = options.limits.max_model_len;
    if max_model_len > config.max_position_embeddings {
        return Err(ModelError::Field {
            file: folder.location().join("config.json"),
            field: "max_position_embeddings".to_owned(),
            expected: format!("at least the maximal model length asked for ({max_model_len})"),
            found: config.max_position_embeddings.to_string(),
        });
    }
    let CpuLoadOptions {
        dtype, n_threads, isa, ..
    } = *options;
    let backend = Cpu::new(CpuOptions { n_threads, dtype, isa }).map_err(kernel)?;
    let (packed, fingerprint) = match options.load_format {
        LoadFormat::Safetensors => {
            let table = folder.open_weights()?;
            check_tensors(config, &table)?;
            let fingerprint = ModelFingerprint::of_files(folder, &table);
            let source = DerivedWeights::new(config, &table);
            (
                pack(config, fingerprint, options, &source, progress).map_err(kernel)?,
                fingerprint,
            )
        }
        LoadFormat::Dummy { seed } => {
            let source = DummyWeights::new(config, seed);
            let fingerprint = ModelFingerprint::of_dummy(folder, seed);
            (
                pack(config, fingerprint, options, &source, progress).map_err(kernel)?,
                fingerprint,
            )
        }
    };
    let layout = config.kv_layout(options.block_size, dtype);
    // In a file that other processes of the host can map, where there are such files.
    let kv = KvCache::shared(layout, options.n_kv_blocks).or_else(|_| KvCache::new(layout, options.n_kv_blocks));
    let kv = kv.map_err(kernel)?;
    Decoder::new(backend, config.clone(), fingerprint, &packed, kv, options.limits).map_err(kernel)
}

fn pack(
    config: &ModelConfig,
    fingerprint: ModelFingerprint,
    options: &CpuLoadOptions,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<std::sync::Arc<PackedWeights>, KernelError> {
    let specs: Vec<WeightSpec> = weight_specs(config).into_iter().map(|(spec, _)| spec).collect();
    match &options.packed_dir {
        Some(directory) => {
            let key = fingerprint.packed_key(options.dtype);
            PackedWeights::open_or_build(directory, &key, options.dtype, &specs, source, progress)
        }
        None => PackedWeights::in_memory(options.dtype, &specs, source),
    }
}
