//! Finding the highest rate at which objectives are met. [`Search`] is pure: met or missed in, the next rate out.

use serde::{Deserialize, Serialize};

use super::report::BenchReport;

/// How rates are searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SweepOptions {
    /// The first rate, per second, above 0 and finite.
    pub start: f64,
    /// Share of requests that must meet the objectives, above 0 and at most 1. DistServe takes 0.9.
    pub attainment: f64,
    /// Most rates to try, at least 1.
    pub max_points: u32,
    /// The search ends when the lowest rate missed is above the highest met by at most this share.
    pub precision: f64,
    /// Arrivals of each rate last at least this long: a queue that grows shows only after a while.
    pub point_seconds: f64,
}

/// A search under way: doubles the rate until it is missed, halves it until it is met, then halves the gap on a logarithmic
/// scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    options: SweepOptions,
    highest_met: Option<f64>,
    lowest_missed: Option<f64>,
    n_points: u32,
}

impl Search {
    /// Nothing tried yet.
    pub fn new(options: SweepOptions) -> Search {
        Search {
            options,
            highest_met: None,
            lowest_missed: None,
            n_points: 0,
        }
    }

    /// The next rate to try; `None` when the search has ended.
    pub fn next_rate(&self) -> Option<f64> {
        if self.n_points >= self.options.max_points {
            return None;
        }
        match (self.highest_met, self.lowest_missed) {
            (None, None) => Some(self.options.start),
            (Some(met), None) => Some(met * 2.0),
            (None, Some(missed)) => Some(missed / 2.0),
            (Some(met), Some(missed)) if missed <= met * (1.0 + self.options.precision) => None,
            (Some(met), Some(missed)) => Some((met * missed).sqrt()),
        }
    }

    /// What `rate`, which was [`Self::next_rate`], came to.
    pub fn record(&mut self, rate: f64, is_met: bool) {
        self.n_points += 1;
        match is_met {
            true => self.highest_met = Some(rate),
            false => self.lowest_missed = Some(rate),
        }
    }

    /// The highest rate met.
    pub fn highest_met(&self) -> Option<f64> {
        self.highest_met
    }

    /// The lowest rate missed.
    pub fn lowest_missed(&self) -> Option<f64> {
        self.lowest_missed
    }
}

/// What a sweep found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepReport {
    /// Always `sweep`.
    pub kind: String,
    /// The objectives.
    pub goodput_objectives: String,
    /// Share of requests that had to meet them.
    pub attainment: f64,
    /// DistServe's goodput: the highest rate tried, in arrivals per second, at which that share met them; null if none did.
    pub goodput_rate: Option<f64>,
    /// The lowest rate tried at which it did not; null if all did, and then the goodput is higher than what was tried.
    pub lowest_rate_missed: Option<f64>,
    /// One report for each rate, in the order in which they were tried.
    pub points: Vec<BenchReport>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OPTIONS: SweepOptions = SweepOptions {
        start: 1.0,
        attainment: 0.9,
        max_points: 12,
        precision: 0.05,
        point_seconds: 0.0,
    };

    /// Searches a server that holds rates up to `limit`; returns the rates tried.
    fn search(options: SweepOptions, limit: f64) -> (Search, Vec<f64>) {
        let mut search = Search::new(options);
        let mut tried = Vec::new();
        while let Some(rate) = search.next_rate() {
            tried.push(rate);
            search.record(rate, rate <= limit);
        }
        (search, tried)
    }

    #[test]
    fn it_ramps_up_then_closes_in() {
        let (found, tried) = search(OPTIONS, 5.0);
        assert_eq!(tried[..4], [1.0, 2.0, 4.0, 8.0]);
        assert!((tried[4] - 32.0_f64.sqrt()).abs() < 1e-12);
        let met = found.highest_met().expect("1 is met");
        assert!(met <= 5.0 && met * 1.05 * 1.05 > 5.0, "{met}");
        let (found, tried) = search(OPTIONS, 0.3);
        assert_eq!(tried[..3], [1.0, 0.5, 0.25]);
        assert!(found.highest_met().is_some_and(|met| met <= 0.3));
    }

    #[test]
    fn it_ends_when_nothing_or_everything_is_met() {
        let options = SweepOptions {
            max_points: 4,
            ..OPTIONS
        };
        let (found, tried) = search(options, f64::INFINITY);
        assert_eq!(
            (tried.len(), found.highest_met(), found.lowest_missed()),
            (4, Some(8.0), None)
        );
        let (found, tried) = search(options, 0.0);
        assert_eq!(
            (tried.len(), found.highest_met(), found.lowest_missed()),
            (4, None, Some(0.125))
        );
    }

    proptest! {
        #[test]
        fn the_limit_is_always_between_the_two(limit in 0.01_f64..1000.0, start in 0.1_f64..50.0, max_points in 1_u32..30) {
            let options = SweepOptions { start, max_points, ..OPTIONS };
            let (found, tried) = search(options, limit);
            prop_assert!(tried.len() <= max_points as usize);
            prop_assert!(found.highest_met().is_none_or(|met| met <= limit));
            prop_assert!(found.lowest_missed().is_none_or(|missed| missed > limit));
            if let (Some(met), Some(missed)) = (found.highest_met(), found.lowest_missed()) {
                prop_assert!(missed <= 1.05 * met || tried.len() == max_points as usize);
            }
        }
    }
}
