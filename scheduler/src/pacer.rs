//! The rate limit of background moves: so many bytes a second, with a short burst. Says when; waiting is the caller's.

use crate::ids::Nanos;

/// How far ahead of its rate an idle pacer may let its user run.
const BURST: Nanos = Nanos::from_millis(10);

/// A leaky bucket over virtual time (the generic cell rate algorithm, ITU-T I.371).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pacer {
    bytes_per_second: Option<u64>,
    /// When what was taken so far would have gone at the exact rate.
    paid_until: Nanos,
}

impl Pacer {
    /// `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Pacer {
        Pacer {
            bytes_per_second: bytes_per_second.map(|rate| rate.max(1)),
            paid_until: Nanos::ZERO,
        }
    }

    /// Takes `n_bytes` at `now`. Returns when the next may be taken, which is `now` within the burst.
    pub fn take(&mut self, now: Nanos, n_bytes: u64) -> Nanos {
        let Some(rate) = self.bytes_per_second else { return now };
        let cost = u128::from(n_bytes) * 1_000_000_000 / u128::from(rate);
        let cost = Nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        self.paid_until = self.paid_until.max(now).saturating_add(cost);
        self.paid_until.saturating_sub(BURST).max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(Pacer::new(None).take(Nanos(7), u64::MAX), Nanos(7));
    }

    proptest! {
        /// Whoever takes no earlier than it was told stays within rate and burst over every span, and is never told to
        /// wait longer than what it took costs.
        #[test]
        fn the_rate_is_kept(
            rate in 1_000u64..10_000_000_000,
            takes in prop::collection::vec((0u64..5_000_000, 0u64..50_000_000), 1..60),
        ) {
            let mut pacer = Pacer::new(Some(rate));
            let mut now = Nanos::ZERO;
            let mut taken: Vec<(Nanos, u64)> = Vec::new();
            for (n_bytes, idle) in takes {
                let next = pacer.take(now, n_bytes);
                let cost = n_bytes as f64 / rate as f64;
                prop_assert!(next >= now);
                prop_assert!(next.saturating_sub(now).as_secs_f64() <= cost + BURST.as_secs_f64() + 1e-6);
                taken.push((now, n_bytes));
                now = next.saturating_add(Nanos(idle));
            }
            for first in 0..taken.len() {
                let mut sum = 0u64;
                for &(at, n_bytes) in &taken[first..] {
                    // What was taken before `at` within the span went at the rate, but for the burst.
                    let span = at.saturating_sub(taken[first].0).as_secs_f64() + BURST.as_secs_f64() + 1e-6;
                    prop_assert!(sum as f64 <= rate as f64 * span * (1.0 + 1e-9) + 1.0, "{sum} bytes in {span} s at {rate}/s");
                    sum += n_bytes;
                }
            }
        }
    }
}
