//! What listeners hear of cached blocks.

use std::collections::BTreeMap;

use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::prefix_cache::{PrefixHasher, PrefixKey};

use super::super::block_watch::MAX_STEPS_BEHIND;
use super::*;

fn keys(prompt: &[TokenId]) -> Vec<PrefixKey> {
    PrefixHasher::new(Fingerprint([5; 32]), BLOCK_SIZE).keys(0, prompt)
}

/// Tokens and parent of each block that a listener knows.
type Known = BTreeMap<PrefixKey, (Vec<TokenId>, Option<PrefixKey>)>;

fn apply(known: &mut Known, changes: &[BlockEvent]) -> (usize, usize) {
    let (mut n_stored, mut n_removed) = (0, 0);
    for change in changes {
        match change {
            BlockEvent::Stored(block) => {
                let unknown = known.insert(block.key, (block.tokens.to_vec(), block.parent)).is_none();
                assert!(unknown, "stored twice");
                n_stored += 1;
            }
            BlockEvent::Removed(key) => {
                assert!(known.remove(key).is_some(), "removed what was not stored");
                n_removed += 1;
            }
            BlockEvent::Cleared => known.clear(),
        }
    }
    (n_stored, n_removed)
}

async fn finish(engine: &EngineHandle, state: PortableState) {
    let mut generation = engine.generate(state).unwrap();
    while generation.next().await.is_some() {}
}

#[tokio::test]
async fn a_listener_hears_of_each_prefix_and_of_its_eviction_and_of_nothing_salted() {
    let engine = engine(6);
    let first: Vec<TokenId> = (0..8).collect();
    finish(&engine, greedy(&first, 1)).await;
    let mut watch = engine.watch_blocks().unwrap();
    let mut known = Known::new();
    // What was there before comes first.
    apply(&mut known, &watch.next().await.unwrap());
    let names = keys(&first);
    assert_eq!(known[&names[0]], ((0..4).collect(), None));
    assert_eq!(known[&names[1]], ((4..8).collect(), Some(names[0])));
    assert_eq!(known.len(), 2);

    let mut salted = greedy(&[9, 9, 9, 9, 8, 8, 8, 8], 1);
    salted.request.cache_salt = 7;
    finish(&engine, salted).await;
    // Everything is needed for this one, so the others are evicted.
    let long: Vec<TokenId> = (10..31).collect();
    finish(&engine, greedy(&long, 1)).await;
    let (mut n_stored, mut n_removed) = (0, 0);
    while (n_stored, n_removed) != (5, 2) {
        let (stored, removed) = apply(&mut known, &watch.next().await.unwrap());
        (n_stored, n_removed) = (n_stored + stored, n_removed + removed);
    }
    let expected: Vec<PrefixKey> = keys(&long);
    assert!(
        known
            .keys()
            .eq(expected.iter().collect::<std::collections::BTreeSet<_>>())
    );
    assert_eq!(known[&expected[4]], ((26..30).collect(), Some(expected[3])));
}

#[tokio::test]
async fn one_that_falls_behind_is_let_go_and_the_engine_never_waits() {
    let engine = engine(40);
    let mut slow = engine.watch_blocks().unwrap();
    let mut other = engine.watch_blocks().unwrap();
    let mut known = Known::new();
    // A step stores a block at least every fourth token; nobody reads meanwhile but the other one.
    let mut n_stored = 0;
    for round in 0..MAX_STEPS_BEHIND as u32 + 8 {
        let prompt = [round % 40, round / 40, 3, 4, 5];
        finish(&engine, greedy(&prompt, 1)).await;
        while let Ok(changes) = other.changes.try_recv() {
            n_stored += apply(&mut known, &changes).0;
        }
    }
    assert!(n_stored >= MAX_STEPS_BEHIND, "{n_stored} blocks were stored");
    let mut n_messages = 0;
    while slow.next().await.is_some() {
        n_messages += 1;
    }
    assert_eq!(
        n_messages, MAX_STEPS_BEHIND,
        "all that there was room for, and then the end"
    );
    // A new one begins with all.
    let mut again = engine.watch_blocks().unwrap();
    let mut afresh = Known::new();
    apply(&mut afresh, &again.next().await.unwrap());
    while let Ok(changes) = other.changes.try_recv() {
        apply(&mut known, &changes);
    }
    assert_eq!(afresh, known);
    engine.shutdown().await;
    assert!(again.next().await.is_none());
}
