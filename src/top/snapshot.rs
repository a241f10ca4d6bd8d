//! What a cluster does at one moment, and how fast since the moment before. Asks nobody.

use std::collections::HashMap;

use baton_proto::cluster::{InstanceStatus, RequestStatus};

use crate::ctl::requests::QUEUED;
use crate::ctl::{InstanceRow, RequestRow};

/// One instance with its rates; `None` until it was seen twice in one life.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceLine {
    /// Its state and load.
    pub row: InstanceRow,
    /// Steps per second.
    pub step_rate: Option<f64>,
    /// Tokens generated per second.
    pub decode_rate: Option<f64>,
    /// Prompt tokens computed per second.
    pub prefill_rate: Option<f64>,
}

/// The cluster at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// By name.
    pub instances: Vec<InstanceLine>,
    /// Oldest first; `None` from a server that does not list them.
    pub requests: Option<Vec<RequestRow>>,
}

impl Snapshot {
    /// Requests that change their instance.
    pub fn moves(&self) -> impl Iterator<Item = &RequestRow> {
        self.requests.iter().flatten().filter(|request| request.is_moving())
    }

    /// Requests that wait for a place, oldest first.
    pub fn queued(&self) -> impl Iterator<Item = &RequestRow> {
        self.requests.iter().flatten().filter(|request| request.stage == QUEUED)
    }

    /// The sum of a rate over the instances that have it.
    pub fn total(&self, rate: impl Fn(&InstanceLine) -> Option<f64>) -> f64 {
        self.instances.iter().filter_map(rate).sum()
    }
}

/// Counters of one instance, and the life they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    incarnation: u64,
    n_steps: u64,
    n_decode_tokens: u64,
    n_prefill_tokens: u64,
}

impl Counters {
    fn of(status: &InstanceStatus) -> Counters {
        let load = status.load.as_ref();
        let counter = |name: &str| load.and_then(|load| load.counters.get(name)).copied().unwrap_or(0);
        Counters {
            incarnation: status.join.as_ref().map_or(0, |join| join.incarnation),
            n_steps: load.map_or(0, |load| load.n_steps),
            n_decode_tokens: counter("decode_tokens_total"),
            n_prefill_tokens: counter("prefill_tokens_total"),
        }
    }
}

/// Turns answers into snapshots, with rates from one answer to the next.
#[derive(Debug, Default)]
pub struct Rates {
    before: HashMap<String, Counters>,
}

impl Rates {
    /// The snapshot of answers that came `seconds` after those before.
    pub fn snapshot(
        &mut self,
        seconds: f64,
        instances: Vec<InstanceStatus>,
        requests: Option<Vec<RequestStatus>>,
    ) -> Snapshot {
        let name = |status: &InstanceStatus| {
            status
                .join
                .as_ref()
                .map_or_else(String::new, |join| join.instance_id.clone())
        };
        let now: HashMap<String, Counters> = instances
            .iter()
            .map(|status| (name(status), Counters::of(status)))
            .collect();
        let before = std::mem::replace(&mut self.before, now);
        let rows = InstanceRow::all(instances, requests.as_deref());
        let lines = rows.into_iter().map(|row| {
            let now = self.before.get(&row.id);
            // A new life counts from 0.
            let pair = before
                .get(&row.id)
                .zip(now)
                .filter(|(before, now)| before.incarnation == now.incarnation);
            let rate = |counter: fn(&Counters) -> u64| {
                let (before, now) = pair?;
                (seconds > 0.0).then(|| counter(now).saturating_sub(counter(before)) as f64 / seconds)
            };
            InstanceLine {
                step_rate: rate(|counters| counters.n_steps),
                decode_rate: rate(|counters| counters.n_decode_tokens),
                prefill_rate: rate(|counters| counters.n_prefill_tokens),
                row,
            }
        });
        Snapshot {
            instances: lines.collect(),
            requests: requests.map(RequestRow::all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests::{instance, request};

    fn counted(n_steps: u64, n_decode: u64, incarnation: u64) -> InstanceStatus {
        let mut status = instance("decode-0", "decode", 1);
        let load = status.load.as_mut().expect("a load");
        load.n_steps = n_steps;
        load.counters = [("decode_tokens_total".to_owned(), n_decode)].into();
        status.join.as_mut().expect("a join").incarnation = incarnation;
        status
    }

    #[test]
    fn rates_are_of_one_life() {
        let mut rates = Rates::default();
        let first = rates.snapshot(0.0, vec![counted(10, 100, 1)], None);
        assert_eq!(first.instances[0].step_rate, None);
        assert_eq!(first.requests, None);
        let second = rates.snapshot(2.0, vec![counted(30, 160, 1)], None);
        let line = &second.instances[0];
        assert_eq!(
            (line.step_rate, line.decode_rate, line.prefill_rate),
            (Some(10.0), Some(30.0), Some(0.0))
        );
        assert_eq!(second.total(|line| line.decode_rate), 30.0);
        let reborn = rates.snapshot(2.0, vec![counted(5, 5, 2)], None);
        assert_eq!(reborn.instances[0].step_rate, None);
    }

    #[test]
    fn moves_and_the_queue_are_told_apart() {
        let requests = vec![
            request("a", "decode", 1.0),
            request("b", "moving", 2.0),
            request("c", QUEUED, 3.0),
        ];
        let snapshot = Rates::default().snapshot(0.0, Vec::new(), Some(requests));
        assert_eq!(snapshot.moves().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["b"]);
        assert_eq!(snapshot.queued().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["c"]);
    }
}
