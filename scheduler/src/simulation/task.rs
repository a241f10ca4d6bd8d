//! A request that runs on an instance or is received there, as its worker drives it: with the production destination
//! machine when the KV comes from elsewhere.

use super::Simulation;
use super::coverage::{Transition, destination_fact};
use super::engine::{Arrived, Command};
use super::network::{
    Asked, AtDoor, AtInstance, Call, Event, EventStream, Frame, Life, Packed, Party, Said, TransferStream, Wanted,
};
use crate::batch::{Grant, GroupId, Numerics};
use crate::ids::{Epoch, Nanos};
use crate::request::{ChoiceState, Failure, Finish, PortableState, Token};
use crate::transfer::{
    ChoicePlan, Destination, DestinationAction, DestinationFact, KvRange, OwedBlocks, TransferId, TransferPlan,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Local,
    Handoff,
    Migration,
}

pub(super) struct Task {
    pub(super) stream: usize,
    pub(super) request: usize,
    /// In which events are said.
    pub(super) epoch: Epoch,
    kind: Kind,
    source: Option<Life>,
    /// As the front door knows the request.
    state: PortableState,
    /// In the engine, reserved or running.
    pub(super) group: Option<GroupId>,
    transfer: Option<usize>,
    plan: Option<TransferPlan>,
    machine: Option<Destination>,
    /// Blocks still to be written, of each choice.
    reserved: Vec<Grant>,
    numerics: Numerics,
    first: Vec<(Token, Option<Finish>)>,
    outputs: Vec<ChoiceState>,
    timer_at: Option<Nanos>,
    /// The typed end is said, or nobody listens.
    pub(super) is_over: bool,
}

impl Simulation<'_> {
    /// A front door's call arrives.
    pub(super) fn serve_call(&mut self, i: usize, number: usize) {
        let stream = &self.streams[number];
        let (request, to, asked, state) = (stream.request, stream.to, stream.asked, stream.state.clone());
        if !self.passes(Party::Door, Party::Instance(i)) || !self.instances[i].is_up {
            return;
        }
        let door = stream.door;
        let answered = self.now.saturating_add(self.delay(Party::Door, Party::Instance(i)));
        self.streams[number].last_arrival = answered;
        self.queue
            .push(answered, Event::Door(door, AtDoor::Answered { stream: number }));
        if to != self.instances[i].life(i) {
            let failure = Failure::InstanceLost("the caller means another incarnation".to_owned());
            return self.say_on(number, state.epoch, Said::Ended(Err((failure, None))));
        }
        let has_ended = self.instances[i]
            .engine
            .scheduler
            .config()
            .unfinished(&state)
            .next()
            .is_none();
        let (kind, source) = match asked {
            // The last token may have been told before its end was.
            Asked::Generate { prefill: Some(source) } if !has_ended => (Kind::Handoff, Some(source)),
            Asked::Generate { .. } => (Kind::Local, None),
            Asked::Attach { source } => (Kind::Migration, Some(source)),
        };
        let id = self.new_id();
        let task = Task {
            stream: number,
            request,
            epoch: state.epoch,
            kind,
            source,
            state: state.clone(),
            group: None,
            transfer: None,
            plan: None,
            machine: None,
            reserved: Vec::new(),
            numerics: Numerics::Same,
            first: Vec::new(),
            outputs: Vec::new(),
            timer_at: None,
            is_over: false,
        };
        let slack = self.random.between(1, 4) as usize;
        let instance = &mut self.instances[i];
        instance.tasks.insert(id, task);
        instance.registered.insert(request, id);
        let config = instance.engine.scheduler.config();
        let refused = match kind {
            Kind::Local => config.check(&state),
            Kind::Handoff => config.check(&state).and_then(|()| config.check_handoff(&state)),
            Kind::Migration => config.check(&state).and_then(|()| config.check_unfinished(&state)),
        };
        if let Err(failure) = refused {
            return self.task_failed(i, id, failure, None);
        }
        let state = Box::new(state);
        let command = match kind {
            Kind::Local => Command::Generate { task: id, state },
            Kind::Handoff => Command::Reserve {
                task: id,
                state,
                slack: None,
            },
            Kind::Migration => Command::Reserve {
                task: id,
                state,
                slack: Some(slack),
            },
        };
        self.command(i, command);
    }

    /// Says a word on a stream, in order.
    fn say_on(&mut self, number: usize, epoch: Epoch, said: Said) {
        let EventStream {
            door,
            to,
            is_cut,
            is_open_at_door,
            last_arrival,
            ..
        } = self.streams[number];
        if is_cut || !is_open_at_door {
            return;
        }
        let delay = self.delay(Party::Door, Party::Instance(to.instance));
        let at = self.now.saturating_add(delay).max(last_arrival);
        self.streams[number].last_arrival = at;
        let word = AtDoor::Word {
            stream: number,
            epoch,
            said,
        };
        self.queue.push(at, Event::Door(door, word));
    }

    pub(super) fn task_says(&mut self, i: usize, id: u64, said: Said) {
        if let Some(task) = self.instances[i].tasks.get(&id) {
            let (stream, epoch) = (task.stream, task.epoch);
            self.say_on(stream, epoch, said);
        }
    }

    pub(super) fn task_says_token(&mut self, i: usize, id: u64, choice: u32, token: Token) {
        self.task_says(i, id, Said::Token { choice, token });
    }

    pub(super) fn task_says_choice_finished(&mut self, i: usize, id: u64, choice: u32, finish: Finish) {
        self.task_says(i, id, Said::ChoiceFinished { choice, finish });
    }

    pub(super) fn task_finished(&mut self, i: usize, id: u64, finish: Finish) {
        self.task_says(i, id, Said::Ended(Ok(finish)));
        let task = self.instances[i].tasks.get_mut(&id).expect("it has just spoken");
        task.is_over = true;
        task.group = None;
        self.tidy_task(i, id);
    }

    /// Ends the request here badly, once.
    pub(super) fn task_failed(&mut self, i: usize, id: u64, failure: Failure, blamed: Option<usize>) {
        let Some(task) = self.instances[i].tasks.get(&id) else {
            return;
        };
        if !task.is_over {
            self.task_says(i, id, Said::Ended(Err((failure, blamed))));
            self.release_task(i, id);
        }
        self.tidy_task(i, id);
    }

    /// Nothing more is said; what the engine holds for it is given back in its next round.
    fn release_task(&mut self, i: usize, id: u64) {
        let instance = &mut self.instances[i];
        let task = instance.tasks.get_mut(&id).expect("a task");
        task.is_over = true;
        instance.engine.end_writes(&mut task.reserved);
        if let Some(group) = task.group.take()
            && let Some(open) = instance.engine.open.get_mut(&group)
        {
            open.is_abandoned = true;
        }
        self.wake(i);
    }

    /// Forgets a task of which nothing is left, and closes its transfer's stream when that is over.
    fn tidy_task(&mut self, i: usize, id: u64) {
        let Some(task) = self.instances[i].tasks.get(&id) else {
            return;
        };
        let is_closed = task.machine.as_ref().is_none_or(Destination::is_closed);
        let (stream, request, is_over, transfer) = (task.stream, task.request, task.is_over, task.transfer);
        if let (Some(transfer), true) = (transfer, is_closed) {
            self.close_transfer(transfer);
        }
        if is_over && is_closed {
            self.instances[i].tasks.remove(&id);
            let registered = &mut self.instances[i].registered;
            if registered.get(&request) == Some(&id) {
                registered.remove(&request);
            }
            self.trace(|| format!("instance {i} has no more of request {request} on stream {stream}"));
        }
    }

    /// The destination closes a transfer's stream.
    fn close_transfer(&mut self, transfer: usize) {
        let TransferStream { from, to, is_cut, .. } = self.transfers[transfer];
        if std::mem::replace(&mut self.transfers[transfer].is_open_at_destination, false) && !is_cut {
            let delay = self.delay(Party::Instance(from.instance), Party::Instance(to.instance));
            let at = self.now.saturating_add(delay);
            self.queue
                .push(at, Event::Instance(from, AtInstance::TransferClosed { transfer }));
        }
    }

    /// The front door closed a stream, or the instance noticed that it was cut.
    pub(super) fn stream_closed(&mut self, i: usize, stream: usize) {
        let mut tasks = self.instances[i].tasks.iter();
        let found = tasks
            .find(|(_, task)| task.stream == stream)
            .map(|(&id, task)| (id, task.is_over));
        if let Some((id, false)) = found {
            if self.instances[i].tasks[&id].machine.is_some() {
                self.tell_destination(i, id, DestinationFact::Cancelled);
            }
            if self.instances[i].tasks.contains_key(&id) {
                self.release_task(i, id);
                // The whole driver goes, with its stream to the source, whatever the machine still waits for.
                self.instances[i].tasks.get_mut(&id).expect("a task").machine = None;
                self.tidy_task(i, id);
            }
        }
        self.movers_hear_gone(i, stream);
    }

    /// The engine has reserved what was asked for.
    pub(super) fn task_reserved(&mut self, i: usize, id: u64, grants: Vec<Grant>) {
        let layer_groups = self.instances[i].engine.memory.layer_groups.of_layers();
        let transfer = self.transfers.len();
        let task = self.instances[i].tasks.get_mut(&id).expect("a reserving task");
        let choices = grants.iter().map(|grant| ChoicePlan {
            first_blocks: grant
                .layer_groups
                .iter()
                .map(|group| group.n_blocks_held as u32)
                .collect(),
            n_blocks: grant.n_blocks_total as u32,
        });
        let plan = TransferPlan {
            layer_groups,
            choices: choices.collect(),
        };
        task.reserved = grants;
        task.transfer = Some(transfer);
        let begin = match task.kind {
            Kind::Migration => Destination::migration,
            _ => Destination::handoff,
        };
        let machine = begin(
            TransferId(transfer as u64),
            plan.clone(),
            self.settings.progress_deadline,
            self.now,
        );
        task.machine = Some(machine);
        let wanted = match task.kind {
            Kind::Migration => Wanted::Migration {
                rooms: plan.choices.clone(),
                n_known: task.state.choices.iter().map(|choice| choice.output.len()).collect(),
            },
            _ => Wanted::Handoff {
                first_blocks: plan.choices[0].first_blocks.clone(),
            },
        };
        task.plan = Some(plan);
        let (from, request, state) = (task.source.expect("a source"), task.request, task.state.clone());
        let to = self.instances[i].life(i);
        let between = (Party::Instance(from.instance), Party::Instance(i));
        let delay = self.delay(between.0, between.1);
        let at = self.now.saturating_add(delay);
        self.transfers.push(TransferStream {
            request,
            state,
            wanted,
            from,
            to,
            task: id,
            is_open_at_destination: true,
            is_open_at_source: false,
            is_cut: false,
            last_arrival: Nanos::ZERO,
            busy_until: self.now,
        });
        if self.passes(between.0, between.1) && self.instances[from.instance].is_up {
            self.queue
                .push(at, Event::Call(from.instance, Call::Transfer { transfer }));
        } else {
            // Refused soon, or not answered in time.
            let wait = if self.instances[from.instance].is_up {
                self.settings.progress_deadline
            } else {
                delay
            };
            let at = self.now.saturating_add(wait);
            let reason = "no answer to the call";
            self.queue
                .push(at, Event::Instance(to, AtInstance::TransferBroken { transfer, reason }));
        }
        self.set_task_timer(i, id);
        self.aim(request);
    }

    fn set_task_timer(&mut self, i: usize, id: u64) {
        let life = self.instances[i].life(i);
        let Some(task) = self.instances[i].tasks.get_mut(&id) else {
            return;
        };
        let Some(due) = task.machine.as_ref().and_then(Destination::next_tick) else {
            return;
        };
        if task.timer_at.is_none_or(|at| at <= self.now) {
            task.timer_at = Some(due);
            self.queue
                .push(due, Event::Instance(life, AtInstance::TaskTimer { task: id }));
        }
    }

    pub(super) fn task_timer(&mut self, i: usize, id: u64) {
        let Some(task) = self.instances[i].tasks.get_mut(&id) else {
            return;
        };
        task.timer_at = None;
        let is_due = task
            .machine
            .as_ref()
            .and_then(Destination::next_tick)
            .is_some_and(|due| due <= self.now);
        if is_due {
            self.tell_destination(i, id, DestinationFact::Tick);
        }
        self.set_task_timer(i, id);
    }

    /// The transfer's stream broke, or ended without a typed end.
    pub(super) fn transfer_broken(&mut self, i: usize, transfer: usize, reason: &'static str) {
        let id = self.transfers[transfer].task;
        if self.transfers[transfer].is_open_at_destination && self.instances[i].tasks.contains_key(&id) {
            let reason = reason.to_owned();
            self.tell_destination(i, id, DestinationFact::Dropped { reason });
        }
    }

    pub(super) fn frame_arrives(&mut self, i: usize, transfer: usize, frame: Frame) {
        let stream = &self.transfers[transfer];
        let (id, from) = (stream.task, stream.from);
        if stream.is_cut || !stream.is_open_at_destination {
            return;
        }
        let numerics = match self.instances[from.instance].numerics_class == self.instances[i].numerics_class {
            true => Numerics::Same,
            false => Numerics::Other,
        };
        let block_size = self.instances[i].engine.memory.block_size;
        let Some(task) = self.instances[i].tasks.get_mut(&id) else {
            return;
        };
        let mut payload = Vec::new();
        let fact = match frame {
            Frame::Accepted(ends_by) => {
                task.numerics = numerics;
                DestinationFact::Accepted { ends_by }
            }
            Frame::Progress(n_steps) => DestinationFact::Progress { n_steps },
            Frame::Kv(range, blocks) => {
                payload = blocks;
                DestinationFact::Kv {
                    transfer: TransferId(transfer as u64),
                    range,
                }
            }
            Frame::FirstTokens(first) => {
                let ends = first.iter().all(|(_, finish)| finish.is_some());
                task.first = first;
                DestinationFact::Token { ends }
            }
            Frame::State(lacking) => DestinationFact::State {
                owed: task.take_state(lacking, block_size),
            },
            Frame::Ended(failure) => DestinationFact::Ended { failure },
        };
        let actions = self.apply_destination(i, id, fact);
        for action in actions {
            match action {
                DestinationAction::Write(range) => self.land(i, id, transfer, range, std::mem::take(&mut payload)),
                action => self.obey_destination(i, id, action),
            }
        }
        self.tidy_task(i, id);
        self.set_task_timer(i, id);
    }

    pub(super) fn tell_destination(&mut self, i: usize, id: u64, fact: DestinationFact) {
        for action in self.apply_destination(i, id, fact) {
            self.obey_destination(i, id, action);
        }
        self.tidy_task(i, id);
    }

    fn apply_destination(&mut self, i: usize, id: u64, fact: DestinationFact) -> Vec<DestinationAction> {
        let task = &self.instances[i].tasks[&id];
        let (request, source) = (task.request, task.source);
        let Some(machine) = &task.machine else {
            return Vec::new();
        };
        let transition = Transition {
            machine: if task.kind == Kind::Migration {
                "destination of a move"
            } else {
                "destination"
            },
            stage: machine.stage(),
            fact: destination_fact(&fact),
        };
        let parties = [
            Party::Instance(i),
            Party::Instance(source.map_or(i, |life| life.instance)),
        ];
        self.count(transition, request, &parties);
        self.trace(|| format!("instance {i}, request {request}: {transition}"));
        let task = self.instances[i].tasks.get_mut(&id).expect("a task");
        task.machine.as_mut().expect("checked above").apply(self.now, fact)
    }

    fn obey_destination(&mut self, i: usize, id: u64, action: DestinationAction) {
        let Some(task) = self.instances[i].tasks.get_mut(&id) else {
            return;
        };
        let source = task.source.map(|life| life.instance);
        match action {
            DestinationAction::Write(_) => unreachable!("frames are landed where they are at hand"),
            DestinationAction::Refuse(why) => self.note_refused(why),
            DestinationAction::Deliver => {
                for (choice, (token, _)) in (0..).zip(task.first.clone()) {
                    self.task_says_token(i, id, choice, token);
                }
            }
            DestinationAction::Join => self.task_joins(i, id),
            DestinationAction::Finish => {
                let finishes: Vec<Finish> = task.first.iter().filter_map(|(_, finish)| *finish).collect();
                for (choice, &finish) in (0..).zip(&finishes) {
                    self.task_says_choice_finished(i, id, choice, finish);
                }
                let last = *finishes.last().expect("the machine finishes on final tokens");
                self.task_says(i, id, Said::Ended(Ok(last)));
                self.release_task(i, id);
            }
            DestinationAction::Fail(failure) => {
                if !task.is_over {
                    self.task_says(i, id, Said::Ended(Err((failure, source))));
                    self.release_task(i, id);
                }
            }
            DestinationAction::Close => {}
        }
    }

    fn land(&mut self, i: usize, id: u64, transfer: usize, range: KvRange, payload: Vec<Packed>) {
        let task = &self.instances[i].tasks[&id];
        let plan = task.plan.as_ref().expect("a receiving task");
        let first = (range.first_block - plan.first_block(range.choice, range.layer)) as usize;
        let place = self.instances[i].engine.memory.layer_groups.place(range.layer as usize);
        let reserved = &task.reserved[range.choice as usize].layer_groups[place.layer_group];
        let grants = reserved.blocks[first..first + range.n_blocks as usize].to_vec();
        assert_eq!(payload.len(), grants.len(), "a frame of another size than it says");
        let layer = range.layer as usize;
        let from = self.transfers[transfer].from;
        for ((block, generation), packed) in grants.into_iter().zip(payload) {
            let contents = match packed {
                Packed::Bytes(contents) => Some(contents),
                Packed::InPlace(block, generation) => {
                    let source = &self.instances[from.instance];
                    let is_alive = source.is_up && source.incarnation == from.incarnation;
                    let memory = &source.engine.memory;
                    // Rechecked after the copy, like every one-sided read.
                    let contents = is_alive.then(|| memory.block(layer, block).to_vec());
                    contents.filter(|_| memory.generation(block) == generation)
                }
            };
            let Some(contents) = contents else {
                self.n_stale_reads += 1;
                let failure = Failure::InstanceLost("a block was reused while it was read".to_owned());
                self.task_failed(i, id, failure, Some(from.instance));
                if self.instances[i].tasks.contains_key(&id) {
                    self.tell_destination(i, id, DestinationFact::Cancelled);
                }
                return;
            };
            self.instances[i]
                .engine
                .memory
                .land(layer, block, generation, &contents);
        }
    }

    fn task_joins(&mut self, i: usize, id: u64) {
        let instance = &mut self.instances[i];
        let task = instance.tasks.get_mut(&id).expect("a joining task");
        // A failed write ended the request already.
        if task.is_over {
            return;
        }
        instance.engine.end_writes(&mut task.reserved);
        let group = task.group.expect("a joining task is reserved");
        let arrived = match task.kind {
            Kind::Migration => Arrived::Outputs(task.outputs.clone()),
            _ => Arrived::First(task.first.iter().map(|(token, _)| token.clone()).collect()),
        };
        let (numerics, request) = (task.numerics, task.request);
        let (is_migration, outputs, known) = (task.kind == Kind::Migration, task.outputs.clone(), task.state.clone());
        self.command(
            i,
            Command::Join {
                group,
                arrived,
                numerics,
            },
        );
        self.aim(request);
        if !is_migration {
            return;
        }
        self.task_says(i, id, Said::Joined);
        for ((choice, moved), known) in (0..).zip(outputs).zip(known.choices) {
            for token in &moved.output[known.output.len()..] {
                self.task_says_token(i, id, choice, token.clone());
            }
            if let (Some(finish), None) = (moved.finish, known.finish) {
                self.task_says_choice_finished(i, id, choice, finish);
            }
        }
    }

    /// A front door's word to go on in another epoch. Answers why not.
    pub(super) fn serve_resume(&mut self, i: usize, to: Life, request: usize, epoch: Epoch) {
        if to != self.instances[i].life(i) {
            return;
        }
        let instance = &mut self.instances[i];
        let Some(&id) = instance.registered.get(&request) else {
            return;
        };
        let task = instance.tasks.get_mut(&id).expect("a registered task");
        if task.epoch >= epoch {
            return;
        }
        task.epoch = epoch;
        let stream = task.stream;
        let mover = instance.movers.iter().find(|(_, mover)| mover.stream == stream);
        if let Some((&transfer, _)) = mover {
            let after = self.random.pick(&[1_000, 30_000_000, 150_000_000]);
            let at = self.now.saturating_add(Nanos(after));
            self.queue
                .push(at, Event::Instance(to, AtInstance::MoverWord { transfer, epoch }));
        }
    }
}

impl Task {
    /// Completes the outputs of a moved request. Returns what is owed of each choice.
    fn take_state(&mut self, lacking: Vec<ChoiceState>, block_size: usize) -> Vec<OwedBlocks> {
        let n_prompt = self.state.request.prompt_ids.len();
        let known = &self.state.choices;
        let holder = known.iter().position(|choice| choice.finish.is_none());
        let mut owed = Vec::new();
        self.outputs.clear();
        for (number, (lacking, known)) in lacking.into_iter().zip(known).enumerate() {
            let output: Vec<Token> = known.output.iter().cloned().chain(lacking.output).collect();
            let finish = lacking.finish.or(known.finish);
            owed.push(match finish {
                None => OwedBlocks::All((n_prompt + output.len() - 1).div_ceil(block_size) as u32),
                Some(_) if holder == Some(number) => OwedBlocks::Shared((n_prompt / block_size) as u32),
                Some(_) => OwedBlocks::Shared(0),
            });
            self.outputs.push(ChoiceState { output, finish });
        }
        owed
    }
}
