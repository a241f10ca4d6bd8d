//! One request at the front door: carries out what its arbiter says, over one stream at a time.

use std::sync::Arc;

use baton_proto::PROTOCOL_VERSION;
use baton_proto::convert::token_from_wire;
use baton_proto::cluster::{self, ended::How, generate_event::Event};
use baton_scheduler::arbiter::{Arbiter, ArbiterAction, ArbiterFact};
use baton_scheduler::ids::{Epoch, InstanceId, Nanos};
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, Token, TokenLogprobs};
use baton_scheduler::timeline::{Moment, Timeline};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Streaming;

use super::admission::{Admission, QueuePlace, Wanted, place_when_possible};
use super::cluster::{Cluster, Reachable};
use super::front_door::FrontDoorOptions;
use super::{DoorEvent, Submission, Usage};

pub(super) struct RequestDriver {
    cluster: Arc<Cluster>,
    admission: Arc<Admission>,
    options: FrontDoorOptions,
    submission: Submission,
    deadline: Option<Instant>,
    events: mpsc::Sender<DoorEvent>,
    arbiter: Arbiter,
    output: Vec<Token>,
    usage: Usage,
    has_prompt_logprobs: bool,
    /// The last epoch in which a token came, so that its prompt is computed.
    prefilled_in: Option<Epoch>,
    timeline: Timeline,
}

/// A stream to a decode instance.
struct OpenStream {
    epoch: Epoch,
    events: Streaming<cluster::GenerateEvent>,
    decode: InstanceId,
    opened_at: Nanos,
}

/// What the driver waits for.
enum Woken {
    Fact(ArbiterFact),
    Event(cluster::GenerateEvent),
}

impl RequestDriver {
    pub(super) fn new(
        cluster: Arc<Cluster>,
        admission: Arc<Admission>,
        options: FrontDoorOptions,
        submission: Submission,
        events: mpsc::Sender<DoorEvent>,
    ) -> RequestDriver {
        let usage = Usage {
            n_prompt_tokens: submission.request.prompt_ids.len() as u32,
            ..Usage::default()
        };
        let timeline = submission.timeline.clone();
        let deadline = submission.deadline.map(|left| Instant::now() + left);
        RequestDriver {
            cluster,
            admission,
            options,
            submission,
            deadline,
            events,
            arbiter: Arbiter::new(),
            output: Vec::new(),
            usage,
            has_prompt_logprobs: false,
            prefilled_in: None,
            timeline,
        }
    }

    /// To the terminal state. Every wait ends by the client's leaving, the request's deadline, or its own bound.
    pub(super) async fn run(mut self, place: QueuePlace) {
        let admission = Arc::clone(&self.admission);
        let cluster = Arc::clone(&self.cluster);
        let request = self.submission.request.clone();
        let mut wanted = Wanted::new(request);
        let first = self.placed(admission.place_in_turn(place, &cluster, &mut wanted)).await;
        let mut stream = None;
        let mut reachable = None;
        let mut fact = Some(match first {
            Ok((placed, admitted_at)) => {
                self.timeline.mark(Moment::Admitted, admitted_at);
                reachable = Some(placed);
                ArbiterFact::Placed
            }
            Err(fact) => fact,
        });
        loop {
            let mut next = None;
            for action in fact.take().map(|fact| self.arbiter.apply(fact)).unwrap_or_default() {
                match action {
                    ArbiterAction::Open(epoch) => {
                        self.timeline.mark(Moment::Placed, self.cluster.now());
                        let placed = reachable.take().expect("the arbiter opens what was placed");
                        match self.open(epoch, placed).await {
                            Ok(opened) => stream = Some(opened),
                            Err(fact) => next = Some(fact),
                        }
                    }
                    ArbiterAction::Close => {
                        stream = None;
                        self.cluster.close(self.submission.request.id);
                    }
                    ArbiterAction::Place => {
                        wanted.go_on_after(&self.output, self.arbiter.avoided());
                        next = Some(match self.placed(place_when_possible(&cluster, &mut wanted)).await {
                            Ok(placed) => {
                                reachable = Some(placed);
                                ArbiterFact::Placed
                            }
                            Err(fact) => fact,
                        });
                    }
                    ArbiterAction::Deliver | ArbiterAction::Discard => unreachable!("tokens are applied as they come"),
                    ArbiterAction::Finish(finish) => {
                        self.finish(finish).await;
                        return;
                    }
                    ArbiterAction::Fail(failure) => {
                        self.end(DoorEvent::Failed(failure)).await;
                        return;
                    }
                }
            }
            if self.arbiter.is_ended() {
                return;
            }
            fact = match next {
                Some(fact) => Some(fact),
                None => match self.wait(&mut stream).await {
                    Woken::Fact(fact) => Some(fact),
                    Woken::Event(event) => {
                        let stream = stream.as_ref().expect("an event comes from an open stream");
                        self.take_event(stream.epoch, stream.opened_at, stream.decode.clone(), event)
                            .await
                    }
                },
            };
        }
    }

    /// A placement, unless the client, the deadline or the bound of the wait comes first.
    async fn placed<T>(&self, placing: impl Future<Output = T>) -> Result<T, ArbiterFact> {
        tokio::select! {
            placed = placing => Ok(placed),
            fact = self.interrupted() => Err(fact),
            () = tokio::time::sleep(self.options.max_queue_wait) => Err(ArbiterFact::NoRoom),
        }
    }

    async fn interrupted(&self) -> ArbiterFact {
        tokio::select! {
            () = self.events.closed() => ArbiterFact::ClientGone,
            () = sleep_until(self.deadline) => ArbiterFact::DeadlinePassed,
        }
    }

    async fn wait(&self, stream: &mut Option<OpenStream>) -> Woken {
        let Some(open) = stream else {
            return Woken::Fact(self.interrupted().await);
        };
        tokio::select! {
            fact = self.interrupted() => Woken::Fact(fact),
            message = open.events.message() => match message {
                Ok(Some(event)) => Woken::Event(event),
                Ok(None) => Woken::Fact(lost(open.epoch, &open.decode, "its stream ended without a typed end")),
                Err(status) => {
                    let reason = format!("{}: {}", status.code(), status.message());
                    Woken::Fact(lost(open.epoch, &open.decode, &reason))
                }
            },
        }
    }

    async fn open(&mut self, epoch: Epoch, placed: Reachable) -> Result<OpenStream, ArbiterFact> {
        let Reachable {
            placement,
            mut decode,
            decode_incarnation,
            fingerprint,
            prefill,
        } = placed;
        tracing::debug!(
            request_id = %self.submission.request.id,
            label = %self.submission.label,
            epoch = epoch.0,
            decode = %placement.decode,
            prefill = placement.prefill.as_ref().map(|id| id.to_string()),
            "placed"
        );
        let state = PortableState {
            request: self.submission.request.clone(),
            choices: vec![ChoiceState {
                output: self.output.clone(),
                finish: None,
            }],
            epoch,
        };
        let request = cluster::GenerateRequest {
            handshake: Some(cluster::Handshake {
                protocol_version: PROTOCOL_VERSION,
                fingerprint,
                callee_incarnation: decode_incarnation.0,
            }),
            state: Some((&state).into()),
            prefill,
        };
        let opened_at = self.cluster.now();
        let opening = tokio::time::timeout(self.cluster.call_timeout(), decode.generate(request));
        let opened = tokio::select! {
            opened = opening => opened,
            fact = self.interrupted() => return Err(fact),
        };
        match opened {
            Ok(Ok(response)) => Ok(OpenStream {
                epoch,
                events: response.into_inner(),
                decode: placement.decode,
                opened_at,
            }),
            Ok(Err(status)) => {
                let reason = format!("{}: {}", status.code(), status.message());
                Err(lost(epoch, &placement.decode, &reason))
            }
            Err(_) => Err(lost(epoch, &placement.decode, "no answer to the call")),
        }
    }

    /// What an event of the stream means to the arbiter, if anything.
    async fn take_event(
        &mut self,
        epoch: Epoch,
        opened_at: Nanos,
        decode: InstanceId,
        event: cluster::GenerateEvent,
    ) -> Option<ArbiterFact> {
        match event.event? {
            Event::Accepted(_) => None,
            Event::Moment(moment) => {
                self.mark(moment, opened_at);
                None
            }
            Event::PromptLogprobs(logprobs) => {
                if std::mem::replace(&mut self.has_prompt_logprobs, true) {
                    return None;
                }
                let logprobs: Vec<TokenLogprobs> = logprobs.tokens.into_iter().map(Into::into).collect();
                self.deliver(DoorEvent::PromptLogprobs(logprobs)).await
            }
            Event::Token(token) => self.take_token(epoch, token_from_wire(token).1).await,
            Event::ChoiceFinished(_) | Event::Moving(_) | Event::MoveCancelled(_) => None,
            Event::Ended(ended) => {
                self.usage.n_cached_tokens = self.usage.n_cached_tokens.max(ended.n_cached_tokens);
                Some(self.ended(epoch, decode, ended))
            }
        }
    }

    async fn take_token(&mut self, epoch: Epoch, token: Token) -> Option<ArbiterFact> {
        let mut unsettled = None;
        for action in self.arbiter.apply(ArbiterFact::Token {
            epoch,
            index: token.index,
        }) {
            match action {
                ArbiterAction::Deliver => {
                    if self.prefilled_in != Some(epoch) {
                        self.prefilled_in = Some(epoch);
                        self.cluster.prefill_done(self.submission.request.id);
                    }
                    if self.output.is_empty() {
                        self.timeline.mark(Moment::FirstToken, self.cluster.now());
                    }
                    self.output.push(token.clone());
                    unsettled = self.deliver(DoorEvent::Token(token.clone())).await;
                }
                ArbiterAction::Fail(failure) => self.end(DoorEvent::Failed(failure)).await,
                ArbiterAction::Close => self.cluster.close(self.submission.request.id),
                ArbiterAction::Discard | ArbiterAction::Place | ArbiterAction::Open(_) | ArbiterAction::Finish(_) => {}
            }
        }
        unsettled
    }

    fn ended(&self, epoch: Epoch, decode: InstanceId, ended: cluster::Ended) -> ArbiterFact {
        let failed = |failure: Failure, blamed: InstanceId| ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(blamed),
        };
        match ended.how {
            Some(How::Finish(finish)) => match Finish::try_from(finish) {
                Ok(finish) => ArbiterFact::Finished { epoch, finish },
                Err(error) => failed(Failure::Internal(error.to_string()), decode),
            },
            Some(How::Failure(failure)) => {
                let blamed = match failure.instance_id.as_str() {
                    "" => decode,
                    name => InstanceId::new(name),
                };
                let failure = Failure::from(failure);
                if matches!(failure, Failure::Busy(_)) {
                    self.cluster.busy(&blamed);
                }
                // The instance says cancelled only when its stream was closed, and ours is open.
                let failure = match failure {
                    Failure::Cancelled => Failure::InstanceLost("cancelled by the instance".into()),
                    other => other,
                };
                failed(failure, blamed)
            }
            None => failed(Failure::Internal("a typed end of an unknown kind".into()), decode),
        }
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

    /// Hands an event to the client; a client that takes nothing for too long counts as gone.
    async fn deliver(&self, event: DoorEvent) -> Option<ArbiterFact> {
        match self.events.send_timeout(event, self.options.client_stall).await {
            Ok(()) => None,
            Err(_) => Some(ArbiterFact::ClientGone),
        }
    }

    async fn finish(&mut self, finish: Finish) {
        self.timeline.mark(Moment::Finished, self.cluster.now());
        self.usage.n_completion_tokens = self.output.len() as u32;
        let event = DoorEvent::Ended {
            finish,
            usage: self.usage,
            timeline: self.timeline.clone(),
        };
        self.end(event).await;
    }

    async fn end(&mut self, event: DoorEvent) {
        self.cluster.close(self.submission.request.id);
        if let DoorEvent::Failed(failure) = &event {
            tracing::info!(
                request_id = %self.submission.request.id,
                label = %self.submission.label,
                n_tokens = self.output.len(),
                %failure,
                "request failed"
            );
        }
        let _ = self.deliver(event).await;
    }
}

fn lost(epoch: Epoch, instance: &InstanceId, reason: &str) -> ArbiterFact {
    ArbiterFact::Failed {
        epoch,
        failure: Failure::InstanceLost(format!("{instance}: {reason}")),
        blamed: Some(instance.clone()),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending::<()>().await,
    }
}
