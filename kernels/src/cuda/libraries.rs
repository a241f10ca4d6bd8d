//! The shared libraries that the device is driven with, from folders that the operator names or where the system looks.
//! Nothing of CUDA is linked; whoever has no card never notices.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::error::CudaError;

/// In the order in which they need each other: NVRTC finds its builtins only if they are loaded before it.
const LIBRARIES: [&[&str]; 4] = [
    &["libcuda.so.1", "libcuda.so"],
    &["libnvrtc-builtins.so.13.0", "libnvrtc-builtins.so"],
    &["libnvrtc.so.13", "libnvrtc.so"],
    &["libcublasLt.so.13", "libcublasLt.so"],
];

/// Loads what the folders have of the libraries, for the whole process: later look-ups by name find them.
///
/// # Errors
/// A library that is there and cannot be loaded.
pub(super) fn preload(folders: &[PathBuf]) -> Result<(), CudaError> {
    for names in LIBRARIES {
        let found = folders
            .iter()
            .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
            .find(|path| path.exists());
        if let Some(path) = found {
            load(&path)?;
        }
    }
    Ok(())
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
