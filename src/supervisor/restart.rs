//! When a dead child is started again. Pure: exits and `now` go in, verdicts come out.

use baton_scheduler::ids::Nanos;

/// Doubling pauses between restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    first: Nanos,
    limit: Nanos,
    n_failures: u32,
}

impl Backoff {
    /// Pauses of `first`, twice that, and so on, up to `limit`.
    pub const fn new(first: Nanos, limit: Nanos) -> Backoff {
        Backoff {
            first,
            limit,
            n_failures: 0,
        }
    }

    /// The pause after one more failure.
    pub fn next_pause(&mut self) -> Nanos {
        let doubled = 1_u64
            .checked_shl(self.n_failures)
            .and_then(|factor| self.first.0.checked_mul(factor));
        self.n_failures = self.n_failures.saturating_add(1);
        Nanos(doubled.unwrap_or(u64::MAX)).min(self.limit)
    }

    /// Forgets the failures.
    pub fn reset(&mut self) {
        self.n_failures = 0;
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// It could not even be started.
    NotStarted,
}

/// Why no further start is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// The child refused its configuration: it would again.
    Configuration,
    /// It died this many times in a row and has never been ready.
    NeverReady(u32),
}

/// What to do about a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start the next incarnation after this pause.
    RestartAfter(Nanos),
    /// Stop.
    GiveUp(GiveUp),
}

/// One child's record.
#[derive(Clone, Debug)]
pub struct RestartPolicy {
    backoff: Backoff,
    healthy_after: Nanos,
    n_starts_limit: u32,
    n_starts_failed: u32,
    ready_since: Option<Nanos>,
    was_ever_ready: bool,
}

impl RestartPolicy {
    /// A child's exit code for a refused configuration.
    const CONFIGURATION: i32 = 2;

    /// The policy of `serve`: pauses from 100 ms to 10 s, forgotten after 30 s of readiness; three starts for a child that
    /// has never been ready.
    pub const fn of_serve() -> RestartPolicy {
        RestartPolicy {
            backoff: Backoff::new(Nanos::from_millis(100), Nanos::from_secs(10)),
            healthy_after: Nanos::from_secs(30),
            n_starts_limit: 3,
            n_starts_failed: 0,
            ready_since: None,
            was_ever_ready: false,
        }
    }

    /// The child said that it is ready.
    pub fn on_ready(&mut self, now: Nanos) {
        self.ready_since.get_or_insert(now);
        self.was_ever_ready = true;
    }

    /// The child ended, not asked to.
    pub fn on_exit(&mut self, now: Nanos, exit: Exit) -> Verdict {
        let ready_since = self.ready_since.take();
        if ready_since.is_some_and(|since| now.saturating_sub(since) >= self.healthy_after) {
            self.backoff.reset();
        }
        if !self.was_ever_ready {
            self.n_starts_failed += 1;
            if exit == Exit::Code(Self::CONFIGURATION) {
                return Verdict::GiveUp(GiveUp::Configuration);
            }
            if self.n_starts_failed >= self.n_starts_limit {
                return Verdict::GiveUp(GiveUp::NeverReady(self.n_starts_failed));
            }
        }
        Verdict::RestartAfter(self.backoff.next_pause())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KILLED: Exit = Exit::Signal(9);

    fn pause_ms(verdict: Verdict) -> u64 {
        match verdict {
            Verdict::RestartAfter(pause) => pause.0 / 1_000_000,
            Verdict::GiveUp(why) => panic!("gave up: {why:?}"),
        }
    }

    #[test]
    fn pauses_double_up_to_the_limit_and_are_forgotten_after_health() {
        let mut policy = RestartPolicy::of_serve();
        let mut now = Nanos::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            policy.on_ready(now);
            pauses.push(pause_ms(policy.on_exit(now, KILLED)));
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);

        policy.on_ready(now);
        now = now.saturating_add(Nanos::from_millis(29_999));
        assert_eq!(
            pause_ms(policy.on_exit(now, KILLED)),
            10_000,
            "not healthy for long enough"
        );
        policy.on_ready(now);
        now = now.saturating_add(Nanos::from_secs(30));
        assert_eq!(pause_ms(policy.on_exit(now, KILLED)), 100);
    }

    #[test]
    fn a_child_that_has_never_been_ready_gets_three_starts() {
        let mut policy = RestartPolicy::of_serve();
        assert_eq!(pause_ms(policy.on_exit(Nanos::ZERO, Exit::Code(1))), 100);
        assert_eq!(pause_ms(policy.on_exit(Nanos::ZERO, Exit::NotStarted)), 200);
        assert_eq!(
            policy.on_exit(Nanos::ZERO, KILLED),
            Verdict::GiveUp(GiveUp::NeverReady(3))
        );
    }

    #[test]
    fn a_refused_configuration_is_not_tried_again() {
        let mut policy = RestartPolicy::of_serve();
        assert_eq!(
            policy.on_exit(Nanos::ZERO, Exit::Code(2)),
            Verdict::GiveUp(GiveUp::Configuration)
        );
    }

    #[test]
    fn once_ready_a_child_is_never_given_up() {
        let mut policy = RestartPolicy::of_serve();
        policy.on_ready(Nanos::ZERO);
        for code in [1, 2, 1, 2, 1, 2] {
            pause_ms(policy.on_exit(Nanos::ZERO, Exit::Code(code)));
        }
    }

    proptest! {
        #[test]
        fn pauses_never_shrink_nor_pass_the_limit(first in 1_u64.., limit in 1_u64.., n in 1_usize..200) {
            let mut backoff = Backoff::new(Nanos(first), Nanos(limit));
            let pauses: Vec<u64> = (0..n).map(|_| backoff.next_pause().0).collect();
            prop_assert!(pauses.is_sorted());
            prop_assert!(pauses.iter().all(|pause| *pause <= limit));
        }
    }
}
