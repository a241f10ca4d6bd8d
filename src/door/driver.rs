//! One request at the front door: carries out what its arbiter says, over the stream that speaks and, while it moves, over
//! its destination's.

mod hearing;
mod moving;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster;
use baton_scheduler::arbiter::{Arbiter, ArbiterAction, ArbiterFact};
use baton_scheduler::ids::{Epoch, InstanceId, Nanos};
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState};
use baton_scheduler::timeline::{Moment, Timeline};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::admission::{Admission, QueuePlace, Wanted, place_when_possible};
use super::cluster::{Called, Cluster, Reachable};
use super::front_door::FrontDoorOptions;
use super::move_metrics::{MoveMetrics, MoveOutcome};
use super::moves::{Listed, MoveError, MoveOrder, MoveReason, Moved, RequestStage};
use super::outbox::Outbox;
use super::streams::{self, OpenStream, Opening};
use super::{DoorEvent, Submission, Usage};

/// Between a second failure in a row and the next placement.
pub(super) const PAUSE_BEFORE_LAST_ATTEMPTS: Duration = Duration::from_millis(300);

pub(super) struct RequestDriver {
    cluster: Arc<Cluster>,
    admission: Arc<Admission>,
    options: FrontDoorOptions,
    submission: Submission,
    deadline: Option<Instant>,
    outbox: Outbox,
    listed: Listed,
    metrics: MoveMetrics,
    arbiter: Arbiter,
    wanted: Wanted,
    /// What was delivered.
    choices: Vec<ChoiceState>,
    /// When the wait for a place is over, refusals of instances that were full included.
    place_by: Option<Instant>,
    placed: Option<Reachable>,
    speaking: Option<OpenStream>,
    attached: Option<OpenStream>,
    /// The call to the destination, until it is answered.
    attaching: Option<(Epoch, Opening)>,
    resuming: Option<(Epoch, BoxFuture<'static, Result<(), Failure>>)>,
    order: Option<Order>,
    facts: VecDeque<ArbiterFact>,
    usage: Usage,
    has_prompt_logprobs: bool,
    /// The last epoch in which a token came, so that its prompt is computed.
    prefilled_in: Option<Epoch>,
    timeline: Timeline,
}

/// A move under way.
struct Order {
    from: InstanceId,
    to: InstanceId,
    destination: Option<Called>,
    reason: MoveReason,
    began: Instant,
    /// When the source said that it is about to pause.
    pauses_at: Option<Instant>,
    /// Why the destination failed, when it said so.
    failure: Option<Failure>,
    reply: oneshot::Sender<Result<Moved, MoveError>>,
}

/// What the driver waits for.
enum Woken {
    Fact(ArbiterFact),
    Speaking(Result<cluster::GenerateEvent, Failure>),
    Attached(Result<cluster::GenerateEvent, Failure>),
    Attach(Epoch, Box<Result<OpenStream, (Failure, InstanceId)>>),
    Resumed(Epoch, Result<(), Failure>),
    Ordered(MoveOrder),
}

/// Which of the two streams.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Speaking,
    Attached,
}

impl RequestDriver {
    pub(super) fn new(
        cluster: Arc<Cluster>,
        admission: Arc<Admission>,
        options: FrontDoorOptions,
        submission: Submission,
        events: mpsc::Sender<DoorEvent>,
        listed: Listed,
        metrics: MoveMetrics,
    ) -> RequestDriver {
        let usage = Usage {
            n_prompt_tokens: submission.request.prompt_ids.len() as u32,
            ..Usage::default()
        };
        let n = submission.request.sampling.n;
        // Each choice's tokens and end, log-probabilities of the prompt, and the terminal event.
        let max_events = n as usize * (submission.request.sampling.max_tokens as usize + 1) + 2;
        let outbox = Outbox::new(events, max_events, options.client_stall);
        let move_deadline = Nanos(options.move_deadline.as_nanos() as u64);
        RequestDriver {
            cluster,
            admission,
            options,
            deadline: submission.deadline.map(|left| Instant::now() + left),
            outbox,
            listed,
            metrics,
            arbiter: Arbiter::new(n, move_deadline),
            wanted: Wanted::new(submission.request.clone(), submission.objectives),
            choices: vec![ChoiceState::default(); n as usize],
            place_by: None,
            placed: None,
            speaking: None,
            attached: None,
            attaching: None,
            resuming: None,
            order: None,
            facts: VecDeque::new(),
            usage,
            has_prompt_logprobs: false,
            prefilled_in: None,
            timeline: submission.timeline.clone(),
            submission,
        }
    }

    /// To the terminal state. Every wait ends by the client's leaving, the request's deadline, or its own bound.
    pub(super) async fn run(mut self, place: QueuePlace) {
        let fact = self.place_first(place).await;
        self.facts.push_back(fact);
        loop {
            while let Some(fact) = self.facts.pop_front() {
                let actions = self.arbiter.apply(self.cluster.now(), fact);
                self.obey(actions).await;
            }
            if self.arbiter.is_ended() {
                // Nothing is held anywhere for a request that has ended, however slow its client is.
                return self.into_outbox().finish().await;
            }
            match self.wait().await {
                Woken::Fact(fact) => self.facts.push_back(fact),
                Woken::Speaking(said) => self.hear(Stream::Speaking, said).await,
                Woken::Attached(said) => {
                    self.hear_what_the_source_has_said().await;
                    self.hear(Stream::Attached, said).await;
                }
                Woken::Attach(epoch, opened) => {
                    self.attaching = None;
                    match *opened {
                        Ok(opened) => self.attached = Some(opened),
                        Err((failure, blamed)) => self.destination_failed(epoch, failure, blamed),
                    }
                }
                Woken::Resumed(epoch, resumed) => {
                    self.resuming = None;
                    if let Err(failure) = resumed {
                        self.facts.push_back(ArbiterFact::ResumeFailed { epoch, failure });
                    }
                }
                Woken::Ordered(order) => self.take_order(order),
            }
        }
    }

    fn into_outbox(self) -> Outbox {
        self.outbox
    }

    /// The request as it came, to be placed.
    fn wanted_anew(&self) -> Wanted {
        Wanted::new(self.submission.request.clone(), self.submission.objectives)
    }

    async fn place_first(&mut self, place: QueuePlace) -> ArbiterFact {
        let (admission, cluster) = (Arc::clone(&self.admission), Arc::clone(&self.cluster));
        let anew = self.wanted_anew();
        let mut wanted = std::mem::replace(&mut self.wanted, anew);
        let placing = admission.place_in_turn(place, self.submission.priority, &cluster, &mut wanted);
        match self.placed(placing).await {
            Ok((placed, admitted_at)) => {
                self.timeline.mark(Moment::Admitted, admitted_at);
                self.placed = Some(placed);
                ArbiterFact::Placed
            }
            Err(fact) => fact,
        }
    }

    async fn place_again(&mut self) -> ArbiterFact {
        let cluster = Arc::clone(&self.cluster);
        let anew = self.wanted_anew();
        let mut wanted = std::mem::replace(&mut self.wanted, anew);
        wanted.go_on_after(&self.choices, self.arbiter.avoided());
        if !self.arbiter.was_refused() {
            self.place_by = None;
        }
        // Twice refused or lost in a row: whoever died may not have been missed yet.
        let pause = if self.arbiter.n_attempts() > 1 {
            PAUSE_BEFORE_LAST_ATTEMPTS
        } else {
            Duration::ZERO
        };
        let placing = async {
            tokio::time::sleep(pause).await;
            place_when_possible(&cluster, &mut wanted).await
        };
        match self.placed(placing).await {
            Ok(placed) => {
                self.placed = Some(placed);
                ArbiterFact::Placed
            }
            Err(fact) => fact,
        }
    }

    /// A placement, unless the client, the deadline or the bound of the wait comes first.
    async fn placed<T>(&mut self, placing: impl Future<Output = T>) -> Result<T, ArbiterFact> {
        let max_queue_wait = self.options.max_queue_wait;
        let place_by = *self.place_by.get_or_insert_with(|| Instant::now() + max_queue_wait);
        tokio::select! {
            // The bound first: refusals that come at once must not outrun it.
            biased;
            () = tokio::time::sleep_until(place_by) => Err(ArbiterFact::NoRoom),
            fact = interrupted(&mut self.outbox, self.deadline) => Err(fact),
            placed = placing => Ok(placed),
        }
    }

    async fn wait(&mut self) -> Woken {
        let tick = self.arbiter.next_tick();
        let tick_in = tick.map(|at| Duration::from_nanos(at.saturating_sub(self.cluster.now()).0));
        tokio::select! {
            fact = interrupted(&mut self.outbox, self.deadline) => Woken::Fact(fact),
            said = next(&mut self.speaking), if self.speaking.is_some() => Woken::Speaking(said),
            said = next(&mut self.attached), if self.attached.is_some() => Woken::Attached(said),
            (epoch, opened) = answer(&mut self.attaching), if self.attaching.is_some() => {
                Woken::Attach(epoch, Box::new(opened))
            }
            (epoch, resumed) = answer(&mut self.resuming), if self.resuming.is_some() => Woken::Resumed(epoch, resumed),
            Some(order) = self.listed.orders.recv() => Woken::Ordered(order),
            () = tokio::time::sleep(tick_in.unwrap_or_default()), if tick_in.is_some() => {
                Woken::Fact(ArbiterFact::Tick)
            }
        }
    }

    async fn obey(&mut self, actions: Vec<ArbiterAction>) {
        for action in actions {
            match action {
                ArbiterAction::Place => {
                    self.metrics.replays.inc();
                    self.cluster.close(self.submission.request.id);
                    self.listed.request.update(|progress| {
                        progress.stage = RequestStage::Queued;
                        (progress.decode, progress.prefill) = (None, None);
                    });
                    let fact = self.place_again().await;
                    self.facts.push_back(fact);
                }
                ArbiterAction::Open(epoch) => self.open(epoch).await,
                ArbiterAction::Close => {
                    self.speaking = None;
                    self.resuming = None;
                    // While it moves, the placement goes on at the destination.
                    if self.order.is_none() {
                        self.cluster.close(self.submission.request.id);
                    }
                }
                ArbiterAction::Attach(epoch) => self.attach(epoch),
                ArbiterAction::Detach => self.detach(),
                ArbiterAction::Settle => self.settle(),
                ArbiterAction::RefuseMove(reason) => {
                    if let Some(order) = self.order.take() {
                        self.metrics.ended(order.reason, MoveOutcome::Refused);
                        self.cluster.move_ended(self.submission.request.id);
                        let _ = order.reply.send(Err(MoveError::Refused(reason.to_owned())));
                    }
                }
                ArbiterAction::Resume(epoch) => {
                    let state = self.state(epoch);
                    let source = self.speaking.as_ref().expect("a source that can resume has its stream");
                    self.resuming = Some((epoch, streams::resume(&self.cluster, source, &state, epoch)));
                    self.listed.request.update(|progress| progress.epoch = epoch.0);
                }
                ArbiterAction::Deliver | ArbiterAction::Discard => unreachable!("tokens are applied as they come"),
                ArbiterAction::Finish(finish) => self.finish(finish),
                ArbiterAction::Fail(failure) => self.end(DoorEvent::Failed(failure)),
            }
        }
    }

    /// The request as the client has it, for an instance that is to go on in `epoch`.
    fn state(&self, epoch: Epoch) -> PortableState {
        PortableState {
            request: self.submission.request.clone(),
            choices: self.choices.clone(),
            epoch,
        }
    }

    async fn open(&mut self, epoch: Epoch) {
        self.timeline.mark(Moment::Placed, self.cluster.now());
        let placed = self.placed.take().expect("the arbiter opens what was placed");
        let placement = placed.placement.clone();
        tracing::debug!(
            request_id = %self.submission.request.id,
            label = %self.submission.label,
            epoch = epoch.0,
            decode = %placement.decode,
            prefill = placement.prefill.as_ref().map(|id| id.to_string()),
            "placed"
        );
        self.listed.request.update(|progress| {
            progress.stage = RequestStage::Prefill;
            progress.epoch = epoch.0;
            progress.decode = Some(placement.decode.clone());
            progress.prefill = placement.prefill.clone();
        });
        let opening = streams::generate(&self.cluster, &self.state(epoch), placed);
        let opened = tokio::select! {
            opened = opening => opened,
            fact = interrupted(&mut self.outbox, self.deadline) => {
                self.facts.push_back(fact);
                return;
            }
        };
        match opened {
            Ok(stream) => self.speaking = Some(stream),
            Err((failure, blamed)) => self.facts.push_back(ArbiterFact::Failed {
                epoch,
                failure,
                blamed: Some(blamed),
            }),
        }
    }

    /// Hands an event to the client, when it takes it.
    fn deliver(&mut self, event: DoorEvent) {
        if let Err(error) = self.outbox.push(event) {
            self.facts.push_back(ArbiterFact::Failed {
                epoch: self.arbiter.epoch(),
                failure: Failure::Internal(error.to_string()),
                blamed: None,
            });
        }
    }

    fn finish(&mut self, finish: Finish) {
        self.timeline.mark(Moment::Finished, self.cluster.now());
        self.usage.n_completion_tokens = self.choices.iter().map(|choice| choice.output.len() as u32).sum();
        let event = DoorEvent::Ended {
            finish,
            usage: self.usage,
            timeline: self.timeline.clone(),
        };
        self.end(event);
    }

    fn end(&mut self, event: DoorEvent) {
        self.cluster.close(self.submission.request.id);
        if let Some(order) = self.order.take() {
            self.metrics.ended(order.reason, MoveOutcome::Overtaken);
            let _ = order
                .reply
                .send(Err(MoveError::Refused("the request has ended".to_owned())));
        }
        if let DoorEvent::Failed(failure) = &event {
            tracing::info!(
                request_id = %self.submission.request.id,
                label = %self.submission.label,
                n_tokens = self.choices.iter().map(|choice| choice.output.len()).sum::<usize>(),
                %failure,
                "request failed"
            );
        }
        self.deliver(event);
    }
}

async fn next(stream: &mut Option<OpenStream>) -> Result<cluster::GenerateEvent, Failure> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

async fn answer<T>(asked: &mut Option<(Epoch, BoxFuture<'static, T>)>) -> (Epoch, T) {
    match asked {
        Some((epoch, asked)) => (*epoch, asked.await),
        None => std::future::pending().await,
    }
}

/// What ends the request at any time. What the client has not taken is handed over meanwhile.
async fn interrupted(outbox: &mut Outbox, deadline: Option<Instant>) -> ArbiterFact {
    tokio::select! {
        () = outbox.client_gone() => ArbiterFact::ClientGone,
        () = sleep_until(deadline) => ArbiterFact::DeadlinePassed,
    }
}

pub(super) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending::<()>().await,
    }
}
