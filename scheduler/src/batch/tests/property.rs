//! Random arrivals, joins, cancels and releases over tiny pools.

use std::sync::Arc;

use proptest::prelude::*;

use super::world::{alone_choice, next_token_of};
use super::*;
use crate::ids::{Epoch, RequestId};
use crate::request::Request;

#[derive(Clone, Debug)]
enum Fact {
    Submit {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        n: u32,
        kind: u8,
    },
    /// A request that has run elsewhere for so many tokens; more choices than one have run unevenly far.
    Replay {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        n: u32,
        n_known: usize,
    },
    Reserve {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        n: u32,
    },
    /// As `Replay`, and comes with its KV, having generated so many more tokens in the meantime.
    Arrive {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        n: u32,
        n_known: usize,
        n_meanwhile: usize,
        n_slack: usize,
    },
    Embed {
        family: u32,
        n_prompt: usize,
    },
    /// Somebody fetches what it has, or no longer does.
    Keep(usize, bool),
    Pause(usize),
    /// Perhaps while a transfer reads its blocks.
    Resume(usize, bool),
    Join(usize, bool),
    Cancel(usize),
    Release(usize, bool),
    Unpin,
    Steps(usize),
    /// As many, each made while the one before it is in flight.
    StepsAhead(usize),
    /// The step in flight, if there is one, cannot be computed.
    FailStep,
}

fn fact() -> impl Strategy<Value = Fact> {
    let shape = || {
        (
            0..3u32,
            1..24usize,
            1..20u32,
            prop_oneof![2 => Just(1u32), 1 => 2..5u32],
        )
    };
    prop_oneof![
        4 => (shape(), 0..4u8).prop_map(|((family, n_prompt, max_tokens, n), kind)| {
            Fact::Submit { family, n_prompt, max_tokens, n, kind }
        }),
        1 => (shape(), 0..8usize).prop_map(|((family, n_prompt, max_tokens, n), n_known)| {
            Fact::Replay { family, n_prompt, max_tokens, n, n_known }
        }),
        2 => shape().prop_map(|(family, n_prompt, max_tokens, n)| Fact::Reserve { family, n_prompt, max_tokens, n }),
        2 => (shape(), 1..8usize, 0..6usize, 0..3usize).prop_map(
            |((family, n_prompt, max_tokens, n), n_known, n_meanwhile, n_slack)| {
                Fact::Arrive { family, n_prompt, max_tokens, n, n_known, n_meanwhile, n_slack }
            },
        ),
        2 => (0..3u32, 1..40usize).prop_map(|(family, n_prompt)| Fact::Embed { family, n_prompt }),
        1 => (0..8usize, any::<bool>()).prop_map(|(i, keeps)| Fact::Keep(i, keeps)),
        2 => (0..8usize).prop_map(Fact::Pause),
        2 => (0..8usize, any::<bool>()).prop_map(|(i, pinned)| Fact::Resume(i, pinned)),
        2 => (0..8usize, any::<bool>()).prop_map(|(i, same)| Fact::Join(i, same)),
        1 => (0..16usize).prop_map(Fact::Cancel),
        2 => (0..8usize, any::<bool>()).prop_map(|(i, pinned)| Fact::Release(i, pinned)),
        1 => Just(Fact::Unpin),
        3 => (1..12usize).prop_map(Fact::Steps),
        5 => (1..12usize).prop_map(Fact::StepsAhead),
        1 => Just(Fact::FailStep),
    ]
}

/// What each choice has come to after `n_known` tokens of the first, one less of the second, and so on; at least one.
fn part_way(prompt: &[TokenId], max_tokens: u32, n: u32, n_known: usize, max_model_len: usize) -> Vec<ChoiceState> {
    let after = |choice: u32| {
        let mut output = alone_choice(prompt, choice, max_tokens, max_model_len);
        output.truncate(n_known.saturating_sub(choice as usize).max(1));
        let mut state = choice_state(&output, max_tokens);
        if prompt.len() + output.len() == max_model_len {
            state.finish.get_or_insert(Finish::Length);
        }
        state
    };
    (0..n).map(after).collect()
}

struct Moved {
    tokens: Vec<TokenId>,
    outputs: Vec<ChoiceState>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever arrives, joins, is cancelled or released, in whatever order and however small the pool: it comes to an
    /// end, every sequence that ends has the tokens it has alone, and nothing is lost.
    #[test]
    fn every_sequence_ends_as_if_alone(
        n_blocks in 6..24usize,
        budget in 4..16usize,
        is_cached in any::<bool>(),
        gives_back_one_of in prop_oneof![Just(0), 3..20u64],
        // Of so many sequences one needs its token before it goes on.
        waits_one_of in prop_oneof![Just(u64::MAX), 2..5u64],
        windows in prop_oneof![
            prop::collection::vec(prop::option::of((1..12usize, 1..4usize, 0..3usize)), 1),
            prop::collection::vec(prop::option::of((1..12usize, 1..4usize, 0..3usize)), 2..4),
        ],
        facts in prop::collection::vec(fact(), 1..60),
    ) {
        let prefix_caching = if is_cached { PrefixCaching::On } else { PrefixCaching::Off };
        let window = |(n_tokens, grain, slack)| SlidingWindow { n_tokens, grain, slack };
        let windows: Vec<_> = windows.into_iter().map(|kind| kind.map(window)).collect();
        let mut config = BatchConfig { max_batch_tokens: budget, prefix_caching, windows, ..config(n_blocks) };
        // As long as fits, although not without giving blocks up.
        config.max_model_len = config.longest_sequence(4 * 24);
        let mut world = World::new(config);
        world.gives_back_one_of = gives_back_one_of;
        let max_model_len = world.scheduler.config().max_model_len;
        let mut asked: BTreeMap<GroupId, (Vec<TokenId>, u32, u32)> = BTreeMap::new();
        let mut prefills: BTreeSet<GroupId> = BTreeSet::new();
        let mut to_embed: BTreeMap<GroupId, Vec<TokenId>> = BTreeMap::new();
        let mut arriving: BTreeMap<GroupId, Moved> = BTreeMap::new();
        let mut cancelled: BTreeSet<GroupId> = BTreeSet::new();
        for fact in facts {
            match fact {
                Fact::Submit { family, n_prompt, max_tokens, n, kind } => {
                    let tokens = prompt(family, n_prompt);
                    let mut state = state_of(&tokens, max_tokens, n);
                    if kind == 3 {
                        state.request.sampling.prompt_logprobs = Some(1);
                    }
                    if world.scheduler.config().check(&state).is_err() {
                        continue;
                    }
                    let kind = if kind == 0 { SequenceKind::PrefillForHandoff } else { SequenceKind::Local };
                    let group = world.submit_group(&state, kind);
                    if kind == SequenceKind::PrefillForHandoff {
                        prefills.insert(group);
                    }
                    asked.insert(group, (tokens, max_tokens, n));
                }
                Fact::Replay { family, n_prompt, max_tokens, n, n_known } => {
                    let tokens = prompt(family, n_prompt);
                    let mut state = state_of(&tokens, max_tokens, n);
                    if world.scheduler.config().check(&state).is_err() {
                        continue;
                    }
                    state.choices = part_way(&tokens, max_tokens, n, n_known, max_model_len);
                    // The last choice's first token was not heard.
                    if n > 1 {
                        state.choices[n as usize - 1] = ChoiceState::default();
                    }
                    let group = world.submit_group(&state, SequenceKind::Local);
                    asked.insert(group, (tokens, max_tokens, n));
                }
                Fact::Reserve { family, n_prompt, max_tokens, n } => {
                    let tokens = prompt(family, n_prompt);
                    match world.reserve(&state_of(&tokens, max_tokens, n)) {
                        Ok(ReserveOutcome::Granted(group) | ReserveOutcome::Deferred(group)) => {
                            asked.insert(group, (tokens, max_tokens, n));
                        }
                        Err(Failure::Busy(_) | Failure::Invalid(_)) => {}
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Fact::Arrive { family, n_prompt, max_tokens, n, n_known, n_meanwhile, n_slack } => {
                    let tokens = prompt(family, n_prompt);
                    let mut state = state_of(&tokens, max_tokens, n);
                    if world.scheduler.config().check(&state).is_err() {
                        continue;
                    }
                    state.choices = part_way(&tokens, max_tokens, n, n_known, max_model_len);
                    // The source was asked half way between what is known and its pause.
                    let asked_at = part_way(&tokens, max_tokens, n, n_known + n_meanwhile / 2, max_model_len);
                    let ahead = asked_at.iter().zip(&state.choices);
                    let room = MoveRoom {
                        n_ahead: ahead.map(|(source, known)| source.output.len() - known.output.len()).collect(),
                        n_slack_blocks: n_slack,
                    };
                    match world.reserve_moved(&state, &room) {
                        Ok(group) => {
                            asked.insert(group, (tokens.clone(), max_tokens, n));
                            let n_at_pause = n_known + n_meanwhile;
                            let outputs = part_way(&tokens, max_tokens, n, n_at_pause, max_model_len);
                            arriving.insert(group, Moved { tokens, outputs });
                        }
                        Err(Failure::Busy(_) | Failure::Invalid(_)) => {}
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Fact::Embed { family, n_prompt } => {
                    let tokens = prompt(family, n_prompt);
                    let request = Request::to_embed(RequestId(1), Arc::from(&*tokens), 0);
                    let state = PortableState::fresh(request, Epoch(1));
                    if world.scheduler.config().check_embedded(&state.request).is_ok() {
                        to_embed.insert(world.submit_group(&state, SequenceKind::Embedded), tokens);
                    }
                }
                Fact::Keep(i, keeps) => {
                    if let Some(group) = any_of(&groups_in(&world, Phase::Running), i)
                        && world.scheduler.check_movable(group).is_ok()
                    {
                        world.scheduler.keep_unseen(group, keeps);
                    }
                }
                Fact::Pause(i) => {
                    world.settle();
                    if let Some(group) = any_of(&groups_in(&world, Phase::Running), i) {
                        let can = world.scheduler.check_movable(group).is_ok();
                        prop_assert_eq!(world.scheduler.pause(group).is_ok(), can);
                    }
                }
                Fact::Resume(i, pinned) => {
                    if let Some(group) = any_of(&groups_in(&world, Phase::Paused), i) {
                        if pinned {
                            for id in world.scheduler.members(group) {
                                for layer_group in 0..world.scheduler.config().n_groups() {
                                    let blocks = world.scheduler.computed_blocks(id, layer_group).blocks;
                                    world.pins.extend(blocks.iter().map(|(block, _)| *block));
                                }
                            }
                        }
                        world.resume(group);
                    }
                }
                Fact::Join(i, same) => {
                    let numerics = if same { Numerics::Same } else { Numerics::Other };
                    if let Some(group) = any_of(&groups_in(&world, Phase::Reserved), i) {
                        join(&mut world, &mut arriving, &mut cancelled, group, numerics);
                    }
                }
                Fact::Cancel(i) => {
                    if let Some(&id) = world.scheduler.sequences.keys().nth(i) {
                        let group = world.group(id);
                        world.remove_group(group);
                        cancelled.insert(group);
                    }
                }
                Fact::Release(i, pinned) => {
                    if let Some(&group) = groups_in(&world, Phase::HandingOver).get(i) {
                        if pinned {
                            let tables = world.scheduler.block_tables(group.sequence(0)).iter().flatten();
                            let blocks = tables.filter(|&&block| block != RELEASED_BLOCK);
                            world.pins.extend(blocks.map(|&block| BlockId(block)));
                        }
                        world.remove_group(group);
                    }
                }
                Fact::Unpin => world.pins.clear(),
                Fact::Steps(n) => {
                    for _ in 0..n {
                        world.step();
                    }
                }
                Fact::StepsAhead(n) => {
                    for _ in 0..n {
                        world.step_ahead(&|id| (id.0 + 1) % waits_one_of != 0);
                    }
                }
                Fact::FailStep => cancelled.extend(world.fail_step()),
            }
        }
        world.pins.clear();
        for round in 0..10_000 {
            if world.scheduler.is_empty() {
                break;
            }
            for group in groups_in(&world, Phase::Reserved) {
                join(&mut world, &mut arriving, &mut cancelled, group, Numerics::Same);
            }
            for group in groups_in(&world, Phase::HandingOver) {
                world.remove_group(group);
            }
            for group in groups_in(&world, Phase::Paused) {
                world.resume(group);
            }
            match round % 3 {
                0 => drop(world.step()),
                _ => drop(world.step_ahead(&|_| true)),
            }
        }
        world.settle();
        prop_assert!(world.scheduler.is_empty(), "it does not come to an end: {:?}", world.scheduler.load());
        world.step();
        prop_assert!(world.scheduler.load().ledger.is_whole());
        for (group, tokens) in to_embed {
            if !cancelled.contains(&group) && !world.refused.contains(&group) {
                prop_assert_eq!(&world.embedded[&group], &tokens);
            }
        }
        for (group, (tokens, max_tokens, n)) in asked {
            if cancelled.contains(&group) || world.refused.contains(&group) {
                continue;
            }
            if prefills.contains(&group) {
                for choice in 0..n {
                    prop_assert_eq!(&world.outputs[&group.sequence(choice)], &[next_token_of(&tokens, choice)]);
                }
            } else {
                for choice in 0..n {
                    prop_assert!(world.finished.contains_key(&group.sequence(choice)));
                }
                world.assert_choices_as_alone(group, &tokens, max_tokens, n);
            }
        }
    }
}

fn any_of(groups: &[GroupId], i: usize) -> Option<GroupId> {
    groups.get(i % groups.len().max(1)).copied()
}

fn groups_in(world: &World, phase: Phase) -> Vec<GroupId> {
    let ids = world.scheduler.sequences.keys().copied();
    let groups = ids.filter(|&id| world.scheduler.phase(id) == Some(phase));
    let groups: BTreeSet<GroupId> = groups.map(|id| world.group(id)).collect();
    groups.into_iter().collect()
}

/// Joins a reservation; a request that has outgrown its room while it was on its way is given up.
fn join(
    world: &mut World,
    arriving: &mut BTreeMap<GroupId, Moved>,
    cancelled: &mut BTreeSet<GroupId>,
    group: GroupId,
    numerics: Numerics,
) {
    let Some(Moved { tokens, outputs }) = arriving.remove(&group) else {
        return world.join(group.sequence(0), numerics);
    };
    let grants = world.scheduler.grants_moved(group, outputs.len() as u32);
    let has_room = outputs.iter().zip(&grants).all(|(choice, grant)| {
        let n_kv_tokens = tokens.len() + choice.output.len() - 1;
        choice.finish.is_some() || n_kv_tokens.div_ceil(world::BLOCK_SIZE) <= grant.n_blocks_total
    });
    if has_room {
        world.join_moved(group, &tokens, &outputs);
    } else {
        let refused = world.scheduler.join_moved(group, &outputs, numerics, &|_| false);
        assert!(matches!(refused, Err(Failure::InstanceLost(_))), "{refused:?}");
        world.remove_group(group);
        cancelled.insert(group);
    }
}
