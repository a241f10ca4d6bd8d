//! When requests arrive: closed loop, arrival processes, or the times of a trace.

use std::fmt;
use std::time::Duration;

use super::super::random::SplitMix64;

/// How requests (with several turns: sessions) arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// This many at any time: the next one starts when one ends.
    Closed {
        /// Sessions in flight, at least 1.
        concurrency: usize,
    },
    /// However many are in flight.
    Open {
        /// Mean arrivals per second, above 0; infinite sends all at once.
        rate: f64,
        /// How they are spread.
        process: ArrivalProcess,
    },
    /// At the times of the trace.
    Recorded {
        /// The trace's times are multiplied by this, above 0: 0.5 plays it twice as fast.
        scale: f64,
    },
}

/// How arrivals of one mean rate are spread in time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ArrivalProcess {
    /// Independent exponential gaps.
    Poisson,
    /// Independent gamma gaps.
    Gamma {
        /// Deviation of the gaps over their mean, above 0; 1 is Poisson, more is burstier.
        cv: f64,
    },
    /// Equal gaps.
    Uniform,
    /// So many at once, at equal gaps.
    Bursts {
        /// At least 1.
        size: u32,
    },
    /// A Poisson process that is on and off in turn, and on first; its rate while on is such that the mean holds.
    OnOff {
        /// Above 0.
        on: Duration,
        /// Above 0.
        off: Duration,
    },
}

impl ArrivalProcess {
    /// When each of `n` arrivals at a mean of `rate` per second comes, ascending, the first at 0.
    pub fn times(self, rate: f64, n: usize, random: &mut SplitMix64) -> Vec<Duration> {
        let mut at = 0.0;
        (0..n)
            .map(|index| {
                let arrival = match self {
                    ArrivalProcess::OnOff { on, off } => stretched(at, on.as_secs_f64(), off.as_secs_f64()),
                    _ => at,
                };
                at += self.gap(index, random) / rate;
                // An infinite rate over a finite gap is 0; what is beyond counting is never due.
                Duration::try_from_secs_f64(arrival).unwrap_or(Duration::MAX)
            })
            .collect()
    }

    /// The gap after arrival `index`, of mean 1.
    fn gap(self, index: usize, random: &mut SplitMix64) -> f64 {
        match self {
            ArrivalProcess::Poisson => random.exponential(),
            ArrivalProcess::Gamma { cv } => {
                let shape = 1.0 / (cv * cv);
                random.gamma(shape) / shape
            }
            ArrivalProcess::Uniform => 1.0,
            ArrivalProcess::Bursts { size } if (index + 1).is_multiple_of(size as usize) => f64::from(size),
            ArrivalProcess::Bursts { .. } => 0.0,
            ArrivalProcess::OnOff { .. } => random.exponential(),
        }
    }

    /// Shape of the gamma distribution of the gaps, which `vllm bench serve` calls burstiness; none if they have another.
    pub fn burstiness(self) -> Option<f64> {
        match self {
            ArrivalProcess::Poisson => Some(1.0),
            ArrivalProcess::Gamma { cv } => Some(1.0 / (cv * cv)),
            ArrivalProcess::Uniform | ArrivalProcess::Bursts { .. } | ArrivalProcess::OnOff { .. } => None,
        }
    }

    /// `poisson`, `gamma:CV`, `uniform`, `bursts:N` or `on-off:ON,OFF` in seconds.
    pub fn parse(text: &str) -> Option<ArrivalProcess> {
        let (name, argument) = text.split_once(':').unwrap_or((text, ""));
        let positive = |text: &str| {
            text.parse::<f64>()
                .ok()
                .filter(|value| value.is_finite() && *value > 0.0)
        };
        let span = |text: &str| {
            Duration::try_from_secs_f64(positive(text)?)
                .ok()
                .filter(|span| !span.is_zero())
        };
        match (name, argument) {
            ("poisson", "") => Some(ArrivalProcess::Poisson),
            ("uniform", "") => Some(ArrivalProcess::Uniform),
            ("gamma", cv) => positive(cv)
                .filter(|cv| (0.01..=100.0).contains(cv))
                .map(|cv| ArrivalProcess::Gamma { cv }),
            ("bursts", size) => size
                .parse()
                .ok()
                .filter(|size| *size > 0)
                .map(|size| ArrivalProcess::Bursts { size }),
            ("on-off", spans) => {
                let (on, off) = spans.split_once(',')?;
                Some(ArrivalProcess::OnOff {
                    on: span(on)?,
                    off: span(off)?,
                })
            }
            _ => None,
        }
    }
}

/// A process without pauses and of the mean rate, put into the times in which it is on: `at` seconds of it hold as many
/// arrivals as `at * on / (on + off)` seconds of being on.
fn stretched(at: f64, on: f64, off: f64) -> f64 {
    let running = at * on / (on + off);
    running + (running / on).floor() * off
}

impl fmt::Display for ArrivalProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArrivalProcess::Poisson => f.write_str("poisson"),
            ArrivalProcess::Gamma { cv } => write!(f, "gamma:{cv}"),
            ArrivalProcess::Uniform => f.write_str("uniform"),
            ArrivalProcess::Bursts { size } => write!(f, "bursts:{size}"),
            ArrivalProcess::OnOff { on, off } => write!(f, "on-off:{},{}", on.as_secs_f64(), off.as_secs_f64()),
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arrivals::Closed { concurrency } => write!(f, "closed loop of {concurrency}"),
            Arrivals::Open { rate, process } => write!(f, "{process} at {rate}/s"),
            Arrivals::Recorded { scale } => write!(f, "times of the trace x {scale}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(process: ArrivalProcess, rate: f64, n: usize) -> Vec<f64> {
        let times = process.times(rate, n, &mut SplitMix64::new(7, 0));
        assert!(times.is_sorted());
        assert_eq!(times[0], Duration::ZERO);
        times.iter().map(Duration::as_secs_f64).collect()
    }

    /// Mean of the gaps, and their deviation over it.
    fn gaps(times: &[f64]) -> (f64, f64) {
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    #[test]
    fn every_process_has_its_mean_rate_and_its_spread() {
        // The CV of bursts of 4: gaps 0, 0, 0, 4 around a mean of 1.
        for (text, cv) in [
            ("poisson", 1.0),
            ("gamma:0.5", 0.5),
            ("gamma:2.5", 2.5),
            ("uniform", 0.0),
            ("bursts:4", 3.0_f64.sqrt()),
        ] {
            let process = ArrivalProcess::parse(text).expect(text);
            assert_eq!(process.to_string(), text);
            let (mean, found_cv) = gaps(&times(process, 50.0, 40_001));
            assert!((mean * 50.0 - 1.0).abs() < 0.05, "{text}: mean gap {mean}");
            assert!((found_cv - cv).abs() < 0.05 * cv.max(0.01), "{text}: CV {found_cv}");
        }
    }

    #[test]
    fn nothing_arrives_while_a_process_is_off_and_its_mean_rate_holds() {
        let process = ArrivalProcess::parse("on-off:2,3").expect("valid");
        let times = times(process, 40.0, 20_000);
        assert!(
            times.iter().all(|at| at % 5.0 <= 2.0 + 1e-6),
            "all within the first two of five seconds"
        );
        let rate = times.len() as f64 / times.last().expect("not empty");
        assert!((rate / 40.0 - 1.0).abs() < 0.05, "{rate}");
    }

    #[test]
    fn an_infinite_rate_sends_all_at_once() {
        for text in ["poisson", "gamma:3", "uniform", "bursts:2", "on-off:1,1"] {
            let process = ArrivalProcess::parse(text).expect(text);
            assert!(times(process, f64::INFINITY, 9).iter().all(|at| *at == 0.0), "{text}");
        }
    }

    #[test]
    fn what_is_no_process_is_refused() {
        for text in [
            "",
            "poisson:1",
            "gamma",
            "gamma:0",
            "gamma:nan",
            "gamma:1000",
            "bursts:0",
            "on-off:1",
            "on-off:0,1",
            "steady",
        ] {
            assert_eq!(ArrivalProcess::parse(text), None, "{text}");
        }
    }
}
