//! The latencies that a request asks for: the field `slo` and the headers `x-slo-ttft-ms` and `x-slo-tpot-ms`. Placement
//! aims at them; whether they were met is judged here when it has ended.

use baton_scheduler::ids::Nanos;
use baton_scheduler::placement::RequestObjectives;
use http::HeaderMap;

use super::error::ApiError;
use super::fields::Fields;

/// The header of the time to the first token, milliseconds.
pub const TTFT_HEADER: &str = "x-slo-ttft-ms";
/// The header of the time of each further token, milliseconds.
pub const TPOT_HEADER: &str = "x-slo-tpot-ms";

/// Longest objective, milliseconds: a day.
const LONGEST_MS: f32 = 86_400_000.0;

/// Takes `slo`: `{"ttft_ms": ..., "tpot_ms": ...}`, either or both.
pub fn take(fields: &mut Fields) -> Result<RequestObjectives, ApiError> {
    let Some(mut slo) = fields.object("slo")? else {
        return Ok(RequestObjectives::default());
    };
    let mut milliseconds = |name| slo.number(name, is_objective, &expected()).map(|ms| ms.map(nanos));
    let objectives = RequestObjectives {
        ttft: milliseconds("ttft_ms")?,
        tpot: milliseconds("tpot_ms")?,
    };
    match slo.rest().next() {
        None => Ok(objectives),
        Some(_) => Err(ApiError::expected(
            "slo",
            "an object with other keys",
            "ttft_ms and tpot_ms alone",
        )),
    }
}

/// The objectives in the headers.
pub fn from_headers(headers: &HeaderMap) -> Result<RequestObjectives, ApiError> {
    let milliseconds = |name: &'static str| {
        let Some(value) = headers.get(name) else {
            return Ok(None);
        };
        let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
        match number.filter(|ms| is_objective(*ms)) {
            Some(ms) => Ok(Some(nanos(ms))),
            None => Err(ApiError::expected(name, format!("{value:?}"), expected())),
        }
    };
    Ok(RequestObjectives {
        ttft: milliseconds(TTFT_HEADER)?,
        tpot: milliseconds(TPOT_HEADER)?,
    })
}

/// Each objective of `first`, or else of `second`.
pub fn prefer(first: RequestObjectives, second: RequestObjectives) -> RequestObjectives {
    RequestObjectives {
        ttft: first.ttft.or(second.ttft),
        tpot: first.tpot.or(second.tpot),
    }
}

fn is_objective(ms: f32) -> bool {
    ms > 0.0 && ms <= LONGEST_MS
}

fn expected() -> String {
    format!("milliseconds above 0, at most {LONGEST_MS}")
}

fn nanos(ms: f32) -> Nanos {
    Nanos((f64::from(ms) * 1e6) as u64)
}

/// The moments of one choice that its time per token is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChoicePace {
    first: Nanos,
    last: Nanos,
    n_tokens: u32,
}

impl ChoicePace {
    /// A token came; the moment of the one before it.
    pub fn token(&mut self, now: Nanos) -> Option<Nanos> {
        let before = (self.n_tokens > 0).then_some(self.last);
        if before.is_none() {
            self.first = now;
        }
        self.last = now;
        self.n_tokens += 1;
        before
    }

    /// Mean time of each token after the first; `None` with fewer than two.
    pub fn time_per_token(&self) -> Option<Nanos> {
        let n_further = u64::from(self.n_tokens.checked_sub(1).filter(|n| *n > 0)?);
        Some(Nanos(self.last.saturating_sub(self.first).0 / n_further))
    }
}

/// Which of a request's objectives were met; `None` for those it did not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The time to the first token.
    pub ttft: Option<bool>,
    /// The time of each further token.
    pub tpot: Option<bool>,
}

impl Verdict {
    /// Judges what was measured. Without a first token its time was not met; without a second no token was too slow, unless
    /// the request failed.
    pub fn of(objectives: RequestObjectives, ttft: Option<Nanos>, tpot: Option<Nanos>, has_failed: bool) -> Verdict {
        Verdict {
            ttft: objectives.ttft.map(|limit| ttft.is_some_and(|ttft| ttft <= limit)),
            tpot: objectives
                .tpot
                .map(|limit| !has_failed && tpot.is_none_or(|tpot| tpot <= limit)),
        }
    }

    /// Whether all were met; `None` when there were none.
    pub fn all(self) -> Option<bool> {
        match (self.ttft, self.tpot) {
            (None, None) => None,
            (ttft, tpot) => Some(ttft.unwrap_or(true) && tpot.unwrap_or(true)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(ttft: &'static str, tpot: &'static str) -> HeaderMap {
        let pairs = [(TTFT_HEADER, ttft), (TPOT_HEADER, tpot)];
        let given = pairs.into_iter().filter(|(_, value)| !value.is_empty());
        given
            .map(|(name, value)| {
                (
                    http::HeaderName::from_static(name),
                    http::HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn headers_come_before_fields() {
        let of_headers = from_headers(&headers("250", "")).unwrap();
        let of_fields = take(&mut Fields::parse(br#"{"slo": {"ttft_ms": 100, "tpot_ms": 12.5}}"#).unwrap()).unwrap();
        let expected = RequestObjectives {
            ttft: Some(Nanos::from_millis(250)),
            tpot: Some(Nanos(12_500_000)),
        };
        assert_eq!(prefer(of_headers, of_fields), expected);
        for (ttft, tpot, name) in [
            ("0", "", TTFT_HEADER),
            ("x", "", TTFT_HEADER),
            ("", "-1", TPOT_HEADER),
            ("nan", "", TTFT_HEADER),
            ("inf", "", TTFT_HEADER),
        ] {
            let error = from_headers(&headers(ttft, tpot)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{error}");
        }
    }

    #[test]
    fn verdicts() {
        let ms = |ms| Some(Nanos::from_millis(ms));
        let both = RequestObjectives {
            ttft: ms(100),
            tpot: ms(10),
        };
        let all = |ttft, tpot, has_failed| Verdict::of(both, ttft, tpot, has_failed).all();
        assert_eq!(all(ms(100), ms(10), false), Some(true));
        assert_eq!(all(ms(101), ms(10), false), Some(false));
        assert_eq!(all(ms(100), ms(11), false), Some(false));
        assert_eq!(
            all(ms(100), None, false),
            Some(true),
            "one token is never too slow after the first"
        );
        assert_eq!(all(None, None, true), Some(false));
        assert_eq!(
            Verdict::of(both, ms(5), None, true),
            Verdict {
                ttft: Some(true),
                tpot: Some(false)
            }
        );
        assert_eq!(Verdict::of(RequestObjectives::default(), None, None, true).all(), None);
    }

    #[test]
    fn the_pace_is_that_between_tokens() {
        let mut pace = ChoicePace::default();
        assert_eq!((pace.token(Nanos(5)), pace.time_per_token()), (None, None));
        assert_eq!(pace.token(Nanos(15)), Some(Nanos(5)));
        assert_eq!(pace.token(Nanos(105)), Some(Nanos(15)));
        assert_eq!(pace.time_per_token(), Some(Nanos(50)));
    }
}
