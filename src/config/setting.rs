//! One configurable value as text: how it is parsed, and what is said when it cannot be. No defaults, no precedence.

use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

/// A value that a flag, an environment variable or a configuration file can set.
pub trait Setting: Sized {
    /// What was expected, to end the sentence "expected ...".
    const EXPECTED: &'static str;

    /// The value that `text` names, if it names one.
    fn parse(text: &str) -> Option<Self>;
}

/// A text that names no value of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}")]
pub struct BadValue {
    /// What was expected.
    pub expected: &'static str,
}

/// Parses a flag's value; clap adds the flag's name and the value to the message.
pub fn flag<T: Setting>(text: &str) -> Result<T, BadValue> {
    T::parse(text).ok_or(BadValue { expected: T::EXPECTED })
}

macro_rules! numbers {
    ($($kind:ty: $expected:literal;)*) => {$(
        impl Setting for $kind {
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Option<Self> {
                text.parse().ok()
            }
        }
    )*};
}

numbers! {
    u16: "a whole number from 0 to 65535";
    u32: "a whole number";
    NonZeroU32: "a whole number, at least 1";
    NonZeroUsize: "a whole number, at least 1";
    IpAddr: "an IP address such as 127.0.0.1 or ::1";
}

impl Setting for String {
    const EXPECTED: &'static str = "a text that is not empty";

    fn parse(text: &str) -> Option<Self> {
        (!text.trim().is_empty()).then(|| text.to_owned())
    }
}

impl Setting for PathBuf {
    const EXPECTED: &'static str = "a path";

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| PathBuf::from(text))
    }
}
