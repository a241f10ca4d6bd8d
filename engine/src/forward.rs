//! The seam between the step loop and a model: one step's tokens in, logits, tokens or hidden states out, KV written on the way.

use baton_kernels::{KernelError, KvCache, KvLayout};
use baton_scheduler::ids::TokenId;
use baton_scheduler::layer_groups::LayerGroups;
use baton_scheduler::request::{SamplingParams, TokenLogprobs};

/// What comes back of a sequence's new rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LogitsWanted<'a> {
    /// None: a prefill chunk that is not the prompt's last.
    None,
    /// The last row: the next token is sampled from it.
    Last,
    /// Every row: prompt log-probabilities.
    All,
    /// No logits, but the hidden state of every row.
    Hidden,
    /// No logits, but the token that the device samples from the last row.
    Token(TokenWanted<'a>),
}

/// A sequence's new tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTokens<'a> {
    /// These.
    Known(&'a [TokenId]),
    /// One, of which only the device knows the id: in the step before this one, which is in flight, it is the one at this
    /// place of [`StepOutput::tokens`].
    Sampled(usize),
}

impl NewTokens<'_> {
    /// How many.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(self) -> usize {
        match self {
            NewTokens::Known(tokens) => tokens.len(),
            NewTokens::Sampled(_) => 1,
        }
    }

    /// Those whose ids are known.
    pub fn known(&self) -> &[TokenId] {
        match self {
            NewTokens::Known(tokens) => tokens,
            NewTokens::Sampled(_) => &[],
        }
    }
}

/// A token that the device is to sample, as `Sampler::sample` would.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenWanted<'a> {
    /// Of the request; such that [`ForwardPass::can_sample`], and with nothing that changes logits at this position.
    pub params: &'a SamplingParams,
    /// Which of the request's choices.
    pub choice: u32,
    /// Position of the token among its choice's.
    pub index: u32,
}

/// A token that the device sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: TokenId,
    /// Of the raw distribution, where they were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// What a step gives, sequences in order, rows in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepOutput<'a> {
    /// Of each token that was to be sampled; `None` where the device could not, and the host is to try with the row's logits:
    /// because they are broken, or because there is more to put in order than the device does.
    pub tokens: &'a [Option<SampledToken>],
    /// `[n_logit_rows, vocab_size]`
    pub logits: &'a [f32],
    /// `[n_hidden_rows, hidden_size]`: what the final norm gives, which the output matrix would turn into logits.
    pub hidden: &'a [f32],
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepSequence<'a> {
    /// New tokens, at least 1.
    pub tokens: NewTokens<'a>,
    /// Position of the first new token: tokens whose KV is already in the cache.
    pub start_pos: usize,
    /// The sequence's blocks in order, covering `start_pos + tokens.len()` tokens: a table for each layer group.
    pub block_tables: &'a [Vec<u32>],
    /// Which of the model's rotary tables turns it: 0, or 1 for a sequence that may outgrow the short context of a model
    /// with two. The same in every step of a sequence.
    pub rope_variant: usize,
    /// What comes back of its rows.
    pub logits: LogitsWanted<'a>,
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

    /// Whether the device samples by these parameters itself. What masks and shifts logits is the host's in any case.
    fn can_sample(&self, params: &SamplingParams) -> bool {
        let _ = params;
        false
    }

    /// Whether another step may be launched while this one is in flight. One that gives nothing but tokens usually may; the
    /// host has nothing to do before.
    fn can_run_ahead_of(&self, sequences: &[StepSequence<'_>]) -> bool {
        let _ = sequences;
        false
    }

    /// Begins one step; it may be over on return. `on_layer(layer, kv)`, with the number of the model's layer, is called as
    /// soon as that layer's K and V of every new token are in memory, or will be before anyone can read them, so that their
    /// transfer can start; it must return quickly and must not write the cache.
    ///
    /// # Errors
    /// As the device has them; the step is then not in flight.
    fn launch(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<(), KernelError>;

    /// Returns once the oldest step in flight is over.
    fn wait(&mut self) {}

    /// What the oldest step in flight gives, once it is over. It is then in flight no more.
    ///
    /// # Errors
    /// As the device has them.
    fn collect(&mut self) -> Result<StepOutput<'_>, KernelError>;

    /// Computes one step, alone.
    ///
    /// # Errors
    /// As [`ForwardPass::launch`] and [`ForwardPass::collect`].
    fn step(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<StepOutput<'_>, KernelError> {
        self.launch(sequences, on_layer)?;
        self.collect()
    }
}
