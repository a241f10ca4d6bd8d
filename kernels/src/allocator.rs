//! How the process's allocator treats large buffers. It allocates nothing itself.

/// Larger buffers than any KV frame stay in the heap once freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEEP_BYTES: libc::c_int = 32 << 20;

/// Asks the C allocator to keep freed memory for the next buffer.
///
/// By default glibc gives buffers of a mebibyte back to the system, so that each KV frame is mapped and its pages are faulted
/// in anew. Elsewhere than on glibc this does nothing. Call it once, early: the settings are the whole process's.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let settings = [
            (libc::M_MMAP_THRESHOLD, KEEP_BYTES),
            (libc::M_TRIM_THRESHOLD, 4 * KEEP_BYTES),
            (libc::M_TOP_PAD, KEEP_BYTES),
        ];
        for (name, value) in settings {
            // SAFETY: mallopt takes two integers, no pointers; glibc serialises it with its own allocations.
            let accepted = unsafe { libc::mallopt(name, value) };
            if accepted == 0 {
                tracing::debug!(name, value, "the allocator refused a setting");
            }
        }
    }
}
