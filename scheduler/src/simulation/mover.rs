//! A move away from an instance, as its worker drives it, with the production machine of a migration's source.

use std::collections::VecDeque;

use super::Simulation;
use super::coverage::{Transition, migration_fact};
use super::engine::{Command, Stage};
use super::network::{AtInstance, Event, Frame, Party, Said};
use super::prefill::MAX_IN_FLIGHT;
use crate::batch::GroupId;
use crate::ids::{BlockId, Epoch, Generation, Nanos};
use crate::request::{ChoiceState, Failure};
use crate::transfer::{
    ChoicePlan, EndsBy, MAX_STAGES, MigrationAction, MigrationFact, MigrationLimits, MigrationSource, TransferPlan,
};

type Pinned = VecDeque<(BlockId, Generation)>;

pub(super) struct Mover {
    pub(super) request: usize,
    /// The task that moves, by its front door's stream; and by its number.
    pub(super) stream: usize,
    task: u64,
    rooms: Vec<ChoicePlan>,
    n_known: Vec<usize>,
    /// Not before the engine has given the right to move.
    machine: Option<MigrationSource>,
    group: Option<GroupId>,
    /// The engine lets a paused group go on when this is dropped.
    pub(super) has_right: bool,
    is_asking: bool,
    ends_by: EndsBy,
    /// Of each choice, per layer: pinned and not sent.
    pinned: Vec<Vec<Pinned>>,
    held: Vec<BlockId>,
    outputs: Vec<ChoiceState>,
    is_dropped: bool,
    deadline_at: Option<Nanos>,
}

impl Simulation<'_> {
    pub(super) fn serve_migrate(
        &mut self,
        i: usize,
        transfer: usize,
        request: usize,
        rooms: Vec<ChoicePlan>,
        n_known: Vec<usize>,
    ) {
        let instance = &mut self.instances[i];
        let Some(&task) = instance.registered.get(&request) else {
            let failure = Failure::InstanceLost("the request is not open here".to_owned());
            return self.refuse_transfer(transfer, failure);
        };
        let stream = instance.tasks[&task].stream;
        if instance.movers.values().any(|mover| mover.stream == stream) {
            let failure = Failure::Busy("a move of it is under way".to_owned());
            return self.refuse_transfer(transfer, failure);
        }
        instance.movers.insert(
            transfer,
            Mover {
                request,
                stream,
                task,
                rooms,
                n_known,
                machine: None,
                group: None,
                has_right: false,
                is_asking: false,
                ends_by: instance.ends_by,
                pinned: Vec::new(),
                held: Vec::new(),
                outputs: Vec::new(),
                is_dropped: false,
                deadline_at: None,
            },
        );
        self.command(i, Command::StartMove { transfer });
    }

    /// The engine gave the right to move, or did not.
    pub(super) fn mover_started(&mut self, i: usize, transfer: usize, answer: Result<GroupId, Failure>) {
        let layer_groups = self.instances[i].engine.memory.layer_groups.of_layers();
        let mover = self.instances[i].movers.get_mut(&transfer).expect("it has asked");
        let group = match answer {
            Ok(group) => group,
            Err(failure) => {
                self.instances[i].movers.remove(&transfer);
                return self.refuse_transfer(transfer, failure);
            }
        };
        mover.pinned = vec![vec![VecDeque::new(); layer_groups.len()]; mover.rooms.len()];
        let plan = TransferPlan {
            layer_groups,
            choices: mover.rooms.clone(),
        };
        let limits = MigrationLimits {
            max_in_flight: MAX_IN_FLIGHT,
            max_blocks_per_frame: 3,
            stall_deadline: self.settings.stall_deadline,
            resume_deadline: self.settings.resume_deadline,
            max_stages: MAX_STAGES,
        };
        let (machine, first) = MigrationSource::new(plan, limits);
        mover.machine = Some(machine);
        mover.group = Some(group);
        mover.has_right = true;
        let ends_by = mover.ends_by;
        self.send(transfer, Frame::Accepted(ends_by));
        self.heartbeat_in(i, transfer);
        self.obey_mover(i, transfer, first);
    }

    pub(super) fn mover_answered(
        &mut self,
        i: usize,
        transfer: usize,
        answer: Result<(Stage, Vec<ChoiceState>), Failure>,
    ) {
        let instance = &mut self.instances[i];
        let asking = instance.movers.get_mut(&transfer).filter(|mover| mover.is_asking);
        let Some(mover) = asking else {
            // An answer that is not taken unpins what it holds.
            let memory = &mut instance.engine.memory;
            for blocks in answer.into_iter().flat_map(|(stage, _)| stage.blocks) {
                for layer in 0..memory.n_layers() {
                    let layer_group = memory.layer_groups.place(layer).layer_group;
                    blocks[layer_group].iter().for_each(|(block, _)| memory.unpin(*block));
                }
            }
            return;
        };
        mover.is_asking = false;
        let fact = match answer {
            Err(failure) => MigrationFact::Interrupted(failure),
            Ok((stage, outputs)) => {
                let layer_groups = &instance.engine.memory.layer_groups;
                for (blocks, layers) in stage.blocks.iter().zip(&mut mover.pinned) {
                    for (pinned, place) in layers.iter_mut().zip(layer_groups.places()) {
                        pinned.extend(&blocks[place.layer_group]);
                    }
                }
                let machine = mover.machine.as_ref().expect("it has asked");
                if machine.is_pausing() {
                    let mut known = outputs.iter().zip(&mover.n_known);
                    // An older attempt at the request was found, because the one that was meant has just ended.
                    if known.any(|(choice, &n_known)| n_known > choice.output.len()) {
                        MigrationFact::Interrupted(Failure::Invalid("more is known than was generated".to_owned()))
                    } else {
                        mover.outputs = outputs;
                        MigrationFact::Paused { end: stage.ends }
                    }
                } else {
                    MigrationFact::Full { end: stage.ends }
                }
            }
        };
        self.tell_mover(i, transfer, fact);
    }

    pub(super) fn movers_hear_gone(&mut self, i: usize, stream: usize) {
        let movers = self.instances[i].movers.iter();
        let gone: Vec<usize> = movers
            .filter(|(_, mover)| mover.stream == stream)
            .map(|(&id, _)| id)
            .collect();
        for transfer in gone {
            self.tell_mover(i, transfer, MigrationFact::Gone);
        }
    }

    pub(super) fn mover_dropped(&mut self, i: usize, transfer: usize) {
        let Some(mover) = self.instances[i].movers.get_mut(&transfer) else {
            return;
        };
        if mover.machine.is_none() {
            // It waits for nothing but the engine's leave.
            self.instances[i].movers.remove(&transfer);
            self.source_gone(transfer);
        } else if !std::mem::replace(&mut mover.is_dropped, true) {
            self.unpin_held(i, transfer);
            self.tell_mover(i, transfer, MigrationFact::Dropped);
        }
    }

    /// Nothing that was sent is read any more, or it is of no use to who reads it.
    fn unpin_held(&mut self, i: usize, transfer: usize) {
        let instance = &mut self.instances[i];
        if let Some(mover) = instance.movers.get_mut(&transfer) {
            for block in std::mem::take(&mut mover.held) {
                instance.engine.memory.unpin(block);
            }
        }
    }

    pub(super) fn heartbeat(&mut self, i: usize, transfer: usize) {
        if self.instances[i].movers.contains_key(&transfer) {
            self.tell_mover(i, transfer, MigrationFact::Tick);
        } else {
            self.tell_prefill(i, transfer, crate::transfer::SourceFact::Tick);
        }
        let instance = &self.instances[i];
        if instance.movers.contains_key(&transfer) || instance.prefills.contains_key(&transfer) {
            self.heartbeat_in(i, transfer);
        }
    }

    pub(super) fn mover_deadline(&mut self, i: usize, transfer: usize) {
        if let Some(mover) = self.instances[i].movers.get_mut(&transfer) {
            mover.deadline_at = None;
            self.tell_mover(i, transfer, MigrationFact::Tick);
        }
    }

    pub(super) fn mover_word(&mut self, i: usize, transfer: usize, epoch: Epoch) {
        self.tell_mover(i, transfer, MigrationFact::Resume(epoch));
    }

    pub(super) fn taken(&mut self, i: usize, transfer: usize) {
        if self.instances[i].movers.contains_key(&transfer) {
            self.tell_mover(i, transfer, MigrationFact::Sent);
        } else {
            self.tell_prefill(i, transfer, crate::transfer::SourceFact::Sent);
        }
    }

    fn tell_mover(&mut self, i: usize, transfer: usize, fact: MigrationFact) {
        let to = self.transfers[transfer].to;
        let life = self.instances[i].life(i);
        let Some(mover) = self.instances[i].movers.get_mut(&transfer) else {
            return;
        };
        let request = mover.request;
        let Some(machine) = &mut mover.machine else {
            if fact == MigrationFact::Gone {
                self.instances[i].movers.remove(&transfer);
                self.source_gone(transfer);
            }
            return;
        };
        let transition = Transition {
            machine: "source of a move",
            stage: machine.stage(),
            fact: migration_fact(&fact),
        };
        let actions = machine.apply(self.now, fact);
        let deadline = machine.next_deadline();
        if let Some(at) = deadline.filter(|_| mover.deadline_at.is_none()) {
            mover.deadline_at = deadline;
            self.queue
                .push(at, Event::Instance(life, AtInstance::MoverDeadline { transfer }));
        }
        let parties = [Party::Instance(i), Party::Instance(to.instance), Party::Door];
        self.count(transition, request, &parties);
        self.trace(|| format!("instance {i}, request {request}: {transition}"));
        self.obey_mover(i, transfer, actions);
    }

    fn obey_mover(&mut self, i: usize, transfer: usize, actions: Vec<MigrationAction>) {
        for action in actions {
            let mover = self.instances[i]
                .movers
                .get_mut(&transfer)
                .expect("it is being told something");
            let (task, request) = (mover.task, mover.request);
            match action {
                MigrationAction::PinFull { from } => self.mover_asks(i, transfer, from, false),
                MigrationAction::Pause { from } => self.mover_asks(i, transfer, from, true),
                MigrationAction::SayMoving => {
                    self.task_says(i, task, Said::Moving);
                    self.aim_often(request);
                }
                MigrationAction::SendKv(range, _) => {
                    let pinned = &mut mover.pinned[range.choice as usize][range.layer as usize];
                    let blocks: Vec<_> = pinned.drain(..range.n_blocks as usize).collect();
                    let ends_by = mover.ends_by;
                    if ends_by == EndsBy::Destination {
                        mover.held.extend(blocks.iter().map(|(block, _)| *block));
                    }
                    let packed = self.pack(i, ends_by, range.layer, &blocks);
                    self.send(transfer, Frame::Kv(range, packed));
                }
                MigrationAction::SendState => {
                    let choices = mover.outputs.iter().zip(&mover.n_known);
                    let lacking = choices.map(|(choice, &n_known)| ChoiceState {
                        output: choice.output[n_known..].to_vec(),
                        finish: choice.finish,
                    });
                    let lacking = lacking.collect();
                    self.send(transfer, Frame::State(lacking));
                }
                MigrationAction::SendProgress => {
                    let n_beats = self.instances[i].engine.n_beats;
                    self.send(transfer, Frame::Progress(n_beats));
                }
                MigrationAction::SendEnd(failure) => {
                    let is_bad = failure.is_some();
                    self.send(transfer, Frame::Ended(failure));
                    if is_bad {
                        self.aim_often(request);
                    }
                }
                MigrationAction::ResumeDecoding(_) => {
                    self.unpin_held(i, transfer);
                    let mover = self.instances[i].movers.get_mut(&transfer).expect("as above");
                    (mover.is_asking, mover.has_right) = (false, false);
                    self.wake(i);
                }
                MigrationAction::SayCancelled(_) => self.task_says(i, task, Said::MoveCancelled),
                MigrationAction::GiveUp(failure) => self.task_failed(i, task, failure, None),
                MigrationAction::Release => {
                    self.unpin_held(i, transfer);
                    let instance = &mut self.instances[i];
                    let mover = instance.movers.remove(&transfer).expect("it is being told something");
                    for (block, _) in mover.pinned.into_iter().flatten().flatten() {
                        instance.engine.memory.unpin(block);
                    }
                    self.source_gone(transfer);
                    self.wake(i);
                }
            }
        }
    }

    fn mover_asks(&mut self, i: usize, transfer: usize, from: Vec<Vec<u32>>, pauses: bool) {
        let mover = self.instances[i]
            .movers
            .get_mut(&transfer)
            .expect("it is being told something");
        assert!(!mover.is_asking, "the engine is asked one thing at a time");
        mover.is_asking = true;
        let group = mover.group.expect("it has the right to move a group");
        self.command(
            i,
            Command::Pin {
                transfer,
                group,
                from,
                pauses,
            },
        );
    }
}
