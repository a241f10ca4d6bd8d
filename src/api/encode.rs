//! Text to token ids for the APIs: what cannot be encoded, or cannot fit, is refused by the field it came in.

use baton_scheduler::ids::TokenId;

use super::error::{ApiError, ErrorKind};
use super::served_model::ServedModel;
use super::truncation::Cut;

/// No vocabulary has longer tokens in any number, so a text longer than this many bytes for each position cannot fit.
const LONGEST_TOKEN_BYTES: usize = 256;

/// Which special tokens the tokenizer adds by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Those of its own post-processing: for plain text.
    Added,
    /// None: for rendered chats, which hold theirs already.
    AsWritten,
}

impl SpecialTokens {
    /// What `add_special_tokens` asks for, or else `default`.
    pub fn asked(add_special_tokens: Option<bool>, default: SpecialTokens) -> SpecialTokens {
        match add_special_tokens {
            Some(true) => SpecialTokens::Added,
            Some(false) => SpecialTokens::AsWritten,
            None => default,
        }
    }
}

/// Ids of `text`, which the client sent as `field`, or what `cut` leaves of them.
pub fn encode(
    model: &ServedModel,
    field: &'static str,
    text: &str,
    special_tokens: SpecialTokens,
    cut: Option<Cut>,
) -> Result<Vec<TokenId>, ApiError> {
    let Some(tokenizer) = &model.tokenizer else {
        return Err(ApiError::field(
            field,
            format!("{field} is text, and this model has no tokenizer; send token ids"),
        ));
    };
    let (n_bytes, limit) = (text.len(), model.max_model_len);
    // What is cut may be as long as a body.
    if cut.is_none() && n_bytes / LONGEST_TOKEN_BYTES > limit as usize {
        let message = format!("{field} has {n_bytes} bytes; this model's maximum context length is {limit} tokens");
        return Err(ApiError::field(field, message));
    }
    let ids = match (special_tokens, cut) {
        (SpecialTokens::Added, None) => tokenizer.encode_with_special_tokens(text),
        (SpecialTokens::Added, Some(Cut { n_tokens, side })) => {
            tokenizer.encode_cut(text, |ids, n_added| side.cut(ids, n_tokens.saturating_sub(n_added)))
        }
        (SpecialTokens::AsWritten, _) => tokenizer.encode(text),
    };
    let mut ids = ids.map_err(|error| ApiError::new(ErrorKind::Internal, format!("tokenization failed: {error}")))?;
    if let Some(cut) = cut {
        cut.apply(&mut ids);
    }
    Ok(ids)
}

/// The text of a prompt's ids, special tokens included; empty where there is no tokenizer.
pub fn text_of(model: &ServedModel, ids: &[TokenId]) -> String {
    let text = model
        .tokenizer
        .as_ref()
        .map(|tokenizer| tokenizer.decode_with_special_tokens(ids));
    text.and_then(Result::ok).unwrap_or_default()
}
