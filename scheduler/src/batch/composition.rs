//! Who is in a step: decodes first, then chunks of prompts, within the step's tokens; and who gives way where blocks are short.

use super::flight::Preemption;
use super::{Batch, BatchItem, BatchScheduler, Samples};
use crate::block_pool::IsPinned;
use crate::ids::SequenceId;

impl BatchScheduler {
    /// Every running sequence with one token left gets it: all of them fit, because a batch has room for
    /// `max_num_seqs` tokens. False when one of them finds no block and may not take another's.
    pub(super) fn schedule_decodes(
        &mut self,
        budget: &mut usize,
        preemption: Preemption,
        is_pinned: IsPinned<'_>,
        batch: &mut Batch,
    ) -> bool {
        for id in Vec::from_iter(self.running.iter().copied()) {
            let Some(sequence) = self.sequences.get(&id).filter(|_| self.running.contains(&id)) else {
                continue;
            };
            if sequence.n_to_launch() != 1 {
                continue;
            }
            match preemption {
                Preemption::OfTheYoungest if !self.grow(id, is_pinned, batch) => continue,
                Preemption::Never if !self.extend_tables(id, self.sequences[&id].n_tokens(), is_pinned) => {
                    return false;
                }
                Preemption::OfTheYoungest | Preemption::Never => {}
            }
            let start_pos = self.sequences[&id].n_launched();
            batch.items.push(BatchItem {
                sequence: id,
                start_pos,
                n_tokens: 1,
                samples: self.sequences[&id].samples(),
            });
            *budget -= 1;
        }
        true
    }

    /// Makes the tables cover all tokens, preempting the youngest as long as no block is left. False when `id` itself was
    /// preempted.
    pub(super) fn grow(&mut self, id: SequenceId, is_pinned: IsPinned<'_>, batch: &mut Batch) -> bool {
        while !self.extend_tables(id, self.sequences[&id].n_tokens(), is_pinned) {
            // Ids grow with age and items are made in their order, so the victim has no item in this batch.
            let victim = *self.running.last().expect("the growing sequence runs");
            self.preempt(victim, is_pinned, batch);
            if victim == id {
                return false;
            }
        }
        true
    }

    /// Adds blocks until every table covers `n_tokens`. False when none was left; what was added stays.
    pub(super) fn extend_tables(&mut self, id: SequenceId, n_tokens: usize, is_pinned: IsPinned<'_>) -> bool {
        let n_blocks = self.config.blocks_for(n_tokens);
        let tables = &mut self.sequences.get_mut(&id).expect("a running sequence exists").tables;
        for layer_group in 0..self.config.n_groups() {
            while tables.len(layer_group) < n_blocks {
                let Some(block) = self.cache.allocate(&mut self.pool, is_pinned) else {
                    return false;
                };
                tables.push(layer_group, block);
            }
        }
        true
    }

    /// Chunks of the running sequences that have more than one token left, the oldest first. One whose windowed layers find no
    /// blocks takes those of younger ones that have no item yet; when there are none left, nobody else begins before it has them.
    /// False when it may not take them.
    pub(super) fn schedule_chunks(
        &mut self,
        budget: &mut usize,
        n_logit_rows: &mut usize,
        preemption: Preemption,
        is_pinned: IsPinned<'_>,
        batch: &mut Batch,
    ) -> bool {
        let has_more = |id: &&SequenceId| self.sequences[id].n_to_launch() > 1;
        let mut computing = Vec::from_iter(self.running.iter().filter(has_more).copied());
        computing.reverse();
        while let Some(id) = computing.pop() {
            let sequence = &self.sequences[&id];
            let end = sequence.n_launched() + sequence.n_to_launch().min(*budget);
            while !self.extend_tables(id, end, is_pinned) {
                if computing.is_empty() {
                    self.left_out.get_or_insert(id);
                    break;
                }
                match preemption {
                    Preemption::OfTheYoungest => self.preempt(computing.remove(0), is_pinned, batch),
                    Preemption::Never => return false,
                }
            }
            self.schedule_chunk(id, budget, n_logit_rows, batch);
        }
        true
    }

    pub(super) fn preempt(&mut self, id: SequenceId, is_pinned: IsPinned<'_>, batch: &mut Batch) {
        self.give_blocks_up(id, is_pinned);
        batch.preempted.push(id);
    }

    /// Back into line, with everything to compute.
    pub(super) fn give_blocks_up(&mut self, id: SequenceId, is_pinned: IsPinned<'_>) {
        self.abandon_claims(id);
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        sequence.release_blocks(&mut self.pool, is_pinned);
        sequence.forget_computed();
        sequence.keeps_unseen = false;
        self.running.remove(&id);
        self.preempted.insert(id);
        self.counters.n_preemptions += 1;
    }

    /// A chunk of a running sequence that has no item yet, as far as its tables and the budget allow.
    pub(super) fn schedule_chunk(
        &mut self,
        id: SequenceId,
        budget: &mut usize,
        n_logit_rows: &mut usize,
        batch: &mut Batch,
    ) {
        let sequence = &self.sequences[&id];
        let n_left = sequence.n_to_launch();
        let n_covered = sequence.tables.n_covered() * self.config.block_size;
        let n_room = n_covered - sequence.n_launched();
        let mut n_tokens = n_left.min(*budget).min(n_room);
        if sequence.wants_prompt_logits() {
            n_tokens = n_tokens.min(*n_logit_rows);
            *n_logit_rows -= n_tokens;
        }
        if n_tokens == 0 {
            return;
        }
        *budget -= n_tokens;
        let samples = if n_tokens == n_left {
            sequence.samples()
        } else {
            Samples::Nothing
        };
        batch.items.push(BatchItem {
            sequence: id,
            start_pos: sequence.n_launched(),
            n_tokens,
            samples,
        });
    }
}
