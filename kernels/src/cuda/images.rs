//! Where a kernel's image comes from: a folder of packaged ones, else a cache on disk, else the compiler.
//!
//! An image's file says in its name what it was compiled from (`<unit>.sm_<architecture>.<key of sources and options>`), so
//! one of other sources is never taken, and ends in a BLAKE3 of its bytes, so that half a file is none. A package is a
//! cache that was filled beforehand.

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::compile::{Compiler, Unit};
use super::libraries::preload;
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

impl Compiler {
    /// Where its image of that stem is kept.
    fn path(&self, folder: &Path, stem: &str) -> PathBuf {
        let (major, minor) = self.version;
        folder.join(format!("{stem}.nvrtc-{major}.{minor}.cubin"))
    }
}

/// Finds or makes images for one architecture.
pub(super) struct Images {
    folders: ImageFolders,
    architecture: String,
    /// Missed only when something must be compiled.
    compiler: Option<Compiler>,
    /// Whether it has been said that the package is not for this card and program.
    has_warned: Cell<bool>,
}

impl Images {
    pub(super) fn new(folders: ImageFolders, architecture: String) -> Images {
        Images {
            folders,
            architecture,
            compiler: Compiler::find(),
            has_warned: Cell::new(false),
        }
    }

    /// # Errors
    /// No image and no compiler, a source that does not compile, or a cache that cannot be written.
    pub(super) fn get(&self, unit: &Unit) -> Result<(Vec<u8>, ImageOrigin), KernelError> {
        let stem = stem(unit, &self.architecture);
        if let Some(dir) = &self.folders.packaged {
            if let Some(image) = any_of(dir, &stem) {
                return Ok((image, ImageOrigin::Packaged));
            }
            self.warn_of_package(dir, &stem);
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
        let path = compiler.path(cache, &stem);
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

    /// Once: what is not there for one kernel is rarely there for another.
    fn warn_of_package(&self, dir: &Path, stem: &str) {
        if !self.has_warned.replace(true) {
            let reason = "packaged kernels are of another architecture or version and are not used";
            tracing::warn!(folder = %dir.display(), missing = %format!("{stem}.*.cubin"), "{reason}");
        }
    }

    fn compile(&self, unit: &Unit) -> Result<(Vec<u8>, Duration), KernelError> {
        let compiler = self.compiler.as_ref().ok_or_else(Compiler::missing)?;
        let began = Instant::now();
        let image = compiler.compile(unit, &self.architecture)?;
        Ok((image, began.elapsed()))
    }
}

/// How the image of a unit is called, whichever compiler made it.
fn stem(unit: &Unit, architecture: &str) -> String {
    format!("{}.sm_{architecture}.{}", unit.name, unit.key())
}

/// Compiles every kernel for cards that are elsewhere, into a folder for [`ImageFolders::packaged`]; what is there already stays.
/// Needs NVRTC, from `libraries` or where the system looks, and no card. The number of images.
///
/// # Errors
/// No compiler, a kernel that does not compile for one of `architectures` (as in `sm_90a`, without the `sm_`), or a folder that
/// cannot be written.
pub fn package(libraries: &[PathBuf], architectures: &[String], folder: &Path) -> Result<usize, KernelError> {
    preload(libraries)?;
    std::fs::create_dir_all(folder).map_err(wrap("create folder", folder))?;
    let compiler = Compiler::find().ok_or_else(Compiler::missing)?;
    let units = Unit::all();
    let jobs: Vec<(&Unit, &String)> = architectures
        .iter()
        .flat_map(|architecture| units.iter().map(move |unit| (unit, architecture)))
        .collect();
    let n_threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(jobs.len());
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((unit, architecture)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = compiler.path(folder, &stem(unit, architecture));
            if read(&path).is_none() {
                write(&path, &compiler.compile(unit, architecture)?)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().expect("compiling does not panic"));
        joined.collect::<Result<(), KernelError>>()
    })?;
    Ok(jobs.len())
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
