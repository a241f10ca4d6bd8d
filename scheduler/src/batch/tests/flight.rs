//! Batches made while the one before them is in flight.

use super::*;

fn all(_: SequenceId) -> bool {
    true
}

fn decode(sequence: SequenceId, start_pos: usize) -> BatchItem {
    BatchItem {
        sequence,
        start_pos,
        n_tokens: 1,
        samples: Samples::Token,
    }
}

#[test]
fn chunks_and_unknown_tokens_follow_one_another() {
    let mut world = World::new(config(64));
    let tokens = lively(0, 12, 5);
    let id = world.local(&tokens, 5);
    let chunk = |start_pos, n_tokens, samples| BatchItem {
        sequence: id,
        start_pos,
        n_tokens,
        samples,
    };
    assert_eq!(world.step_ahead(&all).items, [chunk(0, 8, Samples::Nothing)]);
    assert_eq!(world.step_ahead(&all).items, [chunk(8, 4, Samples::Token)]);
    for n_known in 0..4 {
        assert_eq!(
            world.scheduler.tokens(id).len(),
            12 + n_known,
            "its next token is in flight"
        );
        assert_eq!(world.step_ahead(&all).items, [decode(id, 12 + n_known)]);
    }
    // The fifth token is in flight, and the last whatever it is.
    assert_eq!(world.step_ahead(&all).items, []);
    assert_eq!((world.n_wasted, world.n_computed), (0, 16));
    world.assert_as_alone(id, &tokens, 5);
    assert!(world.scheduler.is_empty());
}

#[test]
fn one_whose_token_the_host_samples_waits_for_it() {
    let mut world = World::new(config(64));
    let a = world.local(&lively(0, 3, 9), 9);
    let b = world.local(&lively(50, 3, 9), 9);
    world.step();
    let only_a = |id| id == a;
    assert_eq!(world.step_ahead(&only_a).items, [decode(a, 3), decode(b, 3)]);
    assert_eq!(world.step_ahead(&only_a).items, [decode(a, 4)]);
    assert_eq!(world.step_ahead(&only_a).items, [decode(a, 5), decode(b, 4)]);
}

/// What a step in flight writes is not given to anyone before it lands, though its sequence has gone.
#[test]
fn blocks_in_flight_wait_in_quarantine() {
    let mut world = World::new(config(8));
    let id = world.local(&lively(0, 3, 9), 9);
    world.step_ahead(&all);
    world.step_ahead(&all);
    world.remove(id);
    let quarantined = |world: &World| world.scheduler.ledger().quarantined;
    assert_eq!(quarantined(&world), 1);
    assert_eq!(world.step_ahead(&all).items, []);
    assert_eq!(
        (quarantined(&world), world.n_wasted),
        (1, 1),
        "it landed after the batch was made"
    );
    world.step();
    assert!(world.scheduler.ledger().is_whole());
}

#[test]
fn an_end_that_was_not_foreseen_wastes_one_item() {
    let mut world = World::new(config(64));
    let stops = |seed: &u32| alone(&prompt(*seed, 6), 30, 1000).last() == Some(&7);
    let seed = (0..200).find(stops).expect("some output has a stop id");
    let id = world.local(&prompt(seed, 6), 30);
    while world.scheduler.phase(id).is_some() {
        world.step_ahead(&all);
    }
    world.settle();
    assert_eq!(world.n_wasted, 1);
    assert_eq!(
        world.scheduler.counters().n_decode_tokens + 1,
        world.outputs[&id].len() as u64
    );
    world.assert_as_alone(id, &prompt(seed, 6), 30);
}

#[test]
fn nobody_loses_blocks_for_a_batch_made_ahead() {
    let mut world = World::new(BatchConfig {
        prefix_caching: PrefixCaching::Off,
        ..config(8)
    });
    let (old, young) = (lively(0, 9, 20), lively(300, 9, 12));
    let (a, b) = (world.local(&old, 20), world.local(&young, 12));
    let mut n_empty = 0;
    while !world.scheduler.is_empty() {
        let batch = world.step_ahead(&all);
        let is_ahead_of_nothing = world.scheduler.flights.is_empty();
        assert_eq!(batch.preempted, []);
        if batch.items.is_empty() && is_ahead_of_nothing && !world.scheduler.is_empty() {
            n_empty += 1;
            world.step();
        }
    }
    assert!(n_empty > 0 && world.scheduler.counters().n_preemptions > 0);
    world.assert_as_alone(a, &old, 20);
    world.assert_as_alone(b, &young, 12);
}

#[test]
fn what_is_taken_back_is_computed_again() {
    let mut world = World::new(config(64));
    world.gives_back_one_of = 3;
    let tokens = lively(0, 7, 20);
    let id = world.local(&tokens, 20);
    while !world.scheduler.is_empty() {
        world.step_ahead(&all);
    }
    assert!(world.n_wasted > 0 && world.n_computed > 26 + world.n_wasted);
    world.assert_as_alone(id, &tokens, 20);
}

#[test]
fn a_step_that_fails_takes_nothing_else_with_it() {
    let mut world = World::new(config(64));
    let tokens = lively(0, 3, 9);
    let a = world.local(&tokens, 9);
    world.step_ahead(&all);
    let batch = world.scheduler.schedule_ahead(Nanos(9), &all, &|_| false);
    assert_eq!(batch.items, [decode(a, 3)]);
    // The newer of the two: the older is committed as if it had never been.
    world.scheduler.abandon(&batch);
    world.settle();
    assert_eq!(world.scheduler.tokens(a).len(), 4);
    world.step_ahead(&all);
    world.run();
    world.assert_as_alone(a, &tokens, 9);
    let b = world.local(&lively(50, 3, 9), 9);
    world.step_ahead(&all);
    assert_eq!(world.fail_step(), BTreeSet::from([GroupId(b.0)]));
    assert!(world.scheduler.is_empty());
    world.step();
    assert!(world.scheduler.ledger().is_whole());
}

#[test]
#[should_panic(expected = "a group is paused while a batch computes it")]
fn what_is_in_flight_cannot_be_paused() {
    let mut world = World::new(config(64));
    let id = world.local(&lively(0, 3, 9), 9);
    world.step();
    world.step_ahead(&all);
    let group = world.group(id);
    let _ = world.scheduler.pause(group);
}

/// A block that turns out to be a copy of a cached one is in the tables that the batch made ahead was launched with.
#[test]
fn a_duplicate_in_flight_waits_in_quarantine() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 16);
    world.local(&tokens, 1);
    world.run();
    let mut state = state(&tokens, 1);
    state.request.sampling.prompt_logprobs = Some(0);
    world.submit(&state, SequenceKind::Local);
    world.step_ahead(&all);
    world.step_ahead(&all);
    assert_eq!(world.scheduler.ledger().quarantined, 1);
    world.step_ahead(&all);
    world.run();
}
