//! One request at the front door: carries out what its arbiter says, over the stream that speaks and, while it moves, over
//! its destination's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster::{self, ended::How, generate_event::Event};
use baton_proto::convert::token_from_wire;
use baton_scheduler::arbiter::{Arbiter, ArbiterAction, ArbiterFact};
use baton_scheduler::ids::{Epoch, InstanceId, Nanos};
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, Token, TokenLogprobs};
use baton_scheduler::timeline::{Moment, Timeline};
use futures::FutureExt as _;
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

    /// A busy front door may read the destination's first word before the source's word of the pause, which was sent before it.
    async fn hear_what_the_source_has_said(&mut self) {
        while self.order.as_ref().is_some_and(|order| order.pauses_at.is_none()) && self.speaking.is_some() {
            let Some(said) = next(&mut self.speaking).now_or_never() else {
                return;
            };
            let is_last = said.is_err();
            self.hear(Stream::Speaking, said).await;
            if is_last {
                return;
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

    fn refuse_order(&self, order: MoveOrder, error: MoveError) {
        self.metrics.ended(order.reason, MoveOutcome::Refused);
        order.refuse(error);
    }

    fn take_order(&mut self, order: MoveOrder) {
        if self.order.is_some() {
            return self.refuse_order(order, MoveError::Refused("a move of it is under way".to_owned()));
        }
        let Some(source) = &self.speaking else {
            return self.refuse_order(order, MoveError::Refused("it is being placed".to_owned()));
        };
        let longest = self.choices.iter().map(|choice| choice.output.len() as u32).max();
        let n_tokens = self.usage.n_prompt_tokens + longest.unwrap_or(0);
        let n_running = self.choices.iter().filter(|choice| choice.finish.is_none()).count();
        let request = &self.submission.request;
        let to = order.to.as_ref();
        match self
            .cluster
            .destination(request, &source.instance, to, n_tokens, n_running as u32)
        {
            Ok((to, called)) => {
                tracing::debug!(
                    request_id = %self.submission.request.id,
                    from = %source.instance,
                    %to,
                    reason = order.reason.as_str(),
                    "move wanted"
                );
                self.order = Some(Order {
                    from: source.instance.clone(),
                    to,
                    destination: Some(called),
                    reason: order.reason,
                    began: Instant::now(),
                    pauses_at: None,
                    failure: None,
                    reply: order.reply,
                });
                self.facts.push_back(ArbiterFact::MoveWanted);
            }
            Err(error) => self.refuse_order(order, error),
        }
    }

    fn attach(&mut self, epoch: Epoch) {
        let state = self.state(epoch);
        let order = self.order.as_mut().expect("a move was ordered");
        let destination = order.destination.take().expect("a destination is attached to once");
        let source = self
            .speaking
            .as_ref()
            .expect("a request moves from where it speaks")
            .peer();
        self.attaching = Some((epoch, streams::attach(&self.cluster, &state, source, destination)));
        let to = order.to.clone();
        self.listed.request.update(|progress| {
            progress.stage = RequestStage::Moving;
            progress.epoch = epoch.0;
            progress.destination = Some(to);
        });
    }

    fn detach(&mut self) {
        (self.attached, self.attaching) = (None, None);
        self.cluster.move_ended(self.submission.request.id);
        self.listed.request.update(|progress| {
            progress.stage = RequestStage::Decode;
            progress.destination = None;
        });
        // A move that the request's end overtakes has not failed; `end` answers whoever ordered it.
        if self.arbiter.is_ended() {
            return;
        }
        if let Some(order) = self.order.take() {
            self.metrics.ended(order.reason, MoveOutcome::Failed);
            let reason = match order.failure {
                Some(failure) => failure.to_string(),
                None => "it was given up by the source, or not complete in time".to_owned(),
            };
            tracing::info!(
                request_id = %self.submission.request.id,
                from = %order.from,
                to = %order.to,
                reason,
                "move failed"
            );
            let to = order.to;
            let _ = order.reply.send(Err(MoveError::Failed { to, reason }));
        }
    }

    fn settle(&mut self) {
        self.speaking = self.attached.take();
        let Some(order) = self.order.take() else { return };
        self.cluster.moved(self.submission.request.id, &order.to);
        // The destination had the prompt computed before.
        self.prefilled_in = Some(self.arbiter.epoch());
        let n_moves = self.arbiter.n_moves();
        self.listed.request.update(|progress| {
            progress.stage = RequestStage::Decode;
            progress.decode = progress.destination.take();
            progress.prefill = None;
            progress.n_moves = n_moves;
        });
        tracing::debug!(request_id = %self.submission.request.id, from = %order.from, to = %order.to, "moved");
        let took = order.began.elapsed();
        let paused = order.pauses_at.map_or(Duration::ZERO, |at| at.elapsed());
        self.metrics.settled(order.reason, took, paused);
        let moved = Moved {
            from: order.from,
            to: order.to,
            took,
        };
        let _ = order.reply.send(Ok(moved));
    }

    fn destination_failed(&mut self, epoch: Epoch, failure: Failure, blamed: InstanceId) {
        if let Some(order) = &mut self.order {
            order.failure = Some(failure.clone());
        }
        self.facts.push_back(ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(blamed),
        });
    }

    /// What one of the streams said, or that it broke.
    async fn hear(&mut self, from: Stream, said: Result<cluster::GenerateEvent, Failure>) {
        let stream = match from {
            Stream::Speaking => &self.speaking,
            Stream::Attached => &self.attached,
        };
        let stream = stream.as_ref().expect("what was heard came from an open stream");
        let (instance, opened_at) = (stream.instance.clone(), stream.opened_at);
        match (said, from) {
            (Ok(event), _) => self.take_event(from, instance, opened_at, event).await,
            (Err(failure), Stream::Speaking) => self.facts.push_back(ArbiterFact::Failed {
                epoch: self.arbiter.epoch(),
                failure,
                blamed: Some(instance),
            }),
            (Err(failure), Stream::Attached) => {
                self.attached = None;
                self.destination_failed(self.arbiter.newest_epoch(), failure, instance);
            }
        }
    }

    async fn take_event(
        &mut self,
        from: Stream,
        instance: InstanceId,
        opened_at: Nanos,
        event: cluster::GenerateEvent,
    ) {
        let epoch = Epoch(event.epoch);
        let Some(event) = event.event else { return };
        if from == Stream::Attached && streams::is_joined(&event) {
            return self.facts.push_back(ArbiterFact::Joined { epoch });
        }
        match event {
            Event::Accepted(_) => {}
            // The moments of a request that moves are those of its placement.
            Event::Moment(moment) if from == Stream::Speaking && self.arbiter.n_moves() == 0 => {
                self.mark(moment, opened_at);
            }
            Event::Moment(_) => {}
            Event::PromptLogprobs(logprobs) => {
                if !std::mem::replace(&mut self.has_prompt_logprobs, true) {
                    let logprobs: Vec<TokenLogprobs> = logprobs.tokens.into_iter().map(Into::into).collect();
                    self.deliver(DoorEvent::PromptLogprobs(logprobs));
                }
            }
            Event::Token(token) => {
                let (choice, token) = token_from_wire(token);
                self.take_token(epoch, choice, token).await;
            }
            Event::ChoiceFinished(finished) => match finished.finish.map(Finish::try_from) {
                Some(Ok(finish)) => self.take_choice_finished(epoch, finished.choice, finish).await,
                Some(Err(_)) | None => self.facts.push_back(ArbiterFact::Failed {
                    epoch,
                    failure: Failure::Internal("an end of a choice without a reason".to_owned()),
                    blamed: Some(instance),
                }),
            },
            Event::Moving(_) => {
                if let Some(order) = &mut self.order {
                    order.pauses_at = Some(Instant::now());
                }
                self.facts.push_back(ArbiterFact::Moving { epoch });
            }
            Event::MoveCancelled(cancelled) => {
                if let Some(order) = &mut self.order {
                    order.failure = cancelled.failure.map(Into::into);
                }
                self.facts.push_back(ArbiterFact::MoveCancelled { epoch });
            }
            Event::Ended(ended) => {
                self.usage.n_cached_tokens = self.usage.n_cached_tokens.max(ended.n_cached_tokens);
                self.take_end(epoch, from, instance, ended).await;
            }
        }
    }

    async fn take_token(&mut self, epoch: Epoch, choice: u32, token: Token) {
        let index = token.index;
        let fact = ArbiterFact::Token { epoch, choice, index };
        for action in self.arbiter.apply(self.cluster.now(), fact) {
            match action {
                ArbiterAction::Deliver => {
                    if self.prefilled_in != Some(self.arbiter.epoch()) {
                        self.prefilled_in = Some(self.arbiter.epoch());
                        self.cluster.prefill_done(self.submission.request.id);
                    }
                    if self.choices.iter().all(|choice| choice.output.is_empty()) {
                        self.timeline.mark(Moment::FirstToken, self.cluster.now());
                    }
                    self.choices[choice as usize].output.push(token.clone());
                    let is_decoding = self
                        .choices
                        .iter()
                        .all(|choice| !choice.output.is_empty() || choice.finish.is_some());
                    self.listed.request.update(|progress| {
                        progress.n_output_tokens += 1;
                        if progress.stage == RequestStage::Prefill && is_decoding {
                            progress.stage = RequestStage::Decode;
                            progress.prefill = None;
                        }
                    });
                    let token = token.clone();
                    self.deliver(DoorEvent::Token { choice, token });
                }
                ArbiterAction::Discard => {
                    self.metrics.stale.inc();
                }
                other => self.obey(vec![other]).await,
            }
        }
    }

    async fn take_choice_finished(&mut self, epoch: Epoch, choice: u32, finish: Finish) {
        let fact = ArbiterFact::ChoiceFinished { epoch, choice };
        for action in self.arbiter.apply(self.cluster.now(), fact) {
            match action {
                ArbiterAction::Deliver => {
                    self.choices[choice as usize].finish = Some(finish);
                    self.deliver(DoorEvent::ChoiceFinished { choice, finish });
                }
                ArbiterAction::Discard => {
                    self.metrics.stale.inc();
                }
                other => self.obey(vec![other]).await,
            }
        }
    }

    async fn take_end(&mut self, epoch: Epoch, from: Stream, instance: InstanceId, ended: cluster::Ended) {
        let failed = |failure: Failure, blamed: InstanceId| ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(blamed),
        };
        let fact = match ended.how {
            Some(How::Finish(finish)) => match Finish::try_from(finish) {
                Ok(finish) => {
                    // A peer of version 1 has one choice and says its end only so.
                    for choice in 0..self.choices.len() {
                        if self.choices[choice].finish.is_none() {
                            self.take_choice_finished(epoch, choice as u32, finish).await;
                        }
                    }
                    ArbiterFact::Finished { epoch, finish }
                }
                Err(error) => failed(Failure::Internal(error.to_string()), instance),
            },
            Some(How::Failure(failure)) => {
                let blamed = match failure.instance_id.as_str() {
                    "" => instance.clone(),
                    name => InstanceId::new(name),
                };
                let failure = Failure::from(failure);
                let is_own = from == Stream::Speaking || blamed == instance;
                if matches!(failure, Failure::Busy(_)) && is_own {
                    self.cluster.busy(&blamed);
                }
                // The instance says cancelled only when its stream was closed, and ours is open.
                let failure = match failure {
                    Failure::Cancelled => Failure::InstanceLost("cancelled by the instance".into()),
                    other => other,
                };
                if from == Stream::Attached {
                    return self.destination_failed(epoch, failure, blamed);
                }
                failed(failure, blamed)
            }
            None => failed(Failure::Internal("a typed end of an unknown kind".into()), instance),
        };
        self.facts.push_back(fact);
    }

    fn mark(&mut self, moment: cluster::MomentReached, opened_at: Nanos) {
        if let Some(&known) = Moment::ALL.get(moment.moment as usize) {
            // A peer's clock counts from its own receipt: never past our now.
            let at = opened_at
                .saturating_add(Nanos(moment.elapsed_ns))
                .min(self.cluster.now());
            self.timeline.mark(known, at);
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
