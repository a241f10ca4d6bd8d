//! The seam between the step loop and a model: one step's tokens in, logits or hidden states out, KV written on the way.

use baton_kernels::{KernelError, KvCache, KvLayout};
use baton_scheduler::ids::TokenId;
use baton_scheduler::layer_groups::LayerGroups;

/// What comes back of a sequence's new rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: a prefill chunk that is not the prompt's last.
    None,
    /// The last row: the next token is sampled from it.
    Last,
    /// Every row: prompt log-probabilities.
    All,
    /// No logits, but the hidden state of every row.
    Hidden,
}

/// What a step gives, sequences in order, rows in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepOutput<'a> {
    /// `[n_logit_rows, vocab_size]`
    pub logits: &'a [f32],
    /// `[n_hidden_rows, hidden_size]`: what the final norm gives, which the output matrix would turn into logits.
    pub hidden: &'a [f32],
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepSequence<'a> {
    /// New tokens, at least 1.
    pub tokens: &'a [TokenId],
    /// Position of the first new token: tokens whose KV is already in the cache.
    pub start_pos: usize,
    /// The sequence's blocks in order, covering `start_pos + tokens.len()` tokens: a table for each layer group.
    pub block_tables: &'a [Vec<u32>],
    /// Which of the model's rotary tables turns it: 0, or 1 for a sequence that may outgrow the short context of a model
    /// with two. The same in every step of a sequence.
    pub rope_variant: usize,
    /// What comes back of its rows.
    pub logits: LogitsWanted,
}

/// A model on a device with its KV cache. Implemented by the real models and, in tests, by a hash of the context.
pub trait ForwardPass: Send + 'static {
    /// Entries of the vocabulary: columns of the logits.
    fn vocab_size(&self) -> usize;

    /// Columns of the hidden states.
    fn hidden_size(&self) -> usize;

    /// Device kind, instruction set and dtypes; equal classes give equal bits.
    fn numerics_class(&self) -> String;

    /// Shape of the KV cache: its layers are the slots of a block.
    fn layout(&self) -> KvLayout;

    /// Which layers of the model share blocks. All of them, unless it says otherwise.
    fn layer_groups(&self) -> LayerGroups {
        LayerGroups::one(self.layout().n_layers)
    }

    /// The KV memory, for pins and writes between steps.
    fn kv_cache(&mut self) -> &mut KvCache;

    /// Steps so far that were queued as one, as they had been recorded.
    fn n_replayed_steps(&self) -> u64 {
        0
    }

    /// Computes one step. `on_layer(layer, kv)`, with the number of the model's layer, is called as soon as that layer's K and V of every new token are in memory,
    /// so that their transfer can start; it must return quickly and must not write the cache.
    fn step(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<StepOutput<'_>, KernelError>;
}
