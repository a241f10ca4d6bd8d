//! The stream of what this instance's prefix cache holds, for front doors that somebody asked. Nothing travels, and nothing is
//! kept, while nobody listens.

use std::pin::Pin;
use std::sync::Arc;

use baton_proto::cluster;
use baton_proto::convert::kv_changes_to_wire;
use baton_scheduler::block_events::BlockEvent;
use futures::Stream;
use tonic::Status;

use super::service::Worker;
use crate::engine::BlockWatch;

/// Changes in one message: some tens of kilobytes with blocks of 16 tokens.
const MAX_CHANGES: usize = 256;

pub(super) type ChangeStream = Pin<Box<dyn Stream<Item = Result<cluster::KvChanges, Status>> + Send>>;

struct Listener {
    watch: BlockWatch,
    changes: Arc<[BlockEvent]>,
    n_sent: usize,
}

impl Listener {
    async fn next(&mut self) -> Option<cluster::KvChanges> {
        while self.n_sent == self.changes.len() {
            self.changes = self.watch.next().await?;
            self.n_sent = 0;
        }
        let end = self.changes.len().min(self.n_sent + MAX_CHANGES);
        let message = kv_changes_to_wire(&self.changes[self.n_sent..end]);
        self.n_sent = end;
        Some(message)
    }
}

/// The stream is driven by its connection: a reader that takes nothing holds up nobody, and loses it.
pub(super) fn listen(worker: &Worker, handshake: Option<&cluster::Handshake>) -> Result<ChangeStream, Status> {
    let refused = |failure: baton_scheduler::request::Failure| Status::failed_precondition(failure.to_string());
    worker.identity.check_caller(handshake).map_err(refused)?;
    let watch = worker.engine.watch_blocks();
    let listener = Listener {
        watch: watch.map_err(|failure| Status::unavailable(failure.to_string()))?,
        changes: Arc::from([]),
        n_sent: 0,
    };
    let stopping = worker.stopping.clone();
    let messages = futures::stream::unfold(Some(listener), move |listener| {
        let stopping = stopping.clone();
        async move {
            let mut listener = listener?;
            let ended = tokio::select! {
                message = listener.next() => match message {
                    Some(message) => return Some((Ok(message), Some(listener))),
                    None => Status::data_loss("the listener fell behind or is one too many, or the engine has ended"),
                },
                () = stopping.cancelled() => Status::unavailable("the instance is stopping"),
            };
            Some((Err(ended), None))
        }
    });
    Ok(Box::pin(messages))
}
