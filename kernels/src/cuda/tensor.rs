//! Activations, weights and tables as the CUDA device holds them. No arithmetic.

use std::cell::{Cell, OnceCell};
use std::sync::Arc;

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::CudaError;
use crate::layout::DType;

/// An activation, `[rows, cols]` row major in device memory.
pub struct CudaTensor {
    pub(super) buffer: DeviceBuffer,
    pub(super) dtype: DType,
    rows: usize,
    cols: usize,
    max_rows: usize,
    /// What the host was last given, until the device writes again.
    pub(super) host: OnceCell<PinnedBuffer>,
    /// Memory for the next time, of a tensor whose every value goes to the host.
    pub(super) spare: Cell<Option<PinnedBuffer>>,
}

impl CudaTensor {
    pub(super) fn new(device: &Device, dtype: DType, max_rows: usize, cols: usize) -> Result<CudaTensor, CudaError> {
        let n_bytes = max_rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.size()))
            .expect("tensor size fits in usize");
        Ok(CudaTensor {
            buffer: DeviceBuffer::new(device, "activations", n_bytes)?,
            dtype,
            rows: 0,
            cols,
            max_rows,
            host: OnceCell::new(),
            spare: Cell::new(None),
        })
    }

    /// With memory for what the host is given.
    pub(super) fn for_host(
        device: &Device,
        dtype: DType,
        max_rows: usize,
        cols: usize,
    ) -> Result<CudaTensor, CudaError> {
        let tensor = CudaTensor::new(device, dtype, max_rows, cols)?;
        let host = PinnedBuffer::new(&device.context, max_rows * cols * size_of::<f32>())?;
        tensor.spare.set(Some(host));
        Ok(tensor)
    }

    /// Rows in use.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that there is memory for.
    pub(super) fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn n_elements(&self) -> usize {
        self.rows * self.cols
    }

    /// Where it is read.
    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Where it is changed in place.
    pub(super) fn address_mut(&mut self) -> u64 {
        if let Some(stale) = self.host.take() {
            self.spare.set(Some(stale));
        }
        self.buffer.address()
    }

    /// Sets the shape that `op` is about to write; where to.
    pub(super) fn resize(&mut self, op: &str, rows: usize, cols: usize) -> u64 {
        assert!(
            cols == self.cols && rows <= self.max_rows,
            "{op}: output [{rows}, {cols}] does not fit a tensor of [{} at most, {}]",
            self.max_rows,
            self.cols
        );
        self.rows = rows;
        self.address_mut()
    }
}

/// A weight matrix `[n_out, n_in]`, row major.
#[derive(Clone)]
pub struct CudaMatrix {
    pub(super) buffer: Arc<DeviceBuffer>,
    pub(super) n_out: usize,
    pub(super) n_in: usize,
}

/// A parameter vector, f32.
#[derive(Clone)]
pub struct CudaVector {
    pub(super) buffer: Arc<DeviceBuffer>,
    pub(super) len: usize,
}

/// Cosines and sines by position, each `[variants, max_positions, half_dim]` f32.
#[derive(Clone)]
pub struct CudaRope {
    pub(super) cos: Arc<DeviceBuffer>,
    pub(super) sin: Arc<DeviceBuffer>,
    pub(super) half_dim: usize,
    pub(super) max_positions: usize,
    pub(super) n_variants: usize,
}

/// All experts of one layer.
pub struct CudaExperts {
    pub(super) experts: Vec<Expert>,
    /// Device arrays of the experts' addresses, `[n_experts]` each; biases are absent of all or none.
    pub(super) gate_up: DeviceBuffer,
    pub(super) gate_up_bias: Option<DeviceBuffer>,
    pub(super) down: DeviceBuffer,
    pub(super) down_bias: Option<DeviceBuffer>,
}

/// One expert's weights, which the arrays point to.
pub(super) struct Expert {
    /// `[2 * ffn, hidden]`
    pub(super) gate_up: CudaMatrix,
    pub(super) gate_up_bias: Option<CudaVector>,
    /// `[hidden, ffn]`
    pub(super) down: CudaMatrix,
    pub(super) down_bias: Option<CudaVector>,
}
