//! Pinned memory of the host, and as much of the device, through which blocks of KV travel a frame at a time. Bounded: a
//! ring has so many slots from the start and never more. What is copied, and when, is `kv`'s business.

use std::sync::Arc;

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;
use parking_lot::{Condvar, Mutex};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};

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
}

struct State {
    free: Vec<Slot>,
    n_lent: usize,
}

/// A list of blocks, and behind it their bytes: pinned on the host, and as much on the device.
pub(super) struct Slot {
    host: PinnedBuffer,
    device: DeviceBuffer,
    /// Behind the slot's last work. Waiting for it sleeps, as it may take as long as a layer is computed.
    pub(super) done: CudaEvent,
}

impl Ring {
    /// # Errors
    /// Too little memory of either kind.
    pub(super) fn new(
        device: &Device,
        n_slots: usize,
        max_lent: usize,
        payload_bytes: usize,
    ) -> Result<Arc<Ring>, CudaError> {
        assert!(
            max_lent < n_slots,
            "somebody must be able to copy while all others are lent"
        );
        let slot = |_| {
            let n_bytes = LIST_BYTES + payload_bytes;
            let event = device.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC));
            Ok(Slot {
                host: PinnedBuffer::new(&device.context, n_bytes)?,
                device: DeviceBuffer::new(device, "the staging of KV", n_bytes)?,
                done: event.during(|| "create an event".to_owned())?,
            })
        };
        let free = (0..n_slots).map(slot).collect::<Result<Vec<Slot>, CudaError>>()?;
        Ok(Arc::new(Ring {
            state: Mutex::new(State { free, n_lent: 0 }),
            given_back: Condvar::new(),
            payload_bytes,
            max_lent,
        }))
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
        bytemuck::cast_slice_mut(&mut self.host.as_mut_slice()[..n * size_of::<u32>()])
    }

    pub(super) fn payload(&self, n_bytes: usize) -> &[u8] {
        &self.host.as_slice()[LIST_BYTES..][..n_bytes]
    }

    pub(super) fn payload_mut(&mut self, n_bytes: usize) -> &mut [u8] {
        &mut self.host.as_mut_slice()[LIST_BYTES..][..n_bytes]
    }
}

/// A slot in somebody's hands, which goes back when dropped. No work that uses it may be queued then.
pub(super) struct Acquired {
    slot: Option<Slot>,
    ring: Arc<Ring>,
}

impl Acquired {
    /// Keeps the slot with its first `n_bytes` of payload for as long as they are needed; or gives it back, if too many are
    /// kept already.
    pub(super) fn lend(mut self, n_bytes: usize) -> Result<Lent, Acquired> {
        let mut state = self.ring.state.lock();
        if state.n_lent == self.ring.max_lent {
            drop(state);
            return Err(self);
        }
        state.n_lent += 1;
        drop(state);
        Ok(Lent {
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
