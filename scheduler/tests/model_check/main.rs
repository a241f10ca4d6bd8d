//! The production arbiter and transfer machines with two instances and a front door, one request, and everything that can
//! happen to it in every order, up to a bound: streams in order and cut anywhere, unary calls lost, doubled and late,
//! timers early, preemptions, a client that leaves, and the death of any party.
//!
//! The engines are counters; what they compute is checked elsewhere. `BATON_MODEL_CHECK=deep` explores a larger bound
//! (minutes).

mod door;
mod instance;
mod wire;
mod world;

use stateright::{Checker, Model, Property};

use world::{Bounds, Event, World};

struct Protocol(Bounds);

impl Model for Protocol {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.0.clone())]
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        events.extend(world.possible());
    }

    fn next_state(&self, world: &World, event: Event) -> Option<World> {
        let mut next = world.clone();
        next.happen(event);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Protocol>> {
        vec![
            Property::always("nothing forbidden happens", |_, world: &World| {
                world.violation.is_none()
            }),
            Property::always("at most one instance generates and is heard", |_, world: &World| {
                world.n_heard_generating() <= 1
            }),
            Property::always(
                "what stands still has ended, and nothing is held",
                |_, world: &World| !world.possible().is_empty() || world.is_quiescent(),
            ),
            Property::sometimes("a move settles", |_, world: &World| world.door.arbiter.n_moves() > 0),
            Property::sometimes("a request that has moved ends well", |_, world: &World| {
                world.door.arbiter.n_moves() > 0 && world.door.ended == Some(true)
            }),
        ]
    }
}

/// Explores all states, and tells how many there are.
fn check(name: &str, bounds: Bounds) {
    let began = std::time::Instant::now();
    let checker = Protocol(bounds).checker();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let checker = checker.threads(threads).spawn_bfs().join();
    println!(
        "{name}: {} states, {} transitions, longest path {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
    for (property, path) in checker.discoveries() {
        if property.starts_with("a ") {
            continue;
        }
        let events: Vec<String> = path.into_actions().iter().map(|event| format!("{event:?}")).collect();
        panic!("{name}: not so: {property}:\n{}", events.join("\n"));
    }
    checker.assert_properties();
}

fn is_deep() -> bool {
    std::env::var("BATON_MODEL_CHECK").is_ok_and(|bound| bound == "deep")
}

#[test]
fn one_choice_moves_and_is_lost() {
    let deep = is_deep();
    check(
        "migration",
        Bounds {
            max_tokens: vec![3],
            n_moves: if deep { 2 } else { 1 },
            n_faults: 2,
            n_deaths: if deep { 2 } else { 1 },
            with_handoffs: false,
        },
    );
}

#[test]
fn two_choices_move_together() {
    check(
        "migration of two choices",
        Bounds {
            max_tokens: vec![2, 3],
            n_moves: 1,
            n_faults: if is_deep() { 2 } else { 1 },
            n_deaths: 1,
            with_handoffs: false,
        },
    );
}

#[test]
fn a_handoff_then_a_move() {
    check(
        "handoff and migration",
        Bounds {
            max_tokens: vec![2],
            n_moves: 1,
            n_faults: if is_deep() { 2 } else { 1 },
            n_deaths: 1,
            with_handoffs: true,
        },
    );
}
