//! Several choices of one request: forked, preempted, replayed, paused, moved.

use super::world::{BLOCK_SIZE, STOP, alone_choice};
use super::*;

/// A prompt whose first `n` choices have at least `n_output` tokens each.
pub(super) fn lively_choices(n_prompt: usize, n: u32, n_output: usize) -> Vec<TokenId> {
    let is_lively = |prompt: &Vec<TokenId>| {
        let lens = (0..n).map(|choice| alone_choice(prompt, choice, n_output as u32, 1000).len());
        lens.min() == Some(n_output)
    };
    (0..5000)
        .map(|seed| {
            let hashed = |i: u32| (seed * 7919 + i * 104_729 + seed / 50 * i) % world::N_VOCAB;
            (0..n_prompt as u32).map(hashed).collect()
        })
        .find(is_lively)
        .expect("one of many prompts is lively")
}

#[test]
fn one_prefill_serves_all_choices_and_full_blocks_are_shared() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 4, 6);
    let group = world.submit_group(&state_of(&tokens, 6, 4), SequenceKind::Local);
    assert_eq!(world.scheduler.load().n_waiting, 4);
    while world.scheduler.members(group).len() == 1 {
        world.step();
    }
    assert_eq!(world.n_computed, 10, "the prompt once");
    let ledger = world.scheduler.ledger();
    // Two full blocks of the prompt, counted once, and a third one for each choice.
    assert_eq!((ledger.held, ledger.reserved), (2 + 4, 0));
    let tables: Vec<&[u32]> = world
        .scheduler
        .members(group)
        .into_iter()
        .map(|id| &world.scheduler.block_tables(id)[0][..])
        .collect();
    assert!(tables.iter().all(|table| table[..2] == tables[0][..2]));
    let last: BTreeSet<u32> = tables.iter().map(|table| table[2]).collect();
    assert_eq!(last.len(), 4);
    world.run();
    world.assert_choices_as_alone(group, &tokens, 6, 4);
}

#[test]
fn whole_blocks_are_not_copied() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(8, 3, 5);
    let group = world.submit_group(&state_of(&tokens, 5, 3), SequenceKind::Local);
    while world.scheduler.members(group).len() == 1 {
        world.step();
    }
    assert_eq!(world.scheduler.ledger().held, 2);
    world.run();
    world.assert_choices_as_alone(group, &tokens, 5, 3);
}

#[test]
fn choices_without_a_block_of_their_own_recompute() {
    // The prompt fills the pool but for one block.
    let mut world = World::new(BatchConfig {
        prefix_caching: PrefixCaching::Off,
        ..config(6)
    });
    let tokens = lively_choices(17, 3, 4);
    let group = world.submit_group(&state_of(&tokens, 4, 3), SequenceKind::Local);
    while world.scheduler.members(group).len() == 1 {
        world.step();
    }
    assert!(world.scheduler.counters().n_preemptions >= 1);
    assert_eq!(world.scheduler.phase(group.sequence(2)), Some(Phase::Waiting));
    world.run();
    world.assert_choices_as_alone(group, &tokens, 4, 3);
}

#[test]
fn a_group_waits_for_places_for_all_its_choices() {
    let mut world = World::new(config(64));
    let long = lively(0, 5, 12);
    let a = world.local(&long, 12);
    world.step();
    let tokens = lively_choices(6, 4, 3);
    let group = world.submit_group(&state_of(&tokens, 3, 4), SequenceKind::Local);
    while !world.finished.contains_key(&a) {
        assert_eq!(world.scheduler.phase(group.sequence(0)), Some(Phase::Waiting));
        world.step();
    }
    world.run();
    world.assert_as_alone(a, &long, 12);
    world.assert_choices_as_alone(group, &tokens, 3, 4);
}

#[test]
fn a_reserved_group_has_a_block_for_each_choice() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 3, 6);
    let Ok(ReserveOutcome::Granted(group)) = world.reserve(&state_of(&tokens, 6, 3)) else {
        panic!("not granted")
    };
    let grant = world.scheduler.grant(group);
    assert_eq!((grant.n_blocks_total, grant.layer_groups[0].n_blocks_held), (3, 0));
    // The context, one to grow into, and a copy of the last one for each of the others.
    assert_eq!(world.scheduler.ledger().reserved, 3 + 1 + 2);
    assert_eq!(world.scheduler.load().n_reserved, 3);
    world.join(group.sequence(0), Numerics::Same);
    assert_eq!(world.scheduler.ledger().held, 3 + 1 + 2);
    assert_eq!(world.scheduler.counters().n_preemptions, 0);
    world.run();
    world.assert_choices_as_alone(group, &tokens, 6, 3);
}

#[test]
fn a_handoff_samples_all_first_tokens() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 10);
    let group = world.submit_group(&state_of(&tokens, 5, 3), SequenceKind::PrefillForHandoff);
    while world.scheduler.phase(group.sequence(0)) != Some(Phase::HandingOver) {
        world.step();
    }
    for choice in 0..3 {
        assert_eq!(
            world.outputs[&group.sequence(choice)],
            alone_choice(&tokens, choice, 1, 1000)
        );
    }
    world.remove_group(group);
    world.run();
}

#[test]
fn a_replayed_group_goes_on_from_every_choice() {
    let tokens = lively_choices(7, 3, 9);
    let outputs: Vec<Vec<TokenId>> = (0..3).map(|choice| alone_choice(&tokens, choice, 9, 1000)).collect();
    for lens in [[1, 1, 1], [3, 0, 9], [9, 9, 2], [8, 9, 8], [9, 9, 9]] {
        let mut world = World::new(config(64));
        let mut state = state_of(&tokens, 9, 3);
        for (choice, n_known) in lens.into_iter().enumerate() {
            state.choices[choice] = choice_state(&outputs[choice][..n_known], 9);
        }
        let group = world.submit_group(&state, SequenceKind::Local);
        let n_unfinished = lens.iter().filter(|&&n| n < 9).count();
        assert_eq!(world.scheduler.members(group).len(), n_unfinished);
        world.run();
        world.assert_choices_as_alone(group, &tokens, 9, 3);
    }
}

#[test]
fn a_paused_group_keeps_all_it_has_and_its_tokens() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 2, 8);
    let group = world.submit_group(&state_of(&tokens, 8, 2), SequenceKind::Local);
    assert!(
        matches!(world.scheduler.pause(group), Err(Failure::Busy(_))),
        "it has no token"
    );
    while world.scheduler.check_movable(group).is_err() {
        world.step();
    }
    world.step();
    world.scheduler.pause(group).unwrap();
    let (before, held) = (world.outputs.clone(), world.scheduler.ledger().held);
    let other = lively(0, 5, 6);
    let b = world.local(&other, 6);
    for _ in 0..3 {
        world.step();
    }
    assert_eq!(world.outputs[&group.sequence(0)], before[&group.sequence(0)]);
    let load = world.scheduler.load();
    assert_eq!((load.n_paused, load.n_running), (2, 3));
    assert_eq!(world.scheduler.ledger().held, held + 2);
    assert_eq!(world.resume(group), Resumed::default());
    world.run();
    world.assert_choices_as_alone(group, &tokens, 8, 2);
    world.assert_as_alone(b, &other, 6);
}

#[test]
fn what_is_still_read_is_copied_at_the_resumption() {
    for n_blocks in [64, 5] {
        let mut world = World::new(BatchConfig {
            prefix_caching: PrefixCaching::Off,
            ..config(n_blocks)
        });
        let tokens = lively_choices(10, 2, 8);
        let group = world.submit_group(&state_of(&tokens, 8, 2), SequenceKind::Local);
        while world.scheduler.check_movable(group).is_err() {
            world.step();
        }
        world.scheduler.pause(group).unwrap();
        for id in world.scheduler.members(group) {
            let blocks = world.scheduler.computed_blocks(id, 0);
            world.pins.extend(blocks.blocks.iter().map(|(block, _)| *block));
        }
        let resumed = world.resume(group);
        if n_blocks == 64 {
            assert_eq!((resumed.copies.len(), resumed.preempted.len()), (2, 0));
            assert_eq!(world.scheduler.ledger().quarantined, 2);
        } else {
            // Two blocks of the prompt and two copies: one is left for the two of them.
            assert_eq!((resumed.copies.len(), resumed.preempted.len()), (1, 1));
        }
        for _ in 0..2 {
            world.step();
        }
        world.pins.clear();
        world.run();
        world.assert_choices_as_alone(group, &tokens, 8, 2);
    }
}

#[test]
fn a_cancelled_pause_frees_everything() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 2, 8);
    let group = world.submit_group(&state_of(&tokens, 8, 2), SequenceKind::Local);
    while world.scheduler.pause(group).is_err() {
        world.step();
    }
    world.remove_group(group);
    world.run();
}

#[test]
fn a_moved_group_receives_its_prompt_once() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 3, 20);
    let outputs: Vec<Vec<TokenId>> = (0..3).map(|choice| alone_choice(&tokens, choice, 20, 1000)).collect();
    let after = |lens: [usize; 3]| -> Vec<ChoiceState> {
        let parts = lens.iter().zip(&outputs);
        parts.map(|(&n, output)| choice_state(&output[..n], 20)).collect()
    };
    let state = PortableState {
        choices: after([20, 4, 7]),
        ..state_of(&tokens, 20, 3)
    };
    let group = world.reserve_moved(&state, &MoveRoom::slack(2)).unwrap();
    let grants = world.scheduler.grants_moved(group, 3);
    let shape = |grant: &Grant| {
        let n_held = grant.layer_groups[0].n_blocks_held;
        (n_held, grant.n_blocks_total, grant.blocks().count())
    };
    // The finished one; 13 tokens and two blocks more; 16 tokens and two blocks more, of which two are the prompt's.
    assert_eq!(
        grants.iter().map(shape).collect::<Vec<_>>(),
        [(2, 2, 0), (0, 6, 6), (2, 6, 4)]
    );
    assert_eq!(world.scheduler.ledger().reserved, 10);
    assert_eq!(world.scheduler.load().n_reserved, 2);
    // The one that was to bring the prompt has ended on the way.
    world.join_moved(group, &tokens, &after([20, 20, 9]));
    assert_eq!(world.scheduler.members(group), [group.sequence(2)]);
    assert_eq!(world.scheduler.ledger().held, 6);
    world.run();
    world.assert_choices_as_alone(group, &tokens, 20, 3);

    // Another takes what the cache has now, and waits for nobody.
    let again = world.reserve_moved(&state, &MoveRoom::slack(0)).unwrap();
    let grants = world.scheduler.grants_moved(again, 3);
    assert_eq!(shape(&grants[2]), (4, 4, 0), "all of its 16 tokens are here");
    world.join_moved(again, &tokens, &state.choices);
    world.run();
    world.assert_choices_as_alone(again, &tokens, 20, 3);
}

#[test]
fn room_is_reserved_from_where_the_source_is() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(10, 2, 24);
    let outputs: Vec<Vec<TokenId>> = (0..2).map(|choice| alone_choice(&tokens, choice, 24, 1000)).collect();
    let after =
        |n: usize| -> Vec<ChoiceState> { outputs.iter().map(|output| choice_state(&output[..n], 24)).collect() };
    let state = PortableState {
        choices: after(2),
        ..state_of(&tokens, 24, 2)
    };
    // Of 11 tokens known, or the 33 most that there can be, blocks of four and one more; the second's come on top of 10 others.
    let totals = [(vec![], 4), (vec![13, 14], 7), (vec![usize::MAX], 9)];
    for (n_ahead, n_blocks_total) in totals {
        let room = MoveRoom {
            n_ahead,
            n_slack_blocks: 1,
        };
        let group = world.reserve_moved(&state, &room).unwrap();
        assert_eq!(
            world.scheduler.grants_moved(group, 2)[0].n_blocks_total,
            n_blocks_total,
            "{room:?}"
        );
        if n_blocks_total == 7 {
            world.join_moved(group, &tokens, &after(18));
            world.run();
            world.assert_choices_as_alone(group, &tokens, 24, 2);
        } else {
            world.remove_group(group);
        }
    }
}

#[test]
fn what_cannot_have_been_moved_is_refused() {
    let mut world = World::new(config(64));
    let tokens = lively_choices(5, 2, 20);
    let outputs: Vec<Vec<TokenId>> = (0..2).map(|choice| alone_choice(&tokens, choice, 20, 1000)).collect();
    let fresh = state_of(&tokens, 20, 2);
    let refused = world.reserve_moved(&fresh, &MoveRoom::slack(1)).unwrap_err();
    let message = "choice 0 has no token yet, expected at least 1 for a move";
    assert_eq!(refused, Failure::Invalid(message.to_owned()));
    let after =
        |n: usize| -> Vec<ChoiceState> { outputs.iter().map(|output| choice_state(&output[..n], 20)).collect() };
    let state = PortableState {
        choices: after(4),
        ..fresh
    };
    let group = world.reserve_moved(&state, &MoveRoom::slack(1)).unwrap();
    let mut refuse =
        |outputs: &[ChoiceState]| match world.scheduler.join_moved(group, outputs, Numerics::Same, &|_| false) {
            Err(Failure::InstanceLost(message)) => message,
            other => panic!("not refused: {other:?}"),
        };
    assert_eq!(refuse(&after(4)[..1]), "1 choices have come, expected more than 1");
    assert_eq!(refuse(&after(3)), "choice 0 does not continue the 4 tokens known");
    assert_eq!(refuse(&after(9)), "choice 0 has outgrown its 3 blocks");
    let mut wrong = after(6);
    wrong[1].output[2].id ^= 1;
    assert_eq!(refuse(&wrong), "choice 1 does not continue the 4 tokens known");
    assert_eq!(world.scheduler.phase(group.sequence(0)), Some(Phase::Reserved));
    world.join_moved(group, &tokens, &after(8));
    world.run();
    world.assert_choices_as_alone(group, &tokens, 20, 2);
}

#[test]
fn an_end_that_was_not_heard_is_an_end() {
    let config = config(64);
    let state = |output: &[TokenId]| replay(&[1, 2], 3, output);
    assert_eq!(config.finish_of(&state(&[4, STOP]), 0), Some(Finish::Stop(STOP)));
    assert_eq!(config.finish_of(&state(&[4, 5, 6]), 0), Some(Finish::Length));
    assert_eq!(config.finish_of(&state(&[4, 5]), 0), None);
    let short = BatchConfig {
        max_model_len: BLOCK_SIZE,
        ..config
    };
    assert_eq!(short.finish_of(&state(&[4, 5]), 0), Some(Finish::Length));
    let mut world = World::new(short);
    let group = world.submit_group(&state(&[4, 5]), SequenceKind::Local);
    assert!(world.scheduler.members(group).is_empty());
}
