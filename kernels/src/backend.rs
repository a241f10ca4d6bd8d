//! The operators every device provides, over one step's ragged batch and a paged KV cache.
//! No requests, no scheduling: a batch is tokens, positions and block tables.

use crate::error::KernelError;
use crate::kv::KvCache;
use crate::layout::DType;
use crate::packed::PackedWeights;

/// One sequence's share of a step: `n_tokens` new tokens starting at position `start_pos`.
///
/// A decode step has `n_tokens == 1`; a prefill chunk has more. Both may stand in one batch.
#[derive(Clone, Copy, Debug)]
pub struct RaggedSequence<'a> {
    /// Position of the first new token; also the number of tokens whose KV is already in the cache.
    pub start_pos: usize,
    /// New tokens, at least 1. They occupy the next `n_tokens` rows of every activation.
    pub n_tokens: usize,
    /// Blocks of the sequence in order; covers at least `start_pos + n_tokens` tokens.
    pub block_table: &'a [u32],
    /// Which variant of a rope table turns this sequence (0 where a table has one).
    pub rope_variant: usize,
}

/// All new tokens of one step, in row order.
#[derive(Clone, Copy, Debug)]
pub struct RaggedBatch<'a> {
    /// The sequences; rows are laid out in this order.
    pub sequences: &'a [RaggedSequence<'a>],
}

impl RaggedBatch<'_> {
    /// Rows of the activations: all new tokens.
    pub fn n_rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.n_tokens).sum()
    }
}

/// How a step is queued while it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordingRun {
    /// It runs, so that everything is loaded and chosen that a recording needs.
    WarmUp,
    /// It is recorded and does not run.
    Capture,
}

/// Attention reads no token before the first that a step's first query sees, rounded down to a multiple of this; blocks that
/// lie before it need not be there.
pub const WINDOW_GRAIN: usize = 64;

/// What attention does in one layer: `softmax(cap(scale * q k)) v` over what the window shows. `V` is the device's vector.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionParams<V> {
    /// Query heads; a multiple of the layout's KV heads.
    pub n_heads: usize,
    /// Factor on q k.
    pub scale: f32,
    /// A query sees itself and the `window - 1` tokens before it; at least 1. `None` shows all.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)` before the softmax.
    pub soft_cap: Option<f32>,
    /// `[n_heads]`: a logit of each head that takes part in the softmax and has no value, so that a query may attend to
    /// nothing (Xiao et al., arXiv:2309.17453, learned as in GPT-OSS).
    pub sinks: Option<V>,
}

/// RMS norm of q and k before their rotation. Weights of `head_dim` norm each head by itself, longer ones the whole projection.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm<V> {
    /// `[head_dim]` or `[n_heads * head_dim]`
    pub query: V,
    /// `[head_dim]` or `[n_kv_heads * head_dim]`
    pub key: V,
    /// Added to the mean square.
    pub eps: f32,
}

/// What happens to q and k on their way to attention and to the cache.
#[derive(Debug)]
pub struct RopeAppendParams<'a, B: Backend> {
    /// Query heads.
    pub n_heads: usize,
    /// The rotation.
    pub rope: &'a B::Rope,
    /// A norm before it.
    pub qk_norm: Option<&'a QkNorm<B::Vector>>,
}

/// Gated activations of a feed-forward part: `act(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)` (Shazeer, arXiv:2002.05202).
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415).
    GeluTanh,
    /// GPT-OSS: `g * sigmoid(alpha * g) * (u + 1)`, where g is the gate, at most `limit`, and u is up, within `+-limit`.
    ClampedSwish {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound of both halves.
        limit: f32,
    },
}

/// Names of one expert's packed weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// `[2 * ffn, hidden]`, gate first.
    pub gate_up: String,
    /// `[2 * ffn]`
    pub gate_up_bias: Option<String>,
    /// `[hidden, ffn]`
    pub down: String,
    /// `[hidden]`
    pub down_bias: Option<String>,
}

/// How a mixture of experts chooses and weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeParams {
    /// Experts of a token, those of the largest router logits; of equal ones the smaller number.
    pub top_k: usize,
    /// Divide the weights, which are the softmax over all experts, by their sum over the chosen ones.
    pub renormalize: bool,
    /// Of each expert.
    pub activation: Activation,
}

/// Rotary embedding by table: `cos` and `sin` of `position * inv_freq`, times the attention factor.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParams {
    /// Inverse frequencies, `rotary_dim / 2` of them; pairs are (i, i + rotary_dim / 2) as in Llama.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (1 except for LongRoPE and YaRN).
    pub attention_factor: f32,
}

/// A device: memory for activations, packed weights, and operators. Statically dispatched.
///
/// Activations are matrices of `[rows, cols]`, rows being the batch's tokens. Every operator's result for a row depends
/// on that row (and its sequence's KV) alone, bit for bit: not on the other rows, the batch's size or the threads.
pub trait Backend: Sized + Send + 'static {
    /// An activation, `[rows, cols]`, f32 to the outside whatever is stored.
    type Tensor: Send;
    /// A packed weight matrix `[n_out, n_in]`.
    type Matrix: Send + Sync;
    /// A parameter vector (norm weights).
    type Vector: Send + Sync;
    /// A rope table prepared for the device, in one or several variants.
    type Rope: Send + Sync;
    /// All experts of one layer.
    type Experts: Send + Sync;
    /// What samples on the device.
    type Sampler: RowSampler<Self> + Send;

    /// What this device computes in.
    fn compute_dtype(&self) -> DType;

    /// Device kind, instruction set and dtypes, e.g. `cpu-avx512bf16-bf16`: instances with equal classes give equal bits.
    fn numerics_class(&self) -> String;

    /// An activation with room for `max_rows` rows of `cols`; starts with 0 rows.
    fn tensor(&self, max_rows: usize, cols: usize) -> Result<Self::Tensor, KernelError>;

    /// The same for logits, of which [`Backend::linear`] and [`Backend::soft_cap`] keep more digits than of other activations
    /// where those are rounded.
    fn logits(&self, max_rows: usize, cols: usize) -> Result<Self::Tensor, KernelError>;

    /// A matrix of the packed file by its name.
    fn matrix(&self, weights: &PackedWeights, name: &str) -> Result<Self::Matrix, KernelError>;

    /// A vector of the packed file by its name.
    fn vector(&self, weights: &PackedWeights, name: &str) -> Result<Self::Vector, KernelError>;

    /// The experts of one layer by their names in the packed file, in the order of the router's logits.
    fn experts(&self, weights: &PackedWeights, names: &[ExpertNames]) -> Result<Self::Experts, KernelError>;

    /// Precomputes cos and sin for positions below `max_positions`, for each variant; all have as many frequencies.
    fn rope(&self, variants: &[RopeParams], max_positions: usize) -> Result<Self::Rope, KernelError>;

    /// Says that a step begins. Until the next one, a batch that lies at the same address is the same batch.
    fn begin_step(&self);

    /// `out[r] = scale * table[ids[r]]`, `out: [ids.len(), hidden]`. The table is an ordinary packed matrix `[vocab, hidden]`.
    fn embed(&self, out: &mut Self::Tensor, table: &Self::Matrix, ids: &[u32], scale: f32);

    /// `out[r] = rms_norm(x[r]) * weight`, `x, out: [rows, hidden]`.
    fn rms_norm(&self, out: &mut Self::Tensor, x: &Self::Tensor, weight: &Self::Vector, eps: f32);

    /// `residual += x`, then `out = rms_norm(residual) * weight`, all `[rows, hidden]`.
    fn add_rms_norm(
        &self,
        out: &mut Self::Tensor,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
    );

    /// `out = x w^T`, `x: [rows, n_in]`, `out: [rows, n_out]`. The weight is read once for all rows.
    fn linear(&self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Matrix);

    /// Makes now whatever choice the device would otherwise make in the first large steps with such a product, of as many rows
    /// as both tensors have memory for; how many choices that were. What is in `out` is lost.
    fn prepare_linear(&self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Matrix) -> usize {
        let _ = (out, x, w);
        0
    }

    /// `x[r] += bias`, `x: [rows, cols]`.
    fn add_bias(&self, x: &mut Self::Tensor, bias: &Self::Vector);

    /// `residual += x`, both `[rows, cols]`.
    fn add(&self, residual: &mut Self::Tensor, x: &Self::Tensor);

    /// `x = cap * tanh(x / cap)`.
    fn soft_cap(&self, x: &mut Self::Tensor, cap: f32);

    /// `out = act(gate) * up` of `gate_up: [rows, 2 * ffn]` (gate first), `out: [rows, ffn]`.
    fn gated(&self, out: &mut Self::Tensor, gate_up: &Self::Tensor, activation: Activation);

    /// The weighted sum of each row's experts: `x, out: [rows, hidden]`, `router_logits: [rows, n_experts]`.
    ///
    /// A row's sum runs over its experts in ascending order of their numbers.
    fn moe(
        &self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        router_logits: &Self::Tensor,
        experts: &Self::Experts,
        params: MoeParams,
    );

    /// Norms and rotates q in place, and appends normed and rotated k, and v, to the cache.
    ///
    /// `qkv: [rows, (n_heads + 2 * n_kv_heads) * head_dim]`, q heads first, then k, then v.
    fn rope_append(
        &self,
        qkv: &mut Self::Tensor,
        batch: RaggedBatch<'_>,
        params: RopeAppendParams<'_, Self>,
        layer: usize,
        kv: &mut KvCache,
    );

    /// Causal attention of each new token over its sequence's cached tokens, itself included. With a window, see
    /// [`WINDOW_GRAIN`] for the blocks that are read.
    ///
    /// `qkv` as left by [`Backend::rope_append`]; `out: [rows, n_heads * head_dim]`.
    fn attention(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        batch: RaggedBatch<'_>,
        params: &AttentionParams<Self::Vector>,
        layer: usize,
        kv: &KvCache,
    );

    /// `out[i] = x[rows[i]]`.
    fn gather_rows(&self, out: &mut Self::Tensor, x: &Self::Tensor, rows: &[usize]);

    /// Rows of the decode steps that the device would have recorded, ascending; none where that gains nothing.
    ///
    /// A decode step has one new token for each sequence, and all rows are wanted. It is recorded by queueing its operators
    /// between [`Backend::begin_recording`] and [`Backend::end_recording`], once for each [`RecordingRun`], with as many ids,
    /// sequences and wanted rows as there are rows. What these are does not matter: a recording knows only their number.
    fn recordable_rows(&self) -> Vec<usize> {
        Vec::new()
    }

    /// Begins to record a step of the batches of each layer group, in order; operators are told of them by where they lie.
    ///
    /// # Errors
    /// The device cannot record. Nothing has changed then.
    fn begin_recording(&self, batches: &[RaggedBatch<'_>], run: RecordingRun) -> Result<(), KernelError> {
        let _ = (batches, run);
        Ok(())
    }

    /// Ends the recording; the step leaves its result in `out`.
    ///
    /// # Errors
    /// Something of the step cannot be recorded. Nothing has changed then.
    fn end_recording(&self, out: &Self::Tensor, run: RecordingRun) -> Result<(), KernelError> {
        let _ = (out, run);
        Ok(())
    }

    /// Queues a recorded decode step of at least as many rows as there are ids, with the batches of each layer group, and leaves
    /// their rows in `out`. `sampled` says which ids only the device knows. `false`, and nothing is done, where there is no step
    /// that would serve.
    fn replay(
        &self,
        out: &mut Self::Tensor,
        ids: &[u32],
        sampled: Option<SampledIds<'_, Self>>,
        batches: &[RaggedBatch<'_>],
        kv: &mut KvCache,
    ) -> bool {
        let _ = (out, ids, sampled, batches, kv);
        false
    }

    /// A sampler for steps of up to `max_rows` rows over a vocabulary; `None` of a device that leaves that to the host.
    fn sampler(&self, max_rows: usize, vocab: usize) -> Result<Option<Self::Sampler>, KernelError>;

    /// The activation's elements on the host, `[rows, cols]` row major; waits for the device.
    fn to_host<'a>(&self, x: &'a Self::Tensor) -> std::borrow::Cow<'a, [f32]>;
}

/// How one row of logits is sampled: as by the host's sampler from logits that nothing changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSampling {
    /// Key of the counter-based generator.
    pub seed: u64,
    /// Position of the token among its choice's.
    pub index: u32,
    /// Which of the request's choices.
    pub choice: u32,
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 and more are off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// Log-probabilities, with so many of the most likely tokens.
    pub n_top: Option<usize>,
}

/// What came of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum SampledRow {
    /// A token.
    Chosen {
        /// Its id.
        id: u32,
        /// If they were asked for.
        logprobs: Option<RowLogprobs>,
    },
    /// The logits are broken, or more would have to be put in order than the device does. The next step's token is then of no
    /// meaning.
    LeftToHost,
}

/// Of the raw distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLogprobs {
    /// Of the chosen token.
    pub logprob: f32,
    /// Its place, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, in order.
    pub top: Vec<(u32, f32)>,
}

/// Samples on a device, and keeps what it sampled there for the step that follows. Up to two steps are in flight: finished and
/// not collected.
pub trait RowSampler<B: Backend> {
    /// Whether the device can do what a row asks for.
    fn can_sample(&self, row: &RowSampling) -> bool;

    /// As [`Backend::embed`]; where a row has a source, its id is what the step before sampled in that row of its own.
    fn embed(
        &mut self,
        backend: &B,
        out: &mut B::Tensor,
        table: &B::Matrix,
        ids: &[u32],
        sources: &[Option<usize>],
        scale: f32,
    );

    /// Samples the next rows of the step from the rows of `logits` from `first_row` on. Waits for nothing.
    fn sample(&mut self, backend: &B, logits: &B::Tensor, first_row: usize, rows: &[RowSampling]);

    /// The step has no more rows. Waits for nothing.
    fn finish_step(&mut self);

    /// Returns once the oldest step in flight is over.
    fn wait(&mut self);

    /// What came of the rows of the oldest step in flight, in the order in which they were sampled; waits for it.
    fn collect(&mut self) -> &[SampledRow];
}

/// The ids of a step that only the device knows.
#[derive(Debug)]
pub struct SampledIds<'a, B: Backend> {
    /// It has them.
    pub sampler: &'a B::Sampler,
    /// Of each row, as [`RowSampler::embed`] takes them.
    pub sources: &'a [Option<usize>],
}

/// The sampler of a device that has none.
#[derive(Clone, Copy, Debug)]
pub enum NoSampler {}

impl<B: Backend> RowSampler<B> for NoSampler {
    fn can_sample(&self, _: &RowSampling) -> bool {
        match *self {}
    }

    fn embed(&mut self, _: &B, _: &mut B::Tensor, _: &B::Matrix, _: &[u32], _: &[Option<usize>], _: f32) {
        match *self {}
    }

    fn sample(&mut self, _: &B, _: &B::Tensor, _: usize, _: &[RowSampling]) {
        match *self {}
    }

    fn finish_step(&mut self) {
        match *self {}
    }

    fn wait(&mut self) {
        match *self {}
    }

    fn collect(&mut self) -> &[SampledRow] {
        match *self {}
    }
}
