//! An instance: the requests that run or are received there, the moves and prefills that leave it. Its engine is a counter.

use std::collections::{BTreeSet, VecDeque};

use baton_scheduler::ids::{Epoch, Nanos};
use baton_scheduler::request::Failure;
use baton_scheduler::transfer::{
    ChoicePlan, Destination, DestinationAction, DestinationFact, EndsBy, KvRange, MigrationAction, MigrationFact,
    MigrationLimits, MigrationSource, OwedBlocks, Source, SourceAction, SourceFact, TransferId, TransferPlan,
};

use crate::wire::{CallStage, Frame, Kind, Life, Opening, Output, Said, TransferStream, Wanted};
use crate::world::World;

pub const DEADLINE: Nanos = Nanos::from_secs(10);
const N_LAYERS: usize = 1;
const BLOCK_SIZE: u32 = 2;
const N_PROMPT: u32 = 2;
const N_SLACK_BLOCKS: u32 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Instance {
    pub incarnation: u32,
    pub tasks: Vec<Task>,
    pub movers: Vec<Mover>,
    pub prefills: Vec<Prefill>,
    /// The stream of the task that a move or a word finds.
    pub open: Option<usize>,
}

/// A request that runs or is received, named by its front door's stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Task {
    pub stream: usize,
    pub epoch: Epoch,
    known: Vec<Output>,
    pub group: Option<Group>,
    pub transfer: Option<usize>,
    pub destination: Option<Destination>,
    is_migration: bool,
    /// Outputs that came with a transfer.
    arrived: Vec<Output>,
    written: BTreeSet<(u32, u32)>,
    /// The typed end is said.
    pub is_over: bool,
}

/// The choices of a request in the batch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    pub outputs: Vec<Output>,
    pub is_paused: bool,
    pub is_preempted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mover {
    /// Of the task that moves.
    pub stream: usize,
    pub transfer: usize,
    pub machine: MigrationSource,
    pub asked: Option<Asked>,
    pub words: VecDeque<Epoch>,
    outputs: Vec<Output>,
    pub has_heard_drop: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Asked {
    Full(Vec<Vec<u32>>),
    Pause(Vec<Vec<u32>>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prefill {
    pub transfer: usize,
    pub machine: Source,
    known: Vec<Output>,
    pub n_computed: u32,
}

fn n_blocks(n_output: u32) -> u32 {
    (N_PROMPT + n_output.saturating_sub(1)).div_ceil(BLOCK_SIZE)
}

fn limits() -> MigrationLimits {
    MigrationLimits {
        max_in_flight: 2,
        max_blocks_per_frame: 8,
        stall_deadline: DEADLINE,
        resume_deadline: DEADLINE,
        max_stages: 2,
    }
}

impl World {
    fn task(&mut self, instance: usize, stream: usize) -> Option<&mut Task> {
        let mut tasks = self.instances[instance].tasks.iter_mut();
        tasks.find(|task| task.stream == stream)
    }

    fn say(&mut self, instance: usize, stream: usize, said: Said) {
        let Some(epoch) = self.task(instance, stream).map(|task| task.epoch) else {
            return;
        };
        let stream = &mut self.streams[stream];
        if stream.is_open_at_door && !stream.is_cut {
            stream.words.push_back((epoch, said));
        }
    }

    /// A front door's call arrives.
    pub fn serve(&mut self, stream: usize) {
        let Some(Opening { epoch, known, kind }) = self.streams[stream].opening.take() else {
            return;
        };
        let Life { instance, .. } = self.streams[stream].to.expect("a called instance");
        self.streams[stream].is_open_at_instance = true;
        let goes_on = |(output, most): (&Output, &u32)| !output.has_ended && output.n_tokens < *most;
        let kind = match kind {
            // The last token may have been told before its end was.
            Kind::Handoff { .. } if !known.iter().zip(&self.bounds.max_tokens).any(goes_on) => Kind::Local,
            kind => kind,
        };
        let mut task = Task {
            stream,
            epoch,
            known: known.clone(),
            group: None,
            transfer: None,
            destination: None,
            is_migration: false,
            arrived: Vec::new(),
            written: BTreeSet::new(),
            is_over: false,
        };
        let plans: Vec<ChoicePlan> = match kind {
            Kind::Local => {
                task.group = Some(Group {
                    outputs: known.clone(),
                    is_paused: false,
                    is_preempted: false,
                });
                Vec::new()
            }
            Kind::Handoff { .. } => vec![ChoicePlan {
                first_blocks: vec![0],
                n_blocks: (N_PROMPT + known[0].n_tokens).div_ceil(BLOCK_SIZE),
            }],
            Kind::Attach { .. } => {
                let n_prompt_blocks = N_PROMPT / BLOCK_SIZE;
                let holder = known.iter().position(|output| !output.has_ended);
                (0..known.len())
                    .map(|choice| match known[choice] {
                        output if output.has_ended => ChoicePlan {
                            first_blocks: vec![n_prompt_blocks],
                            n_blocks: n_prompt_blocks,
                        },
                        output => ChoicePlan {
                            first_blocks: vec![if holder == Some(choice) { 0 } else { n_prompt_blocks }],
                            n_blocks: n_blocks(output.n_tokens) + N_SLACK_BLOCKS,
                        },
                    })
                    .collect()
            }
        };
        if let Kind::Handoff { prefill: from } | Kind::Attach { source: from } = kind {
            let is_migration = matches!(kind, Kind::Attach { .. });
            let rooms = plans.clone();
            self.transfers.push(TransferStream {
                from: Some(from),
                opening: Some(Wanted {
                    is_migration,
                    rooms,
                    known,
                }),
                is_open_at_destination: true,
                ..TransferStream::default()
            });
            let transfer = self.transfers.len() - 1;
            let plan = TransferPlan {
                layer_groups: vec![0; N_LAYERS],
                choices: plans,
            };
            let begin = if is_migration {
                Destination::migration
            } else {
                Destination::handoff
            };
            task.is_migration = is_migration;
            task.transfer = Some(transfer);
            task.destination = Some(begin(TransferId(transfer as u64), plan, DEADLINE, Nanos::ZERO));
        }
        self.instances[instance].tasks.push(task);
        self.instances[instance].open = Some(stream);
    }

    /// One step of the engine for one request.
    pub fn step(&mut self, instance: usize, stream: usize) {
        let max_tokens = self.bounds.max_tokens.clone();
        let Some(group) = self.task(instance, stream).and_then(|task| task.group.as_mut()) else {
            return;
        };
        let mut said = Vec::new();
        for ((choice, output), most) in (0..).zip(&mut group.outputs).zip(max_tokens) {
            if output.has_ended {
                continue;
            }
            // The last token of a replayed choice may have been told before its end.
            if output.n_tokens < most {
                let index = output.n_tokens;
                output.n_tokens += 1;
                said.push(Said::Token { choice, index });
            }
            if output.n_tokens == most {
                output.has_ended = true;
                said.push(Said::ChoiceFinished { choice });
            }
        }
        let is_over = group.outputs.iter().all(|output| output.has_ended);
        said.extend(is_over.then_some(Said::Finished));
        for said in said {
            self.say(instance, stream, said);
        }
        if is_over {
            let task = self.task(instance, stream).expect("it has just stepped");
            task.is_over = true;
            task.group = None;
            self.tidy(instance);
        }
    }

    /// Drops what nothing is left of.
    pub fn tidy(&mut self, instance: usize) {
        let here = &mut self.instances[instance];
        here.movers.retain(|mover| {
            let is_closed = mover.machine.is_closed();
            if is_closed {
                self.transfers[mover.transfer].is_open_at_source = false;
            }
            !is_closed
        });
        here.prefills.retain(|prefill| {
            let is_closed = prefill.machine.is_closed();
            if is_closed {
                self.transfers[prefill.transfer].is_open_at_source = false;
            }
            !is_closed
        });
        here.tasks.retain(|task| {
            let is_closed = task.destination.as_ref().is_none_or(Destination::is_closed);
            if let (Some(transfer), true) = (task.transfer, is_closed) {
                let transfer = &mut self.transfers[transfer];
                transfer.is_open_at_destination = false;
                transfer.opening = None;
            }
            let ends = task.is_over && is_closed;
            if ends && here.open == Some(task.stream) {
                here.open = None;
            }
            !ends
        });
        for (number, stream) in self.streams.iter_mut().enumerate() {
            let here = &self.instances[instance];
            let is_held = here.tasks.iter().any(|task| task.stream == number)
                || here.movers.iter().any(|mover| mover.stream == number);
            if stream.to.is_some_and(|to| to.instance == instance) && !is_held && stream.opening.is_none() {
                stream.is_open_at_instance = false;
            }
        }
        self.forget();
    }

    /// The front door has closed a request's stream, or the instance hears that it was cut.
    pub fn task_hears_close(&mut self, instance: usize, stream: usize) {
        let Some(task) = self.task(instance, stream) else {
            return;
        };
        task.is_over = true;
        task.group = None;
        if let Some(destination) = &mut task.destination {
            // Whatever is held goes with the driver.
            destination.apply(Nanos::ZERO, DestinationFact::Cancelled);
        }
        self.tidy(instance);
    }

    fn fail_task(&mut self, instance: usize, stream: usize, failure: Failure) {
        let Some(task) = self.task(instance, stream) else {
            return;
        };
        if !std::mem::replace(&mut task.is_over, true) {
            task.group = None;
            self.say(instance, stream, Said::Failed(failure));
        }
    }

    /// The destination of a transfer hears a frame.
    pub fn destination_hears(&mut self, instance: usize, stream: usize) {
        let Some(transfer) = self.task(instance, stream).and_then(|task| task.transfer) else {
            return;
        };
        let Some(frame) = self.transfers[transfer].frames.pop_front() else {
            return;
        };
        let is_metered = frame.is_metered();
        let max_tokens = self.bounds.max_tokens.clone();
        let task = self.task(instance, stream).expect("it was there");
        let fact = match frame {
            Frame::Accepted => DestinationFact::Accepted {
                ends_by: EndsBy::Source,
            },
            Frame::Kv(range) => DestinationFact::Kv {
                transfer: TransferId(transfer as u64),
                range,
            },
            Frame::FirstTokens => {
                task.arrived = task.known.clone();
                for (output, most) in task.arrived.iter_mut().zip(max_tokens) {
                    output.n_tokens += 1;
                    output.has_ended = output.n_tokens == most;
                }
                DestinationFact::Token {
                    ends: task.arrived.iter().all(|output| output.has_ended),
                }
            }
            Frame::State(outputs) => {
                let holder = task.known.iter().position(|output| !output.has_ended);
                let owed = outputs
                    .iter()
                    .enumerate()
                    .map(|(choice, output)| match output.has_ended {
                        false => OwedBlocks::All(n_blocks(output.n_tokens)),
                        true if holder == Some(choice) => OwedBlocks::Shared(N_PROMPT / BLOCK_SIZE),
                        true => OwedBlocks::Shared(0),
                    });
                let owed = owed.collect();
                task.arrived = outputs;
                DestinationFact::State { owed }
            }
            Frame::Ended(failure) => DestinationFact::Ended { failure },
        };
        self.tell_destination(instance, stream, Nanos::ZERO, fact);
        if is_metered {
            self.source_hears_taken(transfer);
        }
    }

    pub fn tell_destination(&mut self, instance: usize, stream: usize, now: Nanos, fact: DestinationFact) {
        let Some(task) = self.task(instance, stream) else {
            return;
        };
        let destination = task.destination.as_mut().expect("a receiving task");
        for action in destination.apply(now, fact) {
            self.obey_destination(instance, stream, action);
        }
        self.tidy(instance);
    }

    fn obey_destination(&mut self, instance: usize, stream: usize, action: DestinationAction) {
        let task = self.task(instance, stream).expect("it is being told something");
        match action {
            DestinationAction::Write(KvRange {
                choice,
                first_block,
                n_blocks,
                ..
            }) => {
                let is_first = (first_block..first_block + n_blocks).all(|block| task.written.insert((choice, block)));
                if !is_first || task.group.is_some() {
                    self.violate("a block was written twice or after the join");
                }
            }
            DestinationAction::Refuse(_) => self.violate("a frame was refused"),
            DestinationAction::Deliver => {
                for (choice, output) in (0..).zip(task.arrived.clone()) {
                    let index = output.n_tokens - 1;
                    self.say(instance, stream, Said::Token { choice, index });
                }
            }
            DestinationAction::Join => {
                let (arrived, known, is_migration) = (task.arrived.clone(), task.known.clone(), task.is_migration);
                task.group = Some(Group {
                    outputs: arrived.clone(),
                    is_paused: false,
                    is_preempted: false,
                });
                if is_migration {
                    self.say(instance, stream, Said::Joined);
                }
                for ((choice, arrived), known) in (0..).zip(arrived).zip(known) {
                    for index in known.n_tokens..arrived.n_tokens {
                        if is_migration {
                            self.say(instance, stream, Said::Token { choice, index });
                        }
                    }
                    if arrived.has_ended && !known.has_ended {
                        self.say(instance, stream, Said::ChoiceFinished { choice });
                    }
                }
            }
            DestinationAction::Finish => {
                task.is_over = true;
                for choice in 0..task.known.len() as u32 {
                    self.say(instance, stream, Said::ChoiceFinished { choice });
                }
                self.say(instance, stream, Said::Finished);
            }
            DestinationAction::Fail(failure) => self.fail_task(instance, stream, failure),
            DestinationAction::Close => {}
        }
    }

    /// A destination's call arrives at the source.
    pub fn serve_transfer(&mut self, transfer: usize) {
        let Some(wanted) = self.transfers[transfer].opening.take() else {
            return;
        };
        let Life { instance, .. } = self.transfers[transfer].from.expect("a called source");
        self.transfers[transfer].is_open_at_source = true;
        let plan = TransferPlan {
            layer_groups: vec![0; N_LAYERS],
            choices: wanted.rooms,
        };
        if !wanted.is_migration {
            self.send(transfer, Frame::Accepted);
            self.instances[instance].prefills.push(Prefill {
                transfer,
                machine: Source::new(plan, 2, 8, EndsBy::Source, DEADLINE),
                known: wanted.known,
                n_computed: 0,
            });
            return;
        }
        let refuse = |world: &mut World, failure: Failure| {
            world.send(transfer, Frame::Ended(Some(failure)));
            world.transfers[transfer].is_open_at_source = false;
        };
        let Some(stream) = self.instances[instance].open else {
            return refuse(self, Failure::InstanceLost("not open here".into()));
        };
        if self.instances[instance]
            .movers
            .iter()
            .any(|mover| mover.stream == stream)
        {
            return refuse(self, Failure::Busy("a move is under way".into()));
        }
        let task = self.task(instance, stream).expect("an open request has a task");
        let is_movable = |group: &Group| {
            let decodes = |output: &Output| output.has_ended || output.n_tokens > 0;
            !group.is_preempted && group.outputs.iter().all(decodes)
        };
        if !task.group.as_ref().is_some_and(is_movable) {
            return refuse(self, Failure::Busy("not decoding".into()));
        }
        let (machine, first) = MigrationSource::new(plan, limits());
        self.send(transfer, Frame::Accepted);
        self.instances[instance].movers.push(Mover {
            stream,
            transfer,
            machine,
            asked: None,
            words: VecDeque::new(),
            outputs: Vec::new(),
            has_heard_drop: false,
        });
        self.obey_mover(instance, stream, first);
    }

    fn send(&mut self, transfer: usize, frame: Frame) {
        let transfer = &mut self.transfers[transfer];
        if transfer.is_open_at_destination && !transfer.is_cut {
            transfer.frames.push_back(frame);
        }
    }

    pub fn source_hears_taken(&mut self, transfer: usize) {
        let Some(Life { instance, .. }) = self.transfers[transfer].from else {
            return;
        };
        let here = &self.instances[instance];
        if let Some(stream) = here
            .movers
            .iter()
            .find(|mover| mover.transfer == transfer)
            .map(|mover| mover.stream)
        {
            self.tell_mover(instance, stream, Nanos::ZERO, MigrationFact::Sent);
        } else if here.prefills.iter().any(|prefill| prefill.transfer == transfer) {
            self.tell_prefill(instance, transfer, Nanos::ZERO, SourceFact::Sent);
        }
    }

    pub fn tell_mover(&mut self, instance: usize, stream: usize, now: Nanos, fact: MigrationFact) {
        let mut movers = self.instances[instance].movers.iter_mut();
        let Some(mover) = movers.find(|mover| mover.stream == stream) else {
            return;
        };
        mover.has_heard_drop |= fact == MigrationFact::Dropped;
        let actions = mover.machine.apply(now, fact);
        self.obey_mover(instance, stream, actions);
        self.tidy(instance);
    }

    fn obey_mover(&mut self, instance: usize, stream: usize, actions: Vec<MigrationAction>) {
        for action in actions {
            let mut movers = self.instances[instance].movers.iter_mut();
            let mover = movers
                .find(|mover| mover.stream == stream)
                .expect("it is being told something");
            let transfer = mover.transfer;
            match action {
                MigrationAction::PinFull { from } => mover.asked = Some(Asked::Full(from)),
                MigrationAction::Pause { from } => mover.asked = Some(Asked::Pause(from)),
                MigrationAction::SayMoving => self.say(instance, stream, Said::Moving),
                MigrationAction::SendKv(range, _) => self.send(transfer, Frame::Kv(range)),
                MigrationAction::SendState => {
                    let outputs = mover.outputs.clone();
                    self.send(transfer, Frame::State(outputs));
                }
                MigrationAction::SendProgress => {}
                MigrationAction::SendEnd(failure) => self.send(transfer, Frame::Ended(failure)),
                MigrationAction::SayCancelled(_) => self.say(instance, stream, Said::MoveCancelled),
                MigrationAction::GiveUp(failure) => self.fail_task(instance, stream, failure),
                // Both drop the right to move the group, which goes on if it stands still.
                MigrationAction::ResumeDecoding(_) | MigrationAction::Release => {
                    mover.asked = None;
                    let task = self.task(instance, stream);
                    if let Some(group) = task.and_then(|task| task.group.as_mut()) {
                        group.is_paused = false;
                    }
                }
            }
        }
    }

    /// The engine answers a mover.
    pub fn answer(&mut self, instance: usize, stream: usize) {
        let mut movers = self.instances[instance].movers.iter_mut();
        let Some(mover) = movers.find(|mover| mover.stream == stream) else {
            return;
        };
        let Some(asked) = mover.asked.take() else { return };
        let task = self.task(instance, stream);
        let group = task
            .and_then(|task| task.group.as_mut())
            .filter(|group| !group.is_preempted);
        let Some(group) = group else {
            let failure = Failure::Busy("not decoding".into());
            return self.tell_mover(instance, stream, Nanos::ZERO, MigrationFact::Interrupted(failure));
        };
        let (Asked::Full(from) | Asked::Pause(from)) = &asked;
        let ends = group.outputs.iter().zip(from).map(|(output, from)| {
            let from = from[0];
            let n_kv = N_PROMPT + output.n_tokens - 1;
            match asked {
                _ if output.has_ended => (N_PROMPT / BLOCK_SIZE).max(from),
                Asked::Full(_) => (n_kv / BLOCK_SIZE).max(from),
                Asked::Pause(_) => n_kv.div_ceil(BLOCK_SIZE),
            }
        });
        let end = ends.collect();
        let outputs = group.outputs.clone();
        let fact = if matches!(asked, Asked::Pause(_)) {
            group.is_paused = true;
            let mut movers = self.instances[instance].movers.iter_mut();
            let mover = movers.find(|mover| mover.stream == stream).expect("it has just asked");
            mover.outputs = outputs;
            MigrationFact::Paused { end }
        } else {
            MigrationFact::Full { end }
        };
        self.tell_mover(instance, stream, Nanos::ZERO, fact);
    }

    pub fn tell_prefill(&mut self, instance: usize, transfer: usize, now: Nanos, fact: SourceFact) {
        let mut prefills = self.instances[instance].prefills.iter_mut();
        let Some(prefill) = prefills.find(|prefill| prefill.transfer == transfer) else {
            return;
        };
        for action in prefill.machine.apply(now, fact) {
            match action {
                SourceAction::SendKv(range) => self.send(transfer, Frame::Kv(range)),
                SourceAction::SendToken => self.send(transfer, Frame::FirstTokens),
                SourceAction::SendEnd(failure) => self.send(transfer, Frame::Ended(failure)),
                SourceAction::SendProgress | SourceAction::Release => {}
            }
        }
        self.tidy(instance);
    }

    /// A prefill makes progress: first its KV, then the first tokens.
    pub fn compute(&mut self, instance: usize, transfer: usize) {
        let max_tokens = self.bounds.max_tokens.clone();
        let mut prefills = self.instances[instance].prefills.iter_mut();
        let Some(prefill) = prefills.find(|prefill| prefill.transfer == transfer) else {
            return;
        };
        prefill.n_computed += 1;
        let fact = match prefill.n_computed {
            1 => SourceFact::Ready(KvRange {
                choice: 0,
                layer: 0,
                first_block: 0,
                n_blocks: (N_PROMPT + prefill.known[0].n_tokens).div_ceil(BLOCK_SIZE),
            }),
            _ => {
                let mut outputs = prefill.known.iter().zip(max_tokens);
                SourceFact::Token {
                    ends: outputs.all(|(output, most)| output.n_tokens + 1 == most),
                }
            }
        };
        self.tell_prefill(instance, transfer, Nanos::ZERO, fact);
    }

    /// A front door's word arrives.
    pub fn resume(&mut self, call: usize) {
        let (to, epoch) = (self.calls[call].to, self.calls[call].epoch);
        // A call to a life that has ended finds nobody.
        let is_told = self.life(to.instance) == to;
        self.hear_resume(to, epoch);
        self.calls[call].stage = CallStage::Answered { is_told };
    }

    pub fn hear_resume(&mut self, to: Life, epoch: Epoch) {
        let instance = to.instance;
        if self.life(instance) != to {
            return;
        }
        let Some(stream) = self.instances[instance].open else {
            return;
        };
        let task = self.task(instance, stream).expect("an open request has a task");
        if task.epoch >= epoch {
            return;
        }
        task.epoch = epoch;
        let mut movers = self.instances[instance].movers.iter_mut();
        if let Some(mover) = movers.find(|mover| mover.stream == stream) {
            mover.words.push_back(epoch);
        }
    }

    /// An instance dies, and another life of it begins with nothing.
    pub fn die(&mut self, instance: usize) {
        for number in 0..self.streams.len() {
            if self.streams[number].to == Some(self.life(instance)) {
                let stream = &mut self.streams[number];
                stream.is_cut = true;
                stream.opening = None;
                stream.is_open_at_instance = false;
            }
        }
        for number in 0..self.transfers.len() {
            if self.transfers[number].from == Some(self.life(instance)) {
                let transfer = &mut self.transfers[number];
                transfer.is_cut = true;
                transfer.opening = None;
                transfer.is_open_at_source = false;
            }
        }
        for task in std::mem::take(&mut self.instances[instance].tasks) {
            if let Some(transfer) = task.transfer {
                let transfer = &mut self.transfers[transfer];
                transfer.is_cut = true;
                transfer.opening = None;
                transfer.frames.clear();
                transfer.is_open_at_destination = false;
            }
        }
        self.instances[instance] = Instance {
            incarnation: self.instances[instance].incarnation + 1,
            ..Instance::default()
        };
        self.forget();
    }
}
