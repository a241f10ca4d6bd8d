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

/// What attention does beyond `softmax(q k / sqrt(d)) v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Query heads; a multiple of the layout's KV heads.
    pub n_heads: usize,
    /// Factor on q k.
    pub scale: f32,
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
    /// A rope table prepared for the device.
    type Rope: Send + Sync;

    /// What this device computes in: f32 or bf16.
    fn compute_dtype(&self) -> DType;

    /// Device kind, instruction set and dtypes, e.g. `cpu-avx512bf16-bf16`: instances with equal classes give equal bits.
    fn numerics_class(&self) -> String;

    /// An activation with room for `max_rows` rows of `cols`; starts with 0 rows.
    fn tensor(&self, max_rows: usize, cols: usize) -> Self::Tensor;

    /// A matrix of the packed file by its name.
    fn matrix(&self, weights: &PackedWeights, name: &str) -> Result<Self::Matrix, KernelError>;

    /// A vector of the packed file by its name.
    fn vector(&self, weights: &PackedWeights, name: &str) -> Result<Self::Vector, KernelError>;

    /// Precomputes cos and sin for positions below `max_positions`.
    fn rope(&self, params: &RopeParams, max_positions: usize) -> Self::Rope;

    /// `out[r] = table[ids[r]]`, `out: [ids.len(), hidden]`. The table is an ordinary packed matrix `[vocab, hidden]`.
    fn embed(&self, out: &mut Self::Tensor, table: &Self::Matrix, ids: &[u32]);

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

    /// `out = silu(gate) * up` of `gate_up: [rows, 2 * ffn]` (gate first), `out: [rows, ffn]`.
    fn silu_mul(&self, out: &mut Self::Tensor, gate_up: &Self::Tensor);

    /// Rotates q in place and appends rotated k and v to the cache.
    ///
    /// `qkv: [rows, (n_heads + 2 * n_kv_heads) * head_dim]`, q heads first, then k, then v.
    fn rope_append(
        &self,
        qkv: &mut Self::Tensor,
        batch: RaggedBatch<'_>,
        rope: &Self::Rope,
        n_heads: usize,
        layer: usize,
        kv: &mut KvCache,
    );

    /// Causal attention of each new token over its sequence's cached tokens, itself included.
    ///
    /// `qkv` as left by [`Backend::rope_append`]; `out: [rows, n_heads * head_dim]`.
    fn attention(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        batch: RaggedBatch<'_>,
        params: AttentionParams,
        layer: usize,
        kv: &KvCache,
    );

    /// `out[i] = x[rows[i]]`.
    fn gather_rows(&self, out: &mut Self::Tensor, x: &Self::Tensor, rows: &[usize]);

    /// The activation's elements on the host, `[rows, cols]` row major; waits for the device.
    fn to_host<'a>(&self, x: &'a Self::Tensor) -> std::borrow::Cow<'a, [f32]>;
}
