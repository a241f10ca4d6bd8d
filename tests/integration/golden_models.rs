//! The models of `tests/data/models`, each with its own tolerances in `goldens.json`. What lies there is tested: a new folder
//! needs no list.

use std::path::{Path, PathBuf};

/// Their folders, in order of names, in `folder`.
pub fn golden_models(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut models: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    models.retain(|path| path.is_dir());
    models.sort_unstable();
    assert!(!models.is_empty(), "{} holds no model", folder.display());
    models
}
