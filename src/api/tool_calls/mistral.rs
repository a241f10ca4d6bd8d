//! `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and since the eleventh version of Mistral's tokenizers
//! `[TOOL_CALLS]name[ARGS]{...}` or `[TOOL_CALLS]name{...}`, once for each call, perhaps with `[CALL_ID]id` after the name.

use super::syntax::{After, Opening, Prefix, skip_blanks};

/// What may stand in special tokens.
pub const MARKERS: &[&str] = &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"];

/// Longest name or id, bytes.
const LONGEST_NAME: usize = 256;

/// Whether a call begins at the start of `text`.
pub fn opening(text: &str) -> Opening {
    let body = match Prefix::of(text, "[TOOL_CALLS]") {
        Prefix::No => return Opening::No,
        Prefix::Maybe => return Opening::Maybe,
        Prefix::Whole(rest) => skip_blanks(rest),
    };
    let object = |body: &str, is_listed| Opening::Object {
        n_bytes: text.len() - body.len(),
        is_marked: true,
        is_listed,
    };
    match body.chars().next() {
        None => Opening::Maybe,
        Some('{') => object(body, false),
        Some('[') => match skip_blanks(&body[1..]) {
            "" => Opening::Maybe,
            first if first.starts_with('{') => object(first, true),
            _ => Opening::No,
        },
        Some(_) => named(text, body),
    }
}

/// `body` begins with a name.
fn named(text: &str, body: &str) -> Opening {
    let (name, mut rest) = match word(body) {
        Ok((name, rest)) if !name.is_empty() => (name, rest),
        Ok(_) => return Opening::No,
        Err(opening) => return opening,
    };
    let mut id = None;
    match Prefix::of(rest, "[CALL_ID]") {
        Prefix::Maybe => return Opening::Maybe,
        Prefix::No => {}
        Prefix::Whole(after) => match word(after) {
            Ok((word, after)) => (id, rest) = (Some(word.to_owned()), after),
            Err(opening) => return opening,
        },
    }
    match Prefix::of(rest, "[ARGS]") {
        Prefix::Maybe => return Opening::Maybe,
        Prefix::No => {}
        Prefix::Whole(after) => rest = after,
    }
    match skip_blanks(rest) {
        "" => Opening::Maybe,
        arguments if arguments.starts_with('{') => Opening::Named {
            n_bytes: text.len() - arguments.len(),
            name: name.to_owned(),
            id: id.filter(|id| !id.is_empty()),
        },
        _ => Opening::No,
    }
}

/// A name or id up to the next bracket, without the blanks around it, and what follows it. Without a bracket, whether there
/// may still be one.
fn word(text: &str) -> Result<(&str, &str), Opening> {
    let end = text.find(['{', '[']);
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    let name = word.trim();
    if word.len() > LONGEST_NAME || name.contains(|c: char| c.is_whitespace() || c.is_control() || "]}\"".contains(c)) {
        return Err(Opening::No);
    }
    match end {
        None => Err(Opening::Maybe),
        Some(_) => Ok((name, rest)),
    }
}

/// What follows a call.
pub fn after(text: &str, is_listed: bool) -> After {
    let rest = skip_blanks(text);
    if !is_listed && !rest.is_empty() {
        return After::Ends { n_bytes: 0 };
    }
    let ends = |rest: &str| After::Ends {
        n_bytes: text.len() - rest.len(),
    };
    match rest.chars().next() {
        None => After::Maybe,
        Some(']') => ends(&rest[1..]),
        Some(',') => match skip_blanks(&rest[1..]) {
            "" => After::Maybe,
            body if body.starts_with('{') => After::Another {
                n_bytes: text.len() - body.len(),
            },
            // A comma before the end of the list.
            end if end.starts_with(']') => ends(&end[1..]),
            _ => After::Ends { n_bytes: 0 },
        },
        Some(_) => After::Ends { n_bytes: 0 },
    }
}
