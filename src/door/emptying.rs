//! Moves requests away from instances that are being drained, want to end, or do not generate any more. One task, which
//! looks around and gives orders to the requests' drivers; it decides nothing about a transfer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_scheduler::ids::{InstanceId, RequestId};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::moves::{MoveError, MoveReason, Moved, OpenRequests};

/// How often the task looks around.
const ROUND: Duration = Duration::from_millis(50);
/// Moves off one instance at once: more would only share the link.
const MAX_MOVES_OF_INSTANCE: usize = 4;
/// A request whose move failed is left alone this long, twice as long after each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// What emptying an instance has come to.
#[derive(Debug, Default)]
pub struct Emptied {
    n_moved: AtomicU64,
    n_failed: AtomicU64,
}

/// Totals by instance, since this front door began.
#[derive(Clone, Debug, Default)]
pub struct EmptyingTotals(Arc<parking_lot::Mutex<BTreeMap<InstanceId, Arc<Emptied>>>>);

impl EmptyingTotals {
    fn of(&self, instance: &InstanceId) -> Arc<Emptied> {
        Arc::clone(self.0.lock().entry(instance.clone()).or_default())
    }

    /// Moves settled and failed.
    pub fn get(&self, instance: &InstanceId) -> (u64, u64) {
        let emptied = self.of(instance);
        (emptied.n_moved.load(Relaxed), emptied.n_failed.load(Relaxed))
    }
}

/// When a request may be tried again.
struct Pause {
    until: Instant,
    length: Duration,
}

type Outcome = (InstanceId, RequestId, Result<Moved, MoveError>);

/// Until `shutdown`.
pub async fn keep_emptying(
    cluster: Arc<Cluster>,
    requests: OpenRequests,
    totals: EmptyingTotals,
    shutdown: CancellationToken,
) {
    let mut rounds = tokio::time::interval(ROUND);
    let mut moves: JoinSet<Outcome> = JoinSet::new();
    let mut under_way: BTreeMap<RequestId, InstanceId> = BTreeMap::new();
    let mut pauses: BTreeMap<RequestId, Pause> = BTreeMap::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = rounds.tick() => {}
            Some(outcome) = moves.join_next(), if !moves.is_empty() => {
                let Ok((instance, request, outcome)) = outcome else { continue };
                under_way.remove(&request);
                let emptied = totals.of(&instance);
                match outcome {
                    Ok(_) => {
                        pauses.remove(&request);
                        emptied.n_moved.fetch_add(1, Relaxed);
                    }
                    Err(_) => {
                        emptied.n_failed.fetch_add(1, Relaxed);
                        let before = pauses.get(&request).map(|pause| pause.length);
                        let length = before.map_or(FIRST_PAUSE, |before| (2 * before).min(LONGEST_PAUSE));
                        let until = Instant::now() + length;
                        pauses.insert(request, Pause { until, length });
                    }
                }
            }
        }
        let now = Instant::now();
        pauses.retain(|_, pause| now < pause.until + LONGEST_PAUSE);
        for (instance, reason) in cluster.to_be_emptied() {
            let there = requests.generating_on(&instance);
            let n_under_way = under_way.values().filter(|from| **from == instance).count();
            let may_move = there.into_iter().filter(|request| {
                !under_way.contains_key(&request.id) && pauses.get(&request.id).is_none_or(|pause| now >= pause.until)
            });
            let chosen: Vec<_> = may_move
                .take(MAX_MOVES_OF_INSTANCE.saturating_sub(n_under_way))
                .collect();
            for request in chosen {
                under_way.insert(request.id, instance.clone());
                let instance = instance.clone();
                moves.spawn(async move {
                    let outcome = request.move_to(None, reason).await;
                    (instance, request.id, outcome)
                });
            }
            if reason == MoveReason::Drain && is_empty(&cluster, &requests, &instance) {
                let wants_to_end = cluster
                    .members()
                    .into_iter()
                    .any(|member| member.join.instance_id == *instance.0 && member.load.leaving);
                if wants_to_end {
                    cluster.say_drained(&instance);
                }
            }
        }
    }
}

/// Whether nothing of this front door or of any other is left on an instance.
pub fn is_empty(cluster: &Cluster, requests: &OpenRequests, instance: &InstanceId) -> bool {
    n_open(cluster, requests, instance) == 0
}

/// Requests left on an instance, as it says itself or as this front door knows.
pub fn n_open(cluster: &Cluster, requests: &OpenRequests, instance: &InstanceId) -> u32 {
    let members = cluster.members();
    let member = members.iter().find(|member| member.join.instance_id == *instance.0);
    let reported = member.map_or(0, |member| member.load.n_open);
    reported.max(requests.placed_on(instance) as u32)
}
