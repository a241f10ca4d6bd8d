//! What a step computes on its way from tokens to logits: memory that is set aside once, for the largest step.

use baton_kernels::{Backend, KernelError};

use super::MAX_FETCHED_ROWS;
use crate::model::config::ModelConfig;

/// One step's activations; rows are the step's tokens.
pub(super) struct Activations<B: Backend> {
    /// `[rows, hidden_size]`: the residual stream.
    pub(super) residual: B::Tensor,
    /// `[rows, (n_heads + 2 * n_kv_heads) * head_dim]`
    pub(super) qkv: B::Tensor,
    /// `[rows, n_heads * head_dim]`
    pub(super) attention: B::Tensor,
    pub(super) block: BlockActivations<B>,
    /// `[wanted rows, hidden_size]`: the residual stream where logits are wanted.
    pub(super) wanted_residual: B::Tensor,
    /// `[wanted rows, n_heads * head_dim]`
    pub(super) wanted_attention: B::Tensor,
    /// `[wanted rows, vocab_size]`
    pub(super) logits: B::Tensor,
}

/// Activations within a layer, over all rows or the wanted ones.
pub(super) struct BlockActivations<B: Backend> {
    /// `[rows, hidden_size]`
    pub(super) normed: B::Tensor,
    /// `[rows, hidden_size]`: what a block adds to the residual stream.
    pub(super) delta: B::Tensor,
    /// `[rows, hidden_size]`: the same after a norm of its own.
    pub(super) post: B::Tensor,
    /// `[rows, 2 * ffn_size]`
    pub(super) gate_up: B::Tensor,
    /// `[rows, ffn_size]`
    pub(super) ffn: B::Tensor,
    /// `[rows, n_experts]`
    pub(super) router_logits: B::Tensor,
}

impl<B: Backend> Activations<B> {
    pub(super) fn new(backend: &B, config: &ModelConfig, max_rows: usize) -> Result<Activations<B>, KernelError> {
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
