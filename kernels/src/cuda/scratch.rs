//! Device memory that operators need between their kernels; grows with the largest step so far and is then used again.

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::error::During as _;
use super::plan::Plan;

/// All of one device.
#[derive(Default)]
pub(super) struct Scratch {
    /// f32 of what goes to the host.
    pub(super) widened: Growing,
    /// `[partial_rows, head_dim]` f32
    pub(super) partial_out: Growing,
    /// `[partial_rows, 2]` f32
    pub(super) partial_stats: Growing,
    pub(super) moe: super::moe::Scratch,
    /// The memory of plans; what it holds is of the last one that was made.
    pub(super) plan: Plan,
}

/// A buffer of at least the bytes that were last asked for.
#[derive(Default)]
pub(super) struct Growing(Option<DeviceBuffer>);

impl Growing {
    /// Its address. What it held is gone if it had to grow.
    pub(super) fn at_least(&mut self, device: &Device, n_bytes: usize) -> u64 {
        if n_bytes == 0 {
            return 0;
        }
        if let Some(buffer) = self.0.as_ref().filter(|buffer| buffer.n_bytes() >= n_bytes) {
            return buffer.address();
        }
        // Queued work may still use the old one.
        device.compute.synchronize().or_stop("wait for a buffer's last use");
        self.0 = None;
        let buffer = DeviceBuffer::new(device, "an operator's scratch", n_bytes.next_power_of_two())
            .unwrap_or_else(|error| panic!("CUDA: {error}"));
        self.0.insert(buffer).address()
    }
}
