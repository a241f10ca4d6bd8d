//! Random arrivals, joins, cancels and releases over tiny pools.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Fact {
    Submit {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        kind: u8,
    },
    Reserve {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
    },
    Join(usize, bool),
    Cancel(usize),
    Release(usize, bool),
    Unpin,
    Steps(usize),
}

fn fact() -> impl Strategy<Value = Fact> {
    let shape = || (0..3u32, 1..24usize, 1..20u32);
    prop_oneof![
        4 => (shape(), 0..4u8).prop_map(|((family, n_prompt, max_tokens), kind)| {
            Fact::Submit { family, n_prompt, max_tokens, kind }
        }),
        2 => shape().prop_map(|(family, n_prompt, max_tokens)| Fact::Reserve { family, n_prompt, max_tokens }),
        2 => (0..8usize, any::<bool>()).prop_map(|(i, same)| Fact::Join(i, same)),
        1 => (0..16usize).prop_map(Fact::Cancel),
        2 => (0..8usize, any::<bool>()).prop_map(|(i, pinned)| Fact::Release(i, pinned)),
        1 => Just(Fact::Unpin),
        6 => (1..12usize).prop_map(Fact::Steps),
    ]
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
        facts in prop::collection::vec(fact(), 1..60),
    ) {
        let prefix_caching = if is_cached { PrefixCaching::On } else { PrefixCaching::Off };
        let mut world = World::new(BatchConfig { max_batch_tokens: budget, prefix_caching, ..config(n_blocks) });
        let mut asked: BTreeMap<SequenceId, (Vec<TokenId>, u32)> = BTreeMap::new();
        let mut prefills: BTreeSet<SequenceId> = BTreeSet::new();
        let mut cancelled: BTreeSet<SequenceId> = BTreeSet::new();
        let in_phase = |world: &World, phase| {
            let ids = world.scheduler.sequences.keys().copied();
            ids.filter(|&id| world.scheduler.phase(id) == Some(phase)).collect::<Vec<_>>()
        };
        for fact in facts {
            match fact {
                Fact::Submit { family, n_prompt, max_tokens, kind } => {
                    let tokens = prompt(family, n_prompt);
                    let mut state = state(&tokens, max_tokens);
                    if kind == 3 {
                        state.request.sampling.prompt_logprobs = Some(1);
                    }
                    if world.scheduler.config().check(&state).is_err() {
                        continue;
                    }
                    let kind = if kind == 0 { SequenceKind::PrefillForHandoff } else { SequenceKind::Local };
                    let id = world.submit(&state, kind);
                    if kind == SequenceKind::PrefillForHandoff {
                        prefills.insert(id);
                    }
                    asked.insert(id, (tokens, max_tokens));
                }
                Fact::Reserve { family, n_prompt, max_tokens } => {
                    let tokens = prompt(family, n_prompt);
                    match world.reserve(&state(&tokens, max_tokens)) {
                        Ok(ReserveOutcome::Granted(id) | ReserveOutcome::Deferred(id)) => {
                            asked.insert(id, (tokens, max_tokens));
                        }
                        Err(Failure::Busy(_) | Failure::Invalid(_)) => {}
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Fact::Join(i, same) => {
                    let numerics = if same { Numerics::Same } else { Numerics::Other };
                    if let Some(&id) = in_phase(&world, Phase::Reserved).get(i) {
                        world.join(id, numerics);
                    }
                }
                Fact::Cancel(i) => {
                    if let Some(&id) = world.scheduler.sequences.keys().nth(i) {
                        world.remove(id);
                        cancelled.insert(id);
                    }
                }
                Fact::Release(i, pinned) => {
                    if let Some(&id) = in_phase(&world, Phase::HandingOver).get(i) {
                        if pinned {
                            world.pins.extend(world.scheduler.block_table(id).iter().map(|&block| BlockId(block)));
                        }
                        world.remove(id);
                    }
                }
                Fact::Unpin => world.pins.clear(),
                Fact::Steps(n) => {
                    for _ in 0..n {
                        world.step();
                    }
                }
            }
        }
        world.pins.clear();
        for _ in 0..10_000 {
            if world.scheduler.is_empty() {
                break;
            }
            for id in in_phase(&world, Phase::Reserved) {
                world.join(id, Numerics::Same);
            }
            for id in in_phase(&world, Phase::HandingOver) {
                world.remove(id);
            }
            world.step();
        }
        prop_assert!(world.scheduler.is_empty(), "it does not come to an end: {:?}", world.scheduler.load());
        world.step();
        prop_assert!(world.scheduler.load().ledger.is_whole());
        for (id, (tokens, max_tokens)) in asked {
            if cancelled.contains(&id) || world.refused.contains(&id) {
                continue;
            }
            if prefills.contains(&id) {
                prop_assert_eq!(&world.outputs[&id], &[next_token(&tokens)]);
            } else {
                prop_assert!(world.finished.contains_key(&id));
                world.assert_as_alone(id, &tokens, max_tokens);
            }
        }
    }
}
