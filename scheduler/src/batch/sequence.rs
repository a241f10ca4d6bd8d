//! A request's running state on one instance, as far as scheduling needs it.

use super::block_table::BlockTable;
use super::{BatchConfig, Numerics, PrefixCaching};
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
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// In line: not begun, preempted, or a reservation waiting for a prefix.
    Waiting,
    /// In the running set.
    Running,
    /// A granted reservation, waiting for KV and first token.
    Reserved,
    /// Prefilled; its blocks wait to be fetched.
    HandingOver,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) kind: SequenceKind,
    pub(super) tokens: Vec<TokenId>,
    pub(super) n_prompt: usize,
    /// Leading tokens whose KV is in the table's blocks.
    pub(super) n_computed: usize,
    pub(super) table: BlockTable,
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
    pub(super) deferred_since: Option<Nanos>,
    has_prompt_logprobs: bool,
    stop_token_ids: Vec<TokenId>,
    /// Tokens of prompt and output after which the sequence ends.
    max_len: usize,
}

impl Sequence {
    pub(super) fn new(state: &PortableState, kind: SequenceKind, config: &BatchConfig) -> Sequence {
        let sampling = &state.request.sampling;
        let n_prompt = state.request.prompt_ids.len();
        let output = &state.choices[0].output;
        Sequence {
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
            keys: Vec::new(),
            n_hit_blocks: 0,
            n_registered: 0,
            claims: Vec::new(),
            numerics: Numerics::Same,
            salt: state.request.cache_salt,
            deferred_since: None,
            // They were reported before the first token.
            has_prompt_logprobs: sampling.prompt_logprobs.is_some() && output.is_empty(),
            stop_token_ids: sampling.stop_token_ids.clone(),
            max_len: n_prompt
                .saturating_add(sampling.max_tokens as usize)
                .min(config.max_model_len),
        }
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

    /// Whether the token appended last ends the sequence.
    pub(super) fn finish(&self) -> Option<Finish> {
        let last = *self.tokens.last().expect("a prompt has at least one token");
        if self.stop_token_ids.contains(&last) {
            return Some(Finish::Stop(last));
        }
        (self.tokens.len() >= self.max_len).then_some(Finish::Length)
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
