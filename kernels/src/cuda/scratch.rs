//! Memory that operators need between their kernels. Set aside for the largest step once a model's limits are known; before
//! that, as for operators that are tried one by one, it grows with the largest use so far.

use std::sync::Arc;

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};
use super::limits::StepLimits;
use super::plan::{Plan, PlanSize};
use crate::layout::DType;

/// All of one device.
#[derive(Default)]
pub(super) struct Scratch {
    /// f32 of what goes to the host.
    pub(super) widened: Growing,
    /// The same on the host, of tensors that have no memory of their own there.
    pub(super) landing: Landing,
    /// `[partial_rows, head_dim]` f32
    pub(super) partial_out: Growing,
    /// `[partial_rows, 2]` f32
    pub(super) partial_stats: Growing,
    pub(super) moe: super::moe::Scratch,
    /// The memory of plans; what it holds is of the last one that was made.
    pub(super) plan: Plan,
}

impl Scratch {
    /// Takes what steps within the limits need, and no more from then on.
    pub(super) fn reserve(
        &mut self,
        device: &Arc<Device>,
        limits: &StepLimits,
        plan: PlanSize,
        dtype: DType,
    ) -> Result<(), CudaError> {
        let n_rows = plan.n_partial_rows as usize;
        self.plan = Plan::bounded(plan.n_partial_rows);
        self.partial_out
            .reserve(device, n_rows * limits.head_dim * size_of::<f32>())?;
        self.partial_stats.reserve(device, n_rows * 2 * size_of::<f32>())?;
        let fetched_bytes = limits.n_fetched * size_of::<f32>();
        self.landing.reserve(device, fetched_bytes)?;
        if dtype != DType::F32 {
            self.widened.reserve(device, fetched_bytes)?;
        }
        match limits.experts {
            Some(experts) => self.moe.reserve(device, limits.n_rows, experts, dtype),
            None => Ok(()),
        }
    }
}

/// A buffer of at least the bytes that were last asked for.
#[derive(Default)]
pub(super) struct Growing {
    buffer: Option<DeviceBuffer>,
    is_reserved: bool,
}

impl Growing {
    pub(super) fn reserve(&mut self, device: &Device, n_bytes: usize) -> Result<(), CudaError> {
        self.buffer = None;
        self.buffer = Some(DeviceBuffer::new(device, "what operators need", n_bytes)?);
        self.is_reserved = true;
        Ok(())
    }

    /// Its address. What it held is gone if it had to grow.
    pub(super) fn at_least(&mut self, device: &Device, n_bytes: usize) -> u64 {
        if n_bytes == 0 {
            return 0;
        }
        let n_there = self.buffer.as_ref().map_or(0, DeviceBuffer::n_bytes);
        if let Some(buffer) = self.buffer.as_ref().filter(|_| n_there >= n_bytes) {
            return buffer.address();
        }
        assert_unreserved(self.is_reserved, n_bytes, n_there);
        // Queued work may still use the old one.
        device.compute.synchronize().or_stop("wait for a buffer's last use");
        self.buffer = None;
        let buffer = DeviceBuffer::new(device, "what operators need", n_bytes.next_power_of_two())
            .unwrap_or_else(|error| panic!("CUDA: {error}"));
        self.buffer.insert(buffer).address()
    }
}

/// The same on the host, pinned.
#[derive(Default)]
pub(super) struct Landing {
    buffer: Option<PinnedBuffer>,
    is_reserved: bool,
}

impl Landing {
    fn reserve(&mut self, device: &Device, n_bytes: usize) -> Result<(), CudaError> {
        self.buffer = Some(PinnedBuffer::new(&device.context, n_bytes)?);
        self.is_reserved = true;
        Ok(())
    }

    /// Of at least one byte.
    pub(super) fn at_least(&mut self, device: &Device, n_bytes: usize) -> &mut PinnedBuffer {
        let n_there = self.buffer.as_ref().map_or(0, PinnedBuffer::n_bytes);
        if n_there < n_bytes {
            assert_unreserved(self.is_reserved, n_bytes, n_there);
            let buffer = PinnedBuffer::new(&device.context, n_bytes.next_power_of_two());
            self.buffer = Some(buffer.unwrap_or_else(|error| panic!("CUDA: {error}")));
        }
        self.buffer.as_mut().expect("it has some bytes")
    }
}

fn assert_unreserved(is_reserved: bool, n_bytes: usize, n_there: usize) {
    assert!(
        !is_reserved,
        "a step needs {n_bytes} bytes between its kernels, {n_there} were set aside"
    );
}
