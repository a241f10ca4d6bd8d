//! What can be wrong with a configuration. Every message is one line that names the place, the value and what was expected.

use std::path::PathBuf;

/// A configuration that cannot be used. The process ends with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that cannot be read, with where it stands.
    #[error("{place}: found {value}, expected {expected}")]
    BadValue {
        /// `BATON_PORT`, say, or `baton.toml: port`.
        place: String,
        /// The value found, never a secret's.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A key or variable that does not exist.
    #[error("{place} is not a setting{}", suggestion(.nearest.as_deref()))]
    UnknownKey {
        /// `BATON_PROT`, say, or `baton.toml: prot`.
        place: String,
        /// The most similar one that exists, if one is similar.
        nearest: Option<String>,
    },
    /// The configuration file cannot be read.
    #[error("configuration file {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The configuration file is not TOML.
    #[error("configuration file {}:{line}: {message}", path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Line of the error, from 1.
        line: usize,
        /// What the parser says, on one line.
        message: String,
    },
    /// Values that are well formed but not possible, alone or together.
    #[error("{0}")]
    Impossible(String),
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; did you mean {name}?"))
}
