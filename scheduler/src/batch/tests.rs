//! The batch scheduler against a world whose KV memory holds plain token ids: a wrong block gives a wrong token.

mod flight;
mod groups;
mod layer_groups;
mod property;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::ids::BlockId;
use crate::prefix_cache::PrefixEvent;
use crate::request::{ChoiceState, Finish};
use world::{World, alone, choice_state, config, lively, next_token, prompt, replay, state, state_of};

#[test]
fn decodes_come_first_and_prefills_in_chunks() {
    let mut world = World::new(config(64));
    let first = lively(0, 3, 8);
    let a = world.local(&first, 8);
    assert_eq!(
        world.step().items,
        [BatchItem {
            sequence: a,
            start_pos: 0,
            n_tokens: 3,
            samples: Samples::Token
        }]
    );
    let long = prompt(90, 20);
    let b = world.local(&long, 2);
    let decode = |pos| BatchItem {
        sequence: a,
        start_pos: pos,
        n_tokens: 1,
        samples: Samples::Token,
    };
    let chunk = |pos, n_tokens, samples| BatchItem {
        sequence: b,
        start_pos: pos,
        n_tokens,
        samples,
    };
    assert_eq!(world.step().items, [decode(3), chunk(0, 7, Samples::Nothing)]);
    assert_eq!(world.step().items, [decode(4), chunk(7, 7, Samples::Nothing)]);
    assert_eq!(world.step().items, [decode(5), chunk(14, 6, Samples::Token)]);
    world.run();
    world.assert_as_alone(a, &first, 8);
    world.assert_as_alone(b, &long, 2);
}

#[test]
fn a_new_prefix_is_computed_once() {
    let mut world = World::new(BatchConfig {
        max_batch_tokens: 64,
        ..config(64)
    });
    let shared = prompt(1, 16);
    let prompts: Vec<Vec<TokenId>> = (0..3).map(|i| [shared.clone(), vec![i, i + 1]].concat()).collect();
    let ids: Vec<SequenceId> = prompts.iter().map(|prompt| world.local(prompt, 1)).collect();
    assert_eq!(world.step().items.len(), 1, "the others wait for the first");
    world.run();
    assert_eq!(world.n_computed, 18 + 2 + 2);
    assert_eq!(world.scheduler.counters().n_prefix_hit_tokens, 32);
    assert_eq!(world.scheduler.counters().n_deferrals, 2);
    ids.iter()
        .zip(&prompts)
        .for_each(|(&id, prompt)| world.assert_as_alone(id, prompt, 1));
}

#[test]
fn a_cancelled_prefix_is_taken_over() {
    let mut world = World::new(config(64));
    let shared = prompt(1, 20);
    let a = world.local(&shared, 1);
    let b = world.local(&shared, 1);
    world.step();
    world.remove(a);
    let batch = world.step();
    // The first chunk of 8 tokens was computed, and is hit.
    assert_eq!(
        batch.started,
        [Started {
            sequence: b,
            n_hit_tokens: 8
        }]
    );
    world.run();
    world.assert_as_alone(b, &shared, 1);
}

#[test]
fn the_last_token_is_always_computed() {
    let mut world = World::new(config(64));
    let whole_blocks = prompt(1, 16);
    world.local(&whole_blocks, 1);
    world.run();
    let again = world.local(&whole_blocks, 1);
    assert_eq!(
        world.step().started,
        [Started {
            sequence: again,
            n_hit_tokens: 12
        }]
    );
    world.assert_as_alone(again, &whole_blocks, 1);
}

#[test]
fn prompt_logprobs_take_no_hit_and_small_chunks() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 12);
    world.local(&tokens, 1);
    world.run();
    let mut state = state(&tokens, 1);
    state.request.sampling.prompt_logprobs = Some(0);
    let id = world.submit(&state, SequenceKind::Local);
    let batch = world.step();
    assert_eq!(
        batch.started,
        [Started {
            sequence: id,
            n_hit_tokens: 0
        }]
    );
    assert_eq!(batch.items[0].n_tokens, 5);
    assert!(world.scheduler.wants_prompt_logits(id));
    world.run();
    world.assert_as_alone(id, &tokens, 1);
}

#[test]
fn the_youngest_is_preempted_and_loses_nothing() {
    let mut world = World::new(BatchConfig {
        prefix_caching: PrefixCaching::Off,
        ..config(8)
    });
    let (old, young) = (lively(0, 9, 20), lively(300, 9, 12));
    let a = world.local(&old, 20);
    let b = world.local(&young, 12);
    let mut preempted = Vec::new();
    for _ in 0..100 {
        preempted.extend(world.step().preempted);
    }
    world.run();
    assert!(
        !preempted.is_empty() && preempted.iter().all(|&id| id == b),
        "preempted: {preempted:?}"
    );
    world.assert_as_alone(a, &old, 20);
    world.assert_as_alone(b, &young, 12);
}

#[test]
fn a_preempted_sequence_has_everything_left_to_compute() {
    let mut world = World::new(BatchConfig {
        prefix_caching: PrefixCaching::Off,
        ..config(5)
    });
    let old = lively(0, 7, 12);
    let a = world.local(&old, 12);
    let b = world.local(&lively(300, 6, 12), 12);
    while world.step().preempted.is_empty() {}
    assert_eq!(world.scheduler.phase(b), Some(Phase::Waiting));
    assert_eq!(
        world.scheduler.load().n_pending_prefill_tokens,
        world.scheduler.tokens(b).len()
    );
    world.run();
    world.assert_as_alone(a, &old, 12);
}

#[test]
fn a_newcomer_leaves_the_running_room_to_grow() {
    let mut world = World::new(config(6));
    let running = world.local(&lively(0, 6, 3), 3);
    world.step();
    let newcomer = world.local(&prompt(60, 15), 1);
    assert_eq!(world.scheduler.ledger().free, 4, "it would just fit");
    assert!(world.step().started.is_empty());
    let started = loop {
        let batch = world.step();
        if let [started] = batch.started[..] {
            break started;
        }
    };
    assert_eq!(started.sequence, newcomer);
    assert!(world.finished.contains_key(&running));
    assert_eq!(world.scheduler.counters().n_preemptions, 0);
    world.run();
}

#[test]
fn a_preempted_prefill_gives_its_promises_up() {
    let mut world = World::new(BatchConfig {
        max_num_seqs: 2,
        max_batch_tokens: 2,
        ..config(8)
    });
    let old = lively(0, 3, 20);
    let a = world.local(&old, 20);
    world.step();
    world.step();
    let b = world.local(&prompt(60, 16), 1);
    while world.step().preempted.is_empty() {}
    assert!(world.scheduler.tokens(b).len() == 16, "it was still being prefilled");
    assert_eq!(world.scheduler.cache.n_in_flight(), 0);
    world.run();
    world.assert_as_alone(a, &old, 20);
    world.assert_as_alone(b, &prompt(60, 16), 1);
}

#[test]
fn of_a_cached_sequence_the_end_is_evicted_first() {
    let mut world = World::new(config(6));
    let tokens = prompt(1, 17);
    world.local(&tokens, 1);
    world.run();
    assert_eq!(world.scheduler.ledger().cached, 4);
    // Two blocks are free, so that three evict one.
    world.local(&prompt(30, 9), 1);
    world.run();
    let again = world.local(&tokens, 1);
    assert_eq!(
        world.step().started,
        [Started {
            sequence: again,
            n_hit_tokens: 12
        }]
    );
}

#[test]
fn a_replay_goes_on_where_it_was() {
    let mut world = World::new(config(64));
    let tokens = lively(0, 6, 9);
    let expected = alone(&tokens, 9, 1000);
    let id = world.submit(&replay(&tokens, 9, &expected[..4]), SequenceKind::Local);
    world.run();
    assert_eq!(world.outputs[&id], expected);
}

#[test]
fn a_handoff_holds_its_blocks_until_it_is_released() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 10);
    let id = world.submit(&state(&tokens, 5), SequenceKind::PrefillForHandoff);
    world.step();
    world.step();
    assert_eq!(world.scheduler.phase(id), Some(Phase::HandingOver));
    assert_eq!(world.outputs[&id], [next_token(&tokens)]);
    assert!(world.step().items.is_empty());
    assert_eq!(world.scheduler.load().ledger.held, 3);
    // The last block is partial, so not cached, and a transfer still reads it.
    world.pins.insert(BlockId(world.scheduler.block_tables(id)[0][2]));
    world.remove(id);
    let ledger = world.scheduler.load().ledger;
    assert_eq!((ledger.held, ledger.cached, ledger.quarantined), (0, 2, 1));
    world.pins.clear();
    world.step();
    assert!(world.scheduler.load().ledger.is_whole());
}

/// Blocks held of the first layer group.
fn n_held(grant: &Grant) -> usize {
    grant.layer_groups[0].n_blocks_held
}

#[test]
fn a_reservation_takes_its_context_and_one_block() {
    let mut world = World::new(config(6));
    let tokens = lively(0, 8, 6);
    let id = world.reserved(&tokens, 6);
    let grant = world.scheduler.grant(world.group(id));
    assert_eq!(
        (grant.n_blocks_total, n_held(&grant), grant.blocks().count()),
        (2, 0, 2)
    );
    assert_eq!(world.scheduler.load().ledger.reserved, 3);
    let other = prompt(9, 13);
    assert!(matches!(world.reserve(&state(&other, 6)), Err(Failure::Busy(_))));
    world.join(id, Numerics::Same);
    world.run();
    world.assert_as_alone(id, &tokens, 6);
    // What was received is a hit now, whole blocks and all of them: the last token is computed elsewhere.
    let again = world.reserved(&tokens, 6);
    let grant = world.scheduler.grant(world.group(again));
    assert_eq!((grant.n_blocks_total, n_held(&grant)), (2, 2));
    world.join(again, Numerics::Same);
    world.run();
    world.assert_as_alone(again, &tokens, 6);
}

#[test]
fn a_reservation_for_one_token_needs_no_block_to_grow() {
    let mut world = World::new(config(2));
    let id = world.reserved(&prompt(1, 7), 1);
    assert_eq!(world.scheduler.load().ledger.reserved, 2);
    world.join(id, Numerics::Same);
    assert_eq!(world.finished[&id], world.finished[&id]);
    assert!(world.scheduler.is_empty());
}

const WINDOW: SlidingWindow = SlidingWindow {
    n_tokens: 6,
    grain: 2,
    slack: 1,
};

/// Blocks of four, so of 30 tokens the last query sees those from 24 on.
#[test]
fn blocks_that_no_query_sees_are_given_up() {
    let mut world = World::new(BatchConfig {
        windows: vec![Some(WINDOW)],
        ..config(64)
    });
    let tokens = lively(0, 14, 16);
    let id = world.local(&tokens, 16);
    let mut most_held = 0;
    while world.scheduler.phase(id).is_some() {
        world.step();
        if world
            .scheduler
            .sequences
            .get(&id)
            .is_some_and(|sequence| sequence.tokens.len() > 20)
        {
            most_held = most_held.max(world.scheduler.load().ledger.held);
        }
    }
    assert_eq!(most_held, 3, "six tokens and one of slack lie in three blocks at most");
    assert_eq!(world.n_released, 5);
    world.assert_as_alone(id, &tokens, 16);
    // What was given up is in the prefix cache until it is needed elsewhere.
    let ledger = world.scheduler.load().ledger;
    assert_eq!((ledger.held, ledger.cached), (0, 7));
}

#[test]
fn what_no_query_will_see_is_not_asked_for() {
    let window = BatchConfig {
        windows: vec![Some(WINDOW)],
        ..config(64)
    };
    let mut world = World::new(window.clone());
    let tokens = lively(0, 22, 6);
    let id = world.reserved(&tokens, 6);
    let grant = world.scheduler.grant(world.group(id));
    // The first query, at 22, sees tokens from 17 on, in block 4.
    assert_eq!(
        (grant.n_blocks_total, n_held(&grant), grant.blocks().count()),
        (6, 4, 2)
    );
    // And one to grow into.
    assert_eq!(world.scheduler.load().ledger.reserved, 3);
    world.join(id, Numerics::Same);
    world.run();
    world.assert_as_alone(id, &tokens, 6);
    // Nor by a move; and a source that has given more up says so instead of sending something else.
    let mut source = World::new(window);
    let running = source.local(&tokens, 6);
    source.step();
    source.step();
    source.step();
    let computed = source.scheduler.computed_blocks(running, 0);
    assert_eq!((computed.first, computed.end()), (4, 6));
    assert_eq!(computed.get(4..6).map(<[_]>::len), Some(2));
    assert_eq!(computed.get(6..6).map(<[_]>::len), Some(0));
    assert_eq!(computed.get(3..6), None);
}

#[test]
fn a_prefix_is_received_once() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 14);
    let first = world.reserved(&tokens, 4);
    let Ok(ReserveOutcome::Deferred(group)) = world.reserve(&state(&tokens, 4)) else {
        panic!("not deferred")
    };
    let second = group.sequence(0);
    let local = world.local(&tokens, 4);
    assert_eq!(world.step(), Batch::default(), "both wait for the first");
    world.join(first, Numerics::Same);
    let batch = world.step();
    assert_eq!(batch.granted, [group]);
    assert_eq!(
        batch.started,
        [Started {
            sequence: local,
            n_hit_tokens: 12
        }]
    );
    assert_eq!(n_held(&world.scheduler.grant(group)), 3);
    world.join(second, Numerics::Same);
    world.run();
    [first, second, local]
        .into_iter()
        .for_each(|id| world.assert_as_alone(id, &tokens, 4));
}

#[test]
fn a_prefill_does_not_wait_for_another_instance() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 14);
    let reserved = world.reserved(&tokens, 4);
    let prefill = world.submit(&state(&tokens, 4), SequenceKind::PrefillForHandoff);
    assert_eq!(
        world.step().started,
        [Started {
            sequence: prefill,
            n_hit_tokens: 0
        }]
    );
    world.step();
    // The same blocks arrive a second time; one copy is kept.
    world.join(reserved, Numerics::Same);
    assert_eq!(
        world.scheduler.block_tables(reserved)[0][..3],
        world.scheduler.block_tables(prefill)[0][..3]
    );
    world.remove(prefill);
    world.run();
    world.assert_as_alone(reserved, &tokens, 4);
}

#[test]
fn waiting_for_a_prefix_has_a_bound() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 14);
    let never_joined = world.reserved(&tokens, 4);
    let local = world.local(&tokens, 4);
    let Ok(ReserveOutcome::Deferred(reservation)) = world.reserve(&state(&tokens, 4)) else {
        panic!("not deferred")
    };
    for _ in 0..19 {
        assert!(world.step().started.is_empty());
    }
    let batch = world.step();
    assert_eq!((batch.granted, batch.started.len()), (vec![reservation], 0));
    assert_eq!(
        world.step().started,
        [Started {
            sequence: local,
            n_hit_tokens: 0
        }]
    );
    world.remove(never_joined);
    world.remove_group(reservation);
    world.run();
    world.assert_as_alone(local, &tokens, 4);
}

#[test]
fn kv_of_another_class_stays_with_its_sequence() {
    let mut world = World::new(config(64));
    let tokens = lively(0, 8, 9);
    let id = world.reserved(&tokens, 9);
    world.join(id, Numerics::Other);
    assert_eq!(
        world.scheduler.cache.n_in_flight(),
        0,
        "nobody waits for what will not come"
    );
    world.run();
    world.assert_as_alone(id, &tokens, 9);
    assert_eq!(world.scheduler.prefix_snapshot(), [PrefixEvent::Cleared]);
    assert_eq!(world.scheduler.load().ledger.cached, 0);
}

#[test]
fn a_stalled_line_gives_up() {
    let mut world = World::new(config(4));
    let reserved = world.reserved(&prompt(1, 12), 3);
    let waiting = world.local(&prompt(50, 9), 3);
    for _ in 0..50 {
        world.step();
    }
    assert!(world.refused.is_empty());
    assert!(
        matches!(world.reserve(&state(&prompt(70, 1), 1)), Err(Failure::Busy(_))),
        "it would overtake"
    );
    world.step();
    assert_eq!(world.refused, BTreeSet::from([GroupId(waiting.0)]));
    world.remove(reserved);
    world.run();
}

#[test]
fn what_can_never_run_is_refused() {
    let mut world = World::new(config(4));
    let mut refuse = |state: &PortableState| match world.scheduler.submit(state, SequenceKind::PrefillForHandoff) {
        Err(Failure::Invalid(message)) => message,
        other => panic!("not refused: {other:?}"),
    };
    assert_eq!(refuse(&state(&[], 1)), "the prompt has 0 tokens, expected at least 1");
    assert_eq!(
        refuse(&state(&prompt(1, 16), 1)),
        "the prompt has 16 tokens, expected at most 15"
    );
    assert_eq!(refuse(&state(&[1], 0)), "max_tokens is 0, expected at least 1");
    assert_eq!(
        refuse(&replay(&[1], 2, &[3, 4])),
        "the choice has ended after 2 tokens, expected one that goes on"
    );
    let two = PortableState {
        choices: vec![ChoiceState::default(); 2],
        ..state(&[1], 1)
    };
    assert_eq!(refuse(&two), "2 choices, expected 1");
    assert_eq!(refuse(&state_of(&[1], 1, 5)), "n is 5, expected 1 to 4 (max_num_seqs)");
    let mut penalised = state(&[1], 1);
    penalised.request.sampling.repetition_penalty = 0.0;
    assert_eq!(refuse(&penalised), "repetition_penalty is 0, expected more than 0");
    penalised.request.sampling.presence_penalty = f32::NAN;
    assert_eq!(refuse(&penalised), "presence_penalty is NaN, expected a finite number");
    assert_eq!(refuse(&state_of(&[1], 1, 0)), "n is 0, expected 1 to 4 (max_num_seqs)");
    assert_eq!(
        refuse(&replay(&[1], 2, &[3, 4, 5])),
        "a choice has 3 tokens, expected at most 2"
    );
    let begun = PortableState {
        choices: vec![choice_state(&[3], 9), ChoiceState::default()],
        ..state_of(&[1], 9, 2)
    };
    assert_eq!(refuse(&begun), "2 choices have begun, expected none for a handoff");
}

#[test]
fn limits_that_cannot_work_are_refused() {
    let message = |config: BatchConfig| BatchScheduler::new(config).unwrap_err().to_string();
    assert_eq!(
        message(BatchConfig {
            max_num_seqs: 0,
            ..config(4)
        }),
        "max_num_seqs is 0, expected at least 1"
    );
    assert_eq!(
        message(BatchConfig {
            max_num_seqs: 9,
            ..config(4)
        }),
        "max_batch_tokens is 8, expected at least max_num_seqs (9)"
    );
    assert_eq!(
        message(BatchConfig {
            max_model_len: 17,
            ..config(4)
        }),
        "the KV cache has room for 16 tokens, expected at least max_model_len (17)"
    );
}
