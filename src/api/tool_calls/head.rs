//! The object around a call, up to where its name and the start of its arguments are known.

use serde_json::{Map, Value};

use super::Form;
use super::json_scanner::{Expects, JsonScanner, Step};

/// Reads the object from its `{` on.
#[derive(Clone, Debug)]
pub(super) struct Head {
    form: Form,
    scanner: JsonScanner,
    /// Bytes read.
    n_read: usize,
    key_from: Option<usize>,
    key: String,
    value_from: Option<usize>,
    name: Option<String>,
    /// Arguments that came whole before the name, or as a string.
    arguments: Option<String>,
}

/// What has become known.
#[derive(Debug)]
pub(super) enum HeadStep {
    /// Nothing yet.
    More,
    /// It is no call.
    Broken,
    /// The arguments begin at byte `from`, before which `scanner` stands.
    Begun {
        name: String,
        from: usize,
        scanner: JsonScanner,
    },
    /// Name and arguments are whole after `n_bytes`, and the object too if it `is_done`.
    Whole {
        name: String,
        arguments: String,
        n_bytes: usize,
        is_done: bool,
        scanner: JsonScanner,
    },
}

impl Head {
    pub(super) fn new(form: Form) -> Head {
        Head {
            form,
            scanner: JsonScanner::new(),
            n_read: 0,
            key_from: None,
            key: String::new(),
            value_from: None,
            name: None,
            arguments: None,
        }
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Reads on in `body`, which begins with what was read before. Without a marker the name must be among `known`.
    pub(super) fn read(&mut self, body: &str, known: &[String]) -> HeadStep {
        let from = std::mem::replace(&mut self.n_read, body.len());
        for (at, character) in body[from..].char_indices() {
            if let Some(step) = self.character(body, from + at, character, known) {
                return step;
            }
        }
        HeadStep::More
    }

    fn character(&mut self, body: &str, at: usize, character: char, known: &[String]) -> Option<HeadStep> {
        let (was_outside, before) = (self.scanner.depth() == 1, self.scanner.expects());
        if was_outside && before == Expects::Value && !character.is_ascii_whitespace() {
            self.value_from = Some(at);
            if let (Some(name), '{', None) = (&self.name, character, &self.arguments)
                && is_arguments(&self.key)
            {
                return Some(HeadStep::Begun {
                    name: name.clone(),
                    from: at,
                    scanner: self.scanner.clone(),
                });
            }
        }
        if was_outside && matches!(before, Expects::Key | Expects::KeyOrEnd) && character == '"' {
            self.key_from = Some(at);
        }
        let step = self.scanner.push(character);
        if step == Step::Broken {
            return Some(HeadStep::Broken);
        }
        let end = at + character.len_utf8();
        if self.scanner.depth() == 1
            && self.scanner.expects() == Expects::Colon
            && let Some(from) = self.key_from.take()
        {
            // A lone surrogate is JSON and no text: it is nobody's key.
            self.key = serde_json::from_str(&body[from..end]).unwrap_or_default();
        }
        if self.scanner.depth() <= 1
            && !is_inside_value(self.scanner.expects())
            && let Some(from) = self.value_from.take()
        {
            let end = if matches!(before, Expects::Number(_)) { at } else { end };
            if !self.value(&body[from..end], known) {
                return Some(HeadStep::Broken);
            }
        }
        let is_done = step == Step::Done;
        match (&self.name, &self.arguments) {
            (Some(name), Some(arguments)) => Some((name.clone(), arguments.clone())),
            // A function without parameters may be called without arguments.
            (Some(name), None) if is_done => Some((name.clone(), "{}".to_owned())),
            (None, _) if is_done => return Some(HeadStep::Broken),
            _ => None,
        }
        .map(|(name, arguments)| HeadStep::Whole {
            name,
            arguments,
            n_bytes: end,
            is_done,
            scanner: self.scanner.clone(),
        })
    }

    /// Takes the value of the current key; whether it may be a call's.
    fn value(&mut self, raw: &str, known: &[String]) -> bool {
        if self.key == "name" && self.name.is_none() {
            let Ok(name) = serde_json::from_str::<String>(raw) else {
                return false;
            };
            let is_name = !name.trim().is_empty() && (self.form.is_marked || known.contains(&name));
            self.name = Some(name);
            return is_name;
        }
        if is_arguments(&self.key) && self.arguments.is_none() {
            self.arguments = match raw.as_bytes().first() {
                Some(b'{') => Some(raw.to_owned()),
                Some(b'n') => Some("{}".to_owned()),
                // Some models write the object as a string, as it is in the API.
                Some(b'"') => serde_json::from_str::<String>(raw)
                    .ok()
                    .filter(|inner| is_object(inner)),
                _ => None,
            };
            return self.arguments.is_some();
        }
        true
    }
}

fn is_arguments(key: &str) -> bool {
    matches!(key, "arguments" | "parameters")
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(text).is_ok()
}

fn is_inside_value(expects: Expects) -> bool {
    matches!(
        expects,
        Expects::Text { is_key: false }
            | Expects::Escape { is_key: false }
            | Expects::Hex { is_key: false, .. }
            | Expects::Number(_)
            | Expects::Word(_)
    )
}
