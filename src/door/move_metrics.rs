//! What moves and replays come to, as the front door sees them. Counted here, exported by whoever holds the registry.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use super::moves::MoveReason;

const MOVE_BUCKETS: [f64; 14] = [
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0,
];
const PAUSE_BUCKETS: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
];

/// How an order to move a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum MoveOutcome {
    /// The destination speaks for it.
    Settled,
    /// It was begun and given up; the request went on at its source or was placed again.
    Failed,
    /// It was not begun.
    Refused,
    /// The request ended before it settled.
    Overtaken,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MoveLabels {
    pub(super) reason: &'static str,
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProposalLabels {
    reason: &'static str,
    done: &'static str,
}

/// Clones share the counts.
#[derive(Clone, Debug)]
pub struct MoveMetrics {
    /// Orders to move that ended.
    pub moves: Family<MoveLabels, Counter>,
    /// From order to settlement, seconds.
    pub seconds: Histogram,
    /// From the source's word that it is about to pause to the destination's first word, seconds; 0 where the second was heard
    /// first, as two connections may have it.
    pub pause_seconds: Histogram,
    /// Tokens and ends that were known already or came from an instance that no longer speaks.
    pub stale: Counter,
    /// Placements after a request's first.
    pub replays: Counter,
    /// What the rebalancer proposed.
    pub proposals: Family<ProposalLabels, Counter>,
}

impl Default for MoveMetrics {
    fn default() -> MoveMetrics {
        MoveMetrics {
            moves: Family::default(),
            seconds: Histogram::new(MOVE_BUCKETS),
            pause_seconds: Histogram::new(PAUSE_BUCKETS),
            stale: Counter::default(),
            replays: Counter::default(),
            proposals: Family::default(),
        }
    }
}

impl MoveMetrics {
    pub(super) fn ended(&self, reason: MoveReason, outcome: MoveOutcome) {
        let labels = MoveLabels {
            reason: reason.as_str(),
            outcome: match outcome {
                MoveOutcome::Settled => "settled",
                MoveOutcome::Failed => "failed",
                MoveOutcome::Refused => "refused",
                MoveOutcome::Overtaken => "overtaken",
            },
        };
        self.moves.get_or_create(&labels).inc();
    }

    pub(super) fn settled(&self, reason: MoveReason, took: Duration, paused: Duration) {
        self.ended(reason, MoveOutcome::Settled);
        self.seconds.observe(took.as_secs_f64());
        self.pause_seconds.observe(paused.as_secs_f64());
    }

    pub(super) fn proposed(&self, reason: &'static str, done: &'static str) {
        self.proposals.get_or_create(&ProposalLabels { reason, done }).inc();
    }
}
