//! Lists of folders such as `/a:/b`, as in PATH. Whether they exist is looked at where they are used.

use std::ffi::OsString;
use std::path::PathBuf;

use super::setting::Setting;

/// Folders in the order in which they are looked through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folders(pub Vec<PathBuf>);

impl Setting for Folders {
    const EXPECTED: &'static str = "folders, with ':' between them";

    fn parse(text: &str) -> Option<Self> {
        let folders: Vec<PathBuf> = std::env::split_paths(text).collect();
        let is_whole = !folders.is_empty() && folders.iter().all(|folder| !folder.as_os_str().is_empty());
        is_whole.then_some(Folders(folders))
    }
}

impl Folders {
    /// As it is written.
    pub fn to_argument(&self) -> OsString {
        // A folder with ':' in its name was never read.
        std::env::join_paths(&self.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        let folders = Folders::parse("/a:/b c").expect("two folders");
        assert_eq!(folders.0, [PathBuf::from("/a"), PathBuf::from("/b c")]);
        assert_eq!(folders.to_argument(), "/a:/b c");
        assert_eq!((Folders::parse(""), Folders::parse("/a::/b")), (None, None));
    }
}
