//! Pinned memory of the host, and as much of the device, through which blocks of KV travel a frame at a time. Bounded: a
//! ring has so many slots from the start and never more. What is copied, and when, is `kv`'s business.
//!
//! What leaves the device lies in memory that other processes may map, where the system has such memory: a slot that is lent
//! is then read where it is.

use std::sync::Arc;

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;
use parking_lot::{Condvar, Mutex};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};
use super::shared_pinned::SharedPinned;
use crate::kv::{StagedPlace, StagingGeometry};

/// Blocks that one slot can list.
pub(super) const MAX_LISTED: usize = 1024;
/// Room for as many pairs of them.
const LIST_BYTES: usize = MAX_LISTED * 2 * size_of::<u32>();

/// Slots of one direction of one cache.
pub(super) struct Ring {
    state: Mutex<State>,
    given_back: Condvar,
    payload_bytes: usize,
    /// How many may be lent at once: the others serve whoever copies meanwhile.
    max_lent: usize,
    /// The slots' payloads on the host, if others may read them.
    shared: Option<Arc<SharedPinned>>,
}

struct State {
    free: Vec<Slot>,
    n_lent: usize,
}

/// A list of blocks and their bytes: pinned on the host; and as much on the device, the bytes behind the list.
pub(super) struct Slot {
    index: u32,
    list: PinnedBuffer,
    payload: PinnedBuffer,
    device: DeviceBuffer,
    /// Behind the slot's last work. Waiting for it sleeps, as it may take as long as a layer is computed.
    pub(super) done: CudaEvent,
}

impl Ring {
    /// Slots of this process alone, none of which is lent.
    ///
    /// # Errors
    /// Too little memory of either kind.
    pub(super) fn private(device: &Device, n_slots: usize, payload_bytes: usize) -> Result<Arc<Ring>, CudaError> {
        let payload = |_| PinnedBuffer::new(&device.context, payload_bytes);
        let payloads = (0..n_slots).map(payload).collect::<Result<_, CudaError>>()?;
        Ring::over(device, payloads, 0, None)
    }

    /// Slots that may be lent, so many at once, and that other processes may read if they can be given the memory.
    ///
    /// # Errors
    /// Too little memory of either kind.
    pub(super) fn lending(
        device: &Device,
        n_slots: usize,
        max_lent: usize,
        payload_bytes: usize,
    ) -> Result<Arc<Ring>, CudaError> {
        assert!(
            max_lent < n_slots,
            "somebody must be able to copy while all others are lent"
        );
        let geometry = StagingGeometry::new(n_slots as u32, payload_bytes).expect("a few slots of a block or more");
        let (payloads, shared) = match SharedPinned::new(&device.context, geometry) {
            Ok((shared, payloads)) => (payloads, Some(shared)),
            Err(error) => {
                tracing::info!(%error, "other processes cannot read KV that leaves this card on its way");
                let payload = |_| PinnedBuffer::new(&device.context, payload_bytes);
                let payloads = (0..n_slots).map(payload).collect::<Result<_, CudaError>>()?;
                (payloads, None)
            }
        };
        Ring::over(device, payloads, max_lent, shared)
    }

    fn over(
        device: &Device,
        payloads: Vec<PinnedBuffer>,
        max_lent: usize,
        shared: Option<Arc<SharedPinned>>,
    ) -> Result<Arc<Ring>, CudaError> {
        let payload_bytes = payloads[0].n_bytes();
        let slot = |(index, payload): (u32, PinnedBuffer)| {
            let event = device.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC));
            Ok(Slot {
                index,
                list: PinnedBuffer::new(&device.context, LIST_BYTES)?,
                payload,
                device: DeviceBuffer::new(device, "the staging of KV", LIST_BYTES + payload_bytes)?,
                done: event.during(|| "create an event".to_owned())?,
            })
        };
        let free = (0..)
            .zip(payloads)
            .map(slot)
            .collect::<Result<Vec<Slot>, CudaError>>()?;
        Ok(Arc::new(Ring {
            state: Mutex::new(State { free, n_lent: 0 }),
            given_back: Condvar::new(),
            payload_bytes,
            max_lent,
            shared,
        }))
    }

    /// The memory of the slots' payloads, if others may read them.
    pub(super) fn shared(&self) -> Option<&SharedPinned> {
        self.shared.as_deref()
    }

    /// Bytes of blocks that a slot holds.
    pub(super) fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// A slot, once one is free: those that are not lent are kept for no longer than a copy takes.
    pub(super) fn acquire(self: &Arc<Ring>) -> Acquired {
        let mut state = self.state.lock();
        let slot = loop {
            match state.free.pop() {
                Some(slot) => break slot,
                None => self.given_back.wait(&mut state),
            }
        };
        drop(state);
        if let Some(shared) = &self.shared {
            shared.renew(slot.index);
        }
        Acquired {
            slot: Some(slot),
            ring: Arc::clone(self),
        }
    }
}

impl Slot {
    pub(super) fn list_address(&self) -> u64 {
        self.device.address()
    }

    pub(super) fn payload_address(&self) -> u64 {
        self.device.address() + LIST_BYTES as u64
    }

    /// The list on the host, its first `n` numbers.
    pub(super) fn list_mut(&mut self, n: usize) -> &mut [u32] {
        bytemuck::cast_slice_mut(&mut self.list.as_mut_slice()[..n * size_of::<u32>()])
    }

    pub(super) fn payload(&self, n_bytes: usize) -> &[u8] {
        &self.payload.as_slice()[..n_bytes]
    }

    pub(super) fn payload_mut(&mut self, n_bytes: usize) -> &mut [u8] {
        &mut self.payload.as_mut_slice()[..n_bytes]
    }
}

/// A slot in somebody's hands, which goes back when dropped. No work that uses it may be queued then.
pub(super) struct Acquired {
    slot: Option<Slot>,
    ring: Arc<Ring>,
}

impl Acquired {
    /// Keeps the slot with its first `n_bytes` of payload for as long as they are needed; `None`, and the slot is still here,
    /// if too many are kept already.
    pub(super) fn lend(&mut self, n_bytes: usize) -> Option<Lent> {
        let mut state = self.ring.state.lock();
        if state.n_lent == self.ring.max_lent {
            return None;
        }
        state.n_lent += 1;
        drop(state);
        Some(Lent {
            slot: self.slot.take(),
            ring: Arc::clone(&self.ring),
            n_bytes,
        })
    }
}

impl std::ops::Deref for Acquired {
    type Target = Slot;

    fn deref(&self) -> &Slot {
        self.slot.as_ref().expect("a slot until it is lent")
    }
}

impl std::ops::DerefMut for Acquired {
    fn deref_mut(&mut self) -> &mut Slot {
        self.slot.as_mut().expect("a slot until it is lent")
    }
}

impl Drop for Acquired {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.ring.state.lock().free.push(slot);
            self.ring.given_back.notify_one();
        }
    }
}

/// Bytes of blocks in pinned memory, from which they can be sent.
pub(crate) struct Lent {
    slot: Option<Slot>,
    ring: Arc<Ring>,
    n_bytes: usize,
}

impl Lent {
    /// Where other processes find the bytes, if they may read them.
    pub(crate) fn place(&self) -> Option<StagedPlace> {
        let slot = self.slot.as_ref().expect("until it is dropped");
        Some(self.ring.shared()?.place(slot.index))
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.slot.as_ref().expect("until it is dropped").payload(self.n_bytes)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut state = self.ring.state.lock();
        state.n_lent -= 1;
        state.free.extend(self.slot.take());
        self.ring.given_back.notify_one();
    }
}
