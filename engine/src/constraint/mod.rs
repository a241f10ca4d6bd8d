//! Constrained decoding: which tokens may follow, so that the text of an output is of the language that its request asked
//! for. Languages are compiled and matched by the llguidance library; nothing is sampled here, and no text is made.
//!
//! What is allowed is a function of (constraint, vocabulary, output ids) alone. A matcher only remembers how far it has read
//! an output; given another one it starts again, so it needs no care when a request is preempted, moved or replayed.
//!
//! Tokens are matched by their bytes, however the text is cut into them: nothing is forced to the tokenizer's own cut, which
//! would make what is allowed depend on more than the ids.

mod compiler;
mod matcher;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use compiler::{CompiledConstraint, ConstraintCompiler, LoadedText, MAX_CONSTRAINT_BYTES};
pub use matcher::GroupConstraint;

use baton_scheduler::request::Failure;

/// Why a constraint cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// It is no valid schema, expression or grammar, uses what is not supported, or is too large.
    #[error("{0}")]
    Invalid(String),
    /// The model has no text, no end of it, or a vocabulary that cannot be used.
    #[error("this model cannot be constrained: {0}")]
    Model(String),
    /// At one token, matching went past its limits or did not go on from the ids given.
    #[error("token {index} of choice {choice}: {message}")]
    Step {
        /// The choice.
        choice: u32,
        /// Position among its tokens.
        index: usize,
        /// What the library says.
        message: String,
    },
}

impl From<ConstraintError> for Failure {
    fn from(error: ConstraintError) -> Failure {
        Failure::Invalid(format!("constraint: {error}"))
    }
}

/// The library's words in one line of bounded length.
fn one_line(error: impl std::fmt::Display) -> String {
    const LONGEST: usize = 400;
    let text = error.to_string();
    // What follows is the library's own state.
    let text = text.split("\n<").next().unwrap_or_default();
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(LONGEST).collect()
}
