//! What the cluster's prefix caches hold, as one stream of events for a subscriber: the union of all instances. Instances send
//! their blocks only while somebody subscribes. It is driven by whoever reads it; there is no task, and what is not read waits
//! at the instances until they give the reader up.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster as wire;
use baton_proto::convert::kv_changes_from_wire;
use baton_scheduler::block_events::{BlockEvent, BlockUnion};
use baton_scheduler::ids::{Incarnation, InstanceId};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_stream::StreamMap;
use tonic::Status;

use super::cluster::{Called, Cluster};
use super::streams::handshake;

/// Subscribers at a time: each has the instances send everything once more.
pub(super) const MAX_SUBSCRIBERS: usize = 8;
/// Peers that speak less do not know the call.
const KV_EVENTS_PROTOCOL_VERSION: u32 = 2;
/// Events in one answer.
const MAX_EVENTS: usize = 256;
/// Every request changes the cluster, its members rarely.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// Before an instance is asked again after its stream has ended.
const PAUSE: Duration = Duration::from_millis(200);

/// One incarnation of an instance.
type Source = (InstanceId, Incarnation);
type Said = Result<Vec<BlockEvent>, Status>;

/// Follows the cluster; begins with [`BlockEvent::Cleared`].
pub(super) fn follow(cluster: Arc<Cluster>) -> BoxStream<'static, Vec<BlockEvent>> {
    let follower = Follower {
        changes: cluster.changes(),
        cluster,
        union: BlockUnion::new(),
        sources: StreamMap::new(),
        told: VecDeque::from([BlockEvent::Cleared]),
        looked_at: None,
    };
    futures::stream::unfold(follower, |mut follower| async move {
        let events = follower.next().await;
        Some((events, follower))
    })
    .boxed()
}

struct Follower {
    cluster: Arc<Cluster>,
    changes: watch::Receiver<u64>,
    union: BlockUnion,
    sources: StreamMap<Source, Pin<Box<dyn Stream<Item = Said> + Send>>>,
    /// Not given out yet.
    told: VecDeque<BlockEvent>,
    looked_at: Option<Instant>,
}

impl Follower {
    async fn next(&mut self) -> Vec<BlockEvent> {
        if self.looked_at.is_none() {
            self.follow_members();
        }
        while self.told.is_empty() {
            let next_look = self.looked_at.map(|at| at + BETWEEN_LOOKS);
            tokio::select! {
                Some((source, said)) = self.sources.next(), if !self.sources.is_empty() => self.hear(&source, said),
                () = changed_after(next_look, &mut self.changes) => self.follow_members(),
            }
        }
        let n_events = self.told.len().min(MAX_EVENTS);
        self.told.drain(..n_events).collect()
    }

    fn hear(&mut self, (instance, _): &Source, said: Said) {
        match said {
            Ok(events) => {
                let mut told = Vec::new();
                for event in events {
                    self.union.apply(instance, event, &mut told);
                }
                self.told.extend(told);
            }
            Err(status) => {
                tracing::debug!(%instance, code = %status.code(), reason = status.message(), "its blocks are asked for again");
            }
        }
    }

    /// Listens to those who have come, and forgets those who have gone with all they held.
    fn follow_members(&mut self) {
        self.looked_at = Some(Instant::now());
        let members = self.cluster.incarnations(KV_EVENTS_PROTOCOL_VERSION);
        let gone: Vec<Source> = self
            .sources
            .keys()
            .filter(|source| !members.contains(source))
            .cloned()
            .collect();
        for source in gone {
            self.sources.remove(&source);
            let mut told = Vec::new();
            self.union.leave(&source.0, &mut told);
            self.told.extend(told);
        }
        for source in members {
            if self.sources.contains_key(&source) {
                continue;
            }
            // One that has gone meanwhile is a change of the cluster, which is looked at next.
            if let Some(called) = self.cluster.called_apart(&source.0, source.1) {
                self.sources.insert(source, Box::pin(listen(called)));
            }
        }
    }
}

/// A change of the cluster, but not before `at`. Cancel safe.
async fn changed_after(at: Option<Instant>, changes: &mut watch::Receiver<u64>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
    // The sender lives in the cluster, which the follower holds.
    let _ = changes.changed().await;
}

/// An instance's changes, asked for again whenever its stream has ended: it begins with all that it holds.
fn listen(called: Called) -> impl Stream<Item = Said> + Send {
    let calls = futures::stream::unfold(called, |mut called| async move {
        let asked = wire::KvEventsRequest {
            handshake: handshake(&called),
        };
        let changes = match called.client.kv_events(asked).await {
            Ok(answer) => answer.into_inner().left_stream(),
            Err(status) => futures::stream::iter([Err(status)]).right_stream(),
        };
        let changes = changes.map(|message| {
            let changed = kv_changes_from_wire(message?);
            changed.map_err(|error| Status::invalid_argument(error.to_string()))
        });
        let pause = futures::stream::once(tokio::time::sleep(PAUSE)).filter_map(|()| async { None });
        Some((changes.chain(pause), called))
    });
    calls.flatten()
}
