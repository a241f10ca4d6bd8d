//! Log-probabilities in the three shapes of the OpenAI API and vLLM: chat, completions, and of the prompt.

use std::collections::BTreeMap;

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::TokenLogprobs;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::ApiState;

/// JSON has no infinity; vLLM's floor instead.
const FLOOR: f32 = -9999.0;

/// Writes tokens as text, or as `token_id:N` where there is none or the client asked for ids.
#[derive(Clone, Copy, Debug)]
pub struct TokenWriter<'a> {
    state: &'a ApiState,
    as_ids: bool,
}

impl<'a> TokenWriter<'a> {
    /// A writer for the served model.
    pub fn new(state: &'a ApiState, as_ids: bool) -> TokenWriter<'a> {
        TokenWriter { state, as_ids }
    }

    /// A token's text and bytes.
    pub fn write(&self, id: TokenId) -> (String, Option<Vec<u8>>) {
        let model = self.state.model();
        let known = match (&model.tokenizer, self.as_ids) {
            (Some(tokenizer), false) => self.state.inner.token_texts.get(tokenizer, id),
            _ => None,
        };
        match known {
            Some(token) => (token.text.to_string(), Some(token.bytes.to_vec())),
            None => (format!("token_id:{id}"), None),
        }
    }
}

/// `logprobs` of a chat choice.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatLogprob>,
}

#[derive(Clone, Debug, Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    token: ChatTokenLogprob,
    top_logprobs: Vec<ChatTokenLogprob>,
}

#[derive(Clone, Debug, Serialize)]
struct ChatTokenLogprob {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl ChatLogprobs {
    /// Adds one token; `n_top` alternatives are reported.
    pub fn push(&mut self, writer: TokenWriter<'_>, id: TokenId, logprobs: &TokenLogprobs, n_top: u8) {
        let entry = |id: TokenId, logprob: f32| {
            let (token, bytes) = writer.write(id);
            ChatTokenLogprob {
                token,
                logprob: logprob.max(FLOOR),
                bytes,
            }
        };
        self.content.push(ChatLogprob {
            token: entry(id, logprobs.logprob),
            top_logprobs: logprobs
                .top
                .iter()
                .take(usize::from(n_top))
                .map(|&(id, p)| entry(id, p))
                .collect(),
        });
    }
}

/// `logprobs` of a completions choice: parallel lists, one entry per token.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    #[serde(skip)]
    next_offset: usize,
}

/// Token text to log-probability, in the order given; of tokens with one text, the first.
#[derive(Clone, Debug, PartialEq)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        self.0
            .iter()
            .try_for_each(|(token, logprob)| map.serialize_entry(token, logprob))?;
        map.end()
    }
}

impl CompletionLogprobs {
    /// Continues the offsets of earlier chunks, in characters.
    pub fn continued(next_offset: usize) -> CompletionLogprobs {
        CompletionLogprobs {
            next_offset,
            ..CompletionLogprobs::default()
        }
    }

    /// Where the next token's text begins.
    pub fn next_offset(&self) -> usize {
        self.next_offset
    }

    /// Adds one token; `None` for the first token of a prompt, which nothing predicts.
    pub fn push(&mut self, writer: TokenWriter<'_>, id: TokenId, logprobs: Option<&TokenLogprobs>, n_top: u8) {
        let (text, _) = writer.write(id);
        self.text_offset.push(self.next_offset);
        self.next_offset += text.chars().count();
        self.token_logprobs
            .push(logprobs.map(|logprobs| logprobs.logprob.max(FLOOR)));
        self.top_logprobs
            .push(logprobs.map(|logprobs| top_of(writer, id, &text, logprobs, n_top)));
        self.tokens.push(text);
    }
}

/// The `n_top` most likely tokens, and the token itself if it is not among them.
fn top_of(writer: TokenWriter<'_>, id: TokenId, text: &str, logprobs: &TokenLogprobs, n_top: u8) -> TopLogprobs {
    let top = &logprobs.top[..logprobs.top.len().min(usize::from(n_top))];
    let own = (!top.iter().any(|&(other, _)| other == id)).then(|| (text.to_owned(), logprobs.logprob.max(FLOOR)));
    let mut entries: Vec<(String, f32)> = Vec::with_capacity(top.len() + 1);
    for (text, logprob) in top
        .iter()
        .map(|&(id, logprob)| (writer.write(id).0, logprob.max(FLOOR)))
        .chain(own)
    {
        if !entries.iter().any(|(other, _)| *other == text) {
            entries.push((text, logprob));
        }
    }
    TopLogprobs(entries)
}

/// vLLM's form of one position: from ids to what is known of them.
pub type RankedLogprobs = BTreeMap<TokenId, RankedLogprob>;

/// One candidate for a position.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankedLogprob {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

/// The `n_top` most likely tokens of the position where `id` came, and `id`.
pub fn ranked(writer: TokenWriter<'_>, id: TokenId, logprobs: &TokenLogprobs, n_top: u8) -> RankedLogprobs {
    let entry = |id: TokenId, logprob: f32, rank: u32| RankedLogprob {
        logprob: logprob.max(FLOOR),
        rank,
        decoded_token: writer.write(id).0,
    };
    let top = logprobs.top.iter().take(usize::from(n_top)).zip(1..);
    let top = top.map(|(&(id, logprob), rank)| (id, entry(id, logprob, rank)));
    let own = std::iter::once((id, entry(id, logprobs.logprob, logprobs.rank)));
    top.chain(own).collect()
}

/// vLLM's `prompt_logprobs`: null for the first token.
pub type PromptLogprobsBody = Vec<Option<RankedLogprobs>>;

/// Shapes the log-probabilities of `prompt_ids[1..]`, with `n_top` alternatives each.
pub fn prompt_logprobs(
    writer: TokenWriter<'_>,
    prompt_ids: &[TokenId],
    logprobs: &[TokenLogprobs],
    n_top: u8,
) -> PromptLogprobsBody {
    let rest = prompt_ids.iter().skip(1).zip(logprobs);
    let rest = rest.map(|(&id, logprobs)| Some(ranked(writer, id, logprobs, n_top)));
    std::iter::once(None).chain(rest).collect()
}
