//! The only place where requests wait before work: a bounded queue, first come first placed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};
use std::time::Duration;

use baton_scheduler::ids::{InstanceId, Nanos, TokenId};
use baton_scheduler::prefix_cache::{PrefixHasher, PrefixKey};
use baton_scheduler::rebalance::WaitingRequest;
use baton_scheduler::request::{ChoiceState, Request};
use tokio::sync::Mutex;

use super::Rejection;
use super::cluster::{Cluster, KeySpace, Reachable};

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

    /// Waits for its turn, then for room; gives the place in the queue back once placed. Answers when its turn came, too.
    pub(super) async fn place_in_turn(
        &self,
        place: QueuePlace,
        cluster: &Cluster,
        wanted: &mut Wanted,
    ) -> (Reachable, Nanos) {
        let turn = self.head.lock().await;
        let admitted_at = cluster.now();
        let reachable = place_when_possible(cluster, wanted).await;
        drop(turn);
        drop(place);
        (reachable, admitted_at)
    }
}

/// A request to be placed. Its prefix keys are worked out once, outside of the cluster's lock.
pub(super) struct Wanted {
    pub(super) request: Request,
    pub(super) avoided: Vec<InstanceId>,
    /// Prompt, and what the first choice that goes on has generated so far.
    tokens: Vec<TokenId>,
    /// Choices that have begun differ, so that no one prefill could serve them all.
    pub(super) may_hand_over: bool,
    /// Of these tokens, and for whom they are valid.
    keys: Option<(KeySpace, Vec<PrefixKey>)>,
}

impl Wanted {
    pub(super) fn new(request: Request) -> Wanted {
        let tokens = request.prompt_ids.to_vec();
        Wanted {
            request,
            avoided: Vec::new(),
            tokens,
            may_hand_over: true,
            keys: None,
        }
    }

    /// The same request again, elsewhere, with the tokens generated so far.
    pub(super) fn go_on_after(&mut self, choices: &[ChoiceState], avoided: &[InstanceId]) {
        self.tokens.truncate(self.request.prompt_ids.len());
        if let Some(first) = choices.iter().find(|choice| choice.finish.is_none()) {
            self.tokens.extend(first.output.iter().map(|token| token.id));
        }
        let is_fresh = choices.iter().all(|choice| choice.output.is_empty());
        self.may_hand_over = choices.len() == 1 || is_fresh;
        self.avoided = avoided.to_vec();
        self.keys = None;
    }

    pub(super) fn n_tokens(&self) -> u32 {
        self.tokens.len() as u32
    }

    fn prefix_keys(&mut self, space: KeySpace) -> &[PrefixKey] {
        // A request that reports on every prompt token takes no hits.
        if self.request.sampling.prompt_logprobs.is_some() {
            return &[];
        }
        if self.keys.as_ref().is_none_or(|(of, _)| *of != space) {
            let hasher = PrefixHasher::new(space.fingerprint, space.block_size as usize);
            self.keys = Some((space, hasher.keys(self.request.cache_salt, &self.tokens)));
        }
        self.keys.as_ref().map_or(&[], |(_, keys)| keys)
    }
}

/// Says on drop that the request waits no more.
struct Waits<'a>(Option<&'a Cluster>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if let Some(cluster) = self.0 {
            cluster.set_waiting(None);
        }
    }
}

/// Waits for room, without a turn: for requests that were admitted before and must be placed again, too.
pub(super) async fn place_when_possible(cluster: &Cluster, wanted: &mut Wanted) -> Reachable {
    let mut changes = cluster.changes();
    let mut waits = Waits(None);
    loop {
        if let Some(space) = cluster.key_space() {
            let keys = wanted.prefix_keys(space).to_vec();
            if let Some(reachable) = cluster.try_place(wanted, keys) {
                return reachable;
            }
            let n_choices = wanted.request.sampling.n;
            let n_blocks = wanted.n_tokens().div_ceil(space.block_size) + n_choices;
            cluster.set_waiting(Some(WaitingRequest { n_blocks, n_choices }));
            waits.0 = Some(cluster);
        }
        // The cluster holds the sender and outlives this borrow of it.
        let _ = changes.changed().await;
    }
}
