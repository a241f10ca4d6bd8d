//! Embeddings: the mean of every token's hidden state, whatever else runs, and nothing kept afterwards.

use baton_scheduler::batch::{BatchConfig, PrefixCaching};

use super::super::hash_model::embedding_alone;
use super::*;

fn to_embed(prompt: &[TokenId]) -> Request {
    Request::to_embed(RequestId(9), Arc::from(prompt), 0)
}

fn prompt(n: u32, seed: u32) -> Vec<TokenId> {
    (0..n).map(|i| (i * 7 + seed * 11) % 40).collect()
}

async fn idle(engine: &EngineHandle) {
    // A command is answered between steps, after what was dropped before it has gone.
    engine.take_prefix_events().await.unwrap();
    while engine.load().n_open > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn many_at_once_in_chunks_equal_each_alone_and_leave_nothing() {
    let engine = engine(40);
    // Lengths beside the block and the step: 1, full blocks, one past, more than a step.
    let prompts: Vec<Vec<TokenId>> = [1, 4, 5, 23, 24, 25, 60].into_iter().map(|n| prompt(n, n)).collect();
    let embedded = futures::future::join_all(prompts.iter().map(|prompt| engine.embed(to_embed(prompt)))).await;
    for (prompt, embedding) in prompts.iter().zip(embedded) {
        assert_eq!(embedding.unwrap(), embedding_alone(prompt), "{} tokens", prompt.len());
    }
    idle(&engine).await;
    let load = engine.load();
    assert!(load.batch.ledger.is_whole(), "{:?}", load.batch.ledger);
    assert_eq!((load.engine.n_finished, load.engine.n_failed), (7, 0));
}

#[tokio::test]
async fn it_takes_no_hits_and_gives_some() {
    let engine = engine(40);
    let prompt = prompt(20, 1);
    let first = engine.embed(to_embed(&prompt)).await.unwrap();
    let again = engine.embed(to_embed(&prompt)).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(engine.load().scheduler.n_prefix_hit_tokens, 0);
    let mut generation = engine.generate(greedy(&prompt, 2)).unwrap();
    while generation.next().await.is_some() {}
    // All full blocks but that of the last token.
    assert_eq!(engine.load().scheduler.n_prefix_hit_tokens, 16);
}

#[tokio::test]
async fn a_preempted_one_begins_again() {
    let config = BatchConfig {
        prefix_caching: PrefixCaching::Off,
        max_batch_tokens: 8,
        ..batch_config(16)
    };
    let (gate, permits) = channel::bounded(0);
    let model = model(16).gated(permits);
    let engine = start(model, EngineConfig::new(config)).unwrap();
    // Two that grow while the youngest still computes, and need its blocks: 9 of the 16, until the second grows again.
    let generations: Vec<Generation> = (0..2)
        .map(|i| engine.generate(greedy(&prompt(8, i), 20)).unwrap())
        .collect();
    let long = prompt(36, 4);
    let mut embedding = Box::pin(engine.embed(to_embed(&long)));
    assert!(futures::poll!(&mut embedding).is_pending());
    drop(gate);
    assert_eq!(embedding.await.unwrap(), embedding_alone(&long));
    assert!(engine.load().scheduler.n_preemptions > 0, "nothing was preempted");
    drop(generations);
    idle(&engine).await;
    assert!(engine.load().batch.ledger.is_whole());
}

#[tokio::test]
async fn the_longest_is_taken_and_what_can_never_run_is_refused() {
    let engine = engine(8);
    let longest = prompt(32, 1);
    assert_eq!(
        engine.embed(to_embed(&longest)).await.unwrap(),
        embedding_alone(&longest)
    );
    for (ids, words) in [
        (prompt(33, 1), "the input has 33 tokens, expected 1 to 32"),
        (vec![], "the input has 0 tokens"),
        (vec![48], "token id 48, expected less than 48"),
    ] {
        match engine.embed(to_embed(&ids)).await {
            Err(Failure::Invalid(message)) => assert!(message.contains(words), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_broken_step_and_a_poisoned_row_fail_it_and_its_blocks_are_not_cached() {
    let engine = engine(40);
    for (bad, words) in [
        (BROKEN, "a step failed"),
        (POISON, "hidden state of token 4 is not finite"),
    ] {
        let ids = [1, 2, 3, 4, bad, 6, 7, 8];
        match engine.embed(to_embed(&ids)).await {
            Err(Failure::Internal(message)) => assert!(message.contains(words), "{message}"),
            other => panic!("{other:?}"),
        }
    }
    idle(&engine).await;
    assert!(engine.take_prefix_events().await.unwrap().is_empty());
    assert!(engine.load().batch.ledger.is_whole());
}

#[tokio::test]
async fn dropped_it_is_cancelled_and_shut_down_it_fails() {
    let (gate, permits) = channel::bounded(0);
    let engine = engine_of(model(40).gated(permits), 40);
    let long = prompt(60, 1);
    let mut dropped = Box::pin(engine.embed(to_embed(&long)));
    assert!(futures::poll!(&mut dropped).is_pending());
    gate.send(()).unwrap();
    drop(dropped);
    let mut lost = Box::pin(engine.embed(to_embed(&long)));
    assert!(futures::poll!(&mut lost).is_pending());
    gate.send(()).unwrap();
    drop(gate);
    while engine.load().engine.n_cancelled == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(lost.await.unwrap(), embedding_alone(&long));
    engine.shutdown().await;
    assert!(engine.embed(to_embed(&long)).await.is_err());
}
