//! The KV memory of other processes, mapped once for each incarnation, and given back when that incarnation has gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_kernels::{ForeignKv, KvLayout, KvShare};
use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinHandle;

use super::handover::{Credentials, HandoverError, Received, request};

/// Mappings kept; beyond it the one unused for longest goes. They cost address space and page tables, not memory.
const MAX_MAPPINGS: usize = 64;

pub(super) struct Mappings {
    layout: KvLayout,
    credentials: Credentials,
    /// Our own memory: blocks of a card are mapped for copies into it.
    near: Option<KvShare>,
    /// By incarnation.
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    mappings: BTreeMap<u64, Mapping>,
    /// Counts uses, to find the mapping unused for longest.
    n_uses: u64,
}

struct Mapping {
    kv: Arc<ForeignKv>,
    used_at: u64,
    watcher: JoinHandle<()>,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Closes the connection, if it has not ended by itself.
        self.watcher.abort();
    }
}

impl Mappings {
    pub(super) fn new(layout: KvLayout, credentials: Credentials, near: Option<KvShare>) -> Mappings {
        Mappings {
            layout,
            credentials,
            near,
            held: Arc::default(),
        }
    }

    /// The memory of a living incarnation of this host.
    pub(super) async fn get(&self, incarnation: u64) -> Result<Arc<ForeignKv>, HandoverError> {
        if let Some(kv) = self.held.lock().touch(incarnation) {
            return Ok(kv);
        }
        let received = request(incarnation, self.layout, &self.credentials, self.near.as_ref()).await?;
        Ok(self.insert(incarnation, received))
    }

    fn insert(&self, incarnation: u64, received: Received) -> Arc<ForeignKv> {
        let Received { kv, mut connection } = received;
        let kv = Arc::new(kv);
        let mut held = self.held.lock();
        // Another transfer may have been faster.
        if let Some(theirs) = held.touch(incarnation) {
            return theirs;
        }
        if held.mappings.len() >= MAX_MAPPINGS {
            let oldest = held.mappings.iter().min_by_key(|(_, mapping)| mapping.used_at);
            let oldest = oldest.map(|(&incarnation, _)| incarnation);
            held.mappings.remove(&oldest.expect("many are held"));
        }
        let everything = Arc::downgrade(&self.held);
        let watcher = tokio::spawn(async move {
            // The owner says nothing more: whatever comes is the end.
            let _ = connection.read(&mut [0]).await;
            if let Some(held) = everything.upgrade() {
                held.lock().mappings.remove(&incarnation);
            }
        });
        let used_at = held.n_uses;
        let mapping = Mapping {
            kv: Arc::clone(&kv),
            used_at,
            watcher,
        };
        held.mappings.insert(incarnation, mapping);
        kv
    }

    #[cfg(test)]
    pub(super) fn n_held(&self) -> usize {
        self.held.lock().mappings.len()
    }
}

impl Held {
    fn touch(&mut self, incarnation: u64) -> Option<Arc<ForeignKv>> {
        self.n_uses += 1;
        let mapping = self.mappings.get_mut(&incarnation)?;
        mapping.used_at = self.n_uses;
        Some(Arc::clone(&mapping.kv))
    }
}
