//! The only place where requests wait before work: a bounded queue, first come first placed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};
use std::time::Duration;

use baton_scheduler::ids::{InstanceId, TokenId};
use baton_scheduler::request::Request;
use tokio::sync::Mutex;

use super::Rejection;
use super::cluster::{Cluster, Reachable};

/// Bound of the queue and its head.
pub(super) struct Admission {
    limit: usize,
    n_queued: AtomicUsize,
    /// Held by the request that is asked for next; tokio's mutex is fair, so the order is that of arrival.
    head: Mutex<()>,
}

/// A place in the queue, given back on drop.
pub(super) struct QueuePlace(Arc<Admission>);

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.n_queued.fetch_sub(1, AcqRel);
    }
}

impl Admission {
    pub(super) fn new(limit: usize) -> Arc<Admission> {
        Arc::new(Admission {
            limit,
            n_queued: AtomicUsize::new(0),
            head: Mutex::new(()),
        })
    }

    pub(super) fn n_queued(&self) -> usize {
        self.n_queued.load(std::sync::atomic::Ordering::Acquire)
    }

    /// A place at the end of the queue.
    pub(super) fn enter(self: &Arc<Self>) -> Result<QueuePlace, Rejection> {
        let more = |n_queued| (n_queued < self.limit).then_some(n_queued + 1);
        match self
            .n_queued
            .fetch_update(AcqRel, std::sync::atomic::Ordering::Acquire, more)
        {
            Ok(_) => Ok(QueuePlace(Arc::clone(self))),
            Err(n_queued) => Err(Rejection::OverCapacity {
                n_queued,
                limit: self.limit,
                // A hint without a model: longer queues empty later.
                retry_after: Duration::from_secs(1 + n_queued as u64 / 64),
            }),
        }
    }

    /// Waits for its turn, then for room; gives the place in the queue back once placed.
    pub(super) async fn place_in_turn(&self, place: QueuePlace, cluster: &Cluster, request: &Request) -> Reachable {
        let turn = self.head.lock().await;
        let reachable = place_when_possible(cluster, request, &[], &[]).await;
        drop(turn);
        drop(place);
        reachable
    }
}

/// Waits for room, without a turn: for requests that were admitted before and must be placed again.
pub(super) async fn place_when_possible(
    cluster: &Cluster,
    request: &Request,
    output_ids: &[TokenId],
    avoided: &[InstanceId],
) -> Reachable {
    let mut changes = cluster.changes();
    loop {
        if let Some(reachable) = cluster.try_place(request, output_ids, avoided) {
            return reachable;
        }
        // The cluster holds the sender and outlives this borrow of it.
        let _ = changes.changed().await;
    }
}
