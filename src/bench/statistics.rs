//! Means, deviations and percentiles of measured values.

/// What is said of a set of values; all zero for none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation of the population.
    pub std: f64,
    /// 50th percentile.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Summary {
    /// Of `values`, none of which is NaN.
    pub fn of(mut values: Vec<f64>) -> Summary {
        if values.is_empty() {
            return Summary::default();
        }
        values.sort_by(f64::total_cmp);
        let n_values = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n_values;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n_values;
        let at = |percent| percentile(&values, percent);
        Summary {
            mean,
            std: variance.sqrt(),
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
        }
    }
}

/// Linear interpolation between the closest ranks of `sorted`, which is not empty.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = percent / 100.0 * (sorted.len() - 1) as f64;
    let below = sorted[rank.floor() as usize];
    let above = sorted[rank.ceil() as usize];
    below + (above - below) * rank.fract()
}

/// The largest number of `[start, end)` intervals that hold one point.
pub fn max_overlap(intervals: &[(f64, f64)]) -> usize {
    let mut edges: Vec<(f64, i64)> = intervals
        .iter()
        .flat_map(|(start, end)| [(*start, 1), (*end, -1)])
        .collect();
    // At one point, ends come before starts.
    edges.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let running = edges.iter().scan(0_i64, |n_open, (_, change)| {
        *n_open += change;
        Some(*n_open)
    });
    usize::try_from(running.max().unwrap_or(0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([4, 1, 3, 2], [50, 90, 95, 99]), mean and std of the same.
        let summary = Summary::of(vec![4.0, 1.0, 3.0, 2.0]);
        let expected = [2.5, 1.118_033_988_749_895, 2.5, 3.7, 3.85, 3.97];
        let found = [
            summary.mean,
            summary.std,
            summary.p50,
            summary.p90,
            summary.p95,
            summary.p99,
        ];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        }
        assert_eq!(Summary::of(vec![]), Summary::default());
        assert_eq!(Summary::of(vec![5.0]).p99, 5.0);
    }

    #[test]
    fn touching_intervals_do_not_overlap() {
        assert_eq!(max_overlap(&[]), 0);
        assert_eq!(max_overlap(&[(0.0, 1.0), (1.0, 2.0)]), 1);
        assert_eq!(max_overlap(&[(0.0, 3.0), (1.0, 2.0), (1.5, 4.0), (3.5, 5.0)]), 3);
    }

    proptest! {
        #[test]
        fn overlap_agrees_with_counting(intervals in proptest::collection::vec((0_u8..50, 1_u8..20), 0..30)) {
            let intervals: Vec<(f64, f64)> =
                intervals.into_iter().map(|(start, length)| (f64::from(start), f64::from(start + length))).collect();
            let holding = |point: f64| intervals.iter().filter(|(start, end)| *start <= point && point < *end).count();
            let naive = intervals.iter().map(|(start, _)| holding(*start)).max().unwrap_or(0);
            prop_assert_eq!(max_overlap(&intervals), naive);
        }
    }
}
