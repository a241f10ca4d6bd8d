//! Both ends against each other over a lossy, bounded link, and the single edges of each.

mod migrations;

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::ids::Nanos;
use crate::request::Failure;

const DEADLINE: Nanos = Nanos::from_secs(10);

fn destination(plan: TransferPlan) -> Destination {
    Destination::handoff(TransferId(7), plan, DEADLINE, Nanos::ZERO)
}

fn kv(layer: u32, first_block: u32, n_blocks: u32) -> DestinationFact {
    DestinationFact::Kv {
        transfer: TransferId(7),
        range: KvRange {
            choice: 0,
            layer,
            first_block,
            n_blocks,
        },
    }
}

fn two_layers() -> TransferPlan {
    TransferPlan::handoff(vec![0; 2], vec![1], 3)
}

#[test]
fn joins_when_token_and_all_blocks_are_in() {
    for token_first in [true, false] {
        let mut machine = destination(two_layers());
        assert!(
            machine
                .apply(
                    Nanos(1),
                    DestinationFact::Accepted {
                        ends_by: EndsBy::Source
                    }
                )
                .is_empty()
        );
        let mut actions = Vec::new();
        if token_first {
            actions.extend(machine.apply(Nanos(2), DestinationFact::Token { ends: false }));
        }
        for fact in [kv(0, 1, 1), kv(1, 1, 2), kv(0, 2, 1)] {
            assert!(!actions.contains(&DestinationAction::Join));
            actions.extend(machine.apply(Nanos(3), fact));
        }
        if !token_first {
            actions.extend(machine.apply(Nanos(4), DestinationFact::Token { ends: false }));
        }
        assert_eq!(
            actions
                .iter()
                .filter(|action| **action == DestinationAction::Join)
                .count(),
            1
        );
        assert_eq!(
            actions
                .iter()
                .filter(|action| matches!(action, DestinationAction::Write(_)))
                .count(),
            3
        );
        // Whatever the source does now, the sequence decodes.
        assert_eq!(
            machine.apply(Nanos(5), DestinationFact::Dropped { reason: "reset".into() }),
            [DestinationAction::Close]
        );
        assert!(machine.is_closed());
    }
}

#[test]
fn a_doubled_skipped_or_foreign_frame_is_refused() {
    for bad in [
        kv(0, 2, 1),
        kv(0, 0, 1),
        kv(0, 1, 3),
        kv(2, 1, 1),
        kv(0, 1, 0),
        kv(0, 1, u32::MAX),
    ] {
        let mut machine = destination(two_layers());
        machine.apply(
            Nanos(1),
            DestinationFact::Accepted {
                ends_by: EndsBy::Source,
            },
        );
        let actions = machine.apply(Nanos(2), bad);
        assert_eq!(actions[0], DestinationAction::Refuse(RefusedFrame::OutOfOrder));
        assert!(matches!(actions[1], DestinationAction::Fail(Failure::InstanceLost(_))));
        assert_eq!(
            machine.apply(Nanos(3), kv(0, 1, 1)),
            [DestinationAction::Refuse(RefusedFrame::Late)]
        );
    }
    let mut machine = destination(two_layers());
    machine.apply(
        Nanos(1),
        DestinationFact::Accepted {
            ends_by: EndsBy::Source,
        },
    );
    let foreign = DestinationFact::Kv {
        transfer: TransferId(8),
        range: KvRange {
            choice: 0,
            layer: 0,
            first_block: 1,
            n_blocks: 1,
        },
    };
    assert_eq!(
        machine.apply(Nanos(2), foreign),
        [DestinationAction::Refuse(RefusedFrame::OtherTransfer)]
    );
    assert_eq!(
        machine.apply(Nanos(3), kv(0, 1, 1)).len(),
        1,
        "the transfer itself goes on"
    );
}

#[test]
fn only_growth_of_the_step_count_holds_the_deadline_off() {
    let mut machine = destination(two_layers());
    machine.apply(
        Nanos::ZERO,
        DestinationFact::Accepted {
            ends_by: EndsBy::Source,
        },
    );
    machine.apply(Nanos::from_secs(6), DestinationFact::Progress { n_steps: 5 });
    machine.apply(Nanos::from_secs(12), DestinationFact::Progress { n_steps: 5 });
    assert!(machine.apply(Nanos::from_secs(15), DestinationFact::Tick).is_empty());
    assert_eq!(machine.next_tick(), Some(Nanos::from_secs(16)));
    let actions = machine.apply(Nanos::from_secs(16), DestinationFact::Tick);
    assert!(matches!(
        &actions[..],
        [
            DestinationAction::Fail(Failure::InstanceLost(_)),
            DestinationAction::Close
        ]
    ));
}

#[test]
fn an_early_end_is_a_failure_and_a_typed_failure_is_kept() {
    let mut machine = destination(two_layers());
    machine.apply(
        Nanos(1),
        DestinationFact::Accepted {
            ends_by: EndsBy::Source,
        },
    );
    machine.apply(Nanos(1), DestinationFact::Token { ends: false });
    let actions = machine.apply(Nanos(2), DestinationFact::Ended { failure: None });
    assert!(matches!(actions[0], DestinationAction::Fail(Failure::InstanceLost(_))));

    let mut machine = destination(two_layers());
    let busy = Failure::Busy("full".into());
    let actions = machine.apply(
        Nanos(2),
        DestinationFact::Ended {
            failure: Some(busy.clone()),
        },
    );
    assert_eq!(actions, [DestinationAction::Fail(busy), DestinationAction::Close]);
}

#[test]
fn a_first_token_that_ends_the_request_voids_the_kv() {
    let mut source = Source::new(two_layers(), 2, 64, EndsBy::Source, DEADLINE);
    source.apply(
        Nanos(1),
        SourceFact::Ready(KvRange {
            choice: 0,
            layer: 0,
            first_block: 1,
            n_blocks: 2,
        }),
    );
    let actions = source.apply(Nanos(2), SourceFact::Token { ends: true });
    assert_eq!(actions, [SourceAction::SendToken]);
    assert_eq!(
        source.apply(Nanos(3), SourceFact::Sent),
        [SourceAction::SendEnd(None), SourceAction::Release]
    );

    let mut machine = destination(two_layers());
    machine.apply(
        Nanos(1),
        DestinationFact::Accepted {
            ends_by: EndsBy::Source,
        },
    );
    let actions = machine.apply(Nanos(1), DestinationFact::Token { ends: true });
    assert_eq!(actions, [DestinationAction::Deliver, DestinationAction::Finish]);
}

#[test]
fn without_blocks_the_token_alone_is_owed() {
    let plan = TransferPlan::handoff(vec![0; 2], vec![3], 3);
    let mut source = Source::new(plan.clone(), 2, 64, EndsBy::Source, DEADLINE);
    let actions = source.apply(Nanos(1), SourceFact::Token { ends: false });
    assert_eq!(
        actions,
        [
            SourceAction::SendToken,
            SourceAction::SendEnd(None),
            SourceAction::Release
        ]
    );
    let mut machine = destination(plan);
    machine.apply(
        Nanos(1),
        DestinationFact::Accepted {
            ends_by: EndsBy::Source,
        },
    );
    let actions = machine.apply(Nanos(2), DestinationFact::Token { ends: false });
    assert_eq!(actions, [DestinationAction::Deliver, DestinationAction::Join]);
}

#[test]
fn a_link_that_takes_nothing_frees_the_source() {
    let mut source = Source::new(two_layers(), 1, 64, EndsBy::Source, DEADLINE);
    source.apply(
        Nanos::ZERO,
        SourceFact::Ready(KvRange {
            choice: 0,
            layer: 0,
            first_block: 1,
            n_blocks: 2,
        }),
    );
    assert!(source.apply(Nanos::from_secs(9), SourceFact::Tick).is_empty());
    assert_eq!(
        source.apply(Nanos::from_secs(10), SourceFact::Tick),
        [SourceAction::Release]
    );
    assert!(source.is_closed());
}

proptest! {
    /// The source's frames in any chunking, over a link of any depth, make the destination join exactly once with every
    /// (layer, block) written exactly once; a cut anywhere before the join fails it exactly once.
    #[test]
    fn the_two_ends_agree(
        layer_groups in prop_oneof![prop::collection::vec(Just(0u32), 1..5), Just(vec![1, 0, 1]), Just(vec![0, 1, 2, 1])],
        first_blocks in prop::collection::vec(0u32..4, 3),
        n_new in 0u32..9,
        chunks in prop::collection::vec(1u32..5, 1..9),
        (max_in_flight, per_frame) in (1u32..4, 1u32..4),
        cut_after in prop::option::of(0usize..40),
    ) {
        let n_layers = layer_groups.len() as u32;
        let n_groups = *layer_groups.iter().max().unwrap() as usize + 1;
        let first_blocks = first_blocks[..n_groups].to_vec();
        let n_blocks = first_blocks.iter().max().unwrap() + n_new;
        let plan = TransferPlan::handoff(layer_groups.clone(), first_blocks.clone(), n_blocks);
        let first_in = |layer: u32| first_blocks[layer_groups[layer as usize] as usize];
        let mut source = Source::new(plan.clone(), max_in_flight, per_frame, EndsBy::Source, DEADLINE);
        let mut destination = destination(plan);
        destination.apply(Nanos::ZERO, DestinationFact::Accepted { ends_by: EndsBy::Source });

        let mut facts = VecDeque::new();
        let mut done = 0;
        for chunk in chunks.into_iter().chain([u32::MAX]) {
            let n_blocks = chunk.min(n_blocks - done);
            if n_blocks == 0 { break; }
            for layer in 0..n_layers {
                let first_block = first_in(layer).max(done);
                let n_blocks = (done + n_blocks).saturating_sub(first_block);
                if n_blocks > 0 {
                    facts.push_back(SourceFact::Ready(KvRange { choice: 0, layer, first_block, n_blocks }));
                }
            }
            done += n_blocks;
        }
        facts.push_back(SourceFact::Token { ends: false });

        let mut link: VecDeque<SourceAction> = VecDeque::new();
        let mut written = vec![0u32; (n_layers * n_blocks) as usize];
        let (mut n_joins, mut n_fails, mut n_released, mut n_carried) = (0, 0, 0, 0usize);
        loop {
            let actions = match facts.pop_front() {
                Some(fact) => source.apply(Nanos(1), fact),
                None if link.is_empty() => break,
                None => Vec::new(),
            };
            let take = |actions: Vec<SourceAction>, link: &mut VecDeque<SourceAction>, n_released: &mut i32| {
                for action in actions {
                    if action == SourceAction::Release { *n_released += 1 } else { link.push_back(action) }
                }
            };
            take(actions, &mut link, &mut n_released);
            prop_assert!(link.len() <= max_in_flight as usize + 1);
            if cut_after.is_some_and(|n| n_carried >= n) {
                take(source.apply(Nanos(1), SourceFact::Dropped), &mut VecDeque::new(), &mut n_released);
                let actions = destination.apply(Nanos(1), DestinationFact::Dropped { reason: "cut".into() });
                n_fails += actions.iter().filter(|action| matches!(action, DestinationAction::Fail(_))).count();
                break;
            }
            let Some(message) = link.pop_front() else { continue };
            n_carried += 1;
            let is_end = matches!(message, SourceAction::SendEnd(_));
            let fact = match message {
                SourceAction::SendKv(range) => DestinationFact::Kv { transfer: TransferId(7), range },
                SourceAction::SendToken => DestinationFact::Token { ends: false },
                SourceAction::SendProgress => DestinationFact::Progress { n_steps: 1 },
                SourceAction::SendEnd(failure) => DestinationFact::Ended { failure },
                SourceAction::Release => unreachable!("handled above"),
            };
            for action in destination.apply(Nanos(1), fact) {
                match action {
                    DestinationAction::Write(range) => {
                        for block in range.first_block..range.end_block() {
                            written[(range.layer * n_blocks + block) as usize] += 1;
                        }
                    }
                    DestinationAction::Join => n_joins += 1,
                    DestinationAction::Fail(_) => n_fails += 1,
                    DestinationAction::Refuse(why) => prop_assert!(false, "refused: {why:?}"),
                    DestinationAction::Deliver | DestinationAction::Finish | DestinationAction::Close => {}
                }
            }
            if !is_end {
                take(source.apply(Nanos(1), SourceFact::Sent), &mut link, &mut n_released);
            }
        }
        prop_assert_eq!(n_joins + n_fails, 1);
        prop_assert_eq!(n_released, 1, "the source's blocks are given back exactly once");
        prop_assert!(source.is_closed() && destination.is_closed());
        if n_joins == 1 {
            for layer in 0..n_layers {
                for block in 0..n_blocks {
                    let expected = u32::from(block >= first_in(layer));
                    prop_assert_eq!(written[(layer * n_blocks + block) as usize], expected);
                }
            }
        }
        if cut_after.is_none() {
            prop_assert_eq!(n_joins, 1);
        }
    }
}
