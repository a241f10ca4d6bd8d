//! The forward pass of a decoder-only transformer, written once over `Backend` and described by `ModelConfig`.
//! One step's ragged batch in, logits or hidden states out. No sampling, no scheduling, no device code.

use std::borrow::Cow;
use std::collections::VecDeque;

use baton_kernels::{
    Activation, AttentionParams, Backend, DType, KernelError, KvCache, KvLayout, MoeParams, PackedWeights, QkNorm,
    RaggedBatch, RaggedSequence, RecordingRun, RopeAppendParams, RowLogprobs, RowSampler as _, RowSampling, SampledIds,
    SampledRow,
};
use baton_scheduler::ids::{Fingerprint, TokenId};
use baton_scheduler::layer_groups::{LayerGroups, LayerPlace};
use baton_scheduler::request::{SamplingParams, TokenLogprobs};

use super::config::ModelConfig;
use super::fingerprint::ModelFingerprint;
use super::rope::RopeConfig;
use super::weights::{EMBED, FINAL_NORM, LM_HEAD, LayerWeightNames};
use crate::forward::{ForwardPass, LogitsWanted, NewTokens, SampledToken, StepOutput, StepSequence, TokenWanted};

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

/// A step that was launched and not collected.
struct Launched {
    /// Rows of logits for the host; where there are any, no step is launched behind this one.
    n_host_rows: usize,
    n_wanted_rows: usize,
    has_hidden: bool,
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
    attention_norm: Option<B::Vector>,
    /// `[(n_heads + 2 * n_kv_heads) * head_dim, hidden_size]`
    qkv: B::Matrix,
    qkv_bias: Option<B::Vector>,
    qk_norm: Option<QkNorm<B::Vector>>,
    /// Index in [`Decoder::ropes`].
    rope: usize,
    attention: AttentionParams<B::Vector>,
    /// `[hidden_size, n_heads * head_dim]`
    attention_out: B::Matrix,
    attention_out_bias: Option<B::Vector>,
    post_attention_norm: Option<B::Vector>,
    ffn_norm: Option<B::Vector>,
    ffn: Ffn<B>,
    post_ffn_norm: Option<B::Vector>,
}

/// What a layer has behind its attention.
enum Ffn<B: Backend> {
    Dense {
        /// `[2 * ffn_size, hidden_size]`
        gate_up: B::Matrix,
        /// `[hidden_size, ffn_size]`
        down: B::Matrix,
        activation: Activation,
    },
    Experts {
        /// `[n_experts, hidden_size]`
        router: B::Matrix,
        router_bias: Option<B::Vector>,
        experts: B::Experts,
        params: MoeParams,
    },
}

/// One step's activations; rows are the step's tokens.
struct Activations<B: Backend> {
    /// `[rows, hidden_size]`: the residual stream.
    residual: B::Tensor,
    /// `[rows, (n_heads + 2 * n_kv_heads) * head_dim]`
    qkv: B::Tensor,
    /// `[rows, n_heads * head_dim]`
    attention: B::Tensor,
    block: BlockActivations<B>,
    /// `[wanted rows, hidden_size]`: the residual stream where logits are wanted.
    wanted_residual: B::Tensor,
    /// `[wanted rows, n_heads * head_dim]`
    wanted_attention: B::Tensor,
    /// `[wanted rows, vocab_size]`
    logits: B::Tensor,
}

/// Activations within a layer, over all rows or the wanted ones.
struct BlockActivations<B: Backend> {
    /// `[rows, hidden_size]`
    normed: B::Tensor,
    /// `[rows, hidden_size]`: what a block adds to the residual stream.
    delta: B::Tensor,
    /// `[rows, hidden_size]`: the same after a norm of its own.
    post: B::Tensor,
    /// `[rows, 2 * ffn_size]`
    gate_up: B::Tensor,
    /// `[rows, ffn_size]`
    ffn: B::Tensor,
    /// `[rows, n_experts]`
    router_logits: B::Tensor,
}

impl<B: Backend> LayerWeights<B> {
    fn new(
        backend: &B,
        config: &ModelConfig,
        packed: &PackedWeights,
        layer: usize,
    ) -> Result<LayerWeights<B>, KernelError> {
        let of_layer = config.layers[layer];
        let tensors = &config.architecture.tensors;
        let names = LayerWeightNames::new(layer);
        let optional = |exists: bool, name: &str| exists.then(|| backend.vector(packed, name)).transpose();
        let [qkv_has_bias, out_has_bias] = config.attention_bias;
        let qk_norm = match &tensors.qk_norm {
            None => None,
            Some(_) => Some(QkNorm {
                query: backend.vector(packed, &names.query_norm)?,
                key: backend.vector(packed, &names.key_norm)?,
                eps: config.rms_norm_eps,
            }),
        };
        let ffn = match (&config.architecture.experts, &config.experts) {
            (Some(architecture), Some(experts)) if of_layer.has_experts => {
                let names_of_experts: Vec<_> = (0..experts.n_experts)
                    .map(|expert| names.expert(expert, architecture))
                    .collect();
                Ffn::Experts {
                    router: backend.matrix(packed, &names.router)?,
                    router_bias: optional(architecture.router_bias.is_some(), &names.router_bias)?,
                    experts: backend.experts(packed, &names_of_experts)?,
                    params: MoeParams {
                        top_k: experts.top_k,
                        renormalize: experts.renormalize,
                        activation: config.activation,
                    },
                }
            }
            _ => Ffn::Dense {
                gate_up: backend.matrix(packed, &names.gate_up)?,
                down: backend.matrix(packed, &names.down)?,
                activation: config.activation,
            },
        };
        Ok(LayerWeights {
            attention_norm: optional(tensors.attention_norm.is_some(), &names.attention_norm)?,
            qkv: backend.matrix(packed, &names.qkv)?,
            qkv_bias: optional(qkv_has_bias, &names.qkv_bias)?,
            qk_norm,
            rope: of_layer.rope,
            attention: AttentionParams {
                n_heads: config.n_heads,
                scale: config.attention_scale,
                window: of_layer.window,
                soft_cap: config.attention_soft_cap,
                sinks: optional(tensors.sinks.is_some(), &names.sinks)?,
            },
            attention_out: backend.matrix(packed, &names.attention_out)?,
            attention_out_bias: optional(out_has_bias, &names.attention_out_bias)?,
            post_attention_norm: optional(tensors.post_attention_norm.is_some(), &names.post_attention_norm)?,
            ffn_norm: optional(tensors.ffn_norm.is_some(), &names.ffn_norm)?,
            ffn,
            post_ffn_norm: optional(tensors.post_ffn_norm.is_some(), &names.post_ffn_norm)?,
        })
    }
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

    /// Has the device record the decode steps that it can, from few rows to many. The rows of those that it has recorded, and
    /// what kept it from the next, if anything did: steps of more rows are then queued operator by operator.
    pub(super) fn record_steps(&mut self) -> (Vec<usize>, Option<KernelError>) {
        let mut recorded = Vec::new();
        for n_rows in self.backend.recordable_rows() {
            match self.record_step(n_rows) {
                Ok(()) => recorded.push(n_rows),
                Err(error) => return (recorded, Some(error)),
            }
        }
        (recorded, None)
    }

    fn record_step(&mut self, n_rows: usize) -> Result<(), KernelError> {
        // One for each layer group, told apart by where they lie.
        let block_tables = vec![[0]; self.layer_groups.n_groups()];
        let of_group = |block_table| {
            let nobody = RaggedSequence {
                start_pos: 0,
                n_tokens: 1,
                block_table,
                rope_variant: 0,
            };
            vec![nobody; n_rows]
        };
        let ragged: Vec<Vec<RaggedSequence<'_>>> = block_tables.iter().map(|table| of_group(table)).collect();
        let batches: Vec<RaggedBatch<'_>> = ragged.iter().map(|sequences| RaggedBatch { sequences }).collect();
        self.token_ids = vec![0; n_rows];
        self.token_sources = vec![None; n_rows];
        self.wanted_rows = (0..n_rows).collect();
        self.hidden_rows.clear();
        for run in [RecordingRun::WarmUp, RecordingRun::Capture] {
            self.backend.begin_recording(&batches, run)?;
            self.all_rows(&batches, &mut |_, _| {});
            self.wanted_logits(0..n_rows);
            self.backend.end_recording(&self.activations.logits, run)?;
        }
        Ok(())
    }

    /// Queues a recorded step, if every sequence has one new token and something is made of its logits, in their order; they are
    /// then left in `activations.logits`.
    fn replay(&mut self, batches: &[RaggedBatch<'_>], on_layer: &mut dyn FnMut(usize, &mut KvCache)) -> bool {
        let n_rows = self.token_ids.len();
        let is_decode = batches.iter().all(|batch| batch.sequences.len() == n_rows);
        // Logits come in the order of rows.
        let wants_all = self.wanted_rows.iter().copied().eq(0..n_rows);
        if !is_decode || !wants_all {
            return false;
        }
        let sampled = self.sampler.as_ref().map(|sampler| SampledIds {
            sampler,
            sources: &self.token_sources,
        });
        let logits = &mut self.activations.logits;
        if !self
            .backend
            .replay(logits, &self.token_ids, sampled, batches, &mut self.kv)
        {
            return false;
        }
        self.n_replayed_steps += 1;
        (0..self.config.n_layers).for_each(|layer| on_layer(layer, &mut self.kv));
        true
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
            assert!(sequence.tokens.len() > 0, "a sequence without new tokens");
            assert!(
                end <= max_model_len,
                "sequence of {end} tokens, expected at most {max_model_len}"
            );
            let (n_tables, n_groups) = (sequence.block_tables.len(), self.layer_groups.n_groups());
            assert!(n_tables == n_groups, "{n_tables} block tables, expected {n_groups}");
            for block_table in sequence.block_tables {
                let n_given = block_table.len();
                assert!(
                    n_given >= n_blocks,
                    "block table of {n_given} blocks, expected {n_blocks} for {end} tokens"
                );
            }
            if let Some(id) = sequence
                .tokens
                .known()
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

    /// Fills `token_ids` and `token_sources`, and lists the rows of the step of which something comes back.
    fn list_rows(&mut self, sequences: &[StepSequence<'_>]) {
        self.token_ids.clear();
        self.token_sources.clear();
        self.wanted_rows.clear();
        self.sampled_rows.clear();
        self.hidden_rows.clear();
        let mut sampled_rows = Vec::new();
        let mut first = 0;
        for sequence in sequences {
            let end = first + sequence.tokens.len();
            match sequence.tokens {
                NewTokens::Known(tokens) => self.token_ids.extend_from_slice(tokens),
                NewTokens::Sampled(_) => self.token_ids.push(0),
            }
            self.token_sources.resize(end, None);
            if let NewTokens::Sampled(place) = sequence.tokens {
                self.token_sources[first] = Some(place);
            }
            match sequence.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => self.wanted_rows.push(end - 1),
                LogitsWanted::All => self.wanted_rows.extend(first..end),
                LogitsWanted::Hidden => self.hidden_rows.extend(first..end),
                LogitsWanted::Token(token) => {
                    sampled_rows.push(end - 1);
                    self.sampled_rows.push(row_sampling(token));
                }
            }
            first = end;
        }
        self.wanted_rows.extend(sampled_rows);
    }

    /// From the embedding to the last layer's attention. What follows is needed only where something comes back.
    /// `batches` is the step with the block tables of each layer group.
    fn all_rows(&mut self, batches: &[RaggedBatch<'_>], on_layer: &mut dyn FnMut(usize, &mut KvCache)) {
        let Decoder {
            backend,
            config,
            weights,
            ropes,
            layer_groups,
            kv,
            activations: a,
            sampler,
            token_ids,
            token_sources,
            wanted_rows,
            hidden_rows,
            ..
        } = self;
        let eps = config.rms_norm_eps;
        // Gemma's factor takes the model's own precision.
        let embedding_scale = match backend.compute_dtype() {
            DType::Bf16 => half::bf16::from_f32(config.embedding_scale).to_f32(),
            DType::F16 => half::f16::from_f32(config.embedding_scale).to_f32(),
            DType::F32 => config.embedding_scale,
        };
        let (residual, embed) = (&mut a.residual, &weights.embed);
        match sampler {
            Some(sampler) => sampler.embed(backend, residual, embed, token_ids, token_sources, embedding_scale),
            None => backend.embed(residual, embed, token_ids, embedding_scale),
        }
        for (layer_idx, layer) in weights.layers.iter().enumerate() {
            let LayerPlace { layer_group, slot } = layer_groups.place(layer_idx);
            let batch = batches[layer_group];
            let block = &mut a.block;
            let input = match &layer.attention_norm {
                Some(norm) if layer_idx == 0 => {
                    backend.rms_norm(&mut block.normed, &a.residual, norm, eps);
                    &block.normed
                }
                Some(norm) => {
                    backend.add_rms_norm(&mut block.normed, &mut a.residual, &block.delta, norm, eps);
                    &block.normed
                }
                None => {
                    if layer_idx > 0 {
                        backend.add(&mut a.residual, &block.delta);
                    }
                    &a.residual
                }
            };
            backend.linear(&mut a.qkv, input, &layer.qkv);
            if let Some(bias) = &layer.qkv_bias {
                backend.add_bias(&mut a.qkv, bias);
            }
            let params = RopeAppendParams {
                n_heads: config.n_heads,
                rope: &ropes[layer.rope],
                qk_norm: layer.qk_norm.as_ref(),
            };
            backend.rope_append(&mut a.qkv, batch, params, slot, kv);
            on_layer(layer_idx, kv);
            let is_last = layer_idx + 1 == config.n_layers;
            if is_last && wanted_rows.is_empty() && hidden_rows.is_empty() {
                return;
            }
            backend.attention(&mut a.attention, &a.qkv, batch, &layer.attention, slot, kv);
            if !is_last {
                finish_layer(backend, layer, eps, &mut a.residual, &a.attention, block);
            }
        }
    }

    /// Logits of `wanted_rows[range]`, left in `activations.logits`.
    fn wanted_logits(&mut self, range: std::ops::Range<usize>) {
        let Decoder {
            backend,
            config,
            weights,
            activations: a,
            wanted_rows,
            ..
        } = self;
        final_norm(backend, config, weights, a, &wanted_rows[range]);
        let lm_head = weights.lm_head.as_ref().unwrap_or(&weights.embed);
        backend.linear(&mut a.logits, &a.block.normed, lm_head);
        if let Some(cap) = config.logit_soft_cap {
            backend.soft_cap(&mut a.logits, cap);
        }
    }

    /// Fills `host_hidden` with the hidden states of `hidden_rows`.
    fn fetch_hidden(&mut self) {
        let Decoder {
            backend,
            config,
            weights,
            activations: a,
            hidden_rows,
            host_hidden,
            ..
        } = self;
        host_hidden.clear();
        for rows in hidden_rows.chunks(MAX_FETCHED_ROWS) {
            final_norm(backend, config, weights, a, rows);
            host_hidden.extend_from_slice(&backend.to_host(&a.block.normed));
        }
    }
}

fn row_sampling(TokenWanted { params, choice, index }: TokenWanted<'_>) -> RowSampling {
    RowSampling {
        seed: params.seed,
        index,
        choice,
        temperature: params.temperature,
        min_p: params.min_p,
        top_p: params.top_p,
        top_k: params.top_k,
        n_top: params.logprobs.map(usize::from),
    }
}

fn sampled_token(row: &SampledRow) -> Option<SampledToken> {
    let SampledRow::Chosen { id, logprobs } = row else {
        return None;
    };
    let logprobs = logprobs
        .as_ref()
        .map(|RowLogprobs { logprob, rank, top }| TokenLogprobs {
            logprob: *logprob,
            rank: *rank,
            top: top.clone(),
        });
    Some(SampledToken { id: *id, logprobs })
}

/// The last layer's remainder and the final norm of some rows, left in `block.normed`.
fn final_norm<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    weights: &Weights<B>,
    a: &mut Activations<B>,
    rows: &[usize],
) {
    let Some(layer) = weights.layers.last() else { return };
    backend.gather_rows(&mut a.wanted_residual, &a.residual, rows);
    backend.gather_rows(&mut a.wanted_attention, &a.attention, rows);
    let (residual, block, eps) = (&mut a.wanted_residual, &mut a.block, config.rms_norm_eps);
    finish_layer(backend, layer, eps, residual, &a.wanted_attention, block);
    backend.add_rms_norm(&mut block.normed, residual, &block.delta, &weights.final_norm, eps);
}

/// A layer after its attention: output projection, then the feed-forward part or the experts, whose sum is left in `delta`.
fn finish_layer<B: Backend>(
    backend: &B,
    layer: &LayerWeights<B>,
    eps: f32,
    residual: &mut B::Tensor,
    attention: &B::Tensor,
    block: &mut BlockActivations<B>,
) {
    let BlockActivations {
        normed,
        delta,
        post,
        gate_up,
        ffn,
        router_logits,
    } = block;
    backend.linear(delta, attention, &layer.attention_out);
    if let Some(bias) = &layer.attention_out_bias {
        backend.add_bias(delta, bias);
    }
    if let Some(norm) = &layer.post_attention_norm {
        backend.rms_norm(post, delta, norm, eps);
        std::mem::swap(post, delta);
    }
    let input = match &layer.ffn_norm {
        Some(norm) => {
            backend.add_rms_norm(normed, residual, delta, norm, eps);
            &*normed
        }
        None => {
            backend.add(residual, delta);
            &*residual
        }
    };
    match &layer.ffn {
        Ffn::Dense {
            gate_up: gate_up_weight,
            down,
            activation,
        } => {
            backend.linear(gate_up, input, gate_up_weight);
            backend.gated(ffn, gate_up, *activation);
            backend.linear(delta, ffn, down);
        }
        Ffn::Experts {
            router,
            router_bias,
            experts,
            params,
        } => {
            backend.linear(router_logits, input, router);
            if let Some(bias) = router_bias {
                backend.add_bias(router_logits, bias);
            }
            backend.moe(delta, input, router_logits, experts, *params);
        }
    }
    if let Some(norm) = &layer.post_ffn_norm {
        backend.rms_norm(post, delta, norm, eps);
        std::mem::swap(post, delta);
    }
}

impl<B: Backend> Activations<B> {
    fn new(backend: &B, config: &ModelConfig, max_rows: usize) -> Result<Activations<B>, KernelError> {
        let hidden = config.hidden_size;
        let query_width = config.n_heads * config.head_dim;
        let max_wanted = max_rows.min(MAX_FETCHED_ROWS);
        Ok(Activations {
            residual: backend.tensor(max_rows, hidden)?,
            qkv: backend.tensor(max_rows, query_width + 2 * config.n_kv_heads * config.head_dim)?,
            attention: backend.tensor(max_rows, query_width)?,
            block: BlockActivations::new(backend, config, max_rows)?,
            wanted_residual: backend.tensor(max_wanted, hidden)?,
            wanted_attention: backend.tensor(max_wanted, query_width)?,
            logits: backend.logits(max_wanted, config.vocab_size)?,
        })
    }
}

impl<B: Backend> BlockActivations<B> {
    /// What no layer needs has no columns.
    fn new(backend: &B, config: &ModelConfig, max_rows: usize) -> Result<BlockActivations<B>, KernelError> {
        let tensors = &config.architecture.tensors;
        let hidden = config.hidden_size;
        let only_if = |needed: bool, cols: usize| backend.tensor(max_rows, if needed { cols } else { 0 });
        let has_dense = config.layers.iter().any(|layer| !layer.has_experts);
        Ok(BlockActivations {
            normed: backend.tensor(max_rows, hidden)?,
            delta: backend.tensor(max_rows, hidden)?,
            post: only_if(
                tensors.post_attention_norm.is_some() || tensors.post_ffn_norm.is_some(),
                hidden,
            )?,
            gate_up: only_if(has_dense, 2 * config.ffn_size)?,
            ffn: only_if(has_dense, config.ffn_size)?,
            router_logits: backend.tensor(max_rows, config.experts.as_ref().map_or(0, |experts| experts.n_experts))?,
        })
    }
}

impl<B: Backend> ForwardPass for Decoder<B> {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    fn numerics_class(&self) -> String {
        self.backend.numerics_class()
    }

    fn layout(&self) -> KvLayout {
        self.kv.layout()
    }

    fn layer_groups(&self) -> LayerGroups {
        self.layer_groups.clone()
    }

    fn kv_cache(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    fn n_replayed_steps(&self) -> u64 {
        self.n_replayed_steps
    }

    fn can_sample(&self, params: &SamplingParams) -> bool {
        let token = TokenWanted {
            params,
            choice: 0,
            index: 0,
        };
        let sampler = self.sampler.as_ref();
        sampler.is_some_and(|sampler| sampler.can_sample(&row_sampling(token)))
    }

    /// Of what comes back, only tokens have memory that the next step leaves alone.
    fn can_run_ahead_of(&self, sequences: &[StepSequence<'_>]) -> bool {
        let is_left_alone = |sequence: &StepSequence<'_>| match sequence.logits {
            LogitsWanted::None | LogitsWanted::Token(_) => true,
            LogitsWanted::Last | LogitsWanted::All | LogitsWanted::Hidden => false,
        };
        self.sampler.is_some() && sequences.iter().all(is_left_alone)
    }

    /// # Panics
    /// If the step is larger than the decoder's limits, a block table is too short, or a token id is past the vocabulary.
    fn launch(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<(), KernelError> {
        self.assert_valid(sequences);
        self.list_rows(sequences);
        let n_wanted_rows = self.wanted_rows.len();
        let n_host_rows = n_wanted_rows - self.sampled_rows.len();
        let mut is_replayed = false;
        if !sequences.is_empty() {
            self.backend.begin_step();
            let of_group = |layer_group: usize| -> Vec<RaggedSequence<'_>> {
                let ragged = sequences.iter().map(|sequence| RaggedSequence {
                    start_pos: sequence.start_pos,
                    n_tokens: sequence.tokens.len(),
                    block_table: &sequence.block_tables[layer_group],
                    rope_variant: sequence.rope_variant,
                });
                ragged.collect()
            };
            let ragged: Vec<Vec<RaggedSequence<'_>>> = (0..self.layer_groups.n_groups()).map(of_group).collect();
            let batches: Vec<RaggedBatch<'_>> = ragged.iter().map(|sequences| RaggedBatch { sequences }).collect();
            is_replayed = self.replay(&batches, on_layer);
            if !is_replayed {
                self.all_rows(&batches, on_layer);
            }
            self.fetch_hidden();
        }
        self.host_logits.clear();
        for first in (0..n_wanted_rows).step_by(MAX_FETCHED_ROWS) {
            let end = n_wanted_rows.min(first + MAX_FETCHED_ROWS);
            // A step that was recorded has as many rows as one slab at most, and their logits are there.
            if !is_replayed {
                self.wanted_logits(first..end);
            }
            // What fits one slab stays where it is until it is collected.
            if n_wanted_rows > MAX_FETCHED_ROWS && first < n_host_rows {
                let logits = self.backend.to_host(&self.activations.logits);
                let n_values = (n_host_rows.min(end) - first) * self.config.vocab_size;
                self.host_logits.extend_from_slice(&logits[..n_values]);
            }
            if let Some(sampler) = &mut self.sampler
                && end > n_host_rows
            {
                let start = first.max(n_host_rows);
                let rows = &self.sampled_rows[start - n_host_rows..end - n_host_rows];
                sampler.sample(&self.backend, &self.activations.logits, start - first, rows);
            }
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.finish_step();
        }
        self.in_flight.push_back(Launched {
            n_host_rows,
            n_wanted_rows,
            has_hidden: !self.hidden_rows.is_empty(),
        });
        Ok(())
    }

    fn wait(&mut self) {
        if let Some(sampler) = &mut self.sampler {
            sampler.wait();
        }
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, KernelError> {
        let launched = self.in_flight.pop_front().expect("a step is in flight");
        self.sampled.clear();
        if let Some(sampler) = &mut self.sampler {
            self.sampled.extend(sampler.collect().iter().map(sampled_token));
        }
        let n_values = launched.n_host_rows * self.config.vocab_size;
        let logits = match launched.n_wanted_rows {
            _ if launched.n_host_rows == 0 => &[],
            ..=MAX_FETCHED_ROWS => match self.backend.to_host(&self.activations.logits) {
                Cow::Borrowed(logits) => &logits[..n_values],
                Cow::Owned(logits) => {
                    self.host_logits = logits;
                    &self.host_logits[..n_values]
                }
            },
            _ => &*self.host_logits,
        };
        Ok(StepOutput {
            tokens: &self.sampled,
            logits,
            hidden: if launched.has_hidden { &self.host_hidden } else { &[] },
        })
    }
}
