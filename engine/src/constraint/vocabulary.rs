//! The bytes of every token, as a trie that languages are matched over.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{panic_utils, token_bytes_from_tokenizer_json};

use super::{ConstraintError, one_line};
use crate::text::Tokenizer;

/// The vocabulary of a model whose logits are `[n_vocab]`. Ids that the tokenizer does not know are never allowed, special
/// tokens only where a grammar names them, and the ends of sequence where a text is complete.
///
/// # Errors
/// No end of sequence, or tokens whose bytes cannot be told.
pub(super) fn token_env(
    tokenizer: &Tokenizer,
    eos_token_ids: &[TokenId],
    n_vocab: usize,
) -> Result<TokEnv, ConstraintError> {
    let eos: Vec<TokenId> = eos_token_ids
        .iter()
        .copied()
        .filter(|&id| (id as usize) < n_vocab)
        .collect();
    let Some(&first_eos) = eos.first() else {
        return Err(ConstraintError::Model("it has no end-of-sequence token".to_owned()));
    };
    let json = tokenizer.vocabulary_json();
    // The library asserts what it expects of a vocabulary.
    let built = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut bytes = token_bytes_from_tokenizer_json(&json)?;
        bytes.resize(n_vocab, Vec::new());
        let info = TokRxInfo::new(n_vocab as u32, first_eos);
        let trie = TokTrie::from(&info, &bytes).with_eos_tokens(&eos);
        Ok(Arc::new(ApproximateTokEnv::new(trie)) as TokEnv)
    }));
    built.map_err(|error| ConstraintError::Model(one_line(error)))
}
