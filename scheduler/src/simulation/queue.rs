//! Events in the order of their time, and of their scheduling where that is equal.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::network::Event;
use crate::ids::Nanos;

struct Scheduled {
    at: Nanos,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Scheduled) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Scheduled) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Scheduled) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

#[derive(Default)]
pub(super) struct Queue {
    events: BinaryHeap<Reverse<Scheduled>>,
    n_scheduled: u64,
}

impl Queue {
    pub(super) fn push(&mut self, at: Nanos, event: Event) {
        let number = self.n_scheduled;
        self.n_scheduled += 1;
        self.events.push(Reverse(Scheduled { at, number, event }));
    }

    pub(super) fn pop(&mut self) -> Option<(Nanos, Event)> {
        self.events
            .pop()
            .map(|Reverse(scheduled)| (scheduled.at, scheduled.event))
    }
}
