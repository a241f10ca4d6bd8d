//! What goes wrong, and for how long it is felt.

use super::network::{AtDoor, AtInstance, Event, InWorld, Life, Party};
use super::{FaultKind, Simulation};
use crate::arbiter::ArbiterFact;
use crate::ids::{Nanos, Role};
use crate::placement::ViewEvent;

/// A silent peer is noticed after this long.
const KEEPALIVE: Nanos = Nanos::from_secs(1);
/// How long after its end a fault is still felt.
const AFTERMATH: Nanos = Nanos::from_secs(3);

/// Who feels a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Machines at an instance, of transfers with it, and arbiters whose latest streams went to it.
    Instance(usize),
    /// Machines of transfers between the two, and arbiters if one is the front door.
    Link(Party, Party),
    Request(usize),
    Everybody,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Felt {
    kind: FaultKind,
    scope: Scope,
    until: Nanos,
}

/// The end of something that was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recovery {
    Restarts(usize),
    KeepaliveRunsOut(usize),
    WakesUp(usize),
    LinkHeals(Party, Party),
    LinkIsQuick(Party, Party),
    Undrained(usize),
    DoorRestarts,
}

impl Simulation<'_> {
    pub(super) fn feel(&mut self, kind: FaultKind, scope: Scope, lasts: Nanos) {
        let until = self.now.saturating_add(lasts);
        // Who had no room was busy, and lost nobody.
        if kind != FaultKind::NoRoom {
            self.last_felt = self.last_felt.max(until);
        }
        let mut felt = self.felt.iter_mut();
        match felt.find(|felt| felt.kind == kind && felt.scope == scope) {
            Some(felt) => felt.until = felt.until.max(until),
            None => self.felt.push(Felt { kind, scope, until }),
        }
    }

    /// The kinds of faults that a machine of `request` between `parties` feels now, in order.
    pub(super) fn felt_by(&mut self, request: usize, parties: &[Party]) -> Vec<FaultKind> {
        let now = self.now;
        self.felt.retain(|felt| felt.until >= now);
        let mut kinds: Vec<FaultKind> = Vec::new();
        for felt in &self.felt {
            let is_felt = match felt.scope {
                Scope::Instance(i) => parties.contains(&Party::Instance(i)),
                Scope::Link(a, b) => parties.contains(&a) && parties.contains(&b),
                Scope::Request(other) => other == request,
                Scope::Everybody => true,
            };
            if is_felt && !kinds.contains(&felt.kind) {
                kinds.push(felt.kind);
            }
        }
        kinds
    }

    fn recovers_in(&mut self, after: Nanos, recovery: Recovery) {
        let at = self.now.saturating_add(after);
        self.n_recoveries += 1;
        self.queue.push(at, Event::World(InWorld::Recovers(recovery)));
    }

    fn some_party(&mut self, i: usize) -> Party {
        let j = self.random.below(self.instances.len() as u64 + 1) as usize;
        if j == i || j == self.instances.len() {
            Party::Door
        } else {
            Party::Instance(j)
        }
    }

    /// A fault of a kind that this run has, now. What finds nobody is tried again with others.
    pub(super) fn inject_somewhere(&mut self) {
        for _ in 0..20 {
            let kind = self.random.pick(&self.settings.faults.clone());
            let i = self.random.below(self.instances.len() as u64) as usize;
            if self.inject(kind, i) {
                return;
            }
        }
    }

    /// Something has just happened to a request that a fault may follow soon.
    pub(super) fn aim(&mut self, request: usize) {
        if self.n_aimed_faults_left > 0 && self.now < self.settings.workload.span && self.random.percent(25) {
            self.n_aimed_faults_left -= 1;
            self.aim_soon(request);
        }
    }

    /// As [`Simulation::aim`], at what happens so seldom that it is not counted.
    pub(super) fn aim_often(&mut self, request: usize) {
        if self.now < self.settings.workload.span && self.random.percent(self.settings.aim_percent) {
            self.aim_soon(request);
        }
    }

    pub(super) fn aim_soon(&mut self, request: usize) {
        let most = self.random.pick(&[50_000, 1_000_000, 3 * self.settings.most_delay.0]);
        let after = self.random.below(most);
        let fault = Event::World(InWorld::AimedFault { request });
        self.queue.push(self.now.saturating_add(Nanos(after)), fault);
    }

    /// A fault of an instance that a request is on, or of its client.
    pub(super) fn inject_at(&mut self, request: usize) {
        let Some(driver) = self.door.drivers.get(&request) else {
            return;
        };
        let instances = driver.instances.clone();
        // Misfortunes come together.
        if self.random.percent(60) {
            self.aim_soon(request);
        }
        if self.random.percent(self.settings.client_percent) {
            if self.random.percent(50) {
                self.client_leaves(request);
            } else {
                self.deadline_passes(request);
            }
        } else if !instances.is_empty() {
            let (i, kind) = (
                self.random.pick(&instances),
                self.random.pick(&self.settings.faults.clone()),
            );
            self.inject(kind, i);
        }
    }

    pub(super) fn client_leaves(&mut self, request: usize) {
        if self.door.drivers.contains_key(&request) {
            self.n_injected += 1;
            self.feel(FaultKind::ClientLeaves, Scope::Request(request), Nanos::from_secs(3));
            self.tell_arbiter(request, ArbiterFact::ClientGone);
        }
    }

    pub(super) fn deadline_passes(&mut self, request: usize) {
        if self.door.drivers.contains_key(&request) {
            self.n_injected += 1;
            self.feel(FaultKind::DeadlinePasses, Scope::Request(request), Nanos::from_secs(3));
            self.tell_arbiter(request, ArbiterFact::DeadlinePassed);
        }
    }

    /// False when it finds nobody.
    fn inject(&mut self, kind: FaultKind, i: usize) -> bool {
        let most = self.random.pick(&[20, 500, 2500]);
        let lasts = Nanos::from_millis(self.random.between(5, most));
        let is_well = self.instances[i].is_up && self.instances[i].hung_until.is_none();
        self.trace(|| format!("FAULT {kind:?} of instance {i}, {:.3} s", lasts.as_secs_f64()));
        let id = self.instances[i].id.clone();
        let felt_for = lasts.saturating_add(AFTERMATH);
        match kind {
            FaultKind::InstanceDies if is_well => {
                self.feel(kind, Scope::Instance(i), felt_for);
                self.kill(i);
                self.recovers_in(lasts, Recovery::Restarts(i));
            }
            FaultKind::InstanceHangs if is_well => {
                self.feel(kind, Scope::Instance(i), felt_for);
                self.instances[i].hung_until = Some(self.now.saturating_add(lasts));
                if lasts > KEEPALIVE {
                    self.recovers_in(KEEPALIVE, Recovery::KeepaliveRunsOut(i));
                }
                self.recovers_in(lasts, Recovery::WakesUp(i));
            }
            FaultKind::LinkCut => {
                let (a, b) = (Party::Instance(i), self.some_party(i));
                self.feel(kind, Scope::Link(a, b), felt_for);
                self.cuts.push((a, b));
                self.cut(a, b);
                self.recovers_in(lasts, Recovery::LinkHeals(a, b));
            }
            FaultKind::LinkSlow => {
                let (a, b) = (Party::Instance(i), self.some_party(i));
                self.feel(kind, Scope::Link(a, b), felt_for);
                self.slow.push((a, b));
                self.recovers_in(lasts, Recovery::LinkIsQuick(a, b));
            }
            FaultKind::CallLost => {
                self.feel(kind, Scope::Everybody, felt_for);
                self.calls_lost_until = self.now.saturating_add(felt_for);
            }
            FaultKind::CallDoubled => {
                self.feel(kind, Scope::Everybody, felt_for);
                self.calls_doubled_until = self.now.saturating_add(felt_for);
            }
            FaultKind::Drain if self.door.view.instances().contains_key(&id) && self.door.others_generate(&id) => {
                self.feel(kind, Scope::Instance(i), felt_for);
                self.door.view.apply(ViewEvent::Draining(id, true));
                self.recovers_in(lasts, Recovery::Undrained(i));
            }
            FaultKind::RoleChanges if self.door.view.instances().contains_key(&id) => {
                let role = self.random.pick(&[Role::Prefill, Role::Decode, Role::Mixed]);
                if role == Role::Prefill && !self.door.others_generate(&id) {
                    return false;
                }
                self.feel(kind, Scope::Instance(i), felt_for);
                self.instances[i].role = role;
                let incarnation = self.door.view.instances()[&id].info.incarnation;
                self.door.view.apply(ViewEvent::RoleChanged(id, incarnation, role));
            }
            FaultKind::DoorDies if self.door.is_up => {
                self.feel(kind, Scope::Everybody, AFTERMATH);
                self.door_dies();
                self.recovers_in(Nanos::from_millis(300), Recovery::DoorRestarts);
            }
            // Those of requests are planned with them; the others have found nobody.
            _ => return false,
        }
        self.n_injected += 1;
        true
    }

    pub(super) fn recover(&mut self, recovery: Recovery) {
        self.n_recoveries -= 1;
        self.trace(|| format!("RECOVERY {recovery:?}"));
        match recovery {
            Recovery::Restarts(i) => {
                self.instances[i].incarnation += 1;
                self.instances[i].is_up = true;
                self.begin_membership(i);
                self.begin_reports(i);
            }
            Recovery::KeepaliveRunsOut(i) => {
                let is_hung = self.instances[i].is_up && self.instances[i].hung_until.is_some();
                if is_hung {
                    self.cut_all(i);
                }
            }
            Recovery::WakesUp(i) => {
                let instance = &mut self.instances[i];
                let was_hung = instance.hung_until.take().is_some();
                for event in std::mem::take(&mut instance.backlog) {
                    self.queue.push(self.now, event);
                }
                if was_hung && !self.instances[i].is_member && self.instances[i].is_up {
                    self.begin_membership(i);
                }
            }
            Recovery::LinkHeals(a, b) => {
                let at = self
                    .cuts
                    .iter()
                    .position(|cut| *cut == (a, b))
                    .expect("a cut heals once");
                self.cuts.remove(at);
                for party in [a, b] {
                    if let Party::Instance(i) = party {
                        let is_well = self.instances[i].is_up && self.instances[i].hung_until.is_none();
                        if is_well && !self.instances[i].is_member && self.passes(Party::Door, party) {
                            self.begin_membership(i);
                        }
                    }
                }
            }
            Recovery::LinkIsQuick(a, b) => {
                let at = self
                    .slow
                    .iter()
                    .position(|slow| *slow == (a, b))
                    .expect("a link is quick again once");
                self.slow.remove(at);
            }
            Recovery::Undrained(i) => {
                let id = self.instances[i].id.clone();
                self.door.view.apply(ViewEvent::Draining(id, false));
            }
            Recovery::DoorRestarts => {
                self.door.is_up = true;
                self.first_round();
                for i in 0..self.instances.len() {
                    self.instances[i].is_member = false;
                    let is_well = self.instances[i].is_up && self.instances[i].hung_until.is_none();
                    if is_well && self.passes(Party::Door, Party::Instance(i)) {
                        self.begin_membership(i);
                    }
                }
            }
        }
    }

    /// An instance's process ends, with all it held. What was on its way may still arrive.
    fn kill(&mut self, i: usize) {
        let life = self.instances[i].life(i);
        self.hear_of_death(life);
        let fresh = self.new_instance(i);
        let instance = &mut self.instances[i];
        let (incarnation, role) = (instance.incarnation, instance.role);
        *instance = fresh;
        (instance.incarnation, instance.role, instance.is_up) = (incarnation, role, false);
    }

    fn hear_of_death(&mut self, life: Life) {
        for number in 0..self.streams.len() {
            let stream = &self.streams[number];
            if stream.to != life || !stream.is_open_at_door || stream.is_cut {
                continue;
            }
            let (door, last_arrival) = (stream.door, stream.last_arrival);
            self.streams[number].is_cut = self.random.percent(50);
            let delay = self.delay(Party::Door, Party::Instance(life.instance));
            let at = self.now.saturating_add(delay).max(last_arrival);
            self.queue
                .push(at, Event::Door(door, AtDoor::Broken { stream: number }));
        }
        for transfer in 0..self.transfers.len() {
            let stream = &self.transfers[transfer];
            if stream.is_cut || !(stream.is_open_at_destination || stream.is_open_at_source) {
                continue;
            }
            let (from, to, last_arrival) = (stream.from, stream.to, stream.last_arrival);
            let delay = self.delay(Party::Instance(from.instance), Party::Instance(to.instance));
            let at = self.now.saturating_add(delay);
            if from == life {
                self.transfers[transfer].is_cut = self.random.percent(50);
                self.transfers[transfer].is_open_at_source = false;
                let reason = "reset";
                let broken = AtInstance::TransferBroken { transfer, reason };
                self.queue.push(at.max(last_arrival), Event::Instance(to, broken));
            } else if to == life {
                self.transfers[transfer].is_cut = true;
                self.transfers[transfer].is_open_at_destination = false;
                self.queue
                    .push(at, Event::Instance(from, AtInstance::TransferClosed { transfer }));
            }
        }
        self.end_membership(life.instance);
    }

    /// Both ends of everything between two parties notice, each in its time, that nothing passes.
    fn cut(&mut self, a: Party, b: Party) {
        for number in 0..self.streams.len() {
            let stream = &self.streams[number];
            let ends = [Party::Door, Party::Instance(stream.to.instance)];
            let (door, to) = (stream.door, stream.to);
            if stream.is_cut || !ends.contains(&a) || !ends.contains(&b) {
                continue;
            }
            self.streams[number].is_cut = true;
            let at = self.noticed_at();
            self.queue
                .push(at, Event::Door(door, AtDoor::Broken { stream: number }));
            let at = self.noticed_at();
            self.queue
                .push(at, Event::Instance(to, AtInstance::StreamClosed { stream: number }));
        }
        for transfer in 0..self.transfers.len() {
            let stream = &self.transfers[transfer];
            let (from, to) = (stream.from, stream.to);
            let ends = [Party::Instance(from.instance), Party::Instance(to.instance)];
            if stream.is_cut || !ends.contains(&a) || !ends.contains(&b) {
                continue;
            }
            self.transfers[transfer].is_cut = true;
            let (at, reason) = (self.noticed_at(), "keepalive");
            self.queue
                .push(at, Event::Instance(to, AtInstance::TransferBroken { transfer, reason }));
            let at = self.noticed_at();
            self.queue
                .push(at, Event::Instance(from, AtInstance::TransferClosed { transfer }));
        }
        if let (Party::Door, Party::Instance(i)) | (Party::Instance(i), Party::Door) = (a, b) {
            self.end_membership(i);
        }
    }

    fn cut_all(&mut self, i: usize) {
        for j in 0..self.instances.len() {
            if j != i {
                self.cut(Party::Instance(i), Party::Instance(j));
            }
        }
        self.cut(Party::Instance(i), Party::Door);
    }

    fn noticed_at(&mut self) -> Nanos {
        let after = self.random.below(KEEPALIVE.0);
        self.now.saturating_add(Nanos(after))
    }

    fn end_membership(&mut self, i: usize) {
        let life = self.instances[i].life(i);
        if std::mem::replace(&mut self.instances[i].is_member, false) {
            let delay = self.delay(Party::Door, Party::Instance(i));
            let at = self.now.saturating_add(delay).max(self.instances[i].report_arrival);
            self.instances[i].report_arrival = at;
            self.queue.push(at, Event::Door(self.door.life, AtDoor::Left { life }));
        }
    }

    pub(super) fn begin_membership(&mut self, i: usize) {
        let life = self.instances[i].life(i);
        self.instances[i].is_member = true;
        self.instances[i].has_to_tell_all = true;
        let delay = self.delay(Party::Door, Party::Instance(i));
        let at = self.now.saturating_add(delay).max(self.instances[i].report_arrival);
        self.instances[i].report_arrival = at;
        self.queue
            .push(at, Event::Door(self.door.life, AtDoor::Joined { life }));
    }

    pub(super) fn passes(&self, a: Party, b: Party) -> bool {
        !self.cuts.iter().any(|&cut| cut == (a, b) || cut == (b, a))
    }

    fn is_slow(&self, a: Party, b: Party) -> bool {
        self.slow.iter().any(|&slow| slow == (a, b) || slow == (b, a))
    }

    pub(super) fn delay(&mut self, a: Party, b: Party) -> Nanos {
        let quick = self.random.between(50_000, self.settings.most_delay.0);
        Nanos(if self.is_slow(a, b) { 20 * quick } else { quick })
    }

    /// Of one unit of a frame.
    pub(super) fn unit_time(&self, a: Party, b: Party) -> Nanos {
        let quick = self.settings.unit_time.0;
        Nanos(if self.is_slow(a, b) { 20 * quick } else { quick })
    }

    pub(super) fn loses_call(&mut self) -> bool {
        self.now < self.calls_lost_until && self.random.percent(80)
    }

    pub(super) fn doubles_call(&mut self) -> bool {
        self.now < self.calls_doubled_until && self.random.percent(50)
    }
}
