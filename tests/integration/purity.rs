//! The scheduling crate decides and does nothing else: it depends on no I/O, async or clock crate, and no source of it
//! names one.

use super::cluster::repository;

/// What the crate may depend on, itself and through others.
const ALLOWED: [&str; 4] = ["blake3", "serde", "thiserror", "proptest"];

#[test]
fn scheduler_depends_on_nothing_that_acts() {
    let manifest = std::fs::read_to_string(repository("scheduler/Cargo.toml")).expect("a manifest");
    let manifest: toml::Table = toml::from_str(&manifest).expect("TOML");
    let dependencies = manifest["dependencies"].as_table().expect("dependencies");
    for name in dependencies.keys() {
        assert!(ALLOWED.contains(&name.as_str()), "scheduler depends on {name}");
    }
}

#[test]
fn scheduler_names_no_clock_thread_or_io() {
    let mut folders = vec![repository("scheduler/src")];
    let mut n_files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            n_files += 1;
            let text = std::fs::read_to_string(&path).expect("readable");
            let banned = [
                "std::time",
                "std::thread",
                "std::fs",
                "std::net",
                "std::io",
                "std::sync::Mutex",
                "HashMap",
                "HashSet",
                "async fn",
            ];
            for name in banned {
                let is_test = path
                    .components()
                    .any(|part| part.as_os_str().to_string_lossy().contains("test"));
                assert!(is_test || !text.contains(name), "{} names {name}", path.display());
            }
        }
    }
    assert!(n_files > 10, "the sources were found");
}
