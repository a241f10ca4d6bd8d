//! Blocks reserved for sequences that another instance prefills, from the asking to the join.
//! How the KV comes here is the transfer's business.

use super::admission::Attempt;
use super::{Batch, BatchScheduler, SequenceKind};
use crate::block_pool::IsPinned;
use crate::ids::{BlockId, Generation, Nanos, SequenceId, TokenId};
use crate::request::{Failure, Finish, PortableState};

/// What a reservation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveOutcome {
    /// The blocks are there.
    Granted(SequenceId),
    /// Someone else is about to bring the same prefix; a later batch grants or refuses, within
    /// [`super::BatchConfig::max_defer`].
    Deferred(SequenceId),
}

/// What a granted reservation has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Blocks of the context.
    pub n_blocks_total: usize,
    /// Leading blocks that the prefix cache had; they need not be sent.
    pub n_blocks_held: usize,
    /// The blocks to be written, in order: those of the context after the held ones.
    pub blocks: Vec<(BlockId, Generation)>,
}

/// Whether received KV was computed with the same bits as ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// The same class: the blocks may serve other sequences.
    Same,
    /// Another class: they, and what is computed from them, stay with their sequence.
    Other,
}

impl BatchScheduler {
    /// Reserves blocks for a sequence computed elsewhere: those of its context that the prefix cache lacks, and one to
    /// grow into.
    ///
    /// # Errors
    /// `Invalid` when it can never run, `Busy` when there is no room now.
    pub fn reserve(
        &mut self,
        now: Nanos,
        state: &PortableState,
        is_pinned: IsPinned<'_>,
    ) -> Result<ReserveOutcome, Failure> {
        self.config.check(state)?;
        if self.n_places_taken() >= self.config.max_num_seqs {
            return Err(Failure::Busy(format!(
                "{} sequences run or are reserved",
                self.n_places_taken()
            )));
        }
        // Whoever was left out has waited longer; reservations that overtook it could starve it.
        if self.left_out.is_some_and(|id| self.sequences.contains_key(&id)) {
            return Err(Failure::Busy("sequences are waiting for room to run".to_owned()));
        }
        self.pool.sweep(is_pinned);
        let id = self.insert(state, SequenceKind::Received);
        match self.try_allocate(id, now, is_pinned) {
            Attempt::Granted => {
                self.reserved.insert(id);
                Ok(ReserveOutcome::Granted(id))
            }
            Attempt::Deferred if self.deferred_reservations.len() < self.config.max_deferred_reservations => {
                self.deferred_reservations.insert(id);
                Ok(ReserveOutcome::Deferred(id))
            }
            Attempt::Deferred => {
                self.remove(id, is_pinned);
                let n_deferred = self.deferred_reservations.len();
                Err(Failure::Busy(format!(
                    "{n_deferred} reservations are waiting for a prefix"
                )))
            }
            Attempt::NoBlocks => Err(self.refuse_reservation(id, is_pinned)),
        }
    }

    /// Grants or refuses the deferred reservations whose prefix has arrived, or who have waited long enough.
    pub(super) fn retry_reservations(&mut self, now: Nanos, is_pinned: IsPinned<'_>, batch: &mut Batch) {
        for id in Vec::from_iter(self.deferred_reservations.iter().copied()) {
            match self.try_allocate(id, now, is_pinned) {
                Attempt::Granted => {
                    self.deferred_reservations.remove(&id);
                    self.reserved.insert(id);
                    batch.granted.push(id);
                }
                Attempt::Deferred => {}
                Attempt::NoBlocks => {
                    let failure = self.refuse_reservation(id, is_pinned);
                    self.counters.n_refused += 1;
                    batch.refused.push((id, failure));
                }
            }
        }
    }

    /// What a granted reservation has.
    pub fn grant(&self, id: SequenceId) -> Grant {
        let sequence = &self.sequences[&id];
        let n_blocks_total = self.config.blocks_for(sequence.tokens.len());
        let n_blocks_held = sequence.n_hit_blocks;
        let to_write = &sequence.table.blocks()[n_blocks_held..n_blocks_total];
        Grant {
            n_blocks_total,
            n_blocks_held,
            blocks: to_write.iter().map(|block| (block.id(), block.generation())).collect(),
        }
    }

    /// A reservation's KV and first token have come: it runs from the next step on. Returns whether the first token
    /// already ends it (then it is gone).
    ///
    /// # Panics
    /// If the sequence is not a granted reservation.
    pub fn join(
        &mut self,
        id: SequenceId,
        first: TokenId,
        numerics: Numerics,
        is_pinned: IsPinned<'_>,
    ) -> Option<Finish> {
        assert!(
            self.reserved.remove(&id),
            "sequence {} is not a granted reservation",
            id.0
        );
        self.running.insert(id);
        let sequence = self.sequences.get_mut(&id).expect("a reserved sequence exists");
        sequence
            .table
            .blocks()
            .iter()
            .skip(sequence.n_hit_blocks)
            .for_each(|block| self.pool.receive(block));
        sequence.kind = SequenceKind::Local;
        sequence.n_computed = sequence.tokens.len();
        sequence.numerics = numerics;
        self.register_full_blocks(id, is_pinned);
        self.abandon_claims(id);
        self.append(id, first, is_pinned)
    }

    fn refuse_reservation(&mut self, id: SequenceId, is_pinned: IsPinned<'_>) -> Failure {
        let n_blocks = self.config.blocks_for(self.sequences[&id].tokens.len());
        self.remove(id, is_pinned);
        let n_available = self.pool.n_available();
        Failure::Busy(format!("{n_blocks} blocks are needed and {n_available} are free"))
    }
}
