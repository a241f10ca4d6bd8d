//! A worker's model on its device, by the limits that it is told. What a model is, and what a device, is the engine's affair.

use baton_engine::cuda::{Cuda, CudaPlace};
use baton_engine::forward::ForwardPass as _;
use baton_engine::model::{
    CpuLoadOptions, CudaKvSize, CudaLoadOptions, Decoder, DecoderLimits, LoadOptions, ModelConfig, ModelError,
    ModelFolder, load_cpu, load_cuda_at,
};
use baton_engine::{Backend, Cpu};
use baton_scheduler::batch::{BatchConfig, PrefixCaching};

use crate::config::{ConfigError, KvMemory, Switch};
use crate::device::CARD_ORDINAL;
use crate::engine_config::{CudaConfig, EngineConfig as Limits, ModelSelection};
use crate::model_files;

/// Loads the weights for the CPU.
///
/// # Errors
/// A model that cannot be loaded, or limits that it or the cache cannot hold.
pub fn load_on_cpu(folder: &ModelFolder, selection: &ModelSelection, limits: &Limits) -> anyhow::Result<Decoder<Cpu>> {
    let KvMemory::Size(kv_bytes) = limits.kv_memory else {
        let message = format!("kv_memory: found {}, expected a size on the CPU", limits.kv_memory);
        return Err(ConfigError::Impossible(message).into());
    };
    let n_kv_blocks = n_kv_blocks(&folder.config, limits, kv_bytes.0)?;
    let options = CpuLoadOptions {
        model: load_options(folder, selection, limits, Some(n_kv_blocks))?,
        n_threads: limits.n_threads as usize,
        isa: limits.isa.isa(),
        n_kv_blocks,
    };
    load(selection, limits, |progress| load_cpu(folder, &options, progress))
}

/// Loads the weights onto the card, and sizes the cache by what they leave.
///
/// # Errors
/// As [`load_on_cpu`], or a card that does not serve.
pub fn load_on_card(
    folder: &ModelFolder,
    selection: &ModelSelection,
    limits: &Limits,
    cuda: &CudaConfig,
    place: CudaPlace,
) -> anyhow::Result<Decoder<Cuda>> {
    let (kv, n_kv_blocks) = match limits.kv_memory {
        KvMemory::PercentOfFree(percent) => (CudaKvSize::PercentOfFree(percent), None),
        KvMemory::Size(kv_bytes) => {
            let n_kv_blocks = n_kv_blocks(&folder.config, limits, kv_bytes.0)?;
            (CudaKvSize::Blocks(n_kv_blocks), Some(n_kv_blocks))
        }
    };
    let options = CudaLoadOptions {
        model: load_options(folder, selection, limits, n_kv_blocks)?,
        ordinal: CARD_ORDINAL,
        max_num_seqs: max_num_seqs(limits),
        mode: cuda.mode(),
        libraries: cuda.libraries.0.clone(),
        images: cuda.images(),
        kv,
        max_graph_seqs: cuda.max_graph_seqs(),
    };
    let decoder = load(selection, limits, |progress| {
        load_cuda_at(folder, &options, place, progress)
    })?;
    let found = decoder.limits().max_model_len;
    match limits.max_model_len {
        Some(wanted) if wanted as usize > found => Err(too_long(wanted, found, limits).into()),
        _ => Ok(decoder),
    }
}

/// Blocks of a cache of `kv_bytes`.
fn n_kv_blocks(config: &ModelConfig, limits: &Limits, kv_bytes: u64) -> Result<usize, ConfigError> {
    let block_bytes = config
        .kv_layout(limits.block_size as usize, limits.dtype.into())
        .block_bytes();
    let n_kv_blocks = kv_bytes as usize / block_bytes;
    // Of each layer group one with the tokens computed, and one to grow into.
    let least = 2 * config.sliding_windows().len();
    if n_kv_blocks < least {
        let message = format!(
            "kv_memory: {} holds {n_kv_blocks} blocks of {block_bytes} bytes, expected at least {least}",
            limits.kv_memory
        );
        return Err(ConfigError::Impossible(message));
    }
    Ok(n_kv_blocks)
}

fn too_long(wanted: u32, n_tokens: usize, limits: &Limits) -> ConfigError {
    ConfigError::Impossible(format!(
        "max_model_len: found {wanted}, expected at most the {n_tokens} tokens that kv_memory {} holds",
        limits.kv_memory
    ))
}

/// What loading takes on every device, of a cache of `n_kv_blocks`, if that is known before.
fn load_options(
    folder: &ModelFolder,
    selection: &ModelSelection,
    limits: &Limits,
    n_kv_blocks: Option<usize>,
) -> Result<LoadOptions, ConfigError> {
    let config = &folder.config;
    let wanted = limits
        .max_model_len
        .map_or(config.max_position_embeddings, |wanted| wanted as usize);
    let decoder_limits = DecoderLimits {
        max_batch_tokens: limits.max_batch_tokens as usize,
        max_model_len: wanted,
    };
    let longest = n_kv_blocks.map_or(wanted, |n_blocks| {
        config.longest_sequence(n_blocks, limits.block_size as usize, decoder_limits)
    });
    let max_model_len = match limits.max_model_len {
        Some(wanted) if wanted as usize > longest => return Err(too_long(wanted, longest, limits)),
        Some(_) | None => longest,
    };
    Ok(LoadOptions {
        dtype: limits.dtype.into(),
        block_size: limits.block_size as usize,
        limits: DecoderLimits {
            max_model_len,
            ..decoder_limits
        },
        packed_dir: Some(selection.packed_dir.clone()),
        load_format: selection.load_format.into(),
    })
}

/// Runs `load` with a progress bar on a terminal.
fn load<B: Backend>(
    selection: &ModelSelection,
    limits: &Limits,
    load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<Decoder<B>, ModelError>,
) -> anyhow::Result<Decoder<B>> {
    let bar = indicatif::ProgressBar::new(0).with_message("packing weights");
    let decoder = load(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let mut decoder = decoder.map_err(model_files::model_error)?;
    let batch = batch_config(limits, &mut decoder);
    let block_bytes = decoder.kv_cache().layout().block_bytes();
    tracing::info!(
        model = %selection.source,
        numerics = decoder.numerics_class(),
        n_kv_blocks = batch.n_blocks,
        n_layer_groups = batch.n_groups(),
        max_model_len = batch.max_model_len,
        kv_bytes_of_longest = batch.n_blocks_to_run(batch.max_model_len) * block_bytes,
        n_threads = limits.n_threads,
        "model loaded"
    );
    Ok(decoder)
}

/// Sequences of one step.
fn max_num_seqs(limits: &Limits) -> usize {
    (limits.max_num_seqs as usize).min(limits.max_batch_tokens as usize)
}

/// What an instance of the loaded model schedules by.
pub fn batch_config<B: Backend>(limits: &Limits, decoder: &mut Decoder<B>) -> BatchConfig {
    let n_blocks = decoder.kv_cache().n_blocks();
    BatchConfig {
        max_num_seqs: max_num_seqs(limits),
        max_batch_tokens: limits.max_batch_tokens as usize,
        max_model_len: decoder.limits().max_model_len,
        short_context: decoder
            .config()
            .short_context()
            .and_then(|tokens| u32::try_from(tokens).ok()),
        windows: decoder.config().sliding_windows(),
        prefix_caching: match limits.prefix_caching {
            Switch::On => PrefixCaching::On,
            Switch::Off => PrefixCaching::Off,
        },
        ..BatchConfig::new(n_blocks, limits.block_size as usize, decoder.transfer_fingerprint())
    }
}
