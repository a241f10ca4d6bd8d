//! Which block contains the KV of which tokens, so that equal beginnings are computed or received once.
//! Owns no blocks: the pool keeps what this names, and tells it what was evicted. Full blocks only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// A change of the cache, for whoever mirrors it. Applied in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefixEvent {
    /// The block of this key can be hit.
    Stored(PrefixKey),
    /// It no longer can.
    Removed(PrefixKey),
    /// Nothing can be hit but what is stored after this.
    Cleared,
}

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

#[derive(Debug)]
struct Entry {
    block: BlockId,
    tokens: Box<[TokenId]>,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    owner: SequenceId,
    arrival: Arrival,
}

/// The cache of one instance and one numerics class.
#[derive(Debug)]
pub struct PrefixCache {
    entries: BTreeMap<PrefixKey, Entry>,
    key_of_block: BTreeMap<BlockId, PrefixKey>,
    in_flight: BTreeMap<PrefixKey, InFlight>,
    events: Vec<PrefixEvent>,
    max_events: usize,
    /// Events were dropped, so that the next taker gets the whole contents instead.
    has_overflowed: bool,
}

impl PrefixCache {
    /// An empty cache that buffers at most `max_events` events.
    pub fn new(max_events: usize) -> PrefixCache {
        PrefixCache {
            entries: BTreeMap::new(),
            key_of_block: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            events: Vec::new(),
            max_events,
            has_overflowed: false,
        }
    }

    /// Blocks that can be hit.
    pub fn n_entries(&self) -> usize {
        self.entries.len()
    }

    /// The cached blocks for the longest prefix of `keys`, whose tokens are compared with `tokens`.
    pub fn lookup(&self, keys: &[PrefixKey], tokens: &[TokenId], block_size: usize) -> Vec<BlockId> {
        keys.iter()
            .zip(tokens.chunks_exact(block_size))
            .map_while(|(key, block)| {
                let entry = self.entries.get(key)?;
                (*entry.tokens == *block).then_some(entry.block)
            })
            .collect()
    }

    /// Offers a held, full block whose KV is complete.
    pub fn register(
        &mut self,
        pool: &mut BlockPool,
        key: PrefixKey,
        tokens: &[TokenId],
        block: &HeldBlock,
    ) -> Registered {
        match self.entries.get(&key) {
            Some(entry) if *entry.tokens != *tokens => Registered::Collision,
            Some(entry) if entry.block != block.id() => Registered::Duplicate(entry.block),
            Some(_) => Registered::New,
            None => {
                pool.keep_cached(block);
                self.entries.insert(
                    key,
                    Entry {
                        block: block.id(),
                        tokens: tokens.into(),
                    },
                );
                self.key_of_block.insert(block.id(), key);
                self.record(PrefixEvent::Stored(key));
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
        let key = self.key_of_block.remove(&evicted).expect("an evicted block has a key");
        self.entries.remove(&key);
        self.record(PrefixEvent::Removed(key));
        pool.allocate()
    }

    /// Says that `owner` will bring the KV of `key`, unless someone already does or has. Says whether it does now.
    pub fn claim(&mut self, key: PrefixKey, owner: SequenceId, arrival: Arrival) -> bool {
        if self.entries.contains_key(&key) || self.in_flight.contains_key(&key) {
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
        let stored = self.entries.keys().map(|&key| PrefixEvent::Stored(key));
        std::iter::once(PrefixEvent::Cleared).chain(stored).collect()
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

    fn store(cache: &mut PrefixCache, pool: &mut BlockPool, salt: u64, tokens: &[TokenId]) -> Vec<HeldBlock> {
        let keys = hasher().keys(salt, tokens);
        let blocks = keys
            .iter()
            .zip(tokens.chunks_exact(BLOCK_SIZE))
            .map(|(&key, block_tokens)| {
                let block = cache.allocate(pool, &unpinned).unwrap();
                cache.register(pool, key, block_tokens, &block);
                block
            });
        blocks.collect()
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
        let (mut cache, mut pool) = (PrefixCache::new(16), BlockPool::new(4));
        let key = hasher().keys(0, &[1, 2, 3, 4])[0];
        let block = cache.allocate(&mut pool, &unpinned).unwrap();
        assert_eq!(cache.register(&mut pool, key, &[1, 2, 3, 4], &block), Registered::New);
        assert_eq!(cache.lookup(&[key], &[1, 2, 3, 4], BLOCK_SIZE), [block.id()]);
        assert!(cache.lookup(&[key], &[1, 2, 3, 5], BLOCK_SIZE).is_empty());
        let other = cache.allocate(&mut pool, &unpinned).unwrap();
        assert_eq!(
            cache.register(&mut pool, key, &[1, 2, 3, 5], &other),
            Registered::Collision
        );
        assert_eq!(
            cache.register(&mut pool, key, &[1, 2, 3, 4], &other),
            Registered::Duplicate(block.id())
        );
    }

    #[test]
    fn leaves_are_evicted_before_their_parents() {
        let (mut cache, mut pool) = (PrefixCache::new(16), BlockPool::new(3));
        let tokens: Vec<TokenId> = (0..12).collect();
        let blocks = store(&mut cache, &mut pool, 0, &tokens);
        blocks
            .into_iter()
            .rev()
            .for_each(|block| pool.release(block, &unpinned));
        let keys = hasher().keys(0, &tokens);
        for n_left in (0..3).rev() {
            let _new = cache.allocate(&mut pool, &unpinned).unwrap();
            assert_eq!(cache.lookup(&keys, &tokens, BLOCK_SIZE).len(), n_left);
        }
        assert!(cache.allocate(&mut pool, &unpinned).is_none());
    }

    #[test]
    fn a_key_is_claimed_once() {
        let mut cache = PrefixCache::new(16);
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
            let (mut cache, mut pool) = (PrefixCache::new(max_events), BlockPool::new(5));
            let mut mirror = std::collections::BTreeSet::new();
            for (tokens, is_taken) in prompts {
                let keys = hasher().keys(0, &tokens);
                let mut held: Vec<HeldBlock> =
                    cache.lookup(&keys, &tokens, BLOCK_SIZE).into_iter().map(|id| pool.hold(id)).collect();
                for (key, block_tokens) in keys.iter().zip(tokens.chunks_exact(BLOCK_SIZE)).skip(held.len()) {
                    let Some(block) = cache.allocate(&mut pool, &unpinned) else { break };
                    prop_assert_eq!(cache.register(&mut pool, *key, block_tokens, &block), Registered::New);
                    held.push(block);
                }
                held.into_iter().rev().for_each(|block| pool.release(block, &unpinned));
                pool.check();
                prop_assert_eq!(pool.ledger().cached, cache.n_entries());
                if is_taken {
                    apply(&mut mirror, cache.take_events());
                    prop_assert!(mirror.iter().eq(cache.entries.keys()));
                }
            }
            apply(&mut mirror, cache.take_events());
            prop_assert!(mirror.iter().eq(cache.entries.keys()));
        }
    }
}
