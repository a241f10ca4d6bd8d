//! `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call: Hermes and Qwen.

use super::syntax::{After, Opening, Prefix, skip_blanks};

/// What may stand in special tokens.
pub const MARKERS: &[&str] = &["<tool_call>", "</tool_call>"];

/// Whether a call begins at the start of `text`.
pub fn opening(text: &str) -> Opening {
    match Prefix::of(text, "<tool_call>") {
        Prefix::No => Opening::No,
        Prefix::Maybe => Opening::Maybe,
        Prefix::Whole(rest) => match skip_blanks(rest) {
            "" => Opening::Maybe,
            body if body.starts_with('{') => Opening::Object {
                n_bytes: text.len() - body.len(),
                is_marked: true,
                is_listed: false,
            },
            _ => Opening::No,
        },
    }
}

/// What follows a call. The end may be missing: the call is whole without it.
pub fn after(text: &str) -> After {
    match Prefix::of(skip_blanks(text), "</tool_call>") {
        Prefix::No => After::Ends { n_bytes: 0 },
        Prefix::Maybe => After::Maybe,
        Prefix::Whole(rest) => After::Ends {
            n_bytes: text.len() - rest.len(),
        },
    }
}
