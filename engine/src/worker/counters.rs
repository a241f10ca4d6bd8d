//! What an instance has moved and refused. Plain totals; others export them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Running totals, shared by the tasks of a worker.
#[derive(Debug, Default)]
pub struct TransferCounters {
    pub(super) n_received: AtomicU64,
    pub(super) n_sent: AtomicU64,
    pub(super) n_failed: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) n_frames_received: AtomicU64,
    pub(super) n_frames_sent: AtomicU64,
    pub(super) n_frames_refused: AtomicU64,
    pub(super) n_blocks_not_sent: AtomicU64,
    pub(super) n_other_numerics: AtomicU64,
    pub(super) n_early_frames: AtomicU64,
    pub(super) n_moved_in: AtomicU64,
    pub(super) n_moved_out: AtomicU64,
    pub(super) n_moves_failed: AtomicU64,
    pub(super) n_resumed: AtomicU64,
}

/// The totals at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferTotals {
    /// Handoffs that joined here.
    pub n_received: u64,
    /// Handoffs sent to their typed end from here.
    pub n_sent: u64,
    /// Handoffs that failed here, on either end, without those that nobody wanted any more.
    pub n_failed: u64,
    /// KV bytes written into reserved blocks.
    pub bytes_received: u64,
    /// KV bytes given to the link.
    pub bytes_sent: u64,
    /// KV frames written.
    pub n_frames_received: u64,
    /// KV frames given to the link.
    pub n_frames_sent: u64,
    /// KV frames refused as late, foreign or out of order.
    pub n_frames_refused: u64,
    /// Blocks that did not travel because the destination's prefix cache held them.
    pub n_blocks_not_sent: u64,
    /// Handoffs between instances of different numerics classes.
    pub n_other_numerics: u64,
    /// KV frames sent before the prompt's last layer was computed.
    pub n_early_frames: u64,
    /// Running requests that were taken over here.
    pub n_moved_in: u64,
    /// Running requests that went on elsewhere.
    pub n_moved_out: u64,
    /// Moves that failed here, on either end.
    pub n_moves_failed: u64,
    /// Paused requests that went on here by their front door's word.
    pub n_resumed: u64,
}

impl TransferCounters {
    /// The totals now.
    pub fn totals(&self) -> TransferTotals {
        TransferTotals {
            n_received: self.n_received.load(Relaxed),
            n_sent: self.n_sent.load(Relaxed),
            n_failed: self.n_failed.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            n_frames_received: self.n_frames_received.load(Relaxed),
            n_frames_sent: self.n_frames_sent.load(Relaxed),
            n_frames_refused: self.n_frames_refused.load(Relaxed),
            n_blocks_not_sent: self.n_blocks_not_sent.load(Relaxed),
            n_other_numerics: self.n_other_numerics.load(Relaxed),
            n_early_frames: self.n_early_frames.load(Relaxed),
            n_moved_in: self.n_moved_in.load(Relaxed),
            n_moved_out: self.n_moved_out.load(Relaxed),
            n_moves_failed: self.n_moves_failed.load(Relaxed),
            n_resumed: self.n_resumed.load(Relaxed),
        }
    }
}

/// Adds to a total.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}
