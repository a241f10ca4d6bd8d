//! The step loop: takes commands, asks the scheduler for a batch, launches it, collects it, samples, tells. Where the device
//! samples, the next batch is made and launched before the last one is collected. One thread, which owns the device and
//! waits for nothing but it and commands.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_kernels::KvCache;
use baton_scheduler::batch::{Batch, BatchScheduler, Committed, GroupId, Phase, SequenceKind};
use baton_scheduler::ids::BlockId;
use baton_scheduler::layer_groups::LayerGroups;
use baton_scheduler::request::{Failure, PortableState};
use crossbeam::channel::{Receiver, RecvTimeoutError};
use tokio::sync::mpsc;

use super::block_watch::Changes;
use super::command::{Command, PrefixQuery};
use super::device_clock::DeviceClock;
use super::handle::{AsyncScheduling, Shared};
use super::hidden_sum::HiddenSum;
use super::load::{EngineCounters, LoadReport};
use super::open_group::{OpenGroup, Outlet, ReadyBlocks, Told, Waiter};
use super::step::Flight;
use crate::forward::ForwardPass;
use crate::sampler::Sampler;

/// How often the loop looks around while something waits for a transfer outside its sight to end.
const BUSY_TICK: Duration = Duration::from_millis(5);

pub(super) struct StepLoop<F> {
    pub(super) forward: F,
    pub(super) scheduler: BatchScheduler,
    pub(super) layer_groups: LayerGroups,
    pub(super) sampler: Sampler,
    pub(super) open: BTreeMap<GroupId, OpenGroup>,
    /// Whether a step may be launched while another is in flight.
    pub(super) runs_ahead: bool,
    /// Steps launched and not collected, the oldest first: one between two rounds, two within one.
    pub(super) in_flight: VecDeque<Flight>,
    pub(super) clock: DeviceClock,
    pub(super) counters: EngineCounters,
    /// Who listens to changes of cached blocks.
    pub(super) watchers: Vec<mpsc::Sender<Changes>>,
    pub(super) shared: Arc<Shared>,
    tick: Duration,
}

/// Runs until shutdown, until the last handle is gone, or until a panic, which ends every open sequence.
pub(super) fn run<F: ForwardPass>(
    forward: F,
    scheduler: BatchScheduler,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    async_scheduling: AsyncScheduling,
    tick: Duration,
) {
    let mut step_loop = StepLoop {
        layer_groups: forward.layer_groups(),
        forward,
        scheduler,
        sampler: Sampler::new(),
        open: BTreeMap::new(),
        runs_ahead: async_scheduling == AsyncScheduling::On,
        in_flight: VecDeque::new(),
        clock: DeviceClock::default(),
        counters: EngineCounters::default(),
        watchers: Vec::new(),
        shared: Arc::clone(&shared),
        tick,
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| step_loop.run(&commands)));
    let (words, failure) = match outcome {
        Ok(()) => (
            "shut down".to_owned(),
            Failure::InstanceLost("the engine is shutting down".to_owned()),
        ),
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            tracing::error!(message, "the step loop panicked");
            (
                format!("panicked: {message}"),
                Failure::Internal(format!("the step loop panicked: {message}")),
            )
        }
    };
    *shared.death.lock() = Some(words);
    // Commands still queued are dropped with their channel; their senders then hear silence, which is a failure too.
    for (_, mut open) in std::mem::take(&mut step_loop.open) {
        // A second panic would hide the first and leave the rest unanswered.
        let _ = catch_unwind(AssertUnwindSafe(|| open.tell_failed(failure.clone())));
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

/// Whether a transfer still reads or writes the block.
pub(super) fn is_pinned(kv: &KvCache) -> impl Fn(BlockId) -> bool {
    move |block| kv.is_pinned(block.0) || kv.is_writing(block.0)
}

impl<F: ForwardPass> StepLoop<F> {
    fn run(&mut self, commands: &Receiver<Command>) {
        let mut was_idle = true;
        let mut has_stepped = false;
        loop {
            let round_began = Instant::now();
            let busy_ns = self.clock.busy_ns();
            self.shared.heartbeat.beat(self.shared.now(), self.scheduler.has_work());
            if self.take_commands(commands, has_stepped).is_break() {
                return;
            }
            let woke = Instant::now();
            self.reap_abandoned();
            self.resume_abandoned();
            self.hold_back();
            self.shared.heartbeat.beat(self.shared.now(), self.scheduler.has_work());
            let batch = self.schedule();
            self.publish_allocated();
            self.tell_changes(&batch);
            has_stepped = !batch.items.is_empty() || !self.in_flight.is_empty();
            let has_launched = self.launch(batch);
            let stays = |flight: &Flight| has_launched && flight.can_run_ahead;
            let n_left = usize::from(self.in_flight.back().is_some_and(stays));
            while self.in_flight.len() > n_left {
                self.finish_oldest();
            }
            if has_stepped {
                let began = if was_idle { woke } else { round_began };
                let computed = self.clock.busy_ns() - busy_ns;
                self.counters.overhead_ns += (began.elapsed().as_nanos() as u64).saturating_sub(computed);
            }
            let is_idle = self.open.is_empty();
            if is_idle && !was_idle {
                self.scheduler.check();
            }
            was_idle = is_idle;
            self.tell_watchers();
            self.publish();
        }
    }

    /// The next batch; while a step is in flight, one that assumes its tokens.
    fn schedule(&mut self) -> Batch {
        let now = self.shared.now();
        let is_pinned = is_pinned(self.forward.kv_cache());
        match self.in_flight.back() {
            None => self.scheduler.schedule(now, &is_pinned),
            Some(flight) => self.scheduler.schedule_ahead(now, &|id| flight.carries(id), &is_pinned),
        }
    }

    /// Collects what is in flight: what follows must see every sequence as it stands.
    pub(super) fn settle(&mut self) {
        while !self.in_flight.is_empty() {
            self.finish_oldest();
        }
    }

    /// Takes what commands there are; waits for one, at most a tick, when the last round had nothing to compute.
    fn take_commands(&mut self, commands: &Receiver<Command>, has_stepped: bool) -> ControlFlow<()> {
        if !has_stepped {
            let is_waiting = self.scheduler.has_work() || self.scheduler.ledger().quarantined > 0;
            let tick = if is_waiting {
                BUSY_TICK.min(self.tick)
            } else {
                self.tick
            };
            match commands.recv_timeout(tick) {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
            }
        }
        // What is sent meanwhile waits for the next round.
        for command in commands.try_iter().take(commands.len()) {
            self.obey(command);
        }
        if self.shared.is_stopping.load(Ordering::Acquire) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate { state, events, permit } => {
                let (state, open) = OpenGroup::new(*state, Outlet::Generation(events), permit);
                self.submit(&state, SequenceKind::Local, open);
            }
            Command::Prefill {
                state,
                first_blocks,
                events,
                permit,
            } => {
                let outlet = Outlet::Prefill {
                    events,
                    n_ready: first_blocks,
                };
                let (state, open) = OpenGroup::new(*state, outlet, permit);
                self.submit(&state, SequenceKind::PrefillForHandoff, open);
            }
            Command::Embed { state, answer, permit } => {
                let outlet = Outlet::Embedding {
                    answer: Some(answer),
                    sum: HiddenSum::new(self.forward.hidden_size()),
                };
                let (state, open) = OpenGroup::new(*state, outlet, permit);
                self.submit(&state, SequenceKind::Embedded, open);
            }
            Command::Reserve {
                state,
                purpose,
                events,
                reply,
                permit,
            } => {
                let (state, mut open) = OpenGroup::new(*state, Outlet::Generation(events), permit);
                open.waiter = Some(Waiter {
                    reply,
                    purpose: purpose.clone(),
                });
                self.reserve(&state, &purpose, open);
            }
            Command::Join {
                group,
                arrived,
                numerics,
            } => self.join(group, arrived, numerics),
            Command::Hold {
                request,
                n_tokens,
                holder,
                reply,
            } => {
                // Whoever asked may have gone, and then nobody holds it.
                let _ = reply.send(self.hold(request, n_tokens, holder));
            }
            Command::StartMove {
                request,
                room,
                mover,
                reply,
            } => {
                let _ = reply.send(self.start_move(request, &room, mover));
            }
            Command::PinFull {
                group,
                mover,
                from,
                reply,
            } => {
                let _ = reply.send(self.pin_full(group, &mover, &from));
            }
            Command::Pause {
                group,
                mover,
                from,
                reply,
            } => {
                self.settle();
                // An answer that is not taken unpins what it holds.
                let _ = reply.send(self.pause(group, &mover, &from));
            }
            Command::Resume { group, mover } => {
                if self.is_moved_by(group, &mover) {
                    self.resume(group);
                }
            }
            Command::PrefixEvents { query, reply } => {
                let changes = self.scheduler.take_prefix_events();
                let events = match query {
                    PrefixQuery::Changes => changes,
                    PrefixQuery::Everything => self.scheduler.prefix_snapshot(),
                };
                // Whoever asked may have gone; a mirror that lost events asks for everything.
                let _ = reply.send(events);
            }
            Command::WatchBlocks(watcher) => self.watch_blocks(watcher),
            Command::Wake => {}
        }
    }

    fn submit(&mut self, state: &PortableState, kind: SequenceKind, mut open: OpenGroup) {
        if kind == SequenceKind::Local && open.tell_ends(self.scheduler.config(), state) == Told::All {
            self.counters.n_finished += 1;
            return;
        }
        match self.scheduler.submit(state, kind) {
            Ok(group) => {
                self.open.insert(group, open);
            }
            Err(failure) => {
                self.counters.n_failed += 1;
                open.tell_failed(failure);
            }
        }
    }

    /// Copies the blocks of new choices and tells of those that found no room. False when that ended a request.
    pub(super) fn make_forks(&mut self, committed: &Committed) -> bool {
        self.publish_allocated();
        let mut has_failed = false;
        for copy in &committed.copies {
            if let Err(error) = self.forward.kv_cache().copy_block(copy.from.0, copy.to.0) {
                self.fail(
                    copy.member.group,
                    Failure::Internal(format!("copying a block: {error}")),
                );
                has_failed = true;
            }
        }
        for member in &committed.preempted {
            if let Some(open) = self.open.get_mut(&member.group) {
                open.tell_preempted();
            }
        }
        !has_failed
    }

    /// The one place where newly allocated blocks become known, before they are written: a reader of the memory that comes
    /// by itself must see that they are not what they were.
    pub(super) fn publish_allocated(&mut self) {
        for (block, generation) in self.scheduler.take_allocated() {
            self.forward.kv_cache().set_generation(block.0, generation.0);
        }
    }

    fn reap_abandoned(&mut self) {
        let abandoned: Vec<GroupId> = self
            .open
            .iter()
            .filter(|(_, open)| open.is_abandoned())
            .map(|(&group, _)| group)
            .collect();
        for group in abandoned {
            if self.scheduler.phase(group.sequence(0)) != Some(Phase::HandingOver) {
                self.counters.n_cancelled += 1;
            }
            self.scheduler.remove_group(group, &is_pinned(self.forward.kv_cache()));
            self.open.remove(&group);
        }
    }

    pub(super) fn fail(&mut self, group: GroupId, failure: Failure) {
        self.scheduler.remove_group(group, &is_pinned(self.forward.kv_cache()));
        if let Some(mut open) = self.open.remove(&group) {
            self.counters.n_failed += 1;
            open.tell_failed(failure);
        }
    }

    /// Tells what changed while the batch was chosen. Blocks that were prefix hits are ready in all layers at once.
    fn tell_changes(&mut self, batch: &Batch) {
        for (group, failure) in &batch.refused {
            self.counters.n_failed += 1;
            if let Some(mut open) = self.open.remove(group) {
                open.tell_failed(failure.clone());
            }
        }
        for &id in &batch.preempted {
            // What was preempted and then refused in the same round has gone.
            if self.scheduler.phase(id).is_some() {
                let group = self.scheduler.member(id).group;
                let open = self.open.get_mut(&group).expect("a preempted request is open");
                open.tell_preempted();
            }
        }
        for &group in &batch.granted {
            self.answer_reservation(group);
        }
        let layout = self.forward.layout();
        for started in &batch.started {
            let group = self.scheduler.member(started.sequence).group;
            let open = self.open.get_mut(&group).expect("a started request is open");
            open.tell_started(started.n_hit_tokens);
            let n_hit_blocks = started.n_hit_tokens / layout.block_size;
            let block_tables = self.scheduler.block_tables(started.sequence);
            if let Some(ready) = ReadyBlocks::until(n_hit_blocks, &open.outlet, &self.layer_groups, block_tables) {
                (0..self.layer_groups.n_layers()).for_each(|layer| ready.tell(layer, self.forward.kv_cache()));
            }
            self.counters.n_layer_blocks_ready += open.outlet.note_ready(n_hit_blocks, &self.layer_groups);
        }
    }

    fn publish(&self) {
        *self.shared.load.lock() = LoadReport {
            at: self.shared.now(),
            n_open: self.open.len(),
            batch: self.scheduler.load(),
            scheduler: self.scheduler.counters(),
            engine: self.counters,
        };
    }
}
