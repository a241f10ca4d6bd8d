//! The configuration file: flat TOML, one key per setting. Values are kept as text and read like any other layer's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::keys::Key;

/// A configuration file larger than this is something else by mistake.
const SIZE_LIMIT_BYTES: u64 = 1 << 20;

/// A parsed file whose keys all exist.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    settings: BTreeMap<&'static str, String>,
}

impl ConfigFile {
    /// Reads and checks the file at `path`.
    pub fn open(path: &Path) -> Result<ConfigFile, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let n_bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if n_bytes > SIZE_LIMIT_BYTES {
            let message = format!(
                "{}: {n_bytes} bytes, expected at most {SIZE_LIMIT_BYTES}",
                path.display()
            );
            return Err(ConfigError::Impossible(message));
        }
        ConfigFile::parse(path, &std::fs::read_to_string(path).map_err(unreadable)?)
    }

    fn parse(path: &Path, text: &str) -> Result<ConfigFile, ConfigError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            ConfigError::NotToml {
                path: path.to_owned(),
                line: 1 + text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count(),
                message: error.message().replace('\n', " "),
            }
        })?;
        let mut settings = BTreeMap::new();
        for (name, value) in table {
            let place = format!("{}: {name}", path.display());
            let Some(key) = Key::find(&name) else {
                return Err(ConfigError::UnknownKey {
                    place,
                    nearest: Key::nearest(&name).map(str::to_owned),
                });
            };
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                other => {
                    let value = format!("a TOML {}", other.type_str());
                    return Err(ConfigError::BadValue {
                        place,
                        value,
                        expected: "a text or a whole number",
                    });
                }
            };
            settings.insert(key.name, value);
        }
        Ok(ConfigFile {
            path: path.to_owned(),
            settings,
        })
    }

    /// The setting's value.
    pub fn setting(&self, key: Key) -> Option<&str> {
        self.settings.get(key.name).map(String::as_str)
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        ConfigFile::parse(Path::new("baton.toml"), text)
            .expect_err(text)
            .to_string()
    }

    #[test]
    fn values_are_read_as_written() {
        let file = ConfigFile::parse(Path::new("baton.toml"), "port = 9000\nkv_memory = \"2GiB\"\n").expect("valid");
        assert_eq!(file.setting(Key::find("port").expect("exists")), Some("9000"));
        assert_eq!(file.setting(Key::find("kv_memory").expect("exists")), Some("2GiB"));
        assert_eq!(file.setting(Key::find("host").expect("exists")), None);
    }

    #[test]
    fn wrong_keys_and_values_are_refused_by_name() {
        assert_eq!(
            message("kv-memory = \"2GiB\""),
            "baton.toml: kv-memory is not a setting; did you mean kv_memory?"
        );
        assert_eq!(message("shards = 2"), "baton.toml: shards is not a setting");
        assert_eq!(
            message("port = [1]"),
            "baton.toml: port: found a TOML array, expected a text or a whole number"
        );
        assert_eq!(
            message("port = 1.5"),
            "baton.toml: port: found a TOML float, expected a text or a whole number"
        );
    }

    #[test]
    fn broken_toml_is_located() {
        let message = message("port = 1\nhost = \n");
        assert!(message.starts_with("configuration file baton.toml:2: "), "{message}");
        assert!(!message.contains('\n'));
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = ConfigFile::open(Path::new("/no/such/baton.toml"))
            .expect_err("missing")
            .to_string();
        assert!(message.contains("/no/such/baton.toml"), "{message}");
    }
}
