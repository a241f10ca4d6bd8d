//! The whole state, what can happen in it, and what must hold.

use baton_scheduler::arbiter::ArbiterFact;
use baton_scheduler::ids::{InstanceId, Nanos};
use baton_scheduler::transfer::{DestinationFact, MigrationFact, SourceFact};

use crate::door::{Door, Ear};
use crate::instance::{DEADLINE, Instance};
use crate::wire::{CallStage, EventStream, Life, ResumeCall, TransferStream};

/// How far to look.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Of each choice.
    pub max_tokens: Vec<u32>,
    pub n_moves: u32,
    /// Of all kinds, deaths included.
    pub n_faults: u32,
    pub n_deaths: u32,
    pub with_handoffs: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// What is left of them, but for `max_tokens`.
    pub bounds: Bounds,
    pub door: Door,
    pub instances: [Instance; 2],
    pub streams: Vec<EventStream>,
    pub transfers: Vec<TransferStream>,
    pub calls: Vec<ResumeCall>,
    pub violation: Option<&'static str>,
}

/// Which timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Timer {
    Arbiter,
    Destination { instance: usize, stream: usize },
    Mover { instance: usize, stream: usize },
    Prefill { instance: usize, transfer: usize },
    ResumeCall(usize),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    InstanceDies(usize),
    DoorDies,
    ClientGone,
    /// The front door notices now, the instance some time.
    StreamCut(usize),
    /// With what the link has taken already, or not.
    TransferCut {
        transfer: usize,
        is_taken: bool,
    },
    ResumeDoubled(usize),
    EarlyTimer(Timer),
    Preempted {
        instance: usize,
        stream: usize,
    },
    NoRoom,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Place { decode: usize, prefill: Option<usize> },
    MoveWanted { to: usize },
    DoorHears(Ear),
    DoorHearsBreak(Ear),
    DoorHearsAnswer(usize),
    Served(usize),
    TransferServed(usize),
    TaskHearsClose { instance: usize, stream: usize },
    DestinationHears { instance: usize, stream: usize },
    DestinationHearsBreak { instance: usize, stream: usize },
    Stepped { instance: usize, stream: usize },
    Readmitted { instance: usize, stream: usize },
    MoverAnswered { instance: usize, stream: usize },
    MoverHearsWord { instance: usize, stream: usize },
    MoverHearsDrop { instance: usize, stream: usize },
    MoverHearsGone { instance: usize, stream: usize },
    Computed { instance: usize, transfer: usize },
    PrefillHearsDrop { instance: usize, transfer: usize },
    ResumeArrives(usize),
    TimerFires(Timer),
    Fault(Fault),
}

pub fn name(instance: usize) -> InstanceId {
    InstanceId::new(["a", "b"][instance])
}

impl World {
    pub fn new(bounds: Bounds) -> World {
        World {
            door: Door::new(bounds.max_tokens.len() as u32),
            bounds,
            instances: Default::default(),
            streams: Vec::new(),
            transfers: Vec::new(),
            calls: Vec::new(),
            violation: None,
        }
    }

    pub fn life(&self, instance: usize) -> Life {
        Life {
            instance,
            incarnation: self.instances[instance].incarnation,
        }
    }

    pub fn violate(&mut self, what: &'static str) {
        self.violation.get_or_insert(what);
    }

    /// Forgets streams that neither end remembers, so that they do not tell states apart.
    pub fn forget(&mut self) {
        for stream in &mut self.streams {
            if !stream.is_open_at_door && !stream.is_open_at_instance {
                *stream = EventStream::default();
            }
        }
        for transfer in &mut self.transfers {
            if !transfer.is_open_at_destination && !transfer.is_open_at_source {
                *transfer = TransferStream::default();
            }
        }
    }

    /// Groups that generate, and whose front door would hear them.
    pub fn n_heard_generating(&self) -> usize {
        let tasks = self.instances.iter().flat_map(|instance| &instance.tasks);
        let is_heard = |stream: usize| self.streams[stream].is_open_at_door && !self.streams[stream].is_cut;
        let generates = |group: &crate::instance::Group| !group.is_paused;
        tasks
            .filter(|task| is_heard(task.stream) && task.group.as_ref().is_some_and(generates))
            .count()
    }

    /// Whether everybody has ended, and nothing is held.
    pub fn is_quiescent(&self) -> bool {
        let is_empty = |instance: &Instance| {
            instance.tasks.is_empty()
                && instance.movers.is_empty()
                && instance.prefills.is_empty()
                && instance.open.is_none()
        };
        (self.door.ended.is_some() || !self.door.is_up)
            && self.door.speaking.is_none()
            && self.door.attached.is_none()
            && self.instances.iter().all(is_empty)
    }

    /// Everything that can happen now. Timers fire by themselves when nothing else can happen, and earlier as a fault.
    pub fn possible(&self) -> Vec<Event> {
        if self.violation.is_some() {
            return Vec::new();
        }
        let mut events = Vec::new();
        self.possible_at_door(&mut events);
        let mut timers = Vec::new();
        for instance in 0..2 {
            self.possible_at_instance(instance, &mut events, &mut timers);
        }
        if self.door.arbiter.next_tick().is_some() && self.door.is_up {
            timers.push(Timer::Arbiter);
        }
        for (number, call) in self.calls.iter().enumerate() {
            if call.stage == CallStage::Asked {
                events.push(Event::ResumeArrives(number));
                // Later, the answer is dropped and the word may still arrive.
                if self.door.resuming == Some(call.epoch) {
                    timers.push(Timer::ResumeCall(number));
                }
            } else {
                events.push(Event::DoorHearsAnswer(number));
            }
        }
        if events.is_empty() {
            events.extend(timers.iter().copied().map(Event::TimerFires));
        } else if self.bounds.n_faults > 0 {
            events.extend(timers.iter().map(|&timer| Event::Fault(Fault::EarlyTimer(timer))));
        }
        // A world that has come to rest is left in peace.
        if self.bounds.n_faults > 0 && !events.is_empty() {
            self.possible_faults(&mut events);
        }
        events
    }

    fn possible_at_door(&self, events: &mut Vec<Event>) {
        let door = &self.door;
        if door.must_place {
            // The first of two equal instances; later they differ by what they remember.
            for decode in 0..if self.streams.is_empty() { 1 } else { 2 } {
                events.push(Event::Place { decode, prefill: None });
                let is_handed_over = self.bounds.with_handoffs && door.client.len() == 1;
                let is_first = door.client.iter().all(|output| output.n_tokens == 0);
                if is_handed_over || (self.bounds.with_handoffs && is_first) {
                    events.push(Event::Place {
                        decode,
                        prefill: Some(1 - decode),
                    });
                }
            }
        }
        if self.bounds.n_moves > 0 && door.is_up && !door.arbiter.is_moving() {
            let has_begun = door.client.iter().all(|output| output.n_tokens > 0 || output.has_ended);
            // The driver takes orders once its call is answered.
            let speaking = door.speaking.map(|stream| &self.streams[stream]);
            let from = speaking
                .filter(|stream| stream.opening.is_none())
                .and_then(|stream| stream.to);
            if let (Some(from), true) = (from, has_begun) {
                events.push(Event::MoveWanted { to: 1 - from.instance });
            }
        }
        for ear in [Ear::Speaking, Ear::Attached] {
            let Some(stream) = door.stream(ear) else { continue };
            let stream = &self.streams[stream];
            if !stream.words.is_empty() {
                events.push(Event::DoorHears(ear));
            } else if stream.is_cut || (!stream.is_open_at_instance && stream.opening.is_none()) {
                events.push(Event::DoorHearsBreak(ear));
            }
        }
        for (number, stream) in self.streams.iter().enumerate() {
            if stream.opening.is_some() {
                events.push(Event::Served(number));
            }
        }
        for (number, transfer) in self.transfers.iter().enumerate() {
            if transfer.opening.is_some() && !transfer.is_cut {
                events.push(Event::TransferServed(number));
            }
        }
    }

    fn possible_at_instance(&self, instance: usize, events: &mut Vec<Event>, timers: &mut Vec<Timer>) {
        let here = &self.instances[instance];
        for task in &here.tasks {
            let stream = task.stream;
            let event_stream = &self.streams[stream];
            if !task.is_over && (event_stream.is_cut || !event_stream.is_open_at_door) {
                events.push(Event::TaskHearsClose { instance, stream });
            }
            if let Some(group) = &task.group {
                if group.is_preempted {
                    events.push(Event::Readmitted { instance, stream });
                } else if !group.is_paused {
                    events.push(Event::Stepped { instance, stream });
                }
            }
            let Some(transfer) = task.transfer else { continue };
            let transfer = &self.transfers[transfer];
            let Some(destination) = task.destination.as_ref().filter(|it| !it.is_closed()) else {
                continue;
            };
            if !transfer.frames.is_empty() {
                events.push(Event::DestinationHears { instance, stream });
            } else if transfer.is_cut || (!transfer.is_open_at_source && transfer.opening.is_none()) {
                events.push(Event::DestinationHearsBreak { instance, stream });
            }
            if destination.next_tick().is_some() {
                timers.push(Timer::Destination { instance, stream });
            }
        }
        for mover in &here.movers {
            let stream = mover.stream;
            if mover.asked.is_some() {
                events.push(Event::MoverAnswered { instance, stream });
            }
            if !mover.words.is_empty() {
                events.push(Event::MoverHearsWord { instance, stream });
            }
            let transfer = &self.transfers[mover.transfer];
            if (transfer.is_cut || !transfer.is_open_at_destination) && !mover.has_heard_drop {
                events.push(Event::MoverHearsDrop { instance, stream });
            }
            if self.streams[stream].is_cut || !self.streams[stream].is_open_at_door {
                events.push(Event::MoverHearsGone { instance, stream });
            }
            if mover.machine.next_deadline().is_some() {
                timers.push(Timer::Mover { instance, stream });
            }
        }
        for prefill in &here.prefills {
            let transfer = prefill.transfer;
            if prefill.n_computed < 2 {
                events.push(Event::Computed { instance, transfer });
            }
            if self.transfers[transfer].is_cut || !self.transfers[transfer].is_open_at_destination {
                events.push(Event::PrefillHearsDrop { instance, transfer });
            } else if self.transfers[transfer]
                .frames
                .iter()
                .filter(|frame| frame.is_metered())
                .count()
                > 1
            {
                timers.push(Timer::Prefill { instance, transfer });
            }
        }
    }

    fn possible_faults(&self, events: &mut Vec<Event>) {
        let mut faults = Vec::new();
        if self.bounds.n_deaths > 0 {
            faults.extend([Fault::InstanceDies(0), Fault::InstanceDies(1)]);
            if self.door.is_up && !self.door.arbiter.is_ended() {
                faults.push(Fault::DoorDies);
            }
        }
        if self.door.is_up && !self.door.arbiter.is_ended() {
            faults.push(Fault::ClientGone);
            if self.door.must_place {
                faults.push(Fault::NoRoom);
            }
        }
        for (number, stream) in self.streams.iter().enumerate() {
            if stream.is_open_at_door && !stream.is_cut {
                faults.push(Fault::StreamCut(number));
            }
        }
        for (number, transfer) in self.transfers.iter().enumerate() {
            if transfer.is_open_at_destination && !transfer.is_cut {
                let is_taken = |is_taken| Fault::TransferCut {
                    transfer: number,
                    is_taken,
                };
                faults.push(is_taken(false));
                if transfer.frames.iter().any(crate::wire::Frame::is_metered) {
                    faults.push(is_taken(true));
                }
            }
        }
        for (number, call) in self.calls.iter().enumerate() {
            if call.stage == CallStage::Asked {
                faults.push(Fault::ResumeDoubled(number));
            }
        }
        for (instance, here) in self.instances.iter().enumerate() {
            for task in &here.tasks {
                let stream = task.stream;
                if task
                    .group
                    .as_ref()
                    .is_some_and(|group| !group.is_paused && !group.is_preempted)
                {
                    faults.push(Fault::Preempted { instance, stream });
                }
            }
        }
        events.extend(faults.into_iter().map(Event::Fault));
    }

    pub fn happen(&mut self, event: Event) {
        match event {
            Event::Place { decode, prefill } => self.place(decode, prefill),
            Event::MoveWanted { to } => {
                self.bounds.n_moves -= 1;
                self.want_move(to);
            }
            Event::DoorHears(ear) => self.door_hears(ear),
            Event::DoorHearsBreak(ear) => self.door_hears_break(ear),
            Event::DoorHearsAnswer(number) => {
                let call = self.calls.remove(number);
                if let CallStage::Answered { is_told } = call.stage {
                    self.door_hears_answer(call.epoch, is_told);
                }
            }
            Event::Served(stream) => self.serve(stream),
            Event::TransferServed(transfer) => self.serve_transfer(transfer),
            Event::TaskHearsClose { instance, stream } => self.task_hears_close(instance, stream),
            Event::DestinationHears { instance, stream } => self.destination_hears(instance, stream),
            Event::DestinationHearsBreak { instance, stream } => {
                let fact = DestinationFact::Dropped { reason: "cut".into() };
                self.tell_destination(instance, stream, Nanos::ZERO, fact);
            }
            Event::Stepped { instance, stream } => self.step(instance, stream),
            Event::Readmitted { instance, stream } => self.set_preempted(instance, stream, false),
            Event::MoverAnswered { instance, stream } => self.answer(instance, stream),
            Event::MoverHearsWord { instance, stream } => {
                let mut movers = self.instances[instance].movers.iter_mut();
                let mover = movers.find(|mover| mover.stream == stream);
                if let Some(epoch) = mover.and_then(|mover| mover.words.pop_front()) {
                    self.tell_mover(instance, stream, Nanos::ZERO, MigrationFact::Resume(epoch));
                }
            }
            Event::MoverHearsDrop { instance, stream } => {
                self.tell_mover(instance, stream, Nanos::ZERO, MigrationFact::Dropped);
            }
            Event::MoverHearsGone { instance, stream } => {
                self.tell_mover(instance, stream, Nanos::ZERO, MigrationFact::Gone);
            }
            Event::Computed { instance, transfer } => self.compute(instance, transfer),
            Event::PrefillHearsDrop { instance, transfer } => {
                self.tell_prefill(instance, transfer, Nanos::ZERO, SourceFact::Dropped);
            }
            Event::ResumeArrives(call) => self.resume(call),
            Event::TimerFires(timer) => self.fire(timer),
            Event::Fault(fault) => {
                self.bounds.n_faults -= 1;
                self.suffer(fault);
            }
        }
        self.forget();
    }

    fn fire(&mut self, timer: Timer) {
        match timer {
            Timer::Arbiter => {
                let now = self.door.arbiter.next_tick().expect("it is due");
                self.tell_arbiter(now, ArbiterFact::Tick);
            }
            Timer::Destination { instance, stream } => {
                self.tell_destination(instance, stream, DEADLINE, DestinationFact::Tick);
            }
            Timer::Mover { instance, stream } => self.tell_mover(instance, stream, DEADLINE, MigrationFact::Tick),
            Timer::Prefill { instance, transfer } => {
                self.tell_prefill(instance, transfer, DEADLINE, SourceFact::Tick);
            }
            Timer::ResumeCall(call) => {
                let epoch = self.calls[call].epoch;
                self.door_hears_answer(epoch, false);
            }
        }
    }

    fn suffer(&mut self, fault: Fault) {
        match fault {
            Fault::InstanceDies(instance) => {
                self.bounds.n_deaths -= 1;
                self.die(instance);
            }
            Fault::DoorDies => {
                self.bounds.n_deaths -= 1;
                self.door_dies();
            }
            Fault::ClientGone => self.tell_arbiter(Nanos::ZERO, ArbiterFact::ClientGone),
            Fault::NoRoom => {
                self.door.must_place = false;
                self.tell_arbiter(Nanos::ZERO, ArbiterFact::NoRoom);
            }
            Fault::StreamCut(stream) => {
                let stream = &mut self.streams[stream];
                stream.is_cut = true;
                stream.opening = None;
                stream.words.clear();
            }
            Fault::TransferCut { transfer, is_taken } => {
                let frames = std::mem::take(&mut self.transfers[transfer].frames);
                self.transfers[transfer].is_cut = true;
                self.transfers[transfer].opening = None;
                if is_taken {
                    for _ in frames.iter().filter(|frame| frame.is_metered()) {
                        self.source_hears_taken(transfer);
                    }
                }
            }
            Fault::ResumeDoubled(call) => {
                // The first copy is heard now, the second with the answer.
                let ResumeCall { to, epoch, .. } = self.calls[call];
                self.hear_resume(to, epoch);
            }
            Fault::EarlyTimer(timer) => self.fire(timer),
            Fault::Preempted { instance, stream } => self.set_preempted(instance, stream, true),
        }
    }

    fn set_preempted(&mut self, instance: usize, stream: usize, is_preempted: bool) {
        let mut tasks = self.instances[instance].tasks.iter_mut();
        let task = tasks.find(|task| task.stream == stream);
        if let Some(group) = task.and_then(|task| task.group.as_mut()) {
            group.is_preempted = is_preempted;
        }
    }
}
