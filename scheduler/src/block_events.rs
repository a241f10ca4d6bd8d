//! What prefix caches hold, block by block with its tokens, for whoever routes by them from outside: events of one cache, and
//! the union of several. The view of a front door is fed by [`crate::prefix_cache::PrefixEvent`], which has keys alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::ids::{InstanceId, TokenId};
use crate::prefix_cache::PrefixKey;

/// A block that can be hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlock {
    /// Names it.
    pub key: PrefixKey,
    /// The block before it; `None` for a prompt's first.
    pub parent: Option<PrefixKey>,
    /// Its own tokens.
    pub tokens: Arc<[TokenId]>,
}

/// A change, applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    /// A block can be hit.
    Stored(StoredBlock),
    /// It no longer can.
    Removed(PrefixKey),
    /// Nothing can be hit but what is stored after this.
    Cleared,
}

/// What at least one of several caches holds.
#[derive(Clone, Debug, Default)]
pub struct BlockUnion {
    n_holders: BTreeMap<PrefixKey, usize>,
    held_by: BTreeMap<InstanceId, BTreeSet<PrefixKey>>,
}

impl BlockUnion {
    /// Nothing.
    pub fn new() -> BlockUnion {
        BlockUnion::default()
    }

    /// Blocks that somebody holds.
    pub fn n_blocks(&self) -> usize {
        self.n_holders.len()
    }

    /// An event of one cache as events of the union: stored when the first has a block, removed when the last has lost it.
    pub fn apply(&mut self, instance: &InstanceId, event: BlockEvent, told: &mut Vec<BlockEvent>) {
        match event {
            BlockEvent::Stored(block) => {
                let held = self.held_by.entry(instance.clone()).or_default();
                if !held.insert(block.key) {
                    return;
                }
                let n_holders = self.n_holders.entry(block.key).or_default();
                *n_holders += 1;
                if *n_holders == 1 {
                    told.push(BlockEvent::Stored(block));
                }
            }
            BlockEvent::Removed(key) => {
                let held = self.held_by.get_mut(instance);
                if held.is_some_and(|held| held.remove(&key)) {
                    self.release(key, told);
                }
            }
            BlockEvent::Cleared => self.leave(instance, told),
        }
    }

    /// A cache is gone with all it held.
    pub fn leave(&mut self, instance: &InstanceId, told: &mut Vec<BlockEvent>) {
        for key in self.held_by.remove(instance).unwrap_or_default() {
            self.release(key, told);
        }
    }

    fn release(&mut self, key: PrefixKey, told: &mut Vec<BlockEvent>) {
        let n_holders = self.n_holders.get_mut(&key).expect("a held block has a holder");
        *n_holders -= 1;
        if *n_holders == 0 {
            self.n_holders.remove(&key);
            told.push(BlockEvent::Removed(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stored(key: u128) -> BlockEvent {
        BlockEvent::Stored(StoredBlock {
            key: PrefixKey(key),
            parent: None,
            tokens: Arc::from([1, 2]),
        })
    }

    #[derive(Clone, Debug)]
    enum Op {
        Event(usize, BlockEvent),
        Leave(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0..3usize, 0..8u128).prop_map(|(i, key)| Op::Event(i, stored(key))),
            4 => (0..3usize, 0..8u128).prop_map(|(i, key)| Op::Event(i, BlockEvent::Removed(PrefixKey(key)))),
            1 => (0..3usize).prop_map(|i| Op::Event(i, BlockEvent::Cleared)),
            1 => (0..3usize).prop_map(Op::Leave),
        ]
    }

    proptest! {
        /// Whoever applies what the union tells has the union of the sets, and hears of no block twice.
        #[test]
        fn agrees_with_sets(ops in prop::collection::vec(op(), 1..80)) {
            let mut sets = vec![BTreeSet::new(); 3];
            let (mut union, mut mirror) = (BlockUnion::new(), BTreeSet::new());
            for op in ops {
                let mut told = Vec::new();
                let name = |i: usize| InstanceId::new(&format!("i-{i}"));
                match op {
                    Op::Event(i, event) => {
                        match &event {
                            BlockEvent::Stored(block) => { sets[i].insert(block.key); }
                            BlockEvent::Removed(key) => { sets[i].remove(key); }
                            BlockEvent::Cleared => sets[i].clear(),
                        }
                        union.apply(&name(i), event, &mut told);
                    }
                    Op::Leave(i) => {
                        sets[i].clear();
                        union.leave(&name(i), &mut told);
                    }
                }
                for event in told {
                    match event {
                        BlockEvent::Stored(block) => prop_assert!(mirror.insert(block.key), "stored twice"),
                        BlockEvent::Removed(key) => prop_assert!(mirror.remove(&key), "removed what was not there"),
                        BlockEvent::Cleared => prop_assert!(false, "a union is never cleared"),
                    }
                }
                let expected: BTreeSet<PrefixKey> = sets.iter().flatten().copied().collect();
                prop_assert_eq!(&mirror, &expected);
                prop_assert_eq!(union.n_blocks(), expected.len());
            }
        }
    }
}
