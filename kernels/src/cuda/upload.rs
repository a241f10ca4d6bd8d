//! Small arrays of one step on their way to the device: ids, positions, block tables, plans. Pinned on the host, copied in
//! the stream's order, and used again two steps later, so that the host prepares a step while the one before it runs.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, result};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};

/// Room that a step starts with; one that needs more gets it, and keeps it.
const FIRST_BYTES: usize = 1 << 20;
/// Everything a kernel reads begins as a buffer of its own would.
const ALIGNMENT: usize = 256;

/// Memory of the steps' arrays: of the step that runs and of the one that is prepared.
pub(super) struct Uploads {
    device: Arc<Device>,
    segments: [Segment; 2],
    current: usize,
}

#[derive(Default)]
struct Segment {
    /// One, once a step of every size has been seen.
    chunks: Vec<Chunk>,
    /// Behind the last work that reads the segment.
    done: Option<CudaEvent>,
}

struct Chunk {
    host: PinnedBuffer,
    device: DeviceBuffer,
    n_used: usize,
}

impl Uploads {
    pub(super) fn new(device: Arc<Device>) -> Uploads {
        Uploads {
            device,
            segments: Default::default(),
            current: 0,
        }
    }

    /// What was uploaded since the last call serves no work that is queued from now on. Waits for the step before the last.
    pub(super) fn begin_step(&mut self) {
        let event = self.device.context.new_event(None).or_stop("create an event");
        event.record(&self.device.compute).or_stop("record an event");
        self.segments[self.current].done = Some(event);
        self.current = 1 - self.current;
        let segment = &mut self.segments[self.current];
        if let Some(done) = segment.done.take() {
            done.synchronize().or_stop("wait for a step");
        }
        if segment.chunks.len() > 1 {
            let n_bytes = segment.chunks.iter().map(|chunk| chunk.host.n_bytes()).sum();
            segment.chunks.clear();
            segment.chunks.push(Chunk::new(&self.device, n_bytes));
        }
        segment.chunks.iter_mut().for_each(|chunk| chunk.n_used = 0);
    }

    /// Queues the copy of `values` to the device; where they will be until the step after the next begins.
    pub(super) fn put<T: Pod>(&mut self, values: &[T]) -> u64 {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let chunks = &mut self.segments[self.current].chunks;
        if chunks.last().is_none_or(|chunk| chunk.n_free() < bytes.len()) {
            let n_bytes = bytes.len().next_power_of_two().max(FIRST_BYTES);
            chunks.push(Chunk::new(&self.device, n_bytes));
        }
        let chunk = chunks.last_mut().expect("there is one with room");
        let at = chunk.n_used;
        chunk.n_used = (at + bytes.len()).next_multiple_of(ALIGNMENT);
        let address = chunk.device.address() + at as u64;
        let staged = &mut chunk.host.as_mut_slice()[at..][..bytes.len()];
        staged.copy_from_slice(bytes);
        if !staged.is_empty() {
            let uploading = "copy a step's tables to the device";
            self.device.context.bind_to_thread().or_stop(uploading);
            // SAFETY: within the chunk's two buffers, which are as long as each other. The host's part is not written again
            // before `begin_step` has waited for this.
            unsafe { result::memcpy_htod_async(address, staged, self.device.compute.cu_stream()) }.or_stop(uploading);
        }
        address
    }
}

impl Chunk {
    fn new(device: &Device, n_bytes: usize) -> Chunk {
        let stop = |error: CudaError| -> ! { panic!("CUDA: {error}") };
        Chunk {
            host: PinnedBuffer::new(&device.context, n_bytes).unwrap_or_else(|error| stop(error)),
            device: DeviceBuffer::new(device, "a step's tables", n_bytes).unwrap_or_else(|error| stop(error)),
            n_used: 0,
        }
    }

    fn n_free(&self) -> usize {
        self.host.n_bytes().saturating_sub(self.n_used)
    }
}
