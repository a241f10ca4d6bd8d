//! Batches that are being computed: which blocks they use until then, and the batch after them, which is made as if they had
//! come to their end. What they sample is not known here before the commit.

use std::collections::BTreeSet;

use super::{Batch, BatchItem, BatchScheduler, Samples};
use crate::block_pool::{BlockPool, HeldBlock, IsPinned};
use crate::ids::{BlockId, Nanos, SequenceId};

/// Whether a sequence that finds no block may take those of a younger one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preemption {
    OfTheYoungest,
    /// It may not: a batch in flight computes them.
    Never,
}

/// A batch that was made, and is neither committed nor abandoned.
#[derive(Debug)]
pub(super) struct Flight {
    items: Vec<BatchItem>,
    /// Of its items, the sequences that are still to be committed, as far as they are here then.
    due: BTreeSet<SequenceId>,
    /// Blocks that it writes, and others that must not be anybody else's before it lands.
    blocks: Vec<BlockId>,
}

impl Flight {
    /// Keeps a block for as long as the batch is in flight.
    pub(super) fn uses(&mut self, pool: &mut BlockPool, block: &HeldBlock) {
        pool.launch(block);
        self.blocks.push(block.id());
    }
}

impl BatchScheduler {
    /// Chooses the work of the step after the one in flight, as if that one had come to its end: every sequence that samples
    /// in it and of which `goes_on` holds has one more token, whose id is not known yet. The others wait for their
    /// token. Nobody is preempted for it: when a sequence finds no block, the batch has no items.
    ///
    /// What ends a sequence in the step in flight is known when that is committed. Its item of the newer batch is then
    /// skipped at that one's commit.
    ///
    /// # Panics
    /// If two batches are in flight.
    pub fn schedule_ahead(
        &mut self,
        now: Nanos,
        goes_on: &dyn Fn(SequenceId) -> bool,
        is_pinned: IsPinned<'_>,
    ) -> Batch {
        assert!(self.flights.len() <= 1, "a batch is made two ahead");
        let sampling = self.flights.iter().flat_map(|flight| {
            let samples_one = |item: &&BatchItem| item.samples == Samples::Token;
            let items = flight.items.iter().filter(samples_one);
            items
                .map(|item| item.sequence)
                .filter(|id| flight.due.contains(id) && goes_on(*id))
        });
        let sampling: Vec<SequenceId> = sampling.collect();
        for id in &sampling {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.n_assumed = usize::from(sequence.outlives_its_next_token());
            }
        }
        let mut batch = self.make_batch(now, Preemption::Never, is_pinned);
        if self.flights.is_empty() || !batch.items.is_empty() {
            self.give_up_when_stalled(now, is_pinned, &mut batch);
        }
        for id in &sampling {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.n_assumed = 0;
            }
        }
        self.launch(&batch);
        batch
    }

    /// Gives an item of the oldest batch in flight up, and that of the batch made ahead of it: the sequence computes those
    /// tokens again.
    pub fn take_back(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.n_in_flight = 0;
        }
        for flight in &mut self.flights {
            flight.due.remove(&id);
        }
    }

    /// A batch that could not be computed is in flight no more. Its sequences stay where they were.
    pub fn abandon(&mut self, batch: &Batch) {
        let was_oldest = self.flights.front().is_some_and(|flight| flight.items == batch.items);
        for id in self.land(batch) {
            if was_oldest {
                // What was made ahead of it cannot be right.
                self.take_back(id);
            }
        }
    }

    /// Whether an item of the oldest batch in flight will be committed: its sequence is here, and it was not taken back.
    pub fn is_due(&self, id: SequenceId) -> bool {
        let flight = self.flights.front();
        self.sequences.contains_key(&id) && flight.is_some_and(|flight| flight.due.contains(&id))
    }

    /// A batch with items is computed from now on.
    pub(super) fn launch(&mut self, batch: &Batch) {
        if batch.items.is_empty() {
            return;
        }
        let block_size = self.config.block_size;
        let mut flight = Flight {
            items: batch.items.clone(),
            due: batch.items.iter().map(|item| item.sequence).collect(),
            blocks: Vec::with_capacity(batch.items.len()),
        };
        for item in &batch.items {
            let sequence = self
                .sequences
                .get_mut(&item.sequence)
                .expect("a scheduled sequence exists");
            sequence.n_in_flight += item.n_tokens;
            let written = item.start_pos / block_size..(item.start_pos + item.n_tokens).div_ceil(block_size);
            for layer_group in 0..self.config.n_groups() {
                for block in sequence.tables.range(layer_group, written.clone()) {
                    flight.uses(&mut self.pool, block);
                }
            }
        }
        self.flights.push_back(flight);
    }

    /// Takes a batch out of flight; of its sequences, those that are here and due.
    pub(super) fn land(&mut self, batch: &Batch) -> BTreeSet<SequenceId> {
        if batch.items.is_empty() {
            return BTreeSet::new();
        }
        let flight_idx = self.flights.iter().position(|flight| flight.items == batch.items);
        let flight = flight_idx.and_then(|idx| self.flights.remove(idx));
        let mut flight = flight.expect("a batch lands once, after it was made");
        for block in flight.blocks.drain(..) {
            self.pool.land(block);
        }
        flight.due.retain(|id| self.sequences.contains_key(id));
        for item in flight.items.iter().filter(|item| flight.due.contains(&item.sequence)) {
            let sequence = self.sequences.get_mut(&item.sequence).expect("what is due is here");
            sequence.n_in_flight -= item.n_tokens;
        }
        flight.due
    }
}
