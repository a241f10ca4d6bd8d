//! The KV memory of other processes, mapped once for each incarnation, and given back when that incarnation has gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_kernels::{ForeignKv, ForeignStaging, KvLayout, KvShare};
use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::OwnedWriteHalf;
use tokio::task::JoinHandle;

use super::TransportKind;
use super::handover::{Credentials, HandoverError, Received, request};

/// How the KV of another process can be read here: in at least one way.
pub(super) struct ForeignMemory {
    in_place: Result<ForeignKv, HandoverError>,
    staging: Option<ForeignStaging>,
    /// Its end tells the owner that nobody here reads any more.
    owner: OwnedWriteHalf,
}

impl ForeignMemory {
    /// # Errors
    /// Why the blocks are not read in place, if they can be read in no way.
    pub(super) fn new(
        in_place: Result<ForeignKv, HandoverError>,
        staging: Option<ForeignStaging>,
        owner: OwnedWriteHalf,
    ) -> Result<ForeignMemory, HandoverError> {
        match (in_place, &staging) {
            (Err(error), None) => Err(error),
            (in_place, _) => Ok(ForeignMemory {
                in_place,
                staging,
                owner,
            }),
        }
    }

    /// The transports that read it, the best first.
    pub(super) fn kinds(&self) -> Vec<TransportKind> {
        let in_place = self.in_place().map(|source| match source.is_on_card() {
            true => TransportKind::CudaIpc,
            false => TransportKind::SharedMemory,
        });
        let staged = self.staging.as_ref().map(|_| TransportKind::SharedMemory);
        in_place.into_iter().chain(staged).collect()
    }

    /// The blocks themselves.
    pub(super) fn in_place(&self) -> Option<&ForeignKv> {
        self.in_place.as_ref().ok()
    }

    /// The memory through which a card's blocks come.
    pub(super) fn staging(&self) -> Option<&ForeignStaging> {
        self.staging.as_ref()
    }

    /// Tells the owner what of that has been fetched.
    pub(super) fn say_fetched(&self, word: u64) {
        // Never waits, as no more words are on their way than there are slots, and a few bytes go whole or not at all. A
        // word that is lost costs the slot until the transfer ends.
        let _ = self.owner.try_write(&word.to_le_bytes());
    }

    /// Why the blocks are not read in place.
    pub(super) fn missing(&self) -> Option<&HandoverError> {
        self.in_place.as_ref().err()
    }
}

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
    memory: Arc<ForeignMemory>,
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
    pub(super) async fn get(&self, incarnation: u64) -> Result<Arc<ForeignMemory>, HandoverError> {
        if let Some(memory) = self.held.lock().touch(incarnation) {
            return Ok(memory);
        }
        let received = request(incarnation, self.layout, &self.credentials, self.near.as_ref()).await?;
        Ok(self.insert(incarnation, received))
    }

    fn insert(&self, incarnation: u64, received: Received) -> Arc<ForeignMemory> {
        let Received { memory, mut connection } = received;
        let memory = Arc::new(memory);
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
            memory: Arc::clone(&memory),
            used_at,
            watcher,
        };
        held.mappings.insert(incarnation, mapping);
        memory
    }

    #[cfg(test)]
    pub(super) fn n_held(&self) -> usize {
        self.held.lock().mappings.len()
    }
}

impl Held {
    fn touch(&mut self, incarnation: u64) -> Option<Arc<ForeignMemory>> {
        self.n_uses += 1;
        let mapping = self.mappings.get_mut(&incarnation)?;
        mapping.used_at = self.n_uses;
        Some(Arc::clone(&mapping.memory))
    }
}
