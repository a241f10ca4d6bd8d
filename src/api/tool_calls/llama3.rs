//! `{"name": ..., "parameters": {...}}` as the whole answer, or after `<|python_tag|>`; several with `;` between: Llama 3.1
//! and later.

use super::syntax::{After, Opening, Prefix, skip_blanks};

/// What may stand in special tokens.
pub const MARKERS: &[&str] = &["<|python_tag|>"];

/// Whether a call begins at the start of `text`. Without a marker it can only be the beginning of the answer, and since any
/// JSON begins like that, its name must be a known one.
pub fn opening(text: &str, is_first: bool) -> Opening {
    if is_first && text.starts_with('{') {
        return Opening::Object {
            n_bytes: 0,
            is_marked: false,
            is_listed: false,
        };
    }
    match Prefix::of(text, "<|python_tag|>") {
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

/// What follows a call.
pub fn after(text: &str) -> After {
    let rest = skip_blanks(text);
    let Some(next) = rest.strip_prefix(';') else {
        return match rest {
            "" => After::Maybe,
            _ => After::Ends { n_bytes: 0 },
        };
    };
    match skip_blanks(next) {
        "" => After::Maybe,
        body if body.starts_with('{') => After::Another {
            n_bytes: text.len() - body.len(),
        },
        _ => After::Ends { n_bytes: 0 },
    }
}
