//! What one step computes: continuous batching with chunked prefill, preemption, prefix hits, several choices of one
//! request, and reservations for sequences from elsewhere.
//! Decides only; it computes no tokens, moves no bytes and knows no peer.

mod admission;
mod block_table;
mod composition;
mod config;
mod counters;
mod flight;
mod group;
mod moving;
mod queries;
mod reservation;
mod sequence;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::block_pool::{BlockPool, IsPinned};
use crate::ids::{BlockId, Generation, Nanos, SequenceId, TokenId};
use crate::prefix_cache::{Offered, PrefixCache, PrefixHasher, Registered};
use crate::request::{Failure, PortableState};

pub use block_table::RELEASED_BLOCK;
pub use config::{BatchConfig, BatchConfigError, PrefixCaching, SlidingWindow};
pub use counters::{BatchCounters, BatchLoad};
pub use group::{BlockCopy, Committed, Continued, GroupId, Member};
pub use moving::{MoveRoom, Resumed};
pub use queries::ComputedBlocks;
pub use reservation::{Grant, LayerGroupGrant, Numerics, ReserveOutcome};
pub use sequence::{Phase, SequenceKind};

use flight::{Flight, Preemption};
use sequence::Sequence;

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchItem {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first token to compute.
    pub start_pos: usize,
    /// Tokens to compute, at least 1.
    pub n_tokens: usize,
    /// What is sampled from the last of them.
    pub samples: Samples,
}

/// Whether a step ends with new tokens for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Samples {
    /// The last row gives the next token.
    Token,
    /// The last row gives the first tokens of this many choices, which begin with the sequence's own.
    FirstTokens(u32),
    /// More of the context is left to compute.
    Nothing,
}

impl Samples {
    /// Tokens sampled.
    pub fn n_tokens(self) -> u32 {
        match self {
            Samples::Token => 1,
            Samples::FirstTokens(n_choices) => n_choices,
            Samples::Nothing => 0,
        }
    }
}

/// A sequence that entered the running set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// The sequence.
    pub sequence: SequenceId,
    /// Leading tokens whose KV the prefix cache had.
    pub n_hit_tokens: usize,
}

/// One step's work and what changed while it was chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// What to compute; at most one item for a sequence.
    pub items: Vec<BatchItem>,
    /// Sequences that lost their blocks and will recompute.
    pub preempted: Vec<SequenceId>,
    /// Sequences that began, or began again after a preemption.
    pub started: Vec<Started>,
    /// Deferred reservations that now have their blocks.
    pub granted: Vec<GroupId>,
    /// Requests given up, already removed.
    pub refused: Vec<(GroupId, Failure)>,
}

/// The scheduler of one instance.
#[derive(Debug)]
pub struct BatchScheduler {
    config: BatchConfig,
    hasher: PrefixHasher,
    pool: BlockPool,
    cache: PrefixCache,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Every id is in exactly one of these sets; ids grow with age, so the first of a set is its oldest.
    running: BTreeSet<SequenceId>,
    paused: BTreeSet<SequenceId>,
    waiting: BTreeSet<SequenceId>,
    preempted: BTreeSet<SequenceId>,
    deferred_reservations: BTreeSet<SequenceId>,
    reserved: BTreeSet<SequenceId>,
    handing_over: BTreeSet<SequenceId>,
    /// Batches made and not committed, the oldest first; two at most.
    flights: VecDeque<Flight>,
    next_id: u64,
    /// The first in line, when the last batch had no blocks or no place for it.
    left_out: Option<SequenceId>,
    stalled_since: Option<Nanos>,
    counters: BatchCounters,
}

impl BatchScheduler {
    /// A scheduler with all blocks free.
    pub fn new(config: BatchConfig) -> Result<BatchScheduler, BatchConfigError> {
        config.validate()?;
        Ok(BatchScheduler {
            hasher: PrefixHasher::new(config.fingerprint, config.block_size),
            pool: BlockPool::new(config.n_blocks),
            cache: PrefixCache::new(config.max_prefix_events, config.n_groups()),
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            paused: BTreeSet::new(),
            waiting: BTreeSet::new(),
            preempted: BTreeSet::new(),
            deferred_reservations: BTreeSet::new(),
            reserved: BTreeSet::new(),
            handing_over: BTreeSet::new(),
            flights: VecDeque::new(),
            next_id: 0,
            left_out: None,
            stalled_since: None,
            counters: BatchCounters::default(),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &BatchConfig {
        &self.config
    }

    /// Puts the choices of a request that go on in line to be computed here: one sequence for all of them when none has
    /// begun, else one for each. There are none when all have ended.
    ///
    /// # Errors
    /// `Invalid` when it can never run, `Busy` when the line is full.
    pub fn submit(&mut self, state: &PortableState, kind: SequenceKind) -> Result<GroupId, Failure> {
        match kind {
            SequenceKind::Embedded => self.config.check_embedded(&state.request)?,
            SequenceKind::PrefillForHandoff => {
                self.config.check(state)?;
                self.config.check_handoff(state)?;
            }
            SequenceKind::Local | SequenceKind::Received | SequenceKind::Moved => self.config.check(state)?,
        }
        if self.waiting.len() >= self.config.max_waiting {
            return Err(Failure::Busy(format!("{} sequences are waiting", self.waiting.len())));
        }
        let group = self.insert(state, kind);
        let members = self.members(group);
        self.waiting.extend(members);
        Ok(group)
    }

    /// Chooses the next step's work, when no batch is in flight. `is_pinned` says which blocks a transfer still uses. The
    /// batch is in flight until it is committed or abandoned, unless it has no items.
    pub fn schedule(&mut self, now: Nanos, is_pinned: IsPinned<'_>) -> Batch {
        assert!(
            self.flights.is_empty(),
            "a batch is made ahead of one that is in flight"
        );
        let mut batch = self.make_batch(now, Preemption::OfTheYoungest, is_pinned);
        self.give_up_when_stalled(now, is_pinned, &mut batch);
        self.launch(&batch);
        batch
    }

    fn make_batch(&mut self, now: Nanos, preemption: Preemption, is_pinned: IsPinned<'_>) -> Batch {
        self.pool.sweep(is_pinned);
        let mut batch = Batch::default();
        self.retry_reservations(now, is_pinned, &mut batch);
        let mut budget = self.config.max_batch_tokens;
        let mut n_logit_rows = self.config.max_prompt_logprob_rows;
        if !self.schedule_decodes(&mut budget, preemption, is_pinned, &mut batch) {
            batch.items.clear();
            return batch;
        }
        self.left_out = None;
        if !self.schedule_chunks(&mut budget, &mut n_logit_rows, preemption, is_pinned, &mut batch) {
            batch.items.clear();
            return batch;
        }
        // Whoever began has a right to go on before others begin.
        if self.left_out.is_none() {
            self.admit_waiting(now, &mut budget, &mut n_logit_rows, is_pinned, &mut batch);
        }
        batch
    }

    /// Records a computed step, the oldest in flight. `sampled` has an entry for each item of the batch: as many tokens as it
    /// samples. Sequences removed since the batch was made, and items taken back ([`BatchScheduler::take_back`]), are skipped.
    pub fn commit(&mut self, batch: &Batch, sampled: &[Vec<TokenId>], is_pinned: IsPinned<'_>) -> Committed {
        assert_eq!(batch.items.len(), sampled.len(), "one entry for each item of the batch");
        let mut committed = Committed::default();
        let due = self.land(batch);
        for (item, tokens) in batch.items.iter().zip(sampled) {
            let Some(sequence) = self
                .sequences
                .get_mut(&item.sequence)
                .filter(|_| due.contains(&item.sequence))
            else {
                continue;
            };
            assert_eq!(
                sequence.n_computed, item.start_pos,
                "a step is committed once and in order"
            );
            sequence.n_computed += item.n_tokens;
            match item.samples {
                Samples::Token if item.n_tokens == 1 => self.counters.n_decode_tokens += 1,
                _ => self.counters.n_prefill_tokens += item.n_tokens as u64,
            }
            self.register_full_blocks(item.sequence, is_pinned);
            self.release_unseen(item.sequence, is_pinned);
            assert_eq!(
                tokens.len(),
                item.samples.n_tokens() as usize,
                "{:?} was committed with {tokens:?}",
                item.samples
            );
            if !tokens.is_empty() {
                self.append(item.sequence, tokens, is_pinned, &mut committed);
            } else if self.is_embedded(item.sequence) && self.sequences[&item.sequence].n_left() == 0 {
                committed.embedded.push(self.sequences[&item.sequence].group);
                self.remove(item.sequence, is_pinned);
            }
        }
        committed
    }

    /// The blocks given out since the last call, with their generations: whoever reads memory by itself must learn of them
    /// before they are written.
    pub fn take_allocated(&mut self) -> Vec<(BlockId, Generation)> {
        self.pool.take_allocated()
    }

    /// Removes a sequence in any phase and frees its blocks; pinned ones go to quarantine. Unknown ids are ignored.
    pub fn remove(&mut self, id: SequenceId, is_pinned: IsPinned<'_>) {
        if !self.sequences.contains_key(&id) {
            return;
        }
        self.abandon_claims(id);
        let mut sequence = self.sequences.remove(&id).expect("checked above");
        sequence.release_blocks(&mut self.pool, is_pinned);
        for set in [
            &mut self.running,
            &mut self.paused,
            &mut self.waiting,
            &mut self.preempted,
            &mut self.deferred_reservations,
            &mut self.reserved,
            &mut self.handing_over,
        ] {
            set.remove(&id);
        }
    }

    /// Compares every counter with what it counts, and, when no sequence is here, asserts that nothing is held.
    ///
    /// # Panics
    /// If something was lost.
    pub fn check(&self) {
        self.pool.check();
        let n_in_sets = self.running.len()
            + self.paused.len()
            + self.waiting.len()
            + self.preempted.len()
            + self.deferred_reservations.len()
            + self.reserved.len()
            + self.handing_over.len();
        assert_eq!(n_in_sets, self.sequences.len(), "every sequence is in one set");
        if self.sequences.is_empty() {
            let ledger = self.pool.ledger();
            assert_eq!((ledger.held, ledger.reserved), (0, 0), "blocks were lost: {ledger:?}");
            assert_eq!(self.cache.n_in_flight(), 0, "a prefix is claimed by nobody");
        }
    }

    /// Offers the blocks that have become full to the prefix cache. A block whose contents the cache already has is
    /// replaced by the cache's, so that one copy is kept.
    fn register_full_blocks(&mut self, id: SequenceId, is_pinned: IsPinned<'_>) {
        let sequence = self.sequences.get_mut(&id).expect("a computing sequence exists");
        if self.config.prefix_caching == PrefixCaching::Off || sequence.numerics == Numerics::Other {
            return;
        }
        self.hasher.extend(sequence.salt, &sequence.tokens, &mut sequence.keys);
        let block_size = self.config.block_size;
        for block_idx in sequence.n_registered..sequence.n_computed / block_size {
            let tokens = &sequence.tokens[block_idx * block_size..(block_idx + 1) * block_size];
            let key = sequence.keys[block_idx];
            let offered = Offered {
                key,
                parent: block_idx.checked_sub(1).map(|idx| sequence.keys[idx]),
                block_idx,
                salt: sequence.salt,
                tokens,
            };
            for layer_group in 0..self.config.n_groups() {
                // What came from elsewhere came without the blocks that nobody sees here.
                if block_idx < sequence.tables.n_released(layer_group) {
                    continue;
                }
                let block = sequence.tables.get(layer_group, block_idx);
                let block = block.expect("a block is offered before it is given up");
                match self.cache.register(&mut self.pool, offered, layer_group, block) {
                    Registered::New | Registered::Collision => {}
                    Registered::Duplicate(other) => {
                        let other = self.pool.hold(other);
                        let own = sequence.tables.replace(layer_group, block_idx, other);
                        if let Some(ahead) = self.flights.back_mut().filter(|_| sequence.n_in_flight > 0) {
                            // It was launched with the block in its table.
                            ahead.uses(&mut self.pool, &own);
                        }
                        self.pool.release(own, is_pinned);
                    }
                }
            }
            self.cache.disclaim(key, id);
            sequence.n_registered = block_idx + 1;
        }
    }

    /// Gives up the leading blocks that no choice of the group sees any more: they move as one, and share the prompt's. Those
    /// that wait have no blocks, and will compute what they need.
    fn release_unseen(&mut self, id: SequenceId, is_pinned: IsPinned<'_>) {
        if self.config.windows.iter().all(Option::is_none) {
            return;
        }
        let sequence = &self.sequences[&id];
        if sequence.keeps_unseen {
            return;
        }
        let members = self.members(sequence.group);
        let is_here = |id: &SequenceId| self.running.contains(id) || self.paused.contains(id);
        let least = members.iter().filter(|id| is_here(id));
        let least = least.map(|id| self.sequences[id].n_computed).min().unwrap_or(0);
        let tables = &mut self.sequences.get_mut(&id).expect("a computing sequence exists").tables;
        for layer_group in 0..self.config.n_groups() {
            let n_released = self.config.n_released_blocks(layer_group, least);
            tables.release_head(layer_group, n_released, &mut self.pool, is_pinned);
        }
    }

    fn abandon_claims(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a claiming sequence exists");
        for key in std::mem::take(&mut sequence.claims) {
            self.cache.disclaim(key, id);
        }
    }

    /// Choices that the sequences stand for.
    fn n_choices(&self, ids: &BTreeSet<SequenceId>) -> usize {
        ids.iter().map(|id| self.sequences[id].n_choices as usize).sum()
    }
}
