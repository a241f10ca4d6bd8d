//! Structured logs on stderr, as text or JSON. Request ids are fields; prompts and outputs are never logged.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{ConfigError, LogFormat};

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// A level, or directives such as `info,baton::door=debug`.
    pub level: String,
    /// The form of a line.
    pub format: LogFormat,
}

impl LogConfig {
    /// Refuses a level that cannot be read.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.filter().map(drop)
    }

    fn filter(&self) -> Result<EnvFilter, ConfigError> {
        EnvFilter::builder()
            .parse(&self.level)
            .map_err(|_| ConfigError::BadValue {
                place: "log_level".into(),
                value: format!("{:?}", self.level),
                expected: "error, warn, info, debug, trace, or directives such as info,baton::door=debug",
            })
    }
}

/// Starts logging for the whole process. A second call changes nothing.
pub fn start(config: &LogConfig) -> Result<(), ConfigError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(config.filter()?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let _already_started = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_taken_and_nonsense_refused() {
        let config = |level: &str| LogConfig {
            level: level.into(),
            format: LogFormat::Text,
        };
        assert!(config("info").validate().is_ok());
        assert!(config("info,baton::door=debug").validate().is_ok());
        let message = config("baton=loud").validate().expect_err("no level").to_string();
        assert!(
            message.starts_with("log_level: found \"baton=loud\", expected"),
            "{message}"
        );
    }
}
