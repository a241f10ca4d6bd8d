//! How sequences get their first blocks: admission from the line, prefix hits, and waiting for a prefix that another
//! sequence is about to bring.

use std::ops::Bound;

use super::{Batch, BatchScheduler, PrefixCaching, SequenceKind, Started};
use crate::block_pool::IsPinned;
use crate::ids::{Nanos, SequenceId};
use crate::prefix_cache::Arrival;
use crate::request::Failure;

/// A sequence's place in line.
#[derive(Clone, Copy)]
enum Place {
    Preempted(SequenceId),
    Waiting(SequenceId),
}

/// What trying to give a sequence its blocks came to.
pub(super) enum Attempt {
    Granted,
    Deferred,
    NoBlocks,
}

impl BatchScheduler {
    /// Lets sequences begin: preempted ones first, then in order of arrival. One without blocks holds up those behind
    /// it, so that none starves; one that waits for a prefix does not.
    pub(super) fn admit_waiting(
        &mut self,
        now: Nanos,
        budget: &mut usize,
        n_logit_rows: &mut usize,
        is_pinned: IsPinned<'_>,
        batch: &mut Batch,
    ) {
        let mut cursor = None;
        while let Some(place) = self.next_in_line(cursor) {
            cursor = Some(place);
            let (Place::Preempted(id) | Place::Waiting(id)) = place;
            if *budget == 0 {
                return;
            }
            let n_places = self.sequences[&id].n_choices as usize;
            if self.n_places_taken() + n_places > self.config.max_num_seqs {
                self.left_out = Some(id);
                return;
            }
            match self.try_allocate(id, now, is_pinned) {
                Attempt::Deferred => {}
                Attempt::NoBlocks => {
                    self.left_out = Some(id);
                    return;
                }
                Attempt::Granted => {
                    self.waiting.remove(&id);
                    self.preempted.remove(&id);
                    self.running.insert(id);
                    let n_hit_tokens = self.sequences[&id].n_computed;
                    batch.started.push(Started {
                        sequence: id,
                        n_hit_tokens,
                    });
                    self.schedule_chunk(id, budget, n_logit_rows, batch);
                }
            }
        }
    }

    /// When nothing can run because others hold blocks or places without computing (transfers that do not end), the
    /// first in line is refused after a while, so that it can be placed elsewhere.
    pub(super) fn give_up_when_stalled(&mut self, now: Nanos, is_pinned: IsPinned<'_>, batch: &mut Batch) {
        let Some(id) = self.left_out.filter(|_| batch.items.is_empty()) else {
            self.stalled_since = None;
            return;
        };
        let since = *self.stalled_since.get_or_insert(now);
        if now.saturating_sub(since) < self.config.max_stall {
            return;
        }
        self.stalled_since = None;
        let group = self.sequences[&id].group;
        self.remove_group(group, is_pinned);
        self.counters.n_refused += 1;
        batch
            .refused
            .push((group, Failure::Busy("no room to run became free in time".to_owned())));
    }

    /// Choices that run or may begin to at any time.
    pub(super) fn n_places_taken(&self) -> usize {
        self.n_choices(&self.running)
            + self.paused.len()
            + self.n_choices(&self.reserved)
            + self.n_choices(&self.deferred_reservations)
    }

    /// Blocks for each running sequence to grow into, or else what is admitted now is preempted at once.
    pub(super) fn n_headroom(&self) -> usize {
        (self.running.len() + self.paused.len()) * self.config.n_groups()
    }

    /// The line is first the preempted sequences, then those that have not begun, the oldest of each first.
    fn next_in_line(&self, after: Option<Place>) -> Option<Place> {
        let (preempted_bound, waiting_bound) = match after {
            None => (Some(Bound::Unbounded), Bound::Unbounded),
            Some(Place::Preempted(id)) => (Some(Bound::Excluded(id)), Bound::Unbounded),
            Some(Place::Waiting(id)) => (None, Bound::Excluded(id)),
        };
        preempted_bound
            .and_then(|bound| self.preempted.range((bound, Bound::Unbounded)).next())
            .map(|&id| Place::Preempted(id))
            .or_else(|| {
                self.waiting
                    .range((waiting_bound, Bound::Unbounded))
                    .next()
                    .map(|&id| Place::Waiting(id))
            })
    }

    /// Gives a sequence the blocks of its context, from the prefix cache as far as it goes, and claims what it will add to it. In
    /// a layer group with a window those are all that it holds at any time; the rest takes their places as they are given up.
    /// Takes nothing unless all of it is there.
    pub(super) fn try_allocate(&mut self, id: SequenceId, now: Nanos, is_pinned: IsPinned<'_>) -> Attempt {
        let Some(n_hit) = self.find_hits(id, now) else {
            return Attempt::Deferred;
        };
        let n_headroom = self.n_headroom();
        let n_groups = self.config.n_groups();
        let sequence = &self.sequences[&id];
        let firsts: Vec<usize> = (0..n_groups)
            .map(|layer_group| sequence.first_needed(&self.config, layer_group, n_hit))
            .collect();
        self.hold_hits(id, &firsts, n_hit);
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        let n_context = self.config.blocks_for(sequence.tokens.len());
        let n_others = sequence.n_choices as usize - 1;
        let is_received = sequence.is_received();
        let n_total = match is_received {
            true => n_context.max(self.config.blocks_for(sequence.max_kv_tokens()).min(n_context + 1)),
            false => n_context,
        };
        // Of each layer group, one past the last block that it gets now.
        let ends: Vec<usize> = (0..n_groups)
            .map(|layer_group| match self.config.most_blocks(layer_group) {
                Some(most) if !is_received => n_total.min(firsts[layer_group] + most),
                _ => n_total,
            })
            .collect();
        let n_missing: usize = sequence.n_missing(&ends);
        let (n_spare, n_headroom) = match sequence.kind {
            // The other choices need blocks of their own in a moment; alone, a request begins even if they will not have them.
            SequenceKind::Local if n_headroom > 0 => (0, n_headroom + n_others * n_groups),
            SequenceKind::Local | SequenceKind::PrefillForHandoff | SequenceKind::Embedded => (0, n_headroom),
            SequenceKind::Received | SequenceKind::Moved => {
                let n_all: usize = ends.iter().zip(&firsts).map(|(end, first)| end - first).sum();
                let n_forks = match sequence.max_kv_tokens() > sequence.tokens.len() {
                    true => n_others.min(self.config.n_blocks.saturating_sub(n_all) / n_groups),
                    false => 0,
                };
                (n_forks * n_groups, n_headroom)
            }
        };
        let has_room = self.pool.n_available() >= n_missing + n_spare + n_headroom;
        if !has_room || !self.fill_tables(id, &ends, n_spare, is_pinned) {
            let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
            sequence.release_blocks(&mut self.pool, is_pinned);
            return Attempt::NoBlocks;
        }
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        sequence.deferred_since = None;
        sequence.n_held_blocks = firsts.iter().map(|&first| first.max(n_hit)).collect();
        sequence.n_registered = n_hit;
        sequence.n_computed = n_hit * self.config.block_size;
        if sequence.takes_hits(&self.config) {
            // What no group here sees of a context that is computed elsewhere was not found, but not missed either.
            let n_unseen = if is_received {
                *firsts.iter().min().expect("a layer group")
            } else {
                0
            };
            self.counters.n_prefix_query_tokens += sequence.tokens.len() as u64;
            self.counters.n_prefix_hit_tokens += (n_hit.saturating_sub(n_unseen) * self.config.block_size) as u64;
        }
        let arrival = match is_received {
            false => Arrival::Computed,
            true => Arrival::Received,
        };
        if self.config.prefix_caching == PrefixCaching::On {
            let cache = &mut self.cache;
            sequence.claims = sequence
                .keys
                .iter()
                .skip(n_hit)
                .copied()
                .filter(|&key| cache.claim(key, id, arrival))
                .collect();
        }
        Attempt::Granted
    }

    /// Begins the tables of a sequence with the cached blocks before `n_hit`, of each layer group from the first it needs on.
    pub(super) fn hold_hits(&mut self, id: SequenceId, firsts: &[usize], n_hit: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        for (layer_group, &first) in firsts.iter().enumerate() {
            sequence.tables.skip(layer_group, first);
            for block_idx in first..n_hit {
                let hit = self.cache.block(sequence.keys[block_idx], layer_group);
                let held = self.pool.hold(hit.expect("a hit is cached"));
                sequence.tables.push(layer_group, held);
            }
        }
    }

    /// Adds blocks up to `ends`, one for each layer group, and spare ones; those of a sequence that is computed elsewhere wait
    /// for their contents. False when none is left; what was added stays.
    pub(super) fn fill_tables(
        &mut self,
        id: SequenceId,
        ends: &[usize],
        n_spare: usize,
        is_pinned: IsPinned<'_>,
    ) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        let is_received = sequence.is_received();
        let mut allocate = || {
            let block = self.cache.allocate(&mut self.pool, is_pinned)?;
            if is_received {
                self.pool.reserve(&block);
            }
            Some(block)
        };
        for (layer_group, &end) in ends.iter().enumerate() {
            while sequence.tables.len(layer_group) < end {
                let Some(block) = allocate() else { return false };
                sequence.tables.push(layer_group, block);
            }
        }
        while sequence.spare.len() < n_spare {
            let Some(block) = allocate() else { return false };
            sequence.spare.push(block);
        }
        true
    }

    /// How many of the sequence's first blocks the cache has. `None` while another sequence is about to bring the block after
    /// them.
    fn find_hits(&mut self, id: SequenceId, now: Nanos) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        if self.config.prefix_caching == PrefixCaching::Off {
            return Some(0);
        }
        self.hasher.extend(sequence.salt, &sequence.tokens, &mut sequence.keys);
        if !sequence.takes_hits(&self.config) {
            return Some(0);
        }
        let sequence = &self.sequences[&id];
        // The last token must be computed here to sample the next one, unless that is done elsewhere.
        let n_usable = match sequence.kind {
            SequenceKind::Local | SequenceKind::PrefillForHandoff | SequenceKind::Embedded => {
                (sequence.tokens.len() - 1) / self.config.block_size
            }
            SequenceKind::Received | SequenceKind::Moved => sequence.tokens.len() / self.config.block_size,
        };
        let keys = &sequence.keys[..n_usable];
        let first_needed = |layer_group, n| sequence.first_needed(&self.config, layer_group, n);
        let n_hit = self
            .cache
            .lookup(keys, &sequence.tokens, self.config.block_size, first_needed);
        let arriving = keys.get(n_hit).and_then(|&key| self.cache.arriving(key));
        let waits_for = match sequence.kind {
            SequenceKind::Local | SequenceKind::Received | SequenceKind::Moved | SequenceKind::Embedded => arriving,
            // Were a prefill to wait for KV from another instance, two instances could wait for each other.
            SequenceKind::PrefillForHandoff => arriving.filter(|&arrival| arrival == Arrival::Computed),
        };
        if waits_for.is_some() {
            let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
            if sequence.deferred_since.is_none() {
                self.counters.n_deferrals += 1;
            }
            let since = *sequence.deferred_since.get_or_insert(now);
            if now.saturating_sub(since) < self.config.max_defer {
                return None;
            }
        }
        Some(n_hit)
    }
}
