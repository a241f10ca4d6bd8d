//! The forward pass of a decoder-only transformer, written once over `Backend` and described by `ModelConfig`.
//! One step's ragged batch in, logits out. No sampling, no scheduling, no device code.

use std::borrow::Cow;

use baton_kernels::{
    AttentionParams, Backend, KernelError, KvCache, KvLayout, PackedWeights, RaggedBatch, RaggedSequence,
};
use baton_scheduler::ids::{Fingerprint, TokenId};

use super::config::ModelConfig;
use super::fingerprint::ModelFingerprint;
use super::weights::{EMBED, FINAL_NORM, LM_HEAD, LayerWeightNames};
use crate::forward::{ForwardPass, LogitsWanted, StepSequence};

/// Rows whose logits are computed at once: `[256, vocab_size]` of f32 is 131 MB for a vocabulary of 128 Ki. Only prompt
/// log-probabilities ever need more, and read the output matrix again for each further slab.
const MAX_LOGIT_ROWS: usize = 256;

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
    rope: B::Rope,
    kv: KvCache,
    activations: Activations<B>,
    token_ids: Vec<TokenId>,
    wanted_rows: Vec<usize>,
    host_logits: Vec<f32>,
}

struct Weights<B: Backend> {
    /// `[vocab_size, hidden_size]`
    embed: B::Matrix,
    layers: Vec<LayerWeights<B>>,
    /// `[hidden_size]`
    final_norm: B::Vector,
    /// `[vocab_size, hidden_size]`; the embedding serves where it is tied.
    lm_head: Option<B::Matrix>,
}

struct LayerWeights<B: Backend> {
    attention_norm: B::Vector,
    /// `[(n_heads + 2 * n_kv_heads) * head_dim, hidden_size]`
    qkv: B::Matrix,
    /// `[hidden_size, n_heads * head_dim]`
    attention_out: B::Matrix,
    ffn_norm: B::Vector,
    /// `[2 * ffn_size, hidden_size]`
    gate_up: B::Matrix,
    /// `[hidden_size, ffn_size]`
    down: B::Matrix,
}

/// One step's activations; rows are the step's tokens.
struct Activations<B: Backend> {
    /// `[rows, hidden_size]`: the residual stream.
    residual: B::Tensor,
    /// `[rows, hidden_size]`
    normed: B::Tensor,
    /// `[rows, hidden_size]`: what a block adds to the residual stream.
    delta: B::Tensor,
    /// `[rows, (n_heads + 2 * n_kv_heads) * head_dim]`
    qkv: B::Tensor,
    /// `[rows, n_heads * head_dim]`
    attention: B::Tensor,
    /// `[rows, 2 * ffn_size]`
    gate_up: B::Tensor,
    /// `[rows, ffn_size]`
    ffn: B::Tensor,
    /// `[wanted rows, hidden_size]`: the residual stream where logits are wanted.
    wanted_residual: B::Tensor,
    /// `[wanted rows, n_heads * head_dim]`
    wanted_attention: B::Tensor,
    /// `[wanted rows, vocab_size]`
    logits: B::Tensor,
}

impl<B: Backend> Decoder<B> {
    /// Puts packed weights and a cache together.
    ///
    /// # Errors
    /// A packed weight that is missing or of another dtype, or a cache that cannot be had.
    pub(crate) fn new(
        backend: B,
        config: ModelConfig,
        fingerprint: ModelFingerprint,
        packed: &PackedWeights,
        kv: KvCache,
        limits: DecoderLimits,
    ) -> Result<Decoder<B>, KernelError> {
        let layer = |layer: usize| {
            let names = LayerWeightNames::new(layer);
            Ok(LayerWeights {
                attention_norm: backend.vector(packed, &names.attention_norm)?,
                qkv: backend.matrix(packed, &names.qkv)?,
                attention_out: backend.matrix(packed, &names.attention_out)?,
                ffn_norm: backend.vector(packed, &names.ffn_norm)?,
                gate_up: backend.matrix(packed, &names.gate_up)?,
                down: backend.matrix(packed, &names.down)?,
            })
        };
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
        let rope = backend.rope(&config.rope.params(config.head_dim), limits.max_model_len);
        let activations = Activations::new(&backend, &config, limits.max_batch_tokens);
        Ok(Decoder {
            backend,
            config,
            limits,
            fingerprint,
            weights,
            rope,
            kv,
            activations,
            token_ids: Vec::new(),
            wanted_rows: Vec::new(),
            host_logits: Vec::new(),
        })
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
            .transfer_fingerprint(self.backend.compute_dtype(), &self.kv.layout())
    }

    /// A caller that breaks these has lost track of its blocks: going on would mix sequences.
    fn assert_valid(&self, sequences: &[StepSequence<'_>]) {
        let n_tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let DecoderLimits {
            max_batch_tokens,
            max_model_len,
        } = self.limits;
        assert!(
            n_tokens <= max_batch_tokens,
            "step of {n_tokens} tokens, expected at most {max_batch_tokens}"
        );
        for sequence in sequences {
            let end = sequence.start_pos + sequence.tokens.len();
            let n_blocks = self.kv.layout().blocks_for(end);
            assert!(!sequence.tokens.is_empty(), "a sequence without new tokens");
            assert!(
                end <= max_model_len,
                "sequence of {end} tokens, expected at most {max_model_len}"
            );
            let n_given = sequence.block_table.len();
            assert!(
                n_given >= n_blocks,
                "block table of {n_given} blocks, expected {n_blocks} for {end} tokens"
            );
            if let Some(id) = sequence
                .tokens
                .iter()
                .find(|&&id| id as usize >= self.config.vocab_size)
            {
                panic!(
                    "token id {id}, expected one below the vocabulary of {}",
                    self.config.vocab_size
                );
            }
        }
    }

    /// Fills `wanted_rows` with the rows of the step whose logits come back.
    fn list_wanted_rows(&mut self, sequences: &[StepSequence<'_>]) {
        self.wanted_rows.clear();
        let mut first = 0;
        for sequence in sequences {
            let end = first + sequence.tokens.len();
            match sequence.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => self.wanted_rows.push(end - 1),
                LogitsWanted::All => self.wanted_rows.extend(first..end),
            }
            first = end;
        }
    }

    /// From the embedding to the last layer's attention. What follows is needed only where logits are wanted.
    fn all_rows(&mut self, batch: RaggedBatch<'_>, on_layer: &mut dyn FnMut(usize, &mut KvCache)) {
        let Decoder {
            backend,
            config,
            weights,
            rope,
            kv,
            activations: a,
            token_ids,
            wanted_rows,
            ..
        } = self;
        let eps = config.rms_norm_eps;
        let attention_params = AttentionParams {
            n_heads: config.n_heads,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        backend.embed(&mut a.residual, &weights.embed, token_ids);
        for (layer_idx, layer) in weights.layers.iter().enumerate() {
            if layer_idx == 0 {
                backend.rms_norm(&mut a.normed, &a.residual, &layer.attention_norm, eps);
            } else {
                backend.add_rms_norm(&mut a.normed, &mut a.residual, &a.delta, &layer.attention_norm, eps);
            }
            backend.linear(&mut a.qkv, &a.normed, &layer.qkv);
            backend.rope_append(&mut a.qkv, batch, rope, config.n_heads, layer_idx, kv);
            on_layer(layer_idx, kv);
            let is_last = layer_idx + 1 == config.n_layers;
            if is_last && wanted_rows.is_empty() {
                return;
            }
            backend.attention(&mut a.attention, &a.qkv, batch, attention_params, layer_idx, kv);
            if !is_last {
                let residual = &mut a.residual;
                finish_layer(
                    backend,
                    layer,
                    eps,
                    residual,
                    &a.attention,
                    &mut a.normed,
                    &mut a.gate_up,
                    &mut a.ffn,
                    &mut a.delta,
                );
            }
        }
    }

    /// The last layer's remainder, final norm and logits of `wanted_rows[range]`, left in `activations.logits`.
    fn wanted_rows(&mut self, range: std::ops::Range<usize>) {
        let Decoder {
            backend,
            config,
            weights,
            activations: a,
            wanted_rows,
            ..
        } = self;
        let rows = &wanted_rows[range];
        let Some(layer) = weights.layers.last() else { return };
        backend.gather_rows(&mut a.wanted_residual, &a.residual, rows);
        backend.gather_rows(&mut a.wanted_attention, &a.attention, rows);
        let residual = &mut a.wanted_residual;
        finish_layer(
            backend,
            layer,
            config.rms_norm_eps,
            residual,
            &a.wanted_attention,
            &mut a.normed,
            &mut a.gate_up,
            &mut a.ffn,
            &mut a.delta,
        );
        backend.add_rms_norm(
            &mut a.normed,
            residual,
            &a.delta,
            &weights.final_norm,
            config.rms_norm_eps,
        );
        backend.linear(
            &mut a.logits,
            &a.normed,
            weights.lm_head.as_ref().unwrap_or(&weights.embed),
        );
    }
}

/// A layer after its attention: output projection, then the feed-forward part, whose sum is left in `delta`.
#[expect(
    clippy::too_many_arguments,
    reason = "the same steps over all rows, or over the wanted ones of the last layer"
)]
fn finish_layer<B: Backend>(
    backend: &B,
    layer: &LayerWeights<B>,
    eps: f32,
    residual: &mut B::Tensor,
    attention: &B::Tensor,
    normed: &mut B::Tensor,
    gate_up: &mut B::Tensor,
    ffn: &mut B::Tensor,
    delta: &mut B::Tensor,
) {
    backend.linear(delta, attention, &layer.attention_out);
    backend.add_rms_norm(normed, residual, delta, &layer.ffn_norm, eps);
    backend.linear(gate_up, normed, &layer.gate_up);
    backend.silu_mul(ffn, gate_up);
    backend.linear(delta, ffn, &layer.down);
}

impl<B: Backend> Activations<B> {
    fn new(backend: &B, config: &ModelConfig, max_rows: usize) -> Activations<B> {
        let (hidden, ffn) = (config.hidden_size, config.ffn_size);
        let query_width = config.n_heads * config.head_dim;
        let max_wanted = max_rows.min(MAX_LOGIT_ROWS);
        Activations {
            residual: backend.tensor(max_rows, hidden),
            normed: backend.tensor(max_rows, hidden),
            delta: backend.tensor(max_rows, hidden),
            qkv: backend.tensor(max_rows, query_width + 2 * config.n_kv_heads * config.head_dim),
            attention: backend.tensor(max_rows, query_width),
            gate_up: backend.tensor(max_rows, 2 * ffn),
            ffn: backend.tensor(max_rows, ffn),
            wanted_residual: backend.tensor(max_wanted, hidden),
            wanted_attention: backend.tensor(max_wanted, query_width),
            logits: backend.tensor(max_wanted, config.vocab_size),
        }
    }
}

impl<B: Backend> ForwardPass for Decoder<B> {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn numerics_class(&self) -> String {
        self.backend.numerics_class()
    }

    fn layout(&self) -> KvLayout {
        self.kv.layout()
    }

    fn kv_cache(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    /// # Panics
    /// If the step is larger than the decoder's limits, a block table is too short, or a token id is past the vocabulary.
    fn step(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<&[f32], KernelError> {
        if sequences.is_empty() {
            return Ok(&[]);
        }
        self.assert_valid(sequences);
        self.list_wanted_rows(sequences);
        self.token_ids.clear();
        self.token_ids
            .extend(sequences.iter().flat_map(|sequence| sequence.tokens));
        let ragged: Vec<RaggedSequence<'_>> = sequences
            .iter()
            .map(|sequence| RaggedSequence {
                start_pos: sequence.start_pos,
                n_tokens: sequence.tokens.len(),
                block_table: sequence.block_table,
            })
            .collect();
        self.all_rows(RaggedBatch { sequences: &ragged }, on_layer);

        let n_wanted = self.wanted_rows.len();
        if n_wanted == 0 {
            return Ok(&[]);
        }
        if n_wanted <= MAX_LOGIT_ROWS {
            self.wanted_rows(0..n_wanted);
            return Ok(match self.backend.to_host(&self.activations.logits) {
                Cow::Borrowed(logits) => logits,
                Cow::Owned(logits) => {
                    self.host_logits = logits;
                    &self.host_logits
                }
            });
        }
        self.host_logits.clear();
        for first in (0..n_wanted).step_by(MAX_LOGIT_ROWS) {
            self.wanted_rows(first..n_wanted.min(first + MAX_LOGIT_ROWS));
            let logits = self.backend.to_host(&self.activations.logits);
            self.host_logits.extend_from_slice(&logits);
        }
        Ok(&self.host_logits)
    }
}
