//! The step loop: takes commands, asks the scheduler for a batch, computes it, samples, tells. One thread, which owns
//! the device and waits for nothing but commands.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_kernels::KvCache;
use baton_scheduler::batch::{Batch, BatchScheduler, Numerics, Phase, ReserveOutcome, SequenceKind};
use baton_scheduler::ids::{BlockId, SequenceId};
use baton_scheduler::request::{Failure, PortableState, Token};
use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::command::{Command, Granted, PrefixQuery};
use super::handle::Shared;
use super::load::{EngineCounters, LoadReport};
use super::open_sequence::{OpenSequence, Outlet, ReadyBlocks};
use crate::forward::ForwardPass;
use crate::sampler::Sampler;

/// How often the loop looks around while something waits for a transfer outside its sight to end.
const BUSY_TICK: Duration = Duration::from_millis(5);

pub(super) struct StepLoop<F> {
    pub(super) forward: F,
    pub(super) scheduler: BatchScheduler,
    pub(super) sampler: Sampler,
    pub(super) open: BTreeMap<SequenceId, OpenSequence>,
    pub(super) counters: EngineCounters,
    shared: Arc<Shared>,
    tick: Duration,
}

/// Runs until shutdown, until the last handle is gone, or until a panic, which ends every open sequence.
pub(super) fn run<F: ForwardPass>(
    forward: F,
    scheduler: BatchScheduler,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    tick: Duration,
) {
    let mut step_loop = StepLoop {
        forward,
        scheduler,
        sampler: Sampler::new(),
        open: BTreeMap::new(),
        counters: EngineCounters::default(),
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
            self.shared.heartbeat.beat(self.shared.now(), self.scheduler.has_work());
            if self.take_commands(commands, has_stepped).is_break() {
                return;
            }
            let woke = Instant::now();
            self.reap_abandoned();
            self.shared.heartbeat.beat(self.shared.now(), self.scheduler.has_work());
            let batch = self
                .scheduler
                .schedule(self.shared.now(), &is_pinned(self.forward.kv_cache()));
            self.tell_changes(&batch);
            has_stepped = !batch.items.is_empty();
            if has_stepped {
                let forward_ns = self.counters.forward_ns;
                self.step(&batch);
                let began = if was_idle { woke } else { round_began };
                let computed = self.counters.forward_ns - forward_ns;
                self.counters.overhead_ns += (began.elapsed().as_nanos() as u64).saturating_sub(computed);
            }
            let is_idle = self.open.is_empty();
            if is_idle && !was_idle {
                self.scheduler.check();
            }
            was_idle = is_idle;
            self.publish();
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
                let open = OpenSequence::new(&state, Outlet::Generation(events), permit);
                self.submit(&state, SequenceKind::Local, open);
            }
            Command::Prefill {
                state,
                first_block,
                events,
                permit,
            } => {
                let outlet = Outlet::Prefill {
                    events,
                    n_ready: first_block,
                };
                let open = OpenSequence::new(&state, outlet, permit);
                self.submit(&state, SequenceKind::PrefillForHandoff, open);
            }
            Command::Reserve {
                state,
                events,
                reply,
                permit,
            } => {
                let mut open = OpenSequence::new(&state, Outlet::Generation(events), permit);
                open.reply = Some(reply);
                self.reserve(&state, open);
            }
            Command::Join {
                sequence,
                first,
                numerics,
            } => self.join(sequence, first, numerics),
            Command::PrefixEvents { query, reply } => {
                let changes = self.scheduler.take_prefix_events();
                let events = match query {
                    PrefixQuery::Changes => changes,
                    PrefixQuery::Everything => self.scheduler.prefix_snapshot(),
                };
                // Whoever asked may have gone; a mirror that lost events asks for everything.
                let _ = reply.send(events);
            }
            Command::Wake => {}
        }
    }

    fn submit(&mut self, state: &PortableState, kind: SequenceKind, mut open: OpenSequence) {
        match self.scheduler.submit(state, kind) {
            Ok(id) => {
                self.open.insert(id, open);
            }
            Err(failure) => {
                self.counters.n_failed += 1;
                open.tell_failed(failure);
            }
        }
    }

    fn reserve(&mut self, state: &PortableState, mut open: OpenSequence) {
        let now = self.shared.now();
        let outcome = self.scheduler.reserve(now, state, &is_pinned(self.forward.kv_cache()));
        match outcome {
            Ok(ReserveOutcome::Granted(id)) => {
                self.open.insert(id, open);
                self.answer_reservation(id);
            }
            Ok(ReserveOutcome::Deferred(id)) => {
                self.open.insert(id, open);
            }
            Err(failure) => {
                self.counters.n_failed += 1;
                open.tell_failed(failure);
            }
        }
    }

    fn answer_reservation(&mut self, id: SequenceId) {
        let grant = self.scheduler.grant(id);
        let blocks: Vec<u32> = grant.blocks.iter().map(|(block, _)| block.0).collect();
        match self.forward.kv_cache().reserve_write(&blocks) {
            Ok(writers) => {
                let reply = self.open.get_mut(&id).and_then(|open| open.reply.take());
                let reply = reply.expect("a reservation is answered once");
                // When the answer is not taken, its events channel is closed too, and it is reaped.
                let _ = reply.send(Ok(Granted {
                    sequence: id,
                    grant,
                    writers,
                }));
            }
            Err(error) => self.fail(id, Failure::Internal(format!("writing reserved blocks: {error}"))),
        }
    }

    fn join(&mut self, id: SequenceId, first: Token, numerics: Numerics) {
        let Some(open) = self.open.get_mut(&id) else { return };
        if first.index != open.next_index || first.id as usize >= self.forward.vocab_size() {
            let (index, token) = (open.next_index, first.id);
            let found = first.index;
            let message = format!("first token {token} has index {found}, expected a known token with index {index}");
            return self.fail(id, Failure::Internal(message));
        }
        let kv = self.forward.kv_cache();
        let still_written = self
            .scheduler
            .grant(id)
            .blocks
            .into_iter()
            .find(|(block, _)| kv.is_writing(block.0));
        if let Some((block, _)) = still_written {
            let message = format!("block {} is still being written at the join", block.0);
            return self.fail(id, Failure::Internal(message));
        }
        self.counters.n_joined += 1;
        open.next_index += 1;
        if let Some(finish) = self.scheduler.join(id, first.id, numerics, &is_pinned(kv)) {
            open.tell_finished(finish);
            self.counters.n_finished += 1;
            self.open.remove(&id);
        }
    }

    fn reap_abandoned(&mut self) {
        let abandoned: Vec<SequenceId> = self
            .open
            .iter()
            .filter(|(_, open)| open.is_abandoned())
            .map(|(&id, _)| id)
            .collect();
        for id in abandoned {
            if self.scheduler.phase(id) != Some(Phase::HandingOver) {
                self.counters.n_cancelled += 1;
            }
            self.scheduler.remove(id, &is_pinned(self.forward.kv_cache()));
            self.open.remove(&id);
        }
    }

    pub(super) fn fail(&mut self, id: SequenceId, failure: Failure) {
        self.scheduler.remove(id, &is_pinned(self.forward.kv_cache()));
        self.counters.n_failed += 1;
        if let Some(mut open) = self.open.remove(&id) {
            open.tell_failed(failure);
        }
    }

    /// Tells what changed while the batch was chosen. Blocks that were prefix hits are ready in all layers at once.
    fn tell_changes(&mut self, batch: &Batch) {
        for (id, failure) in &batch.refused {
            self.counters.n_failed += 1;
            if let Some(mut open) = self.open.remove(id) {
                open.tell_failed(failure.clone());
            }
        }
        for id in &batch.preempted {
            self.open
                .get_mut(id)
                .expect("a preempted sequence is open")
                .tell_preempted();
        }
        for &id in &batch.granted {
            self.answer_reservation(id);
        }
        let layout = self.forward.layout();
        for started in &batch.started {
            let open = self
                .open
                .get_mut(&started.sequence)
                .expect("a started sequence is open");
            open.tell_started(started.n_hit_tokens);
            let n_hit_blocks = started.n_hit_tokens / layout.block_size;
            if let Outlet::Prefill { events, n_ready } = &mut open.outlet
                && n_hit_blocks > *n_ready
            {
                let block_table = self.scheduler.block_table(started.sequence);
                let ready = ReadyBlocks {
                    events,
                    blocks: *n_ready..n_hit_blocks,
                    block_table,
                };
                (0..layout.n_layers).for_each(|layer| ready.tell(layer, self.forward.kv_cache()));
                self.counters.n_layer_blocks_ready += ((n_hit_blocks - *n_ready) * layout.n_layers) as u64;
                *n_ready = n_hit_blocks;
            }
        }
    }

    fn publish(&self) {
        *self.shared.load.lock() = LoadReport {
            at: self.shared.now(),
            batch: self.scheduler.load(),
            scheduler: self.scheduler.counters(),
            engine: self.counters,
        };
    }
}
