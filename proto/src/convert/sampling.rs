//! How tokens are chosen, on the wire and off it.

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Constraint, SamplingParams};

use super::{WireError, bad};
use crate::cluster;

/// Most choices of a request.
pub const MAX_CHOICES: u32 = 128;

fn top_from_wire(field: &'static str, value: Option<u32>) -> Result<Option<u8>, WireError> {
    match value {
        None => Ok(None),
        Some(n) if n <= 20 => Ok(Some(n as u8)),
        Some(n) => Err(bad(field, n, "0 to 20")),
    }
}

impl From<&SamplingParams> for cluster::SamplingParams {
    fn from(params: &SamplingParams) -> Self {
        let bias = params.logit_bias.iter();
        let bias = bias.map(|&(id, bias)| cluster::LogitBias { id, bias });
        let bad_words = params.bad_words.iter();
        let bad_words = bad_words.map(|ids| cluster::TokenSequence { ids: ids.clone() });
        cluster::SamplingParams {
            max_tokens: params.max_tokens,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            seed: params.seed,
            stop_token_ids: params.stop_token_ids.clone(),
            logprobs: params.logprobs.map(u32::from),
            prompt_logprobs: params.prompt_logprobs.map(u32::from),
            presence_penalty: Some(params.presence_penalty).filter(|&penalty| penalty != 0.0),
            frequency_penalty: Some(params.frequency_penalty).filter(|&penalty| penalty != 0.0),
            repetition_penalty: Some(params.repetition_penalty).filter(|&penalty| penalty != 1.0),
            // As version 1 says it, when it could.
            n: if params.n == 1 { 0 } else { params.n },
            min_p: params.min_p,
            min_tokens: params.min_tokens,
            logit_bias: bias.collect(),
            allowed_token_ids: params.allowed_token_ids.to_vec(),
            bad_words: bad_words.collect(),
            constraint: params.constraint.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<cluster::SamplingParams> for SamplingParams {
    type Error = WireError;

    fn try_from(wire: cluster::SamplingParams) -> Result<Self, WireError> {
        if wire.max_tokens == 0 {
            return Err(bad("sampling.max_tokens", 0, "at least 1"));
        }
        if !(wire.temperature.is_finite() && wire.temperature >= 0.0) {
            return Err(bad(
                "sampling.temperature",
                wire.temperature,
                "a finite number, at least 0",
            ));
        }
        if !(wire.top_p > 0.0 && wire.top_p <= 1.0) {
            return Err(bad("sampling.top_p", wire.top_p, "above 0, at most 1"));
        }
        if wire.n > MAX_CHOICES {
            return Err(bad("sampling.n", wire.n, "1 to 128"));
        }
        let additive = |field: &'static str, value: Option<f32>| match value {
            None => Ok(0.0),
            Some(penalty) if (-2.0..=2.0).contains(&penalty) => Ok(penalty),
            Some(penalty) => Err(bad(field, penalty, "-2 to 2")),
        };
        let repetition_penalty = wire.repetition_penalty.unwrap_or(1.0);
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(bad(
                "sampling.repetition_penalty",
                repetition_penalty,
                "a finite number above 0",
            ));
        }
        Ok(SamplingParams {
            max_tokens: wire.max_tokens,
            temperature: wire.temperature,
            top_k: wire.top_k,
            top_p: wire.top_p,
            seed: wire.seed,
            stop_token_ids: wire.stop_token_ids,
            logprobs: top_from_wire("sampling.logprobs", wire.logprobs)?,
            prompt_logprobs: top_from_wire("sampling.prompt_logprobs", wire.prompt_logprobs)?,
            n: wire.n.max(1),
            presence_penalty: additive("sampling.presence_penalty", wire.presence_penalty)?,
            frequency_penalty: additive("sampling.frequency_penalty", wire.frequency_penalty)?,
            repetition_penalty,
            min_p: match wire.min_p {
                min_p if (0.0..=1.0).contains(&min_p) => min_p,
                min_p => return Err(bad("sampling.min_p", min_p, "0 to 1")),
            },
            min_tokens: match wire.min_tokens {
                min_tokens if min_tokens <= wire.max_tokens => min_tokens,
                min_tokens => return Err(bad("sampling.min_tokens", min_tokens, "at most max_tokens")),
            },
            logit_bias: logit_bias_from_wire(wire.logit_bias)?,
            allowed_token_ids: match wire.allowed_token_ids {
                ids if ids.is_sorted_by(|a, b| a < b) => ids.into(),
                _ => return Err(bad("sampling.allowed_token_ids", "not in order", "ascending ids")),
            },
            bad_words: wire
                .bad_words
                .into_iter()
                .map(bad_word_from_wire)
                .collect::<Result<_, _>>()?,
            constraint: wire.constraint.map(TryInto::try_into).transpose()?,
        })
    }
}

fn logit_bias_from_wire(wire: Vec<cluster::LogitBias>) -> Result<Vec<(TokenId, f32)>, WireError> {
    if let Some(entry) = wire.iter().find(|entry| !entry.bias.is_finite()) {
        return Err(bad("sampling.logit_bias", entry.bias, "finite numbers"));
    }
    if !wire.is_sorted_by(|a, b| a.id < b.id) {
        return Err(bad("sampling.logit_bias", "not in order", "ascending ids"));
    }
    Ok(wire.into_iter().map(|entry| (entry.id, entry.bias)).collect())
}

fn bad_word_from_wire(wire: cluster::TokenSequence) -> Result<Vec<TokenId>, WireError> {
    match wire.ids.is_empty() {
        true => Err(bad("sampling.bad_words", "an empty sequence", "at least one id each")),
        false => Ok(wire.ids),
    }
}

impl From<&Constraint> for cluster::Constraint {
    fn from(constraint: &Constraint) -> Self {
        use cluster::constraint::Language;
        let language = match constraint {
            Constraint::JsonSchema(schema) => Language::JsonSchema(schema.to_string()),
            Constraint::Regex(regex) => Language::Regex(regex.to_string()),
            Constraint::Grammar(grammar) => Language::Grammar(grammar.to_string()),
        };
        cluster::Constraint {
            language: Some(language),
        }
    }
}

impl TryFrom<cluster::Constraint> for Constraint {
    type Error = WireError;

    fn try_from(wire: cluster::Constraint) -> Result<Self, WireError> {
        use cluster::constraint::Language;
        // One of a newer protocol is absent here; without it the text would be anything.
        Ok(
            match wire
                .language
                .ok_or(WireError::Missing("sampling.constraint.language"))?
            {
                Language::JsonSchema(schema) => Constraint::JsonSchema(schema.into()),
                Language::Regex(regex) => Constraint::Regex(regex.into()),
                Language::Grammar(grammar) => Constraint::Grammar(grammar.into()),
            },
        )
    }
}
