//! Telling what is cached, block by block with its tokens, to those who listen. The step loop never waits for them: one that
//! falls behind is dropped, and asks again.

use std::sync::Arc;

use baton_scheduler::block_events::BlockEvent;
use tokio::sync::mpsc;

use super::step_loop::StepLoop;
use crate::forward::ForwardPass;

/// Steps whose changes may wait for a listener.
pub(super) const MAX_STEPS_BEHIND: usize = 256;

/// Listeners at a time: a few front doors with all the subscribers that they let in.
const MAX_LISTENERS: usize = 64;

/// What changed in one step, shared by all listeners.
pub(super) type Changes = Arc<[BlockEvent]>;

/// Changes of one instance's cached blocks. The first ones are [`BlockEvent::Cleared`] and all that was cached then.
pub struct BlockWatch {
    pub(super) changes: mpsc::Receiver<Changes>,
}

impl BlockWatch {
    /// The next changes, in order; `None` once the listener has fallen behind or is one too many, or the engine has ended.
    pub async fn next(&mut self) -> Option<Arc<[BlockEvent]>> {
        self.changes.recv().await
    }
}

impl<F: ForwardPass> StepLoop<F> {
    pub(super) fn watch_blocks(&mut self, watcher: mpsc::Sender<Changes>) {
        // What has changed so far is in the new one's first message.
        self.tell_watchers();
        // One too many hears nothing but its end.
        if self.watchers.len() >= MAX_LISTENERS {
            return;
        }
        let cached = self.scheduler.watch_blocks();
        if watcher.try_send(cached.into()).is_ok() {
            self.watchers.push(watcher);
        }
    }

    /// After every step and every command.
    pub(super) fn tell_watchers(&mut self) {
        if self.watchers.is_empty() {
            return;
        }
        let changes: Changes = self.scheduler.take_block_events().into();
        self.watchers.retain(|watcher| match changes.is_empty() {
            true => !watcher.is_closed(),
            false => watcher.try_send(Arc::clone(&changes)).is_ok(),
        });
        if self.watchers.is_empty() {
            self.scheduler.unwatch_blocks();
        }
    }
}
