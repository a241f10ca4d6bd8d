//! One process of the host does what several need, and the others wait for it.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::error::KernelError;

/// Longer than packing takes for any model on a slow disk; a dead process gives its lock back at once.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);
const POLL: Duration = Duration::from_millis(50);

/// Holds the exclusive lock on `path` until dropped. `work` is what is waited for, as in "waiting for ... to pack weights".
pub(crate) fn lock(path: &Path, work: &'static str) -> Result<File, KernelError> {
    let wrap = |action: &'static str| {
        let path = path.to_owned();
        move |error| KernelError::File { action, path, error }
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(wrap("create"))?;
    let started = Instant::now();
    let mut is_waiting = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(error) if error == rustix::io::Errno::WOULDBLOCK || error == rustix::io::Errno::INTR => {}
            Err(error) => return Err(wrap("lock")(error.into())),
        }
        if !std::mem::replace(&mut is_waiting, true) {
            tracing::info!(path = %path.display(), "waiting for another process to {work}");
        }
        if started.elapsed() > TIMEOUT {
            return Err(KernelError::LockTimeout {
                path: path.to_owned(),
                work,
                waited_s: TIMEOUT.as_secs(),
            });
        }
        std::thread::sleep(POLL);
    }
}
