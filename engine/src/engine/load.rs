//! What an engine reports of itself: a snapshot of its load and its counters. Plain numbers; others export them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_scheduler::batch::{BatchCounters, BatchLoad};
use baton_scheduler::ids::Nanos;
use serde::{Deserialize, Serialize};

/// What the step loop has counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineCounters {
    /// Steps computed.
    pub n_steps: u64,
    /// Of these, steps that the device had recorded and replayed.
    pub n_replayed_steps: u64,
    /// Rows computed in them.
    pub n_step_tokens: u64,
    /// Tokens attended to by them, summed over rows.
    pub n_context_tokens: u64,
    /// Steps that were launched while the one before them was in flight.
    pub n_steps_ahead: u64,
    /// Time with a step in flight.
    pub forward_ns: u64,
    /// Time without one while there was work: scheduling, sampling, events.
    pub overhead_ns: u64,
    /// Requests that finished well, first tokens handed over included.
    pub n_finished: u64,
    /// Requests that failed or were refused.
    pub n_failed: u64,
    /// Requests whose handle was dropped before their end.
    pub n_cancelled: u64,
    /// Requests that joined from another instance, handed over or moved.
    pub n_joined: u64,
    /// Times a request was paused for a move.
    pub n_paused: u64,
    /// Times a request stood still because there was no room yet, or no more, where it was to move.
    pub n_held_back: u64,
    /// (layer, block) pairs made ready for a transfer.
    pub n_layer_blocks_ready: u64,
}

/// An engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// When it was made, since the engine's start.
    pub at: Nanos,
    /// Requests open here: in line, running, reserved or handing over.
    pub n_open: usize,
    /// Choices and blocks by where they are.
    pub batch: BatchLoad,
    /// What the scheduler has counted.
    pub scheduler: BatchCounters,
    /// What the step loop has counted.
    pub engine: EngineCounters,
}

impl LoadReport {
    /// Share of the blocks that somebody holds, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        let ledger = self.batch.ledger;
        let n_used = ledger.held + ledger.reserved + ledger.quarantined;
        n_used as f64 / ledger.total.max(1) as f64
    }
}

/// Choices open on an engine, bounded. A permit counts as those of one request until dropped.
pub(super) struct OpenCount {
    n_open: AtomicUsize,
    max_open: usize,
}

pub(super) struct OpenPermit {
    count: Arc<OpenCount>,
    n_choices: usize,
}

impl OpenCount {
    pub(super) fn new(max_open: usize) -> Arc<OpenCount> {
        Arc::new(OpenCount {
            n_open: AtomicUsize::new(0),
            max_open,
        })
    }

    pub(super) fn acquire(self: &Arc<Self>, n_choices: usize) -> Option<OpenPermit> {
        let more = |n_open| (n_open + n_choices <= self.max_open).then_some(n_open + n_choices);
        self.n_open
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(OpenPermit {
            count: Arc::clone(self),
            n_choices,
        })
    }

    pub(super) fn max_open(&self) -> usize {
        self.max_open
    }
}

impl Drop for OpenPermit {
    fn drop(&mut self) {
        self.count.n_open.fetch_sub(self.n_choices, Ordering::AcqRel);
    }
}
