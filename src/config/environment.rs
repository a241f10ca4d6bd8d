//! The process's environment, read here and nowhere else, once, at start. What is not a setting of Baton's is not kept.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use super::error::ConfigError;
use super::keys::{KEYS, Key};
use super::secret::Secret;
use super::setting::Setting as _;

/// How the variables of all settings begin.
const VARIABLE_PREFIX: &str = "BATON_";

/// The variable that names the configuration file.
const CONFIG_VARIABLE: &str = "BATON_CONFIG";

/// What the model hub's own tools read, so that one login and one cache serve them and Baton.
#[derive(Clone, Debug, Default)]
pub struct HubEnvironment {
    /// `HF_ENDPOINT`: another hub than the public one.
    pub endpoint: Option<String>,
    /// `HF_TOKEN`.
    pub token: Option<Secret>,
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else the user's cache folder's `huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
}

/// What the environment says.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    settings: BTreeMap<&'static str, String>,
    /// `BATON_CONFIG`: the configuration file, if `--config` names none.
    pub config_path: Option<PathBuf>,
    /// The user's cache folder: `XDG_CACHE_HOME`, else `HOME/.cache`.
    pub cache_dir: Option<PathBuf>,
    /// Where short-lived sockets go: `XDG_RUNTIME_DIR`, else the system's temporary folder.
    pub runtime_dir: PathBuf,
    /// For the model hub.
    pub hub: HubEnvironment,
}

impl Environment {
    /// Reads the process's environment. A `BATON_*` variable that is no setting is refused.
    pub fn from_process() -> Result<Environment, ConfigError> {
        Environment::from_variables(std::env::vars_os())
    }

    /// Reads `variables`.
    pub fn from_variables(variables: impl Iterator<Item = (OsString, OsString)>) -> Result<Environment, ConfigError> {
        let variables: BTreeMap<OsString, OsString> = variables.filter(|(_, value)| !value.is_empty()).collect();
        let path = |name: &str| variables.get(&OsString::from(name)).map(PathBuf::from);
        let text = |name: &str| {
            variables
                .get(&OsString::from(name))
                .and_then(|value| value.to_str())
                .map(str::to_owned)
        };

        let mut settings = BTreeMap::new();
        for (name, value) in &variables {
            let Some(name) = name
                .to_str()
                .filter(|name| name.starts_with(VARIABLE_PREFIX) && *name != CONFIG_VARIABLE)
            else {
                continue;
            };
            let key_name = name[VARIABLE_PREFIX.len()..].to_ascii_lowercase();
            let key = Key::find(&key_name).filter(|key| variable_of(key.name) == name);
            match (key, value.to_str()) {
                (Some(key), Some(value)) => {
                    settings.insert(key.name, value.to_owned());
                }
                (Some(_), None) => {
                    let (place, value) = (name.to_owned(), "bytes that are not UTF-8".to_owned());
                    return Err(ConfigError::BadValue {
                        place,
                        value,
                        expected: "a text",
                    });
                }
                (None, value) if is_service_link(name, value.unwrap_or_default()) => {}
                (None, _) => {
                    return Err(ConfigError::UnknownKey {
                        place: name.to_owned(),
                        nearest: Key::nearest(&key_name).map(variable_of),
                    });
                }
            }
        }

        let cache_dir = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        let hub_cache = path("HF_HUB_CACHE")
            .or_else(|| Some(path("HF_HOME")?.join("hub")))
            .or_else(|| Some(cache_dir.as_ref()?.join("huggingface/hub")));
        let hub = HubEnvironment {
            endpoint: text("HF_ENDPOINT"),
            token: text("HF_TOKEN").and_then(|token| Secret::parse(token.trim())),
            cache_dir: hub_cache,
        };
        let runtime_dir = path("XDG_RUNTIME_DIR")
            .filter(|dir| dir.is_dir())
            .unwrap_or_else(std::env::temp_dir);
        Ok(Environment {
            settings,
            config_path: path(CONFIG_VARIABLE),
            cache_dir,
            runtime_dir,
            hub,
        })
    }

    /// The setting's value.
    pub fn setting(&self, key: Key) -> Option<&str> {
        self.settings.get(key.name).map(String::as_str)
    }

    /// Where packed weights are kept for all processes of the host.
    pub fn packed_dir(&self) -> PathBuf {
        self.cache_dir
            .clone()
            .unwrap_or_else(std::env::temp_dir)
            .join("baton/packed")
    }

    /// Where CUDA kernels that were compiled here are kept.
    pub fn image_cache_dir(&self) -> PathBuf {
        self.cache_dir
            .clone()
            .unwrap_or_else(std::env::temp_dir)
            .join("baton/cuda-kernels")
    }
}

/// The names of all variables of Baton's own, so that a child can be started without them.
pub fn setting_variables() -> impl Iterator<Item = String> {
    KEYS.iter()
        .map(|key| variable_of(key.name))
        .chain([CONFIG_VARIABLE.to_owned()])
}

/// `kv_memory` as `BATON_KV_MEMORY`.
pub(super) fn variable_of(key_name: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", key_name.to_ascii_uppercase())
}

/// Kubernetes gives each container variables about the services around it: for a service named `baton`,
/// `BATON_SERVICE_HOST`, `BATON_PORT_8000_TCP_ADDR` and others. They are not meant for us.
fn is_service_link(name: &str, value: &str) -> bool {
    let ends = ["_SERVICE_HOST", "_SERVICE_PORT", "_TCP_ADDR", "_TCP_PORT", "_TCP_PROTO"];
    let is_url = value.starts_with("tcp://") || value.starts_with("udp://");
    is_url || name.contains("_SERVICE_PORT_") || ends.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, ConfigError> {
        Environment::from_variables(variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    fn key(name: &str) -> Key {
        Key::find(name).expect("an existing key")
    }

    #[test]
    fn settings_are_found_and_foreign_variables_ignored() {
        let environment = read(&[("BATON_PORT", "9000"), ("PATH", "/bin"), ("BATON_DTYPE", "")]).expect("valid");
        assert_eq!(environment.setting(key("port")), Some("9000"));
        assert_eq!(
            environment.setting(key("dtype")),
            None,
            "an empty variable counts as absent"
        );
    }

    #[test]
    fn a_wrong_variable_is_refused_with_the_nearest_one() {
        let message = read(&[("BATON_PROT", "1")]).expect_err("unknown").to_string();
        assert_eq!(message, "BATON_PROT is not a setting; did you mean BATON_PORT?");
        let message = read(&[("BATON_port", "1")]).expect_err("unknown").to_string();
        assert!(message.contains("BATON_PORT"), "{message}");
    }

    #[test]
    fn service_links_of_kubernetes_are_not_settings() {
        let links = [
            ("BATON_SERVICE_HOST", "10.0.0.1"),
            ("BATON_SERVICE_PORT_HTTP", "8000"),
            ("BATON_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
            ("BATON_PORT_8000_TCP_ADDR", "10.0.0.1"),
            ("BATON_DECODE_PORT", "tcp://10.0.0.1:8000"),
        ];
        assert!(read(&links).is_ok());
    }

    #[test]
    fn cache_folders_follow_the_usual_variables() {
        let environment = read(&[("HOME", "/home/me")]).expect("valid");
        assert_eq!(environment.packed_dir(), PathBuf::from("/home/me/.cache/baton/packed"));
        assert_eq!(
            environment.hub.cache_dir,
            Some("/home/me/.cache/huggingface/hub".into())
        );
        let environment = read(&[("HOME", "/home/me"), ("XDG_CACHE_HOME", "/c"), ("HF_HOME", "/hf")]).expect("valid");
        assert_eq!(environment.packed_dir(), PathBuf::from("/c/baton/packed"));
        assert_eq!(environment.hub.cache_dir, Some("/hf/hub".into()));
    }
}
