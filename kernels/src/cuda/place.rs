//! What one instance has of a card on which others of its process compute too: its part of the memory for KV, and which work
//! goes first. Whose place is which is decided above.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::error::CudaError;
use crate::layout::KvLayout;

/// An instance's place on its card. By default it is alone there.
#[derive(Clone, Debug, Default)]
pub struct CudaPlace {
    /// Where its cache is; `None` for memory of its own.
    pub arena: Option<Arc<CudaKvArena>>,
    /// Whose work goes first.
    pub turn: CudaTurn,
    /// On how many hundredths of the multiprocessors its work runs; `None` for all of them.
    pub multiprocessor_percent: Option<u8>,
}

/// Which of the instances of a process the card serves first, whenever a multiprocessor has room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CudaTurn {
    /// Before others: somebody waits for each of its steps.
    #[default]
    First,
    /// With what the others leave.
    Last,
}

/// Memory for the caches of several instances of a process: one allocation, sized once, when the first of them has its
/// weights and activations, of what then is left beyond as much for each of the others; each takes an equal part.
pub struct CudaKvArena {
    n_instances: usize,
    allocated: Mutex<Option<Allocated>>,
}

struct Allocated {
    buffer: Arc<DeviceBuffer>,
    layout: KvLayout,
    n_blocks: usize,
    n_taken: usize,
}

/// Memory of one cache, from `offset` of a buffer on.
pub(super) struct KvPart {
    pub(super) buffer: Arc<DeviceBuffer>,
    pub(super) offset: usize,
    pub(super) n_blocks: usize,
}

/// The driver shares whole pieces of this size with other processes: such a one holds nothing but caches.
const SHARED_BYTES: usize = 2 << 20;

impl CudaKvArena {
    /// For so many instances.
    pub fn new(n_instances: usize) -> CudaKvArena {
        CudaKvArena {
            n_instances,
            allocated: Mutex::default(),
        }
    }

    /// The next instance's part. Of what the first asks for, `n_blocks` for each, all get the same.
    ///
    /// # Errors
    /// Too little memory for all of them.
    pub(super) fn part(
        &self,
        device: &Device,
        layout: KvLayout,
        n_blocks: impl FnOnce(usize) -> usize,
    ) -> Result<KvPart, CudaError> {
        let mut allocated = self.allocated.lock();
        let allocated = match &mut *allocated {
            Some(allocated) => allocated,
            none => {
                // The others will want as much for themselves as this one has.
                let own_bytes = device.own_bytes.load(Ordering::Relaxed);
                let others_bytes = own_bytes.saturating_mul(self.n_instances - 1);
                let n_blocks = n_blocks(device.free_bytes()?.saturating_sub(others_bytes));
                let n_bytes = part_bytes(layout, n_blocks).saturating_mul(self.n_instances);
                let buffer = DeviceBuffer::common(device, "the KV cache", n_bytes)?;
                none.insert(Allocated {
                    buffer: Arc::new(buffer),
                    layout,
                    n_blocks,
                    n_taken: 0,
                })
            }
        };
        assert!(
            allocated.n_taken < self.n_instances && allocated.layout == layout,
            "part {} of {} of {:?}, asked for as {layout:?}",
            allocated.n_taken,
            self.n_instances,
            allocated.layout
        );
        allocated.n_taken += 1;
        Ok(KvPart {
            buffer: Arc::clone(&allocated.buffer),
            offset: (allocated.n_taken - 1) * part_bytes(layout, allocated.n_blocks),
            n_blocks: allocated.n_blocks,
        })
    }
}

/// Bytes of one cache; the next begins on a piece of its own.
fn part_bytes(layout: KvLayout, n_blocks: usize) -> usize {
    layout
        .block_bytes()
        .saturating_mul(n_blocks)
        .next_multiple_of(SHARED_BYTES)
}

impl fmt::Debug for CudaKvArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaKvArena of {}", self.n_instances)
    }
}
