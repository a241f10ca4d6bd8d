//! Pages for a KV cache before they are needed. What a system takes for a page's first use (zeroing it, and on a virtual
//! machine getting it from the host) is then not paid by the request that happens to be the first to use it.

use std::io;
use std::sync::{Arc, Weak};

use super::memory::KvMemory;

/// Between two looks whether the cache is still there, and the most that a fault elsewhere waits for us.
const CHUNK_BYTES: usize = 4 << 20;

/// Touches the memory of a cache from any thread; does not keep it.
pub struct KvPrefault {
    memory: Weak<KvMemory>,
}

impl KvPrefault {
    pub(super) fn of(memory: &Arc<KvMemory>) -> KvPrefault {
        KvPrefault {
            memory: Arc::downgrade(memory),
        }
    }

    /// Blocks until every page is there, or the cache has gone. Returns the bytes that have pages now. Readers and writers go
    /// on meanwhile, and nothing they wrote changes.
    ///
    /// # Errors
    /// Not enough memory, or a system that cannot do this (Linux before 5.14).
    pub fn run(self) -> io::Result<usize> {
        let mut offset = 0;
        while let Some(memory) = self.memory.upgrade() {
            let n_left = memory.host_bytes() - offset;
            if n_left == 0 {
                break;
            }
            let n_bytes = n_left.min(CHUNK_BYTES);
            memory.populate(offset, n_bytes)?;
            offset += n_bytes;
        }
        Ok(offset)
    }
}
