//! tokenizer.json: text to ids and back. Knows nothing of chats, never pads, and truncates only when asked.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use tokenizers::{Encoding, PostProcessor as _, Token};

use super::detokenize::DetokenizeStream;

/// A tokenizer; clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// Of each id, whether it is a special token of the vocabulary.
    kinds: Vec<IdKind>,
    /// How special tokens are written, the longest first.
    special_texts: Vec<(String, TokenId)>,
}

/// What an id is to a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IdKind {
    Unknown,
    Text,
    Special,
}

/// The tokenizer library's complaint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenizerError(String);

impl From<tokenizers::Error> for TokenizerError {
    fn from(error: tokenizers::Error) -> TokenizerError {
        TokenizerError(error.to_string())
    }
}

/// The library panics at some files that a fuzzer finds; to whoever uses it that is an error as any other.
fn guarded<T>(use_library: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    match catch_unwind(AssertUnwindSafe(use_library)) {
        Ok(result) => Ok(result?),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no reason");
            Err(TokenizerError(format!("the tokenizer library panicked: {said}")))
        }
    }
}

/// Bytes that a tokenizer may make of each byte of a text: published ones make a dozen, and a short file can ask for all
/// memory.
const MAX_GROWTH: u64 = 256;

/// Bytes that a normalizer or decoder may make of each byte, as far as the file says so itself.
fn growth(step: &serde_json::Value) -> u64 {
    let text = |value: &serde_json::Value| value.as_str().map_or(0, str::len) as u64;
    let steps = step["normalizers"].as_array().or_else(|| step["decoders"].as_array());
    match step["type"].as_str() {
        Some("Sequence") => steps
            .into_iter()
            .flatten()
            .fold(1, |grown, step| grown.saturating_mul(growth(step))),
        // A regular expression may match nothing, before every byte.
        Some("Replace") => match text(&step["pattern"]["String"]) {
            0 => text(&step["content"]) + 1,
            n_replaced => text(&step["content"]).div_ceil(n_replaced).max(1),
        },
        Some("Prepend") => text(&step["prepend"]) + 1,
        _ => 1,
    }
}

fn check_growth(what: &str, step: &impl serde::Serialize) -> Result<(), TokenizerError> {
    let step = serde_json::to_value(step).map_err(|error| TokenizerError(format!("{what}: {error}")))?;
    let grown = growth(&step);
    if grown > MAX_GROWTH {
        return Err(TokenizerError(format!(
            "{what}: may make {grown} bytes of each, expected at most {MAX_GROWTH}"
        )));
    }
    Ok(())
}

impl Tokenizer {
    /// Reads the bytes of tokenizer.json.
    pub fn from_bytes(bytes: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let mut tokenizer = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))?;
        // A saved tokenizer may ask for the truncation or padding of its training.
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        check_growth("normalizer", &tokenizer.get_normalizer())?;
        check_growth("decoder", &tokenizer.get_decoder())?;
        let added = tokenizer.get_added_tokens_decoder();
        let n_added = added.keys().map(|&id| id as usize + 1).max().unwrap_or(0);
        // Ids may be sparse: those at and past the vocabulary's size can still be known, so look at the largest one.
        let largest = tokenizer
            .get_vocab(true)
            .values()
            .map(|&id| id as usize + 1)
            .max()
            .unwrap_or(0);
        const MAX_IDS: usize = 1 << 26;
        if largest.max(n_added) > MAX_IDS {
            return Err(TokenizerError(format!(
                "expected ids below {MAX_IDS}, found {}",
                largest.max(n_added) - 1
            )));
        }
        let mut kinds = vec![IdKind::Unknown; largest.max(n_added)];
        for id in tokenizer.get_vocab(true).into_values() {
            kinds[id as usize] = IdKind::Text;
        }
        let mut special_texts = Vec::new();
        for (id, token) in added {
            kinds[id as usize] = if token.special { IdKind::Special } else { IdKind::Text };
            if token.special && !token.content.is_empty() {
                special_texts.push((token.content, id));
            }
        }
        special_texts.sort_unstable_by(|(a, _), (b, _)| (b.len(), a).cmp(&(a.len(), b)));
        Ok(Tokenizer {
            inner: Arc::new(Inner {
                tokenizer,
                kinds,
                special_texts,
            }),
        })
    }

    /// Ids of `text` with what the tokenizer itself adds (a beginning-of-text id, say).
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        Ok(guarded(|| self.inner.tokenizer.encode_fast(text, true))?
            .get_ids()
            .to_vec())
    }

    /// As [`Tokenizer::encode_with_special_tokens`], with ids of the text taken away by `cut`, which is also told how many
    /// ids will be added to what it leaves.
    pub fn encode_cut(
        &self,
        text: &str,
        cut: impl FnOnce(&mut Vec<TokenId>, usize),
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let tokenizer = &self.inner.tokenizer;
        let processor = tokenizer.get_post_processor();
        let mut ids = self.encode(text)?;
        cut(&mut ids, processor.map_or(0, |processor| processor.added_tokens(false)));
        let token = |id: TokenId| Token::new(id, self.id_to_token(id).unwrap_or_default(), (0, 0));
        let encoding = Encoding::from_tokens(ids.into_iter().map(token).collect(), 0);
        Ok(tokenizer.post_process(encoding, None, true)?.get_ids().to_vec())
    }

    /// Ids of `text` alone: for rendered chats and continuations. Special tokens written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        Ok(guarded(|| self.inner.tokenizer.encode_fast(text, false))?
            .get_ids()
            .to_vec())
    }

    /// The special tokens that are written in `text`: where each stands, and its id.
    pub fn special_tokens_in(&self, text: &str) -> Vec<(Range<usize>, TokenId)> {
        let mut found = Vec::new();
        let mut from = 0;
        while from < text.len() {
            let here = self.inner.special_texts.iter();
            let here = here.filter(|(special, _)| text[from..].starts_with(special.as_str()));
            match here.map(|(special, id)| (special.len(), *id)).next() {
                Some((n_bytes, id)) => {
                    found.push((from..from + n_bytes, id));
                    from += n_bytes;
                }
                None => from = text.ceil_char_boundary(from + 1),
            }
        }
        found
    }

    /// Text of `ids`, special tokens included. Ids past the vocabulary are nothing.
    pub fn decode_with_special_tokens(&self, ids: &[TokenId]) -> Result<String, TokenizerError> {
        guarded(|| self.inner.tokenizer.decode(ids, false))
    }

    /// Text of `ids` without special tokens. Ids past the vocabulary are nothing.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String, TokenizerError> {
        guarded(|| self.inner.tokenizer.decode(ids, true))
    }

    /// A decoder of ids that come one by one; it skips special tokens.
    pub fn stream(&self) -> DetokenizeStream {
        DetokenizeStream::new(self.clone(), true)
    }

    /// A decoder of ids that come one by one; special tokens appear in its text.
    pub fn stream_with_special_tokens(&self) -> DetokenizeStream {
        DetokenizeStream::new(self.clone(), false)
    }

    /// The id of a token by its exact text.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The token of an id as the vocabulary writes it (`▁the`, `Ġthe`), for log-probability reports of raw tokens.
    pub fn id_to_token(&self, id: TokenId) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// Of tokenizer.json the parts that say what bytes each token is: `decoder`, `added_tokens`, `model.vocab`.
    pub fn vocabulary_json(&self) -> serde_json::Value {
        let tokenizer = &self.inner.tokenizer;
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        let added: Vec<_> = added
            .map(|(id, token)| serde_json::json!({ "id": id, "content": token.content, "special": token.special }))
            .collect();
        serde_json::json!({
            "decoder": tokenizer.get_decoder(),
            "added_tokens": added,
            "model": { "vocab": tokenizer.get_vocab(false) },
        })
    }

    /// One past the largest id.
    pub fn n_ids(&self) -> usize {
        self.inner.kinds.len()
    }

    /// Whether the vocabulary has a token of this id.
    pub fn knows(&self, id: TokenId) -> bool {
        self.kind(id) != IdKind::Unknown
    }

    /// Whether the id is a special token, which ordinary decoding skips.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.kind(id) == IdKind::Special
    }

    fn kind(&self, id: TokenId) -> IdKind {
        self.inner.kinds.get(id as usize).copied().unwrap_or(IdKind::Unknown)
    }
}
