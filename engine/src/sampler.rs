//! Logits of one position -> the next token and its log-probabilities.
//! Stateless between tokens: randomness is a function of (seed, choice, token index), and all that changes the distribution
//! is one of the token ids, so another instance continues alike. What a grammar allows is told from outside; no batching.

mod masks;
mod penalties;
mod weights;

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{SamplingParams, Token, TokenLogprobs};

use crate::philox::uniform_f64;
pub use masks::TokenSet;
use penalties::Penalties;
use weights::{exp, nucleus, position_at, sum, sum_of_exps};

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN or +infinity: the model's output is broken, and no token is made of it.
    #[error("logit of token {id} is {value}, expected a finite number")]
    NotFinite {
        /// The token id of the first such logit.
        id: TokenId,
        /// The logit.
        value: f32,
    },
    /// Every logit is -infinity, or there are none.
    #[error("no token has a finite logit (vocabulary of {n_tokens})")]
    NoCandidate {
        /// Logits given.
        n_tokens: usize,
    },
    /// What the request rules out leaves no token.
    #[error(
        "token {index} of choice {choice}: constraint, allowed_token_ids, bad_words and min_tokens together leave no token"
    )]
    NothingAllowed {
        /// The choice.
        choice: u32,
        /// Position among its tokens.
        index: u32,
    },
    /// An id past the vocabulary was asked for.
    #[error("token id {id} is past the vocabulary of {n_tokens}")]
    UnknownToken {
        /// The id.
        id: TokenId,
        /// Logits given.
        n_tokens: usize,
    },
}

/// Chooses tokens. Holds only scratch memory; equal inputs give equal tokens on every instance of a numerics class.
#[derive(Debug, Default)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
    /// `[vocab_size]`: the logits with all that was asked for applied.
    row: Vec<f32>,
    /// `[vocab_size]`: those logits that `min_p` keeps.
    probable: Vec<f32>,
    penalties: Penalties,
}

/// Whether nothing that a request asks for changes the logits of its token number `index`, a constraint aside.
pub fn is_plain(params: &SamplingParams, index: usize) -> bool {
    !masks::are_on(params, index) && !penalties::are_on(params)
}

/// The tokens before the one to be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct History<'a> {
    /// The prompt's.
    pub prompt: &'a [TokenId],
    /// Those generated, of the same choice; as many as the next token's index.
    pub output: &'a [TokenId],
}

/// Order of a distribution: larger logit first, then smaller id.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    id: TokenId,
}

impl Candidate {
    fn order(&self, other: &Candidate) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

/// A candidate set this small holds the top-p nucleus of nearly every real distribution.
const FIRST_NUCLEUS: usize = 256;

impl Sampler {
    /// A sampler with no scratch yet; it grows to the vocabulary's size on first use.
    pub fn new() -> Sampler {
        Sampler::default()
    }

    /// Chooses the token of choice `choice` that follows `history` from `logits`, `[vocab_size]`, as vLLM orders it: only
    /// ids in `allowed`, then `allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias`, penalties, and the rest as
    /// [`Sampler::sample`]. Log-probabilities are of the raw distribution, before all of these.
    ///
    /// # Errors
    /// Broken logits, ids past the vocabulary, or nothing that may be chosen.
    pub fn sample_after(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        choice: u32,
        history: History<'_>,
        allowed: Option<&TokenSet>,
    ) -> Result<Token, SampleError> {
        let index = history.output.len() as u32;
        let is_masked = allowed.is_some() || masks::are_on(params, history.output.len());
        if !is_masked && !penalties::are_on(params) {
            return self.sample(logits, params, choice, index);
        }
        let raw_max = largest_logit(logits)?;
        // Taken out, so that the rest of the sampler can be used over the row.
        let mut row = std::mem::take(&mut self.row);
        row.clear();
        row.extend_from_slice(logits);
        let id = masks::apply(&mut row, params, history, allowed)
            .and_then(|()| match penalties::are_on(params) {
                true => self.penalties.apply(&mut row, params, history),
                false => Ok(()),
            })
            .and_then(|()| match largest(&row) {
                Err(SampleError::NoCandidate { .. }) if is_masked => Err(SampleError::NothingAllowed { choice, index }),
                best => Ok(self.choose(&row, best?, params, choice, index)),
            });
        self.row = row;
        self.token(logits, raw_max, params, index, id?)
    }

    /// Chooses token number `index` of choice `choice` from `logits`, `[vocab_size]`, which nothing was asked to change.
    ///
    /// Temperature 0 takes the largest logit (the smaller id on a tie). Otherwise, as vLLM does: logits are divided by the
    /// temperature, tokens at least `min_p` times as probable as the first kept, of those the `top_k` largest, and of those,
    /// renormalised, the smallest set that reaches `top_p`. Log-probabilities are of the raw distribution.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        choice: u32,
        index: u32,
    ) -> Result<Token, SampleError> {
        let best = largest(logits)?;
        let id = self.choose(logits, best, params, choice, index);
        self.token(logits, best.logit, params, index, id)
    }

    fn token(
        &mut self,
        logits: &[f32],
        max: f32,
        params: &SamplingParams,
        index: u32,
        id: TokenId,
    ) -> Result<Token, SampleError> {
        let logprobs = match params.logprobs {
            Some(n_top) => Some(self.logprobs_with_max(logits, max, id, usize::from(n_top))?),
            None => None,
        };
        Ok(Token { index, id, logprobs })
    }

    fn choose(&mut self, logits: &[f32], best: Candidate, params: &SamplingParams, choice: u32, index: u32) -> TokenId {
        if params.temperature > 0.0 {
            let uniform = uniform_f64(params.seed, [index, choice, 0, 0]);
            self.draw(logits, best.logit, params, uniform)
        } else {
            best.id
        }
    }

    /// Log-probability and rank of `id` under `logits`, `[vocab_size]`, and the `n_top` most likely tokens.
    ///
    /// For prompts: the row of position `i` with the id at `i + 1`.
    pub fn logprobs(&mut self, logits: &[f32], id: TokenId, n_top: usize) -> Result<TokenLogprobs, SampleError> {
        let best = largest(logits)?;
        self.logprobs_with_max(logits, best.logit, id, n_top)
    }

    fn logprobs_with_max(
        &mut self,
        logits: &[f32],
        max: f32,
        id: TokenId,
        n_top: usize,
    ) -> Result<TokenLogprobs, SampleError> {
        let n_tokens = logits.len();
        let &logit = logits
            .get(id as usize)
            .ok_or(SampleError::UnknownToken { id, n_tokens })?;
        let log_sum = f64::from(max) + sum_of_exps(logits, max, 1.0).ln();
        let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        let n_larger = logits.iter().filter(|&&other| other > logit).count();
        let n_ties_before = logits[..id as usize].iter().filter(|&&other| other == logit).count();
        self.select_top(logits, n_top);
        let top = self
            .candidates
            .iter()
            .map(|candidate| (candidate.id, logprob(candidate.logit)))
            .collect();
        Ok(TokenLogprobs {
            logprob: logprob(logit),
            rank: (n_larger + n_ties_before + 1) as u32,
            top,
        })
    }

    /// Inverse transform of `uniform` in [0, 1) over the kept tokens.
    fn draw(&mut self, logits: &[f32], max: f32, params: &SamplingParams, uniform: f64) -> TokenId {
        if params.min_p <= 0.0 {
            return self.draw_kept(logits, max, params, uniform);
        }
        let inverse_temperature = 1.0 / params.temperature;
        let mut probable = std::mem::take(&mut self.probable);
        probable.clear();
        // The first token's weight is 1, so a weight is the share that `min_p` is compared with.
        probable.extend(
            logits
                .iter()
                .map(|&logit| match exp((logit - max) * inverse_temperature) < params.min_p {
                    true => f32::NEG_INFINITY,
                    false => logit,
                }),
        );
        let id = self.draw_kept(&probable, max, params, uniform);
        self.probable = probable;
        id
    }

    fn draw_kept(&mut self, logits: &[f32], max: f32, params: &SamplingParams, uniform: f64) -> TokenId {
        let n_tokens = logits.len();
        let top_k = match params.top_k as usize {
            0 => n_tokens,
            top_k => top_k.min(n_tokens),
        };
        let inverse_temperature = 1.0 / params.temperature;
        if top_k == n_tokens && params.top_p >= 1.0 {
            return self.draw_from_all(logits, max, inverse_temperature, uniform);
        }
        if top_k < n_tokens {
            // top_p is a share of the mass of the k largest.
            self.select_top(logits, top_k);
            let total = self.weigh_candidates(max, inverse_temperature);
            let (n_kept, mass) = nucleus(&self.weights, f64::from(params.top_p) * total);
            return self.draw_candidate(n_kept, uniform * mass);
        }
        let target = f64::from(params.top_p) * sum_of_exps(logits, max, inverse_temperature);
        self.select_top(logits, FIRST_NUCLEUS);
        self.weigh_candidates(max, inverse_temperature);
        let (n_kept, mass) = nucleus(&self.weights, target);
        if mass >= target {
            return self.draw_candidate(n_kept, uniform * mass);
        }
        self.draw_from_wide_nucleus(logits, max, inverse_temperature, target, uniform)
    }

    /// The candidate at `mark` of the running sum of the `n_kept` first weights.
    fn draw_candidate(&self, n_kept: usize, mark: f64) -> TokenId {
        self.candidates[position_at(&self.weights[..n_kept], mark)].id
    }

    /// A nucleus of thousands of tokens is not sorted: tokens fall into bands of nearly equal logits, whole bands are kept,
    /// and only the band in which the mass reaches `target` is put in order.
    fn draw_from_wide_nucleus(
        &mut self,
        logits: &[f32],
        max: f32,
        inverse_temperature: f32,
        target: f64,
        uniform: f64,
    ) -> TokenId {
        // Sixteen bands to the factor e; past 64 factors the weight is 0 in any case.
        const N_BANDS: usize = 1024;
        let scale = inverse_temperature * 16.0;
        let band_of = |logit: f32| (((max - logit) * scale) as usize).min(N_BANDS - 1);
        self.weights.clear();
        self.weights
            .extend(logits.iter().map(|&logit| exp((logit - max) * inverse_temperature)));
        let mut band_mass = [0.0f64; N_BANDS];
        for (&logit, &weight) in logits.iter().zip(&self.weights) {
            band_mass[band_of(logit)] += f64::from(weight);
        }
        let (mut cut_band, mut whole_mass) = (0, 0.0);
        while cut_band + 1 < N_BANDS && whole_mass + band_mass[cut_band] < target {
            whole_mass += band_mass[cut_band];
            cut_band += 1;
        }
        self.candidates.clear();
        let in_cut = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| band_of(**logit) == cut_band);
        self.candidates.extend(in_cut.map(|(id, &logit)| Candidate {
            logit,
            id: id as TokenId,
        }));
        self.candidates.sort_unstable_by(Candidate::order);
        let cut_mass: f64 = {
            let weights: Vec<f32> = self.candidates.iter().map(|c| self.weights[c.id as usize]).collect();
            let (n_kept, mass) = nucleus(&weights, target - whole_mass);
            self.candidates.truncate(n_kept);
            mass
        };
        let mark = uniform * (whole_mass + cut_mass);
        let mut before = 0.0;
        if mark < whole_mass {
            for (id, (&logit, &weight)) in logits.iter().zip(&self.weights).enumerate() {
                if band_of(logit) < cut_band {
                    before += f64::from(weight);
                    if before > mark {
                        return id as TokenId;
                    }
                }
            }
        }
        before = whole_mass;
        for candidate in &self.candidates {
            before += f64::from(self.weights[candidate.id as usize]);
            if before > mark {
                return candidate.id;
            }
        }
        // Only rounding leads here: the mark is the very end of the nucleus.
        let has_weight = |candidate: &&Candidate| self.weights[candidate.id as usize] > 0.0;
        let last = self.candidates.iter().rev().find(has_weight);
        last.map_or(0, |candidate| candidate.id)
    }

    fn draw_from_all(&mut self, logits: &[f32], max: f32, inverse_temperature: f32, uniform: f64) -> TokenId {
        self.weights.clear();
        self.weights
            .extend(logits.iter().map(|&logit| exp((logit - max) * inverse_temperature)));
        let total = sum(&self.weights);
        position_at(&self.weights, uniform * total) as TokenId
    }

    /// Fills `weights` from `candidates` and returns their sum.
    fn weigh_candidates(&mut self, max: f32, inverse_temperature: f32) -> f64 {
        self.weights.clear();
        self.weights.extend(
            self.candidates
                .iter()
                .map(|c| exp((c.logit - max) * inverse_temperature)),
        );
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// Leaves the `n_top` first tokens of the distribution in `candidates`, in order.
    ///
    /// One pass with a threshold: candidates gather in a buffer twice as large as needed, and are cut to the best
    /// `n_top` whenever it is full, so that nearly every token costs one comparison.
    fn select_top(&mut self, logits: &[f32], n_top: usize) {
        let n_top = n_top.min(logits.len());
        let candidates = &mut self.candidates;
        candidates.clear();
        if n_top == 0 {
            return;
        }
        let capacity = (2 * n_top).max(64);
        let mut threshold = f32::NEG_INFINITY;
        for (id, &logit) in logits.iter().enumerate() {
            // A tie with the threshold comes later, thus has a larger id than all that are kept at it.
            if logit > threshold || candidates.len() < n_top {
                candidates.push(Candidate {
                    logit,
                    id: id as TokenId,
                });
                if candidates.len() == capacity {
                    candidates.select_nth_unstable_by(n_top - 1, Candidate::order);
                    candidates.truncate(n_top);
                    threshold = candidates[n_top - 1].logit;
                }
            }
        }
        candidates.sort_unstable_by(Candidate::order);
        candidates.truncate(n_top);
    }
}

/// The first token of the distribution; refuses NaN, +infinity and an empty distribution.
fn largest(logits: &[f32]) -> Result<Candidate, SampleError> {
    let logit = largest_logit(logits)?;
    let id = logits.iter().position(|&other| other == logit).unwrap_or(0);
    Ok(Candidate {
        logit,
        id: id as TokenId,
    })
}

/// Its logit alone.
fn largest_logit(logits: &[f32]) -> Result<f32, SampleError> {
    const LANES: usize = 16;
    // Lane-wise, so that it vectorises. `x - x` is 0 for finite x, NaN for NaN and the infinities.
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut suspect = [false; LANES];
    let (chunks, tail) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let logit = chunk[lane];
            max[lane] = if logit > max[lane] { logit } else { max[lane] };
            suspect[lane] |= logit.is_nan() | (logit == f32::INFINITY);
        }
    }
    for (lane, &logit) in tail.iter().enumerate() {
        max[lane] = if logit > max[lane] { logit } else { max[lane] };
        suspect[lane] |= logit.is_nan() | (logit == f32::INFINITY);
    }
    if suspect.contains(&true) {
        let id = logits
            .iter()
            .position(|logit| logit.is_nan() || *logit == f32::INFINITY)
            .unwrap_or(0);
        return Err(SampleError::NotFinite {
            id: id as TokenId,
            value: logits[id],
        });
    }
    let logit = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if logit == f32::NEG_INFINITY {
        return Err(SampleError::NoCandidate { n_tokens: logits.len() });
    }
    Ok(logit)
}

#[cfg(test)]
mod tests;
