//! The sending end of a migration: drives a running group of choices and the link by the machine, which decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use baton_kernels::KvRead;
use baton_proto::cluster::{self, generate_event::Event, transfer_frame::Frame};
use baton_proto::convert::{choice_to_wire, first_blocks_from_wire, request_id_from_wire};
use baton_scheduler::ids::RequestId;
use baton_scheduler::request::{ChoiceState, Failure};
use baton_scheduler::timeline::Moment;
use baton_scheduler::transfer::{
    ChoicePlan, KvRange, MigrationAction, MigrationFact, MigrationLimits, MigrationSource, Pacing, TransferId,
    TransferPlan,
};
use futures::Stream;
use futures::future::BoxFuture;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::counters::add;
use super::frames::{FrameLink, FrameResult, MAX_IN_FLIGHT, frame_link};
use super::open_requests::MoverSeat;
use super::service::Worker;
use super::source::nanos;
use super::transport::KvSender;
use crate::engine::{MoveStage, RunningMove};

/// Starts the move of a request that runs here; the stream's drop ends it.
pub(super) fn serve_migrate(
    worker: &Arc<Worker>,
    request: cluster::MigrateRequest,
) -> impl Stream<Item = FrameResult> + use<> {
    let (link, frames) = frame_link();
    let worker_of_task = Arc::clone(worker);
    worker.tasks.spawn(async move {
        let started = tokio::select! {
            started = Mover::start(&worker_of_task, request, link.clone()) => started,
            () = link.closed() => return,
        };
        match started {
            Ok((mover, first)) => mover.run(first).await,
            Err(failure) => {
                add(&worker_of_task.counters.n_moves_failed, 1);
                link.end(Some(&failure));
            }
        }
    });
    frames
}

/// What the engine answered.
enum Answer {
    Full(MoveStage),
    Paused(MoveStage, Vec<ChoiceState>),
}

type Asked = BoxFuture<'static, (RunningMove, Result<Answer, Failure>)>;

struct Mover {
    worker: Arc<Worker>,
    id: RequestId,
    to: String,
    seat: MoverSeat,
    transfer: TransferId,
    sender: Box<dyn KvSender>,
    /// What the destination may still read in place.
    held: Vec<KvRead>,
    /// Why a frame could not be packed.
    trouble: Option<Failure>,
    machine: MigrationSource,
    /// Not here while the engine is asked something.
    running: Option<RunningMove>,
    asked: Option<Asked>,
    /// Of each choice, per layer: pinned and not packed yet.
    pinned: Vec<Vec<VecDeque<KvRead>>>,
    /// Tokens of each choice that the destination's front door knows.
    n_known: Vec<usize>,
    /// What the group had generated when it paused.
    outputs: Vec<ChoiceState>,
    link: FrameLink,
    /// The rate limit lets the next background frame go then.
    paced_until: Instant,
    paused_at: Option<Instant>,
    has_sent_frame: bool,
}

impl Mover {
    async fn start(
        worker: &Arc<Worker>,
        request: cluster::MigrateRequest,
        link: FrameLink,
    ) -> Result<(Mover, Vec<MigrationAction>), Failure> {
        worker.identity.check_caller(request.handshake.as_ref())?;
        let id = request_id_from_wire("request_id", &request.request_id)
            .map_err(|error| Failure::Invalid(error.to_string()))?;
        let transfer = TransferId(request.transfer_id);
        let sender = worker.transports.sender(transfer, request.offer.as_ref(), &request.to);
        let sender = sender.map_err(|error| error.failure())?;
        let accepted = cluster::Accepted {
            transport: sender.kind().as_str().to_owned(),
            ..worker.identity.accepted(request.handshake.as_ref())
        };
        let seat = worker.open.begin_move(id)?;
        let room = request.choices.iter().map(|room| room.n_blocks as usize).collect();
        let running = worker.engine.start_move(id, room).await?;
        let n_choices = running.n_choices();
        if request.choices.len() != n_choices {
            let found = request.choices.len();
            return Err(Failure::Invalid(format!(
                "choices has {found} entries, expected {n_choices}"
            )));
        }
        let layout = worker.engine.layout();
        let layer_groups = worker.engine.layer_groups();
        let n_layers = layer_groups.n_layers();
        let choice_plan = |room: &cluster::ChoiceRoom| ChoicePlan {
            first_blocks: first_blocks_from_wire(room.first_block, room.first_blocks.clone()),
            n_blocks: room.n_blocks,
        };
        let plan = TransferPlan {
            layer_groups: layer_groups.of_layers(),
            choices: request.choices.iter().map(choice_plan).collect(),
        };
        let n_groups = layer_groups.n_groups();
        for choice in &plan.choices {
            let n_firsts = choice.first_blocks.len();
            if n_firsts != n_groups {
                return Err(Failure::Invalid(format!(
                    "choices.first_blocks has {n_firsts} entries, expected {n_groups}"
                )));
            }
            if let Some(first) = choice.first_blocks.iter().find(|first| **first > choice.n_blocks) {
                return Err(Failure::Invalid(format!(
                    "choices.first_block is {first}, expected at most its n_blocks, {}",
                    choice.n_blocks
                )));
            }
        }
        let limits = MigrationLimits {
            max_in_flight: MAX_IN_FLIGHT,
            max_blocks_per_frame: (sender.frame_bytes() / layout.layer_block_bytes()).max(1) as u32,
            stall_deadline: nanos(worker.options.stall_deadline),
            resume_deadline: nanos(worker.options.resume_deadline),
            max_stages: worker.options.move_stages,
        };
        let (machine, first) = MigrationSource::new(plan, limits);
        link.push(Frame::Accepted(accepted));
        let mover = Mover {
            worker: Arc::clone(worker),
            id,
            to: request.to,
            seat,
            transfer,
            sender,
            held: Vec::new(),
            trouble: None,
            machine,
            running: Some(running),
            asked: None,
            pinned: (0..n_choices)
                .map(|_| (0..n_layers).map(|_| VecDeque::new()).collect())
                .collect(),
            n_known: request
                .choices
                .iter()
                .map(|choice| choice.n_known_tokens as usize)
                .collect(),
            outputs: Vec::new(),
            paced_until: link.opened_at(),
            link,
            paused_at: None,
            has_sent_frame: false,
        };
        Ok((mover, first))
    }

    async fn run(mut self, first: Vec<MigrationAction>) {
        let heartbeat = self.worker.options.heartbeat;
        let mut heartbeat = interval_at(Instant::now() + heartbeat, heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        self.obey(first).await;
        let (link, outlet) = (self.link.clone(), Arc::clone(&self.seat.open.outlet));
        let mut is_dropped = false;
        while !self.machine.is_closed() {
            if let Some(failure) = self.trouble.take() {
                self.apply(MigrationFact::Interrupted(failure)).await;
                continue;
            }
            let paced_until = self.paced_until;
            let is_paced = !self.machine.is_pausing();
            let deadline = self
                .machine
                .next_deadline()
                .map(|at| link.opened_at() + Duration::from_nanos(at.0));
            let taken = async {
                if is_paced {
                    sleep_until(paced_until).await;
                }
                link.taken().await
            };
            let fact = tokio::select! {
                () = outlet.closed() => MigrationFact::Gone,
                Some(epoch) = self.seat.words.recv() => MigrationFact::Resume(epoch),
                (running, answer) = answered(&mut self.asked), if self.asked.is_some() => {
                    self.asked = None;
                    self.running = Some(running);
                    self.take_answer(answer)
                }
                () = link.closed(), if !is_dropped => {
                    is_dropped = true;
                    self.unpin_sent();
                    MigrationFact::Dropped
                }
                n_taken = taken => {
                    // All but the last, which is applied like any fact.
                    for _ in 1..n_taken {
                        self.apply(MigrationFact::Sent).await;
                    }
                    MigrationFact::Sent
                }
                _ = heartbeat.tick() => MigrationFact::Tick,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => MigrationFact::Tick,
            };
            self.apply(fact).await;
        }
    }

    fn take_answer(&mut self, answer: Result<Answer, Failure>) -> MigrationFact {
        match answer {
            Ok(Answer::Full(stage)) => MigrationFact::Full {
                end: self.take_stage(stage),
            },
            Ok(Answer::Paused(stage, outputs)) => {
                self.paused_at = Some(Instant::now());
                let knows_more = outputs
                    .iter()
                    .zip(&self.n_known)
                    .any(|(choice, &n_known)| n_known > choice.output.len());
                if knows_more {
                    let failure = Failure::Invalid("choices.n_known_tokens is more than were generated".into());
                    return MigrationFact::Interrupted(failure);
                }
                self.outputs = outputs;
                MigrationFact::Paused {
                    end: self.take_stage(stage),
                }
            }
            Err(failure) => MigrationFact::Interrupted(failure),
        }
    }

    /// Keeps what was pinned. Returns one past the last block of each choice.
    fn take_stage(&mut self, stage: MoveStage) -> Vec<u32> {
        let mut ends = Vec::with_capacity(stage.choices.len());
        for (choice, pinned) in stage.choices.into_iter().zip(&mut self.pinned) {
            ends.push(choice.end as u32);
            for (reads, queue) in choice.reads.into_iter().zip(pinned) {
                queue.extend(reads);
            }
        }
        ends
    }

    async fn apply(&mut self, fact: MigrationFact) {
        let now = nanos(self.link.opened_at().elapsed());
        let actions = self.machine.apply(now, fact);
        self.obey(actions).await;
    }

    async fn obey(&mut self, actions: Vec<MigrationAction>) {
        for action in actions {
            match action {
                MigrationAction::PinFull { from } => {
                    self.ask(move |mut running| async move {
                        let answer = running.pin_full(&from).await.map(Answer::Full);
                        (running, answer)
                    });
                }
                MigrationAction::Pause { from } => {
                    self.ask(move |mut running| async move {
                        let answer = running.pause(&from).await;
                        (
                            running,
                            answer.map(|paused| Answer::Paused(paused.stage, paused.outputs)),
                        )
                    });
                }
                MigrationAction::SayMoving => {
                    let moving = cluster::Moving {
                        transfer_id: self.transfer.0,
                        to: self.to.clone(),
                    };
                    // A front door that has gone is heard of as that.
                    let _ = self.seat.open.outlet.send(Event::Moving(moving)).await;
                }
                MigrationAction::SendKv(range, pacing) => self.send_kv(range, pacing),
                MigrationAction::SendState => {
                    let choices = (0..).zip(self.outputs.iter().zip(&self.n_known));
                    let choices = choices.map(|(number, (choice, &n_known))| {
                        let lacking = ChoiceState {
                            output: choice.output[n_known..].to_vec(),
                            finish: choice.finish,
                        };
                        choice_to_wire(number, &lacking)
                    });
                    let choices = choices.collect();
                    self.link.push(Frame::MovedState(cluster::MovedState { choices }));
                }
                MigrationAction::SendProgress => self.link.push(Frame::Progress(cluster::Progress {
                    n_steps: self.worker.engine.n_beats(),
                })),
                MigrationAction::SendEnd(failure) => self.link.end(failure.as_ref()),
                MigrationAction::ResumeDecoding(epoch) => {
                    // Its last block is appended to from here on. Whoever still reads it joins nothing with it.
                    self.unpin_sent();
                    // Both resume a paused group by their drop; a pause that is being asked for is taken back by it.
                    self.asked = None;
                    self.running = None;
                    tracing::debug!(request_id = %self.id, ?epoch, "a moving request goes on here");
                }
                MigrationAction::SayCancelled(failure) => {
                    add(&self.worker.counters.n_moves_failed, 1);
                    tracing::info!(request_id = %self.id, to = self.to, %failure, "move cancelled");
                    let cancelled = cluster::MoveCancelled {
                        transfer_id: self.transfer.0,
                        failure: Some((&failure).into()),
                    };
                    let _ = self.seat.open.outlet.send(Event::MoveCancelled(cancelled)).await;
                }
                MigrationAction::GiveUp(failure) => {
                    add(&self.worker.counters.n_moves_failed, 1);
                    self.seat.open.give_up(failure);
                }
                MigrationAction::Release => {
                    if !self.outputs.is_empty() && self.running.is_some() {
                        add(&self.worker.counters.n_moved_out, 1);
                    }
                    self.asked = None;
                    self.running = None;
                    self.pinned.clear();
                    self.unpin_sent();
                }
            }
        }
    }

    fn ask<F>(&mut self, question: impl FnOnce(RunningMove) -> F)
    where
        F: Future<Output = (RunningMove, Result<Answer, Failure>)> + Send + 'static,
    {
        let running = self.running.take().expect("the engine is asked one thing at a time");
        self.asked = Some(Box::pin(question(running)));
    }

    /// Nothing that was sent is read any more, or it is of no use to who reads it.
    fn unpin_sent(&mut self) {
        self.held.clear();
        self.sender.release();
    }

    fn send_kv(&mut self, range: KvRange, pacing: Pacing) {
        let queue = &mut self.pinned[range.choice as usize][range.layer as usize];
        let blocks: Vec<KvRead> = queue.drain(..range.n_blocks as usize).collect();
        let packed = match self.sender.pack(range, blocks) {
            Ok(packed) => packed,
            Err(error) => {
                self.trouble = Some(error.failure());
                return;
            }
        };
        self.held.extend(packed.pins);
        let counters = &self.worker.counters;
        add(&counters.bytes_sent, packed.n_bytes);
        add(&counters.n_frames_sent, 1);
        if pacing == Pacing::Background {
            let now = nanos(self.worker.started_at.elapsed());
            let next_at = self.worker.pacer.lock().take(now, packed.n_bytes);
            self.paced_until = self.worker.started_at + Duration::from_nanos(next_at.0);
        }
        if !std::mem::replace(&mut self.has_sent_frame, true) {
            self.link.push_moment(Moment::TransferStarted, Instant::now());
        }
        self.link.push(Frame::Kv(packed.frame));
    }
}

async fn answered(asked: &mut Option<Asked>) -> (RunningMove, Result<Answer, Failure>) {
    match asked {
        Some(asked) => asked.await,
        None => std::future::pending().await,
    }
}
