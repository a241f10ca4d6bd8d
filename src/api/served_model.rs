//! What the APIs know of the model they serve: names, limits, and the text side. No weights, no instances.

use std::sync::OnceLock;

use baton_engine::constraint::ConstraintCompiler;
use baton_engine::model::ModelFolder;
use baton_engine::text::{ChatTemplate, ChatTemplateError, Tokenizer};
use baton_scheduler::ids::TokenId;

use super::parsers::OutputParsers;

/// Sampling values for fields a client leaves out, as generation_config.json suggests them; absent means the API's own.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DefaultSampling {
    /// Temperature; 1 when absent.
    pub temperature: Option<f32>,
    /// Top-k; off when absent.
    pub top_k: Option<u32>,
    /// Top-p; 1 when absent.
    pub top_p: Option<f32>,
    /// Repetition penalty; 1, which is off, when absent.
    pub repetition_penalty: Option<f32>,
}

/// The served model.
#[derive(Debug)]
pub struct ServedModel {
    /// Names clients may use, at least one; the first is the one shown.
    pub names: Vec<String>,
    /// Where it came from: the folder or hub id. Also accepted as a name.
    pub root: String,
    /// Its files, for those who ask for them.
    pub folder: Option<ModelFolder>,
    /// Absent: token ids only.
    pub tokenizer: Option<Tokenizer>,
    /// Absent: no chat endpoint.
    pub chat_template: Option<ChatTemplate>,
    /// Ids that end generation unless a client ignores them.
    pub eos_token_ids: Vec<TokenId>,
    /// For fields a client leaves out.
    pub default_sampling: DefaultSampling,
    /// Longest prompt plus completion, tokens.
    pub max_model_len: u32,
    /// Ids are below this.
    pub vocab_size: u32,
    /// Length of an embedding.
    pub hidden_size: u32,
    /// Compute type (`bf16`), for information.
    pub dtype: String,
    /// What its text may hold besides content.
    pub parsers: OutputParsers,
}

impl ServedModel {
    /// The name that responses carry.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    /// Compiles what its outputs may be constrained to.
    pub fn constraints(&self) -> ConstraintCompiler {
        let text = self.tokenizer.clone().zip(Some(self.eos_token_ids.clone()));
        let text = move || text.clone().ok_or_else(|| "it has no tokenizer".to_owned());
        ConstraintCompiler::new(text, self.vocab_size as usize)
    }

    /// A chat template that a client sent, in place of the model's own.
    pub fn client_chat_template(&self, source: &str) -> Result<ChatTemplate, ChatTemplateError> {
        match (&self.chat_template, &self.folder) {
            (Some(own), _) => own.replaced_by(source),
            (None, Some(folder)) => folder.client_chat_template(source),
            (None, None) => ChatTemplate::of_client(source, None, None),
        }
    }

    /// Whether a client's `model` means this model.
    pub fn answers_to(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name) || self.root == name
    }
}

/// How one token is written in log-probability reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    /// Its text alone; holds U+FFFD where it is part of a character.
    pub text: Box<str>,
    /// Its bytes, also of part of a character where the vocabulary says them.
    pub bytes: Box<[u8]>,
}

/// Texts of single tokens, each worked out once.
#[derive(Debug)]
pub struct TokenTexts {
    cells: Box<[OnceLock<TokenText>]>,
}

impl TokenTexts {
    /// An empty table for ids below `vocab_size`.
    pub fn new(vocab_size: u32) -> TokenTexts {
        TokenTexts {
            cells: (0..vocab_size).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The text of `id`. Without a tokenizer, and for ids it does not know, there is none.
    pub fn get(&self, tokenizer: &Tokenizer, id: TokenId) -> Option<&TokenText> {
        Some(self.cells.get(id as usize)?.get_or_init(|| token_text(tokenizer, id)))
    }
}

fn token_text(tokenizer: &Tokenizer, id: TokenId) -> TokenText {
    let mut text = tokenizer.decode_with_special_tokens(&[id]).unwrap_or_default();
    let raw = tokenizer.id_to_token(id).unwrap_or_default();
    // SentencePiece decoders drop the space before the first word of a text; here it belongs to the token.
    if raw.starts_with('\u{2581}') && !text.starts_with(' ') {
        text.insert(0, ' ');
    }
    let bytes = if text.contains(char::REPLACEMENT_CHARACTER) {
        raw_bytes(&raw)
    } else {
        None
    };
    let bytes = bytes.unwrap_or_else(|| text.clone().into_bytes());
    TokenText {
        text: text.into(),
        bytes: bytes.into(),
    }
}

/// Bytes of a token that is part of a character: `<0xE2>` of byte-fallback vocabularies, or the characters that
/// byte-level vocabularies write instead of bytes.
fn raw_bytes(raw: &str) -> Option<Vec<u8>> {
    if let Some(hex) = raw.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]);
    }
    raw.chars().map(byte_level_byte).collect()
}

/// The byte that a character of a byte-level vocabulary stands for: printable Latin-1 is itself, the other 68 bytes are
/// numbered from U+0100 in their order (GPT-2's alphabet).
pub(super) fn byte_level_byte(character: char) -> Option<u8> {
    let is_itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = character as u32;
    match u8::try_from(code) {
        Ok(byte) => is_itself(byte).then_some(byte),
        Err(_) => (0..=u8::MAX)
            .filter(|byte| !is_itself(*byte))
            .nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let mut seen = [false; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_level_byte) {
                assert!(
                    !std::mem::replace(&mut seen[byte as usize], true),
                    "byte {byte:#x} twice"
                );
            }
        }
        assert_eq!(seen, [true; 256]);
        // Well-known members: space is U+0120, newline U+010A.
        assert_eq!(byte_level_byte('\u{120}'), Some(b' '));
        assert_eq!(byte_level_byte('\u{10a}'), Some(b'\n'));
    }

    #[test]
    fn raw_bytes_of_both_kinds_of_vocabulary() {
        assert_eq!(raw_bytes("<0xE2>"), Some(vec![0xe2]));
        assert_eq!(raw_bytes("\u{120}\u{e2}\u{122}"), Some(vec![b' ', 0xe2, 0x80]));
        assert_eq!(raw_bytes("\u{2581}x"), None);
    }
}
