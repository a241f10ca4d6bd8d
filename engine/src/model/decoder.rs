//! The forward pass of a decoder-only transformer, written once over `Backend` and described by `ModelConfig`.
//! One step's ragged batch in, logits, tokens or hidden states out. No scheduling, no device code.

mod activations;
mod layers;
mod steps;
mod weights;

use std::collections::VecDeque;

use baton_kernels::{Backend, KernelError, KvCache, PackedWeights, RowSampling};
use baton_scheduler::ids::{Fingerprint, TokenId};
use baton_scheduler::layer_groups::LayerGroups;

use self::activations::Activations;
use self::steps::Launched;
use self::weights::{LayerWeights, Weights};
use super::config::ModelConfig;
use super::fingerprint::ModelFingerprint;
use super::rope::RopeConfig;
use super::weights::{EMBED, FINAL_NORM, LM_HEAD};
use crate::forward::SampledToken;

/// Rows whose logits, or hidden states, are computed at once: `[256, vocab_size]` of f32 is 131 MB for a vocabulary of 128 Ki.
/// Only prompt log-probabilities ever need more, and read the output matrix again for each further slab.
pub(super) const MAX_FETCHED_ROWS: usize = 256;

/// What a decoder is limited to; memory is set aside for it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Tokens of one step, over all sequences.
    pub max_batch_tokens: usize,
    /// Tokens of one sequence.
    pub max_model_len: usize,
}

/// A model on a device with its KV cache.
pub struct Decoder<B: Backend> {
    backend: B,
    config: ModelConfig,
    limits: DecoderLimits,
    fingerprint: ModelFingerprint,
    weights: Weights<B>,
    /// As [`LayerWeights::rope`] numbers them.
    ropes: Vec<B::Rope>,
    layer_groups: LayerGroups,
    kv: KvCache,
    activations: Activations<B>,
    n_replayed_steps: u64,
    /// Where the device samples.
    sampler: Option<B::Sampler>,
    token_ids: Vec<TokenId>,
    /// Of each token that only the device knows, its place among those that the step before samples.
    token_sources: Vec<Option<usize>>,
    /// Rows whose logits are computed: first those that the host has asked for, then those that the device samples.
    wanted_rows: Vec<usize>,
    /// How each of the latter is sampled.
    sampled_rows: Vec<RowSampling>,
    hidden_rows: Vec<usize>,
    host_logits: Vec<f32>,
    host_hidden: Vec<f32>,
    sampled: Vec<Option<SampledToken>>,
    in_flight: VecDeque<Launched>,
}

impl<B: Backend> Decoder<B> {
    /// Puts packed weights and a cache together; `kv` makes it, last, of what the device then has left.
    ///
    /// # Errors
    /// A packed weight that is missing or of another dtype, or a cache that cannot be had.
    pub(crate) fn new(
        backend: B,
        config: ModelConfig,
        fingerprint: ModelFingerprint,
        packed: &PackedWeights,
        limits: DecoderLimits,
        kv: impl FnOnce(&B) -> Result<KvCache, KernelError>,
    ) -> Result<Decoder<B>, KernelError> {
        let layer = |layer: usize| LayerWeights::new(&backend, &config, packed, layer);
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(backend.matrix(packed, LM_HEAD)?)
        };
        let weights = Weights {
            embed: backend.matrix(packed, EMBED)?,
            layers: (0..config.n_layers).map(layer).collect::<Result<_, KernelError>>()?,
            final_norm: backend.vector(packed, FINAL_NORM)?,
            lm_head,
        };
        let rope = |rope: &RopeConfig| backend.rope(&rope.variants(), limits.max_model_len);
        let ropes = config.ropes.iter().map(rope).collect::<Result<_, KernelError>>()?;
        let activations = Activations::new(&backend, &config, limits.max_batch_tokens)?;
        let sampler = backend.sampler(limits.max_batch_tokens, config.vocab_size)?;
        let kv = kv(&backend)?;
        // A cache of what a card has left may hold less than the longest sequence.
        let limits = DecoderLimits {
            max_model_len: config.longest_sequence(kv.n_blocks(), kv.layout().block_size, limits),
            ..limits
        };
        Ok(Decoder {
            backend,
            layer_groups: config.layer_groups(),
            config,
            limits,
            fingerprint,
            weights,
            ropes,
            kv,
            activations,
            n_replayed_steps: 0,
            sampler,
            token_ids: Vec::new(),
            token_sources: Vec::new(),
            wanted_rows: Vec::new(),
            sampled_rows: Vec::new(),
            hidden_rows: Vec::new(),
            host_logits: Vec::new(),
            host_hidden: Vec::new(),
            sampled: Vec::new(),
            in_flight: VecDeque::new(),
        })
    }

    /// What it computes on.
    pub(super) fn backend(&self) -> &B {
        &self.backend
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What one step and one sequence may hold.
    pub fn limits(&self) -> DecoderLimits {
        self.limits
    }

    /// Identity of the model's numbers.
    pub fn fingerprint(&self) -> ModelFingerprint {
        self.fingerprint
    }

    /// What a peer must have to exchange KV with this decoder.
    pub fn transfer_fingerprint(&self) -> Fingerprint {
        self.fingerprint
            .transfer_fingerprint(self.backend.compute_dtype(), &self.kv.layout(), &self.layer_groups)
    }
}
