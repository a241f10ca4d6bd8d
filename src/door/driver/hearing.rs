//! What a request hears on the stream that speaks and on that of its destination, made into facts for its arbiter.

use baton_proto::cluster;
use baton_proto::cluster::ended::How;
use baton_proto::cluster::generate_event::Event;
use baton_proto::convert::token_from_wire;
use baton_scheduler::arbiter::{ArbiterAction, ArbiterFact};
use baton_scheduler::ids::{Epoch, InstanceId, Nanos};
use baton_scheduler::request::{Failure, Finish, Token, TokenLogprobs};
use baton_scheduler::timeline::Moment;
use futures::FutureExt as _;
use tokio::time::Instant;

use super::{RequestDriver, Stream, next};
use crate::door::DoorEvent;
use crate::door::moves::RequestStage;
use crate::door::streams;

impl RequestDriver {
    /// A busy front door may read the destination's first word before the source's word of the pause, which was sent before it.
    pub(super) async fn hear_what_the_source_has_said(&mut self) {
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

    /// What one of the streams said, or that it broke.
    pub(super) async fn hear(&mut self, from: Stream, said: Result<cluster::GenerateEvent, Failure>) {
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

    pub(super) fn mark(&mut self, moment: cluster::MomentReached, opened_at: Nanos) {
        if let Some(&known) = Moment::ALL.get(moment.moment as usize) {
            // A peer's clock counts from its own receipt: never past our now.
            let at = opened_at
                .saturating_add(Nanos(moment.elapsed_ns))
                .min(self.cluster.now());
            self.timeline.mark(known, at);
        }
    }
}
