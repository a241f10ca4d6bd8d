//! Memory of the device, and pinned memory of the host that the device copies to and from. Sizes and addresses; no shapes.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, CudaStream, result};

use super::device::Device;
use super::error::{CudaError, During as _};
use super::shared_pinned::SharedPinned;

/// Bytes of device memory, freed on drop. Not from a pool, so that other processes can be given them.
pub(crate) struct DeviceBuffer {
    context: Arc<CudaContext>,
    /// Null where there are no bytes.
    address: CUdeviceptr,
    n_bytes: usize,
    /// Others may have it mapped, who must not see it freed.
    is_kept: AtomicBool,
}

impl DeviceBuffer {
    /// For the device's own use, of unspecified contents.
    ///
    /// # Errors
    /// Too little memory; `what` is then named.
    pub(super) fn new(device: &Device, what: &str, n_bytes: usize) -> Result<DeviceBuffer, CudaError> {
        let buffer = DeviceBuffer::common(device, what, n_bytes)?;
        device.own_bytes.fetch_add(n_bytes, Ordering::Relaxed);
        Ok(buffer)
    }

    /// The same for what instances have in common.
    ///
    /// # Errors
    /// As [`DeviceBuffer::new`].
    pub(super) fn common(device: &Device, what: &str, n_bytes: usize) -> Result<DeviceBuffer, CudaError> {
        let allocating = || format!("allocate {n_bytes} bytes of device memory for {what}");
        device.context.bind_to_thread().during(allocating)?;
        let address = match n_bytes {
            0 => 0,
            // SAFETY: more than no bytes.
            _ => match unsafe { result::malloc_sync(n_bytes) } {
                Ok(address) => address,
                Err(error) if error.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    return Err(CudaError::OutOfMemory {
                        what: what.to_owned(),
                        n_bytes,
                        free_bytes: device.free_bytes().unwrap_or(0),
                    });
                }
                Err(error) => return Err(error).during(allocating),
            },
        };
        Ok(DeviceBuffer {
            context: Arc::clone(&device.context),
            address,
            n_bytes,
            is_kept: AtomicBool::new(false),
        })
    }

    pub(super) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Leaves the memory for the end of the process.
    pub(super) fn keep(&self) {
        self.is_kept.store(true, Ordering::Relaxed);
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Copies to `offset` and returns when the bytes are there; nothing that is queued may use them meanwhile.
    pub(super) fn write_now(&mut self, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.assert_within(offset, bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let copying = || format!("copy {} bytes to the device", bytes.len());
        self.context.bind_to_thread().during(copying)?;
        // From memory that is not pinned the driver's synchronous copy may return while its last piece is on the way (the
        // driver's reference, "API synchronization behavior"), and our streams do not wait for the null stream it is on.
        // SAFETY: within the buffer, which is alive and ours; the null stream is always there.
        unsafe {
            result::memcpy_htod_sync(self.address + offset as u64, bytes).during(copying)?;
            result::stream::synchronize(std::ptr::null_mut()).during(copying)
        }
    }

    /// Queues zeros for a part that the caller alone uses.
    pub(super) fn zero_part(&self, offset: usize, n_bytes: usize, stream: &CudaStream) -> Result<(), CudaError> {
        self.assert_within(offset, n_bytes);
        if n_bytes == 0 {
            return Ok(());
        }
        let zeroing = || format!("zero {n_bytes} bytes of device memory");
        self.context.bind_to_thread().during(zeroing)?;
        // SAFETY: within the buffer.
        unsafe { result::memset_d8_async(self.address + offset as u64, 0, n_bytes, stream.cu_stream()) }.during(zeroing)
    }

    pub(super) fn assert_within(&self, offset: usize, n_bytes: usize) {
        assert!(
            offset <= self.n_bytes && n_bytes <= self.n_bytes - offset,
            "bytes {offset}..{offset} + {n_bytes} of a device buffer of {}",
            self.n_bytes
        );
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.address == 0 || self.is_kept.load(Ordering::Relaxed) {
            return;
        }
        // A context that has failed frees nothing, and everything once it goes.
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by `new`, freed once. The driver waits for queued work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked bytes of the host.
pub(crate) struct PinnedBuffer {
    bytes: NonNull<u8>,
    n_bytes: usize,
    memory: PinnedMemory,
}

enum PinnedMemory {
    /// The driver's, for this buffer alone.
    Own(Arc<CudaContext>),
    /// A part of what other processes may read.
    Within { _all: Arc<SharedPinned> },
}

// SAFETY: memory of the process like any other, owned by this handle alone.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// # Errors
    /// Not as much memory that can be locked.
    pub(super) fn new(context: &Arc<CudaContext>, n_bytes: usize) -> Result<PinnedBuffer, CudaError> {
        let allocating = || format!("lock {n_bytes} bytes of host memory");
        context.bind_to_thread().during(allocating)?;
        // SAFETY: plain flags; at least one byte, so that the address is one.
        let bytes = unsafe { result::malloc_host(n_bytes.max(1), 0) }.during(allocating)?;
        // SAFETY: as many bytes as were just allocated; they are given a value so that slices of them are.
        unsafe { std::ptr::write_bytes(bytes.cast::<u8>(), 0, n_bytes) };
        Ok(PinnedBuffer {
            bytes: NonNull::new(bytes.cast()).expect("the driver gave an address"),
            n_bytes,
            memory: PinnedMemory::Own(Arc::clone(context)),
        })
    }

    /// A part of `memory`, which it keeps.
    ///
    /// # Safety
    /// The bytes lie within that memory, have a value, and are no other buffer's.
    pub(super) unsafe fn within(memory: &Arc<SharedPinned>, bytes: NonNull<u8>, n_bytes: usize) -> PinnedBuffer {
        PinnedBuffer {
            bytes,
            n_bytes,
            memory: PinnedMemory::Within {
                _all: Arc::clone(memory),
            },
        }
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The bytes. No copy to them may be queued that has not been waited for.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised when made, owned, and written through `&mut self` or by copies that were waited for.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.n_bytes) }
    }

    /// The bytes. No copy to or from them may be queued that has not been waited for.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as `as_slice`, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.n_bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let PinnedMemory::Own(context) = &self.memory else {
            return;
        };
        let _ = context.bind_to_thread();
        // SAFETY: allocated by `new`, freed once; the driver waits for copies that use it.
        let _ = unsafe { result::free_host(self.bytes.as_ptr().cast()) };
    }
}
