//! Two servers measured in turn, A B A B, and their ratios. What changes on the machine between two rounds is in both sides of
//! a ratio.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::report::{BenchReport, E2elMs, ItlMs, TpotMs, TtftMs};

/// One round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// The first server.
    pub a: BenchReport,
    /// The second one, under the same load.
    pub b: BenchReport,
}

/// B over A, of the rounds in which both have a value above 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Median of the rounds.
    pub median: f64,
    /// Smallest of the rounds.
    pub min: f64,
    /// Largest of the rounds.
    pub max: f64,
    /// Each round's.
    pub rounds: Vec<f64>,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompareReport {
    /// Always `compare`.
    pub kind: String,
    /// The first server.
    pub a: String,
    /// The second one.
    pub b: String,
    /// B over A by key of the report. A time above 1 is longer at B, a rate above 1 is higher there.
    pub ratios: BTreeMap<String, Ratio>,
    /// In the order in which they were measured.
    pub rounds: Vec<Round>,
}

impl CompareReport {
    /// Of `rounds`, of which there is at least one.
    pub fn new(a: String, b: String, rounds: Vec<Round>) -> CompareReport {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for round in &rounds {
            for ((key, a), (_, b)) in compared(&round.a).into_iter().zip(compared(&round.b)) {
                if a > 0.0 && b > 0.0 {
                    values.entry(key.to_owned()).or_default().push(b / a);
                }
            }
        }
        CompareReport {
            kind: "compare".into(),
            a,
            b,
            ratios: values
                .into_iter()
                .map(|(key, rounds)| (key, Ratio::of(rounds)))
                .collect(),
            rounds,
        }
    }
}

impl Ratio {
    /// Of at least one round.
    fn of(rounds: Vec<f64>) -> Ratio {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        Ratio {
            median: match sorted.len().is_multiple_of(2) {
                true => (sorted[middle - 1] + sorted[middle]) / 2.0,
                false => sorted[middle],
            },
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            rounds,
        }
    }
}

/// What is compared, by its key; a value that a report lacks is 0.
fn compared(report: &BenchReport) -> Vec<(&'static str, f64)> {
    let mut values = vec![
        ("request_throughput", report.request_throughput),
        ("output_throughput", report.output_throughput),
        ("request_goodput", report.request_goodput.unwrap_or(0.0)),
    ];
    values.extend(TtftMs::KEYS.into_iter().zip(report.ttft.values()));
    values.extend(TpotMs::KEYS.into_iter().zip(report.tpot.values()));
    values.extend(ItlMs::KEYS.into_iter().zip(report.itl.values()));
    values.extend(E2elMs::KEYS.into_iter().zip(report.e2el.values()));
    values.retain(|(key, _)| !key.starts_with("std_"));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_rounds() {
        let ratio = Ratio::of(vec![1.2, 0.9, 1.0]);
        assert_eq!((ratio.median, ratio.min, ratio.max), (1.0, 0.9, 1.2));
        assert_eq!(ratio.rounds, [1.2, 0.9, 1.0], "in their order");
        assert_eq!(Ratio::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
    }
}
