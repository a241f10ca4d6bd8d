//! Owns the ids of an instance's KV blocks: who holds which, and which may be given out next.
//! Knows no memory and no contents; what a block contains is the prefix cache's business.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{BlockId, Generation};

/// Whether memory outside the pool's sight still uses a block: a transfer reads it or writes it.
pub type IsPinned<'a> = &'a dyn Fn(BlockId) -> bool;

/// One reference to a block. Not cloneable: it moves from the pool to a holder and back by [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a held block must be released to its pool"]
pub struct HeldBlock {
    id: BlockId,
    generation: Generation,
}

impl HeldBlock {
    /// The block.
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// Which grant of the block this is; a write that names another is stale.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

/// Where every block is. The parts sum to `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Blocks of the pool.
    pub total: usize,
    /// Neither used nor worth keeping.
    pub free: usize,
    /// Kept for prefix hits, held by nobody; given out when the free ones run out.
    pub cached: usize,
    /// Held by at least one sequence.
    pub held: usize,
    /// Given back while a transfer, or a batch in flight, still read or wrote them.
    pub quarantined: usize,
    /// Held by a reservation whose KV has not arrived.
    pub reserved: usize,
}

impl Ledger {
    /// Whether the parts sum to the total.
    pub fn is_balanced(&self) -> bool {
        self.free + self.cached + self.held + self.quarantined + self.reserved == self.total
    }

    /// Whether nobody holds anything: what an idle instance must show.
    pub fn is_whole(&self) -> bool {
        self.is_balanced() && self.held == 0 && self.reserved == 0 && self.quarantined == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    Held { n_refs: u32 },
    Reserved { n_refs: u32 },
    Cached { stamp: u64 },
    Quarantined,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: Generation,
    state: SlotState,
    /// The prefix cache names this block: when nobody holds it any more, it is kept.
    is_cached: bool,
    /// In the list of blocks given out since it was last taken.
    is_listed: bool,
    /// Batches in flight that use it: until they land it is nobody else's.
    n_in_flight: u32,
}

/// The pool. Every operation but [`BlockPool::sweep`] and [`BlockPool::check`] is at most logarithmic in its size.
#[derive(Debug)]
pub struct BlockPool {
    slots: Vec<Slot>,
    free: VecDeque<BlockId>,
    /// Cached blocks that nobody holds, by when they were given back: the first is evicted first.
    lru: BTreeMap<u64, BlockId>,
    quarantined: Vec<BlockId>,
    /// Given out since the list was last taken, each block once.
    allocated: Vec<BlockId>,
    n_held: usize,
    n_reserved: usize,
    n_releases: u64,
}

impl BlockPool {
    /// A pool of `n_blocks` free blocks.
    pub fn new(n_blocks: usize) -> BlockPool {
        let n_ids = u32::try_from(n_blocks).expect("a pool has fewer than 2^32 blocks");
        BlockPool {
            slots: vec![
                Slot {
                    generation: Generation(0),
                    state: SlotState::Free,
                    is_cached: false,
                    is_listed: false,
                    n_in_flight: 0,
                };
                n_blocks
            ],
            free: (0..n_ids).map(BlockId).collect(),
            lru: BTreeMap::new(),
            quarantined: Vec::new(),
            allocated: Vec::new(),
            n_held: 0,
            n_reserved: 0,
            n_releases: 0,
        }
    }

    /// Blocks that could be given out: free ones and cached ones nobody holds. An upper bound, because a cached block
    /// that a transfer still reads is not given out.
    pub fn n_available(&self) -> usize {
        self.free.len() + self.lru.len()
    }

    /// Takes a free block, which begins a new generation.
    pub fn allocate(&mut self) -> Option<HeldBlock> {
        let id = self.free.pop_front()?;
        let slot = &mut self.slots[id.0 as usize];
        debug_assert_eq!(slot.state, SlotState::Free);
        slot.state = SlotState::Held { n_refs: 1 };
        slot.generation = Generation(slot.generation.0.wrapping_add(1));
        if !std::mem::replace(&mut slot.is_listed, true) {
            self.allocated.push(id);
        }
        self.n_held += 1;
        Some(HeldBlock {
            id,
            generation: slot.generation,
        })
    }

    /// The blocks given out since the last call, each with its generation now.
    pub fn take_allocated(&mut self) -> Vec<(BlockId, Generation)> {
        let slots = &mut self.slots;
        let unlist = |id: BlockId| {
            let slot = &mut slots[id.0 as usize];
            slot.is_listed = false;
            (id, slot.generation)
        };
        self.allocated.drain(..).map(unlist).collect()
    }

    /// Frees the cached block that has been unused longest and is not pinned. The caller forgets what it contained.
    pub fn evict(&mut self, is_pinned: IsPinned<'_>) -> Option<BlockId> {
        let is_used = |id: BlockId| is_pinned(id) || self.slots[id.0 as usize].n_in_flight > 0;
        let (&stamp, &id) = self.lru.iter().find(|(_, id)| !is_used(**id))?;
        self.lru.remove(&stamp);
        let slot = &mut self.slots[id.0 as usize];
        slot.state = SlotState::Free;
        slot.is_cached = false;
        self.free.push_back(id);
        Some(id)
    }

    /// One more reference to a block that is held, cached or reserved.
    ///
    /// # Panics
    /// If the block is free or quarantined: its contents are nobody's to share.
    pub fn hold(&mut self, id: BlockId) -> HeldBlock {
        let slot = &mut self.slots[id.0 as usize];
        match &mut slot.state {
            SlotState::Held { n_refs } | SlotState::Reserved { n_refs } => *n_refs += 1,
            SlotState::Cached { stamp } => {
                self.lru.remove(stamp);
                slot.state = SlotState::Held { n_refs: 1 };
                self.n_held += 1;
            }
            state => panic!("block {} cannot be shared while {state:?}", id.0),
        }
        HeldBlock {
            id,
            generation: slot.generation,
        }
    }

    /// Marks a block just allocated as waiting for its contents from another instance.
    pub fn reserve(&mut self, block: &HeldBlock) {
        let slot = self.slot_of(block);
        assert_eq!(
            slot.state,
            SlotState::Held { n_refs: 1 },
            "block {} is not ours alone",
            block.id.0
        );
        slot.state = SlotState::Reserved { n_refs: 1 };
        self.n_held -= 1;
        self.n_reserved += 1;
    }

    /// The contents of a reserved block have arrived, for all who hold it.
    pub fn receive(&mut self, block: &HeldBlock) {
        let slot = self.slot_of(block);
        let SlotState::Reserved { n_refs } = slot.state else {
            panic!("block {} was received while {:?}", block.id.0, slot.state);
        };
        slot.state = SlotState::Held { n_refs };
        self.n_reserved -= 1;
        self.n_held += 1;
    }

    /// A batch that uses a held block is in flight: given back before it lands, the block goes to quarantine.
    pub fn launch(&mut self, block: &HeldBlock) {
        self.slot_of(block).n_in_flight += 1;
    }

    /// A batch that used the block is in flight no more.
    ///
    /// # Panics
    /// If none was.
    pub fn land(&mut self, id: BlockId) {
        let n_in_flight = &mut self.slots[id.0 as usize].n_in_flight;
        let left = n_in_flight.checked_sub(1);
        *n_in_flight = left.unwrap_or_else(|| panic!("no batch in flight uses block {}", id.0));
    }

    /// Keeps the block's contents after its last holder gives it back.
    pub fn keep_cached(&mut self, block: &HeldBlock) {
        let slot = self.slot_of(block);
        assert!(
            matches!(slot.state, SlotState::Held { .. }),
            "block {} is not held",
            block.id.0
        );
        slot.is_cached = true;
    }

    /// Gives one reference back. Of several blocks, give the last of a sequence back first: it is then evicted first.
    pub fn release(&mut self, block: HeldBlock, is_pinned: IsPinned<'_>) {
        let stamp = self.n_releases;
        let slot = self.slot_of(&block);
        match &mut slot.state {
            SlotState::Held { n_refs } | SlotState::Reserved { n_refs } if *n_refs > 1 => {
                *n_refs -= 1;
                return;
            }
            SlotState::Held { .. } if slot.is_cached => slot.state = SlotState::Cached { stamp },
            SlotState::Held { .. } | SlotState::Reserved { .. } if slot.n_in_flight > 0 || is_pinned(block.id) => {
                let was_reserved = matches!(slot.state, SlotState::Reserved { .. });
                slot.state = SlotState::Quarantined;
                self.count_release(was_reserved);
                self.quarantined.push(block.id);
                return;
            }
            SlotState::Held { .. } | SlotState::Reserved { .. } => {
                let was_reserved = matches!(slot.state, SlotState::Reserved { .. });
                slot.state = SlotState::Free;
                self.count_release(was_reserved);
                self.free.push_back(block.id);
                return;
            }
            state => panic!("block {} was released while {state:?}", block.id.0),
        }
        self.n_releases += 1;
        self.lru.insert(stamp, block.id);
        self.n_held -= 1;
    }

    /// Frees the quarantined blocks that no transfer and no batch in flight uses any more; says how many.
    pub fn sweep(&mut self, is_pinned: IsPinned<'_>) -> usize {
        let n_before = self.quarantined.len();
        let (slots, free) = (&mut self.slots, &mut self.free);
        self.quarantined.retain(|&id| {
            let stays = slots[id.0 as usize].n_in_flight > 0 || is_pinned(id);
            if !stays {
                slots[id.0 as usize].state = SlotState::Free;
                free.push_back(id);
            }
            stays
        });
        n_before - self.quarantined.len()
    }

    /// Where every block is, from counters.
    pub fn ledger(&self) -> Ledger {
        Ledger {
            total: self.slots.len(),
            free: self.free.len(),
            cached: self.lru.len(),
            held: self.n_held,
            quarantined: self.quarantined.len(),
            reserved: self.n_reserved,
        }
    }

    /// Counts every block anew and compares with the counters.
    ///
    /// # Panics
    /// If they differ: a block was lost or counted twice.
    pub fn check(&self) {
        let mut counted = Ledger {
            total: self.slots.len(),
            ..Ledger::default()
        };
        for slot in &self.slots {
            match slot.state {
                SlotState::Free => counted.free += 1,
                SlotState::Held { .. } => counted.held += 1,
                SlotState::Reserved { .. } => counted.reserved += 1,
                SlotState::Cached { .. } => counted.cached += 1,
                SlotState::Quarantined => counted.quarantined += 1,
            }
        }
        assert_eq!(
            counted,
            self.ledger(),
            "the ledger of blocks (right) differs from the blocks (left)"
        );
        assert!(
            counted.is_balanced(),
            "the ledger of blocks does not sum up: {counted:?}"
        );
    }

    fn count_release(&mut self, was_reserved: bool) {
        match was_reserved {
            true => self.n_reserved -= 1,
            false => self.n_held -= 1,
        }
    }

    fn slot_of(&mut self, block: &HeldBlock) -> &mut Slot {
        let slot = &mut self.slots[block.id.0 as usize];
        assert_eq!(
            slot.generation, block.generation,
            "block {} belongs to a later grant",
            block.id.0
        );
        slot
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn unpinned(_: BlockId) -> bool {
        false
    }

    #[test]
    fn a_grant_begins_a_new_generation() {
        let mut pool = BlockPool::new(1);
        let first = pool.allocate().unwrap();
        let generation = first.generation();
        assert!(pool.allocate().is_none());
        pool.release(first, &unpinned);
        assert_eq!(pool.allocate().unwrap().generation(), Generation(generation.0 + 1));
    }

    #[test]
    fn a_pinned_block_waits_in_quarantine() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.reserve(&block);
        pool.release(block, &|_| true);
        assert_eq!(pool.ledger().quarantined, 1);
        assert_eq!(pool.sweep(&|_| true), 0);
        assert!(pool.allocate().is_none());
        assert_eq!(pool.sweep(&unpinned), 1);
        assert!(pool.ledger().is_whole());
    }

    #[test]
    fn the_longest_unused_block_is_evicted_unless_pinned() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<HeldBlock> = std::iter::from_fn(|| pool.allocate()).collect();
        blocks.iter().for_each(|block| pool.keep_cached(block));
        blocks
            .into_iter()
            .rev()
            .for_each(|block| pool.release(block, &unpinned));
        assert_eq!(pool.evict(&|id| id == BlockId(2)), Some(BlockId(1)));
        assert_eq!(pool.evict(&unpinned), Some(BlockId(2)));
        let again = pool.hold(BlockId(0));
        assert_eq!(pool.evict(&unpinned), None);
        pool.release(again, &unpinned);
        pool.check();
    }

    #[test]
    fn a_reserved_block_is_shared_and_received_once() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.reserve(&block);
        let shared = pool.hold(block.id());
        assert_eq!((pool.ledger().reserved, pool.ledger().held), (1, 0));
        pool.release(block, &unpinned);
        assert_eq!(pool.ledger().reserved, 1, "the other holder still waits for it");
        pool.receive(&shared);
        assert_eq!((pool.ledger().reserved, pool.ledger().held), (0, 1));
        pool.release(shared, &unpinned);
        assert!(pool.ledger().is_whole());
    }

    #[test]
    #[should_panic(expected = "cannot be shared while Free")]
    fn a_free_block_is_not_shared() {
        let _shared = BlockPool::new(1).hold(BlockId(0));
    }

    #[test]
    fn what_was_given_out_is_listed_once_with_its_latest_generation() {
        let mut pool = BlockPool::new(2);
        for _ in 0..3 {
            let block = pool.allocate().unwrap();
            pool.release(block, &unpinned);
        }
        // First come, first served: block 0 was given out twice.
        let listed = [(BlockId(0), Generation(2)), (BlockId(1), Generation(1))];
        assert_eq!(pool.take_allocated(), listed);
        assert_eq!(pool.take_allocated(), []);
        let again = pool.allocate().unwrap();
        assert_eq!(pool.take_allocated(), [(again.id(), again.generation())]);
    }

    #[test]
    #[should_panic(expected = "no batch in flight uses block 0")]
    fn what_was_not_launched_does_not_land() {
        BlockPool::new(1).land(BlockId(0));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Allocate,
        Share(usize),
        Cache(usize),
        Reserve(usize),
        Release(usize),
        HoldCached(usize),
        Evict,
        Pin(u32),
        Unpin(u32),
        Launch(usize),
        Land(usize),
        Sweep,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => Just(Op::Allocate),
            1 => (0..8usize).prop_map(Op::Share),
            2 => (0..8usize).prop_map(Op::Cache),
            1 => (0..8usize).prop_map(Op::Reserve),
            3 => (0..8usize).prop_map(Op::Release),
            1 => (0..6usize).prop_map(Op::HoldCached),
            1 => Just(Op::Evict),
            1 => (0..6u32).prop_map(Op::Pin),
            1 => (0..6u32).prop_map(Op::Unpin),
            1 => (0..8usize).prop_map(Op::Launch),
            1 => (0..8usize).prop_map(Op::Land),
            1 => Just(Op::Sweep),
        ]
    }

    proptest! {
        /// A naive model: who references which block, which are cached, in which order they were given back.
        #[test]
        fn agrees_with_a_naive_model(ops in prop::collection::vec(op(), 1..200)) {
            const N: usize = 6;
            let mut pool = BlockPool::new(N);
            let mut held: Vec<HeldBlock> = Vec::new();
            let mut reserved: BTreeSet<u32> = BTreeSet::new();
            let mut cached: BTreeSet<u32> = BTreeSet::new();
            let mut unused: Vec<u32> = Vec::new();
            let mut quarantined: BTreeSet<u32> = BTreeSet::new();
            let mut pins: BTreeSet<u32> = BTreeSet::new();
            let mut in_flight: Vec<u32> = Vec::new();
            for op in ops {
                let pinned = pins.clone();
                let is_pinned = move |id: BlockId| pinned.contains(&id.0);
                let in_use: BTreeSet<u32> = pins.iter().chain(&in_flight).copied().collect();
                let n_refs = |held: &[HeldBlock], id| held.iter().filter(|block| block.id() == id).count();
                match op {
                    Op::Allocate => {
                        let distinct: BTreeSet<BlockId> = held.iter().map(HeldBlock::id).collect();
                        let has_free = distinct.len() + unused.len() + quarantined.len() < N;
                        let block = pool.allocate();
                        prop_assert_eq!(block.is_some(), has_free);
                        if let Some(block) = block {
                            prop_assert!(!distinct.contains(&block.id()) && !quarantined.contains(&block.id().0));
                            held.push(block);
                        }
                    }
                    Op::Share(i) if i < held.len() => {
                        held.push(pool.hold(held[i].id()));
                    }
                    Op::Cache(i) if i < held.len() && !reserved.contains(&held[i].id().0) => {
                        pool.keep_cached(&held[i]);
                        cached.insert(held[i].id().0);
                    }
                    Op::Reserve(i) if i < held.len() => {
                        let id = held[i].id();
                        if reserved.remove(&id.0) {
                            pool.receive(&held[i]);
                        } else if n_refs(&held, id) == 1 && !cached.contains(&id.0) {
                            pool.reserve(&held[i]);
                            reserved.insert(id.0);
                        }
                    }
                    Op::Release(i) if i < held.len() => {
                        let block = held.swap_remove(i);
                        let id = block.id();
                        pool.release(block, &is_pinned);
                        if n_refs(&held, id) == 0 {
                            reserved.remove(&id.0);
                            if cached.contains(&id.0) {
                                unused.push(id.0);
                            } else if in_use.contains(&id.0) {
                                quarantined.insert(id.0);
                            }
                        }
                    }
                    Op::HoldCached(i) if i < unused.len() => {
                        held.push(pool.hold(BlockId(unused.remove(i))));
                    }
                    Op::Evict => {
                        let expected = unused.iter().position(|id| !in_use.contains(id)).map(|i| unused.remove(i));
                        prop_assert_eq!(pool.evict(&is_pinned).map(|id| id.0), expected);
                        expected.inspect(|id| { cached.remove(id); });
                    }
                    Op::Pin(id) => { pins.insert(id); }
                    Op::Unpin(id) => { pins.remove(&id); }
                    Op::Launch(i) if i < held.len() => {
                        pool.launch(&held[i]);
                        in_flight.push(held[i].id().0);
                    }
                    Op::Land(i) if i < in_flight.len() => pool.land(BlockId(in_flight.swap_remove(i))),
                    Op::Sweep => {
                        let n_before = quarantined.len();
                        quarantined.retain(|id| in_use.contains(id));
                        prop_assert_eq!(pool.sweep(&is_pinned), n_before - quarantined.len());
                    }
                    _ => {}
                }
                pool.check();
                let ledger = pool.ledger();
                prop_assert_eq!(ledger.quarantined, quarantined.len());
                prop_assert_eq!(ledger.cached, unused.len());
                prop_assert_eq!(ledger.reserved, reserved.len());
            }
            held.into_iter().for_each(|block| pool.release(block, &unpinned));
            in_flight.into_iter().for_each(|id| pool.land(BlockId(id)));
            pool.sweep(&unpinned);
            prop_assert!(pool.ledger().is_whole());
        }
    }
}
