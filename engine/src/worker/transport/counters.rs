//! What went by which transport. Plain totals; others export them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{TransportError, TransportKind};

/// Running totals of one instance.
#[derive(Debug, Default)]
pub struct TransportCounters {
    bytes_sent: [AtomicU64; TransportKind::ALL.len()],
    bytes_received: [AtomicU64; TransportKind::ALL.len()],
    n_bad_checksums: AtomicU64,
    n_stale: AtomicU64,
}

/// The totals at one moment; those by transport are in the order of [`TransportKind::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportTotals {
    /// KV bytes packed.
    pub bytes_sent: [u64; TransportKind::ALL.len()],
    /// KV bytes written into reserved blocks.
    pub bytes_received: [u64; TransportKind::ALL.len()],
    /// Frames refused because their data was not what was sent.
    pub n_bad_checksums: u64,
    /// Frames refused because a block of the source was another's by then.
    pub n_stale: u64,
}

impl TransportCounters {
    pub(super) fn sent(&self, kind: TransportKind, n_bytes: u64) {
        self.bytes_sent[kind as usize].fetch_add(n_bytes, Relaxed);
    }

    /// Counts what came of a frame, and passes it on.
    pub(super) fn landed(
        &self,
        kind: TransportKind,
        outcome: Result<u64, TransportError>,
    ) -> Result<u64, TransportError> {
        match &outcome {
            Ok(n_bytes) => {
                self.bytes_received[kind as usize].fetch_add(*n_bytes, Relaxed);
            }
            Err(TransportError::Checksum { .. }) => {
                self.n_bad_checksums.fetch_add(1, Relaxed);
            }
            Err(TransportError::Stale { .. }) => {
                self.n_stale.fetch_add(1, Relaxed);
            }
            Err(_) => {}
        }
        outcome
    }

    /// The totals now.
    pub fn totals(&self) -> TransportTotals {
        let load =
            |counters: &[AtomicU64; TransportKind::ALL.len()]| std::array::from_fn(|kind| counters[kind].load(Relaxed));
        TransportTotals {
            bytes_sent: load(&self.bytes_sent),
            bytes_received: load(&self.bytes_received),
            n_bad_checksums: self.n_bad_checksums.load(Relaxed),
            n_stale: self.n_stale.load(Relaxed),
        }
    }
}
