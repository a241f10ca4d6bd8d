//! The only place where requests wait before work: a bounded queue, first come first placed among those of one priority.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};
use std::time::Duration;

use baton_scheduler::ids::{InstanceId, Nanos, TokenId};
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::prefix_cache::{PrefixHasher, PrefixKey};
use baton_scheduler::rebalance::WaitingRequest;
use baton_scheduler::request::{ChoiceState, Request};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Rejection;
use super::cluster::{Cluster, KeySpace, Reachable};

/// Bound of the queue and its head.
pub(super) struct Admission {
    limit: usize,
    n_queued: AtomicUsize,
    line: Arc<Line>,
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
            line: Arc::default(),
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
        priority: i32,
        cluster: &Cluster,
        wanted: &mut Wanted,
    ) -> (Reachable, Nanos) {
        let turn = self.line.turn(priority).await;
        let admitted_at = cluster.now();
        let reachable = place_when_possible(cluster, wanted).await;
        drop(turn);
        drop(place);
        (reachable, admitted_at)
    }
}

/// Who is asked for next, and who waits for that: the most urgent first, then the oldest. Nobody waits longer than the
/// front door lets a request wait to be placed.
#[derive(Default)]
struct Line(Mutex<InLine>);

#[derive(Default)]
struct InLine {
    has_turn: bool,
    n_came: u64,
    waiting: BTreeMap<(i32, u64), oneshot::Sender<Turn>>,
}

/// Given to the next in line on drop, also when it never reached who waited for it.
struct Turn(Arc<Line>);

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut line = self.0.0.lock();
            let next = line.waiting.pop_first();
            line.has_turn = next.is_some();
            next
        };
        if let Some((_, next)) = next {
            // One that has gone gives it on by the drop of what comes back.
            drop(next.send(Turn(Arc::clone(&self.0))));
        }
    }
}

/// Leaves the line on drop.
struct InLineAt<'a>(&'a Line, (i32, u64));

impl Drop for InLineAt<'_> {
    fn drop(&mut self) {
        self.0.0.lock().waiting.remove(&self.1);
    }
}

impl Line {
    async fn turn(self: &Arc<Self>, priority: i32) -> Turn {
        let (_at, turn) = {
            let mut line = self.0.lock();
            if !std::mem::replace(&mut line.has_turn, true) {
                return Turn(Arc::clone(self));
            }
            let (sender, turn) = oneshot::channel();
            line.n_came += 1;
            let at = (priority, line.n_came);
            line.waiting.insert(at, sender);
            (InLineAt(self, at), turn)
        };
        turn.await.expect("a turn is given on, never dropped")
    }
}

/// What a request is placed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Generation,
    Embedding,
}

/// A request to be placed. Its prefix keys are worked out once, outside of the cluster's lock.
pub(super) struct Wanted {
    pub(super) request: Request,
    pub(super) avoided: Vec<InstanceId>,
    /// Prompt, and what the first choice that goes on has generated so far.
    tokens: Vec<TokenId>,
    /// Choices that have begun differ, so that no one prefill could serve them all.
    pub(super) may_hand_over: bool,
    pub(super) objectives: RequestObjectives,
    pub(super) purpose: Purpose,
    /// Of these tokens, and for whom they are valid.
    keys: Option<(KeySpace, Vec<PrefixKey>)>,
}

impl Wanted {
    pub(super) fn new(request: Request, objectives: RequestObjectives) -> Wanted {
        let tokens = request.prompt_ids.to_vec();
        Wanted {
            request,
            avoided: Vec::new(),
            tokens,
            may_hand_over: true,
            objectives,
            purpose: Purpose::Generation,
            keys: None,
        }
    }

    pub(super) fn to_embed(request: Request, objectives: RequestObjectives) -> Wanted {
        Wanted {
            purpose: Purpose::Embedding,
            ..Wanted::new(request, objectives)
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
        // What needs every prompt token computed takes no hits.
        if self.request.sampling.prompt_logprobs.is_some() || self.purpose == Purpose::Embedding {
            return &[];
        }
        if self.keys.as_ref().is_none_or(|(of, _)| *of != space) {
            let hasher = PrefixHasher::new(space.fingerprint, space.block_size as usize);
            self.keys = Some((
                space,
                hasher.keys(self.request.prefix_salt(space.short_context), &self.tokens),
            ));
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
            let n_blocks = cluster.n_blocks_wanted(wanted.n_tokens(), n_choices);
            cluster.set_waiting(Some(WaitingRequest { n_blocks, n_choices }));
            waits.0 = Some(cluster);
        }
        // The cluster holds the sender and outlives this borrow of it.
        let _ = changes.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn the_most_urgent_is_next_then_the_oldest_and_who_leaves_is_passed_over() {
        let line = Arc::new(Line::default());
        let first = line.turn(0).await;
        let mut waiting: Vec<_> = [(1, 5), (2, 0), (3, -1), (4, 0), (5, -1)]
            .map(|(name, priority)| {
                let line = Arc::clone(&line);
                let mut turn = Box::pin(async move { line.turn(priority).await });
                assert!((&mut turn).now_or_never().is_none(), "it is another's turn");
                (name, turn)
            })
            .into();
        // The oldest of the urgent ones leaves the line.
        waiting.retain(|(name, _)| *name != 3);
        drop(first);
        let mut order = Vec::new();
        while !waiting.is_empty() {
            let next = waiting.iter_mut().enumerate().find_map(|(idx, (name, turn))| {
                let turn = turn.now_or_never()?;
                Some((idx, *name, turn))
            });
            let (idx, name, turn) = next.expect("somebody has the turn");
            order.push(name);
            drop(waiting.remove(idx));
            drop(turn);
        }
        assert_eq!(order, [5, 2, 4, 1]);
        assert!(line.turn(7).now_or_never().is_some(), "nobody has it");
    }

    #[tokio::test]
    async fn a_turn_given_to_who_has_left_is_not_lost() {
        let line = Arc::new(Line::default());
        let first = line.turn(0).await;
        let mut leaves = Box::pin(line.turn(-1));
        assert!((&mut leaves).now_or_never().is_none());
        drop(first);
        // It has been given the turn and does not know.
        drop(leaves);
        assert!(line.turn(0).now_or_never().is_some());
    }
}
