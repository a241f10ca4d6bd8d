//! How sequences get their first blocks: admission from the line, prefix hits, and waiting for a prefix that another
//! sequence is about to bring.

use std::ops::Bound;

use super::{Batch, BatchScheduler, PrefixCaching, SequenceKind, Started};
use crate::block_pool::IsPinned;
use crate::ids::{BlockId, Nanos, SequenceId};
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
        self.left_out = None;
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

    /// A block for each running sequence to grow into, or else what is admitted now is preempted at once.
    pub(super) fn n_headroom(&self) -> usize {
        self.running.len() + self.paused.len()
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

    /// Gives a sequence all blocks of its context, from the prefix cache as far as it goes, and claims what it will
    /// add to it. Takes nothing unless all of it is there.
    pub(super) fn try_allocate(&mut self, id: SequenceId, now: Nanos, is_pinned: IsPinned<'_>) -> Attempt {
        let n_unseen = self.n_unseen_of(id);
        let hits = match self.find_hits(id, n_unseen, now) {
            Some(hits) => hits,
            None => return Attempt::Deferred,
        };
        let n_hit = hits.len().max(n_unseen);
        let n_running = self.n_headroom();
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        sequence.table.skip(n_unseen);
        for &hit in hits.iter().skip(n_unseen) {
            sequence.table.push(self.pool.hold(hit));
        }
        let n_context = self.config.blocks_for(sequence.tokens.len());
        let n_others = sequence.n_choices as usize - 1;
        let (n_total, n_spare, n_headroom) = match sequence.kind {
            // The other choices need a block each in a moment; alone, a request begins even if they will not have one.
            SequenceKind::Local if n_running > 0 => (n_context, 0, n_running + n_others),
            SequenceKind::Local | SequenceKind::PrefillForHandoff => (n_context, 0, n_running),
            SequenceKind::Received | SequenceKind::Moved => {
                let n_total = n_context.max(self.config.blocks_for(sequence.max_kv_tokens()).min(n_context + 1));
                let n_spare = match sequence.max_kv_tokens() > sequence.tokens.len() {
                    true => n_others.min(self.config.n_blocks - n_total),
                    false => 0,
                };
                (n_total, n_spare, n_running)
            }
        };
        if self.pool.n_available() >= n_total - n_hit + n_spare + n_headroom {
            while sequence.table.len() < n_total {
                let Some(block) = self.cache.allocate(&mut self.pool, is_pinned) else {
                    break;
                };
                if sequence.kind == SequenceKind::Received {
                    self.pool.reserve(&block);
                }
                sequence.table.push(block);
            }
            while sequence.spare.len() < n_spare {
                let Some(block) = self.cache.allocate(&mut self.pool, is_pinned) else {
                    break;
                };
                self.pool.reserve(&block);
                sequence.spare.push(block);
            }
        }
        if sequence.table.len() < n_total || sequence.spare.len() < n_spare {
            sequence.release_blocks(&mut self.pool, is_pinned);
            return Attempt::NoBlocks;
        }
        sequence.deferred_since = None;
        sequence.n_hit_blocks = n_hit;
        sequence.n_registered = n_hit;
        sequence.n_computed = n_hit * self.config.block_size;
        if sequence.takes_hits(&self.config) {
            self.counters.n_prefix_query_tokens += sequence.tokens.len() as u64;
            self.counters.n_prefix_hit_tokens += (hits.len() * self.config.block_size) as u64;
        }
        let arrival = match sequence.kind {
            SequenceKind::Local | SequenceKind::PrefillForHandoff => Arrival::Computed,
            SequenceKind::Received | SequenceKind::Moved => Arrival::Received,
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

    /// Leading blocks that no query here will see: those of a context that is computed elsewhere.
    fn n_unseen_of(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        match sequence.kind {
            SequenceKind::Local | SequenceKind::PrefillForHandoff => 0,
            SequenceKind::Received | SequenceKind::Moved => self.config.n_unseen_blocks(sequence.tokens.len(), 0),
        }
    }

    /// The cached blocks of the sequence's beginning. `None` while another sequence is about to bring the block after them.
    fn find_hits(&mut self, id: SequenceId, n_unseen: usize, now: Nanos) -> Option<Vec<BlockId>> {
        let sequence = self.sequences.get_mut(&id).expect("a sequence in line exists");
        if self.config.prefix_caching == PrefixCaching::Off {
            return Some(Vec::new());
        }
        self.hasher.extend(sequence.salt, &sequence.tokens, &mut sequence.keys);
        if !sequence.takes_hits(&self.config) {
            return Some(Vec::new());
        }
        // The last token must be computed here to sample the next one, unless that is done elsewhere.
        let n_usable = match sequence.kind {
            SequenceKind::Local | SequenceKind::PrefillForHandoff => {
                (sequence.tokens.len() - 1) / self.config.block_size
            }
            SequenceKind::Received | SequenceKind::Moved => sequence.tokens.len() / self.config.block_size,
        };
        let keys = &sequence.keys[..n_usable];
        let hits = self.cache.lookup(keys, &sequence.tokens, self.config.block_size);
        // Whoever sees nothing of a missing block has no use for those after it from the cache.
        let next = keys.get(hits.len()).filter(|_| hits.len() >= n_unseen);
        let arriving = next.and_then(|&key| self.cache.arriving(key));
        let waits_for = match sequence.kind {
            SequenceKind::Local | SequenceKind::Received | SequenceKind::Moved => arriving,
            // Were a prefill to wait for KV from another instance, two instances could wait for each other.
            SequenceKind::PrefillForHandoff => arriving.filter(|&arrival| arrival == Arrival::Computed),
        };
        if waits_for.is_some() {
            if sequence.deferred_since.is_none() {
                self.counters.n_deferrals += 1;
            }
            let since = *sequence.deferred_since.get_or_insert(now);
            if now.saturating_sub(since) < self.config.max_defer {
                return None;
            }
        }
        Some(hits)
    }
}
