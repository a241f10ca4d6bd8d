//! The front door: the production view, policy and rebalancer, and a driver for each request around its arbiter.

mod hearing;
mod rounds;

use std::collections::{BTreeMap, VecDeque};

use super::coverage::{Transition, arbiter_fact};
use super::network::{Asked, AtDoor, AtInstance, Call, Event, EventStream, InWorld, Life, Party};
use super::{Outcome, Simulation};
use crate::arbiter::{Arbiter, ArbiterAction, ArbiterFact};
use crate::ids::{Epoch, InstanceId, Nanos, Role};
use crate::placement::{
    ClusterView, OpenPlacement, Placement, PlacementRequest, Policy, RequestObjectives, ViewEvent, min_protocol_version,
};
use crate::prefix_cache::PrefixHasher;
use crate::rebalance::Rebalancer;
use crate::request::{ChoiceState, PortableState};

const PAUSE_BEFORE_LAST_ATTEMPTS: Nanos = Nanos::from_millis(300);
const ROUND: Nanos = Nanos::from_millis(50);
const MAX_MOVES_OF_INSTANCE: usize = 4;
/// A request whose move failed is not asked to leave a drained instance for this long.
const PAUSE_AFTER_FAILED_MOVE: Nanos = Nanos::from_millis(200);

pub(super) struct Door {
    pub(super) life: u64,
    pub(super) is_up: bool,
    pub(super) view: ClusterView,
    policy: Box<dyn Policy>,
    rebalancer: Option<Rebalancer>,
    pub(super) drivers: BTreeMap<usize, Driver>,
    /// First placements wait in turn.
    waiting: VecDeque<usize>,
    /// Lives of the members.
    members: BTreeMap<InstanceId, Life>,
    pauses: BTreeMap<usize, Nanos>,
}

pub(super) struct Driver {
    pub(super) arbiter: Arbiter,
    choices: Vec<ChoiceState>,
    /// Which placement is wanted, while one is.
    placing: Option<u32>,
    n_placings: u32,
    /// When the wait for a place is over, refusals included.
    place_by: Nanos,
    may_place_at: Nanos,
    placed: Option<Placement>,
    opening: Option<usize>,
    pub(super) speaking: Option<usize>,
    attaching: Option<usize>,
    pub(super) attached: Option<usize>,
    resuming: Option<Epoch>,
    /// Where it is being moved, and whether the rebalancer wants to know.
    order: Option<(InstanceId, bool)>,
    prefilled_in: Option<Epoch>,
    tick_at: Option<Nanos>,
    /// Instances that its latest streams went to.
    pub(super) instances: Vec<usize>,
}

impl Door {
    pub(super) fn new(life: u64, policy: Box<dyn Policy>, rebalancer: Option<Rebalancer>) -> Door {
        Door {
            life,
            is_up: true,
            view: ClusterView::new(),
            policy,
            rebalancer,
            drivers: BTreeMap::new(),
            waiting: VecDeque::new(),
            members: BTreeMap::new(),
            pauses: BTreeMap::new(),
        }
    }

    /// Whether nothing is open or counted any more.
    pub(super) fn is_idle(&self) -> bool {
        self.drivers.is_empty() && self.view.open_placements().is_empty() && self.view.moves().is_empty()
    }

    /// Whether something other than `id` generates.
    pub(super) fn others_generate(&self, id: &InstanceId) -> bool {
        let mut instances = self.view.instances().values();
        instances.any(|state| state.info.id != *id && state.info.role != Role::Prefill && !state.is_draining())
    }
}

impl Simulation<'_> {
    pub(super) fn door_accepts(&mut self, request: usize) {
        let planned = &self.planned[request];
        let n = planned.request.sampling.n;
        if !self.door.is_up {
            return self.ends(request, Outcome::NotAccepted);
        }
        if let Some(after) = planned.leaves_after {
            let event = Event::World(InWorld::ClientLeaves { request });
            self.queue.push(self.now.saturating_add(after), event);
        }
        if let Some(after) = planned.deadline {
            let event = Event::Door(self.door.life, AtDoor::DeadlinePasses { request });
            self.queue.push(self.now.saturating_add(after), event);
        }
        let driver = Driver {
            arbiter: Arbiter::new(n, self.settings.move_deadline),
            choices: vec![ChoiceState::default(); n as usize],
            placing: None,
            n_placings: 0,
            place_by: self.now,
            may_place_at: self.now,
            placed: None,
            opening: None,
            speaking: None,
            attaching: None,
            attached: None,
            resuming: None,
            order: None,
            prefilled_in: None,
            tick_at: None,
            instances: Vec::new(),
        };
        self.door.drivers.insert(request, driver);
        self.door.waiting.push_back(request);
        self.begin_placing(request, self.now);
        self.place_waiting();
    }

    fn begin_placing(&mut self, request: usize, may_place_at: Nanos) {
        let life = self.door.life;
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        driver.n_placings += 1;
        driver.placing = Some(driver.n_placings);
        driver.may_place_at = may_place_at;
        if !driver.arbiter.was_refused() {
            driver.place_by = self.now.saturating_add(self.settings.queue_wait);
        }
        let (placing, place_by) = (driver.n_placings, driver.place_by.max(self.now));
        self.queue
            .push(place_by, Event::Door(life, AtDoor::QueueWait { request, placing }));
        if may_place_at > self.now {
            self.queue
                .push(may_place_at, Event::Door(life, AtDoor::TryAgain { request, placing }));
        }
    }

    /// Requests that are placed again have waited for their turn before; the others keep theirs.
    fn place_waiting(&mut self) {
        let now = self.now;
        let again = self.door.drivers.iter().filter(|(request, driver)| {
            driver.placing.is_some() && now >= driver.may_place_at && !self.door.waiting.contains(request)
        });
        for request in Vec::from_iter(again.map(|(&request, _)| request)) {
            self.try_place(request);
        }
        while let Some(&request) = self.door.waiting.front() {
            let is_placing = self
                .door
                .drivers
                .get(&request)
                .is_some_and(|driver| driver.placing.is_some());
            if is_placing && !self.try_place(request) {
                break;
            }
            self.door.waiting.retain(|other| *other != request);
        }
    }

    fn try_place(&mut self, request: usize) -> bool {
        let planned = &self.planned[request].request;
        let door = &mut self.door;
        let driver = &door.drivers[&request];
        let mut tokens = planned.prompt_ids.to_vec();
        if let Some(first) = driver.choices.iter().find(|choice| choice.finish.is_none()) {
            tokens.extend(first.output.iter().map(|token| token.id));
        }
        let is_fresh = driver.choices.iter().all(|choice| choice.output.is_empty());
        let hasher = PrefixHasher::new(self.settings.fingerprint, self.settings.block_size);
        let prefix_keys = hasher.keys(planned.cache_salt, &tokens);
        let asked = PlacementRequest {
            request: planned,
            prefix_keys: &prefix_keys,
            n_tokens: tokens.len() as u32,
            avoided: driver.arbiter.avoided(),
            needs_version: min_protocol_version(&planned.sampling),
            may_hand_over: driver.choices.len() == 1 || is_fresh,
            objectives: RequestObjectives::default(),
        };
        let Some(placement) = door.policy.place(self.now, asked, &door.view) else {
            return false;
        };
        let n_cached = door.view.n_cached_tokens(
            placement.prefill.as_ref().unwrap_or(&placement.decode),
            &prefix_keys,
            asked.n_tokens,
        );
        let open = OpenPlacement {
            placement: placement.clone(),
            n_blocks: asked.n_blocks(&door.view.instances()[&placement.decode].info),
            n_choices: asked.n_choices(),
            n_prefill_tokens: asked.n_tokens - n_cached,
            prefix_keys,
        };
        let id = planned.id;
        door.view.apply(ViewEvent::Placed(id, open));
        let driver = door.drivers.get_mut(&request).expect("an open request");
        driver.placing = None;
        driver.placed = Some(placement);
        self.tell_arbiter(request, ArbiterFact::Placed);
        true
    }

    pub(super) fn tell_arbiter(&mut self, request: usize, fact: ArbiterFact) {
        if !self.door.drivers.contains_key(&request) {
            return;
        }
        for action in self.apply_counted(request, fact) {
            self.obey(request, action);
        }
        self.set_tick(request);
    }

    /// What the arbiter of an open request says to a fact; the transition is counted and traced.
    fn apply_counted(&mut self, request: usize, fact: ArbiterFact) -> Vec<ArbiterAction> {
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        let transition = Transition {
            machine: "arbiter",
            stage: driver.arbiter.stage(),
            fact: arbiter_fact(&fact),
        };
        let subject = fact.clone();
        let actions = driver.arbiter.apply(self.now, fact);
        let mut parties = vec![Party::Door];
        parties.extend(driver.instances.iter().map(|&i| Party::Instance(i)));
        self.count(transition, request, &parties);
        self.trace(|| format!("front door, request {request}: {transition} {subject:?} -> {actions:?}"));
        actions
    }

    fn set_tick(&mut self, request: usize) {
        let life = self.door.life;
        let Some(driver) = self.door.drivers.get_mut(&request) else {
            return;
        };
        let due = driver.arbiter.next_tick();
        if let Some(at) = due.filter(|_| due != driver.tick_at) {
            driver.tick_at = due;
            self.queue.push(at, Event::Door(life, AtDoor::ArbiterTick { request }));
        }
    }

    fn obey(&mut self, request: usize, action: ArbiterAction) {
        let id = self.planned[request].request.id;
        let now = self.now;
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        match action {
            ArbiterAction::Place => {
                let is_last = driver.arbiter.n_attempts() > 1;
                let at = if is_last {
                    now.saturating_add(PAUSE_BEFORE_LAST_ATTEMPTS)
                } else {
                    now
                };
                self.begin_placing(request, at);
                // Not at once: what has just failed may be about to be known to have gone.
                let placing = self.door.drivers[&request].n_placings;
                let again = AtDoor::TryAgain { request, placing };
                self.queue
                    .push(at.saturating_add(Nanos(1000)), Event::Door(self.door.life, again));
            }
            ArbiterAction::Open(epoch) => {
                let placement = driver.placed.take().expect("the arbiter opens what was placed");
                let decode = self.door.members.get(&placement.decode).copied();
                let prefill = placement.prefill.and_then(|id| self.door.members.get(&id).copied());
                let decode = decode.expect("the policy chooses members");
                let stream = self.call(request, epoch, decode, Asked::Generate { prefill });
                let driver = self.door.drivers.get_mut(&request).expect("an open request");
                driver.opening = Some(stream);
                driver.instances.extend(prefill.map(|life| life.instance));
            }
            ArbiterAction::Close => {
                let stream = driver.speaking.take().or(driver.opening.take());
                driver.resuming = None;
                self.hang_up(stream);
                self.door.view.apply(ViewEvent::Closed(id));
            }
            ArbiterAction::Attach(epoch) => {
                let (to, _) = driver.order.as_ref().expect("a move was ordered");
                let to = self.door.members[to];
                let source = driver.speaking.map(|stream| self.streams[stream].to);
                let source = source.expect("a request moves from where it speaks");
                let stream = self.call(request, epoch, to, Asked::Attach { source });
                self.door.drivers.get_mut(&request).expect("an open request").attaching = Some(stream);
            }
            ArbiterAction::Detach => {
                let stream = driver.attached.take().or(driver.attaching.take());
                self.hang_up(stream);
                self.door.view.apply(ViewEvent::MoveEnded(id));
                self.move_over(request, false);
            }
            ArbiterAction::Settle => {
                let source = driver.speaking.take();
                driver.speaking = driver.attached.take();
                driver.resuming = None;
                assert!(driver.speaking.is_some(), "a move settled on no stream");
                driver.prefilled_in = Some(driver.arbiter.epoch());
                if let Some((to, _)) = &driver.order {
                    self.door.view.apply(ViewEvent::Moved(id, to.clone()));
                }
                self.hang_up(source);
                self.n_moves += 1;
                self.move_over(request, true);
            }
            ArbiterAction::RefuseMove(_) => {
                if driver.order.is_some() {
                    self.door.view.apply(ViewEvent::MoveEnded(id));
                    self.move_over(request, false);
                }
            }
            ArbiterAction::Resume(epoch) => {
                driver.resuming = Some(epoch);
                let source = driver.speaking.map(|stream| self.streams[stream].to);
                let to = source.expect("a source that can resume has its stream");
                self.call_resume(request, to, epoch);
                self.aim_often(request);
                if self.random.percent(self.settings.again_percent) {
                    let most = self.settings.most_delay.0;
                    let most = self.random.pick(&[most / 20, most / 4, 2 * most]);
                    let after = self.random.below(most);
                    let again = Event::World(InWorld::MoveAgain { request });
                    self.queue.push(self.now.saturating_add(Nanos(after)), again);
                }
            }
            ArbiterAction::Deliver | ArbiterAction::Discard => unreachable!("tokens are applied as they come"),
            ArbiterAction::Finish(finish) => self.door_ends(request, Outcome::Finished(finish)),
            ArbiterAction::Fail(failure) => self.door_ends(request, Outcome::Failed(failure)),
        }
    }

    fn move_over(&mut self, request: usize, has_moved: bool) {
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        let Some((_, is_advice)) = driver.order.take() else {
            return;
        };
        if !has_moved {
            let until = self.now.saturating_add(PAUSE_AFTER_FAILED_MOVE);
            self.door.pauses.insert(request, until);
        }
        let id = self.planned[request].request.id;
        if let (Some(rebalancer), true) = (&mut self.door.rebalancer, is_advice) {
            rebalancer.ended(self.now, id, has_moved);
        }
    }

    fn door_ends(&mut self, request: usize, outcome: Outcome) {
        let driver = self.door.drivers.remove(&request).expect("an open request");
        let streams = [driver.opening, driver.speaking, driver.attaching, driver.attached];
        assert!(
            streams
                .iter()
                .flatten()
                .all(|&stream| !self.streams[stream].is_open_at_door),
            "request {request} ended with a stream open"
        );
        self.door.waiting.retain(|other| *other != request);
        self.door
            .view
            .apply(ViewEvent::Closed(self.planned[request].request.id));
        self.ends(request, outcome);
        self.place_waiting();
    }

    /// A call that opens a stream.
    fn call(&mut self, request: usize, epoch: Epoch, to: Life, asked: Asked) -> usize {
        let door = self.door.life;
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        if driver.instances.len() > 3 {
            driver.instances.remove(0);
        }
        driver.instances.push(to.instance);
        let stream = self.streams.len();
        self.streams.push(EventStream {
            request,
            door,
            to,
            asked,
            state: PortableState {
                request: self.planned[request].request.clone(),
                choices: driver.choices.clone(),
                epoch,
            },
            is_open_at_door: true,
            is_cut: false,
            last_arrival: Nanos::ZERO,
        });
        let delay = self.delay(Party::Door, Party::Instance(to.instance));
        let at = self.now.saturating_add(delay);
        let mut wait = self.settings.call_timeout;
        if !self.passes(Party::Door, Party::Instance(to.instance)) {
        } else if self.instances[to.instance].is_up {
            self.queue.push(at, Event::Call(to.instance, Call::Open { stream }));
        } else {
            wait = delay;
        }
        let none = Event::Door(door, AtDoor::NoAnswer { stream });
        self.queue.push(self.now.saturating_add(wait), none);
        stream
    }

    /// The front door closes a stream.
    pub(super) fn hang_up(&mut self, stream: Option<usize>) {
        let Some(stream) = stream else { return };
        let EventStream { to, is_cut, .. } = self.streams[stream];
        if std::mem::replace(&mut self.streams[stream].is_open_at_door, false) && !is_cut {
            let delay = self.delay(Party::Door, Party::Instance(to.instance));
            let at = self.now.saturating_add(delay);
            self.queue
                .push(at, Event::Instance(to, AtInstance::StreamClosed { stream }));
        }
    }

    fn call_resume(&mut self, request: usize, to: Life, epoch: Epoch) {
        let door = self.door.life;
        let (is_lost, is_doubled) = (self.loses_call(), self.doubles_call());
        let call = |is_answered| Call::Resume {
            door,
            request,
            to,
            epoch,
            is_answered,
        };
        let delay = self.delay(Party::Door, Party::Instance(to.instance));
        let at = self.now.saturating_add(delay);
        if self.passes(Party::Door, Party::Instance(to.instance)) {
            // What is lost is the call, or only its answer.
            if !is_lost || self.random.percent(70) {
                self.queue.push(at, Event::Call(to.instance, call(!is_lost)));
            }
            if is_doubled {
                let late = Nanos::from_millis(self.random.between(1, 3000));
                self.queue
                    .push(at.saturating_add(late), Event::Call(to.instance, call(false)));
            }
        }
        let none = AtDoor::ResumeAnswered {
            request,
            epoch,
            is_told: false,
        };
        self.queue.push(
            self.now.saturating_add(self.settings.call_timeout),
            Event::Door(door, none),
        );
    }

    pub(super) fn door_dies(&mut self) {
        let drivers = std::mem::take(&mut self.door.drivers);
        for (request, driver) in drivers {
            let streams = [driver.opening, driver.speaking, driver.attaching, driver.attached];
            streams.into_iter().for_each(|stream| self.hang_up(stream));
            self.ends(request, Outcome::DoorDied);
        }
        let life = self.door.life + 1;
        self.door = self.new_door(life);
        self.door.is_up = false;
    }
}
