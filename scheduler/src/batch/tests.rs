//! The batch scheduler against a world whose KV memory holds plain token ids: a wrong block gives a wrong token.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::ids::{Epoch, Fingerprint, RequestId};
use crate::request::{ChoiceState, Request, SamplingParams, Token};

const BLOCK_SIZE: usize = 4;
const N_VOCAB: u32 = 50;
const STOP: TokenId = 7;

/// The model: the next token is a hash of everything before it.
fn next_token(context: &[TokenId]) -> TokenId {
    let hash = context.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &id| {
        (hash ^ u64::from(id))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(17)
    });
    (hash % u64::from(N_VOCAB)) as TokenId
}

/// What a request gives when nothing else is there.
fn alone(prompt: &[TokenId], max_tokens: u32, max_model_len: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    loop {
        tokens.push(next_token(&tokens));
        let n_output = tokens.len() - prompt.len();
        if tokens.last() == Some(&STOP) || n_output == max_tokens as usize || tokens.len() == max_model_len {
            return tokens.split_off(prompt.len());
        }
    }
}

fn state(prompt: &[TokenId], max_tokens: u32) -> PortableState {
    let sampling = SamplingParams {
        max_tokens,
        stop_token_ids: vec![STOP],
        ..SamplingParams::default()
    };
    let request = Request {
        id: RequestId(1),
        prompt_ids: Arc::from(prompt),
        sampling,
        cache_salt: 0,
    };
    PortableState::fresh(request, Epoch(1))
}

fn replay(prompt: &[TokenId], max_tokens: u32, output: &[TokenId]) -> PortableState {
    let tokens = output.iter().enumerate().map(|(i, &id)| Token {
        index: i as u32,
        id,
        logprobs: None,
    });
    let choice = ChoiceState {
        output: tokens.collect(),
        finish: None,
    };
    PortableState {
        choices: vec![choice],
        ..state(prompt, max_tokens)
    }
}

fn config(n_blocks: usize) -> BatchConfig {
    BatchConfig {
        max_num_seqs: 4,
        max_batch_tokens: 8,
        max_defer: Nanos(20),
        max_stall: Nanos(50),
        max_prompt_logprob_rows: 5,
        max_prefix_events: 8,
        ..BatchConfig::new(n_blocks, BLOCK_SIZE, Fingerprint([1; 32]))
    }
}

struct World {
    scheduler: BatchScheduler,
    /// `[n_blocks][block_size]`: what the KV memory was computed from.
    memory: Vec<[Option<TokenId>; BLOCK_SIZE]>,
    pins: BTreeSet<BlockId>,
    now: u64,
    outputs: BTreeMap<SequenceId, Vec<TokenId>>,
    finished: BTreeMap<SequenceId, Finish>,
    refused: BTreeSet<SequenceId>,
    n_computed: usize,
}

impl World {
    fn new(config: BatchConfig) -> World {
        World {
            memory: vec![[None; BLOCK_SIZE]; config.n_blocks],
            scheduler: BatchScheduler::new(config).unwrap(),
            pins: BTreeSet::new(),
            now: 0,
            outputs: BTreeMap::new(),
            finished: BTreeMap::new(),
            refused: BTreeSet::new(),
            n_computed: 0,
        }
    }

    fn submit(&mut self, state: &PortableState, kind: SequenceKind) -> SequenceId {
        let id = self.scheduler.submit(state, kind).unwrap();
        self.outputs
            .insert(id, state.choices[0].output.iter().map(|token| token.id).collect());
        id
    }

    fn local(&mut self, prompt: &[TokenId], max_tokens: u32) -> SequenceId {
        self.submit(&state(prompt, max_tokens), SequenceKind::Local)
    }

    fn reserve(&mut self, state: &PortableState) -> Result<ReserveOutcome, Failure> {
        let pins = self.pins.clone();
        self.scheduler.reserve(Nanos(self.now), state, &|id| pins.contains(&id))
    }

    fn reserved(&mut self, prompt: &[TokenId], max_tokens: u32) -> SequenceId {
        match self.reserve(&state(prompt, max_tokens)) {
            Ok(ReserveOutcome::Granted(id)) => id,
            other => panic!("not granted: {other:?}"),
        }
    }

    fn remove(&mut self, id: SequenceId) {
        let pins = self.pins.clone();
        self.scheduler.remove(id, &|id| pins.contains(&id));
    }

    /// Reads the first `n` tokens of a sequence back from memory through its table.
    fn read_back(&self, id: SequenceId, n: usize) -> Vec<TokenId> {
        let table = self.scheduler.block_table(id);
        (0..n)
            .map(|pos| {
                let slot = self.memory[table[pos / BLOCK_SIZE] as usize][pos % BLOCK_SIZE];
                slot.unwrap_or_else(|| panic!("position {pos} of {id:?} was never written"))
            })
            .collect()
    }

    /// The transfer of a reservation's KV, its first token, and the join.
    fn join(&mut self, id: SequenceId, numerics: Numerics) {
        let tokens = self.scheduler.tokens(id).to_vec();
        let grant = self.scheduler.grant(id);
        for (i, (block, _)) in grant.blocks.iter().enumerate() {
            let start = (grant.n_blocks_held + i) * BLOCK_SIZE;
            for (slot, &token) in tokens.iter().skip(start).take(BLOCK_SIZE).enumerate() {
                self.memory[block.0 as usize][slot] = Some(token);
            }
        }
        assert_eq!(
            self.read_back(id, tokens.len()),
            tokens,
            "the blocks held and received give the context"
        );
        let first = next_token(&tokens);
        let pins = self.pins.clone();
        let finish = self.scheduler.join(id, first, numerics, &|id| pins.contains(&id));
        self.outputs.entry(id).or_default().push(first);
        self.finished.extend(finish.map(|finish| (id, finish)));
    }

    fn step(&mut self) -> Batch {
        self.now += 1;
        let pins = self.pins.clone();
        let is_pinned = move |id: BlockId| pins.contains(&id);
        let batch = self.scheduler.schedule(Nanos(self.now), &is_pinned);
        self.scheduler.check();
        self.refused.extend(batch.refused.iter().map(|(id, _)| *id));

        let config = self.scheduler.config();
        let n_tokens: usize = batch.items.iter().map(|item| item.n_tokens).sum();
        assert!(n_tokens <= config.max_batch_tokens, "the step is over its budget");
        let in_batch: BTreeSet<SequenceId> = batch.items.iter().map(|item| item.sequence).collect();
        assert_eq!(in_batch.len(), batch.items.len(), "a sequence is in the batch once");
        assert!(self.scheduler.load().n_running <= config.max_num_seqs);
        for (id, sequence) in &self.scheduler.sequences {
            if self.scheduler.phase(*id) == Some(Phase::Running) && sequence.n_left() == 1 && sequence.n_computed > 0 {
                assert!(in_batch.contains(id), "a decode is in every step");
            }
        }

        let mut sampled = Vec::new();
        for item in &batch.items {
            let tokens = self.scheduler.tokens(item.sequence).to_vec();
            let table = self.scheduler.block_table(item.sequence).to_vec();
            let end = item.start_pos + item.n_tokens;
            for pos in item.start_pos..end {
                let block = table[pos / BLOCK_SIZE];
                assert!(
                    !self.pins.contains(&BlockId(block)),
                    "block {block} is written while a transfer reads it"
                );
                self.memory[block as usize][pos % BLOCK_SIZE] = Some(tokens[pos]);
            }
            self.n_computed += item.n_tokens;
        }
        for item in &batch.items {
            let end = item.start_pos + item.n_tokens;
            let context = self.read_back(item.sequence, end);
            assert_eq!(
                context,
                self.scheduler.tokens(item.sequence)[..end],
                "the blocks give the context"
            );
            sampled.push((item.samples == Samples::Token).then(|| next_token(&context)));
        }
        for ((id, finish), token) in self
            .scheduler
            .commit(&batch, &sampled, &is_pinned)
            .into_iter()
            .zip(sampled.into_iter().flatten())
        {
            self.outputs.entry(id).or_default().push(token);
            self.finished.extend(finish.map(|finish| (id, finish)));
        }
        self.scheduler.check();
        batch
    }

    fn run(&mut self) {
        for _ in 0..10_000 {
            if self.scheduler.is_empty() {
                assert!(self.scheduler.load().ledger.is_whole());
                return;
            }
            self.step();
        }
        panic!("the scheduler does not come to an end: {:?}", self.scheduler.load());
    }

    fn assert_as_alone(&self, id: SequenceId, prompt: &[TokenId], max_tokens: u32) {
        let max_model_len = self.scheduler.config().max_model_len;
        assert_eq!(
            self.outputs[&id],
            alone(prompt, max_tokens, max_model_len),
            "tokens of {id:?}"
        );
    }
}

fn prompt(seed: u32, n: usize) -> Vec<TokenId> {
    (0..n as u32).map(|i| (seed * 13 + i * 5) % N_VOCAB).collect()
}

/// A prompt whose generation alone has at least `n_output` tokens.
fn lively(first_seed: u32, n: usize, n_output: usize) -> Vec<TokenId> {
    let candidates = (first_seed..first_seed + 200).map(|seed| prompt(seed, n));
    candidates
        .into_iter()
        .find(|prompt| alone(prompt, n_output as u32, 1000).len() == n_output)
        .unwrap()
}

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
    world.pins.insert(BlockId(world.scheduler.block_table(id)[2]));
    world.remove(id);
    let ledger = world.scheduler.load().ledger;
    assert_eq!((ledger.held, ledger.cached, ledger.quarantined), (0, 2, 1));
    world.pins.clear();
    world.step();
    assert!(world.scheduler.load().ledger.is_whole());
}

#[test]
fn a_reservation_takes_its_context_and_one_block() {
    let mut world = World::new(config(6));
    let tokens = lively(0, 8, 6);
    let id = world.reserved(&tokens, 6);
    let grant = world.scheduler.grant(id);
    assert_eq!(
        (grant.n_blocks_total, grant.n_blocks_held, grant.blocks.len()),
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
    let grant = world.scheduler.grant(again);
    assert_eq!((grant.n_blocks_total, grant.n_blocks_held), (2, 2));
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

#[test]
fn a_prefix_is_received_once() {
    let mut world = World::new(config(64));
    let tokens = prompt(1, 14);
    let first = world.reserved(&tokens, 4);
    let Ok(ReserveOutcome::Deferred(second)) = world.reserve(&state(&tokens, 4)) else {
        panic!("not deferred")
    };
    let local = world.local(&tokens, 4);
    assert_eq!(world.step(), Batch::default(), "both wait for the first");
    world.join(first, Numerics::Same);
    let batch = world.step();
    assert_eq!(batch.granted, [second]);
    assert_eq!(
        batch.started,
        [Started {
            sequence: local,
            n_hit_tokens: 12
        }]
    );
    assert_eq!(world.scheduler.grant(second).n_blocks_held, 3);
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
        world.scheduler.block_table(reserved)[..3],
        world.scheduler.block_table(prefill)[..3]
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
    world.remove(reservation);
    world.run();
    world.assert_as_alone(local, &tokens, 4);
}

#[test]
fn kv_of_another_class_stays_with_its_sequence() {
    let mut world = World::new(config(64));
    let tokens = lively(0, 8, 9);
    let id = world.reserved(&tokens, 9);
    world.join(id, Numerics::Other);
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
    assert_eq!(world.refused, BTreeSet::from([waiting]));
    world.remove(reserved);
    world.run();
}

#[test]
fn what_can_never_run_is_refused() {
    let mut world = World::new(config(4));
    let mut refuse = |state: &PortableState| match world.scheduler.submit(state, SequenceKind::Local) {
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
