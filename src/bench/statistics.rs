//! Means, deviations and percentiles of measured values, and how sure they are.

use super::random::SplitMix64;

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

/// 95 % intervals of a mean and of percentiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Intervals {
    /// Of the mean.
    pub mean: [f64; 2],
    /// Of the percentiles 50, 90, 95 and 99.
    pub percentiles: [[f64; 2]; 4],
}

const PERCENTS: [f64; 4] = [50.0, 90.0, 95.0, 99.0];

/// Values that all resamples together may walk over.
const RESAMPLED_VALUES: usize = 50_000_000;

/// By the percentile bootstrap (Efron 1979): of the values of groups (of one request each) that are drawn anew with
/// repetition. Groups are drawn whole, because the values of one resemble each other. `None` for fewer than two groups that
/// have any value.
pub fn intervals(groups: &[Vec<f64>], seed: u64) -> Option<Intervals> {
    let groups: Vec<&Vec<f64>> = groups.iter().filter(|group| !group.is_empty()).collect();
    if groups.len() < 2 {
        return None;
    }
    let mut sorted: Vec<(f64, usize)> = Vec::new();
    for (owner, group) in groups.iter().enumerate() {
        sorted.extend(group.iter().map(|value| (*value, owner)));
    }
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let sums: Vec<f64> = groups.iter().map(|group| group.iter().sum()).collect();
    let n_groups = u32::try_from(groups.len()).ok()?;
    let n_resamples = (RESAMPLED_VALUES / sorted.len()).clamp(100, 1000);
    let mut random = SplitMix64::new(seed, 0);
    let mut means = Vec::with_capacity(n_resamples);
    let mut percentiles = [const { Vec::new() }; 4];
    let mut weights = vec![0_u32; groups.len()];
    for _ in 0..n_resamples {
        weights.fill(0);
        for _ in 0..n_groups {
            weights[random.below(n_groups) as usize] += 1;
        }
        let drawn = || weights.iter().map(|weight| *weight as usize).zip(&groups);
        let n_values: usize = drawn().map(|(weight, group)| weight * group.len()).sum();
        let sum: f64 = weights
            .iter()
            .zip(&sums)
            .map(|(weight, sum)| f64::from(*weight) * sum)
            .sum();
        means.push(sum / n_values as f64);
        let ranks = PERCENTS.map(|percent| percent / 100.0 * (n_values - 1) as f64);
        for (values, value) in percentiles.iter_mut().zip(at_ranks(&sorted, &weights, ranks)) {
            values.push(value);
        }
    }
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        [percentile(&values, 2.5), percentile(&values, 97.5)]
    };
    Some(Intervals {
        mean: middle(means),
        percentiles: percentiles.map(middle),
    })
}

/// The values at `ranks`, ascending, of `sorted` (value, owner) if each value stood there as often as its owner weighs.
fn at_ranks(sorted: &[(f64, usize)], weights: &[u32], ranks: [f64; 4]) -> [f64; 4] {
    let weighed = sorted.iter().map(|(value, owner)| (*value, weights[*owner] as usize));
    let mut walk = weighed.filter(|(_, n)| *n > 0).peekable();
    // `value` stands at the positions below `end` that no value before it holds.
    let (mut value, mut end) = walk.next().unwrap_or_default();
    ranks.map(|rank| {
        let position = rank.floor() as usize;
        while end <= position
            && let Some((next, n)) = walk.next()
        {
            (value, end) = (next, end + n);
        }
        let above = match walk.peek() {
            Some((next, _)) if end == position + 1 => *next,
            _ => value,
        };
        value + (above - value) * rank.fract()
    })
}

/// The 95 % interval of a share of which `n_met` of `n` were seen, by Wilson's score; `None` of nothing.
pub fn wilson(n_met: usize, n: usize) -> Option<[f64; 2]> {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return None;
    }
    let (share, n) = (n_met as f64 / n as f64, n as f64);
    let middle = share + Z * Z / (2.0 * n);
    let reach = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    Some([((middle - reach) / scale).max(0.0), ((middle + reach) / scale).min(1.0)])
}

/// Linear interpolation between the closest ranks of `sorted`, which is not empty.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
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
    fn weighted_ranks_are_those_of_the_repeated_values() {
        let mut random = SplitMix64::new(2, 0);
        for _ in 0..200 {
            let n_groups = 1 + random.below(5) as usize;
            let mut sorted: Vec<(f64, usize)> = (0..1 + random.below(20))
                .map(|_| (f64::from(random.below(9)), random.below(n_groups as u32) as usize))
                .collect();
            sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
            let weights: Vec<u32> = (0..n_groups).map(|_| 1 + random.below(3)).collect();
            let repeated: Vec<f64> = sorted
                .iter()
                .flat_map(|(value, owner)| std::iter::repeat_n(*value, weights[*owner] as usize))
                .collect();
            let ranks = PERCENTS.map(|percent| percent / 100.0 * (repeated.len() - 1) as f64);
            let expected = PERCENTS.map(|percent| percentile(&repeated, percent));
            assert_eq!(at_ranks(&sorted, &weights, ranks), expected, "{repeated:?}");
        }
    }

    #[test]
    fn intervals_cover_what_they_should() {
        // Of 200 samples of 100 exponential values, about 95 % of the intervals hold the true mean and median; four standard
        // errors of that share are 6 %, and the bootstrap of a skewed sample is known to fall short by some per cent.
        let (mut holds_mean, mut holds_median) = (0, 0);
        for seed in 0..200 {
            let mut random = SplitMix64::new(seed, 1);
            let groups: Vec<Vec<f64>> = (0..100).map(|_| vec![random.exponential()]).collect();
            let found = intervals(&groups, seed).expect("many groups");
            let holds = |[low, high]: [f64; 2], value: f64| usize::from(low <= value && value <= high);
            holds_mean += holds(found.mean, 1.0);
            holds_median += holds(found.percentiles[0], 2.0_f64.ln());
        }
        assert!((174..=200).contains(&holds_mean), "{holds_mean}");
        assert!((178..=200).contains(&holds_median), "{holds_median}");
    }

    #[test]
    fn values_of_one_request_count_as_one_observation() {
        let mut random = SplitMix64::new(3, 0);
        let levels: Vec<f64> = (0..40).map(|_| random.exponential()).collect();
        let alone: Vec<Vec<f64>> = levels.iter().map(|level| vec![*level]).collect();
        let repeated: Vec<Vec<f64>> = levels.iter().map(|level| vec![*level; 50]).collect();
        let width = |groups: &[Vec<f64>]| {
            let [low, high] = intervals(groups, 4).expect("many groups").mean;
            high - low
        };
        assert!(
            (width(&repeated) / width(&alone) - 1.0).abs() < 0.01,
            "fifty equal values say no more than one"
        );
        assert_eq!(intervals(&[vec![1.0, 2.0], vec![]], 0), None);
    }

    #[test]
    fn shares_have_wilsons_interval() {
        // Of 9 in 10: 0.5958 to 0.9821.
        let [low, high] = wilson(9, 10).expect("some");
        assert!(
            (low - 0.5958).abs() < 1e-4 && (high - 0.9821).abs() < 1e-4,
            "{low} {high}"
        );
        assert_eq!(wilson(0, 0), None);
        assert_eq!(wilson(5, 5).expect("some")[1], 1.0);
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
