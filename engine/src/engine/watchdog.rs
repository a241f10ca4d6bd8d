//! Whether the step loop still comes round. The loop beats; whoever asks compares with its own `now`. No thread, no clock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use baton_scheduler::ids::Nanos;

/// What the watchdog says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing to do, or progressing.
    Well,
    /// Work is pending and the loop has not come round for this long.
    Stuck(Nanos),
    /// The step thread has ended: its last words.
    Dead(String),
}

/// Written by the step loop on every round, at the latest every tick.
#[derive(Debug, Default)]
pub(super) struct Heartbeat {
    beat_ns: AtomicU64,
    n_beats: AtomicU64,
    has_work: AtomicBool,
}

impl Heartbeat {
    pub(super) fn beat(&self, now: Nanos, has_work: bool) {
        self.has_work.store(has_work, Ordering::Relaxed);
        self.beat_ns.store(now.0, Ordering::Relaxed);
        self.n_beats.fetch_add(1, Ordering::Release);
    }

    pub(super) fn n_beats(&self) -> u64 {
        self.n_beats.load(Ordering::Acquire)
    }

    /// `has_commands`: some were sent and not read, so that work is pending whatever the loop last knew.
    pub(super) fn check(&self, now: Nanos, limit: Nanos, has_commands: bool) -> Health {
        let silence = now.saturating_sub(Nanos(self.beat_ns.load(Ordering::Acquire)));
        if silence > limit && (has_commands || self.has_work.load(Ordering::Relaxed)) {
            return Health::Stuck(silence);
        }
        Health::Well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuck_is_pending_work_without_a_beat() {
        let (heartbeat, limit) = (Heartbeat::default(), Nanos::from_secs(10));
        heartbeat.beat(Nanos::from_secs(1), true);
        assert_eq!(heartbeat.check(Nanos::from_secs(11), limit, false), Health::Well);
        assert_eq!(
            heartbeat.check(Nanos::from_secs(12), limit, false),
            Health::Stuck(Nanos::from_secs(11))
        );
        heartbeat.beat(Nanos::from_secs(12), false);
        assert_eq!(heartbeat.check(Nanos::from_secs(99), limit, false), Health::Well);
        assert_eq!(
            heartbeat.check(Nanos::from_secs(99), limit, true),
            Health::Stuck(Nanos::from_secs(87))
        );
        assert_eq!(heartbeat.n_beats(), 2);
    }
}
