//! What may be chosen at all, and logit bias: a pure function of request, output ids and the constraint's mask. Works on a
//! copy of the logits; what is ruled out becomes -infinity.

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::SamplingParams;

use super::{History, SampleError};

/// A set of token ids, one bit each. Ids past its end are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl From<Vec<u32>> for TokenSet {
    /// Id `i` is bit `i % 32` of word `i / 32`.
    fn from(words: Vec<u32>) -> TokenSet {
        TokenSet { words }
    }
}

impl FromIterator<TokenId> for TokenSet {
    fn from_iter<I: IntoIterator<Item = TokenId>>(ids: I) -> TokenSet {
        let mut words = Vec::new();
        for id in ids {
            let word = id as usize / 32;
            if word >= words.len() {
                words.resize(word + 1, 0);
            }
            words[word] |= 1 << (id % 32);
        }
        TokenSet { words }
    }
}

impl TokenSet {
    /// Whether `id` is in it.
    pub fn contains(&self, id: TokenId) -> bool {
        let word = self.words.get(id as usize / 32);
        word.is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Rules every other token out.
    fn keep_only(&self, row: &mut [f32]) {
        // One bit each, so that the inner loop vectorises.
        const BITS: [u32; 32] = {
            let mut bits = [0; 32];
            let mut bit = 0;
            while bit < 32 {
                bits[bit] = 1 << bit;
                bit += 1;
            }
            bits
        };
        for (word_idx, chunk) in row.chunks_mut(32).enumerate() {
            match self.words.get(word_idx).copied().unwrap_or(0) {
                0 => chunk.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                word => {
                    for (logit, bit) in chunk.iter_mut().zip(BITS) {
                        *logit = if word & bit == 0 { f32::NEG_INFINITY } else { *logit };
                    }
                }
            }
        }
    }
}

/// Whether the request rules anything out or shifts anything at token number `index`, the constraint aside.
pub(super) fn are_on(params: &SamplingParams, index: usize) -> bool {
    !params.allowed_token_ids.is_empty()
        || !params.bad_words.is_empty()
        || !params.logit_bias.is_empty()
        || is_too_early_to_stop(params, index)
}

fn is_too_early_to_stop(params: &SamplingParams, index: usize) -> bool {
    index < params.min_tokens as usize
}

/// Applies, in vLLM's order: the constraint's set, `allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias`.
///
/// # Errors
/// A token that the request names is past the vocabulary.
pub(super) fn apply(
    row: &mut [f32],
    params: &SamplingParams,
    history: History<'_>,
    constraint: Option<&TokenSet>,
) -> Result<(), SampleError> {
    if let Some(allowed) = constraint {
        allowed.keep_only(row);
    }
    if !params.allowed_token_ids.is_empty() {
        keep_only_listed(row, &params.allowed_token_ids)?;
    }
    for word in &params.bad_words {
        if let Some((&last, before)) = word.split_last()
            && history.output.ends_with(before)
        {
            *logit_of(row, last)? = f32::NEG_INFINITY;
        }
    }
    if is_too_early_to_stop(params, history.output.len()) && (constraint.is_none() || can_go_on(row, params)) {
        for &id in &params.stop_token_ids {
            *logit_of(row, id)? = f32::NEG_INFINITY;
        }
    }
    for &(id, bias) in &params.logit_bias {
        *logit_of(row, id)? += bias;
    }
    Ok(())
}

/// Whether anything but a stop id is left. A constrained text that is complete ends, whatever `min_tokens` says.
fn can_go_on(row: &[f32], params: &SamplingParams) -> bool {
    let is_stop = |id: usize| params.stop_token_ids.contains(&(id as TokenId));
    let mut left = row.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
    left.any(|(id, _)| !is_stop(id))
}

/// Rules out what lies between the listed ids, which ascend.
fn keep_only_listed(row: &mut [f32], ids: &[TokenId]) -> Result<(), SampleError> {
    let mut next = 0;
    for &id in ids {
        logit_of(row, id)?;
        row[next..id as usize].fill(f32::NEG_INFINITY);
        next = id as usize + 1;
    }
    row[next..].fill(f32::NEG_INFINITY);
    Ok(())
}

fn logit_of(row: &mut [f32], id: TokenId) -> Result<&mut f32, SampleError> {
    let n_tokens = row.len();
    row.get_mut(id as usize)
        .ok_or(SampleError::UnknownToken { id, n_tokens })
}
