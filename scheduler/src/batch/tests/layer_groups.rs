//! Windowed layers beside full ones: each group of layers has its own blocks, and only the windowed ones give theirs up.

use super::groups::lively_choices;
use super::world::{BLOCK_SIZE, alone_choice, state_of};
use super::*;

const WINDOW: SlidingWindow = SlidingWindow {
    n_tokens: 6,
    grain: 2,
    slack: 1,
};

/// A full group and two windowed ones.
fn mixed(n_blocks: usize) -> BatchConfig {
    BatchConfig {
        windows: vec![None, Some(WINDOW), Some(WINDOW)],
        max_model_len: 200,
        ..config(n_blocks)
    }
}

#[test]
fn windowed_groups_hold_a_bounded_number_of_blocks() {
    let mut world = World::new(mixed(200));
    let tokens = lively(0, 60, 60);
    let id = world.local(&tokens, 60);
    let most = world.scheduler.config().most_blocks(1).unwrap();
    while let Some(sequence) = world.scheduler.sequences.get(&id) {
        let n_blocks = sequence.tokens.len().div_ceil(BLOCK_SIZE);
        assert!(world.scheduler.ledger().held <= n_blocks + 2 * most);
        world.step();
        if world.scheduler.phase(id).is_some() && !world.outputs[&id].is_empty() {
            let sequence = &world.scheduler.sequences[&id];
            let full = sequence.n_computed.div_ceil(BLOCK_SIZE);
            // Six tokens and one of slack lie in three blocks at most.
            assert!((full..=full + 2 * 3).contains(&world.scheduler.ledger().held));
        }
    }
    world.assert_as_alone(id, &tokens, 60);
}

#[test]
fn what_fits_only_because_blocks_are_given_up_runs() {
    let n_needed = mixed(1).n_blocks_to_run(120);
    let mut world = World::new(BatchConfig {
        max_model_len: 120,
        ..mixed(n_needed)
    });
    // Prompt and output alone; and the prompt is longer than the pool would hold in all three groups.
    let tokens = lively(0, 100, 20);
    assert!(3 * tokens.len().div_ceil(BLOCK_SIZE) > n_needed);
    let first = world.local(&tokens, 20);
    let second = world.local(&tokens[1..], 20);
    world.run();
    world.assert_as_alone(first, &tokens, 20);
    world.assert_as_alone(second, &tokens[1..], 20);
    let refused = BatchScheduler::new(BatchConfig {
        max_model_len: 121,
        ..mixed(n_needed)
    });
    assert!(matches!(
        refused.unwrap_err(),
        BatchConfigError::CacheTooSmall {
            n_tokens: 120,
            max_model_len: 121
        }
    ));
}

#[test]
fn a_hit_needs_the_last_window_alone_of_windowed_groups() {
    let mut world = World::new(mixed(200));
    let tokens = lively(0, 40, 8);
    let first = world.local(&tokens, 8);
    world.run();
    world.assert_as_alone(first, &tokens, 8);
    let again = world.local(&tokens, 8);
    assert_eq!(world.step().started[0].n_hit_tokens, 36);
    // The one at 40, which is next, and one that a peer may know less of see tokens from 34 on, which are in block 8.
    let released = |group: usize| {
        let table = &world.scheduler.block_tables(again)[group];
        table.iter().filter(|&&block| block == RELEASED_BLOCK).count()
    };
    assert_eq!([released(0), released(1), released(2)], [0, 8, 8]);
    world.run();
    world.assert_as_alone(again, &tokens, 8);
    // What is told of the cache is the full group's: each block of the context once.
    let told = world.scheduler.prefix_snapshot();
    let n_kept = (tokens.len() + world.outputs[&again].len() - 1) / BLOCK_SIZE;
    assert_eq!(told.len(), 1 + n_kept);
    assert!(
        world.scheduler.ledger().cached > n_kept,
        "the windowed groups keep theirs too"
    );
}

#[test]
fn windowed_groups_owe_only_what_will_be_seen() {
    let mut world = World::new(mixed(200));
    let tokens = lively(0, 22, 6);
    let id = world.reserved(&tokens, 6);
    let group = world.group(id);
    let shape = |grant: &Grant| -> Vec<(usize, usize)> {
        let groups = grant.layer_groups.iter();
        groups.map(|group| (group.n_blocks_held, group.blocks.len())).collect()
    };
    // The first query, at 22, sees tokens from 17 on, in block 4.
    assert_eq!(shape(&world.scheduler.grant(group)), [(0, 6), (4, 2), (4, 2)]);
    assert_eq!(
        world.scheduler.ledger().reserved,
        6 + 2 + 2 + 3,
        "and one of each to grow into"
    );
    world.join(id, Numerics::Same);
    world.run();
    world.assert_as_alone(id, &tokens, 6);

    // The full group has its first five blocks; the windowed ones have the fifth alone, and it is all they need.
    let again = world.reserved(&tokens, 6);
    let group = world.group(again);
    assert_eq!(shape(&world.scheduler.grant(group)), [(5, 1), (5, 1), (5, 1)]);
    world.join(again, Numerics::Same);
    world.run();
    world.assert_as_alone(again, &tokens, 6);
}

#[test]
fn choices_fork_in_every_group_and_move_together() {
    let mut world = World::new(mixed(200));
    let tokens = lively_choices(21, 3, 12);
    let group = world.submit_group(&state_of(&tokens, 12, 3), SequenceKind::Local);
    world.run();
    world.assert_choices_as_alone(group, &tokens, 12, 3);

    let outputs: Vec<Vec<TokenId>> = (0..3).map(|choice| alone_choice(&tokens, choice, 12, 1000)).collect();
    let after = |n: usize| -> Vec<ChoiceState> {
        let outputs = outputs.iter();
        outputs.map(|output| choice_state(&output[..n], 12)).collect()
    };
    let state = PortableState {
        choices: after(3),
        ..state_of(&tokens, 12, 3)
    };
    let mut destination = World::new(mixed(200));
    let moved = destination.reserve_moved(&state, &MoveRoom::slack(2)).unwrap();
    let grants = destination.scheduler.grants_moved(moved, 3);
    // 23 tokens have KV, and the query at 23 sees those from 18 on, in block 4. The others hold the prompt's five full blocks.
    let held = |grant: &Grant| -> Vec<usize> { grant.layer_groups.iter().map(|group| group.n_blocks_held).collect() };
    assert_eq!(
        grants.iter().map(held).collect::<Vec<_>>(),
        [[0, 4, 4], [5, 5, 5], [5, 5, 5]]
    );
    destination.join_moved(moved, &tokens, &after(6));
    destination.run();
    destination.assert_choices_as_alone(moved, &tokens, 12, 3);
}

/// A source that is ahead of what is known here by more than a window has given up what only the known tokens would need.
#[test]
fn a_reservation_begins_where_the_source_is() {
    let tokens = lively_choices(21, 1, 20);
    let output = alone_choice(&tokens, 0, 20, 1000);
    let after = |n: usize| vec![choice_state(&output[..n], 20)];
    let state = PortableState {
        choices: after(3),
        ..state_of(&tokens, 20, 1)
    };
    let room = MoveRoom {
        n_ahead: vec![10],
        n_slack_blocks: 0,
    };
    let mut destination = World::new(mixed(200));
    let moved = destination.reserve_moved(&state, &room).unwrap();
    // 33 tokens have KV at the source, and the query at 33 sees those from 28 on, in block 7.
    let grant = &destination.scheduler.grants_moved(moved, 1)[0];
    let held: Vec<usize> = grant.layer_groups.iter().map(|group| group.n_blocks_held).collect();
    assert_eq!((held, grant.n_blocks_total), (vec![0, 7, 7], 9));
    // A state that is not as far as that lacks what its next query sees.
    let refused = destination
        .scheduler
        .join_moved(moved, &after(8), Numerics::Same, &|_| false);
    let message = "choice 0 is not as far as its source said";
    assert_eq!(refused, Err(Failure::InstanceLost(message.to_owned())));
    destination.join_moved(moved, &tokens, &after(15));
    destination.run();
    destination.assert_choices_as_alone(moved, &tokens, 20, 1);
}

/// However long somebody takes to fetch them, they are as far back as when he was told of them.
#[test]
fn blocks_that_somebody_fetches_are_kept() {
    let mut world = World::new(mixed(200));
    let tokens = lively(0, 40, 60);
    let id = world.local(&tokens, 60);
    let group = world.group(id);
    let first = |world: &World| world.scheduler.computed_blocks(id, 1).first;
    let after = |world: &mut World, n_tokens: usize| {
        while world.outputs.get(&id).map_or(0, Vec::len) < n_tokens {
            world.step();
        }
    };
    after(&mut world, 4);
    world.scheduler.keep_unseen(group, true);
    let (first_then, n_held_then) = (first(&world), world.scheduler.ledger().held);
    after(&mut world, 44);
    assert_eq!(first(&world), first_then);
    assert_eq!(
        world.scheduler.ledger().held,
        n_held_then + 3 * 10,
        "40 tokens more in each group"
    );
    world.scheduler.keep_unseen(group, false);
    after(&mut world, 45);
    // The next query, at 84, and one token of slack see those from 78 on, in block 19.
    assert_eq!(first(&world), 19);
    world.run();
    world.assert_as_alone(id, &tokens, 60);
}
