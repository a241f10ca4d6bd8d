//! Memory of one process that others of its host can be given to read: a file that they can neither write nor resize. What
//! lies in it, and who may read what when, is its users' business.

use std::io;
use std::os::fd::OwnedFd;

use memmap2::{MmapOptions, MmapRaw};

use crate::error::KernelError;

/// Zeroed memory and its file, which whoever gets it can map for reading.
///
/// # Errors
/// Too little memory, or a system without such files.
#[cfg(target_os = "linux")]
pub(crate) fn create(n_bytes: usize) -> io::Result<(MmapRaw, OwnedFd)> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let file = rustix::fs::memfd_create("baton-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, n_bytes as u64)?;
    let map = MmapOptions::new().len(n_bytes).map_raw(&file)?;
    // Sealed after our own mapping, which stays the only one that writes. A reader cannot be surprised by SIGBUS,
    // as the file cannot shrink.
    let size = SealFlags::SHRINK | SealFlags::GROW;
    let sealed = rustix::fs::fcntl_add_seals(&file, size | SealFlags::FUTURE_WRITE | SealFlags::SEAL);
    match sealed {
        // Before Linux 5.1 readers are only asked not to write.
        Err(rustix::io::Errno::INVAL) => rustix::fs::fcntl_add_seals(&file, size | SealFlags::SEAL),
        sealed => sealed,
    }?;
    Ok((map, file))
}

/// Nothing is shared here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn create(_: usize) -> io::Result<(MmapRaw, OwnedFd)> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Maps what another process has made with [`create`], of exactly `n_bytes`.
///
/// # Errors
/// A file that may shrink under its reader or has another size, or no address space.
#[cfg(target_os = "linux")]
pub(crate) fn map(file: &OwnedFd, n_bytes: usize) -> Result<MmapRaw, KernelError> {
    let refuse = |error: io::Error| KernelError::Foreign { error };
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|error| refuse(error.into()))?;
    if !seals.contains(rustix::fs::SealFlags::SHRINK) {
        return Err(refuse(io::Error::other("the file is not sealed against shrinking")));
    }
    let found = rustix::fs::fstat(file).map_err(|error| refuse(error.into()))?.st_size;
    if usize::try_from(found) != Ok(n_bytes) {
        let message = format!("the file has {found} bytes, expected {n_bytes}");
        return Err(refuse(io::Error::other(message)));
    }
    MmapOptions::new().len(n_bytes).map_raw_read_only(file).map_err(refuse)
}

/// Nothing is shared here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn map(_: &OwnedFd, _: usize) -> Result<MmapRaw, KernelError> {
    Err(KernelError::Foreign {
        error: io::ErrorKind::Unsupported.into(),
    })
}

/// Copies bytes that another process may change meanwhile. What arrives is then any mixture of old and new.
///
/// # Safety
/// `source` is readable and `target` writable for `n_bytes`; they do not overlap, and nobody else touches the target.
pub(crate) unsafe fn copy_changing(source: *const u8, target: *mut u8, n_bytes: usize) {
    // A string copy in assembly: to the compiler the loads are unknown, so that it derives nothing from them, and it is as
    // fast as the C library's (within the noise in pieces of 16 KiB on Zen 5).
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the ranges are the caller's promise; the direction flag is clear, as the ABI demands.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") n_bytes => _,
            inout("rsi") source => _,
            inout("rdi") target => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let n_words = n_bytes / size_of::<u64>();
        for word in 0..n_words {
            // SAFETY: within the ranges of the caller's promise.
            unsafe {
                let value = source.cast::<u64>().add(word).read_volatile();
                target.cast::<u64>().add(word).write_unaligned(value);
            }
        }
        for byte in n_words * size_of::<u64>()..n_bytes {
            // SAFETY: as above.
            unsafe { target.add(byte).write(source.add(byte).read_volatile()) };
        }
    }
}
