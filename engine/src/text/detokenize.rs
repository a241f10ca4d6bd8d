//! Ids one by one -> pieces of text whose concatenation is the text of all ids. No piece holds part of a character.
//! No stop strings: those work on the pieces.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;

use super::tokenizer::{Tokenizer, TokenizerError};

/// Incremental decoding of one sequence.
///
/// A token's text depends on those before it (spaces, bytes of one character), so the ids of the last piece are decoded
/// together with the new ones, and what both have in common is cut off.
#[derive(Clone, Debug)]
pub struct DetokenizeStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Special tokens that are not skipped.
    shown: Arc<[TokenId]>,
    /// The ids of the last piece, then those not yet in a piece.
    window: Vec<TokenId>,
    /// How many ids of `window` are in pieces already.
    n_emitted: usize,
    /// Text of those.
    emitted_text: String,
}

impl DetokenizeStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> DetokenizeStream {
        DetokenizeStream {
            tokenizer,
            skip_special_tokens,
            shown: Arc::default(),
            window: Vec::new(),
            n_emitted: 0,
            emitted_text: String::new(),
        }
    }

    /// Shows the special tokens of `ids` even where others are skipped: marks that something looks for in the text.
    pub fn showing(mut self, ids: Arc<[TokenId]>) -> DetokenizeStream {
        self.shown = ids;
        self
    }

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, id: TokenId) -> Result<String, TokenizerError> {
        // Such ids are nothing to the decoder; kept out, a run of them cannot make the window long.
        let is_skipped = self.skip_special_tokens && self.tokenizer.is_special(id) && !self.shown.contains(&id);
        if is_skipped || !self.tokenizer.knows(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.decode(&self.window)?;
        // A replacement character at the end may be the beginning of a character that the next ids complete.
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let piece = self.after_emitted(text)?;
        if !piece.is_empty() {
            self.window.drain(..self.n_emitted);
            self.n_emitted = self.window.len();
            self.emitted_text = self.decode(&self.window)?;
        }
        Ok(piece)
    }

    /// What the pieces still owe at the end of the sequence; incomplete characters come as U+FFFD. The stream starts afresh.
    pub fn flush(&mut self) -> Result<String, TokenizerError> {
        let text = self.decode(&self.window)?;
        let tail = self.after_emitted(text)?;
        self.window.clear();
        self.n_emitted = 0;
        self.emitted_text.clear();
        Ok(tail)
    }

    fn after_emitted(&self, text: String) -> Result<String, TokenizerError> {
        match text.strip_prefix(&self.emitted_text) {
            Some(new) => Ok(new.to_owned()),
            // Byte-fallback decoders give up a whole run of bytes when its end is broken, characters already in pieces
            // included. What has been said stays said; the rest is decoded alone.
            None => self.decode(&self.window[self.n_emitted..]),
        }
    }

    /// What is skipped never enters the window.
    fn decode(&self, ids: &[TokenId]) -> Result<String, TokenizerError> {
        self.tokenizer.decode_with_special_tokens(ids)
    }
}
