//! Small arrays of one step on their way to the device: ids, positions, block tables, plans. Pinned on the host, copied in
//! the stream's order, and used again two steps later, so that the host prepares a step while the one before it runs. Memory
//! is set aside for the largest step once a model's limits are known, and grows before that.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, result};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};

/// Room that a step starts with where nothing was set aside; one that needs more gets it, and keeps it.
const FIRST_BYTES: usize = 1 << 20;
/// Everything a kernel reads begins as a buffer of its own would.
pub(super) const ALIGNMENT: usize = 256;

/// Memory of the steps' arrays: of the step that runs and of the one that is prepared.
pub(super) struct Uploads {
    device: Arc<Device>,
    segments: [Segment; 2],
    current: usize,
    is_reserved: bool,
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
            is_reserved: false,
        }
    }

    /// Takes what a step needs at most, and no more from then on.
    pub(super) fn reserve(&mut self, n_bytes: usize) -> Result<(), CudaError> {
        for segment in &mut self.segments {
            segment.chunks.clear();
            segment.chunks.push(Chunk::new(&self.device, n_bytes)?);
            segment.done = Some(
                self.device
                    .context
                    .new_event(None)
                    .during(|| "create an event".to_owned())?,
            );
        }
        self.is_reserved = true;
        Ok(())
    }

    /// What was uploaded since the last call serves no work that is queued from now on. Waits for the step before the last.
    pub(super) fn begin_step(&mut self) {
        let event = || self.device.context.new_event(None).or_stop("create an event");
        let done = self.segments[self.current].done.get_or_insert_with(event);
        done.record(&self.device.compute).or_stop("record an event");
        self.current = 1 - self.current;
        let segment = &mut self.segments[self.current];
        if let Some(done) = &segment.done {
            done.synchronize().or_stop("wait for a step");
        }
        if segment.chunks.len() > 1 {
            let n_bytes = segment.chunks.iter().map(|chunk| chunk.host.n_bytes()).sum();
            segment.chunks.clear();
            segment.chunks.push(Chunk::or_stop(&self.device, n_bytes));
        }
        segment.chunks.iter_mut().for_each(|chunk| chunk.n_used = 0);
    }

    /// Has `fill` fill up to `n_bytes` for the device's memory at `to`, and queues the copy of as many as it says; whether it
    /// said any. The memory is the caller's, and as large.
    pub(super) fn fill(&mut self, to: u64, n_bytes: usize, fill: impl FnOnce(&mut [u8]) -> Option<usize>) -> bool {
        let chunk = self.segments[self.current].chunks.last_mut();
        let chunk = chunk.filter(|chunk| chunk.n_free() >= n_bytes);
        let chunk =
            chunk.unwrap_or_else(|| panic!("a recorded step's tables take {n_bytes} bytes, more than were set aside"));
        let staged = &mut chunk.host.as_mut_slice()[chunk.n_used..][..n_bytes];
        let Some(n_filled) = fill(staged) else { return false };
        queue_copy(&self.device, to, &staged[..n_filled]);
        chunk.n_used = (chunk.n_used + n_filled).next_multiple_of(ALIGNMENT);
        true
    }

    /// Queues the copy of `values` to the device; where they will be until the step after the next begins.
    pub(super) fn put<T: Pod>(&mut self, values: &[T]) -> u64 {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let n_bytes = bytes.len();
        let chunks = &mut self.segments[self.current].chunks;
        if chunks.last().is_none_or(|chunk| chunk.n_free() < n_bytes) {
            assert!(
                !self.is_reserved,
                "a step uploads {} bytes and {n_bytes} more, {} were set aside",
                chunks[0].n_used,
                chunks[0].host.n_bytes()
            );
            let n_chunk_bytes = n_bytes.next_power_of_two().max(FIRST_BYTES);
            chunks.push(Chunk::or_stop(&self.device, n_chunk_bytes));
        }
        let chunk = chunks.last_mut().expect("there is one with room");
        let at = chunk.n_used;
        chunk.n_used = (at + n_bytes).next_multiple_of(ALIGNMENT);
        let address = chunk.device.address() + at as u64;
        let staged = &mut chunk.host.as_mut_slice()[at..][..n_bytes];
        staged.copy_from_slice(bytes);
        if !staged.is_empty() {
            queue_copy(&self.device, address, staged);
        }
        address
    }
}

/// To memory of the device that has as many bytes, from pinned memory that is not written again before
/// [`Uploads::begin_step`] has waited for this.
fn queue_copy(device: &Device, to: u64, staged: &[u8]) {
    let uploading = "copy a step's tables to the device";
    device.context.bind_to_thread().or_stop(uploading);
    // SAFETY: the callers' promise, who are in this file.
    unsafe { result::memcpy_htod_async(to, staged, device.compute.cu_stream()) }.or_stop(uploading);
}

impl Chunk {
    fn new(device: &Device, n_bytes: usize) -> Result<Chunk, CudaError> {
        Ok(Chunk {
            host: PinnedBuffer::new(&device.context, n_bytes)?,
            device: DeviceBuffer::new(device, "a step's tables", n_bytes)?,
            n_used: 0,
        })
    }

    fn or_stop(device: &Device, n_bytes: usize) -> Chunk {
        Chunk::new(device, n_bytes).unwrap_or_else(|error| panic!("CUDA: {error}"))
    }

    fn n_free(&self) -> usize {
        self.host.n_bytes().saturating_sub(self.n_used)
    }
}
