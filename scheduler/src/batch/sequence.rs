//! The running state of one choice of a request on one instance, as far as scheduling needs it. A fresh request of several
//! choices is one sequence until their first tokens.

use super::block_table::BlockTables;
use super::group::GroupId;
use super::{BatchConfig, Numerics, PrefixCaching, Samples};
use crate::block_pool::{BlockPool, HeldBlock, IsPinned};
use crate::ids::{Nanos, TokenId};
use crate::prefix_cache::PrefixKey;
use crate::request::{Finish, PortableState};

/// What a sequence is here for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceKind {
    /// Computed and generated here.
    Local,
    /// Computed here and sampled once; then held until its KV has been fetched.
    PrefillForHandoff,
    /// Computed elsewhere; becomes [`SequenceKind::Local`] when it joins.
    Received,
    /// Generated elsewhere so far; becomes [`SequenceKind::Local`] when it joins.
    Moved,
    /// Computed here from its first token on, for the hidden states of all of them; nothing is sampled.
    Embedded,
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// In line: not begun, preempted, or a reservation waiting for a prefix.
    Waiting,
    /// In the running set.
    Running,
    /// Holds its blocks and its place, and is in no step until it is resumed.
    Paused,
    /// A granted reservation, waiting for KV and first token.
    Reserved,
    /// Prefilled; its blocks wait to be fetched.
    HandingOver,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) group: GroupId,
    pub(super) choice: u32,
    /// Choices it stands for: all of a fresh request until their first tokens, then one.
    pub(super) n_choices: u32,
    pub(super) kind: SequenceKind,
    pub(super) tokens: Vec<TokenId>,
    pub(super) n_prompt: usize,
    /// Leading tokens whose KV is in the tables' blocks.
    pub(super) n_computed: usize,
    /// Tokens after them that batches in flight compute.
    pub(super) n_in_flight: usize,
    /// Tokens after the last that a batch in flight is assumed to sample, 0 or 1; only while a batch is made ahead.
    pub(super) n_assumed: usize,
    pub(super) tables: BlockTables,
    /// It gives up no block that its queries see no more: somebody is about to fetch them.
    pub(super) keeps_unseen: bool,
    /// Reserved for the choices that fork from it: one block of each layer group for each.
    pub(super) spare: Vec<HeldBlock>,
    /// Keys of the full blocks of `tokens`, as far as they were needed.
    pub(super) keys: Vec<PrefixKey>,
    /// Of each layer group, leading blocks that came from the prefix cache, that another choice brings, or that no query sees.
    pub(super) n_held_blocks: Vec<usize>,
    /// Leading blocks already offered to the prefix cache.
    pub(super) n_registered: usize,
    /// Keys whose KV this sequence has promised to bring.
    pub(super) claims: Vec<PrefixKey>,
    pub(super) numerics: Numerics,
    pub(super) salt: u64,
    pub(super) rope_variant: usize,
    pub(super) deferred_since: Option<Nanos>,
    has_prompt_logprobs: bool,
    stop_token_ids: Vec<TokenId>,
    /// Tokens of prompt and output after which the sequence ends.
    max_len: usize,
}

impl Sequence {
    /// Of `choice` alone, or of `n_choices` from the first on.
    pub(super) fn new(
        state: &PortableState,
        group: GroupId,
        choice: u32,
        n_choices: u32,
        kind: SequenceKind,
        config: &BatchConfig,
    ) -> Sequence {
        let sampling = &state.request.sampling;
        let n_prompt = state.request.prompt_ids.len();
        let output = &state.choices[choice as usize].output;
        Sequence {
            group,
            choice,
            n_choices,
            kind,
            tokens: state
                .request
                .prompt_ids
                .iter()
                .copied()
                .chain(output.iter().map(|token| token.id))
                .collect(),
            n_prompt,
            n_computed: 0,
            n_in_flight: 0,
            n_assumed: 0,
            tables: BlockTables::new(config.n_groups()),
            keeps_unseen: false,
            spare: Vec::new(),
            keys: Vec::new(),
            n_held_blocks: vec![0; config.n_groups()],
            n_registered: 0,
            claims: Vec::new(),
            numerics: Numerics::Same,
            salt: state.request.prefix_salt(config.short_context),
            rope_variant: state.request.rope_variant(config.short_context),
            deferred_since: None,
            // They were reported before the first token.
            has_prompt_logprobs: sampling.prompt_logprobs.is_some() && state.is_fresh(),
            stop_token_ids: sampling.stop_token_ids.clone(),
            max_len: n_prompt
                .saturating_add(sampling.max_tokens as usize)
                .min(config.max_model_len),
        }
    }

    /// Another choice, which begins with the same tokens. It has no blocks yet.
    pub(super) fn fork(&self, choice: u32) -> Sequence {
        Sequence {
            group: self.group,
            choice,
            n_choices: 1,
            kind: self.kind,
            tokens: self.tokens.clone(),
            n_prompt: self.n_prompt,
            n_computed: self.n_computed,
            n_in_flight: 0,
            n_assumed: 0,
            tables: BlockTables::new(self.n_held_blocks.len()),
            keeps_unseen: false,
            spare: Vec::new(),
            keys: self.keys.clone(),
            n_held_blocks: vec![0; self.n_held_blocks.len()],
            n_registered: self.n_registered,
            claims: Vec::new(),
            numerics: self.numerics,
            salt: self.salt,
            rope_variant: self.rope_variant,
            deferred_since: None,
            has_prompt_logprobs: false,
            stop_token_ids: self.stop_token_ids.clone(),
            max_len: self.max_len,
        }
    }

    /// What a step that computes all that is left ends with.
    pub(super) fn samples(&self) -> Samples {
        match (self.kind, self.n_choices) {
            (SequenceKind::Embedded, _) => Samples::Nothing,
            (_, 1) => Samples::Token,
            (_, n_choices) => Samples::FirstTokens(n_choices),
        }
    }

    /// Whether it has a token of its own, and only that one's row is left to compute.
    pub(super) fn is_decoding(&self) -> bool {
        self.tokens.len() > self.n_prompt && self.n_left() == 1
    }

    /// Tokens not computed yet.
    pub(super) fn n_left(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Where the next batch begins: tokens computed or in flight.
    pub(super) fn n_launched(&self) -> usize {
        self.n_computed + self.n_in_flight
    }

    /// Tokens that the next batch may compute, one that is only assumed included.
    pub(super) fn n_to_launch(&self) -> usize {
        self.n_tokens() - self.n_launched()
    }

    /// Tokens, one that is only assumed included.
    pub(super) fn n_tokens(&self) -> usize {
        self.tokens.len() + self.n_assumed
    }

    /// Whether it goes on after a token that a batch in flight samples, unless that is a stop id.
    pub(super) fn outlives_its_next_token(&self) -> bool {
        self.kind == SequenceKind::Local && self.tokens.len() + 1 < self.max_len
    }

    /// Whether each row of the prompt gives logits, which no prefix hit could provide.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.has_prompt_logprobs && self.tokens.len() == self.n_prompt
    }

    /// Whether the prefix cache may provide its beginning.
    pub(super) fn takes_hits(&self, config: &BatchConfig) -> bool {
        config.prefix_caching == PrefixCaching::On && !self.wants_prompt_logits() && self.kind != SequenceKind::Embedded
    }

    /// Tokens whose KV the sequence needs at most: the last token's is never read.
    pub(super) fn max_kv_tokens(&self) -> usize {
        self.max_len - 1
    }

    /// Whether `token`, appended to the tokens, ends the sequence.
    pub(super) fn finish_with(&self, token: TokenId) -> Option<Finish> {
        if self.stop_token_ids.contains(&token) {
            return Some(Finish::Stop(token));
        }
        (self.tokens.len() + 1 >= self.max_len).then_some(Finish::Length)
    }

    /// Whether its KV is computed elsewhere and has not come yet.
    pub(super) fn is_received(&self) -> bool {
        match self.kind {
            SequenceKind::Local | SequenceKind::PrefillForHandoff | SequenceKind::Embedded => false,
            SequenceKind::Received | SequenceKind::Moved => true,
        }
    }

    /// The first block of a layer group that it needs when the first `n_hit` blocks are not computed here: a local sequence must
    /// see what is behind its next token, one that is computed elsewhere what is behind its last.
    pub(super) fn first_needed(&self, config: &BatchConfig, layer_group: usize, n_hit: usize) -> usize {
        let n_computed = match self.is_received() {
            true => self.tokens.len(),
            false => n_hit * config.block_size,
        };
        config.n_unseen_blocks(layer_group, n_computed)
    }

    /// Blocks that the tables lack up to `ends`, one for each layer group.
    pub(super) fn n_missing(&self, ends: &[usize]) -> usize {
        let missing = |(layer_group, &end): (usize, &usize)| end.saturating_sub(self.tables.len(layer_group));
        ends.iter().enumerate().map(missing).sum()
    }

    /// Gives all blocks back.
    pub(super) fn release_blocks(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        self.release_spare(pool, is_pinned);
        self.tables.release(pool, is_pinned);
    }

    /// Gives back what was kept for choices to fork with.
    pub(super) fn release_spare(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        while let Some(block) = self.spare.pop() {
            pool.release(block, is_pinned);
        }
    }

    /// Back to the state before any of it was computed; the tokens stay.
    pub(super) fn forget_computed(&mut self) {
        assert_eq!(self.n_in_flight, 0, "a sequence in flight keeps its blocks");
        self.n_computed = 0;
        self.n_held_blocks.fill(0);
        self.n_registered = 0;
        self.numerics = Numerics::Same;
        self.deferred_since = None;
    }
}
