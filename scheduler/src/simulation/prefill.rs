//! A prefill for another instance, as its worker drives it, with the production source machine.

use std::collections::VecDeque;

use super::Simulation;
use super::coverage::{Transition, source_fact};
use super::engine::Command;
use super::network::{AtInstance, Event, Frame, Packed, Party, Wanted};
use crate::batch::GroupId;
use crate::ids::{BlockId, Generation, Nanos};
use crate::request::{Failure, Finish, Token};
use crate::transfer::{EndsBy, KvRange, Source, SourceAction, SourceFact, TransferPlan};

pub(super) const MAX_IN_FLIGHT: u32 = 2;

pub(super) struct Prefill {
    request: usize,
    machine: Source,
    pub(super) group: Option<GroupId>,
    ends_by: EndsBy,
    /// Per layer: made ready, pinned, and not sent.
    pinned: Vec<VecDeque<(BlockId, Generation)>>,
    /// What the destination may still read in place.
    held: Vec<BlockId>,
    first: Vec<(Token, Option<Finish>)>,
    is_dropped: bool,
}

impl Simulation<'_> {
    /// A destination's call arrives at the source.
    pub(super) fn serve_transfer(&mut self, i: usize, transfer: usize) {
        let stream = &self.transfers[transfer];
        let (from, to, request) = (stream.from, stream.to, stream.request);
        if !self.passes(Party::Instance(i), Party::Instance(to.instance)) || !self.instances[i].is_up || stream.is_cut {
            return;
        }
        let is_open = stream.is_open_at_destination;
        self.transfers[transfer].is_open_at_source = true;
        if from != self.instances[i].life(i) {
            let failure = Failure::InstanceLost("the caller means another incarnation".to_owned());
            return self.refuse_transfer(transfer, failure);
        }
        if !is_open {
            self.transfers[transfer].is_open_at_source = false;
            return;
        }
        match self.transfers[transfer].wanted.clone() {
            Wanted::Migration { rooms, n_known } => self.serve_migrate(i, transfer, request, rooms, n_known),
            Wanted::Handoff { first_blocks } => self.serve_prefill(i, transfer, request, first_blocks),
        }
    }

    pub(super) fn refuse_transfer(&mut self, transfer: usize, failure: Failure) {
        self.send(transfer, Frame::Ended(Some(failure)));
        self.transfers[transfer].is_open_at_source = false;
    }

    fn serve_prefill(&mut self, i: usize, transfer: usize, request: usize, first_blocks: Vec<u32>) {
        let state = self.transfers[transfer].state.clone();
        let instance = &mut self.instances[i];
        let config = instance.engine.scheduler.config();
        let checked = config.check(&state).and_then(|()| config.check_handoff(&state));
        if let Err(failure) = checked {
            return self.refuse_transfer(transfer, failure);
        }
        let layer_groups = instance.engine.memory.layer_groups.of_layers();
        let n_layers = layer_groups.len();
        let n_tokens = state.request.prompt_ids.len() + state.choices[0].output.len();
        let n_blocks = config.blocks_for(n_tokens) as u32;
        let plan = TransferPlan::handoff(layer_groups, first_blocks.clone(), n_blocks);
        let ends_by = instance.ends_by;
        instance.prefills.insert(
            transfer,
            Prefill {
                request,
                machine: Source::new(plan, MAX_IN_FLIGHT, 3, ends_by, self.settings.stall_deadline),
                group: None,
                ends_by,
                pinned: vec![VecDeque::new(); n_layers],
                held: Vec::new(),
                first: Vec::new(),
                is_dropped: false,
            },
        );
        self.send(transfer, Frame::Accepted(ends_by));
        self.heartbeat_in(i, transfer);
        let state = Box::new(state);
        self.command(
            i,
            Command::Prefill {
                transfer,
                state,
                first_blocks,
            },
        );
    }

    pub(super) fn heartbeat_in(&mut self, i: usize, transfer: usize) {
        let life = self.instances[i].life(i);
        let at = self.now.saturating_add(self.settings.heartbeat);
        self.queue
            .push(at, Event::Instance(life, AtInstance::Heartbeat { transfer }));
    }

    /// Puts a frame on the link of a transfer, in order.
    pub(super) fn send(&mut self, transfer: usize, frame: Frame) {
        let stream = &self.transfers[transfer];
        if stream.is_cut || !stream.is_open_at_destination {
            return;
        }
        let (from, to) = (stream.from, stream.to);
        let (source, destination) = (Party::Instance(from.instance), Party::Instance(to.instance));
        let taken_at = self.now.max(stream.busy_until);
        let transmission = Nanos(frame.n_units() * self.unit_time(source, destination).0);
        let sent_at = taken_at.saturating_add(transmission);
        let arrives_at = sent_at.saturating_add(self.delay(source, destination));
        let stream = &mut self.transfers[transfer];
        stream.busy_until = sent_at;
        stream.last_arrival = stream.last_arrival.max(arrives_at);
        let arrives_at = stream.last_arrival;
        if frame.is_metered() {
            // The driver hears of it when it is run again.
            let after = self.random.below(self.settings.most_delay.0);
            let taken_at = taken_at.saturating_add(Nanos(1000 + after));
            self.queue
                .push(taken_at, Event::Instance(from, AtInstance::Taken { transfer }));
        }
        self.queue
            .push(arrives_at, Event::Instance(to, AtInstance::Frame { transfer, frame }));
    }

    /// Blocks as a frame carries them: copied now, or to be read where they are.
    pub(super) fn pack(
        &mut self,
        i: usize,
        ends_by: EndsBy,
        layer: u32,
        blocks: &[(BlockId, Generation)],
    ) -> Vec<Packed> {
        let memory = &mut self.instances[i].engine.memory;
        let pack = |&(block, generation): &(BlockId, Generation)| {
            assert_eq!(
                memory.generation(block),
                generation,
                "{block:?} was reused while it was pinned"
            );
            assert!(memory.is_pinned(block), "{block:?} is sent without a pin");
            match ends_by {
                EndsBy::Destination => Packed::InPlace(block, generation),
                EndsBy::Source => {
                    let contents = memory.block(layer as usize, block).to_vec();
                    memory.unpin(block);
                    Packed::Bytes(contents)
                }
            }
        };
        blocks.iter().map(pack).collect()
    }

    pub(super) fn prefill_ready(
        &mut self,
        i: usize,
        transfer: usize,
        layer: usize,
        first: usize,
        blocks: &[(BlockId, Generation)],
    ) {
        let Some(prefill) = self.instances[i].prefills.get_mut(&transfer) else {
            let memory = &mut self.instances[i].engine.memory;
            blocks.iter().for_each(|(block, _)| memory.unpin(*block));
            return;
        };
        prefill.pinned[layer].extend(blocks);
        let range = KvRange {
            choice: 0,
            layer: layer as u32,
            first_block: first as u32,
            n_blocks: blocks.len() as u32,
        };
        self.tell_prefill(i, transfer, SourceFact::Ready(range));
    }

    pub(super) fn prefill_first_tokens(&mut self, i: usize, transfer: usize, first: Vec<(Token, Option<Finish>)>) {
        let Some(prefill) = self.instances[i].prefills.get_mut(&transfer) else {
            return;
        };
        let ends = first.iter().all(|(_, finish)| finish.is_some());
        prefill.first = first;
        self.tell_prefill(i, transfer, SourceFact::Token { ends });
    }

    pub(super) fn prefill_failed(&mut self, i: usize, transfer: usize, failure: Failure) {
        if let Some(prefill) = self.instances[i].prefills.get_mut(&transfer) {
            prefill.group = None;
            self.tell_prefill(i, transfer, SourceFact::ComputeFailed(failure));
        }
    }

    pub(super) fn prefill_dropped(&mut self, i: usize, transfer: usize) {
        let Some(prefill) = self.instances[i].prefills.get_mut(&transfer) else {
            return;
        };
        if !std::mem::replace(&mut prefill.is_dropped, true) {
            self.tell_prefill(i, transfer, SourceFact::Dropped);
        }
    }

    pub(super) fn tell_prefill(&mut self, i: usize, transfer: usize, fact: SourceFact) {
        let to = self.transfers[transfer].to;
        let Some(prefill) = self.instances[i].prefills.get_mut(&transfer) else {
            return;
        };
        let transition = Transition {
            machine: "source",
            stage: prefill.machine.stage(),
            fact: source_fact(&fact),
        };
        let actions = prefill.machine.apply(self.now, fact);
        let request = prefill.request;
        self.count(transition, request, &[Party::Instance(i), Party::Instance(to.instance)]);
        self.trace(|| format!("instance {i}, request {request}: {transition}"));
        for action in actions {
            let instance = &mut self.instances[i];
            let prefill = instance
                .prefills
                .get_mut(&transfer)
                .expect("it is being told something");
            match action {
                SourceAction::SendKv(range) => {
                    let pinned = &mut prefill.pinned[range.layer as usize];
                    let blocks: Vec<_> = pinned.drain(..range.n_blocks as usize).collect();
                    let ends_by = prefill.ends_by;
                    if ends_by == EndsBy::Destination {
                        prefill.held.extend(blocks.iter().map(|(block, _)| *block));
                    }
                    let packed = self.pack(i, ends_by, range.layer, &blocks);
                    self.send(transfer, Frame::Kv(range, packed));
                }
                SourceAction::SendToken => {
                    let first = prefill.first.clone();
                    self.send(transfer, Frame::FirstTokens(first));
                }
                SourceAction::SendProgress => {
                    let n_beats = instance.engine.n_beats;
                    self.send(transfer, Frame::Progress(n_beats));
                }
                SourceAction::SendEnd(failure) => {
                    let is_bad = failure.is_some();
                    self.send(transfer, Frame::Ended(failure));
                    if is_bad {
                        self.aim_often(request);
                    }
                }
                SourceAction::Release => {
                    let prefill = instance.prefills.remove(&transfer).expect("it is being told something");
                    let unsent = prefill.pinned.into_iter().flatten().map(|(block, _)| block);
                    unsent
                        .chain(prefill.held)
                        .for_each(|block| instance.engine.memory.unpin(block));
                    if let Some(open) = prefill.group.and_then(|group| instance.engine.open.get_mut(&group)) {
                        open.is_abandoned = true;
                    }
                    self.source_gone(transfer);
                    self.wake(i);
                }
            }
        }
    }

    /// The source's end of a transfer's stream has gone: after all frames the destination hears that it ended.
    pub(super) fn source_gone(&mut self, transfer: usize) {
        let stream = &mut self.transfers[transfer];
        stream.is_open_at_source = false;
        if stream.is_open_at_destination && !stream.is_cut {
            let (to, from) = (stream.to, stream.from);
            let last_arrival = stream.last_arrival;
            let delay = self.delay(Party::Instance(from.instance), Party::Instance(to.instance));
            let at = self.now.saturating_add(delay).max(last_arrival);
            let reason = "no typed end";
            self.queue
                .push(at, Event::Instance(to, AtInstance::TransferBroken { transfer, reason }));
        }
    }
}
