//! The limits of one instance, and which requests can run within them at all.

use thiserror::Error;

use crate::ids::{Fingerprint, Nanos};
use crate::request::{ChoiceState, Failure, Finish, PortableState, Request};

/// Whether equal prefixes share blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixCaching {
    /// They do.
    On,
    /// Every sequence computes its own.
    Off,
}

/// How far back the queries of a layer group see that has a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlidingWindow {
    /// A query sees itself and the `n_tokens - 1` tokens before it.
    pub n_tokens: usize,
    /// The device reads from the window's beginning rounded down to a multiple of this.
    pub grain: usize,
    /// Tokens kept beyond it by a sequence that runs, because who takes it over may know less of its output: a destination
    /// that asks for more than is there is refused.
    pub slack: usize,
}

/// The limits of one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchConfig {
    /// Blocks of the KV cache.
    pub n_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Sequences that run or are reserved at the same time.
    pub max_num_seqs: usize,
    /// Tokens of one step, at least `max_num_seqs`.
    pub max_batch_tokens: usize,
    /// Tokens of prompt and output together.
    pub max_model_len: usize,
    /// Tokens of the longest sequence that the model's rotary table for short contexts turns, where it has two.
    pub short_context: Option<u32>,
    /// Of each layer group, how far back its queries see, where it has a window. Blocks before that are given up.
    pub windows: Vec<Option<SlidingWindow>>,
    /// Sequences that wait to run for the first time.
    pub max_waiting: usize,
    /// Reservations that wait for a prefix someone else brings.
    pub max_deferred_reservations: usize,
    /// How long a sequence waits for a prefix someone else brings before it goes on without.
    pub max_defer: Nanos,
    /// How long nothing may run while a sequence waits for room before that sequence is refused as `Busy`.
    pub max_stall: Nanos,
    /// Rows of prompt log-probabilities in one step: each is a row of logits over the whole vocabulary.
    pub max_prompt_logprob_rows: usize,
    /// Changes of the prefix cache kept for whoever mirrors it; after more of them it gets the whole contents.
    pub max_prefix_events: usize,
    /// Whether equal prefixes share blocks.
    pub prefix_caching: PrefixCaching,
    /// Of model, dtype and layout: what prefix keys are made of.
    pub fingerprint: Fingerprint,
}

/// Limits that cannot work together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BatchConfigError {
    /// A limit is zero.
    #[error("{field} is 0, expected at least 1")]
    Zero {
        /// Which.
        field: &'static str,
    },
    /// Decodes alone would not fit a step, so a prefill could starve.
    #[error("max_batch_tokens is {max_batch_tokens}, expected at least max_num_seqs ({max_num_seqs})")]
    BatchTooSmall {
        /// Tokens of one step.
        max_batch_tokens: usize,
        /// Sequences that run at the same time.
        max_num_seqs: usize,
    },
    /// A request within `max_model_len` would not fit even alone.
    #[error("the KV cache has room for {n_tokens} tokens, expected at least max_model_len ({max_model_len})")]
    CacheTooSmall {
        /// Tokens that fit the KV cache.
        n_tokens: usize,
        /// Tokens of prompt and output together.
        max_model_len: usize,
    },
}

impl BatchConfig {
    /// Limits for an instance with `n_blocks` blocks; the rest are defaults: 64 sequences, steps of 512 tokens, and the
    /// largest model length that fits, up to 131,072.
    pub fn new(n_blocks: usize, block_size: usize, fingerprint: Fingerprint) -> BatchConfig {
        BatchConfig {
            n_blocks,
            block_size,
            max_num_seqs: 64,
            max_batch_tokens: 512,
            max_model_len: (n_blocks * block_size).min(131_072),
            short_context: None,
            windows: vec![None],
            max_waiting: 1024,
            max_deferred_reservations: 64,
            max_defer: Nanos::from_secs(5),
            max_stall: Nanos::from_secs(5),
            max_prompt_logprob_rows: 128,
            max_prefix_events: 16_384,
            prefix_caching: PrefixCaching::On,
            fingerprint,
        }
    }

    /// Blocks that hold `n_tokens` tokens.
    pub fn blocks_for(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.block_size)
    }

    /// Layer groups of the model: block tables of a sequence, and blocks for each `block_size` tokens of it.
    pub fn n_groups(&self) -> usize {
        self.windows.len()
    }

    /// Leading blocks of a layer group that no query from position `n_computed` on reads.
    pub fn n_unseen_blocks(&self, layer_group: usize, n_computed: usize) -> usize {
        self.n_unneeded_blocks(layer_group, n_computed, 0)
    }

    /// Those that a running sequence gives up: it keeps some that only another instance may ask for.
    pub(super) fn n_released_blocks(&self, layer_group: usize, n_computed: usize) -> usize {
        let slack = self.windows[layer_group].map_or(0, |window| window.slack);
        self.n_unneeded_blocks(layer_group, n_computed, slack)
    }

    fn n_unneeded_blocks(&self, layer_group: usize, n_computed: usize, slack: usize) -> usize {
        self.windows[layer_group].map_or(0, |window| {
            let first_seen = (n_computed + 1).saturating_sub(window.n_tokens + slack);
            first_seen / window.grain * window.grain / self.block_size
        })
    }

    /// Most blocks that a running sequence holds in a layer group, however long it is; `None` where there is no window.
    ///
    /// After a step of `max_batch_tokens` those are the tokens of the step, the window before it, what is kept beside it and
    /// what the grain rounds off; and one block more, because neither end need lie at a block's.
    pub fn most_blocks(&self, layer_group: usize) -> Option<usize> {
        let window = self.windows[layer_group]?;
        let n_tokens = window.n_tokens + window.slack + window.grain + self.max_batch_tokens;
        Some(self.blocks_for(n_tokens) + 1)
    }

    /// Blocks, over all layer groups, with which a sequence of `n_tokens` can run.
    pub fn n_blocks_to_run(&self, n_tokens: usize) -> usize {
        let n_blocks = self.blocks_for(n_tokens);
        let of_group = |layer_group| self.most_blocks(layer_group).unwrap_or(n_blocks).min(n_blocks);
        (0..self.n_groups()).map(of_group).sum()
    }

    /// Tokens of the longest sequence that can run with all blocks, of `max_tokens` at most.
    pub fn longest_sequence(&self, max_tokens: usize) -> usize {
        let (mut fits, mut most) = (0, self.blocks_for(max_tokens));
        while fits < most {
            let middle = (fits + most).div_ceil(2);
            match self.n_blocks_to_run(middle * self.block_size) <= self.n_blocks {
                true => fits = middle,
                false => most = middle - 1,
            }
        }
        (fits * self.block_size).min(max_tokens)
    }

    /// Refuses limits that cannot work together.
    pub fn validate(&self) -> Result<(), BatchConfigError> {
        let fields = [
            ("n_blocks", self.n_blocks),
            ("block_size", self.block_size),
            ("max_num_seqs", self.max_num_seqs),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_model_len", self.max_model_len),
            ("max_waiting", self.max_waiting),
            ("max_prompt_logprob_rows", self.max_prompt_logprob_rows),
            ("max_prefix_events", self.max_prefix_events),
            ("windows", self.windows.len()),
        ];
        let windows = self.windows.iter().flatten();
        let of_windows = windows.flat_map(|window| [("window", window.n_tokens), ("window.grain", window.grain)]);
        if let Some((field, _)) = fields.into_iter().chain(of_windows).find(|(_, value)| *value == 0) {
            return Err(BatchConfigError::Zero { field });
        }
        if self.max_batch_tokens < self.max_num_seqs {
            let (max_batch_tokens, max_num_seqs) = (self.max_batch_tokens, self.max_num_seqs);
            return Err(BatchConfigError::BatchTooSmall {
                max_batch_tokens,
                max_num_seqs,
            });
        }
        let n_tokens = self.longest_sequence(self.max_model_len);
        if n_tokens < self.max_model_len {
            return Err(BatchConfigError::CacheTooSmall {
                n_tokens,
                max_model_len: self.max_model_len,
            });
        }
        Ok(())
    }

    /// How a choice has ended, whether its state says so or only its tokens do: the last one may have been told before
    /// its end was.
    pub fn finish_of(&self, state: &PortableState, choice: usize) -> Option<Finish> {
        let ChoiceState { output, finish } = &state.choices[choice];
        let sampling = &state.request.sampling;
        let n_tokens = state.request.prompt_ids.len() + output.len();
        finish.or_else(|| match output.last() {
            Some(last) if sampling.stop_token_ids.contains(&last.id) => Some(Finish::Stop(last.id)),
            _ if output.len() >= sampling.max_tokens as usize => Some(Finish::Length),
            _ => (n_tokens >= self.max_model_len).then_some(Finish::Length),
        })
    }

    /// The choices of a state that go on.
    pub fn unfinished<'a>(&'a self, state: &'a PortableState) -> impl Iterator<Item = u32> + 'a {
        (0..state.choices.len() as u32).filter(|&choice| self.finish_of(state, choice as usize).is_none())
    }

    /// Refuses a state that can never run here.
    ///
    /// # Errors
    /// `Invalid`, naming the field and the limit.
    pub fn check(&self, state: &PortableState) -> Result<(), Failure> {
        let invalid = |message: String| Err(Failure::Invalid(message));
        let n_prompt = state.request.prompt_ids.len();
        let sampling = &state.request.sampling;
        if sampling.n == 0 || sampling.n as usize > self.max_num_seqs {
            let (n, most) = (sampling.n, self.max_num_seqs);
            return invalid(format!("n is {n}, expected 1 to {most} (max_num_seqs)"));
        }
        if state.choices.len() != sampling.n as usize {
            let (n_choices, n) = (state.choices.len(), sampling.n);
            return invalid(format!("{n_choices} choices, expected {n}"));
        }
        for (field, penalty, is_valid) in [
            ("presence_penalty", sampling.presence_penalty, true),
            ("frequency_penalty", sampling.frequency_penalty, true),
            (
                "repetition_penalty",
                sampling.repetition_penalty,
                sampling.repetition_penalty > 0.0,
            ),
        ] {
            if !(penalty.is_finite() && is_valid) {
                let expected = if is_valid { "a finite number" } else { "more than 0" };
                return invalid(format!("{field} is {penalty}, expected {expected}"));
            }
        }
        if n_prompt == 0 {
            return invalid("the prompt has 0 tokens, expected at least 1".to_owned());
        }
        if n_prompt >= self.max_model_len {
            let most = self.max_model_len - 1;
            return invalid(format!("the prompt has {n_prompt} tokens, expected at most {most}"));
        }
        if sampling.max_tokens == 0 {
            return invalid("max_tokens is 0, expected at least 1".to_owned());
        }
        let most = (sampling.max_tokens as usize).min(self.max_model_len - n_prompt);
        let outgrown = |choice: &&ChoiceState| choice.output.len() > most;
        if let Some(choice) = state.choices.iter().find(outgrown) {
            let n_output = choice.output.len();
            return invalid(format!("a choice has {n_output} tokens, expected at most {most}"));
        }
        Ok(())
    }

    /// Refuses a request that can never be embedded here.
    ///
    /// # Errors
    /// `Invalid`, naming the field and the limit.
    pub fn check_embedded(&self, request: &Request) -> Result<(), Failure> {
        let (n_prompt, most) = (request.prompt_ids.len(), self.max_model_len);
        if n_prompt == 0 || n_prompt > most {
            return Err(Failure::Invalid(format!(
                "the input has {n_prompt} tokens, expected 1 to {most}"
            )));
        }
        Ok(())
    }

    /// Refuses a state of which nothing is left to generate.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check_unfinished(&self, state: &PortableState) -> Result<(), Failure> {
        if self.unfinished(state).next().is_some() {
            return Ok(());
        }
        let n_output = state.choices[0].output.len();
        Err(Failure::Invalid(format!(
            "the choice has ended after {n_output} tokens, expected one that goes on"
        )))
    }

    /// Refuses a state whose choices have no context in common: only one context is handed over.
    ///
    /// # Errors
    /// `Invalid`, as [`BatchConfig::check_unfinished`] too.
    pub fn check_handoff(&self, state: &PortableState) -> Result<(), Failure> {
        self.check_unfinished(state)?;
        if state.choices.len() > 1 && !state.is_fresh() {
            let n_choices = state.choices.len();
            return Err(Failure::Invalid(format!(
                "{n_choices} choices have begun, expected none for a handoff"
            )));
        }
        Ok(())
    }
}
