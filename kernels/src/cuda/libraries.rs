//! The shared libraries that the device is driven with, from folders that the operator names or where the system looks.
//! Nothing of CUDA is linked; whoever has no card never notices.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::error::CudaError;

/// In the order in which they need each other, each with the version that is taken first: NVRTC finds its builtins only if
/// they are loaded before it.
const LIBRARIES: [(&str, &str); 4] = [
    ("libcuda.so", "1"),
    // Of NVRTC's own minor version, which is whatever the folder has.
    ("libnvrtc-builtins.so", "13"),
    ("libnvrtc.so", "13"),
    ("libcublasLt.so", "13"),
];

/// Loads what the folders have of the libraries, for the whole process: later look-ups by name find them.
///
/// # Errors
/// A library that is there and cannot be loaded.
pub(super) fn preload(folders: &[PathBuf]) -> Result<(), CudaError> {
    for (name, version) in LIBRARIES {
        if let Some(path) = folders.iter().find_map(|folder| find(folder, name, version)) {
            load(&path)?;
        }
    }
    Ok(())
}

/// A library in a folder: `<name>.<version>`, else the newest `<name>.<version>.<minor>`, else `<name>`.
fn find(folder: &Path, name: &str, version: &str) -> Option<PathBuf> {
    let exact = folder.join(format!("{name}.{version}"));
    if exact.exists() {
        return Some(exact);
    }
    let prefix = format!("{name}.{version}.");
    let minors = std::fs::read_dir(folder).ok()?.filter_map(|entry| {
        let path = entry.ok()?.path();
        let minor = path.file_name()?.to_str()?.strip_prefix(&prefix)?.parse::<u32>().ok()?;
        Some((minor, path))
    });
    let newest = minors.max().map(|(_, path)| path);
    newest.or_else(|| Some(folder.join(name)).filter(|path| path.exists()))
}

fn load(path: &Path) -> Result<(), CudaError> {
    let fail = |reason: String| CudaError::Library {
        path: path.display().to_string(),
        reason,
    };
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| fail(error.to_string()))?;
    // SAFETY: a string that ends in zero. Loading runs the library's initialisers: that they are what they claim to be is
    // the operator's word, as with LD_LIBRARY_PATH. The handle is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: dlerror after a failed dlopen on this thread is a string that ends in zero, or null.
        let words = unsafe {
            let words = libc::dlerror();
            (!words.is_null()).then(|| std::ffi::CStr::from_ptr(words).to_string_lossy().into_owned())
        };
        return Err(fail(words.unwrap_or_else(|| "no reason given".to_owned())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_taken_first_then_its_newest_minor_then_the_bare_name() {
        let folder = tempfile::tempdir().unwrap();
        let found = || {
            let path = find(folder.path(), "libx.so", "13")?;
            Some(path.file_name()?.to_str()?.to_owned())
        };
        assert_eq!(found(), None);
        for (added, expected) in [
            ("libx.alt.so.13.7", None),
            ("libx.so.12", None),
            ("libx.so", Some("libx.so")),
            ("libx.so.13.9", Some("libx.so.13.9")),
            ("libx.so.13.10", Some("libx.so.13.10")),
            ("libx.so.13.9.1", Some("libx.so.13.10")),
            ("libx.so.13", Some("libx.so.13")),
        ] {
            std::fs::write(folder.path().join(added), "").unwrap();
            assert_eq!(found().as_deref(), expected, "with {added}");
        }
    }
}
