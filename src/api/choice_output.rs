//! The tokens of one choice on their way to text: detokenization, stop strings, the reason of the end. Other choices of the
//! request, and what the engine does meanwhile, are not known here.

use std::sync::Arc;

use baton_engine::text::{DetokenizeStream, StopStrings, Tokenizer, TokenizerError};
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Finish, Token};

use super::error::{ApiError, ErrorKind};

/// How ids become the text a client sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextOptions {
    /// Texts that end generation.
    pub stop: Vec<String>,
    /// Keep the stop text, or the stop id's text, at the end.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Special tokens that stay in the text in any case: something looks for them there.
    pub shown_special_tokens: Arc<[TokenId]>,
}

impl Default for TextOptions {
    fn default() -> TextOptions {
        TextOptions {
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            shown_special_tokens: Arc::default(),
        }
    }
}

/// Why a choice ended, mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FinishReason {
    /// A stop id or a stop text.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
    /// Aborted by its name.
    Abort,
}

impl FinishReason {
    /// The word of the OpenAI API (`abort` is vLLM's).
    pub const fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
        }
    }
}

/// What exactly stopped a choice, when it was not the model's own end.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of the client's stop ids.
    Id(TokenId),
    /// One of the client's stop texts.
    Text(String),
}

/// One token with the text that became final with it.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// The token.
    pub token: Token,
    /// Text that may be sent now; often empty.
    pub text: String,
    /// It is already known that no token of this choice follows, so the end can travel with it.
    pub is_last: bool,
}

/// The end of a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceEnd {
    /// Why.
    pub reason: FinishReason,
    /// What, if the client asked for it.
    pub stop_reason: Option<StopReason>,
    /// Text that was still held back; empty unless the end came unannounced.
    pub text: String,
}

/// What ends every choice of a request.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Tokens of a choice.
    pub(super) max_tokens: u32,
    /// Ids that end it, ascending.
    pub(super) stop_token_ids: Vec<TokenId>,
}

/// Ids in, text out; the text of a model without a tokenizer is empty.
#[derive(Debug)]
struct TextSide {
    detokenize: Option<DetokenizeStream>,
    stop: StopStrings,
    stop_texts: Vec<String>,
    include_stop: bool,
    /// Tokens in whose text no stop string ends.
    n_exempt: u32,
}

/// Text that became final, and the stop text found in it.
#[derive(Debug, Default)]
struct Piece {
    text: String,
    stopped_by: Option<StopReason>,
}

impl TextSide {
    fn push(&mut self, id: TokenId) -> Result<Piece, TokenizerError> {
        let Some(detokenize) = &mut self.detokenize else {
            return Ok(Piece::default());
        };
        let decoded = detokenize.push(id)?;
        let piece = self.cut(&decoded);
        self.n_exempt = self.n_exempt.saturating_sub(1);
        Ok(piece)
    }

    /// What is still held back, at the end.
    fn flush(&mut self) -> Result<Piece, TokenizerError> {
        let Some(detokenize) = &mut self.detokenize else {
            return Ok(Piece::default());
        };
        let tail = detokenize.flush()?;
        let mut piece = self.cut(&tail);
        if piece.stopped_by.is_none() {
            piece.text.push_str(&self.stop.flush());
        }
        Ok(piece)
    }

    fn cut(&mut self, text: &str) -> Piece {
        if self.n_exempt > 0 {
            return Piece {
                text: self.stop.pass(text),
                stopped_by: None,
            };
        }
        let output = self.stop.push(text);
        let stopped_by = output
            .stopped_by
            .map(|idx| StopReason::Text(self.stop_texts[idx].clone()));
        Piece {
            text: output.text,
            stopped_by,
        }
    }
}

/// One choice as it grows. Once it has been cut by a stop text it takes no more tokens, though the engine may make some.
#[derive(Debug)]
pub(super) struct ChoiceOutput {
    text: TextSide,
    n_tokens: u32,
    ended: Option<FinishReason>,
    was_cut: bool,
}

impl ChoiceOutput {
    /// Stop texts end in none of its `min_tokens` first tokens.
    pub(super) fn new(tokenizer: Option<&Tokenizer>, options: &TextOptions, min_tokens: u32) -> ChoiceOutput {
        ChoiceOutput {
            text: TextSide {
                detokenize: tokenizer.map(|tokenizer| match options.skip_special_tokens {
                    true => tokenizer.stream().showing(options.shown_special_tokens.clone()),
                    false => tokenizer.stream_with_special_tokens(),
                }),
                stop: StopStrings::new(options.stop.clone(), options.include_stop_str_in_output),
                stop_texts: options.stop.clone(),
                include_stop: options.include_stop_str_in_output,
                n_exempt: min_tokens,
            },
            n_tokens: 0,
            ended: None,
            was_cut: false,
        }
    }

    /// Tokens taken.
    pub(super) fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Why it has ended, if it has.
    pub(super) fn ended(&self) -> Option<FinishReason> {
        self.ended
    }

    /// Whether a stop text ended it, so that its engine may not know yet.
    pub(super) fn was_cut(&self) -> bool {
        self.was_cut
    }

    /// Takes the next token; when it completes a stop text, the end comes with it.
    pub(super) fn token(
        &mut self,
        token: Token,
        limits: &Limits,
    ) -> Result<(OutputToken, Option<ChoiceEnd>), ApiError> {
        if self.ended.is_some() {
            let message = format!("token {} came after the end of its choice", token.index);
            return Err(ApiError::new(ErrorKind::Internal, message));
        }
        if token.index != self.n_tokens || self.n_tokens >= limits.max_tokens {
            let (index, expected) = (token.index, self.n_tokens);
            let message = format!(
                "token {index} came where {expected} of {} was expected",
                limits.max_tokens
            );
            return Err(ApiError::new(ErrorKind::Internal, message));
        }
        self.n_tokens += 1;
        let is_stop_id = limits.stop_token_ids.binary_search(&token.id).is_ok();
        let mut piece = match is_stop_id && !self.text.include_stop {
            true => Piece::default(),
            false => self.text.push(token.id).map_err(internal)?,
        };
        let is_last = is_stop_id || self.n_tokens == limits.max_tokens;
        if is_last && piece.stopped_by.is_none() {
            let tail = self.text.flush().map_err(internal)?;
            piece.text.push_str(&tail.text);
            piece.stopped_by = tail.stopped_by;
        }
        let output = OutputToken {
            token,
            text: piece.text,
            is_last: is_last || piece.stopped_by.is_some(),
        };
        let end = piece.stopped_by.map(|stop_reason| {
            self.was_cut = true;
            self.end(FinishReason::Stop, Some(stop_reason), String::new())
        });
        Ok((output, end))
    }

    /// The engine ended it.
    pub(super) fn finish(&mut self, finish: Finish, eos_token_ids: &[TokenId]) -> Result<ChoiceEnd, ApiError> {
        let tail = self.text.flush().map_err(internal)?;
        let (reason, stop_reason) = match (tail.stopped_by, finish) {
            (Some(stop_reason), _) => (FinishReason::Stop, Some(stop_reason)),
            (None, Finish::Length) => (FinishReason::Length, None),
            (None, Finish::Stop(id)) => {
                let is_eos = eos_token_ids.contains(&id);
                (FinishReason::Stop, (!is_eos).then_some(StopReason::Id(id)))
            }
        };
        Ok(self.end(reason, stop_reason, tail.text))
    }

    /// The client aborted it.
    pub(super) fn abort(&mut self) -> Result<ChoiceEnd, ApiError> {
        let tail = self.text.flush().map_err(internal)?;
        Ok(self.end(FinishReason::Abort, None, tail.text))
    }

    fn end(&mut self, reason: FinishReason, stop_reason: Option<StopReason>, text: String) -> ChoiceEnd {
        self.ended = Some(reason);
        ChoiceEnd {
            reason,
            stop_reason,
            text,
        }
    }
}

fn internal(error: TokenizerError) -> ApiError {
    ApiError::new(ErrorKind::Internal, format!("detokenization failed: {error}"))
}
