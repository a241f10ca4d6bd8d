//! Where a kernel's image comes from: a folder of packaged ones, else a cache on disk, else the compiler.
//!
//! An image's file says in its name what it was compiled from (`<unit>.sm_<architecture>.<key of sources and options>`), so
//! one of other sources is never taken, and ends in a BLAKE3 of its bytes, so that half a file is none. A package is a
//! copy of a cache.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::compile::{Compiler, Unit};
use crate::error::KernelError;
use crate::file_lock::lock;

const HASH_BYTES: usize = 32;

/// Where images are looked for.
#[derive(Clone, Debug, Default)]
pub struct ImageFolders {
    /// Images that came with the installation; read only.
    pub packaged: Option<PathBuf>,
    /// Images that were compiled on this host; `None` compiles anew each time.
    pub cache: Option<PathBuf>,
}

/// Where an image came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageOrigin {
    /// The folder of packaged images.
    Packaged,
    /// The cache, as an earlier start compiled it.
    Cached,
    /// Compiled now, in so long.
    Compiled(Duration),
}

impl fmt::Display for ImageOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageOrigin::Packaged => write!(f, "packaged"),
            ImageOrigin::Cached => write!(f, "cached"),
            ImageOrigin::Compiled(time) => write!(f, "compiled in {:.1} s", time.as_secs_f64()),
        }
    }
}

/// Finds or makes images for one architecture.
pub(super) struct Images {
    folders: ImageFolders,
    architecture: String,
    /// Missed only when something must be compiled.
    compiler: Option<Compiler>,
}

impl Images {
    pub(super) fn new(folders: ImageFolders, architecture: String) -> Images {
        Images {
            folders,
            architecture,
            compiler: Compiler::find(),
        }
    }

    /// # Errors
    /// No image and no compiler, a source that does not compile, or a cache that cannot be written.
    pub(super) fn get(&self, unit: &Unit) -> Result<(Vec<u8>, ImageOrigin), KernelError> {
        let stem = format!("{}.sm_{}.{}", unit.name, self.architecture, unit.key());
        if let Some(image) = self.folders.packaged.as_deref().and_then(|dir| any_of(dir, &stem)) {
            return Ok((image, ImageOrigin::Packaged));
        }
        let Some(cache) = &self.folders.cache else {
            let (image, time) = self.compile(unit)?;
            return Ok((image, ImageOrigin::Compiled(time)));
        };
        let Some(compiler) = &self.compiler else {
            // An image of whatever compiler there was is better than no kernel.
            return match any_of(cache, &stem) {
                Some(image) => Ok((image, ImageOrigin::Cached)),
                None => Err(Compiler::missing().into()),
            };
        };
        let (major, minor) = compiler.version;
        let path = cache.join(format!("{stem}.nvrtc-{major}.{minor}.cubin"));
        if let Some(image) = read(&path) {
            return Ok((image, ImageOrigin::Cached));
        }
        std::fs::create_dir_all(cache).map_err(wrap("create folder", cache))?;
        let _lock = lock(&path.with_extension("lock"), "compile a kernel")?;
        // Whoever held the lock may have compiled it.
        if let Some(image) = read(&path) {
            return Ok((image, ImageOrigin::Cached));
        }
        let (image, time) = self.compile(unit)?;
        write(&path, &image)?;
        Ok((image, ImageOrigin::Compiled(time)))
    }

    fn compile(&self, unit: &Unit) -> Result<(Vec<u8>, Duration), KernelError> {
        let compiler = self.compiler.as_ref().ok_or_else(Compiler::missing)?;
        let began = Instant::now();
        let image = compiler.compile(unit, &self.architecture)?;
        Ok((image, began.elapsed()))
    }
}

/// The newest-named whole image of these sources, by whichever compiler.
fn any_of(dir: &Path, stem: &str) -> Option<Vec<u8>> {
    let prefix = format!("{stem}.");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".cubin"))
        })
        .collect();
    paths.sort();
    paths.iter().rev().find_map(|path| read(path))
}

/// The image in a file, if it is there and whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let n_image = bytes.len().checked_sub(HASH_BYTES)?;
    let hash = blake3::hash(&bytes[..n_image]);
    if bytes[n_image..] != hash.as_bytes()[..] {
        tracing::warn!(path = %path.display(), "a kernel's image is damaged and is not used");
        return None;
    }
    bytes.truncate(n_image);
    Some(bytes)
}

fn write(path: &Path, image: &[u8]) -> Result<(), KernelError> {
    let temporary = path.with_extension("tmp");
    let mut bytes = image.to_vec();
    bytes.extend_from_slice(blake3::hash(image).as_bytes());
    std::fs::write(&temporary, bytes).map_err(wrap("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(wrap("rename into place", path))
}

fn wrap(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> KernelError {
    let path = path.to_owned();
    move |error| KernelError::File { action, path, error }
}
