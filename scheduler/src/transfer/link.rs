//! A bounded link as a source sees it: how many messages are on it, and since when it takes nothing.

use crate::ids::Nanos;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    n_in_flight: u32,
    max_in_flight: u32,
    stalled_since: Option<Nanos>,
    stall_deadline: Nanos,
}

impl Link {
    pub(super) fn new(max_in_flight: u32, stall_deadline: Nanos) -> Link {
        assert!(max_in_flight > 0, "a link that takes nothing");
        Link {
            n_in_flight: 0,
            max_in_flight,
            stalled_since: None,
            stall_deadline,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.n_in_flight < self.max_in_flight
    }

    pub(super) fn is_empty(&self) -> bool {
        self.n_in_flight == 0
    }

    pub(super) fn put(&mut self) {
        self.n_in_flight += 1;
    }

    pub(super) fn taken(&mut self) {
        assert!(self.n_in_flight > 0, "the link took a message that was never sent");
        self.n_in_flight -= 1;
        self.stalled_since = None;
    }

    /// To be called after everything that may have filled the link.
    pub(super) fn note_fullness(&mut self, now: Nanos) {
        if !self.has_room() && self.stalled_since.is_none() {
            self.stalled_since = Some(now);
        }
    }

    /// Whether it has been full and taken nothing for the whole deadline.
    pub(super) fn is_overdue(&self, now: Nanos) -> bool {
        self.stalled_since
            .is_some_and(|since| now >= since.saturating_add(self.stall_deadline))
    }
}
