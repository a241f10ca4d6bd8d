//! Precedence: a flag, then the environment, then the file. Defaults belong to the caller.

use std::path::Path;

use super::environment::{Environment, variable_of};
use super::error::ConfigError;
use super::file::ConfigFile;
use super::keys::Key;
use super::setting::Setting;

/// The places below the flags where a setting can stand.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// The process's environment.
    pub environment: Environment,
    file: Option<ConfigFile>,
}

impl Layers {
    /// Layers of `environment` and of the file that `config_path` or else `BATON_CONFIG` names.
    pub fn open(environment: Environment, config_path: Option<&Path>) -> Result<Layers, ConfigError> {
        let path = config_path.or(environment.config_path.as_deref());
        let file = path.map(ConfigFile::open).transpose()?;
        Ok(Layers { environment, file })
    }

    /// The value of setting `name`, from the highest place that names one.
    ///
    /// # Panics
    /// If `name` is not in the list of settings.
    pub fn pick<T: Setting>(&self, name: &str, flag: Option<T>) -> Result<Option<T>, ConfigError> {
        let key = Key::find(name).unwrap_or_else(|| panic!("{name} is not in the list of settings"));
        if flag.is_some() {
            return Ok(flag);
        }
        if let Some(text) = self.environment.setting(key) {
            return read(key, text, || variable_of(key.name)).map(Some);
        }
        let Some((file, text)) = self.file.as_ref().and_then(|file| Some((file, file.setting(key)?))) else {
            return Ok(None);
        };
        read(key, text, || format!("{}: {}", file.path().display(), key.name)).map(Some)
    }
}

fn read<T: Setting>(key: Key, text: &str, place: impl Fn() -> String) -> Result<T, ConfigError> {
    T::parse(text).ok_or_else(|| {
        let is_link = key.name == "port" && text.starts_with("tcp://");
        let value = match (key.is_secret, is_link) {
            (true, _) => "a value that is not shown".to_owned(),
            // The trap of a Kubernetes service that is named `baton`.
            (false, true) => format!("{text:?} (set by Kubernetes; give the pod `enableServiceLinks: false`)"),
            (false, false) => format!("{text:?}"),
        };
        ConfigError::BadValue {
            place: place(),
            value,
            expected: T::EXPECTED,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::config::Secret;

    fn layers(variables: &[(&str, &str)], toml: &str) -> Layers {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(toml.as_bytes()).expect("written");
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
        let environment = Environment::from_variables(variables).expect("valid variables");
        Layers::open(environment, Some(file.path())).expect("a valid file")
    }

    #[test]
    fn flag_beats_environment_beats_file() {
        let both = layers(&[("BATON_PORT", "2")], "port = 3");
        assert_eq!(both.pick("port", Some(1_u16)).expect("valid"), Some(1));
        assert_eq!(both.pick::<u16>("port", None).expect("valid"), Some(2));
        assert_eq!(
            layers(&[], "port = 3").pick::<u16>("port", None).expect("valid"),
            Some(3)
        );
        assert_eq!(layers(&[], "").pick::<u16>("port", None).expect("valid"), None);
    }

    #[test]
    fn a_bad_value_names_its_place() {
        let message = layers(&[("BATON_PORT", "x")], "")
            .pick::<u16>("port", None)
            .expect_err("bad")
            .to_string();
        assert_eq!(
            message,
            "BATON_PORT: found \"x\", expected a whole number from 0 to 65535"
        );
        let message = layers(&[], "port = 70000")
            .pick::<u16>("port", None)
            .expect_err("bad")
            .to_string();
        assert!(message.contains(": port: found \"70000\", expected"), "{message}");
    }

    #[test]
    fn a_bad_secret_is_not_shown() {
        let message = layers(&[("BATON_API_KEY", "my secret")], "")
            .pick::<Secret>("api_key", None)
            .expect_err("bad")
            .to_string();
        assert!(
            message.contains("BATON_API_KEY") && !message.contains("my secret"),
            "{message}"
        );
    }

    #[test]
    fn a_service_link_in_the_port_is_explained() {
        let layers = layers(&[("BATON_PORT", "tcp://10.0.0.1:8000")], "");
        let message = layers.pick::<u16>("port", None).expect_err("bad").to_string();
        assert!(message.contains("enableServiceLinks"), "{message}");
    }
}
