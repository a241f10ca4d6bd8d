//! The running state of one choice of a request on one instance, as far as scheduling needs it. A fresh request of several
//! choices is one sequence until their first tokens.

use super::block_table::BlockTable;
use super::group::GroupId;
use super::{BatchConfig, Numerics, PrefixCaching, Samples};
use crate::block_pool::{BlockPool, IsPinned};
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
    /// Leading tokens whose KV is in the table's blocks.
    pub(super) n_computed: usize,
    pub(super) table: BlockTable,
    /// Reserved for the choices that fork from it.
    pub(super) spare: BlockTable,
    /// Keys of the full blocks of `tokens`, as far as they were needed.
    pub(super) keys: Vec<PrefixKey>,
    /// Leading blocks that came from the prefix cache.
    pub(super) n_hit_blocks: usize,
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
            table: BlockTable::default(),
            spare: BlockTable::default(),
            keys: Vec::new(),
            n_hit_blocks: 0,
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
            table: BlockTable::default(),
            spare: BlockTable::default(),
            keys: self.keys.clone(),
            n_hit_blocks: 0,
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
        match self.n_choices {
            1 => Samples::Token,
            n_choices => Samples::FirstTokens(n_choices),
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

    /// Whether each row of the prompt gives logits, which no prefix hit could provide.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.has_prompt_logprobs && self.tokens.len() == self.n_prompt
    }

    /// Whether the prefix cache may provide its beginning.
    pub(super) fn takes_hits(&self, config: &BatchConfig) -> bool {
        config.prefix_caching == PrefixCaching::On && !self.wants_prompt_logits()
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

    /// Gives all blocks back.
    pub(super) fn release_blocks(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        self.spare.release(pool, is_pinned);
        self.table.release(pool, is_pinned);
    }

    /// Back to the state before any of it was computed; the tokens stay.
    pub(super) fn forget_computed(&mut self) {
        self.n_computed = 0;
        self.n_hit_blocks = 0;
        self.n_registered = 0;
        self.numerics = Numerics::Same;
        self.deferred_since = None;
    }
}
