//! `best_of`: more choices are generated than shown, and the most likely ones are. They are the choices of one request, so
//! they share one prefill and move together.

use super::error::ApiError;
use super::fields::Fields;
use super::options::MAX_CHOICES;
use super::output::OutputToken;

/// Which of a prompt's choices are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BestOf {
    /// `n`, as asked.
    pub(super) n_shown: u32,
    /// `best_of`, or else `n`.
    pub(super) n_generated: u32,
}

impl BestOf {
    /// Takes `best_of` of a request for `n` choices. A stream shows every token as it comes, so it cannot choose.
    pub(super) fn take(fields: &mut Fields, n: u32, is_stream: bool) -> Result<BestOf, ApiError> {
        let asked = fields.integer("best_of", 1..=i64::from(MAX_CHOICES))?.map(|n| n as u32);
        let n_generated = asked.unwrap_or(n);
        if n_generated < n {
            return Err(ApiError::expected(
                "best_of",
                n_generated,
                format!("at least n, which is {n}"),
            ));
        }
        if is_stream && n_generated > n {
            let expected = format!("n, which is {n}, where stream is true");
            return Err(ApiError::expected("best_of", n_generated, expected));
        }
        Ok(BestOf {
            n_shown: n,
            n_generated,
        })
    }

    /// Whether log-probabilities decide what is shown.
    pub(super) fn chooses(self) -> bool {
        self.n_generated > self.n_shown
    }

    /// Of each prompt's choices those to show, best first; all, in their order, where there is nothing to choose.
    /// `scores` is `[n_prompts * n_generated]`.
    pub(super) fn shown(self, scores: &[Score]) -> Vec<usize> {
        let n_generated = self.n_generated as usize;
        let prompts = scores.chunks(n_generated).enumerate();
        prompts
            .flat_map(|(prompt, scores)| {
                let mut order: Vec<usize> = (0..scores.len()).collect();
                if self.chooses() {
                    // Stable, so ties keep the order of the choices.
                    order.sort_by(|&a, &b| scores[b].0.total_cmp(&scores[a].0));
                }
                order.truncate(self.n_shown as usize);
                order.into_iter().map(move |choice| prompt * n_generated + choice)
            })
            .collect()
    }
}

/// The log-probability of all that a choice has generated, as vLLM compares them: a sum, not a mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Score(f64);

impl Score {
    /// Takes the next token.
    pub(super) fn add(&mut self, output: &OutputToken) {
        if let Some(logprobs) = &output.token.logprobs {
            self.0 += f64::from(logprobs.logprob);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_are_shown_of_each_prompt() {
        let best_of = BestOf {
            n_shown: 2,
            n_generated: 3,
        };
        let scores = [-3.0, -1.0, -2.0, -5.0, -5.0, -6.0].map(Score);
        assert_eq!(best_of.shown(&scores), [1, 2, 3, 4]);
        let all = BestOf {
            n_shown: 3,
            n_generated: 3,
        };
        assert_eq!(all.shown(&scores), [0, 1, 2, 3, 4, 5], "nothing to choose");
    }
}
