use super::*;
use proptest::prelude::*;

const MOVE_DEADLINE: Nanos = Nanos::from_secs(2);

fn arbiter() -> Arbiter {
    Arbiter::new(1, MOVE_DEADLINE)
}

fn lost(epoch: Epoch) -> ArbiterFact {
    let failure = Failure::InstanceLost("reset".into());
    ArbiterFact::Failed {
        epoch,
        failure,
        blamed: Some(InstanceId::new("prefill-0")),
    }
}

fn token(epoch: u32, index: u32) -> ArbiterFact {
    ArbiterFact::Token {
        epoch: Epoch(epoch),
        choice: 0,
        index,
    }
}

/// A request that has delivered token 0 in epoch 1 and is moving in epoch 2.
fn moving() -> Arbiter {
    let mut arbiter = arbiter();
    arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
    assert_eq!(
        arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted),
        [ArbiterAction::RefuseMove("its prompt is being computed")]
    );
    arbiter.apply(Nanos::ZERO, token(1, 0));
    assert_eq!(
        arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted),
        [ArbiterAction::Attach(Epoch(2))]
    );
    arbiter
}

#[test]
fn a_lost_instance_costs_a_new_epoch_and_three_in_a_row_end_it() {
    let mut arbiter = arbiter();
    for attempt in 1..=MAX_ATTEMPTS {
        assert_eq!(
            arbiter.apply(Nanos::ZERO, ArbiterFact::Placed),
            [ArbiterAction::Open(Epoch(attempt))]
        );
        let actions = arbiter.apply(Nanos::ZERO, lost(Epoch(attempt)));
        if attempt < MAX_ATTEMPTS {
            assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Place]);
            assert_eq!(arbiter.avoided(), [InstanceId::new("prefill-0")]);
        } else {
            assert_eq!(actions[1], ArbiterAction::Fail(Failure::InstanceLost("reset".into())));
        }
    }
    assert!(arbiter.is_ended());
}

#[test]
fn refusals_are_not_counted_and_their_end_is_that_nobody_had_room() {
    let mut arbiter = arbiter();
    for epoch in 1..=10 * MAX_ATTEMPTS {
        arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
        let full = ArbiterFact::Failed {
            epoch: Epoch(epoch),
            failure: Failure::Busy("full".into()),
            blamed: Some(InstanceId::new("decode-0")),
        };
        let actions = arbiter.apply(Nanos::ZERO, full);
        assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Place]);
        assert_eq!(arbiter.n_attempts(), 0);
    }
    let actions = arbiter.apply(Nanos::ZERO, ArbiterFact::NoRoom);
    assert!(
        matches!(&actions[..], [ArbiterAction::Fail(Failure::Busy(_))]),
        "{actions:?}"
    );
}

#[test]
fn a_new_token_restores_the_attempts() {
    let mut arbiter = arbiter();
    for index in 0..20 {
        let ArbiterAction::Open(epoch) = arbiter.apply(Nanos::ZERO, ArbiterFact::Placed)[0] else {
            panic!("no stream")
        };
        assert_eq!(
            arbiter.apply(Nanos::ZERO, token(epoch.0, index)),
            [ArbiterAction::Deliver]
        );
        assert_eq!(
            arbiter.apply(Nanos::ZERO, lost(epoch)),
            [ArbiterAction::Close, ArbiterAction::Place]
        );
    }
}

#[test]
fn a_lost_source_is_not_heard_while_its_destination_is_awaited() {
    let mut arbiter = moving();
    assert_eq!(arbiter.apply(Nanos::ZERO, lost(Epoch(1))), [ArbiterAction::Close]);
    assert_eq!(arbiter.apply(Nanos::ZERO, token(1, 1)), [ArbiterAction::Discard]);
    assert!(arbiter.apply(Nanos::ZERO, lost(Epoch(1))).is_empty());
    assert!(
        arbiter
            .apply(Nanos::ZERO, ArbiterFact::MoveCancelled { epoch: Epoch(1) })
            .is_empty()
    );
    assert_eq!(
        arbiter.apply(Nanos::ZERO, token(2, 1)),
        [ArbiterAction::Settle, ArbiterAction::Deliver]
    );
}

/// Found by the simulation: the words of the first epoch were dropped after the second resume, and the next ones came
/// with a gap.
#[test]
fn a_source_resumed_twice_is_heard_in_all_its_epochs() {
    let mut arbiter = moving();
    let busy = |epoch| ArbiterFact::Failed {
        epoch: Epoch(epoch),
        failure: Failure::Busy("full".into()),
        blamed: None,
    };
    let resumed = |epoch| [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(epoch))];
    assert_eq!(arbiter.apply(Nanos::ZERO, busy(2)), resumed(3));
    arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted);
    assert_eq!(arbiter.apply(Nanos::ZERO, busy(4)), resumed(5));
    let mut hear = |epoch, index| arbiter.apply(Nanos::ZERO, token(epoch, index));
    assert_eq!(hear(1, 1), [ArbiterAction::Deliver]);
    assert_eq!(hear(2, 2), [ArbiterAction::Discard], "of a move that failed");
    assert_eq!(hear(3, 2), [ArbiterAction::Deliver]);
    assert_eq!(hear(1, 3), [ArbiterAction::Discard], "it has been heard in a newer one");
    assert_eq!(hear(5, 3), [ArbiterAction::Deliver]);
}

#[test]
fn what_cannot_succeed_is_not_tried_again() {
    for failure in [
        Failure::Invalid("too long".into()),
        Failure::Internal("bug".into()),
        Failure::Cancelled,
    ] {
        let mut arbiter = arbiter();
        arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
        let actions = arbiter.apply(
            Nanos::ZERO,
            ArbiterFact::Failed {
                epoch: Epoch(1),
                failure: failure.clone(),
                blamed: None,
            },
        );
        assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Fail(failure)]);
    }
}

#[test]
fn without_room_the_end_says_whether_it_had_begun() {
    let actions = arbiter().apply(Nanos::ZERO, ArbiterFact::NoRoom);
    assert!(
        matches!(&actions[..], [ArbiterAction::Fail(Failure::Busy(_))]),
        "{actions:?}"
    );
    let mut arbiter = arbiter();
    arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
    arbiter.apply(Nanos::ZERO, lost(Epoch(1)));
    let actions = arbiter.apply(Nanos::ZERO, ArbiterFact::NoRoom);
    assert!(
        matches!(&actions[..], [ArbiterAction::Fail(Failure::InstanceLost(_))]),
        "{actions:?}"
    );
}

#[test]
fn the_first_word_of_the_destination_settles_and_the_source_is_not_heard_any_more() {
    for word in [
        token(2, 1),
        ArbiterFact::Joined { epoch: Epoch(2) },
        // Its number was seen already, and yet it settles.
        token(2, 0),
    ] {
        let mut arbiter = moving();
        assert_eq!(arbiter.apply(Nanos(1), word)[0], ArbiterAction::Settle);
        assert_eq!(arbiter.apply(Nanos(2), token(1, 2)), [ArbiterAction::Discard]);
        assert!(arbiter.apply(Nanos(2), lost(Epoch(1))).is_empty());
        assert_eq!((arbiter.epoch(), arbiter.n_moves()), (Epoch(2), 1));
    }
}

#[test]
fn a_failed_destination_lets_the_source_go_on_in_a_newer_epoch() {
    let mut arbiter = moving();
    assert_eq!(
        arbiter.apply(Nanos(1), lost(Epoch(2))),
        [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(3))]
    );
    // What it said before the word reached it counts, what the destination said does not.
    assert_eq!(arbiter.apply(Nanos(2), token(1, 1)), [ArbiterAction::Deliver]);
    assert_eq!(arbiter.apply(Nanos(2), token(2, 2)), [ArbiterAction::Discard]);
    let failure = Failure::InstanceLost("unknown here".into());
    let resume_failed = ArbiterFact::ResumeFailed {
        epoch: Epoch(3),
        failure,
    };
    let mut unheard = arbiter.clone();
    assert_eq!(
        unheard.apply(Nanos(3), resume_failed.clone()),
        [ArbiterAction::Close, ArbiterAction::Place]
    );
    // Once it is heard in the epoch it was told of it, whatever became of the answer.
    assert_eq!(arbiter.apply(Nanos(3), token(3, 2)), [ArbiterAction::Deliver]);
    assert!(arbiter.apply(Nanos(4), resume_failed).is_empty());
}

#[test]
fn a_paused_move_has_a_deadline_and_a_lost_source_waits_for_the_destination() {
    let mut arbiter = moving();
    assert_eq!(arbiter.next_tick(), None);
    arbiter.apply(Nanos::from_secs(1), ArbiterFact::Moving { epoch: Epoch(1) });
    assert_eq!(arbiter.next_tick(), Some(Nanos::from_secs(3)));
    assert!(arbiter.apply(Nanos::from_secs(2), ArbiterFact::Tick).is_empty());
    assert_eq!(
        arbiter.apply(Nanos::from_secs(3), ArbiterFact::Tick),
        [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(3))]
    );
    let mut arbiter = moving();
    assert_eq!(
        arbiter.apply(Nanos::from_secs(1), lost(Epoch(1))),
        [ArbiterAction::Close]
    );
    assert_eq!(
        arbiter.apply(Nanos::from_secs(3), ArbiterFact::Tick),
        [ArbiterAction::Detach, ArbiterAction::Place]
    );
}

proptest! {
    /// Under any facts from any epoch, the client sees indexes 0, 1, 2, ... of each choice and at most one terminal
    /// state, after which nothing is open; at most one stream speaks and at most one move is attached.
    #[test]
    fn tokens_come_once_in_order_and_one_end(
        facts in prop::collection::vec((0u8..14, 0u32..4, 0u32..2, 0u32..6), 0..80),
    ) {
        let mut arbiter = Arbiter::new(2, MOVE_DEADLINE);
        let (mut delivered, mut n_ends, mut is_open, mut is_attached) = ([0u32; 2], 0, false, false);
        for (at, (kind, epoch_back, choice, index)) in (0..).zip(facts) {
            let now = Nanos::from_millis(at * 300);
            let epoch = Epoch(arbiter.newest_epoch().0.saturating_sub(epoch_back));
            let failure = Failure::InstanceLost("gone".into());
            let fact = match kind {
                0 if arbiter.stage == Stage::Placing => ArbiterFact::Placed,
                0 | 1 => ArbiterFact::Token { epoch, choice, index: delivered[choice as usize] },
                2 => ArbiterFact::Token { epoch, choice, index },
                3 => lost(epoch),
                4 => ArbiterFact::Failed { epoch, failure: Failure::Busy("full".into()), blamed: None },
                5 if index == 0 => ArbiterFact::Finished { epoch, finish: Finish::Length },
                6 if index == 0 => ArbiterFact::ClientGone,
                7 if index == 0 => ArbiterFact::DeadlinePassed,
                8 => ArbiterFact::MoveWanted,
                9 => ArbiterFact::Moving { epoch },
                10 => ArbiterFact::MoveCancelled { epoch },
                11 => ArbiterFact::Joined { epoch },
                12 => ArbiterFact::ResumeFailed { epoch, failure },
                13 => ArbiterFact::Tick,
                _ => continue,
            };
            let ended_before = arbiter.is_ended();
            let token = match &fact {
                ArbiterFact::Token { choice, index, .. } => Some((*choice, *index)),
                _ => None,
            };
            for action in arbiter.apply(now, fact) {
                match action {
                    ArbiterAction::Deliver => {
                        let (choice, index) = token.expect("only tokens are delivered here");
                        prop_assert_eq!(index, delivered[choice as usize]);
                        delivered[choice as usize] += 1;
                    }
                    ArbiterAction::Open(_) => {
                        prop_assert!(!is_open && !is_attached && !ended_before);
                        is_open = true;
                    }
                    ArbiterAction::Close => {
                        prop_assert!(is_open);
                        is_open = false;
                    }
                    ArbiterAction::Attach(_) => {
                        prop_assert!(is_open && !is_attached);
                        is_attached = true;
                    }
                    ArbiterAction::Detach => {
                        prop_assert!(is_attached);
                        is_attached = false;
                    }
                    ArbiterAction::Settle => {
                        prop_assert!(is_attached);
                        (is_open, is_attached) = (true, false);
                    }
                    ArbiterAction::Resume(_) => prop_assert!(is_open && !is_attached),
                    ArbiterAction::Finish(_) | ArbiterAction::Fail(_) => {
                        prop_assert!(!ended_before);
                        n_ends += 1;
                    }
                    ArbiterAction::Place | ArbiterAction::Discard | ArbiterAction::RefuseMove(_) => {}
                }
            }
            prop_assert_eq!(arbiter.n_delivered().collect::<Vec<_>>(), delivered);
            prop_assert!(n_ends <= 1);
            prop_assert_eq!(arbiter.is_ended(), n_ends == 1);
            prop_assert!(!(arbiter.is_ended() && (is_open || is_attached)));
            // Whoever is silent has somebody who owes a word: a stream that is open, or the placement.
            prop_assert!(arbiter.is_ended() || is_open || is_attached || arbiter.stage == Stage::Placing);
            prop_assert!(is_open || !is_attached || arbiter.next_tick().is_some(), "a lost source with no deadline");
        }
    }
}
