//! A model folder -> a decoder on a device: check the tensors, pack them or map what another process packed, set the cache up.

use std::path::PathBuf;
use std::time::Instant;

use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, CudaPlace, ExpertLimits, ImageFolders, StepLimits};
use baton_kernels::{
    Backend, Cpu, CpuOptions, DType, Isa, KernelError, KvCache, KvLayout, PackedWeights, Packing, WINDOW_GRAIN,
    WeightSource, WeightSpec,
};
use baton_scheduler::batch::{BatchConfig, SlidingWindow};
use baton_scheduler::ids::Fingerprint;

use super::config::ModelConfig;
use super::decoder::{Decoder, DecoderLimits, MAX_FETCHED_ROWS};
use super::derived::DerivedWeights;
use super::error::ModelError;
use super::fingerprint::ModelFingerprint;
use super::folder::ModelFolder;
use super::weights::{DummyWeights, LoadFormat, check_tensors, weight_specs};

/// What loading takes on every device.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Compute and KV dtype: f32, bf16, or f16 on CUDA.
    pub dtype: DType,
    /// Tokens of a block.
    pub block_size: usize,
    /// What one step and one sequence may hold.
    pub limits: DecoderLimits,
    /// Where packed weights are shared between processes; `None` packs into private memory.
    pub packed_dir: Option<PathBuf>,
    /// Files or random numbers.
    pub load_format: LoadFormat,
}

/// How to load a model on the CPU.
#[derive(Clone, Debug)]
pub struct CpuLoadOptions {
    /// What loading takes on every device.
    pub model: LoadOptions,
    /// Threads of the step, its own included.
    pub n_threads: usize,
    /// Instruction set; `None` takes the best there is.
    pub isa: Option<Isa>,
    /// Blocks of the KV cache.
    pub n_kv_blocks: usize,
}

/// How to load a model on a CUDA card.
#[derive(Clone, Debug)]
pub struct CudaLoadOptions {
    /// What loading takes on every device.
    pub model: LoadOptions,
    /// The driver's number of the card.
    pub ordinal: usize,
    /// Sequences of one step.
    pub max_num_seqs: usize,
    /// Whether a row's bits may depend on what else is in the batch.
    pub mode: CudaMode,
    /// Folders with CUDA's libraries, looked through before the system's own.
    pub libraries: Vec<PathBuf>,
    /// Where compiled kernels are.
    pub images: ImageFolders,
    /// Size of the KV cache.
    pub kv: CudaKvSize,
    /// Sequences of the largest decode step that is recorded as a CUDA graph; 0 records none.
    pub max_graph_seqs: usize,
}

/// How large a KV cache in a card's memory is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CudaKvSize {
    /// So many blocks.
    Blocks(usize),
    /// As many bytes.
    Bytes(u64),
    /// So many hundredths of what weights and activations have left free.
    PercentOfFree(u8),
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

    /// Tokens of the longest sequence, up to `limits.max_model_len`, that a cache of `n_kv_blocks` holds while steps compute up
    /// to `limits.max_batch_tokens`.
    pub fn longest_sequence(&self, n_kv_blocks: usize, block_size: usize, limits: DecoderLimits) -> usize {
        // Which model it is of does not matter to the room it has.
        let batch = BatchConfig {
            max_batch_tokens: limits.max_batch_tokens,
            windows: self.sliding_windows(),
            ..BatchConfig::new(n_kv_blocks, block_size, Fingerprint([0; 32]))
        };
        batch.longest_sequence(limits.max_model_len)
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
    let CpuLoadOptions {
        ref model,
        n_threads,
        isa,
        n_kv_blocks,
    } = *options;
    let dtype = model.dtype;
    let open = || Cpu::new(CpuOptions { n_threads, dtype, isa });
    load(folder, model, Packing::Panels, progress, open, |_, layout| {
        // In a file that other processes of the host can map, where there are such files.
        KvCache::shared(layout, n_kv_blocks).or_else(|_| KvCache::new(layout, n_kv_blocks))
    })
}

/// The same on a CUDA card. A sequence is at most as long as the cache, whose size is what the card has left.
///
/// # Errors
/// As [`load_cpu`], a card or kernels that cannot be had, or too little device memory.
pub fn load_cuda(
    folder: &ModelFolder,
    options: &CudaLoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Decoder<Cuda>, ModelError> {
    load_cuda_at(folder, options, CudaPlace::default(), progress)
}

/// The same for an instance that has its place among others of its process on the card. They share the weights, and where
/// the place has an arena, one allocation for their caches, of which the first says how large each is.
///
/// # Errors
/// As [`load_cuda`].
pub fn load_cuda_at(
    folder: &ModelFolder,
    options: &CudaLoadOptions,
    place: CudaPlace,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Decoder<Cuda>, ModelError> {
    let open = || {
        let options = CudaOptions {
            ordinal: options.ordinal,
            dtype: options.model.dtype,
            head_dim: folder.config.head_dim,
            mode: options.mode,
            libraries: options.libraries.clone(),
            images: options.images.clone(),
        };
        Cuda::at(options, place)
    };
    let decoder = load(folder, &options.model, Packing::Rows, progress, open, |cuda, layout| {
        cuda.reserve(&step_limits(&folder.config, layout, options))?;
        cuda.kv_cache_within(layout, |free_bytes| match options.kv {
            CudaKvSize::Blocks(n_blocks) => n_blocks,
            CudaKvSize::Bytes(n_bytes) => n_bytes as usize / layout.block_bytes(),
            CudaKvSize::PercentOfFree(percent) => free_bytes / 100 * usize::from(percent) / layout.block_bytes(),
        })
    });
    let mut decoder = decoder?;
    record_steps(&mut decoder);
    let began = Instant::now();
    let n_products = decoder.prepare_products();
    if n_products > 0 {
        tracing::info!(
            n_products,
            seconds = began.elapsed().as_secs_f32(),
            "large steps prepared"
        );
    }
    Ok(decoder)
}

/// Has the decode steps recorded, and says what that took. A step that cannot be recorded is none that cannot be computed.
fn record_steps(decoder: &mut Decoder<Cuda>) {
    let free_bytes = |decoder: &Decoder<Cuda>| decoder.backend().free_bytes().unwrap_or(0);
    let (began, free_before) = (Instant::now(), free_bytes(decoder));
    let (recorded, failure) = decoder.record_steps();
    if let Some(error) = failure {
        let from = recorded.last().unwrap_or(&0) + 1;
        tracing::warn!(%error, "decode steps of {from} sequences and more are launched kernel by kernel");
    }
    if let Some(largest) = recorded.last() {
        let n_bytes = free_before.saturating_sub(free_bytes(decoder));
        tracing::info!(
            n_graphs = recorded.len(),
            max_seqs = largest,
            n_bytes,
            seconds = began.elapsed().as_secs_f32(),
            "decode steps recorded"
        );
    }
}

/// What a step of the model may hold.
fn step_limits(config: &ModelConfig, layout: KvLayout, options: &CudaLoadOptions) -> StepLimits {
    let DecoderLimits {
        max_batch_tokens,
        max_model_len,
    } = options.model.limits;
    StepLimits {
        n_rows: max_batch_tokens,
        n_sequences: options.max_num_seqs,
        n_recorded_sequences: options
            .max_graph_seqs
            .min(options.max_num_seqs)
            .min(max_batch_tokens.min(MAX_FETCHED_ROWS)),
        n_context: max_model_len,
        block_size: layout.block_size,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        windows: config.layer_groups().windows().to_vec(),
        n_fetched: max_batch_tokens.min(MAX_FETCHED_ROWS) * config.hidden_size,
        experts: config.experts.as_ref().map(|experts| ExpertLimits {
            n_experts: experts.n_experts,
            top_k: experts.top_k,
            hidden: config.hidden_size,
            ffn: experts.ffn_size,
        }),
    }
}

/// A decoder on the device that `open` opens, with the cache that `kv` makes once everything else is there.
fn load<B: Backend>(
    folder: &ModelFolder,
    options: &LoadOptions,
    packing: Packing,
    progress: &mut dyn FnMut(u64, u64),
    open: impl FnOnce() -> Result<B, KernelError>,
    kv: impl FnOnce(&B, KvLayout) -> Result<KvCache, KernelError>,
) -> Result<Decoder<B>, ModelError> {
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
    let backend = open().map_err(kernel)?;
    let (packed, fingerprint) = match options.load_format {
        LoadFormat::Safetensors => {
            let table = folder.open_weights()?;
            check_tensors(config, &table)?;
            let fingerprint = ModelFingerprint::of_files(folder, &table);
            let source = DerivedWeights::new(config, &table);
            (
                pack(config, fingerprint, options, packing, &source, progress).map_err(kernel)?,
                fingerprint,
            )
        }
        LoadFormat::Dummy { seed } => {
            let source = DummyWeights::new(config, seed);
            let fingerprint = ModelFingerprint::of_dummy(folder, seed);
            (
                pack(config, fingerprint, options, packing, &source, progress).map_err(kernel)?,
                fingerprint,
            )
        }
    };
    let layout = config.kv_layout(options.block_size, options.dtype);
    let kv = |backend: &B| kv(backend, layout);
    Decoder::new(backend, config.clone(), fingerprint, &packed, options.limits, kv).map_err(kernel)
}

fn pack(
    config: &ModelConfig,
    fingerprint: ModelFingerprint,
    options: &LoadOptions,
    packing: Packing,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<std::sync::Arc<PackedWeights>, KernelError> {
    let specs: Vec<WeightSpec> = weight_specs(config).into_iter().map(|(spec, _)| spec).collect();
    match &options.packed_dir {
        Some(directory) => {
            let key = fingerprint.packed_key(options.dtype);
            PackedWeights::open_or_build(directory, &key, packing, options.dtype, &specs, source, progress)
        }
        None => PackedWeights::in_memory(packing, options.dtype, &specs, source),
    }
}
