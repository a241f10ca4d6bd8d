//! Which model is meant: the built-in demo, a folder, or a name on the model hub. Reads nothing but whether a folder exists.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use super::setting::Setting;

/// The name under which the demo model is served.
pub const DEMO_MODEL_NAME: &str = "baton-demo";

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The toy chat model inside the binary.
    Demo,
    /// A folder as Hugging Face publishes them.
    Folder(PathBuf),
    /// `ORG/NAME` on the hub.
    Hub(String),
}

impl ModelSource {
    /// The name clients use when none was chosen: the demo's name, the folder's name, or the hub id.
    pub fn default_served_name(&self) -> String {
        match self {
            ModelSource::Demo => DEMO_MODEL_NAME.to_owned(),
            ModelSource::Folder(path) => {
                let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                absolute.file_name().map_or_else(
                    || path.display().to_string(),
                    |name| name.to_string_lossy().into_owned(),
                )
            }
            ModelSource::Hub(id) => id.clone(),
        }
    }
}

impl ModelSource {
    /// The value of a child's `--model`. Folders are made absolute: a relative name could mean a hub id to the child.
    pub fn to_argument(&self) -> OsString {
        match self {
            ModelSource::Folder(path) => std::path::absolute(path)
                .unwrap_or_else(|_| path.clone())
                .into_os_string(),
            ModelSource::Demo | ModelSource::Hub(_) => self.to_string().into(),
        }
    }
}

impl Setting for ModelSource {
    const EXPECTED: &'static str = "a model folder that exists, or ORG/NAME of a model hub";

    fn parse(text: &str) -> Option<Self> {
        if text == DEMO_MODEL_NAME {
            return Some(ModelSource::Demo);
        }
        if Path::new(text).is_dir() {
            return Some(ModelSource::Folder(PathBuf::from(text)));
        }
        let (organisation, name) = text.split_once('/')?;
        let plain = |part: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            !part.is_empty() && part.len() <= 96 && !part.starts_with('.') && part.chars().all(legal)
        };
        (plain(organisation) && plain(name)).then(|| ModelSource::Hub(text.to_owned()))
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelSource::Demo => f.write_str(DEMO_MODEL_NAME),
            ModelSource::Folder(path) => path.display().fmt(f),
            ModelSource::Hub(id) => f.write_str(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_exists_wins_over_a_hub_name() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let text = dir.path().display().to_string();
        assert_eq!(
            ModelSource::parse(&text),
            Some(ModelSource::Folder(dir.path().to_owned()))
        );
        assert_eq!(
            ModelSource::parse("org/name-1.0"),
            Some(ModelSource::Hub("org/name-1.0".into()))
        );
        assert_eq!(ModelSource::parse("baton-demo"), Some(ModelSource::Demo));
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in [
            "",
            "/no/such/folder",
            "./no-such",
            "../no-such",
            "one/two/three",
            "name-alone",
            "a/b c",
            "/a",
        ] {
            assert_eq!(ModelSource::parse(text), None, "{text}");
        }
    }

    #[test]
    fn served_names_are_short() {
        assert_eq!(
            ModelSource::Folder("/models/tiny-llama/".into()).default_served_name(),
            "tiny-llama"
        );
        assert_eq!(ModelSource::Hub("org/name".into()).default_served_name(), "org/name");
    }
}
