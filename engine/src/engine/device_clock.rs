//! How long steps have been in flight. Asks the host's clock alone: a device that waits for the next launch while the host
//! has not collected the last one counts as busy.

use std::time::Instant;

#[derive(Debug, Default)]
pub(super) struct DeviceClock {
    /// Since when a step has been in flight, as far as it is not in `busy_ns`.
    busy_since: Option<Instant>,
    busy_ns: u64,
}

impl DeviceClock {
    /// A step is about to be launched.
    pub(super) fn launch(&mut self) {
        self.busy_since.get_or_insert_with(Instant::now);
    }

    /// A step is in flight no more, `n_left` others are. Returns the time so far.
    pub(super) fn collect(&mut self, n_left: usize) -> u64 {
        let busy_ns = self.busy_ns();
        if n_left == 0 {
            self.busy_since = None;
        }
        busy_ns
    }

    /// Time with a step in flight.
    pub(super) fn busy_ns(&mut self) -> u64 {
        if let Some(since) = self.busy_since {
            let now = Instant::now();
            self.busy_ns += now.duration_since(since).as_nanos() as u64;
            self.busy_since = Some(now);
        }
        self.busy_ns
    }
}
