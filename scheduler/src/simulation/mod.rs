//! A whole cluster in one event loop: the production policies, view, rebalancer, batch schedulers, block pools, arbiter and
//! transfer machines, with simulated drivers, links, clocks and memory, seeded, with faults.
//!
//! After every event the invariants of the engine hold or the run panics: each accepted request ends exactly once; its
//! tokens come once, in order, and are those of an undisturbed run; ledgers balance, and are whole when an instance is
//! idle; nothing is written or read after it was reused; no message is taken by another incarnation than the one it was
//! meant for. When the faults have ceased, everything ends within a bound.
//!
//! Equal seeds give equal runs. It computes no real tokens: a token is a hash of everything before it, read from the
//! simulated KV memory, so that any mix-up shows.

mod coverage;
mod door;
mod engine;
mod faults;
mod instance;
mod memory;
mod mover;
mod network;
mod prefill;
mod queue;
mod random;
mod reachable;
mod settings;
mod task;
#[cfg(test)]
mod tests;
mod workload;

pub use coverage::{Coverage, FaultKind, Transition};
pub use reachable::{every_transition, never, never_with, rare};

use crate::ids::{Incarnation, Nanos, RequestId, TokenId};
use crate::placement::{InstanceInfo, InstanceLoad};
use crate::request::{Failure, Finish, Token};
use crate::transfer::RefusedFrame;
use door::Door;
use faults::Felt;
use instance::Instance;
use network::{AtDoor, AtInstance, Call, Event, EventStream, InWorld, Life, Party, Report, TransferStream};
use queue::Queue;
use random::Random;
use settings::Settings;
use workload::Planned;

/// How often an instance reports.
const REPORT: Nanos = Nanos::from_millis(100);
/// After the last arrival and the last fault, everything has ended within this time.
const MOST_TO_THE_END: Nanos = Nanos::from_secs(60);

/// Takes the lines of a trace: virtual time, and what happened.
pub type Trace<'a> = &'a mut dyn FnMut(Nanos, String);

/// What a run came to, when all was well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunReport {
    /// Requests.
    pub n_requests: u64,
    /// Requests that ended with all their tokens.
    pub n_finished: u64,
    /// Requests that ended badly, for a reason that is somebody's right: cancelled, too late, refused or given up.
    pub n_failed: u64,
    /// Faults injected.
    pub n_faults: u64,
    /// Events.
    pub n_events: u64,
    /// Moves that settled.
    pub n_moves: u64,
    /// Moves the rebalancer proposed.
    pub n_proposals: u64,
    /// Words of instances that counted no more.
    pub n_discarded: u64,
    /// Reads that found their block reused.
    pub n_stale_reads: u64,
    /// Placements beyond the first of each request, and preemptions.
    pub n_recomputed: u64,
    /// Virtual time.
    pub lasted: Nanos,
    /// What happened together with what.
    pub coverage: Coverage,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Finished(Finish),
    Failed(Failure),
    DoorDied,
    NotAccepted,
}

/// What a client has.
#[derive(Clone, Debug, Default)]
struct Client {
    choices: Vec<(Vec<TokenId>, Option<Finish>)>,
    outcome: Option<Outcome>,
}

struct Simulation<'a> {
    now: Nanos,
    queue: Queue,
    random: Random,
    settings: Settings,
    planned: Vec<Planned>,
    clients: Vec<Client>,
    n_open: usize,
    door: Door,
    instances: Vec<Instance>,
    streams: Vec<EventStream>,
    transfers: Vec<TransferStream>,
    felt: Vec<Felt>,
    /// Until when any fault is felt by anybody.
    last_felt: Nanos,
    cuts: Vec<(Party, Party)>,
    slow: Vec<(Party, Party)>,
    calls_lost_until: Nanos,
    calls_doubled_until: Nanos,
    n_recoveries: usize,
    n_faults_left: usize,
    n_aimed_faults_left: usize,
    n_injected: u64,
    next_id: u64,
    n_moves: u64,
    n_proposals: u64,
    n_discarded: u64,
    n_stale_reads: u64,
    coverage: Coverage,
    trace: Option<Trace<'a>>,
}

/// Runs one seed.
///
/// # Panics
/// When an invariant does not hold.
pub fn run(seed: u64, trace: Option<Trace<'_>>) -> RunReport {
    let mut simulation = Simulation::new(seed, trace);
    let mut n_events = 0;
    let settings = &simulation.settings;
    let most = settings.workload.span.saturating_add(MOST_TO_THE_END);
    while let Some((at, event)) = simulation.queue.pop() {
        simulation.now = at;
        n_events += 1;
        assert!(
            at < most,
            "after {:.1} s not everything has ended:{}",
            at.as_secs_f64(),
            simulation.left_over()
        );
        simulation.happen(event);
    }
    simulation.check_end();
    let count = |is_it: fn(&Outcome) -> bool| {
        let outcomes = simulation.clients.iter().filter_map(|client| client.outcome.as_ref());
        outcomes.filter(|outcome| is_it(outcome)).count() as u64
    };
    let counters = simulation
        .instances
        .iter()
        .map(|instance| instance.engine.scheduler.counters());
    RunReport {
        n_requests: simulation.planned.len() as u64,
        n_finished: count(|outcome| matches!(outcome, Outcome::Finished(_))),
        n_failed: count(|outcome| !matches!(outcome, Outcome::Finished(_))),
        n_faults: simulation.n_injected,
        n_events,
        n_moves: simulation.n_moves,
        n_proposals: simulation.n_proposals,
        n_discarded: simulation.n_discarded,
        n_stale_reads: simulation.n_stale_reads,
        n_recomputed: counters.map(|counters| counters.n_preemptions).sum(),
        lasted: simulation.now,
        coverage: simulation.coverage,
    }
}

impl<'a> Simulation<'a> {
    fn new(seed: u64, trace: Option<Trace<'a>>) -> Simulation<'a> {
        let mut random = Random::new(seed);
        let settings = Settings::draw(&mut random);
        let planned = workload::plan(&mut random, settings.workload);
        let clients = planned.iter().map(|planned| Client {
            choices: vec![Default::default(); planned.expected.len()],
            outcome: None,
        });
        let mut simulation = Simulation {
            now: Nanos::ZERO,
            queue: Queue::default(),
            clients: clients.collect(),
            n_open: planned.len(),
            door: settings.new_door(0),
            instances: (0..settings.roles.len()).map(|i| settings.new_instance(i)).collect(),
            streams: Vec::new(),
            transfers: Vec::new(),
            felt: Vec::new(),
            last_felt: Nanos::ZERO,
            cuts: Vec::new(),
            slow: Vec::new(),
            calls_lost_until: Nanos::ZERO,
            calls_doubled_until: Nanos::ZERO,
            n_recoveries: 0,
            n_faults_left: settings.n_faults,
            n_aimed_faults_left: settings.n_aimed_faults,
            n_injected: 0,
            next_id: 0,
            n_moves: 0,
            n_proposals: 0,
            n_discarded: 0,
            n_stale_reads: 0,
            coverage: Coverage::default(),
            trace,
            planned,
            settings,
            random,
        };
        simulation.begin();
        simulation
    }

    fn begin(&mut self) {
        for i in 0..self.instances.len() {
            self.begin_membership(i);
            self.begin_reports(i);
        }
        for (request, planned) in self.planned.iter().enumerate() {
            self.queue.push(planned.at, Event::World(InWorld::Arrives { request }));
        }
        for _ in 0..self.settings.n_faults {
            let at = Nanos(self.random.below(self.settings.workload.span.0));
            self.queue.push(at, Event::World(InWorld::Fault));
        }
        self.queue
            .push(self.settings.between_moves, Event::World(InWorld::Operator));
        self.first_round();
    }

    fn new_door(&self, life: u64) -> Door {
        self.settings.new_door(life)
    }

    fn new_instance(&self, i: usize) -> Instance {
        self.settings.new_instance(i)
    }

    fn happen(&mut self, event: Event) {
        // Whoever hangs takes nothing until it wakes.
        let hung = match &event {
            Event::Instance(life, _) => Some(life.instance),
            Event::Call(i, _) => Some(*i),
            Event::Door(..) | Event::World(_) => None,
        };
        if let Some(i) = hung.filter(|&i| self.instances[i].hung_until.is_some()) {
            self.instances[i].backlog.push_back(event);
            return;
        }
        match event {
            Event::Door(life, event) => {
                if life == self.door.life && self.door.is_up {
                    self.at_door(event);
                }
            }
            Event::Call(i, call) => self.called(i, call),
            Event::Instance(life, event) => {
                let instance = &self.instances[life.instance];
                if instance.is_up && instance.incarnation == life.incarnation {
                    self.at_instance(life.instance, event);
                }
            }
            Event::World(event) => self.in_world(event),
        }
    }

    fn in_world(&mut self, event: InWorld) {
        match event {
            InWorld::Arrives { request } => self.door_accepts(request),
            InWorld::ClientLeaves { request } => self.client_leaves(request),
            InWorld::Fault => {
                self.n_faults_left -= 1;
                self.inject_somewhere();
            }
            InWorld::AimedFault { request } => self.inject_at(request),
            InWorld::MoveAgain { request } => {
                let i = self.random.below(self.instances.len() as u64) as usize;
                let to = self.instances[i].id.clone();
                if self.order_move(request, Some(to), false) {
                    // What comes late of the move before is what this is about.
                    self.aim_often(request);
                }
            }
            InWorld::Recovers(recovery) => self.recover(recovery),
            InWorld::Operator => {
                let generating = self.generating();
                if !generating.is_empty() && self.door.is_up {
                    let (request, _) = self.random.pick(&generating);
                    let i = self.random.below(self.instances.len() as u64) as usize;
                    let to = self.random.percent(70).then(|| self.instances[i].id.clone());
                    self.order_move(request, to, false);
                }
                if !self.is_over() {
                    let at = self.now.saturating_add(self.settings.between_moves);
                    self.queue.push(at, Event::World(InWorld::Operator));
                }
            }
        }
    }

    fn called(&mut self, i: usize, call: Call) {
        match call {
            Call::Open { stream } => {
                if !self.streams[stream].is_cut {
                    self.serve_call(i, stream);
                }
            }
            Call::Transfer { transfer } => self.serve_transfer(i, transfer),
            Call::Resume {
                door,
                request,
                to,
                epoch,
                is_answered,
            } => {
                if !self.passes(Party::Door, Party::Instance(i)) || !self.instances[i].is_up {
                    return;
                }
                self.serve_resume(i, to, request, epoch);
                if is_answered {
                    let delay = self.delay(Party::Door, Party::Instance(i));
                    let at = self.now.saturating_add(delay);
                    let answer = AtDoor::ResumeAnswered {
                        request,
                        epoch,
                        is_told: true,
                    };
                    self.queue.push(at, Event::Door(door, answer));
                }
            }
        }
    }

    fn at_instance(&mut self, i: usize, event: AtInstance) {
        match event {
            AtInstance::Round => self.engine_round(i),
            AtInstance::StepDone => self.step_done(i),
            AtInstance::StreamClosed { stream } => self.stream_closed(i, stream),
            AtInstance::Frame { transfer, frame } => self.frame_arrives(i, transfer, frame),
            AtInstance::TransferBroken { transfer, reason } => self.transfer_broken(i, transfer, reason),
            AtInstance::TransferClosed { transfer } => {
                self.mover_dropped(i, transfer);
                self.prefill_dropped(i, transfer);
            }
            AtInstance::Taken { transfer } => self.taken(i, transfer),
            AtInstance::TaskTimer { task } => self.task_timer(i, task),
            AtInstance::Heartbeat { transfer } => self.heartbeat(i, transfer),
            AtInstance::MoverDeadline { transfer } => self.mover_deadline(i, transfer),
            AtInstance::MoverWord { transfer, epoch } => self.mover_word(i, transfer, epoch),
            AtInstance::Report => self.report(i),
        }
    }

    fn begin_reports(&mut self, i: usize) {
        let life = self.instances[i].life(i);
        self.queue.push(
            self.now.saturating_add(REPORT),
            Event::Instance(life, AtInstance::Report),
        );
    }

    fn report(&mut self, i: usize) {
        if !self.is_over() {
            self.begin_reports(i);
        }
        if !self.instances[i].is_member {
            return;
        }
        let life = self.instances[i].life(i);
        let instance = &mut self.instances[i];
        let engine = &mut instance.engine;
        let load = engine.scheduler.load();
        let changes = engine.scheduler.take_prefix_events();
        let prefix = match std::mem::take(&mut instance.has_to_tell_all) {
            true => engine.scheduler.prefix_snapshot(),
            false => changes,
        };
        let load = InstanceLoad {
            n_running: load.n_running as u32,
            n_waiting: load.n_waiting as u32,
            n_blocks_free: load.ledger.free as u32,
            n_blocks_cached: load.ledger.cached as u32,
            n_prefill_tokens_pending: load.n_pending_prefill_tokens as u64,
            healthy: true,
            step_samples: std::mem::take(&mut engine.samples),
        };
        let delay = self.delay(Party::Door, Party::Instance(i));
        let at = self.now.saturating_add(delay).max(self.instances[i].report_arrival);
        self.instances[i].report_arrival = at;
        let report = Box::new(Report { load, prefix });
        self.queue
            .push(at, Event::Door(self.door.life, AtDoor::Report { life, report }));
    }

    fn instance_info(&self, life: Life) -> InstanceInfo {
        let instance = &self.instances[life.instance];
        let config = instance.engine.scheduler.config();
        InstanceInfo {
            id: instance.id.clone(),
            incarnation: Incarnation(life.incarnation),
            protocol_version: 2,
            role: instance.role,
            fingerprint: self.settings.fingerprint,
            numerics_class: instance.numerics_class.to_owned(),
            block_size: self.settings.block_size as u32,
            n_blocks_total: config.n_blocks as u32,
            max_num_seqs: self.settings.max_num_seqs as u32,
            max_model_len: self.settings.workload.max_model_len as u32,
            short_context: None,
            kv_bytes_per_token: 1024,
            most_blocks: (0..config.n_groups())
                .map(|layer_group| config.most_blocks(layer_group).map(|most| most as u32))
                .collect(),
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn number_of(&self, id: RequestId) -> usize {
        (id.0 - 1) as usize
    }

    fn count(&mut self, transition: Transition, request: usize, parties: &[Party]) {
        let felt = self.felt_by(request, parties);
        self.coverage.count(transition, &felt);
    }

    fn trace(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace(self.now, line());
        }
    }

    fn note_refused(&mut self, why: RefusedFrame) {
        assert_ne!(
            why,
            RefusedFrame::OutOfOrder,
            "a frame came out of order on an ordered stream"
        );
    }

    fn client_takes_token(&mut self, request: usize, choice: u32, token: &Token) {
        let client = &mut self.clients[request];
        let (tokens, finish) = &mut client.choices[choice as usize];
        let expected = &self.planned[request].expected[choice as usize].0;
        let index = tokens.len();
        assert_eq!(
            token.index as usize, index,
            "request {request}, choice {choice}: a token out of order"
        );
        assert!(
            client.outcome.is_none() && finish.is_none(),
            "request {request}: a token after the end"
        );
        assert_eq!(
            Some(&token.id),
            expected.get(index),
            "request {request}, choice {choice}: token {index} is not that of an undisturbed run"
        );
        tokens.push(token.id);
    }

    fn client_takes_finish(&mut self, request: usize, choice: u32, finish: Finish) {
        let (tokens, own) = &mut self.clients[request].choices[choice as usize];
        let (expected, expected_finish) = &self.planned[request].expected[choice as usize];
        assert_eq!(
            tokens, expected,
            "request {request}, choice {choice} ended with other tokens"
        );
        assert_eq!(finish, *expected_finish, "request {request}, choice {choice}");
        assert!(
            own.replace(finish).is_none(),
            "request {request}, choice {choice} ended twice"
        );
    }

    /// A request's terminal state.
    fn ends(&mut self, request: usize, outcome: Outcome) {
        let client = &mut self.clients[request];
        match &outcome {
            Outcome::Finished(_) => assert!(
                client.choices.iter().all(|(_, finish)| finish.is_some()),
                "request {request} ended well before all its choices"
            ),
            Outcome::Failed(failure @ (Failure::Internal(_) | Failure::Invalid(_) | Failure::Incompatible(_))) => {
                panic!("request {request} failed as only a bug can make it fail: {failure}")
            }
            Outcome::Failed(Failure::InstanceLost(message)) => assert!(
                self.last_felt >= self.planned[request].at,
                "request {request} was lost without a fault: {message}"
            ),
            _ => {}
        }
        let before = client.outcome.replace(outcome);
        assert!(before.is_none(), "request {request} ended twice");
        self.n_open -= 1;
    }

    fn is_over(&self) -> bool {
        self.n_open == 0
            && self.n_recoveries == 0
            && self.n_faults_left == 0
            && self.instances.iter().all(Instance::is_idle)
    }

    /// The invariants of an instance.
    fn check_instance(&self, i: usize) {
        let instance = &self.instances[i];
        let scheduler = &instance.engine.scheduler;
        assert!(scheduler.ledger().is_balanced(), "{:?}", scheduler.ledger());
        scheduler.check();
        if instance.is_idle() {
            let ledger = scheduler.ledger();
            assert_eq!((ledger.held, ledger.reserved), (0, 0), "an idle instance holds blocks");
            assert_eq!(instance.engine.memory.n_pins(), 0, "an idle instance pins blocks");
        }
    }

    fn check_end(&self) {
        for (request, client) in self.clients.iter().enumerate() {
            assert!(client.outcome.is_some(), "request {request} has not ended");
        }
        assert!(self.door.is_idle(), "the front door counts requests that have ended");
        for (i, instance) in self.instances.iter().enumerate() {
            assert!(instance.is_idle(), "instance {i} is not idle:{}", self.left_over());
            self.check_instance(i);
            assert_eq!(instance.engine.memory.n_pins(), 0, "instance {i} pins blocks");
        }
    }

    /// Who still waits, for a message.
    fn left_over(&self) -> String {
        let mut lines = String::new();
        for (request, driver) in &self.door.drivers {
            lines += &format!("\nrequest {request}: {:?}", driver.arbiter);
        }
        for (i, instance) in self
            .instances
            .iter()
            .enumerate()
            .filter(|(_, instance)| !instance.is_idle())
        {
            lines += &format!(
                "\ninstance {i}: {} tasks, {} movers, {} prefills, load {:?}",
                instance.tasks.len(),
                instance.movers.len(),
                instance.prefills.len(),
                instance.engine.scheduler.load()
            );
        }
        lines += &format!("\n{} requests, {} recoveries open", self.n_open, self.n_recoveries);
        lines
    }
}
