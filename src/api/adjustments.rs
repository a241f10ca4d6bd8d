//! The fields that rule tokens out or shift their logits: `min_p`, `min_tokens`, `logit_bias`, `allowed_token_ids` and
//! `bad_words`, checked and resolved to token ids. What they do is the sampler's affair.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::SamplingParams;
use serde_json::Value;

use super::error::{ApiError, ErrorKind};
use super::fields::{Fields, shown};
use super::served_model::ServedModel;

/// Most entries of `logit_bias`.
pub const MAX_LOGIT_BIASES: usize = 1024;
/// A bias lies between this and its negative, as in the OpenAI API.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most texts of `bad_words`.
pub const MAX_BAD_WORDS: usize = 128;
/// Longest text of `bad_words`, bytes.
pub const LONGEST_BAD_WORD: usize = 256;

/// The fields, resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Adjustments {
    /// 0 is off.
    pub min_p: f32,
    /// 0 is off.
    pub min_tokens: u32,
    /// Ascending by id.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Ascending; empty allows all.
    pub allowed_token_ids: Arc<[TokenId]>,
    /// None of them empty.
    pub bad_words: Vec<Vec<TokenId>>,
}

impl Adjustments {
    /// Takes the fields out of a JSON request.
    pub fn take(fields: &mut Fields, model: &ServedModel) -> Result<Adjustments, ApiError> {
        let min_p = fields.number("min_p", is_min_p, MIN_P_RANGE)?;
        let min_tokens = fields.integer("min_tokens", 0..=i64::from(u32::MAX))?;
        let allowed = fields.token_ids("allowed_token_ids")?;
        // As in vLLM: a list that allows nothing is a mistake, not the absence of a list.
        if allowed.as_ref().is_some_and(Vec::is_empty) {
            return Err(ApiError::expected(
                "allowed_token_ids",
                "an empty array",
                "at least one id",
            ));
        }
        Ok(Adjustments {
            min_p: min_p.unwrap_or(0.0),
            min_tokens: min_tokens.map_or(0, |n| n as u32),
            logit_bias: logit_bias("logit_bias", biases(fields)?, model)?,
            allowed_token_ids: allowed_token_ids("allowed_token_ids", allowed.unwrap_or_default(), model)?,
            bad_words: bad_words("bad_words", &words(fields)?, model)?,
        })
    }
}

/// What `min_p` may be.
pub const MIN_P_RANGE: &str = "a number from 0 to 1";

/// Whether `min_p` may be this.
pub fn is_min_p(n: f32) -> bool {
    (0.0..=1.0).contains(&n)
}

/// Refuses `min_tokens` past `max_tokens`, once that is known.
pub fn check_min_tokens(field: &'static str, sampling: &SamplingParams) -> Result<(), ApiError> {
    let SamplingParams {
        min_tokens, max_tokens, ..
    } = *sampling;
    match min_tokens <= max_tokens {
        true => Ok(()),
        false => Err(ApiError::expected(
            field,
            min_tokens,
            format!("at most max_tokens, which is {max_tokens}"),
        )),
    }
}

/// `logit_bias` as JSON says it: an object from ids, which are strings there, to numbers.
fn biases(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let expected = "an object from token ids to numbers";
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(ApiError::expected("logit_bias", shown(&other), expected)),
    };
    map.iter()
        .map(|(id, bias)| {
            let number = bias.as_f64().map(|bias| bias as f32);
            match (id.parse(), number) {
                (Ok(id), Some(bias)) => Ok((id, bias)),
                (Err(_), _) => Err(ApiError::expected(
                    "logit_bias",
                    shown(&Value::from(id.as_str())),
                    expected,
                )),
                (_, None) => Err(ApiError::expected("logit_bias", shown(bias), expected)),
            }
        })
        .collect()
}

/// Biases by id.
pub fn logit_bias(
    field: &'static str,
    biases: Vec<(TokenId, f32)>,
    model: &ServedModel,
) -> Result<Vec<(TokenId, f32)>, ApiError> {
    if biases.len() > MAX_LOGIT_BIASES {
        let found = format!("an object of {}", biases.len());
        return Err(ApiError::expected(
            field,
            found,
            format!("at most {MAX_LOGIT_BIASES} entries"),
        ));
    }
    let is_bias = |bias: f32| (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&bias);
    if let Some((_, bias)) = biases.iter().find(|(_, bias)| !is_bias(*bias)) {
        let expected = format!("numbers from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}");
        return Err(ApiError::expected(field, bias, expected));
    }
    check_known(field, biases.iter().map(|(id, _)| *id), model)?;
    let by_id: BTreeMap<TokenId, f32> = biases.into_iter().collect();
    Ok(by_id.into_iter().collect())
}

/// The listed ids in order, each once.
pub fn allowed_token_ids(
    field: &'static str,
    mut ids: Vec<TokenId>,
    model: &ServedModel,
) -> Result<Arc<[TokenId]>, ApiError> {
    check_known(field, ids.iter().copied(), model)?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids.into())
}

fn check_known(
    field: &'static str,
    mut ids: impl Iterator<Item = TokenId>,
    model: &ServedModel,
) -> Result<(), ApiError> {
    match ids.find(|id| *id >= model.vocab_size) {
        None => Ok(()),
        Some(id) => {
            let expected = format!("ids below the vocabulary size {}", model.vocab_size);
            Err(ApiError::expected(field, id, expected))
        }
    }
}

fn words(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let values = fields.array("bad_words", "an array of strings")?.unwrap_or_default();
    let words = values.into_iter().enumerate().map(|(idx, value)| match value {
        Value::String(word) => Ok(word),
        other => {
            let message = format!("bad_words[{idx}] is {}, expected a string", shown(&other));
            Err(ApiError::field("bad_words", message))
        }
    });
    words.collect()
}

/// Each text as ids in two ways, as vLLM does: as it begins a text, and as it follows a space, where that is as many tokens
/// and begins with another one.
pub fn bad_words(field: &'static str, words: &[String], model: &ServedModel) -> Result<Vec<Vec<TokenId>>, ApiError> {
    if words.is_empty() {
        return Ok(Vec::new());
    }
    let Some(tokenizer) = &model.tokenizer else {
        let message = format!("{field} needs text, and this model has no tokenizer; use logit_bias");
        return Err(ApiError::field(field, message));
    };
    if words.len() > MAX_BAD_WORDS {
        let found = format!("an array of {}", words.len());
        return Err(ApiError::expected(
            field,
            found,
            format!("at most {MAX_BAD_WORDS} strings"),
        ));
    }
    let mut sequences = Vec::new();
    for word in words {
        let bare = word.trim_start();
        if bare.is_empty() || word.len() > LONGEST_BAD_WORD {
            let found = format!("a string of {} bytes", word.len());
            let expected = format!("strings of 1 to {LONGEST_BAD_WORD} bytes that are not only space");
            return Err(ApiError::expected(field, found, expected));
        }
        let encode = |text: &str| {
            let ids = tokenizer.encode(text);
            ids.map_err(|error| ApiError::new(ErrorKind::Internal, format!("tokenization failed: {error}")))
        };
        let first = encode(bare)?;
        let after_space = encode(&format!(" {bare}"))?;
        if first.is_empty() {
            continue;
        }
        let is_another = after_space.len() == first.len() && after_space[0] != first[0];
        sequences.push(first);
        sequences.extend(is_another.then_some(after_space));
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use baton_engine::text::Tokenizer;

    use super::super::DefaultSampling;
    use super::*;

    #[test]
    fn a_bad_word_is_ruled_out_after_a_space_too() {
        let tokenizer = include_bytes!("../../tests/data/tokenizers/llama3/tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(tokenizer).unwrap();
        let ids = |text: &str| tokenizer.encode(text).unwrap();
        let model = ServedModel {
            parsers: Default::default(),
            names: vec!["m".into()],
            root: "/models/m".into(),
            folder: None,
            vocab_size: tokenizer.n_ids() as u32,
            hidden_size: 4,
            tokenizer: Some(tokenizer.clone()),
            chat_template: None,
            eos_token_ids: vec![2],
            default_sampling: DefaultSampling::default(),
            max_model_len: 100,
            dtype: "f32".into(),
        };
        let resolved = |word: &str| bad_words("bad_words", &[word.to_owned()], &model).unwrap();
        // One token either way, and not the same one.
        assert_eq!((ids("the").len(), ids(" the").len()), (1, 1));
        assert_eq!(resolved("the"), [ids("the"), ids(" the")]);
        assert_eq!(
            resolved(" the"),
            resolved("the"),
            "leading space is as if it were not written"
        );
        // A text whose two ways differ in length is ruled out as it begins a text only.
        let word = ["zyx", "qq", "Zq", "xylophone"]
            .into_iter()
            .find(|word| ids(word).len() != ids(&format!(" {word}")).len());
        let word = word.expect("some text is cut in another way after a space");
        assert_eq!(resolved(word), [ids(word)]);
    }
}
