//! KV memory on the device: its planes, and the way of single blocks to and from the host, on the copy stream through pinned
//! memory, from any thread. Which block may be read or written is `kv`'s business.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, result};
use parking_lot::Mutex;

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};

/// The moment when everything that the compute stream had been given was done.
#[derive(Clone)]
pub(crate) struct Fence(Arc<CudaEvent>);

/// K and V of all layers, `[n_layers][K, V][n_blocks]` parts, as on the host.
pub(crate) struct DeviceKv {
    planes: DeviceBuffer,
    /// Each as large as K and V of one (layer, block); as many as copies ran at once.
    staging: Mutex<Vec<PinnedBuffer>>,
    device: Arc<Device>,
}

impl DeviceKv {
    pub(super) fn new(device: Arc<Device>, n_bytes: usize) -> Result<DeviceKv, CudaError> {
        let mut planes = DeviceBuffer::new(&device, "the KV cache", n_bytes)?;
        // What attention reads past a sequence's end is masked, and not-a-number times nothing is not nothing.
        planes.zero(&device.compute)?;
        Ok(DeviceKv {
            planes,
            staging: Mutex::default(),
            device,
        })
    }

    /// Address of a byte of the planes.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.planes.assert_within(offset, 0);
        self.planes.address() + offset as u64
    }

    /// What the compute stream has been given so far; step thread only.
    pub(crate) fn fence(&self) -> Fence {
        Fence(self.device.fence())
    }

    /// Copies parts at `offsets` to `out`, one after the other, once `fence` is passed.
    pub(crate) fn read(&self, fence: &Fence, offsets: &[usize], out: &mut [u8]) {
        let part_bytes = out.len() / offsets.len();
        let mut staging = self.staging(out.len());
        let stream = &self.device.copy;
        stream.wait(&fence.0).or_stop("wait for the KV of a layer");
        for (part, &offset) in staging.as_mut_slice()[..out.len()]
            .chunks_exact_mut(part_bytes)
            .zip(offsets)
        {
            self.planes.assert_within(offset, part_bytes);
            let from = self.planes.address() + offset as u64;
            // SAFETY: within the planes and within the staging buffer, which is ours until the copy is waited for below.
            unsafe { result::memcpy_dtoh_async(part, from, stream.cu_stream()) }.or_stop("copy KV to the host");
        }
        self.finish("copy KV to the host");
        out.copy_from_slice(&staging.as_slice()[..out.len()]);
        self.staging.lock().push(staging);
    }

    /// Copies `parts` to `offsets` once `fence` is passed; they are there on return.
    pub(crate) fn write(&self, fence: &Fence, parts: &[(usize, &[u8])]) {
        let n_bytes = parts.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut staging = self.staging(n_bytes);
        let stream = &self.device.copy;
        stream.wait(&fence.0).or_stop("wait for the last readers of a block");
        let mut rest = &mut staging.as_mut_slice()[..n_bytes];
        for &(offset, bytes) in parts {
            let (staged, after) = rest.split_at_mut(bytes.len());
            rest = after;
            staged.copy_from_slice(bytes);
            self.planes.assert_within(offset, bytes.len());
            let to = self.planes.address() + offset as u64;
            // SAFETY: as in `read`, the other way.
            unsafe { result::memcpy_htod_async(to, staged, stream.cu_stream()) }.or_stop("copy KV to the device");
        }
        self.finish("copy KV to the device");
        self.staging.lock().push(staging);
    }

    /// Queues copies of parts, `(from, to)` each, behind what computes.
    pub(crate) fn copy_parts(&self, parts: impl IntoIterator<Item = (usize, usize)>, part_bytes: usize) {
        let copying = "copy a KV block";
        self.device.context.bind_to_thread().or_stop(copying);
        for (from, to) in parts {
            self.planes.assert_within(from, part_bytes);
            self.planes.assert_within(to, part_bytes);
            let [from, to] = [from, to].map(|offset| self.planes.address() + offset as u64);
            // SAFETY: both within the planes, and different parts.
            unsafe { result::memcpy_dtod_async(to, from, part_bytes, self.device.compute.cu_stream()) }
                .or_stop(copying);
        }
    }

    fn staging(&self, n_bytes: usize) -> PinnedBuffer {
        let found = {
            let mut free = self.staging.lock();
            free.iter()
                .position(|buffer| buffer.n_bytes() >= n_bytes)
                .map(|idx| free.swap_remove(idx))
        };
        found
            .map_or_else(|| PinnedBuffer::new(&self.device.context, n_bytes), Ok)
            .unwrap_or_else(|error| panic!("CUDA: {error}"))
    }

    /// Waits for this thread's copies, and perhaps for others' before them.
    fn finish(&self, action: &str) {
        let event = self.device.context.new_event(None).or_stop(action);
        event.record(&self.device.copy).or_stop(action);
        event.synchronize().or_stop(action);
    }
}
