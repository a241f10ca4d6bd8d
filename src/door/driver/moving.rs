//! What a request does about its move: the order, the stream of the destination, and how it ends.

use std::time::Duration;

use baton_scheduler::arbiter::ArbiterFact;
use baton_scheduler::ids::{Epoch, InstanceId};
use baton_scheduler::request::Failure;
use tokio::time::Instant;

use super::{Order, RequestDriver};
use crate::door::move_metrics::MoveOutcome;
use crate::door::moves::{MoveError, MoveOrder, Moved, RequestStage};
use crate::door::streams;

impl RequestDriver {
    fn refuse_order(&self, order: MoveOrder, error: MoveError) {
        self.metrics.ended(order.reason, MoveOutcome::Refused);
        order.refuse(error);
    }

    pub(super) fn take_order(&mut self, order: MoveOrder) {
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

    pub(super) fn attach(&mut self, epoch: Epoch) {
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

    pub(super) fn detach(&mut self) {
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

    pub(super) fn settle(&mut self) {
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

    pub(super) fn destination_failed(&mut self, epoch: Epoch, failure: Failure, blamed: InstanceId) {
        if let Some(order) = &mut self.order {
            order.failure = Some(failure.clone());
        }
        self.facts.push_back(ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(blamed),
        });
    }
}
