//! The packed file on disk: opened if valid, else built under a lock into a temporary file and renamed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use super::WeightSource;
use super::build::Plan;
use crate::error::KernelError;
use crate::file_lock::lock;

pub(super) fn open_or_build(
    dir: &Path,
    key: &str,
    plan: &Plan<'_>,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Mmap, KernelError> {
    if key.is_empty()
        || !key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    {
        return Err(KernelError::Key { key: key.to_owned() });
    }
    let path = dir.join(format!("{key}.{}", plan.extension()));
    if let Some(map) = open_valid(&path, plan)? {
        return Ok(map);
    }
    std::fs::create_dir_all(dir).map_err(wrap("create folder", dir))?;
    let _lock = lock(&beside(&path, "lock"), "pack the weights")?;
    // Whoever held the lock may have built it.
    if let Some(map) = open_valid(&path, plan)? {
        return Ok(map);
    }
    let temporary = beside(&path, "tmp");
    let outcome = build(&temporary, plan, source, progress)
        .and_then(|()| std::fs::rename(&temporary, &path).map_err(wrap("rename into place", &path)));
    if let Err(error) = outcome {
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    open_valid(&path, plan)?.ok_or_else(|| {
        wrap("read back", &path)(io::Error::new(
            io::ErrorKind::InvalidData,
            "it changed after it was written",
        ))
    })
}

/// The file of that name with an extension more.
fn beside(path: &Path, extension: &str) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn wrap(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |error| KernelError::File { action, path, error }
}

/// The map of a valid file; None, with a log line, if it is not one of this plan; None silently if absent.
fn open_valid(path: &Path, plan: &Plan<'_>) -> Result<Option<Mmap>, KernelError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrap("open", path)(error)),
    };
    let bytes = file.metadata().map_err(wrap("inspect", path))?.len();
    let expected = plan.total_words() as u64 * 4;
    let mut header = vec![0; plan.header().len()];
    let problem = if bytes != expected {
        Some(format!("expected {expected} bytes, found {bytes}"))
    } else {
        file.read_exact(&mut header).map_err(wrap("read", path))?;
        (header != plan.header()).then(|| "its header is of other weights or another version".to_owned())
    };
    if let Some(problem) = problem {
        tracing::warn!(path = %path.display(), problem, "packed weights are not usable and will be packed again");
        return Ok(None);
    }
    // SAFETY: a finished packed file is never written or truncated by us, only replaced by rename, which leaves this map's
    // file alone; that nobody else does is a condition of the cache folder.
    let map = unsafe { MmapOptions::new().map(&file) }.map_err(wrap("map", path))?;
    advise(&map, path);
    Ok(Some(map))
}

#[cfg(target_os = "linux")]
fn advise(map: &Mmap, path: &Path) {
    use memmap2::Advice;
    // Page tables filled now cost less than a fault per page in the first step; huge pages where the file system has them.
    for advice in [Advice::HugePage, Advice::WillNeed, Advice::PopulateRead] {
        if let Err(error) = map.advise(advice) {
            tracing::debug!(path = %path.display(), ?advice, %error, "advice on packed weights not taken");
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_map: &Mmap, _path: &Path) {}

fn build(
    path: &Path,
    plan: &Plan<'_>,
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), KernelError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(wrap("create", path))?;
    file.set_len(plan.total_words() as u64 * 4)
        .map_err(wrap("size", path))?;
    plan.pack_all(
        source,
        &|offset, words| {
            let bytes = bytemuck::cast_slice(words);
            file.write_all_at(bytes, offset as u64 * 4).map_err(wrap("write", path))
        },
        progress,
    )?;
    // The header last, and everything on disk before the name exists: a crash leaves no valid-looking file.
    file.write_all_at(plan.header(), 0).map_err(wrap("write", path))?;
    file.sync_all().map_err(wrap("flush", path))
}
