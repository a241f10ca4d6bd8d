//! The outputs that a request of the Open Inference Protocol may have, and what asks for each: names and datatypes are those
//! of Triton's vLLM backend.

use super::super::error::ApiError;
use super::super::fields::Fields;

/// The inputs that ask for outputs.
pub(in super::super) const REPORTS: [&str; 5] = [
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
];

/// One output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OutputKind {
    /// What is new of the text of each choice.
    Text,
    /// Why each choice ended.
    FinishReason,
    /// The sum of the log-probabilities of each choice's tokens so far.
    CumulativeLogprob,
    /// Log-probabilities of each choice's new tokens, as JSON.
    Logprobs,
    /// Tokens of the prompt.
    NumInputTokens,
    /// New tokens of each choice.
    NumOutputTokens,
}

impl OutputKind {
    /// All, in the order in which they come.
    pub(super) const ALL: [OutputKind; 6] = [
        OutputKind::Text,
        OutputKind::FinishReason,
        OutputKind::CumulativeLogprob,
        OutputKind::Logprobs,
        OutputKind::NumInputTokens,
        OutputKind::NumOutputTokens,
    ];

    /// Its name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            OutputKind::Text => "text_output",
            OutputKind::FinishReason => "finish_reason",
            OutputKind::CumulativeLogprob => "cumulative_logprob",
            OutputKind::Logprobs => "logprobs",
            OutputKind::NumInputTokens => "num_input_tokens",
            OutputKind::NumOutputTokens => "num_output_tokens",
        }
    }

    /// The input that asks for it, and whether it is there when that is not given.
    pub(super) const fn asked_by(self) -> Option<(&'static str, bool)> {
        match self {
            OutputKind::Text => None,
            OutputKind::FinishReason => Some((REPORTS[0], true)),
            OutputKind::CumulativeLogprob => Some((REPORTS[1], false)),
            OutputKind::Logprobs => Some((REPORTS[2], false)),
            OutputKind::NumInputTokens => Some((REPORTS[3], false)),
            OutputKind::NumOutputTokens => Some((REPORTS[4], false)),
        }
    }

    /// Whether it is made of log-probabilities.
    pub(super) const fn needs_logprobs(self) -> bool {
        match self {
            OutputKind::CumulativeLogprob | OutputKind::Logprobs => true,
            OutputKind::Text | OutputKind::FinishReason | OutputKind::NumInputTokens | OutputKind::NumOutputTokens => {
                false
            }
        }
    }
}

/// The wanted outputs: those that are `requested` by name, or else those that inputs ask for.
pub(super) fn wanted(fields: &mut Fields, requested: &[&str]) -> Result<Vec<OutputKind>, ApiError> {
    let known = OutputKind::ALL.map(OutputKind::name);
    if let Some(unknown) = requested.iter().find(|name| !known.contains(name)) {
        let unknown: String = unknown.chars().take(64).collect();
        return Err(ApiError::expected("outputs", unknown, known.join(", ")));
    }
    let mut wanted = Vec::new();
    for output in OutputKind::ALL {
        let is_asked = match output.asked_by() {
            Some((input, default)) => fields.boolean(input)?.unwrap_or(default),
            None => true,
        };
        let is_wanted = match requested {
            [] => is_asked,
            names => names.contains(&output.name()),
        };
        if is_wanted {
            wanted.push(output);
        }
    }
    Ok(wanted)
}
