//! `truncate_prompt_tokens` and `truncation_side`: how much of a prompt stays, and which end of it. What is cut is token
//! ids; texts are not known here.

use baton_scheduler::ids::TokenId;

use super::error::ApiError;
use super::fields::{Fields, shown};

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncation {
    length: Length,
    side: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    /// What the model's length leaves beside the completion.
    Fitting,
    /// At most this many tokens.
    Tokens(i64),
}

/// Where tokens are taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// At the beginning: the last tokens stay.
    Left,
    /// At the end: the first tokens stay.
    Right,
}

/// A truncation whose length is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Most tokens that stay; at least one.
    pub n_tokens: usize,
    /// Where the others are taken away.
    pub side: Side,
}

impl Truncation {
    /// Takes the two fields. The side alone asks for nothing.
    pub fn take(fields: &mut Fields) -> Result<Option<Truncation>, ApiError> {
        const LENGTH: &str = "truncate_prompt_tokens";
        const SIDE: &str = "truncation_side";
        let side = match fields.string(SIDE)?.as_deref() {
            // That of generating servers: the end of a prompt is what an answer is about.
            None | Some("left") => Side::Left,
            Some("right") => Side::Right,
            Some(other) => {
                let found = shown(&other.into());
                return Err(ApiError::expected(SIDE, found, "\"left\" or \"right\""));
            }
        };
        let length = match fields.integer(LENGTH, -1..=i64::MAX)? {
            None => return Ok(None),
            Some(0) => return Err(ApiError::expected(LENGTH, 0, "-1 or at least 1")),
            Some(-1) => Length::Fitting,
            Some(n_tokens) => Length::Tokens(n_tokens),
        };
        Ok(Some(Truncation { length, side }))
    }

    /// What stays of a prompt beside a completion of `n_completion` tokens, where both may have `max_model_len`.
    pub fn resolve(self, max_model_len: u32, n_completion: u32) -> Result<Cut, ApiError> {
        // One token at least is always made.
        let n_completion = n_completion.max(1);
        let n_fitting = max_model_len.saturating_sub(n_completion) as usize;
        if n_fitting == 0 {
            let expected = format!("less than the model's {max_model_len}, so that some of the prompt stays");
            return Err(ApiError::expected("max_tokens", n_completion, expected));
        }
        self.within(n_fitting, || {
            format!("at most {n_fitting}: {max_model_len} tokens of the model less {n_completion} of the completion")
        })
    }

    /// What stays of a prompt that nothing is generated after.
    pub fn resolve_alone(self, max_model_len: u32) -> Result<Cut, ApiError> {
        self.within(max_model_len as usize, || {
            format!("at most the model's {max_model_len} tokens")
        })
    }

    fn within(self, n_fitting: usize, expected: impl FnOnce() -> String) -> Result<Cut, ApiError> {
        let n_tokens = match self.length {
            Length::Fitting => n_fitting,
            Length::Tokens(n_tokens) => match usize::try_from(n_tokens) {
                Ok(n_tokens) if n_tokens <= n_fitting => n_tokens,
                _ => return Err(ApiError::expected("truncate_prompt_tokens", n_tokens, expected())),
            },
        };
        let side = self.side;
        Ok(Cut { n_tokens, side })
    }
}

impl Side {
    /// Leaves at most `n_tokens` of `ids`.
    pub fn cut(self, ids: &mut Vec<TokenId>, n_tokens: usize) {
        match self {
            Side::Left => drop(ids.drain(..ids.len().saturating_sub(n_tokens))),
            Side::Right => ids.truncate(n_tokens),
        }
    }
}

impl Cut {
    /// Leaves what stays of `ids`.
    pub fn apply(self, ids: &mut Vec<TokenId>) {
        self.side.cut(ids, self.n_tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(json: &str) -> Result<Option<Truncation>, ApiError> {
        Truncation::take(&mut Fields::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn the_end_of_a_prompt_stays_unless_the_other_is_asked_for() {
        let cut = |json: &str, n_completion| take(json).unwrap().unwrap().resolve(100, n_completion);
        let left = |n_tokens| Cut {
            n_tokens,
            side: Side::Left,
        };
        assert_eq!(cut(r#"{"truncate_prompt_tokens": 7}"#, 16), Ok(left(7)));
        assert_eq!(cut(r#"{"truncate_prompt_tokens": 84}"#, 16), Ok(left(84)));
        assert_eq!(cut(r#"{"truncate_prompt_tokens": -1}"#, 16), Ok(left(84)));
        assert_eq!(cut(r#"{"truncate_prompt_tokens": -1}"#, 0), Ok(left(99)));
        let right = cut(r#"{"truncate_prompt_tokens": 7, "truncation_side": "right"}"#, 16).unwrap();
        for (cut, expected) in [(left(7), [3, 4, 5, 6, 7, 8, 9]), (right, [0, 1, 2, 3, 4, 5, 6])] {
            let mut ids: Vec<TokenId> = (0..10).collect();
            cut.apply(&mut ids);
            assert_eq!(ids, expected);
            cut.apply(&mut ids);
            assert_eq!(ids, expected, "a short prompt stays whole");
        }
        assert_eq!(take(r#"{"truncation_side": "left"}"#), Ok(None));
        assert_eq!(take(r#"{"truncate_prompt_tokens": null}"#), Ok(None));
    }

    #[test]
    fn what_leaves_nothing_or_does_not_fit_is_refused_by_name() {
        for (json, field) in [
            (r#"{"truncate_prompt_tokens": 0}"#, "truncate_prompt_tokens"),
            (r#"{"truncate_prompt_tokens": -2}"#, "truncate_prompt_tokens"),
            (r#"{"truncate_prompt_tokens": "7"}"#, "truncate_prompt_tokens"),
            (r#"{"truncation_side": "middle"}"#, "truncation_side"),
        ] {
            assert_eq!(take(json).unwrap_err().param.as_deref(), Some(field), "{json}");
        }
        let asked = |n| take(&format!(r#"{{"truncate_prompt_tokens": {n}}}"#)).unwrap().unwrap();
        let error = asked(85).resolve(100, 16).unwrap_err();
        let expected =
            "truncate_prompt_tokens is 85, expected at most 84: 100 tokens of the model less 16 of the completion";
        assert_eq!(error.message, expected);
        assert!(asked(i64::MAX).resolve(100, 16).is_err());
        assert_eq!(
            asked(-1).resolve(100, 100).unwrap_err().param.as_deref(),
            Some("max_tokens")
        );
    }
}
