//! Blocks reserved for requests that another instance prefills, from the asking to the join.
//! How the KV comes here is the transfer's business.

use super::admission::Attempt;
use super::{Batch, BatchScheduler, Committed, GroupId, Sequence, SequenceKind};
use crate::block_pool::IsPinned;
use crate::ids::{BlockId, Generation, Nanos, SequenceId, TokenId};
use crate::request::{Failure, PortableState};

/// What a reservation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveOutcome {
    /// The blocks are there.
    Granted(GroupId),
    /// Someone else is about to bring the same prefix; a later batch grants or refuses, within
    /// [`super::BatchConfig::max_defer`].
    Deferred(GroupId),
}

/// What one context of a granted reservation has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Handoff: blocks of the context. Move: blocks there is room for, which the context may not outgrow.
    pub n_blocks_total: usize,
    /// What it has of each layer group.
    pub layer_groups: Vec<LayerGroupGrant>,
}

/// What one context of a granted reservation has in the layers of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerGroupGrant {
    /// Leading blocks that the prefix cache had, that another choice of the request receives, or that no query will see; they
    /// need not be sent.
    pub n_blocks_held: usize,
    /// The blocks to be written, in order: those after the held ones.
    pub blocks: Vec<(BlockId, Generation)>,
}

impl Grant {
    /// The blocks to be written, in all layer groups.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, Generation)> + '_ {
        self.layer_groups.iter().flat_map(|group| group.blocks.iter().copied())
    }
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
    /// Reserves blocks for a request computed elsewhere: those of its context that the prefix cache lacks, and one to
    /// grow into for each choice.
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
        self.config.check_handoff(state)?;
        self.check_places(state.choices.len())?;
        self.pool.sweep(is_pinned);
        let group = self.insert(state, SequenceKind::Received);
        let id = group.sequence(0);
        match self.try_allocate(id, now, is_pinned) {
            Attempt::Granted => {
                self.reserved.insert(id);
                Ok(ReserveOutcome::Granted(group))
            }
            Attempt::Deferred if self.deferred_reservations.len() < self.config.max_deferred_reservations => {
                self.deferred_reservations.insert(id);
                Ok(ReserveOutcome::Deferred(group))
            }
            Attempt::Deferred => {
                self.remove(id, is_pinned);
                let n_deferred = self.deferred_reservations.len();
                Err(Failure::Busy(format!(
                    "{n_deferred} reservations are waiting for a prefix"
                )))
            }
            Attempt::NoBlocks => Err(self.refuse_reservation(group, is_pinned)),
        }
    }

    /// Whether a reservation for `n_choices` may take places now.
    pub(super) fn check_places(&self, n_choices: usize) -> Result<(), Failure> {
        let n_taken = self.n_places_taken();
        if n_taken + n_choices > self.config.max_num_seqs {
            return Err(Failure::Busy(format!("{n_taken} sequences run or are reserved")));
        }
        // Whoever was left out has waited longer; reservations that overtook it could starve it.
        if self.left_out.is_some_and(|id| self.sequences.contains_key(&id)) {
            return Err(Failure::Busy("sequences are waiting for room to run".to_owned()));
        }
        Ok(())
    }

    /// Grants or refuses the deferred reservations whose prefix has arrived, or who have waited long enough.
    pub(super) fn retry_reservations(&mut self, now: Nanos, is_pinned: IsPinned<'_>, batch: &mut Batch) {
        for id in Vec::from_iter(self.deferred_reservations.iter().copied()) {
            match self.try_allocate(id, now, is_pinned) {
                Attempt::Granted => {
                    self.deferred_reservations.remove(&id);
                    self.reserved.insert(id);
                    batch.granted.push(self.sequences[&id].group);
                }
                Attempt::Deferred => {}
                Attempt::NoBlocks => {
                    let group = self.sequences[&id].group;
                    let failure = self.refuse_reservation(group, is_pinned);
                    self.counters.n_refused += 1;
                    batch.refused.push((group, failure));
                }
            }
        }
    }

    /// What the one context of a granted reservation for a handoff has.
    pub fn grant(&self, group: GroupId) -> Grant {
        let sequence = &self.sequences[&group.sequence(0)];
        self.grant_of(sequence, self.config.blocks_for(sequence.tokens.len()))
    }

    pub(super) fn grant_of(&self, sequence: &Sequence, n_blocks_total: usize) -> Grant {
        let of_group = |(layer_group, &n_blocks_held): (usize, &usize)| {
            let to_write = sequence.tables.range(layer_group, n_blocks_held..n_blocks_total);
            LayerGroupGrant {
                n_blocks_held,
                blocks: to_write.iter().map(|block| (block.id(), block.generation())).collect(),
            }
        };
        Grant {
            n_blocks_total,
            layer_groups: sequence.n_held_blocks.iter().enumerate().map(of_group).collect(),
        }
    }

    /// A reservation's KV and the first token of each choice have come: those that go on run from the next step on.
    ///
    /// # Panics
    /// If it is not a granted reservation for a handoff, or there is not one token for each choice.
    pub fn join(
        &mut self,
        group: GroupId,
        first: &[TokenId],
        numerics: Numerics,
        is_pinned: IsPinned<'_>,
    ) -> Committed {
        let id = group.sequence(0);
        self.receive(id);
        let sequence = self.sequences.get_mut(&id).expect("a reserved sequence exists");
        sequence.n_computed = sequence.tokens.len();
        sequence.numerics = numerics;
        self.register_full_blocks(id, is_pinned);
        self.abandon_claims(id);
        let mut committed = Committed::default();
        self.append(id, first, is_pinned, &mut committed);
        committed
    }

    /// A granted reservation becomes a running sequence.
    pub(super) fn receive(&mut self, id: SequenceId) {
        assert!(
            self.reserved.remove(&id),
            "sequence {} is not a granted reservation",
            id.0
        );
        self.running.insert(id);
        let sequence = self.sequences.get_mut(&id).expect("a reserved sequence exists");
        for (layer_group, n_held) in sequence.n_held_blocks.iter().enumerate() {
            let n_here = n_held - sequence.tables.n_released(layer_group);
            let received = &sequence.tables.blocks(layer_group)[n_here..];
            received.iter().for_each(|block| self.pool.receive(block));
        }
        sequence.spare.iter().for_each(|block| self.pool.receive(block));
        sequence.kind = SequenceKind::Local;
    }

    pub(super) fn refuse_reservation(&mut self, group: GroupId, is_pinned: IsPinned<'_>) -> Failure {
        let members = self.members(group);
        let n_tokens = members.iter().map(|id| self.sequences[id].tokens.len());
        let n_blocks: usize = n_tokens.map(|n_tokens| self.config.n_blocks_to_run(n_tokens)).sum();
        self.remove_group(group, is_pinned);
        let n_available = self.pool.n_available();
        Failure::Busy(format!("{n_blocks} blocks are needed and {n_available} are free"))
    }
}
