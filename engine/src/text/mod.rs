//! Text on both sides of the model: chat templates, token ids, incremental text, stop strings. No requests, no weights.

mod chat_template;
mod detokenize;
mod python_format;
mod stop_strings;
mod strftime;
mod tokenizer;

pub use chat_template::{ChatTemplate, ChatTemplateError, MAX_CLIENT_TEMPLATE_BYTES};
pub use detokenize::DetokenizeStream;
pub use stop_strings::{StopOutput, StopStrings};
pub use tokenizer::{Tokenizer, TokenizerError};

#[cfg(test)]
mod tests;
