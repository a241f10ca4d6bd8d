//! One embedding at the front door: placed like any request, computed by one call, and placed again when that is lost. It has
//! no stream, no epochs and nothing to move: what was lost is computed again.

use std::convert::Infallible;
use std::sync::Arc;

use baton_proto::cluster as wire;
use baton_proto::convert::embedding_from_wire;
use baton_scheduler::arbiter::{MAX_ATTEMPTS, is_retried};
use baton_scheduler::ids::{InstanceId, RequestId};
use baton_scheduler::request::Failure;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Submission;
use super::admission::{Admission, QueuePlace, Wanted, place_when_possible};
use super::cluster::{Called, Cluster, Reachable};
use super::driver::{PAUSE_BEFORE_LAST_ATTEMPTS, sleep_until};
use super::front_door::FrontDoorOptions;
use super::move_metrics::MoveMetrics;
use super::moves::{Listed, MoveError, MoveOrder, OpenRequest, RequestProgress, RequestStage};
use super::streams::{handshake, said};

pub(super) struct EmbeddingDriver {
    pub(super) cluster: Arc<Cluster>,
    pub(super) admission: Arc<Admission>,
    pub(super) options: FrontDoorOptions,
    pub(super) metrics: MoveMetrics,
    pub(super) submission: Submission,
}

/// Takes the request out of the view on drop, however it ended.
struct Counted<'a>(&'a Cluster, RequestId);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.close(self.1);
    }
}

impl EmbeddingDriver {
    /// To its end. Dropping the future gives the call up, and the instance cancels.
    pub(super) async fn run(self, place: QueuePlace, mut listed: Listed) -> Result<Vec<f32>, Failure> {
        let deadline = self.submission.deadline.map(|left| Instant::now() + left);
        let counted = Counted(&self.cluster, self.submission.request.id);
        let embedded = tokio::select! {
            embedded = self.attempts(place, &listed.request) => embedded,
            never = refuse_moves(&mut listed.orders) => match never {},
            () = sleep_until(deadline) => Err(Failure::DeadlineExceeded),
        };
        drop(counted);
        if let Err(failure) = &embedded {
            tracing::info!(
                request_id = %self.submission.request.id,
                label = %self.submission.label,
                %failure,
                "embedding failed"
            );
        }
        embedded
    }

    async fn attempts(&self, place: QueuePlace, listed: &OpenRequest) -> Result<Vec<f32>, Failure> {
        let mut wanted = Wanted::to_embed(self.submission.request.clone(), self.submission.objectives);
        let placing = self
            .admission
            .place_in_turn(place, self.submission.priority, &self.cluster, &mut wanted);
        let placed = tokio::time::timeout(self.options.max_queue_wait, placing).await;
        let (mut placed, _) = placed.map_err(|_| Failure::Busy("no instance had room in time".into()))?;
        let mut n_attempts = 1;
        loop {
            let (failure, blamed) = match self.compute(placed, listed).await {
                Ok(embedding) => return Ok(embedding),
                Err(failed) => failed,
            };
            if !is_retried(&failure) || n_attempts >= MAX_ATTEMPTS {
                return Err(failure);
            }
            tracing::debug!(request_id = %self.submission.request.id, %failure, %blamed, "placed again");
            self.metrics.replays.inc();
            self.cluster.close(self.submission.request.id);
            listed.update(|progress| *progress = RequestProgress::default());
            wanted.avoided.push(blamed);
            // Twice refused or lost in a row: whoever died may not have been missed yet.
            if n_attempts > 1 {
                tokio::time::sleep(PAUSE_BEFORE_LAST_ATTEMPTS).await;
            }
            let placing = place_when_possible(&self.cluster, &mut wanted);
            let again = tokio::time::timeout(self.options.max_queue_wait, placing).await;
            placed =
                again.map_err(|_| Failure::InstanceLost("no instance could take the request over in time".into()))?;
            n_attempts += 1;
        }
    }

    /// Asks the placed instance. A failure comes with who is to blame.
    async fn compute(&self, placed: Reachable, listed: &OpenRequest) -> Result<Vec<f32>, (Failure, InstanceId)> {
        let Reachable { placement, decode, .. } = placed;
        let request = &self.submission.request;
        tracing::debug!(
            request_id = %request.id,
            label = %self.submission.label,
            instance = %placement.decode,
            "embedding placed"
        );
        listed.update(|progress| {
            progress.stage = RequestStage::Embed;
            progress.prefill = Some(placement.decode.clone());
        });
        let asked = wire::EmbedRequest {
            handshake: handshake(&decode),
            request_id: request.id.0.to_be_bytes().to_vec(),
            prompt_ids: request.prompt_ids.to_vec(),
            cache_salt: request.cache_salt,
        };
        let Called { mut client, .. } = decode;
        // The answer takes as long as the prompt does; keepalive and the instance's watchdog end what hangs.
        let embedded = match client.embed(asked).await {
            Ok(answer) => embedding_from_wire(answer.into_inner()),
            Err(status) => Err(Failure::InstanceLost(said(&status))),
        };
        embedded.map_err(|failure| {
            let instance = placement.decode;
            let failure = match failure {
                Failure::Busy(message) => {
                    self.cluster.busy(&instance);
                    Failure::Busy(message)
                }
                // The instance says cancelled only when the call was given up, and ours is not.
                Failure::Cancelled => Failure::InstanceLost(format!("{instance}: cancelled by the instance")),
                Failure::InstanceLost(message) => Failure::InstanceLost(format!("{instance}: {message}")),
                other => other,
            };
            (failure, instance)
        })
    }
}

async fn refuse_moves(orders: &mut mpsc::Receiver<MoveOrder>) -> Infallible {
    while let Some(order) = orders.recv().await {
        order.refuse(MoveError::Refused("an embedding does not move".to_owned()));
    }
    std::future::pending().await
}
