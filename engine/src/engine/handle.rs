//! Starting an engine, and the handle by which async code uses it. Nothing here waits for a step but `reserve`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_kernels::KvLayout;
use baton_scheduler::batch::{BatchConfig, BatchConfigError, BatchScheduler, MoveRoom};
use baton_scheduler::ids::{Epoch, Nanos, RequestId, TokenId};
use baton_scheduler::layer_groups::LayerGroups;
use baton_scheduler::prefix_cache::PrefixEvent;
use baton_scheduler::request::{Failure, PortableState, Request, SamplingParams};
use crossbeam::channel::{self, Sender};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use super::block_watch::{BlockWatch, MAX_STEPS_BEHIND};
use super::command::{Command, Granted, PrefixQuery, Purpose, StartedMove, WakeOnDrop};
use super::events::{Generation, silence};
use super::handoff::{PrefillJob, Reservation, refused};
use super::load::{LoadReport, OpenCount, OpenPermit};
use super::moving::{HeldRequest, RunningMove};
use super::open_group::n_events_left;
use super::prepared::Prepared;
use super::step_loop;
use super::watchdog::{Health, Heartbeat};
use crate::constraint::ConstraintCompiler;
use crate::forward::ForwardPass;

/// Room in a request's channel beyond its tokens and ends: start, prompt log-probabilities, terminal, some preemptions.
const N_EXTRA_EVENTS: usize = 8;

/// How an engine is run.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// The scheduler's limits.
    pub batch: BatchConfig,
    /// Commands that may be waiting for the step loop.
    pub max_commands: usize,
    /// Whether the step loop may work ahead of the device.
    pub async_scheduling: AsyncScheduling,
    /// How often an idle step loop looks around.
    pub tick: Duration,
    /// How long pending work may see no progress before [`EngineHandle::health`] says stuck.
    pub stuck_after: Duration,
}

/// Whether the next step is scheduled and launched while one is in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AsyncScheduling {
    /// Where the device samples and can take it.
    #[default]
    On,
    /// Never: one step after the other.
    Off,
}

impl EngineConfig {
    /// The given limits; 1,024 commands, a tick of 100 ms, stuck after 30 s.
    pub fn new(batch: BatchConfig) -> EngineConfig {
        EngineConfig {
            batch,
            max_commands: 1024,
            async_scheduling: AsyncScheduling::On,
            tick: Duration::from_millis(100),
            stuck_after: Duration::from_secs(30),
        }
    }
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Limits that cannot work.
    #[error(transparent)]
    Config(#[from] BatchConfigError),
    /// The scheduler and the KV cache do not describe the same memory.
    #[error("{field} is {configured}, expected {actual} as in the KV cache")]
    Mismatch {
        /// Which limit.
        field: &'static str,
        /// Its value.
        configured: usize,
        /// The KV cache's.
        actual: usize,
    },
    /// No thread.
    #[error("starting the step thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the step loop and the handles share.
pub(super) struct Shared {
    pub(super) started_at: Instant,
    pub(super) heartbeat: Heartbeat,
    pub(super) load: Mutex<LoadReport>,
    /// The step thread's last words, once it has ended.
    pub(super) death: Mutex<Option<String>>,
    pub(super) is_stopping: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    stuck_after: Nanos,
    batch: BatchConfig,
    layout: KvLayout,
    layer_groups: LayerGroups,
    vocab_size: usize,
    numerics_class: String,
}

impl Shared {
    pub(super) fn now(&self) -> Nanos {
        Nanos(u64::try_from(self.started_at.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// A handle on a running engine. The engine ends when it is shut down or the last handle is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    /// Choices to compute here, and reservations, are bounded apart: neither crowds out the other.
    in_line: Arc<OpenCount>,
    reserved: Arc<OpenCount>,
    stopped: watch::Receiver<()>,
    /// Absent: constrained requests are refused.
    constraints: Option<ConstraintCompiler>,
}

/// Starts the step thread over `forward`.
///
/// # Errors
/// Limits that cannot work, or that differ from the KV cache.
pub fn start<F: ForwardPass>(mut forward: F, config: EngineConfig) -> Result<EngineHandle, EngineError> {
    let layout = forward.layout();
    let n_blocks = forward.kv_cache().n_blocks();
    let layer_groups = forward.layer_groups();
    for (field, configured, actual) in [
        ("windows", config.batch.n_groups(), layer_groups.n_groups()),
        ("block_size", config.batch.block_size, layout.block_size),
        ("n_blocks", config.batch.n_blocks, n_blocks),
    ] {
        if configured != actual {
            return Err(EngineError::Mismatch {
                field,
                configured,
                actual,
            });
        }
    }
    let scheduler = BatchScheduler::new(config.batch.clone())?;
    let stuck_after = Nanos(u64::try_from(config.stuck_after.as_nanos()).unwrap_or(u64::MAX));
    let load = LoadReport {
        batch: scheduler.load(),
        ..LoadReport::default()
    };
    let in_line = OpenCount::new(config.batch.max_waiting + config.batch.max_num_seqs);
    let reserved = OpenCount::new(config.batch.max_num_seqs + config.batch.max_deferred_reservations);
    let shared = Arc::new(Shared {
        started_at: Instant::now(),
        heartbeat: Heartbeat::default(),
        load: Mutex::new(load),
        death: Mutex::new(None),
        is_stopping: AtomicBool::new(false),
        thread: Mutex::new(None),
        stuck_after,
        batch: config.batch,
        layout,
        layer_groups,
        vocab_size: forward.vocab_size(),
        numerics_class: forward.numerics_class(),
    });
    let (commands, receiver) = channel::bounded(config.max_commands.max(1));
    let (stopping, stopped) = watch::channel(());
    let loop_shared = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name("baton-step".to_owned())
        .spawn(move || {
            let _stopping = stopping;
            step_loop::run(
                forward,
                scheduler,
                receiver,
                loop_shared,
                config.async_scheduling,
                config.tick,
            );
        })?;
    *shared.thread.lock() = Some(thread);
    Ok(EngineHandle {
        commands,
        shared,
        in_line,
        reserved,
        stopped,
        constraints: None,
    })
}

impl EngineHandle {
    /// The same engine, which takes constrained requests and compiles them by `compiler`.
    pub fn with_constraints(self, compiler: ConstraintCompiler) -> EngineHandle {
        EngineHandle {
            constraints: Some(compiler),
            ..self
        }
    }

    /// Makes a request ready beside the runtime, so that taking it costs nobody time. At once without a constraint.
    ///
    /// # Errors
    /// `Invalid` when its constraint cannot be compiled, or its outputs are not of it.
    pub async fn prepare(&self, state: PortableState) -> Result<Prepared, Failure> {
        let mut prepared = Prepared::from(state);
        if !prepared.is_waiting() {
            return Ok(prepared);
        }
        let constraints = self.constraints.clone();
        let compiling = tokio::task::spawn_blocking(move || {
            prepared.compile(constraints.as_ref())?;
            Ok(prepared)
        });
        let ended = |_| Failure::Internal("compiling a constraint panicked".to_owned());
        compiling.await.map_err(ended)?
    }

    /// Computes and generates a request here. A state in which every choice has ended is finished at once.
    ///
    /// # Errors
    /// `Invalid` when it can never run, `Busy` when too many are open, `Internal` when the engine has ended.
    pub fn generate(&self, request: impl Into<Prepared>) -> Result<Generation, Failure> {
        let prepared = self.check(request.into())?;
        let state = &prepared.state;
        let permit = acquire(&self.in_line, state)?;
        let (events, receiver) = mpsc::channel(event_capacity(state, self.shared.batch.max_model_len));
        self.send(Command::Generate {
            state: Box::new(prepared),
            events,
            permit,
        })?;
        Ok(Generation {
            events: receiver,
            _wake: self.wake_on_drop(),
            has_ended: false,
        })
    }

    /// Computes a request's context and samples the next token of each choice, for another instance to go on with. Blocks
    /// before `first_blocks`, one for each layer group, are there already or not seen there, and are not made ready.
    ///
    /// # Errors
    /// As [`EngineHandle::generate`].
    pub fn prefill(&self, request: impl Into<Prepared>, first_blocks: &[usize]) -> Result<PrefillJob, Failure> {
        let prepared = self.check(request.into())?;
        let state = &prepared.state;
        self.shared.batch.check_handoff(state)?;
        let n_blocks = self.shared.batch.blocks_for(n_context(state));
        self.check_first_blocks(state, first_blocks)?;
        let permit = acquire(&self.in_line, state)?;
        let (events, receiver) = mpsc::channel(self.shared.layer_groups.n_layers() * n_blocks + N_EXTRA_EVENTS);
        self.send(Command::Prefill {
            state: Box::new(prepared),
            first_blocks: first_blocks.to_vec(),
            events,
            permit,
        })?;
        Ok(PrefillJob {
            events: receiver,
            _wake: self.wake_on_drop(),
            has_ended: false,
            n_blocks,
        })
    }

    /// Refuses first blocks that are not one for each layer group, that the context does not have, or that are given up here
    /// before all of it is computed: who goes on after the context sees none of those.
    fn check_first_blocks(&self, state: &PortableState, first_blocks: &[usize]) -> Result<(), Failure> {
        let batch = &self.shared.batch;
        let n_context = n_context(state);
        let n_groups = batch.n_groups();
        if first_blocks.len() != n_groups {
            let found = first_blocks.len();
            return Err(Failure::Invalid(format!(
                "first_blocks has {found} entries, expected {n_groups}"
            )));
        }
        for (layer_group, &first) in first_blocks.iter().enumerate() {
            let (least, most) = (
                batch.n_unseen_blocks(layer_group, n_context),
                batch.blocks_for(n_context),
            );
            if first < least || first > most {
                let expected = match least {
                    0 => format!("at most {most}"),
                    _ => format!("{least} to {most}"),
                };
                return Err(Failure::Invalid(format!("first_block is {first}, expected {expected}")));
            }
        }
        Ok(())
    }

    /// The mean of the prompt's hidden states after the final norm, `[hidden_size]`. All of the prompt is computed, whatever the
    /// prefix cache has. Dropping the future cancels it.
    ///
    /// # Errors
    /// `Invalid` when it can never run, `Busy` when too many are open, `Internal` when the engine has ended.
    pub async fn embed(&self, request: Request) -> Result<Vec<f32>, Failure> {
        self.shared.batch.check_embedded(&request)?;
        self.check_known(request.prompt_ids.iter().copied())?;
        let state = PortableState::fresh(request, Epoch::default());
        let permit = acquire(&self.in_line, &state)?;
        let _wake = self.wake_on_drop();
        let (answer, embedding) = oneshot::channel();
        self.send(Command::Embed {
            state: Box::new(state.into()),
            answer,
            permit,
        })?;
        embedding.await.unwrap_or_else(|_| Err(silence()))
    }

    /// Whether nothing is left to generate, although perhaps only the tokens say so: [`EngineHandle::generate`] tells the
    /// ends.
    pub fn has_ended(&self, state: &PortableState) -> bool {
        self.shared.batch.unfinished(state).next().is_none()
    }

    /// Reserves blocks for a request that another instance prefills: for its context, and one for each choice to grow
    /// into. Answers after the current step, or after
    /// `max_defer` when someone else is about to bring the same prefix.
    ///
    /// # Errors
    /// `Invalid` when it can never run, `Busy` when there is no room now, `Internal` when the engine has ended.
    pub async fn reserve(&self, state: PortableState) -> Result<Reservation, Failure> {
        let prepared = self.check(self.prepare(state).await?)?;
        self.shared.batch.check_handoff(&prepared.state)?;
        self.reserve_for(prepared, Purpose::Handoff).await
    }

    /// Reserves blocks for a request that runs on another instance and will come with its KV: for each choice that goes on,
    /// those before the last token that its source has, and some for what it generates until it comes. Answers after the
    /// current step, and waits for nobody.
    ///
    /// # Errors
    /// As [`EngineHandle::reserve`]; `Invalid` too when a choice has no token yet.
    pub async fn reserve_moved(&self, state: PortableState, room: MoveRoom) -> Result<Reservation, Failure> {
        let prepared = self.check(self.prepare(state).await?)?;
        self.shared.batch.check_unfinished(&prepared.state)?;
        self.reserve_for(prepared, Purpose::Move(room)).await
    }

    /// Holds a request that runs here: each choice generates at most `n_tokens` more than it has now, and then stands still,
    /// and it gives up no KV that it has. A request that cannot be moved now is not held, nor one that is being moved.
    ///
    /// # Errors
    /// `Busy` when it does not run here, `Internal` when the engine has ended.
    pub async fn hold(&self, request: RequestId, n_tokens: usize) -> Result<HeldRequest, Failure> {
        let (reply, answer) = oneshot::channel();
        let holder = Arc::new(());
        let wake = self.wake_on_drop();
        self.send(Command::Hold {
            request,
            n_tokens,
            holder: Arc::downgrade(&holder),
            reply,
        })?;
        Ok(HeldRequest {
            n_output_tokens: answer.await.unwrap_or_else(|_| Err(silence()))?,
            _holder: holder,
            _wake: wake,
        })
    }

    /// The right to move a request that runs here, with every choice that goes on decoding. The request goes on, as far as
    /// there is room for it where it goes: `room` blocks of each choice.
    ///
    /// # Errors
    /// `Busy` when the request is unknown, moving already, or some choice is not decoding; `Internal` when the engine has
    /// ended.
    pub async fn start_move(&self, request: RequestId, room: Vec<usize>) -> Result<RunningMove, Failure> {
        let (reply, answer) = oneshot::channel();
        let mover = Arc::new(());
        let wake = self.wake_on_drop();
        self.send(Command::StartMove {
            request,
            room,
            mover: Arc::downgrade(&mover),
            reply,
        })?;
        let StartedMove { group, n_choices } = answer.await.unwrap_or_else(|_| Err(silence()))?;
        Ok(RunningMove {
            group,
            n_choices,
            mover,
            _wake: wake,
            commands: self.commands.clone(),
        })
    }

    async fn reserve_for(&self, prepared: Prepared, purpose: Purpose) -> Result<Reservation, Failure> {
        let state = &prepared.state;
        let permit = acquire(&self.reserved, state)?;
        let (events, receiver) = mpsc::channel(event_capacity(state, self.shared.batch.max_model_len));
        let wake = self.wake_on_drop();
        let (reply, answer) = oneshot::channel();
        self.send(Command::Reserve {
            state: Box::new(prepared),
            purpose,
            events,
            reply,
            permit,
        })?;
        let Granted { group, choices } = answer.await.unwrap_or_else(|_| Err(silence()))?;
        Ok(Reservation {
            choices,
            group,
            events: receiver,
            wake,
            commands: self.commands.clone(),
        })
    }

    /// Follows what the prefix cache holds, block by block with its tokens, without what is salted.
    ///
    /// # Errors
    /// `Busy` when too many commands wait, `Internal` when the engine has ended.
    pub fn watch_blocks(&self) -> Result<BlockWatch, Failure> {
        let (watcher, changes) = mpsc::channel(MAX_STEPS_BEHIND);
        self.send(Command::WatchBlocks(watcher))?;
        Ok(BlockWatch { changes })
    }

    /// The latest report of load, at most a step or a tick old.
    pub fn load(&self) -> LoadReport {
        *self.shared.load.lock()
    }

    /// The prefix cache's changes since the last call, by whoever.
    ///
    /// # Errors
    /// `Busy` when the command queue is full, `Internal` when the engine has ended.
    pub async fn take_prefix_events(&self) -> Result<Vec<PrefixEvent>, Failure> {
        self.prefix_events(PrefixQuery::Changes).await
    }

    /// The prefix cache's whole contents; changes before it are then not reported again.
    ///
    /// # Errors
    /// As [`EngineHandle::take_prefix_events`].
    pub async fn prefix_snapshot(&self) -> Result<Vec<PrefixEvent>, Failure> {
        self.prefix_events(PrefixQuery::Everything).await
    }

    /// Whether the step loop comes round.
    pub fn health(&self) -> Health {
        self.health_at(self.shared.now())
    }

    pub(super) fn health_at(&self, now: Nanos) -> Health {
        if let Some(words) = self.shared.death.lock().clone() {
            return Health::Dead(words);
        }
        self.shared
            .heartbeat
            .check(now, self.shared.stuck_after, !self.commands.is_empty())
    }

    /// How often the step loop has come round.
    pub fn n_beats(&self) -> u64 {
        self.shared.heartbeat.n_beats()
    }

    /// The scheduler's limits.
    pub fn batch_config(&self) -> &BatchConfig {
        &self.shared.batch
    }

    /// Shape of the KV cache.
    pub fn layout(&self) -> KvLayout {
        self.shared.layout
    }

    /// Which layers of the model share blocks.
    pub fn layer_groups(&self) -> &LayerGroups {
        &self.shared.layer_groups
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// Instances with equal classes give equal bits.
    pub fn numerics_class(&self) -> &str {
        &self.shared.numerics_class
    }

    /// Ends the engine after the current step. Open requests fail as `InstanceLost`. Waits for the thread's end.
    pub async fn shutdown(&self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        drop(self.wake_on_drop());
        let mut stopped = self.stopped.clone();
        while stopped.changed().await.is_ok() {}
        let thread = self.shared.thread.lock().take();
        if let Some(thread) = thread {
            // It has dropped its last value; only its exit is left.
            thread.join().expect("the step thread catches its panics");
        }
    }

    async fn prefix_events(&self, query: PrefixQuery) -> Result<Vec<PrefixEvent>, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::PrefixEvents { query, reply })?;
        answer.await.map_err(|_| silence())
    }

    /// Refuses what can never run here, and compiles a constraint that nobody has prepared.
    fn check(&self, mut prepared: Prepared) -> Result<Prepared, Failure> {
        let state = &prepared.state;
        self.shared.batch.check(state)?;
        let outputs = state
            .choices
            .iter()
            .flat_map(|choice| &choice.output)
            .map(|token| token.id);
        let prompt = state.request.prompt_ids.iter().copied();
        self.check_known(prompt.chain(outputs).chain(named_ids(&state.request.sampling)))?;
        prepared.compile(self.constraints.as_ref())?;
        Ok(prepared)
    }

    fn check_known(&self, mut ids: impl Iterator<Item = TokenId>) -> Result<(), Failure> {
        let n_vocab = self.shared.vocab_size;
        match ids.find(|&id| id as usize >= n_vocab) {
            Some(id) => Err(Failure::Invalid(format!("token id {id}, expected less than {n_vocab}"))),
            None => Ok(()),
        }
    }

    fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.try_send(command).map_err(|error| refused(&error))
    }

    fn wake_on_drop(&self) -> WakeOnDrop {
        WakeOnDrop(self.commands.clone())
    }
}

/// Ids whose logits the request changes.
fn named_ids(sampling: &SamplingParams) -> impl Iterator<Item = TokenId> {
    let biased = sampling.logit_bias.iter().map(|(id, _)| *id);
    let stops = sampling.stop_token_ids.iter().filter(|_| sampling.min_tokens > 0);
    let allowed = sampling.allowed_token_ids.iter();
    let bad = sampling.bad_words.iter().flatten();
    biased.chain(stops.chain(allowed).chain(bad).copied())
}

fn acquire(count: &Arc<OpenCount>, state: &PortableState) -> Result<OpenPermit, Failure> {
    count
        .acquire(state.choices.len())
        .ok_or_else(|| Failure::Busy(format!("{} sequences are open", count.max_open())))
}

fn n_context(state: &PortableState) -> usize {
    state.request.prompt_ids.len() + state.choices[0].output.len()
}

/// Everything a request can say fits: its tokens, its ends, and a few events besides. Channels grow as they are used.
fn event_capacity(state: &PortableState, max_model_len: usize) -> usize {
    let max_tokens = (state.request.sampling.max_tokens as usize).min(max_model_len) as u32;
    n_events_left(&state.choices, max_tokens) + N_EXTRA_EVENTS
}
