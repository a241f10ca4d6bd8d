//! What is known of sequences, blocks and load. Changes nothing but what was read of the prefix cache.

use super::{BatchCounters, BatchLoad, BatchScheduler, Phase, SequenceKind};
use crate::block_events::BlockEvent;
use crate::block_pool::Ledger;
use crate::ids::{BlockId, Generation, SequenceId, TokenId};
use crate::prefix_cache::PrefixEvent;

/// Blocks of a sequence that contain KV of one layer group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ComputedBlocks {
    /// Position of the first that is here: those before it were given up.
    pub first: usize,
    /// From there on, in order, with their generations.
    pub blocks: Vec<(BlockId, Generation)>,
}

impl ComputedBlocks {
    /// Position behind the last.
    pub fn end(&self) -> usize {
        self.first + self.blocks.len()
    }

    /// Those of a range, as far as there are any; `None` where some of it was given up.
    pub fn get(&self, range: std::ops::Range<usize>) -> Option<&[(BlockId, Generation)]> {
        let start = range.start.checked_sub(self.first)?;
        let end = range.end.max(range.start).min(self.end().max(range.start));
        Some(self.blocks.get(start..end - self.first).unwrap_or_default())
    }
}

impl BatchScheduler {
    /// Whether the sequence exists, and where it stands.
    pub fn phase(&self, id: SequenceId) -> Option<Phase> {
        self.sequences.contains_key(&id).then(|| {
            if self.running.contains(&id) {
                Phase::Running
            } else if self.paused.contains(&id) {
                Phase::Paused
            } else if self.reserved.contains(&id) {
                Phase::Reserved
            } else if self.handing_over.contains(&id) {
                Phase::HandingOver
            } else {
                Phase::Waiting
            }
        })
    }

    /// Prompt and generated tokens, in order.
    pub fn tokens(&self, id: SequenceId) -> &[TokenId] {
        &self.sequences[&id].tokens
    }

    /// Whether every row of the sequence's prompt is wanted for log-probabilities, now that none has been reported.
    pub fn wants_prompt_logits(&self, id: SequenceId) -> bool {
        self.sequences[&id].wants_prompt_logits()
    }

    /// Whether the hidden state of every row of the sequence is wanted, and no token.
    pub fn is_embedded(&self, id: SequenceId) -> bool {
        self.sequences[&id].kind == SequenceKind::Embedded
    }

    /// The ids of the sequence's blocks, in order, one table for each layer group;
    /// [`RELEASED_BLOCK`](super::RELEASED_BLOCK) for those that no query sees any more.
    pub fn block_tables(&self, id: SequenceId) -> &[Vec<u32>] {
        self.sequences[&id].tables.ids()
    }

    /// Which of the model's rotary tables turns the sequence.
    pub fn rope_variant(&self, id: SequenceId) -> usize {
        self.sequences[&id].rope_variant
    }

    /// Tokens of the sequence's prompt.
    pub fn n_prompt(&self, id: SequenceId) -> usize {
        self.sequences[&id].n_prompt
    }

    /// Leading tokens whose KV is complete, in every layer between two steps.
    pub fn n_computed(&self, id: SequenceId) -> usize {
        self.sequences[&id].n_computed
    }

    /// The sequence's blocks of a layer group that contain KV, in order, with their generations.
    pub fn computed_blocks(&self, id: SequenceId, layer_group: usize) -> ComputedBlocks {
        let sequence = &self.sequences[&id];
        let first = sequence.tables.n_released(layer_group);
        let end = self.config.blocks_for(sequence.n_computed).max(first);
        let blocks = sequence.tables.range(layer_group, first..end).iter();
        ComputedBlocks {
            first,
            blocks: blocks.map(|block| (block.id(), block.generation())).collect(),
        }
    }

    /// Whether no sequence is here.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Whether some sequence is in line or running, so that steps are due.
    pub fn has_work(&self) -> bool {
        !(self.running.is_empty() && self.waiting.is_empty() && self.preempted.is_empty())
    }

    /// How much is where.
    pub fn load(&self) -> BatchLoad {
        let in_line = self.running.iter().chain(&self.waiting).chain(&self.preempted);
        let n_left = |id| self.sequences[id].n_left();
        BatchLoad {
            n_running: self.n_choices(&self.running) + self.paused.len(),
            n_paused: self.paused.len(),
            n_waiting: self.n_choices(&self.waiting) + self.n_choices(&self.preempted),
            n_reserved: self.n_choices(&self.reserved) + self.n_choices(&self.deferred_reservations),
            n_handing_over: self.handing_over.len(),
            n_pending_prefill_tokens: in_line.map(n_left).filter(|&n| n > 1).sum(),
            ledger: self.pool.ledger(),
        }
    }

    /// Where every block is.
    pub fn ledger(&self) -> Ledger {
        self.pool.ledger()
    }

    /// What has been counted.
    pub fn counters(&self) -> BatchCounters {
        self.counters
    }

    /// The prefix cache's changes since the last call.
    pub fn take_prefix_events(&mut self) -> Vec<PrefixEvent> {
        self.cache.take_events()
    }

    /// Keeps changes of cached blocks with their tokens from now on; answers what is cached, as events.
    pub fn watch_blocks(&mut self) -> Vec<BlockEvent> {
        self.cache.watch_blocks()
    }

    /// Those changes since the last call.
    pub fn take_block_events(&mut self) -> Vec<BlockEvent> {
        self.cache.take_block_events()
    }

    /// Keeps them no more.
    pub fn unwatch_blocks(&mut self) {
        self.cache.unwatch_blocks();
    }

    /// The prefix cache's whole contents, as events.
    pub fn prefix_snapshot(&self) -> Vec<PrefixEvent> {
        self.cache.snapshot()
    }
}
