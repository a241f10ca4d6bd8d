//! What was asked (`Request`), what has come of it (`PortableState`), and how it ended (`Finish`, `Failure`).
//! Text, templates and stop strings belong to the front door; here there are only token ids.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, RequestId, TokenId};

/// A language that the output's text must be of. Canonical: it is compiled as it is, by every instance alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Constraint {
    /// JSON documents valid against this JSON Schema.
    JsonSchema(Arc<str>),
    /// Texts that match this regular expression as a whole.
    Regex(Arc<str>),
    /// Texts of this grammar, in llguidance's variant of Lark.
    Grammar(Arc<str>),
}

impl Constraint {
    /// Its source.
    pub fn text(&self) -> &str {
        match self {
            Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Grammar(text) => text,
        }
    }
}

/// How tokens are chosen and when generation ends. Resolved: nothing here is left to a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Upper bound on generated tokens, at least 1; 0 of a request that is embedded.
    pub max_tokens: u32,
    /// No stop id is generated before this many tokens, at most `max_tokens`.
    pub min_tokens: u32,
    /// 0 is greedy; else logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this probable, as a share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Seed of the counter-based generator. The front door draws one when the client named none.
    pub seed: u64,
    /// Ids that end generation (the model's end-of-sequence ids unless the client ignores them, and the client's own).
    pub stop_token_ids: Vec<TokenId>,
    /// Report the chosen token's log-probability and this many of the most likely ones; `None` reports nothing.
    pub logprobs: Option<u8>,
    /// The same for each prompt token after the first. Such a request takes no prefix-cache hit.
    pub prompt_logprobs: Option<u8>,
    /// Choices to generate from the one prompt, at least 1. Their generators differ by the choice's number.
    pub n: u32,
    /// Subtracted from the logit of every token generated before; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it was generated before; 0 is off.
    pub frequency_penalty: f32,
    /// Divides the positive and multiplies the negative logits of tokens in the prompt or generated before; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens. Ascending by id, each once.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The only tokens that may be generated, ascending; empty allows all.
    pub allowed_token_ids: Arc<[TokenId]>,
    /// Sequences that are not generated: the last id of one is left out where the output ends with those before it.
    pub bad_words: Vec<Vec<TokenId>>,
    /// What the output's text must be; a stop id that is an end of sequence is generated only where the text is complete.
    pub constraint: Option<Constraint>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            max_tokens: 16,
            min_tokens: 0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            n: 1,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_token_ids: Arc::from([]),
            bad_words: Vec::new(),
            constraint: None,
        }
    }
}

/// What was asked, in the form every instance understands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Identity in the cluster.
    pub id: RequestId,
    /// The prompt, at least one token.
    pub prompt_ids: Arc<[TokenId]>,
    /// How to generate.
    pub sampling: SamplingParams,
    /// Separates prefix caches: requests share cached blocks only with equal salts.
    pub cache_salt: u64,
}

/// Of a model with two rotary tables, the one for sequences that stay within the short context.
pub const SHORT_ROPE: usize = 0;
/// The one for sequences that may outgrow it.
pub const LONG_ROPE: usize = 1;

impl Request {
    /// For the hidden states of `prompt_ids`: nothing is generated.
    pub fn to_embed(id: RequestId, prompt_ids: Arc<[TokenId]>, cache_salt: u64) -> Request {
        let sampling = SamplingParams {
            max_tokens: 0,
            ..SamplingParams::default()
        };
        Request {
            id,
            prompt_ids,
            sampling,
            cache_salt,
        }
    }

    /// Which rotary table turns its sequences. A cached key cannot be turned again, so this is settled by what the request may
    /// grow to, and stays: on every instance, after every move and replay. `short_context` is in tokens; `None` where a model
    /// has one table.
    pub fn rope_variant(&self, short_context: Option<u32>) -> usize {
        let longest = self.prompt_ids.len().saturating_add(self.sampling.max_tokens as usize);
        match short_context {
            Some(short_context) if longest > short_context as usize => LONG_ROPE,
            _ => SHORT_ROPE,
        }
    }

    /// What its prefix keys are salted with: keys turned by different tables are different KV.
    pub fn prefix_salt(&self, short_context: Option<u32>) -> u64 {
        // Any constant: a salt that a client's text hashes to is as good as random.
        const LONG_ROPE_SALT: u64 = 0x6c6f_6e67_726f_7065;
        match self.rope_variant(short_context) {
            LONG_ROPE => self.cache_salt ^ LONG_ROPE_SALT,
            _ => self.cache_salt,
        }
    }
}

/// Log-probabilities reported with one token, of the raw distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Natural-log probability of the token itself.
    pub logprob: f32,
    /// 1-based position of the token in the distribution's order.
    pub rank: u32,
    /// The most likely tokens, most likely first; ties by the smaller id.
    pub top: Vec<(TokenId, f32)>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Position among the generated tokens of its choice, from 0.
    pub index: u32,
    /// The id.
    pub id: TokenId,
    /// Present when the request asked for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why generation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// One of [`SamplingParams::stop_token_ids`] was generated; it is the last token reported.
    Stop(TokenId),
    /// `max_tokens` were generated or the model's length was reached.
    Length,
}

/// Why a request ended badly. Each has one HTTP status and one gRPC code (`src/`, one function).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// The request can never run here (too long, say). Not retried.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// No room now; another instance or a later attempt may succeed.
    #[error("busy: {0}")]
    Busy(String),
    /// An instance died, was cut off, or gave up; placed again where attempts are left.
    #[error("instance lost: {0}")]
    InstanceLost(String),
    /// The peer is of another protocol version, model, dtype or layout. Another pair may agree.
    #[error("incompatible peer: {0}")]
    Incompatible(String),
    /// The request's own deadline passed.
    #[error("deadline exceeded")]
    DeadlineExceeded,
    /// The client went away or aborted.
    #[error("cancelled")]
    Cancelled,
    /// A bug; the message says which assertion.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Failure {
    /// Whether another placement of the same request may succeed.
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Failure::Busy(_) | Failure::InstanceLost(_))
    }
}

/// What one choice of a request has produced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChoiceState {
    /// Tokens generated so far, in order; `index` equals the position.
    pub output: Vec<Token>,
    /// Set once the choice has ended.
    pub finish: Option<Finish>,
}

/// All that is needed to go on with a request elsewhere: generator, penalties and grammar are rebuilt from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortableState {
    /// What was asked, with its resolved seed.
    pub request: Request,
    /// One entry per choice, `sampling.n` of them.
    pub choices: Vec<ChoiceState>,
    /// The epoch in which the receiver may speak.
    pub epoch: Epoch,
}

impl PortableState {
    /// A request that has produced nothing yet.
    pub fn fresh(request: Request, epoch: Epoch) -> PortableState {
        let choices = vec![ChoiceState::default(); request.sampling.n as usize];
        PortableState {
            request,
            choices,
            epoch,
        }
    }

    /// Whether no choice has a token yet, so that all of them begin from one prefill.
    pub fn is_fresh(&self) -> bool {
        self.choices
            .iter()
            .all(|choice| choice.output.is_empty() && choice.finish.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rotary_table_follows_from_what_a_request_may_grow_to_and_separates_prefixes() {
        let request = |n_prompt: usize, max_tokens: u32| Request {
            id: RequestId(1),
            prompt_ids: Arc::from(vec![5; n_prompt]),
            sampling: SamplingParams {
                max_tokens,
                ..SamplingParams::default()
            },
            cache_salt: 9,
        };
        let (short, long) = (request(100, 28), request(100, 29));
        assert_eq!(short.rope_variant(Some(128)), SHORT_ROPE);
        assert_eq!(long.rope_variant(Some(128)), LONG_ROPE);
        assert_eq!(long.rope_variant(None), SHORT_ROPE, "a model with one table");
        assert_eq!(short.prefix_salt(Some(128)), 9);
        assert_ne!(long.prefix_salt(Some(128)), short.prefix_salt(Some(128)));
        assert_eq!(request(1, u32::MAX).rope_variant(Some(128)), LONG_ROPE);
    }
}
