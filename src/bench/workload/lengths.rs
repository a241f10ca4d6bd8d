//! How long prompts, outputs and sessions are: distributions over whole numbers from 1 on.

use std::fmt;

use super::super::random::SplitMix64;

/// No prompt or output is longer, so that one draw of a heavy tail cannot fill the memory.
pub const LENGTH_LIMIT: u32 = 1 << 24;

/// A distribution of lengths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
    /// Every length from `low` to `high`, both included, is equally likely.
    Uniform {
        /// At least 1.
        low: u32,
        /// At least `low`.
        high: u32,
    },
    /// Log-normal, rounded.
    LogNormal {
        /// At least 1.
        mean: f64,
        /// Deviation over mean, above 0.
        cv: f64,
    },
}

/// Prompts like ShareGPT's. The mean is the one that the vLLM paper reports (Kwon and others 2023, figure 11); the spread
/// is our choice for the long tail that its histogram shows.
pub const SHAREGPT_PROMPTS: Lengths = Lengths::LogNormal { mean: 161.31, cv: 1.5 };
/// Outputs like ShareGPT's; from where, see [`SHAREGPT_PROMPTS`].
pub const SHAREGPT_OUTPUTS: Lengths = Lengths::LogNormal { mean: 337.99, cv: 0.8 };

impl Lengths {
    /// One length, from 1 to [`LENGTH_LIMIT`].
    pub fn draw(self, random: &mut SplitMix64) -> u32 {
        let length = match self {
            Lengths::Fixed(length) => length,
            Lengths::Uniform { low, high } => low + random.below(high - low + 1),
            Lengths::LogNormal { mean, cv } => {
                let variance = (1.0 + cv * cv).ln();
                let drawn = (mean.ln() - variance / 2.0 + variance.sqrt() * random.normal()).exp();
                // A conversion saturates, so the tail ends at the limit.
                drawn.round() as u32
            }
        };
        length.clamp(1, LENGTH_LIMIT)
    }

    /// `N`, `uniform:LOW-HIGH`, `lognormal:MEAN,CV` or `sharegpt`, which means `sharegpt`.
    pub fn parse(text: &str, sharegpt: Lengths) -> Option<Lengths> {
        let whole = |text: &str| text.parse().ok().filter(|length| (1..=LENGTH_LIMIT).contains(length));
        if let Some(range) = text.strip_prefix("uniform:") {
            let (low, high) = range.split_once('-')?;
            let (low, high) = (whole(low)?, whole(high)?);
            return (low <= high).then_some(Lengths::Uniform { low, high });
        }
        if let Some(moments) = text.strip_prefix("lognormal:") {
            let (mean, cv) = moments.split_once(',')?;
            let (mean, cv): (f64, f64) = (mean.parse().ok()?, cv.parse().ok()?);
            let is_valid = (1.0..=f64::from(LENGTH_LIMIT)).contains(&mean) && (0.001..=100.0).contains(&cv);
            return is_valid.then_some(Lengths::LogNormal { mean, cv });
        }
        match text {
            "sharegpt" => Some(sharegpt),
            _ => whole(text).map(Lengths::Fixed),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lengths::Fixed(length) => write!(f, "{length}"),
            Lengths::Uniform { low, high } => write!(f, "uniform:{low}-{high}"),
            Lengths::LogNormal { mean, cv } => write!(f, "lognormal:{mean},{cv}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_have_their_mean_and_range() {
        for (text, mean, low, high) in [
            ("7", 7.0, 7, 7),
            ("uniform:10-20", 15.0, 10, 20),
            ("lognormal:200,1.2", 200.0, 1, LENGTH_LIMIT),
            ("sharegpt", 161.31, 1, LENGTH_LIMIT),
        ] {
            let lengths = Lengths::parse(text, SHAREGPT_PROMPTS).expect(text);
            let mut random = SplitMix64::new(3, 0);
            let draws: Vec<u32> = (0..100_000).map(|_| lengths.draw(&mut random)).collect();
            let found = draws.iter().copied().map(f64::from).sum::<f64>() / 1e5;
            assert!((found / mean - 1.0).abs() < 0.03, "{text}: mean {found}");
            assert!(draws.iter().all(|draw| (low..=high).contains(draw)), "{text}");
            if text != "7" {
                let few: std::collections::BTreeSet<u32> = draws.into_iter().collect();
                assert!(few.len() >= 11, "{text}: {} different lengths", few.len());
            }
        }
    }

    #[test]
    fn a_log_normal_has_its_median_and_spread() {
        let lengths = Lengths::LogNormal { mean: 1000.0, cv: 1.0 };
        let mut random = SplitMix64::new(4, 0);
        let mut draws: Vec<u32> = (0..100_001).map(|_| lengths.draw(&mut random)).collect();
        draws.sort_unstable();
        // Median = mean / sqrt(1 + cv^2); one deviation of the logarithm above it lies at 84.13 %.
        let (median, above) = (f64::from(draws[50_000]), f64::from(draws[84_134]));
        assert!((median / 707.1 - 1.0).abs() < 0.02, "{median}");
        assert!(
            (above / median / 2.0_f64.ln().sqrt().exp() - 1.0).abs() < 0.03,
            "{above}"
        );
    }

    #[test]
    fn what_is_no_distribution_is_refused() {
        for text in [
            "",
            "0",
            "-1",
            "1.5",
            "uniform:5",
            "uniform:0-5",
            "uniform:6-5",
            "lognormal:5",
            "lognormal:0,1",
            "lognormal:9,0",
            "lognormal:9,nan",
            "zipf:3",
            "99999999999",
        ] {
            assert_eq!(Lengths::parse(text, SHAREGPT_PROMPTS), None, "{text}");
        }
        for text in ["512", "uniform:1-2", "lognormal:10,0.5"] {
            assert_eq!(Lengths::parse(text, SHAREGPT_PROMPTS).expect(text).to_string(), text);
        }
    }
}
