//! A world whose KV memory holds plain token ids, and a model whose next token is a hash of what it reads there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::*;
use crate::ids::{BlockId, Epoch, Fingerprint, Generation, RequestId};
use crate::request::{ChoiceState, Finish, Request, SamplingParams, Token};

pub(super) const BLOCK_SIZE: usize = 4;
pub(super) const N_VOCAB: u32 = 50;
pub(super) const STOP: TokenId = 7;

/// The model of the first choice.
pub(super) fn next_token(context: &[TokenId]) -> TokenId {
    next_token_of(context, 0)
}

/// The model: the next token is a hash of everything before it and of the choice.
pub(super) fn next_token_of(context: &[TokenId], choice: u32) -> TokenId {
    let start = 0xcbf2_9ce4_8422_2325_u64 ^ u64::from(choice) << 32;
    let hash = context.iter().fold(start, |hash, &id| {
        (hash ^ u64::from(id))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(17)
    });
    (hash % u64::from(N_VOCAB)) as TokenId
}

/// What a request gives when nothing else is there.
pub(super) fn alone(prompt: &[TokenId], max_tokens: u32, max_model_len: usize) -> Vec<TokenId> {
    alone_choice(prompt, 0, max_tokens, max_model_len)
}

/// What one choice of it gives.
pub(super) fn alone_choice(prompt: &[TokenId], choice: u32, max_tokens: u32, max_model_len: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    loop {
        tokens.push(next_token_of(&tokens, choice));
        let n_output = tokens.len() - prompt.len();
        if tokens.last() == Some(&STOP) || n_output == max_tokens as usize || tokens.len() == max_model_len {
            return tokens.split_off(prompt.len());
        }
    }
}

pub(super) fn state(prompt: &[TokenId], max_tokens: u32) -> PortableState {
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

pub(super) fn state_of(prompt: &[TokenId], max_tokens: u32, n: u32) -> PortableState {
    let mut request = state(prompt, max_tokens).request;
    request.sampling.n = n;
    PortableState::fresh(request, Epoch(1))
}

/// What a choice has come to after `output`.
pub(super) fn choice_state(output: &[TokenId], max_tokens: u32) -> ChoiceState {
    let tokens = output.iter().enumerate().map(|(i, &id)| Token {
        index: i as u32,
        id,
        logprobs: None,
    });
    let finish = match output.last() {
        Some(&STOP) => Some(Finish::Stop(STOP)),
        _ => (output.len() == max_tokens as usize).then_some(Finish::Length),
    };
    ChoiceState {
        output: tokens.collect(),
        finish,
    }
}

pub(super) fn replay(prompt: &[TokenId], max_tokens: u32, output: &[TokenId]) -> PortableState {
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

pub(super) fn config(n_blocks: usize) -> BatchConfig {
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

pub(super) struct World {
    pub(super) scheduler: BatchScheduler,
    /// `[n_blocks][block_size]`: what the KV memory was computed from, and in which layer group.
    memory: Vec<[Option<(usize, TokenId)>; BLOCK_SIZE]>,
    pub(super) pins: BTreeSet<BlockId>,
    /// As a reader of the memory knows them.
    generations: BTreeMap<BlockId, Generation>,
    now: u64,
    pub(super) outputs: BTreeMap<SequenceId, Vec<TokenId>>,
    pub(super) finished: BTreeMap<SequenceId, Finish>,
    pub(super) refused: BTreeSet<GroupId>,
    /// Tokens whose hidden states were computed since the sequence began, or began again.
    hidden: BTreeMap<SequenceId, Vec<TokenId>>,
    pub(super) embedded: BTreeMap<GroupId, Vec<TokenId>>,
    pub(super) n_computed: usize,
    /// Most blocks that a sequence had given up while it was computed.
    pub(super) n_released: usize,
    /// What is computed when the next batch has been made, so as late as a device may be.
    in_flight: Option<Launched>,
    /// What the last computed batch sampled, by sequence.
    carried: BTreeMap<SequenceId, TokenId>,
    /// Of so many tokens that are sampled alone, the device gives one back; 0: none.
    pub(super) gives_back_one_of: u64,
    /// Items that were computed for nothing, because their sequence had ended.
    pub(super) n_wasted: usize,
    pub(super) n_ahead: usize,
}

/// A batch with its inputs as they were when it was launched.
struct Launched {
    batch: Batch,
    /// Of each item: tables of ids, and the tokens of the context that are known.
    inputs: Vec<(Vec<Vec<u32>>, Vec<TokenId>)>,
}

impl World {
    pub(super) fn new(config: BatchConfig) -> World {
        World {
            memory: vec![[None; BLOCK_SIZE]; config.n_blocks],
            scheduler: BatchScheduler::new(config).unwrap(),
            pins: BTreeSet::new(),
            generations: BTreeMap::new(),
            now: 0,
            outputs: BTreeMap::new(),
            finished: BTreeMap::new(),
            refused: BTreeSet::new(),
            hidden: BTreeMap::new(),
            embedded: BTreeMap::new(),
            n_computed: 0,
            n_released: 0,
            in_flight: None,
            carried: BTreeMap::new(),
            gives_back_one_of: 0,
            n_wasted: 0,
            n_ahead: 0,
        }
    }

    pub(super) fn submit_group(&mut self, state: &PortableState, kind: SequenceKind) -> GroupId {
        let group = self.scheduler.submit(state, kind).unwrap();
        self.remember(group, &state.choices);
        group
    }

    fn remember(&mut self, group: GroupId, choices: &[ChoiceState]) {
        for (choice, ChoiceState { output, finish }) in (0..).zip(choices) {
            let id = group.sequence(choice);
            self.outputs.insert(id, output.iter().map(|token| token.id).collect());
            self.finished.extend(finish.map(|finish| (id, finish)));
        }
    }

    pub(super) fn submit(&mut self, state: &PortableState, kind: SequenceKind) -> SequenceId {
        self.submit_group(state, kind).sequence(0)
    }

    pub(super) fn local(&mut self, prompt: &[TokenId], max_tokens: u32) -> SequenceId {
        self.submit(&state(prompt, max_tokens), SequenceKind::Local)
    }

    pub(super) fn reserve(&mut self, state: &PortableState) -> Result<ReserveOutcome, Failure> {
        let pins = self.pins.clone();
        self.scheduler.reserve(Nanos(self.now), state, &|id| pins.contains(&id))
    }

    pub(super) fn reserved(&mut self, prompt: &[TokenId], max_tokens: u32) -> SequenceId {
        match self.reserve(&state(prompt, max_tokens)) {
            Ok(ReserveOutcome::Granted(group)) => group.sequence(0),
            other => panic!("not granted: {other:?}"),
        }
    }

    pub(super) fn reserve_moved(&mut self, state: &PortableState, room: &MoveRoom) -> Result<GroupId, Failure> {
        let pins = self.pins.clone();
        let group = self.scheduler.reserve_moved(state, room, &|id| pins.contains(&id))?;
        self.remember(group, &state.choices);
        Ok(group)
    }

    pub(super) fn remove_group(&mut self, group: GroupId) {
        let pins = self.pins.clone();
        self.scheduler.remove_group(group, &|id| pins.contains(&id));
    }

    pub(super) fn group(&self, id: SequenceId) -> GroupId {
        self.scheduler.member(id).group
    }

    pub(super) fn resume(&mut self, group: GroupId) -> Resumed {
        let pins = self.pins.clone();
        let resumed = self.scheduler.resume(group, &|id| pins.contains(&id));
        self.copy(&resumed.copies);
        self.scheduler.check();
        resumed
    }

    /// The transfer of what a moved reservation lacks of `outputs`, and the join.
    pub(super) fn join_moved(&mut self, group: GroupId, prompt: &[TokenId], outputs: &[ChoiceState]) {
        let grants = self.scheduler.grants_moved(group, outputs.len() as u32);
        let tokens = |choice: &ChoiceState| {
            let output = choice.output.iter().map(|token| token.id);
            prompt.iter().copied().chain(output).collect::<Vec<TokenId>>()
        };
        for (choice, grant) in outputs.iter().zip(&grants) {
            let tokens = tokens(choice);
            // Of a finished choice only the prompt travels, which others may share.
            let n_kv = match choice.finish {
                Some(_) => prompt.len() / BLOCK_SIZE * BLOCK_SIZE,
                None => tokens.len() - 1,
            };
            self.land(grant, &tokens[..n_kv]);
        }
        let pins = self.pins.clone();
        let is_pinned = |id: BlockId| pins.contains(&id);
        self.scheduler
            .join_moved(group, outputs, Numerics::Same, &is_pinned)
            .unwrap();
        self.remember(group, outputs);
        for id in self.scheduler.members(group) {
            let n_computed = self.scheduler.n_computed(id);
            assert_eq!(self.read_back(id, n_computed), self.scheduler.tokens(id)[..n_computed]);
        }
        self.scheduler.check();
    }

    fn land(&mut self, grant: &Grant, tokens: &[TokenId]) {
        for (layer_group, grant) in grant.layer_groups.iter().enumerate() {
            for (i, (block, _)) in grant.blocks.iter().enumerate() {
                let start = (grant.n_blocks_held + i) * BLOCK_SIZE;
                for (slot, &token) in tokens.iter().skip(start).take(BLOCK_SIZE).enumerate() {
                    self.memory[block.0 as usize][slot] = Some((layer_group, token));
                }
            }
        }
    }

    fn copy(&mut self, copies: &[BlockCopy]) {
        self.generations.extend(self.scheduler.take_allocated());
        for copy in copies {
            assert!(!self.pins.contains(&copy.to), "a block that is read is written");
            self.memory[copy.to.0 as usize] = self.memory[copy.from.0 as usize];
        }
    }

    pub(super) fn remove(&mut self, id: SequenceId) {
        let pins = self.pins.clone();
        self.scheduler.remove(id, &|id| pins.contains(&id));
    }

    /// Reads the first `n` tokens of a sequence back from memory through its table.
    pub(super) fn read_back(&self, id: SequenceId, n: usize) -> Vec<TokenId> {
        self.read_through(self.scheduler.block_tables(id), self.scheduler.tokens(id), n)
    }

    fn read_through(&self, tables: &[Vec<u32>], tokens: &[TokenId], n: usize) -> Vec<TokenId> {
        let read = |layer_group: usize, pos: usize| {
            let block = tables[layer_group][pos / BLOCK_SIZE];
            // Nobody sees it, so nobody has it: the tokens stand for what it was.
            if block == RELEASED_BLOCK {
                return tokens[pos];
            }
            let slot = self.memory[block as usize][pos % BLOCK_SIZE];
            let (written_for, token) = slot.unwrap_or_else(|| panic!("position {pos} of {tables:?} was never written"));
            assert_eq!(
                written_for, layer_group,
                "position {pos} of {tables:?} is in a block of another group"
            );
            token
        };
        let read_all = |pos: usize| {
            let token = read(0, pos);
            for layer_group in 1..tables.len() {
                assert_eq!(
                    read(layer_group, pos),
                    token,
                    "position {pos} of {tables:?}, group {layer_group}"
                );
            }
            token
        };
        (0..n).map(read_all).collect()
    }

    /// The transfer of a reservation's KV, its first token, and the join.
    pub(super) fn join(&mut self, id: SequenceId, numerics: Numerics) {
        let group = self.group(id);
        let tokens = self.scheduler.tokens(id).to_vec();
        let grant = self.scheduler.grant(group);
        self.land(&grant, &tokens);
        assert_eq!(
            self.read_back(id, tokens.len()),
            tokens,
            "the blocks held and received give the context"
        );
        let n_choices = self.scheduler.sequences[&id].n_choices;
        let first: Vec<TokenId> = (0..n_choices).map(|choice| next_token_of(&tokens, choice)).collect();
        let pins = self.pins.clone();
        let committed = self.scheduler.join(group, &first, numerics, &|id| pins.contains(&id));
        self.take(committed);
    }

    fn take(&mut self, committed: Committed) {
        self.copy(&committed.copies);
        for group in committed.embedded {
            let tokens = self.hidden.remove(&group.sequence(0)).unwrap_or_default();
            assert!(self.embedded.insert(group, tokens).is_none(), "embedded twice");
        }
        for Continued { member, token, finish } in committed.continued {
            let id = member.group.sequence(member.choice);
            self.outputs.entry(id).or_default().push(token);
            self.finished.extend(finish.map(|finish| (id, finish)));
        }
        self.scheduler.check();
    }

    /// A batch made, computed and committed.
    pub(super) fn step(&mut self) -> Batch {
        self.settle();
        self.now += 1;
        let pins = self.pins.clone();
        let batch = self.scheduler.schedule(Nanos(self.now), &|id| pins.contains(&id));
        self.look_at(&batch);
        let in_batch: BTreeSet<SequenceId> = batch.items.iter().map(|item| item.sequence).collect();
        for (id, sequence) in &self.scheduler.sequences {
            if self.scheduler.phase(*id) == Some(Phase::Running) && sequence.n_left() == 1 && sequence.n_computed > 0 {
                assert!(in_batch.contains(id), "a decode is in every step");
            }
        }
        let launched = self.launch(batch.clone());
        self.finish(launched);
        batch
    }

    /// A batch made and launched while the one before it is in flight; then that one computed and committed.
    pub(super) fn step_ahead(&mut self, goes_on: &dyn Fn(SequenceId) -> bool) -> Batch {
        self.now += 1;
        let pins = self.pins.clone();
        let batch = self
            .scheduler
            .schedule_ahead(Nanos(self.now), goes_on, &|id| pins.contains(&id));
        self.look_at(&batch);
        self.n_ahead += usize::from(self.in_flight.is_some() && !batch.items.is_empty());
        let launched = self.launch(batch.clone());
        self.settle();
        self.in_flight = (!batch.items.is_empty()).then_some(launched);
        batch
    }

    /// Commits what is in flight.
    pub(super) fn settle(&mut self) {
        if let Some(launched) = self.in_flight.take() {
            self.finish(launched);
        }
    }

    /// The step in flight cannot be computed: its requests are given up.
    pub(super) fn fail_step(&mut self) -> BTreeSet<GroupId> {
        let Some(Launched { batch, .. }) = self.in_flight.take() else {
            return BTreeSet::new();
        };
        let due = batch.items.iter().map(|item| item.sequence);
        let due = due.filter(|id| self.scheduler.is_due(*id));
        let groups: BTreeSet<GroupId> = due.map(|id| self.group(id)).collect();
        groups.iter().for_each(|&group| self.remove_group(group));
        self.scheduler.abandon(&batch);
        self.scheduler.check();
        groups
    }

    /// What holds of every batch.
    fn look_at(&mut self, batch: &Batch) {
        self.scheduler.check();
        self.refused.extend(batch.refused.iter().map(|(group, _)| *group));
        for id in &batch.preempted {
            self.hidden.remove(id);
        }
        self.generations.extend(self.scheduler.take_allocated());
        let config = self.scheduler.config();
        let n_tokens: usize = batch.items.iter().map(|item| item.n_tokens).sum();
        assert!(n_tokens <= config.max_batch_tokens, "the step is over its budget");
        let in_batch: BTreeSet<SequenceId> = batch.items.iter().map(|item| item.sequence).collect();
        assert_eq!(in_batch.len(), batch.items.len(), "a sequence is in the batch once");
        let load = self.scheduler.load();
        assert!(load.n_running + load.n_reserved <= config.max_num_seqs, "{load:?}");
    }

    fn launch(&mut self, batch: Batch) -> Launched {
        let mut inputs = Vec::new();
        for item in &batch.items {
            let tables = self.scheduler.block_tables(item.sequence).to_vec();
            let tokens = self.scheduler.tokens(item.sequence).to_vec();
            let end = item.start_pos + item.n_tokens;
            assert!(
                end <= tokens.len() || (end == tokens.len() + 1 && item.n_tokens == 1),
                "only the token of a decode may be unknown"
            );
            self.check_released(&tables, item.start_pos);
            for (layer_group, table) in tables.iter().enumerate() {
                for (block, generation) in self.scheduler.computed_blocks(item.sequence, layer_group).blocks {
                    assert_eq!(self.generations.get(&block), Some(&generation), "told of {block:?}");
                }
                for pos in item.start_pos..end {
                    let block = table[pos / BLOCK_SIZE];
                    assert!(
                        !self.pins.contains(&BlockId(block)),
                        "block {block} is written while a transfer reads it"
                    );
                }
            }
            inputs.push((tables, tokens[..end.min(tokens.len())].to_vec()));
        }
        Launched { batch, inputs }
    }

    /// The queries from `start_pos` on see no released block.
    fn check_released(&mut self, tables: &[Vec<u32>], start_pos: usize) {
        let windows = &self.scheduler.config().windows;
        for (layer_group, (table, window)) in tables.iter().zip(windows).enumerate() {
            let n_released = table.iter().filter(|&&block| block == RELEASED_BLOCK).count();
            let seen = window.map_or(usize::MAX, |window| window.n_tokens);
            assert!(
                n_released * BLOCK_SIZE <= (start_pos + 1).saturating_sub(seen),
                "a query at {start_pos} sees a released block of group {layer_group}"
            );
            self.n_released = self.n_released.max(n_released);
        }
    }

    /// Computes a batch and commits it.
    fn finish(&mut self, launched: Launched) {
        let Launched { batch, mut inputs } = launched;
        for (item, (tables, tokens)) in batch.items.iter().zip(&mut inputs) {
            let end = item.start_pos + item.n_tokens;
            if tokens.len() < end {
                tokens.push(self.carried[&item.sequence]);
            }
            for (layer_group, table) in tables.iter().enumerate() {
                for pos in item.start_pos..end {
                    self.memory[table[pos / BLOCK_SIZE] as usize][pos % BLOCK_SIZE] = Some((layer_group, tokens[pos]));
                }
            }
            self.n_computed += item.n_tokens;
        }
        self.carried.clear();
        let mut sampled = Vec::new();
        for (item, (tables, tokens)) in batch.items.iter().zip(&mut inputs) {
            let end = item.start_pos + item.n_tokens;
            if !self.scheduler.is_due(item.sequence) {
                // The device computes on with whatever is there.
                self.n_wasted += 1;
                self.carried.insert(item.sequence, 0);
                sampled.push(Vec::new());
                continue;
            }
            if self.scheduler.is_embedded(item.sequence) {
                let hidden = self.hidden.entry(item.sequence).or_default();
                assert_eq!(hidden.len(), item.start_pos, "hidden states come once and in order");
                hidden.extend(&tokens[item.start_pos..end]);
            }
            // Of what it was launched with, some may have been given up that its queries do not see.
            let now = self.scheduler.block_tables(item.sequence);
            for (block, now) in tables
                .iter_mut()
                .zip(now)
                .flat_map(|(table, now)| table.iter_mut().zip(now))
            {
                *block = if *now == RELEASED_BLOCK { RELEASED_BLOCK } else { *block };
            }
            self.check_released(tables, item.start_pos);
            let context = self.read_through(tables, tokens, end);
            assert_eq!(context, tokens[..end], "the blocks give the context");
            let first = self.scheduler.member(item.sequence).choice;
            let choices = first..first + item.samples.n_tokens();
            let own: Vec<TokenId> = choices.map(|choice| next_token_of(&context, choice)).collect();
            let draw = self.now.wrapping_mul(0x9e37_79b9).wrapping_add(item.sequence.0 * 7) >> 3;
            if item.samples == Samples::Token
                && self.gives_back_one_of > 0
                && draw.is_multiple_of(self.gives_back_one_of)
            {
                self.scheduler.take_back(item.sequence);
                self.carried.insert(item.sequence, 0);
                sampled.push(Vec::new());
                continue;
            }
            self.carried.extend(own.first().map(|&token| (item.sequence, token)));
            sampled.push(own);
        }
        let pins = self.pins.clone();
        let committed = self.scheduler.commit(&batch, &sampled, &|id| pins.contains(&id));
        self.take(committed);
    }

    pub(super) fn run(&mut self) {
        for _ in 0..10_000 {
            if self.scheduler.is_empty() {
                assert!(self.scheduler.load().ledger.is_whole());
                return;
            }
            self.step();
        }
        panic!("the scheduler does not come to an end: {:?}", self.scheduler.load());
    }

    pub(super) fn assert_as_alone(&self, id: SequenceId, prompt: &[TokenId], max_tokens: u32) {
        let max_model_len = self.scheduler.config().max_model_len;
        assert_eq!(
            self.outputs[&id],
            alone(prompt, max_tokens, max_model_len),
            "tokens of {id:?}"
        );
    }
}

impl World {
    pub(super) fn assert_choices_as_alone(&self, group: GroupId, prompt: &[TokenId], max_tokens: u32, n: u32) {
        let max_model_len = self.scheduler.config().max_model_len;
        for choice in 0..n {
            let expected = alone_choice(prompt, choice, max_tokens, max_model_len);
            assert_eq!(
                self.outputs[&group.sequence(choice)],
                expected,
                "choice {choice} of {group:?}"
            );
        }
    }
}

pub(super) fn prompt(seed: u32, n: usize) -> Vec<TokenId> {
    (0..n as u32).map(|i| (seed * 13 + i * 5) % N_VOCAB).collect()
}

/// A prompt whose generation alone has at least `n_output` tokens.
pub(super) fn lively(first_seed: u32, n: usize, n_output: usize) -> Vec<TokenId> {
    let candidates = (first_seed..first_seed + 200).map(|seed| prompt(seed, n));
    candidates
        .into_iter()
        .find(|prompt| alone(prompt, n_output as u32, 1000).len() == n_output)
        .unwrap()
}
