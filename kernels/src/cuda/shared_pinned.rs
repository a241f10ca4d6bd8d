//! Pinned memory of the host in slots of one size, which other processes may map for reading; each slot with a generation, so
//! that a reader knows whether it has read what was meant ([`crate::kv::ForeignStaging`]).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use cudarc::driver::{CudaContext, sys};
use memmap2::MmapRaw;

use super::buffer::PinnedBuffer;
use super::error::{CudaError, During as _};
use crate::kv::{StagedPlace, StagingGeometry};
use crate::sealed_memory;

/// The memory of all slots; each is a [`PinnedBuffer`] that keeps it.
pub(crate) struct SharedPinned {
    context: Arc<CudaContext>,
    map: MmapRaw,
    file: OwnedFd,
    geometry: StagingGeometry,
}

impl SharedPinned {
    /// The memory and its slots.
    ///
    /// # Errors
    /// Not as much memory that can be locked, or a system whose processes cannot share it so.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        geometry: StagingGeometry,
    ) -> Result<(Arc<SharedPinned>, Vec<PinnedBuffer>), CudaError> {
        let n_bytes = geometry.n_bytes();
        let locking = || format!("lock {n_bytes} bytes of host memory that others may read");
        let (map, file) = sealed_memory::create(n_bytes).map_err(|error| CudaError::Call {
            action: locking(),
            reason: error.to_string(),
        })?;
        context.bind_to_thread().during(locking)?;
        // SAFETY: a mapping of so many bytes, which stays until `drop` has unlocked it.
        unsafe { sys::cuMemHostRegister_v2(map.as_mut_ptr().cast(), n_bytes, 0) }
            .result()
            .during(locking)?;
        let memory = Arc::new(SharedPinned {
            context: Arc::clone(context),
            map,
            file,
            geometry,
        });
        let slot = |slot| {
            let at = memory.map.as_mut_ptr().wrapping_add(geometry.slot_at(slot));
            let bytes = NonNull::new(at).expect("within a mapping");
            // SAFETY: zeroed bytes of the mapping that no other slot has, made into a buffer here alone.
            unsafe { PinnedBuffer::within(&memory, bytes, geometry.slot_bytes()) }
        };
        let slots = (0..geometry.n_slots()).map(slot).collect();
        Ok((memory, slots))
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn geometry(&self) -> StagingGeometry {
        self.geometry
    }

    /// Says that what the slot holds from here on is something else: before anything is written to it.
    pub(super) fn renew(&self, slot: u32) {
        self.generation(slot).fetch_add(1, Ordering::Relaxed);
        // No later write of the slot comes before it.
        fence(Ordering::SeqCst);
    }

    /// What the slot holds now, as readers may ask for it.
    pub(super) fn place(&self, slot: u32) -> StagedPlace {
        StagedPlace {
            slot,
            generation: self.generation(slot).load(Ordering::Relaxed),
        }
    }

    fn generation(&self, slot: u32) -> &AtomicU32 {
        let at = self.map.as_mut_ptr().wrapping_add(self.geometry.generation_at(slot));
        // SAFETY: an aligned word within the mapping, which lives as long as `self`, and which only atomics touch.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }
}

impl Drop for SharedPinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: locked by `new`, unlocked once; whoever queued copies has waited for them.
        let _ = unsafe { sys::cuMemHostUnregister(self.map.as_mut_ptr().cast()) };
    }
}
