//! Tool calls in a model's text, found while it comes: what is a call, what is content. Pure: no requests, no tokens, no wire.
//!
//! The pieces do not depend on how the text was cut. A call begins once its name and the start of its arguments are known;
//! from then on its arguments are passed on as they come, word for word. What looked like a call and was none becomes
//! content, and so does what follows the place where begun arguments stop being JSON. Blanks beside a call are dropped.

mod head;
mod hermes;
mod json_scanner;
mod llama3;
mod mistral;
mod syntax;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::head::{Head, HeadStep};
use self::json_scanner::{Expects, JsonScanner, Step};
use self::syntax::{After, Opening};

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// Objects between `<tool_call>` and `</tool_call>`.
    Hermes,
    /// Objects with `parameters`, as the whole answer or after `<|python_tag|>`.
    Llama3,
    /// After `[TOOL_CALLS]`.
    Mistral,
}

impl ToolCallFormat {
    /// Its name on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            ToolCallFormat::Hermes => "hermes",
            ToolCallFormat::Llama3 => "llama3",
            ToolCallFormat::Mistral => "mistral",
        }
    }

    /// Texts that a vocabulary may have as special tokens: they must not be left out of what a parser reads.
    pub const fn markers(self) -> &'static [&'static str] {
        match self {
            ToolCallFormat::Hermes => hermes::MARKERS,
            ToolCallFormat::Llama3 => llama3::MARKERS,
            ToolCallFormat::Mistral => mistral::MARKERS,
        }
    }

    /// Whether a call begins at the start of `text`; `is_first` when nothing but blanks came before.
    fn opening(self, text: &str, is_first: bool) -> Opening {
        let opening = match self {
            ToolCallFormat::Hermes => hermes::opening(text),
            ToolCallFormat::Llama3 => llama3::opening(text, is_first),
            ToolCallFormat::Mistral => mistral::opening(text),
        };
        let n_held = match &opening {
            Opening::No => 0,
            Opening::Maybe => text.len(),
            Opening::Object { n_bytes, .. } | Opening::Named { n_bytes, .. } => *n_bytes,
        };
        match n_held <= LONGEST_OPENING {
            true => opening,
            false => Opening::No,
        }
    }

    /// What follows a call.
    fn after(self, text: &str, is_listed: bool) -> After {
        let after = match self {
            ToolCallFormat::Hermes => hermes::after(text),
            ToolCallFormat::Llama3 => llama3::after(text),
            ToolCallFormat::Mistral => mistral::after(text, is_listed),
        };
        let n_held = match after {
            After::Maybe => text.len(),
            After::Ends { n_bytes } | After::Another { n_bytes } => n_bytes,
        };
        match n_held <= LONGEST_OPENING {
            true => after,
            false => After::Ends { n_bytes: 0 },
        }
    }
}

/// What a piece of text turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Content.
    Text(String),
    /// A call begins; the arguments that follow are its own.
    Call {
        /// The function.
        name: String,
        /// The model's own name for the call, where its format has one.
        id: Option<String>,
    },
    /// The next part of the arguments, JSON as the model wrote it.
    Arguments(String),
}

/// Most bytes of the object around a call that wait for its name and the start of its arguments; a longer one is content.
const LONGEST_HEAD: usize = 16 << 10;
/// Most bytes from a marker to its object, and most between two calls.
const LONGEST_OPENING: usize = 1 << 10;
/// Most bytes of blanks that are held back, since a call may follow and they are dropped beside it.
const LONGEST_BLANK: usize = 256;

/// Finds the calls of one answer.
#[derive(Debug)]
pub struct ToolCallParser {
    format: ToolCallFormat,
    /// Names of the functions offered.
    known: Arc<[String]>,
    /// Text that is not a piece yet.
    held: String,
    state: State,
    /// Something has become a piece.
    has_said: bool,
    pieces: Vec<Piece>,
}

#[derive(Debug)]
enum State {
    /// Content, until a call opens.
    Text,
    /// `held` begins with blanks and the opening of a call whose object is being read.
    Head {
        n_blank: usize,
        n_before: usize,
        head: Head,
    },
    /// In the arguments; `n_around` objects are around them.
    Arguments {
        scanner: JsonScanner,
        n_around: usize,
        form: Form,
    },
    /// After the arguments, in the object around them.
    Rest { scanner: JsonScanner, form: Form },
    /// After a call.
    After(Form),
}

/// How the call that is being read came to be one.
#[derive(Clone, Copy, Debug)]
struct Form {
    is_marked: bool,
    is_listed: bool,
}

/// Whether a round of reading got anywhere.
enum Round {
    Again,
    NeedsMore,
}

impl ToolCallParser {
    /// A parser for one answer to a request that offers functions of the names `known`.
    pub fn new(format: ToolCallFormat, known: Arc<[String]>) -> ToolCallParser {
        ToolCallParser {
            format,
            known,
            held: String::new(),
            state: State::Text,
            has_said: false,
            pieces: Vec::new(),
        }
    }

    /// Takes the next text; gives what has become known.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        self.run(false);
        std::mem::take(&mut self.pieces)
    }

    /// No more comes: what was held back turns out to be what it is now.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.run(true);
        std::mem::take(&mut self.pieces)
    }

    fn run(&mut self, is_end: bool) {
        while !self.held.is_empty() {
            let round = match std::mem::replace(&mut self.state, State::Text) {
                State::Text => self.text(is_end),
                State::Head {
                    n_blank,
                    n_before,
                    head,
                } => self.head(n_blank, n_before, head, is_end),
                State::Arguments {
                    scanner,
                    n_around,
                    form,
                } => self.arguments(scanner, n_around, form),
                State::Rest { scanner, form } => self.rest(scanner, form),
                State::After(form) => self.after(form, is_end),
            };
            if matches!(round, Round::NeedsMore) {
                break;
            }
        }
    }

    /// Text up to where a call may open goes out, but for the blanks before it.
    fn text(&mut self, is_end: bool) -> Round {
        let (mut at, mut found) = (self.held.len(), Opening::No);
        let first = self.held.len() - self.held.trim_start().len();
        for (start, _) in self.held.char_indices() {
            let is_first = !self.has_said && start <= first;
            match self.format.opening(&self.held[start..], is_first) {
                Opening::No => {}
                Opening::Maybe if is_end => {}
                opening => {
                    (at, found) = (start, opening);
                    break;
                }
            }
        }
        let n_said = match is_end && found == Opening::No {
            true => at,
            false => {
                let blank_from = self.held[..at].trim_end().len();
                blank_from.max(self.held.ceil_char_boundary(at.saturating_sub(LONGEST_BLANK)))
            }
        };
        let n_blank = at - n_said;
        self.say(n_said);
        match found {
            Opening::No | Opening::Maybe => return Round::NeedsMore,
            Opening::Object {
                n_bytes,
                is_marked,
                is_listed,
            } => {
                let form = Form { is_marked, is_listed };
                self.state = State::Head {
                    n_blank,
                    n_before: n_blank + n_bytes,
                    head: Head::new(form),
                };
            }
            Opening::Named { n_bytes, name, id } => {
                self.held.drain(..n_blank + n_bytes);
                self.begin(name, id);
                let form = Form {
                    is_marked: true,
                    is_listed: false,
                };
                self.state = State::Arguments {
                    scanner: JsonScanner::new(),
                    n_around: 0,
                    form,
                };
            }
        }
        Round::Again
    }

    fn head(&mut self, n_blank: usize, n_before: usize, mut head: Head, is_end: bool) -> Round {
        let body = &self.held[n_before..];
        let n_looked_at = body.floor_char_boundary(LONGEST_HEAD);
        match head.read(&body[..n_looked_at], &self.known) {
            HeadStep::More if !is_end && n_looked_at == body.len() => {
                self.state = State::Head {
                    n_blank,
                    n_before,
                    head,
                };
                return Round::NeedsMore;
            }
            HeadStep::More | HeadStep::Broken => {
                // One character is enough to make it text: the rest is looked at again, since another call may open there.
                let first = self.held[n_blank..].chars().next().map_or(0, char::len_utf8);
                self.say(n_blank + first);
            }
            HeadStep::Begun { name, from, scanner } => {
                self.held.drain(..n_before + from);
                self.begin(name, None);
                let form = head.form();
                self.state = State::Arguments {
                    scanner,
                    n_around: 1,
                    form,
                };
            }
            HeadStep::Whole {
                name,
                arguments,
                n_bytes,
                is_done,
                scanner,
            } => {
                self.held.drain(..n_before + n_bytes);
                self.begin(name, None);
                self.pieces.push(Piece::Arguments(arguments));
                let form = head.form();
                self.state = match is_done {
                    true => State::After(form),
                    false => State::Rest { scanner, form },
                };
            }
        }
        Round::Again
    }

    fn arguments(&mut self, mut scanner: JsonScanner, n_around: usize, form: Form) -> Round {
        let mut n_taken = 0;
        let mut next = None;
        for (at, character) in self.held.char_indices() {
            match scanner.push(character) {
                Step::Broken => {
                    next = Some(State::Text);
                    break;
                }
                Step::Done => next = Some(State::After(form)),
                Step::Open => {}
            }
            n_taken = at + character.len_utf8();
            if next.is_some() {
                break;
            }
            if scanner.depth() == n_around && scanner.expects() == Expects::CommaOrEnd {
                self.pass_arguments(n_taken);
                self.state = State::Rest { scanner, form };
                return Round::Again;
            }
        }
        self.pass_arguments(n_taken);
        match next {
            Some(state) => {
                self.state = state;
                Round::Again
            }
            None => {
                self.state = State::Arguments {
                    scanner,
                    n_around,
                    form,
                };
                Round::NeedsMore
            }
        }
    }

    /// What else the object has is of no interest.
    fn rest(&mut self, mut scanner: JsonScanner, form: Form) -> Round {
        let mut characters = self.held.char_indices();
        let ended = characters.find_map(|(at, character)| match scanner.push(character) {
            Step::Open => None,
            Step::Done => Some((at + character.len_utf8(), State::After(form))),
            Step::Broken => Some((at, State::Text)),
        });
        let (n_bytes, state) = match ended {
            Some(ended) => ended,
            None => (self.held.len(), State::Rest { scanner, form }),
        };
        self.held.drain(..n_bytes);
        self.state = state;
        Round::Again
    }

    fn after(&mut self, form: Form, is_end: bool) -> Round {
        match self.format.after(&self.held, form.is_listed) {
            After::Maybe if !is_end => {
                self.state = State::After(form);
                return Round::NeedsMore;
            }
            After::Maybe | After::Ends { n_bytes: 0 } => {
                let n_blank = self.held.len() - self.held.trim_start().len();
                let n_blank = self.held.floor_char_boundary(n_blank.min(LONGEST_OPENING));
                self.held.drain(..n_blank);
            }
            After::Ends { n_bytes } => {
                self.held.drain(..n_bytes);
                // Blanks and perhaps another end may follow.
                let form = Form {
                    is_listed: false,
                    ..form
                };
                self.state = State::After(form);
            }
            After::Another { n_bytes } => {
                self.state = State::Head {
                    n_blank: 0,
                    n_before: n_bytes,
                    head: Head::new(form),
                };
            }
        }
        Round::Again
    }

    fn begin(&mut self, name: String, id: Option<String>) {
        self.has_said = true;
        self.pieces.push(Piece::Call { name, id });
    }

    fn say(&mut self, n_bytes: usize) {
        let text: String = self.held.drain(..n_bytes).collect();
        if !text.is_empty() {
            self.has_said |= !text.trim_start().is_empty();
            self.pieces.push(Piece::Text(text));
        }
    }

    fn pass_arguments(&mut self, n_bytes: usize) {
        let arguments: String = self.held.drain(..n_bytes).collect();
        if !arguments.is_empty() {
            self.pieces.push(Piece::Arguments(arguments));
        }
    }
}
