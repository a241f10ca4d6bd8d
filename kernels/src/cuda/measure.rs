//! What a card can do: read and copy bandwidth of its memory, and the peak of cuBLASLt's products. For rooflines.

use cudarc::driver::result;
use cudarc::driver::sys::CUevent_flags;

use super::buffer::DeviceBuffer;
use super::error::{CudaError, During as _};
use super::function::Args;
use super::gemm::Product;
use super::launch;
use super::opened::Cuda;
use crate::error::KernelError;

/// Runs of which the best counts, after one that does not.
const N_RUNS: usize = 10;

/// How much is measured with.
#[derive(Clone, Copy, Debug)]
pub struct CudaMeasure {
    /// Bytes that are read, and copied: far above the card's caches.
    pub n_bytes: usize,
    /// Rows, columns and depth of the product.
    pub matrix_dim: usize,
}

impl Default for CudaMeasure {
    /// A fraction of a second on any card.
    fn default() -> CudaMeasure {
        CudaMeasure {
            n_bytes: 2 << 30,
            matrix_dim: 8192,
        }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaLimits {
    /// GB/s (1e9 bytes) of a kernel that only reads.
    pub read_gb_per_s: f64,
    /// GB/s of bytes copied within the card; each is read once and written once.
    pub copy_gb_per_s: f64,
    /// TFLOP/s (1e12) of one large product in the compute type, a multiply-add being two. `None` in deterministic mode, which
    /// does without cuBLASLt.
    pub product_tflop_per_s: Option<f64>,
}

impl Cuda {
    /// Measures the card; takes three buffers of the sizes asked for while it does.
    ///
    /// # Errors
    /// Too little memory, or no kernel to read with.
    pub fn measure(&self, sizes: CudaMeasure) -> Result<CudaLimits, KernelError> {
        let buffer = |n_bytes| DeviceBuffer::new(&self.device, "a measurement", n_bytes);
        let stream = &self.device.compute;
        let n_bytes = sizes.n_bytes / 16 * 16;
        let mut x = buffer(n_bytes)?;
        x.zero(stream)?;
        let copy = buffer(n_bytes)?;
        let out = buffer(4)?;
        let read = self.kernels.read_all()?;
        let args = Args::new()
            .address(out.address())
            .address(x.address())
            .u64(n_bytes as u64 / 16)
            .u32(1);
        let launch = launch::read_all(self.device.card.n_multiprocessors);
        // SAFETY: as many runs of 16 bytes as the buffer has; out has a word.
        let read_s = self.best_seconds(|| unsafe { read.launch(stream, launch, &args) })?;
        let copy_s = self.best_seconds(|| {
            // SAFETY: both buffers have as many bytes.
            let copied = unsafe { result::memcpy_dtod_async(copy.address(), x.address(), n_bytes, stream.cu_stream()) };
            copied.or_stop("copy within the device");
        })?;
        drop((x, copy));
        let gb_per_s = |seconds: f64| n_bytes as f64 / seconds / 1e9;
        Ok(CudaLimits {
            read_gb_per_s: gb_per_s(read_s),
            copy_gb_per_s: gb_per_s(copy_s),
            product_tflop_per_s: self.product_limit(sizes.matrix_dim)?,
        })
    }

    fn product_limit(&self, dim: usize) -> Result<Option<f64>, KernelError> {
        if self.kernels.linear.is_some() {
            return Ok(None);
        }
        let n_bytes = dim * dim * self.dtype.size();
        let mut operands = Vec::new();
        for _ in 0..3 {
            let mut buffer = DeviceBuffer::new(&self.device, "a measurement", n_bytes)?;
            buffer.zero(&self.device.compute)?;
            operands.push(buffer);
        }
        let product = Product {
            rows: dim,
            n_in: dim,
            n_out: dim,
            dtype: self.dtype,
            out_dtype: self.dtype,
            x: operands[0].address(),
            w: operands[1].address(),
            out: operands[2].address(),
        };
        // SAFETY: three square matrices of the compute type.
        let seconds = self.best_seconds(|| unsafe { self.product(product) })?;
        Ok(Some(2.0 * (dim as f64).powi(3) / seconds / 1e12))
    }

    fn best_seconds(&self, run: impl Fn()) -> Result<f64, CudaError> {
        let timing = || "time the device".to_owned();
        let event = || {
            self.device
                .context
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .during(timing)
        };
        let (before, after) = (event()?, event()?);
        let mut best_ms = f32::INFINITY;
        for run_idx in 0..=N_RUNS {
            before.record(&self.device.compute).during(timing)?;
            run();
            after.record(&self.device.compute).during(timing)?;
            let ms = before.elapsed_ms(&after).during(timing)?;
            if run_idx > 0 {
                best_ms = best_ms.min(ms);
            }
        }
        Ok(f64::from(best_ms) / 1e3)
    }
}
