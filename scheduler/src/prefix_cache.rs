//! Which block contains the KV of which tokens in which layer group, so that equal beginnings are computed or received once.
//! Owns no blocks: the pool keeps what this names, and tells it what was evicted. Full blocks only.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::block_events::{BlockEvent, StoredBlock};
use crate::block_pool::{BlockPool, HeldBlock, IsPinned};
use crate::ids::{BlockId, Fingerprint, SequenceId, TokenId};

/// Names the tokens of a block and of all blocks before it: 128 bits of BLAKE3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PrefixKey(pub u128);

/// Makes keys. Front doors and instances that agree on fingerprint and block size make equal keys.
#[derive(Clone, Debug)]
pub struct PrefixHasher {
    fingerprint: Fingerprint,
    block_size: usize,
}

impl PrefixHasher {
    /// A hasher for blocks of `block_size` tokens of the model, dtype and layout behind `fingerprint`.
    pub fn new(fingerprint: Fingerprint, block_size: usize) -> PrefixHasher {
        PrefixHasher {
            fingerprint,
            block_size,
        }
    }

    /// The parent of a sequence's first block.
    pub fn root(&self, salt: u64) -> PrefixKey {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026 prefix cache root");
        hasher.update(&self.fingerprint.0);
        hasher.update(&(self.block_size as u64).to_le_bytes());
        hasher.update(&salt.to_le_bytes());
        truncate(&hasher)
    }

    /// The key of the block with `tokens` that follows the block of `parent`.
    pub fn child(&self, parent: PrefixKey, tokens: &[TokenId]) -> PrefixKey {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parent.0.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        truncate(&hasher)
    }

    /// Appends the keys of the full blocks of `tokens` that `keys` lacks; `keys` are those of its first blocks.
    pub fn extend(&self, salt: u64, tokens: &[TokenId], keys: &mut Vec<PrefixKey>) {
        for block in tokens.chunks_exact(self.block_size).skip(keys.len()) {
            let parent = keys.last().copied().unwrap_or_else(|| self.root(salt));
            keys.push(self.child(parent, block));
        }
    }

    /// The keys of the full blocks of `tokens`.
    pub fn keys(&self, salt: u64, tokens: &[TokenId]) -> Vec<PrefixKey> {
        let mut keys = Vec::with_capacity(tokens.len() / self.block_size);
        self.extend(salt, tokens, &mut keys);
        keys
    }
}

fn truncate(hasher: &blake3::Hasher) -> PrefixKey {
    let hash = hasher.finalize();
    let (head, _) = hash.as_bytes().split_first_chunk::<16>().expect("a hash has 32 bytes");
    PrefixKey(u128::from_le_bytes(*head))
}

/// A change of the cache, for whoever mirrors it. Applied in order. Of several layer groups, those of the first are told: it
/// is the one that sees furthest, and what its windowed neighbours lack is known to the instance alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefixEvent {
    /// The block of this key can be hit.
    Stored(PrefixKey),
    /// It no longer can.
    Removed(PrefixKey),
    /// Nothing can be hit but what is stored after this.
    Cleared,
}

/// The layer group whose blocks [`PrefixEvent`]s are of.
const TOLD_GROUP: usize = 0;

/// How the KV behind a key in flight comes to be here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A sequence of this instance computes it.
    Computed,
    /// Another instance sends it.
    Received,
}

/// What became of an offered block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// It is in the cache.
    New,
    /// This other block already contains the same tokens after the same prefix.
    Duplicate(BlockId),
    /// The key belongs to other tokens; the block stays outside.
    Collision,
}

/// A full block as it is offered.
#[derive(Clone, Copy, Debug)]
pub struct Offered<'a> {
    /// Names it.
    pub key: PrefixKey,
    /// The block before it; `None` for the first of a sequence.
    pub parent: Option<PrefixKey>,
    /// Its place in its sequence.
    pub block_idx: usize,
    /// What the keys of its sequence are salted with; 0 for none.
    pub salt: u64,
    /// Its own tokens.
    pub tokens: &'a [TokenId],
}

/// At least one of its blocks is there.
#[derive(Debug)]
struct Entry {
    /// Of each layer group.
    blocks: Box<[Option<BlockId>]>,
    parent: Option<PrefixKey>,
    block_idx: usize,
    salt: u64,
    tokens: Arc<[TokenId]>,
}

impl Entry {
    /// Whether its tokens alone say what it is. Salted blocks are nobody's business but their requests'.
    fn is_plain(&self) -> bool {
        self.salt == 0
    }

    fn stored(&self, key: PrefixKey) -> BlockEvent {
        BlockEvent::Stored(StoredBlock {
            key,
            parent: self.parent,
            tokens: Arc::clone(&self.tokens),
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    owner: SequenceId,
    arrival: Arrival,
}

/// The cache of one instance and one numerics class.
#[derive(Debug)]
pub struct PrefixCache {
    n_groups: usize,
    entries: BTreeMap<PrefixKey, Entry>,
    key_of_block: BTreeMap<BlockId, (PrefixKey, usize)>,
    in_flight: BTreeMap<PrefixKey, InFlight>,
    events: Vec<PrefixEvent>,
    max_events: usize,
    /// Events were dropped, so that the next taker gets the whole contents instead.
    has_overflowed: bool,
    /// Changes of plain blocks with their tokens, while somebody asks for them.
    block_events: Option<Vec<BlockEvent>>,
}

impl PrefixCache {
    /// An empty cache of the blocks of `n_groups` layer groups, that buffers at most `max_events` events.
    pub fn new(max_events: usize, n_groups: usize) -> PrefixCache {
        PrefixCache {
            n_groups,
            entries: BTreeMap::new(),
            key_of_block: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            events: Vec::new(),
            max_events,
            has_overflowed: false,
            block_events: None,
        }
    }

    /// Blocks that can be hit, over all layer groups.
    pub fn n_entries(&self) -> usize {
        self.key_of_block.len()
    }

    /// How many of the first blocks of `keys` need not be computed or received: the largest `n` for which each layer group has
    /// its blocks from `first_needed(layer_group, n)` up to `n`, whose tokens are compared with `tokens`. Where nothing before
    /// some block is needed, what is cached before it does not matter.
    ///
    /// `first_needed` may not fall as `n` grows. Every key is looked at once at most.
    pub fn lookup(
        &self,
        keys: &[PrefixKey],
        tokens: &[TokenId],
        block_size: usize,
        first_needed: impl Fn(usize, usize) -> usize,
    ) -> usize {
        let mut n_hit = 0;
        // Where the blocks of each group begin that are there without a gap.
        let mut run_starts = vec![0; self.n_groups];
        for (block_idx, (key, block_tokens)) in keys.iter().zip(tokens.chunks_exact(block_size)).enumerate() {
            let entry = self.entries.get(key).filter(|entry| *entry.tokens == *block_tokens);
            let n = block_idx + 1;
            let mut is_hit = true;
            for (layer_group, run_start) in run_starts.iter_mut().enumerate() {
                if entry.is_none_or(|entry| entry.blocks[layer_group].is_none()) {
                    *run_start = n;
                }
                is_hit &= *run_start <= first_needed(layer_group, n);
            }
            if is_hit {
                n_hit = n;
            }
            // Even the longest beginning needs a block that is missing.
            if (0..self.n_groups).any(|layer_group| run_starts[layer_group] > first_needed(layer_group, keys.len())) {
                break;
            }
        }
        n_hit
    }

    /// The cached block of a key in a layer group.
    pub fn block(&self, key: PrefixKey, layer_group: usize) -> Option<BlockId> {
        self.entries.get(&key)?.blocks[layer_group]
    }

    /// Offers a held, full block of a layer group whose KV is complete.
    pub fn register(
        &mut self,
        pool: &mut BlockPool,
        offered: Offered<'_>,
        layer_group: usize,
        block: &HeldBlock,
    ) -> Registered {
        let Offered { key, tokens, .. } = offered;
        let n_groups = self.n_groups;
        let entry = self.entries.entry(key).or_insert_with(|| Entry {
            blocks: vec![None; n_groups].into(),
            parent: offered.parent,
            block_idx: offered.block_idx,
            salt: offered.salt,
            tokens: tokens.into(),
        });
        if *entry.tokens != *tokens {
            return Registered::Collision;
        }
        match entry.blocks[layer_group] {
            Some(cached) if cached != block.id() => Registered::Duplicate(cached),
            Some(_) => Registered::New,
            None => {
                entry.blocks[layer_group] = Some(block.id());
                pool.keep_cached(block);
                self.key_of_block.insert(block.id(), (key, layer_group));
                if layer_group == TOLD_GROUP {
                    if let Some(events) = self.block_events.as_mut().filter(|_| entry.is_plain()) {
                        events.push(entry.stored(key));
                    }
                    self.record(PrefixEvent::Stored(key));
                }
                Registered::New
            }
        }
    }

    /// A block for new contents: a free one, or else the longest unused cached one, which is forgotten.
    pub fn allocate(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) -> Option<HeldBlock> {
        if let Some(block) = pool.allocate() {
            return Some(block);
        }
        let evicted = pool.evict(is_pinned)?;
        let (key, layer_group) = self.key_of_block.remove(&evicted).expect("an evicted block has a key");
        let entry = self.entries.get_mut(&key).expect("a cached block has an entry");
        entry.blocks[layer_group] = None;
        if layer_group == TOLD_GROUP
            && let Some(events) = self.block_events.as_mut().filter(|_| entry.is_plain())
        {
            events.push(BlockEvent::Removed(key));
        }
        if entry.blocks.iter().all(Option::is_none) {
            self.entries.remove(&key);
        }
        if layer_group == TOLD_GROUP {
            self.record(PrefixEvent::Removed(key));
        }
        pool.allocate()
    }

    /// Says that `owner` will bring the KV of `key`, unless someone already does or all of it is here. Says whether it does now.
    pub fn claim(&mut self, key: PrefixKey, owner: SequenceId, arrival: Arrival) -> bool {
        let entry = self.entries.get(&key);
        let is_here = entry.is_some_and(|entry| entry.blocks.iter().all(Option::is_some));
        if is_here || self.in_flight.contains_key(&key) {
            return false;
        }
        self.in_flight.insert(key, InFlight { owner, arrival });
        true
    }

    /// Ends a claim, fulfilled or given up. Another's claim stays.
    pub fn disclaim(&mut self, key: PrefixKey, owner: SequenceId) {
        if self.in_flight.get(&key).is_some_and(|claim| claim.owner == owner) {
            self.in_flight.remove(&key);
        }
    }

    /// How the KV of `key` is about to arrive, if it is.
    pub fn arriving(&self, key: PrefixKey) -> Option<Arrival> {
        self.in_flight.get(&key).map(|claim| claim.arrival)
    }

    /// Claims outstanding.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The changes since the last call; after an overflow [`PrefixEvent::Cleared`] and the whole contents.
    pub fn take_events(&mut self) -> Vec<PrefixEvent> {
        if std::mem::take(&mut self.has_overflowed) {
            self.events.clear();
            return self.snapshot();
        }
        std::mem::take(&mut self.events)
    }

    /// [`PrefixEvent::Cleared`] and the whole contents.
    pub fn snapshot(&self) -> Vec<PrefixEvent> {
        let stored = self.told().map(|(key, _)| PrefixEvent::Stored(key));
        std::iter::once(PrefixEvent::Cleared).chain(stored).collect()
    }

    /// From now on changes of plain blocks are kept with their tokens, to be taken after every step. Answers what is there now:
    /// [`BlockEvent::Cleared`] and the whole contents, parents before their children.
    pub fn watch_blocks(&mut self) -> Vec<BlockEvent> {
        self.block_events.get_or_insert_default();
        let mut plain: Vec<_> = self.told().filter(|(_, entry)| entry.is_plain()).collect();
        plain.sort_by_key(|(_, entry)| entry.block_idx);
        let stored = plain.into_iter().map(|(key, entry)| entry.stored(key));
        std::iter::once(BlockEvent::Cleared).chain(stored).collect()
    }

    /// The changes since the last call; none unless they are watched.
    pub fn take_block_events(&mut self) -> Vec<BlockEvent> {
        self.block_events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Nobody asks for changes any more.
    pub fn unwatch_blocks(&mut self) {
        self.block_events = None;
    }

    /// The entries that those outside know.
    fn told(&self) -> impl Iterator<Item = (PrefixKey, &Entry)> {
        let entries = self.entries.iter().map(|(&key, entry)| (key, entry));
        entries.filter(|(_, entry)| entry.blocks[TOLD_GROUP].is_some())
    }

    fn record(&mut self, event: PrefixEvent) {
        if self.events.len() < self.max_events {
            self.events.push(event);
        } else {
            self.has_overflowed = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK_SIZE: usize = 4;

    fn hasher() -> PrefixHasher {
        PrefixHasher::new(Fingerprint([7; 32]), BLOCK_SIZE)
    }

    fn unpinned(_: BlockId) -> bool {
        false
    }

    fn offered(key: PrefixKey, tokens: &[TokenId]) -> Offered<'_> {
        Offered {
            key,
            parent: None,
            block_idx: 0,
            salt: 0,
            tokens,
        }
    }

    fn store(cache: &mut PrefixCache, pool: &mut BlockPool, salt: u64, tokens: &[TokenId]) -> Vec<HeldBlock> {
        let keys = hasher().keys(salt, tokens);
        let blocks = keys
            .iter()
            .zip(tokens.chunks_exact(BLOCK_SIZE))
            .map(|(&key, block_tokens)| {
                let block = cache.allocate(pool, &unpinned).unwrap();
                cache.register(pool, offered(key, block_tokens), 0, &block);
                block
            });
        blocks.collect()
    }

    /// The cached blocks of a beginning, with one layer group that sees everything.
    fn lookup(cache: &PrefixCache, keys: &[PrefixKey], tokens: &[TokenId]) -> Vec<BlockId> {
        let n_hit = cache.lookup(keys, tokens, BLOCK_SIZE, |_, _| 0);
        keys[..n_hit].iter().map(|&key| cache.block(key, 0).unwrap()).collect()
    }

    fn apply(mirror: &mut std::collections::BTreeSet<PrefixKey>, events: Vec<PrefixEvent>) {
        for event in events {
            match event {
                PrefixEvent::Stored(key) => assert!(mirror.insert(key), "stored twice"),
                PrefixEvent::Removed(key) => assert!(mirror.remove(&key), "removed what was not stored"),
                PrefixEvent::Cleared => mirror.clear(),
            }
        }
    }

    fn watch(blocks: &mut BTreeMap<PrefixKey, Arc<[TokenId]>>, events: Vec<BlockEvent>) {
        for event in events {
            match event {
                BlockEvent::Stored(block) => {
                    assert!(blocks.insert(block.key, block.tokens).is_none(), "stored twice");
                }
                BlockEvent::Removed(key) => assert!(blocks.remove(&key).is_some(), "removed what was not stored"),
                BlockEvent::Cleared => blocks.clear(),
            }
        }
    }

    #[test]
    fn parents_are_told_before_their_children_and_nothing_is_kept_for_nobody() {
        let (mut cache, mut pool) = (PrefixCache::new(16, 1), BlockPool::new(9));
        let tokens: Vec<TokenId> = (0..32).collect();
        let keys = hasher().keys(0, &tokens);
        let mut held = Vec::new();
        for (block_idx, block_tokens) in tokens.chunks_exact(BLOCK_SIZE).enumerate() {
            let block = cache.allocate(&mut pool, &unpinned).unwrap();
            let parent = block_idx.checked_sub(1).map(|idx| keys[idx]);
            let offered = Offered {
                parent,
                block_idx,
                ..offered(keys[block_idx], block_tokens)
            };
            assert_eq!(cache.register(&mut pool, offered, 0, &block), Registered::New);
            held.push(block);
        }
        assert!(cache.take_block_events().is_empty());
        let snapshot = cache.watch_blocks();
        assert_eq!(snapshot[0], BlockEvent::Cleared);
        for (block_idx, event) in snapshot[1..].iter().enumerate() {
            let BlockEvent::Stored(block) = event else {
                panic!("{event:?}")
            };
            assert_eq!(
                (block.key, block.tokens[0] as usize),
                (keys[block_idx], block_idx * BLOCK_SIZE)
            );
            assert_eq!(block.parent, block_idx.checked_sub(1).map(|idx| keys[idx]));
        }
        held.into_iter().for_each(|block| pool.release(block, &unpinned));
        let _one = cache.allocate(&mut pool, &unpinned).unwrap();
        let _other = cache.allocate(&mut pool, &unpinned).unwrap();
        assert_eq!(cache.take_block_events(), [BlockEvent::Removed(keys[0])]);
        cache.unwatch_blocks();
        let _third = cache.allocate(&mut pool, &unpinned).unwrap();
        assert!(cache.take_block_events().is_empty());
    }

    #[test]
    fn keys_depend_on_parent_tokens_salt_and_fingerprint() {
        let tokens: Vec<TokenId> = (0..8).collect();
        let keys = hasher().keys(0, &tokens);
        assert_eq!(keys.len(), 2);
        assert_eq!(hasher().keys(0, &tokens[..7]), keys[..1]);
        assert_ne!(hasher().keys(1, &tokens)[1], keys[1]);
        assert_ne!(
            PrefixHasher::new(Fingerprint([8; 32]), BLOCK_SIZE).keys(0, &tokens)[1],
            keys[1]
        );
        assert_ne!(hasher().keys(0, &[9, 1, 2, 3, 4, 5, 6, 7])[1], keys[1]);
        assert_ne!(hasher().child(keys[0], &[4, 5, 6, 8]), keys[1]);
    }

    #[test]
    fn tokens_are_compared_on_a_hit() {
        let (mut cache, mut pool) = (PrefixCache::new(16, 1), BlockPool::new(4));
        let key = hasher().keys(0, &[1, 2, 3, 4])[0];
        let block = cache.allocate(&mut pool, &unpinned).unwrap();
        assert_eq!(
            cache.register(&mut pool, offered(key, &[1, 2, 3, 4]), 0, &block),
            Registered::New
        );
        assert_eq!(lookup(&cache, &[key], &[1, 2, 3, 4]), [block.id()]);
        assert!(lookup(&cache, &[key], &[1, 2, 3, 5]).is_empty());
        let other = cache.allocate(&mut pool, &unpinned).unwrap();
        assert_eq!(
            cache.register(&mut pool, offered(key, &[1, 2, 3, 5]), 0, &other),
            Registered::Collision
        );
        assert_eq!(
            cache.register(&mut pool, offered(key, &[1, 2, 3, 4]), 0, &other),
            Registered::Duplicate(block.id())
        );
    }

    #[test]
    fn leaves_are_evicted_before_their_parents() {
        let (mut cache, mut pool) = (PrefixCache::new(16, 1), BlockPool::new(3));
        let tokens: Vec<TokenId> = (0..12).collect();
        let blocks = store(&mut cache, &mut pool, 0, &tokens);
        blocks
            .into_iter()
            .rev()
            .for_each(|block| pool.release(block, &unpinned));
        let keys = hasher().keys(0, &tokens);
        for n_left in (0..3).rev() {
            let _new = cache.allocate(&mut pool, &unpinned).unwrap();
            assert_eq!(lookup(&cache, &keys, &tokens).len(), n_left);
        }
        assert!(cache.allocate(&mut pool, &unpinned).is_none());
    }

    #[test]
    fn a_key_is_claimed_once() {
        let mut cache = PrefixCache::new(16, 1);
        let key = PrefixKey(1);
        assert!(cache.claim(key, SequenceId(1), Arrival::Computed));
        assert!(!cache.claim(key, SequenceId(2), Arrival::Received));
        cache.disclaim(key, SequenceId(2));
        assert_eq!(cache.arriving(key), Some(Arrival::Computed));
        cache.disclaim(key, SequenceId(1));
        assert!(cache.claim(key, SequenceId(2), Arrival::Received));
        assert_eq!(cache.n_in_flight(), 1);
    }

    proptest! {
        /// A mirror fed by the events has the same keys as the cache, through evictions and overflows.
        #[test]
        fn a_mirror_follows(
            max_events in 1..12usize,
            prompts in prop::collection::vec((prop::collection::vec(0..3u32, 4..20), any::<bool>()), 1..40),
        ) {
            let (mut cache, mut pool) = (PrefixCache::new(max_events, 1), BlockPool::new(5));
            let mut mirror = std::collections::BTreeSet::new();
            let mut watcher = BTreeMap::new();
            watch(&mut watcher, cache.watch_blocks());
            for (tokens, is_taken) in prompts {
                let keys = hasher().keys(0, &tokens);
                let mut held: Vec<HeldBlock> =
                    lookup(&cache, &keys, &tokens).into_iter().map(|id| pool.hold(id)).collect();
                for (key, block_tokens) in keys.iter().zip(tokens.chunks_exact(BLOCK_SIZE)).skip(held.len()) {
                    let Some(block) = cache.allocate(&mut pool, &unpinned) else { break };
                    let salt = u64::from(tokens[0] == 2);
                    let offered = Offered { salt, ..offered(*key, block_tokens) };
                    prop_assert_eq!(cache.register(&mut pool, offered, 0, &block), Registered::New);
                    held.push(block);
                }
                held.into_iter().rev().for_each(|block| pool.release(block, &unpinned));
                pool.check();
                prop_assert_eq!(pool.ledger().cached, cache.n_entries());
                watch(&mut watcher, cache.take_block_events());
                let plain = cache.entries.iter().filter(|(_, entry)| entry.salt == 0);
                prop_assert!(plain.map(|(key, entry)| (*key, &*entry.tokens)).eq(watcher.iter().map(|(key, tokens)| (*key, &**tokens))));
                if is_taken {
                    apply(&mut mirror, cache.take_events());
                    prop_assert!(mirror.iter().eq(cache.entries.keys()));
                }
            }
            apply(&mut mirror, cache.take_events());
            prop_assert!(mirror.iter().eq(cache.entries.keys()));
        }

        /// With windowed groups beside full ones and holes anywhere, a hit is the longest beginning of which no group lacks a
        /// block that it needs, found by trying them all.
        #[test]
        fn a_hit_is_the_longest_of_which_nothing_needed_is_missing(
            windows in prop::collection::vec(prop::option::of(0..5usize), 1..4),
            n_blocks in 0..12usize,
            holes in prop::collection::vec((0..12usize, 0..4usize), 0..12),
            end in prop::option::of(0..14usize),
        ) {
            let tokens: Vec<TokenId> = (0..(n_blocks * BLOCK_SIZE) as TokenId).collect();
            let keys = hasher().keys(0, &tokens);
            let n_groups = windows.len();
            let (mut cache, mut pool) = (PrefixCache::new(64, n_groups), BlockPool::new(64));
            let is_hole = |block_idx: usize, layer_group: usize| holes.contains(&(block_idx, layer_group));
            for (block_idx, block_tokens) in tokens.chunks_exact(BLOCK_SIZE).enumerate() {
                for layer_group in (0..n_groups).filter(|&layer_group| !is_hole(block_idx, layer_group)) {
                    let block = cache.allocate(&mut pool, &unpinned).unwrap();
                    let registered = cache.register(&mut pool, offered(keys[block_idx], block_tokens), layer_group, &block);
                    prop_assert_eq!(registered, Registered::New);
                }
            }
            // What is behind the hit, or, for a context that is computed elsewhere, behind its end.
            let first_needed = |layer_group: usize, n: usize| {
                windows[layer_group].map_or(0, |window| end.unwrap_or(n).saturating_sub(window))
            };
            let is_hit = |n: &usize| {
                (0..n_groups).all(|group| (first_needed(group, *n)..*n).all(|block_idx| !is_hole(block_idx, group)))
            };
            let expected = (0..=n_blocks).rev().find(is_hit);
            prop_assert_eq!(Some(cache.lookup(&keys, &tokens, BLOCK_SIZE, first_needed)), expected);
            let n_told = cache.snapshot().len() - 1;
            prop_assert_eq!(n_told, (0..n_blocks).filter(|&block_idx| !is_hole(block_idx, 0)).count());
        }
    }
}
