//! From a prefill engine to a decode engine, copying what a transfer would carry.

use std::collections::BTreeMap;

use baton_kernels::KvWrite;
use baton_scheduler::batch::Numerics;
use baton_scheduler::request::Finish;

use super::super::hash_model::N_LAYERS;
use super::super::{PrefillEvent, PrefillJob, ReservedBlocks};
use super::*;

/// What one handoff did.
pub(super) struct Handed {
    pub(super) said: Said,
    pub(super) n_blocks_held: usize,
    pub(super) n_blocks_total: usize,
    /// (layer, block place) pairs, in the order they came.
    pub(super) moved: Vec<(usize, usize)>,
}

/// Pulls a prefill into writers until its first token.
pub(super) async fn pull(
    job: &mut PrefillJob,
    writers: &mut BTreeMap<usize, KvWrite>,
    moved: &mut Vec<(usize, usize)>,
) -> Result<(Token, Option<Finish>, Option<Vec<TokenLogprobs>>), Failure> {
    let mut prompt_logprobs = None;
    while let Some(timed) = job.next().await {
        match timed.event {
            PrefillEvent::Started { .. } => {}
            PrefillEvent::LayerReady { layer, blocks, reads } => {
                assert_eq!(blocks.len(), reads.len());
                for (block_idx, read) in blocks.zip(reads) {
                    assert_eq!(read.layer(), layer);
                    writers
                        .get_mut(&block_idx)
                        .unwrap()
                        .write(layer, read.key(), read.value())
                        .unwrap();
                    moved.push((layer, block_idx));
                }
            }
            PrefillEvent::PromptLogprobs(logprobs) => prompt_logprobs = Some(logprobs),
            PrefillEvent::FirstTokens(first) => {
                let (token, finish) = first.into_iter().next().unwrap();
                return Ok((token, finish, prompt_logprobs));
            }
            PrefillEvent::Failed(failure) => return Err(failure),
        }
    }
    panic!("a prefill ends with its first token or a failure");
}

pub(super) async fn hand_over(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    state: &PortableState,
) -> Result<Handed, Failure> {
    let mut reservation = decode.reserve(state.clone()).await?;
    let [context] = reservation.choices.as_mut_slice() else {
        panic!("a handoff has one context")
    };
    let n_blocks_total = context.n_blocks_total;
    let ReservedBlocks {
        n_blocks_held,
        grant,
        writers,
    } = context.layer_groups.remove(0);
    assert_eq!(writers.len(), grant.len());
    let mut writers: BTreeMap<usize, KvWrite> = (n_blocks_held..n_blocks_total).zip(writers).collect();
    let mut job = prefill.prefill(state.clone(), &[n_blocks_held])?;
    assert_eq!(job.n_blocks(), n_blocks_total);
    let mut moved = Vec::new();
    let (first, finish, prompt_logprobs) = pull(&mut job, &mut writers, &mut moved).await?;
    assert!(job.next().await.is_none());
    drop((job, writers));
    let mut said = listen(reservation.join(vec![first.clone()], Numerics::Same)?).await;
    if let Some(finish) = finish {
        assert_eq!((said.end.as_ref(), said.tokens.len()), (Some(&Ok(finish)), 0));
    }
    said.tokens.insert(0, first);
    said.prompt_logprobs = prompt_logprobs;
    Ok(Handed {
        said,
        n_blocks_held,
        n_blocks_total,
        moved,
    })
}

fn assert_each_once_in_order(handed: &Handed) {
    for layer in 0..N_LAYERS {
        let blocks: Vec<usize> = handed
            .moved
            .iter()
            .filter(|(l, _)| *l == layer)
            .map(|(_, block)| *block)
            .collect();
        assert_eq!(
            blocks,
            Vec::from_iter(handed.n_blocks_held..handed.n_blocks_total),
            "layer {layer}"
        );
    }
}

#[tokio::test]
async fn handed_over_is_as_alone() {
    let (prefill, decode) = (engine(64), engine(64));
    let tokens = prompt(1, 50);
    // Chunks of 24 tokens; the last block is partial.
    let state = warm(&tokens, 20, 1);
    let handed = hand_over(&prefill, &decode, &state).await.unwrap();
    assert_as_alone(&decode, &state, &handed.said);
    assert_each_once_in_order(&handed);
    assert_eq!((handed.n_blocks_held, handed.n_blocks_total), (0, 13));
    // The second time only the partial block travels.
    let handed = hand_over(&prefill, &decode, &state).await.unwrap();
    assert_as_alone(&decode, &state, &handed.said);
    assert_each_once_in_order(&handed);
    assert_eq!(handed.n_blocks_held, 12);
    // A fresh decode instance: what the prefill instance hits is ready at once, and all of it travels.
    let fresh = engine(64);
    let handed = hand_over(&prefill, &fresh, &state).await.unwrap();
    assert_as_alone(&fresh, &state, &handed.said);
    assert_each_once_in_order(&handed);
    assert_eq!((handed.n_blocks_held, handed.moved.len()), (0, 13 * N_LAYERS));
    assert!(prefill.load().scheduler.n_prefix_hit_tokens >= 48);
    // Whole blocks, all of them held: nothing travels but the token.
    let whole = warm(&tokens[..48], 20, 2);
    let handed = hand_over(&prefill, &decode, &whole).await.unwrap();
    assert_as_alone(&decode, &whole, &handed.said);
    assert_eq!((handed.n_blocks_held, handed.moved.len()), (12, 0));
    for engine in [&prefill, &decode, &fresh] {
        settle(engine).await;
    }
    assert_eq!(decode.load().engine.n_joined, 3);
    let n_moved = (13 + 1 + 13) * N_LAYERS as u64;
    assert_eq!(prefill.load().engine.n_layer_blocks_ready, n_moved);
}

#[tokio::test]
async fn prompt_logprobs_travel_with_the_first_token() {
    let (prefill, decode) = (engine(64), engine(64));
    let tokens = prompt(3, 15);
    let mut state = greedy(&tokens, 4);
    state.request.sampling.prompt_logprobs = Some(1);
    let handed = hand_over(&prefill, &decode, &state).await.unwrap();
    assert_as_alone(&decode, &state, &handed.said);
    assert_eq!(
        handed.said.prompt_logprobs,
        Some(hash_model::prompt_logprobs_alone(&tokens, 1))
    );
}

#[tokio::test]
async fn a_replay_is_handed_over_with_its_outputs() {
    let (prefill, decode) = (engine(64), engine(64));
    let mut state = warm(&prompt(2, 9), 24, 11);
    state.request.sampling.stop_token_ids.clear();
    let (tokens, _) = hash_model::alone(&state, 256);
    state.choices[0].output = tokens[..9].to_vec();
    let handed = hand_over(&prefill, &decode, &state).await.unwrap();
    assert_eq!(handed.n_blocks_total, 5);
    assert_as_alone(&decode, &state, &handed.said);
}

#[tokio::test]
async fn the_last_token_may_be_the_first() {
    let (prefill, decode) = (engine(64), engine(64));
    let state = greedy(&prompt(4, 6), 1);
    let handed = hand_over(&prefill, &decode, &state).await.unwrap();
    assert_eq!(handed.said.end, Some(Ok(Finish::Length)));
    settle(&decode).await;
}

#[tokio::test]
async fn a_dropped_reservation_waits_for_its_writers() {
    let decode = engine(16);
    let mut reservation = decode.reserve(greedy(&prompt(1, 14), 9)).await.unwrap();
    let mut writers = std::mem::take(&mut reservation.choices[0].layer_groups[0].writers);
    assert_eq!((writers.len(), reservation.choices[0].n_blocks_total), (4, 4));
    drop(reservation);
    let mut late = writers.pop().unwrap();
    drop(writers);
    loop {
        decode.take_prefix_events().await.unwrap();
        let ledger = decode.load().batch.ledger;
        if ledger.reserved == 0 && ledger.quarantined == 1 {
            break;
        }
    }
    let part = vec![1; decode.layout().part_bytes()];
    late.write(0, &part, &part).unwrap();
    drop(late);
    settle(&decode).await;
}

#[tokio::test]
async fn a_join_under_a_live_writer_is_refused() {
    let decode = engine(16);
    let mut reservation = decode.reserve(greedy(&prompt(1, 14), 9)).await.unwrap();
    let late = reservation.choices[0].layer_groups[0].writers.pop().unwrap();
    let first = Token {
        index: 0,
        id: 1,
        logprobs: None,
    };
    let said = listen(reservation.join(vec![first], Numerics::Same).unwrap()).await;
    assert!(matches!(said.end, Some(Err(Failure::Internal(message))) if message.contains("still being written")));
    drop(late);
    settle(&decode).await;
}

#[tokio::test]
async fn a_wrong_first_token_is_refused() {
    let decode = engine(16);
    for first in [
        Token {
            index: 1,
            id: 1,
            logprobs: None,
        },
        Token {
            index: 0,
            id: 48,
            logprobs: None,
        },
    ] {
        let reservation = decode.reserve(greedy(&prompt(1, 14), 9)).await.unwrap();
        let said = listen(reservation.join(vec![first], Numerics::Same).unwrap()).await;
        assert!(matches!(said.end, Some(Err(Failure::Internal(_)))));
    }
    settle(&decode).await;
}

#[tokio::test]
async fn a_dropped_prefill_frees_what_nobody_reads() {
    let prefill = engine(16);
    let mut job = prefill.prefill(greedy(&prompt(1, 7), 9), &[0]).unwrap();
    let mut reads = Vec::new();
    while let Some(timed) = job.next().await {
        if let PrefillEvent::LayerReady { reads: more, .. } = timed.event {
            reads.extend(more);
        }
    }
    assert_eq!(reads.len(), 2 * N_LAYERS);
    drop(job);
    loop {
        prefill.take_prefix_events().await.unwrap();
        let ledger = prefill.load().batch.ledger;
        if ledger.held == 0 {
            // The full block is cached, and the partial one waits for its readers.
            assert_eq!((ledger.cached, ledger.quarantined), (1, 1));
            break;
        }
    }
    drop(reads);
    settle(&prefill).await;
    assert_eq!(prefill.load().engine.n_cancelled, 0, "it had been finished");
}

#[tokio::test]
async fn one_new_prefix_is_computed_and_moved_once() {
    let (prefill, decode) = (engine(64), engine(64));
    let shared = prompt(1, 40);
    let states: Vec<PortableState> = (0..4)
        .map(|i| greedy(&[shared.clone(), vec![i, i + 1]].concat(), 5))
        .collect();
    let handoffs = states.iter().map(|state| hand_over(&prefill, &decode, state));
    let handed = futures::future::join_all(handoffs).await;
    let mut n_moved = 0;
    for (handed, state) in handed.into_iter().zip(&states) {
        let handed = handed.unwrap();
        assert_as_alone(&decode, state, &handed.said);
        n_moved += handed.moved.len();
    }
    // Ten shared blocks once, and a partial one of each.
    assert_eq!(n_moved, (10 + 4) * N_LAYERS);
    assert_eq!(prefill.load().scheduler.n_prefill_tokens, 40 + 4 * 2);
    assert!(decode.load().scheduler.n_deferrals >= 3);
    settle(&prefill).await;
    settle(&decode).await;
}
