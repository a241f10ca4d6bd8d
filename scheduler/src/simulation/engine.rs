//! The step loop of one instance around the production batch scheduler: takes commands between steps, computes on the
//! simulated memory, tells whoever owns a request.

mod moving;

use std::collections::{BTreeMap, VecDeque};

use super::memory::Memory;
use super::network::{AtInstance, Event};
use super::workload::next_token;
use super::{FaultKind, Simulation};
use crate::batch::{
    Batch, BatchItem, BatchScheduler, Committed, Continued, Grant, GroupId, Member, Numerics, Samples, SequenceKind,
};
use crate::cost::StepSample;
use crate::ids::{BlockId, Generation, Nanos, TokenId};
use crate::request::{ChoiceState, Failure, Finish, PortableState, Token};

/// How often the loop looks around while something waits for a transfer to end.
const BUSY_TICK: Nanos = Nanos::from_millis(5);

pub(super) struct Engine {
    pub(super) scheduler: BatchScheduler,
    pub(super) memory: Memory,
    pub(super) open: BTreeMap<GroupId, OpenGroup>,
    commands: VecDeque<Command>,
    stepping: Option<Batch>,
    round_at: Option<Nanos>,
    pub(super) n_beats: u64,
    pub(super) samples: Vec<StepSample>,
}

/// Whom a request tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Task(u64),
    Prefill(usize),
}

pub(super) struct OpenGroup {
    pub(super) owner: Owner,
    pub(super) request: usize,
    pub(super) seed: u64,
    /// All that was generated, here and before.
    pub(super) choices: Vec<ChoiceState>,
    /// Of each layer group, leading blocks that a prefill has made ready, or that are not wanted.
    n_ready: Vec<usize>,
    /// The move of it that is under way, by its transfer.
    mover: Option<usize>,
    /// Nobody listens any more.
    pub(super) is_abandoned: bool,
    slack: Option<usize>,
}

#[derive(Debug)]
pub(super) enum Arrived {
    First(Vec<Token>),
    Outputs(Vec<ChoiceState>),
}

#[derive(Debug)]
pub(super) enum Command {
    Generate {
        task: u64,
        state: Box<PortableState>,
    },
    Prefill {
        transfer: usize,
        state: Box<PortableState>,
        first_blocks: Vec<u32>,
    },
    /// For a handoff, or with this much slack for a move.
    Reserve {
        task: u64,
        state: Box<PortableState>,
        slack: Option<usize>,
    },
    Join {
        group: GroupId,
        arrived: Arrived,
        numerics: Numerics,
    },
    StartMove {
        transfer: usize,
    },
    Pin {
        transfer: usize,
        group: GroupId,
        from: Vec<Vec<u32>>,
        pauses: bool,
    },
}

/// Blocks of each choice in each layer group, pinned in every layer.
#[derive(Debug, Default)]
pub(super) struct Stage {
    pub(super) ends: Vec<u32>,
    pub(super) blocks: Vec<Vec<Vec<(BlockId, Generation)>>>,
}

impl Engine {
    pub(super) fn new(scheduler: BatchScheduler, memory: Memory) -> Engine {
        Engine {
            scheduler,
            memory,
            open: BTreeMap::new(),
            commands: VecDeque::new(),
            stepping: None,
            round_at: None,
            n_beats: 0,
            samples: Vec::new(),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.open.is_empty() && self.commands.is_empty() && self.stepping.is_none() && self.scheduler.is_empty()
    }

    /// Gives the blocks of a reservation back to be read or reused.
    pub(super) fn end_writes(&mut self, reserved: &mut Vec<Grant>) {
        for (block, generation) in std::mem::take(reserved).iter().flat_map(Grant::blocks) {
            assert_eq!(
                self.memory.generation(block),
                generation,
                "{block:?} was reused while it was reserved"
            );
            self.memory.end_write(block);
        }
    }
}

impl Simulation<'_> {
    pub(super) fn command(&mut self, i: usize, command: Command) {
        self.instances[i].engine.commands.push_back(command);
        self.wake(i);
    }

    /// The loop looks around as soon as it can.
    pub(super) fn wake(&mut self, i: usize) {
        self.round_in(i, Nanos(1000));
    }

    fn round_in(&mut self, i: usize, after: Nanos) {
        let at = self.now.saturating_add(after);
        let engine = &mut self.instances[i].engine;
        if engine.stepping.is_none() && engine.round_at.is_none_or(|due| at < due) {
            engine.round_at = Some(at);
            let life = self.instances[i].life(i);
            self.queue.push(at, Event::Instance(life, AtInstance::Round));
        }
    }

    pub(super) fn engine_round(&mut self, i: usize) {
        let engine = &mut self.instances[i].engine;
        if engine.stepping.is_some() || engine.round_at.is_none_or(|due| due > self.now) {
            return;
        }
        engine.round_at = None;
        engine.n_beats += 1;
        for _ in 0..engine.commands.len() {
            let command = self.instances[i].engine.commands.pop_front().expect("counted");
            self.engine_obeys(i, command);
        }
        self.reap_abandoned(i);
        self.resume_abandoned(i);
        let engine = &mut self.instances[i].engine;
        let memory = &engine.memory;
        let batch = engine.scheduler.schedule(self.now, &|block| memory.is_pinned(block));
        self.publish_allocated(i);
        if !batch.refused.is_empty() || !batch.preempted.is_empty() {
            self.feel_no_room(i);
        }
        self.tell_changes(i, &batch);
        self.check_instance(i);
        if batch.items.is_empty() {
            let engine = &self.instances[i].engine;
            if engine.scheduler.has_work() || engine.scheduler.ledger().quarantined > 0 {
                self.round_in(i, BUSY_TICK);
            } else if !engine.scheduler.is_empty() {
                self.round_in(i, Nanos::from_millis(50));
            }
            return;
        }
        let n_tokens: usize = batch.items.iter().map(|item| item.n_tokens).sum();
        let duration = (4_000_000 + 150_000 * n_tokens as u64) * self.instances[i].slowness / 100;
        let n_prefill = batch
            .items
            .iter()
            .filter(|item| item.n_tokens > 1)
            .map(|item| item.n_tokens as u32)
            .sum();
        let engine = &mut self.instances[i].engine;
        if engine.samples.len() < 8 {
            engine.samples.push(StepSample {
                n_prefill_tokens: n_prefill,
                n_decode_tokens: n_tokens as u32 - n_prefill,
                n_context_tokens: batch
                    .items
                    .iter()
                    .map(|item| (item.start_pos + item.n_tokens) as u64)
                    .sum(),
                duration: Nanos(duration),
            });
        }
        engine.stepping = Some(batch);
        let life = self.instances[i].life(i);
        let at = self.now.saturating_add(Nanos(duration));
        self.queue.push(at, Event::Instance(life, AtInstance::StepDone));
    }

    fn engine_obeys(&mut self, i: usize, command: Command) {
        match command {
            Command::Generate { task, state } => self.submit(i, Owner::Task(task), &state, SequenceKind::Local, &[]),
            Command::Prefill {
                transfer,
                state,
                first_blocks,
            } => self.submit(
                i,
                Owner::Prefill(transfer),
                &state,
                SequenceKind::PrefillForHandoff,
                &first_blocks,
            ),
            Command::Reserve { task, state, slack } => self.reserve(i, task, &state, slack),
            Command::Join {
                group,
                arrived,
                numerics,
            } => self.engine_joins(i, group, arrived, numerics),
            Command::StartMove { transfer } => self.start_move(i, transfer),
            Command::Pin {
                transfer,
                group,
                from,
                pauses,
            } => {
                let answer = self.pin(i, transfer, group, &from, pauses);
                self.mover_answered(i, transfer, answer);
            }
        }
    }

    fn open_group(&self, owner: Owner, state: &PortableState, n_ready: &[u32], slack: Option<usize>) -> OpenGroup {
        OpenGroup {
            owner,
            request: self.number_of(state.request.id),
            seed: state.request.sampling.seed,
            choices: state.choices.clone(),
            n_ready: n_ready.iter().map(|&first| first as usize).collect(),
            mover: None,
            is_abandoned: false,
            slack,
        }
    }

    fn submit(&mut self, i: usize, owner: Owner, state: &PortableState, kind: SequenceKind, n_ready: &[u32]) {
        if !self.has_owner(i, owner) {
            return;
        }
        if kind == SequenceKind::Local {
            // The tokens may show ends that the state does not know.
            let config = self.instances[i].engine.scheduler.config().clone();
            let mut last = None;
            for choice in 0..state.choices.len() {
                let known = state.choices[choice].finish;
                if let Some(finish) = config.finish_of(state, choice) {
                    last = Some(finish);
                    if known.is_none() {
                        self.owner_hears_choice_finished(i, owner, choice as u32, finish);
                    }
                }
            }
            if config.unfinished(state).next().is_none() {
                let finish = last.expect("a request has a choice");
                return self.owner_hears_finished(i, owner, finish);
            }
        }
        let mut open = self.open_group(owner, state, n_ready, None);
        let engine = &mut self.instances[i].engine;
        for choice in 0..open.choices.len() {
            open.choices[choice].finish = engine.scheduler.config().finish_of(state, choice);
        }
        match engine.scheduler.submit(state, kind) {
            Ok(group) => {
                engine.open.insert(group, open);
                self.owner_runs_as(i, owner, group);
            }
            Err(failure) => {
                self.feel_no_room(i);
                self.owner_hears_failure(i, owner, failure);
            }
        }
    }

    /// A choice has ended; with the last one the group has gone.
    fn group_choice_finished(&mut self, i: usize, group: GroupId, choice: u32, finish: Finish) {
        let Some(open) = self.instances[i].engine.open.get_mut(&group) else {
            return;
        };
        open.choices[choice as usize].finish = Some(finish);
        let owner = open.owner;
        let is_last = open.choices.iter().all(|choice| choice.finish.is_some());
        if is_last {
            self.instances[i].engine.open.remove(&group);
        }
        self.owner_hears_choice_finished(i, owner, choice, finish);
        if is_last {
            self.owner_hears_finished(i, owner, finish);
        }
    }

    pub(super) fn fail_group(&mut self, i: usize, group: GroupId, failure: Failure) {
        let engine = &mut self.instances[i].engine;
        let memory = &engine.memory;
        engine.scheduler.remove_group(group, &|block| memory.is_pinned(block));
        if let Some(open) = engine.open.remove(&group) {
            self.owner_hears_failure(i, open.owner, failure);
        }
    }

    fn make_forks(&mut self, i: usize, committed: &Committed) {
        self.publish_allocated(i);
        for copy in &committed.copies {
            self.instances[i].engine.memory.copy_block(copy.from, copy.to);
        }
        if !committed.preempted.is_empty() {
            self.feel_no_room(i);
        }
    }

    fn publish_allocated(&mut self, i: usize) {
        let engine = &mut self.instances[i].engine;
        let allocated = engine.scheduler.take_allocated();
        engine.memory.publish(allocated);
    }

    fn reap_abandoned(&mut self, i: usize) {
        let engine = &mut self.instances[i].engine;
        let memory = &engine.memory;
        let scheduler = &mut engine.scheduler;
        engine.open.retain(|&group, open| {
            if open.is_abandoned {
                scheduler.remove_group(group, &|block| memory.is_pinned(block));
            }
            !open.is_abandoned
        });
    }

    fn tell_changes(&mut self, i: usize, batch: &Batch) {
        for (group, failure) in &batch.refused {
            if let Some(open) = self.instances[i].engine.open.remove(group) {
                self.owner_hears_failure(i, open.owner, failure.clone());
            }
        }
        for &group in &batch.granted {
            self.answer_reservation(i, group);
        }
        for started in &batch.started {
            let engine = &self.instances[i].engine;
            // Its owner may have gone when another was refused; then it is reaped in the next round.
            if engine.scheduler.phase(started.sequence).is_none() {
                continue;
            }
            let group = engine.scheduler.member(started.sequence).group;
            let n_hit_blocks = started.n_hit_tokens / engine.memory.block_size;
            self.make_ready(i, group, n_hit_blocks);
        }
    }

    /// Blocks of a prefill up to `end` are complete: they are pinned and told in every layer.
    fn make_ready(&mut self, i: usize, group: GroupId, end: usize) {
        let engine = &mut self.instances[i].engine;
        let open = engine.open.get_mut(&group).expect("a computed request is open");
        let Owner::Prefill(transfer) = open.owner else { return };
        if open.is_abandoned {
            return;
        }
        for layer_group in 0..open.n_ready.len() {
            let engine = &mut self.instances[i].engine;
            let open = engine.open.get_mut(&group).expect("a computed request is open");
            let first = open.n_ready[layer_group];
            if end <= first {
                continue;
            }
            open.n_ready[layer_group] = end;
            let table = &engine.scheduler.block_tables(group.sequence(0))[layer_group][first..end];
            let blocks: Vec<(BlockId, Generation)> = table
                .iter()
                .map(|&block| (BlockId(block), engine.memory.generation(BlockId(block))))
                .collect();
            engine.memory.pin_in_layers(layer_group, &blocks);
            for layer in Vec::from_iter(engine.memory.layers_of(layer_group)) {
                self.prefill_ready(i, transfer, layer, first, &blocks);
            }
        }
    }

    pub(super) fn step_done(&mut self, i: usize) {
        let engine = &mut self.instances[i].engine;
        let batch = engine.stepping.take().expect("a step under way is done");
        engine.n_beats += 1;
        let mut sampled: Vec<Vec<TokenId>> = Vec::with_capacity(batch.items.len());
        for item in &batch.items {
            let Member { group, choice } = engine.scheduler.member(item.sequence);
            let tables = engine.scheduler.block_tables(item.sequence);
            let tokens = engine.scheduler.tokens(item.sequence);
            let end = item.start_pos + item.n_tokens;
            let context = engine.memory.compute(tokens, item.start_pos, end, tables);
            let seed = engine.open[&group].seed;
            let choices = choice..choice + item.samples.n_tokens();
            sampled.push(choices.map(|choice| next_token(context, seed, choice)).collect());
        }
        for item in &batch.items {
            let group = self.instances[i].engine.scheduler.member(item.sequence).group;
            let n_complete = n_complete_blocks(item, self.instances[i].engine.memory.block_size);
            self.make_ready(i, group, n_complete);
        }
        let engine = &mut self.instances[i].engine;
        let memory = &engine.memory;
        let committed = engine
            .scheduler
            .commit(&batch, &sampled, &|block| memory.is_pinned(block));
        let mut handed_over: BTreeMap<GroupId, Vec<(Token, Option<Finish>)>> = BTreeMap::new();
        for &Continued { member, token, finish } in &committed.continued {
            let Member { group, choice } = member;
            let Some(open) = self.instances[i].engine.open.get_mut(&group) else {
                continue;
            };
            let token = Token {
                index: open.choices[choice as usize].output.len() as u32,
                id: token,
                logprobs: None,
            };
            if matches!(open.owner, Owner::Prefill(_)) {
                handed_over.entry(group).or_default().push((token, finish));
                continue;
            }
            open.choices[choice as usize].output.push(token.clone());
            let owner = open.owner;
            self.owner_hears_token(i, owner, choice, token);
            if let Some(finish) = finish {
                self.group_choice_finished(i, group, choice, finish);
            }
        }
        for (group, first) in handed_over {
            if let Owner::Prefill(transfer) = self.instances[i].engine.open[&group].owner {
                self.prefill_first_tokens(i, transfer, first);
            }
        }
        self.make_forks(i, &committed);
        self.check_instance(i);
        let engine = &mut self.instances[i].engine;
        engine.round_at = Some(self.now);
        self.engine_round(i);
    }

    fn has_owner(&self, i: usize, owner: Owner) -> bool {
        match owner {
            Owner::Task(task) => self.instances[i].tasks.get(&task).is_some_and(|task| !task.is_over),
            Owner::Prefill(transfer) => self.instances[i].prefills.contains_key(&transfer),
        }
    }

    fn owner_runs_as(&mut self, i: usize, owner: Owner, group: GroupId) {
        let instance = &mut self.instances[i];
        match owner {
            Owner::Task(task) => instance.tasks.get_mut(&task).expect("an owner").group = Some(group),
            Owner::Prefill(transfer) => instance.prefills.get_mut(&transfer).expect("an owner").group = Some(group),
        }
    }

    fn owner_hears_token(&mut self, i: usize, owner: Owner, choice: u32, token: Token) {
        if let (Owner::Task(task), true) = (owner, self.has_owner(i, owner)) {
            self.task_says_token(i, task, choice, token);
        }
    }

    fn owner_hears_choice_finished(&mut self, i: usize, owner: Owner, choice: u32, finish: Finish) {
        if let (Owner::Task(task), true) = (owner, self.has_owner(i, owner)) {
            self.task_says_choice_finished(i, task, choice, finish);
        }
    }

    fn owner_hears_finished(&mut self, i: usize, owner: Owner, finish: Finish) {
        if let (Owner::Task(task), true) = (owner, self.has_owner(i, owner)) {
            self.task_finished(i, task, finish);
        }
    }

    fn owner_hears_failure(&mut self, i: usize, owner: Owner, failure: Failure) {
        match owner {
            Owner::Task(task) => self.task_failed(i, task, failure, None),
            Owner::Prefill(transfer) => self.prefill_failed(i, transfer, failure),
        }
    }

    pub(super) fn feel_no_room(&mut self, i: usize) {
        self.feel(
            FaultKind::NoRoom,
            super::faults::Scope::Instance(i),
            Nanos::from_millis(200),
        );
    }
}

/// Blocks complete after the item: full ones, and after the context's last token the last one as it is.
fn n_complete_blocks(item: &BatchItem, block_size: usize) -> usize {
    let end = item.start_pos + item.n_tokens;
    match item.samples {
        Samples::Token | Samples::FirstTokens(_) => end.div_ceil(block_size),
        Samples::Nothing => end / block_size,
    }
}
