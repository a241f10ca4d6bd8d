//! What the formats have in common: how a call may open, and what may follow it.

/// Whether a text begins with a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix<'a> {
    /// It does not.
    No,
    /// It may, once more has come.
    Maybe,
    /// It does; this follows.
    Whole(&'a str),
}

impl Prefix<'_> {
    /// Looks for `marker` at the start of `text`.
    pub fn of<'a>(text: &'a str, marker: &str) -> Prefix<'a> {
        match text.strip_prefix(marker) {
            Some(rest) => Prefix::Whole(rest),
            None if marker.starts_with(text) => Prefix::Maybe,
            None => Prefix::No,
        }
    }
}

/// Whether a call begins at some place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It does not.
    No,
    /// It may, once more has come.
    Maybe,
    /// After `n_bytes` comes the `{` of an object with name and arguments.
    Object {
        /// Length of what stands before the object.
        n_bytes: usize,
        /// A marker says that it is a call; else its name has to.
        is_marked: bool,
        /// It is the first of a list.
        is_listed: bool,
    },
    /// After `n_bytes` comes the `{` of the arguments.
    Named {
        /// Length of what stands before the arguments.
        n_bytes: usize,
        /// The function.
        name: String,
        /// The model's own name for the call.
        id: Option<String>,
    },
}

/// What follows a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing that belongs to it, or nothing yet.
    Maybe,
    /// `n_bytes` that end it.
    Ends {
        /// How many; 0 when other text follows.
        n_bytes: usize,
    },
    /// `n_bytes` and then the `{` of another.
    Another {
        /// How many.
        n_bytes: usize,
    },
}

/// Without the blanks at the start.
pub fn skip_blanks(text: &str) -> &str {
    text.trim_start()
}
