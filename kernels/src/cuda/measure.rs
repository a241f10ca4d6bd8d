//! What a card can do, and what work takes on it, by the card's own clock: bandwidths of its memory and of its way to the host,
//! the peak of cuBLASLt's products, and the time of whatever else is queued. For rooflines; knows no operators.

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, result};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::error::{CudaError, During as _};
use super::function::{Args, Function};
use super::gemm::Product;
use super::launch;
use super::opened::Cuda;
use crate::error::KernelError;
use crate::layout::DType;

/// Runs of which the best counts, after one that does not.
const N_RUNS: usize = 10;

/// Read before each run: several times the largest cache of a card, and some 50 us of work on the fastest, so that caches are
/// cold and what is timed is queued before the card comes to it.
const LEAD_BYTES: usize = 256 << 20;

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

/// What was measured, of random numbers: zeros cost a card less power, so it computes faster on them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaLimits {
    /// GB/s (1e9 bytes) of a kernel that only reads.
    pub read_gb_per_s: f64,
    /// GB/s of bytes copied within the card; each is read once and written once.
    pub copy_gb_per_s: f64,
    /// GB/s to pinned memory of the host.
    pub to_host_gb_per_s: f64,
    /// GB/s from pinned memory of the host.
    pub from_host_gb_per_s: f64,
    /// TFLOP/s (1e12) of one large product in the compute type, a multiply-add being two. `None` in deterministic mode, which
    /// does without cuBLASLt.
    pub product_tflop_per_s: Option<f64>,
}

/// Times work on the compute stream by the device's own clock, with cold caches and without the host's share.
pub struct CudaTimer<'a> {
    cuda: &'a Cuda,
    read: Function,
    /// What is read before each run, then as many random numbers as are read or copied.
    bytes: DeviceBuffer,
    copy: DeviceBuffer,
    sum: DeviceBuffer,
    lead_bytes: usize,
    before: CudaEvent,
    after: CudaEvent,
}

impl Cuda {
    /// Measures the card; takes buffers of the sizes asked for while it does.
    ///
    /// # Errors
    /// Too little memory, or no kernel to read with.
    pub fn measure(&self, sizes: CudaMeasure) -> Result<CudaLimits, KernelError> {
        let timer = self.timer(sizes.n_bytes, sizes.n_bytes)?;
        let n_bytes = sizes.n_bytes / 16 * 16;
        let gb_per_s = |seconds: f64| n_bytes as f64 / seconds / 1e9;
        let mut limits = CudaLimits {
            read_gb_per_s: gb_per_s(best(|| timer.read_seconds(n_bytes))?),
            copy_gb_per_s: gb_per_s(best(|| timer.copy_seconds(n_bytes))?),
            to_host_gb_per_s: 0.0,
            from_host_gb_per_s: 0.0,
            product_tflop_per_s: None,
        };
        // The way to the host is a hundredth as wide.
        let n_bytes = (n_bytes / 16).max(16);
        let gb_per_s = |seconds: f64| n_bytes as f64 / seconds / 1e9;
        let mut host = timer.host_bytes(n_bytes)?;
        limits.to_host_gb_per_s = gb_per_s(best(|| timer.to_host_seconds(&mut host))?);
        limits.from_host_gb_per_s = gb_per_s(best(|| timer.from_host_seconds(&host))?);
        drop(timer);
        if self.kernels.linear.is_none() {
            limits.product_tflop_per_s = Some(self.product_tflop_per_s(sizes.matrix_dim)?);
        }
        Ok(limits)
    }

    /// A timer that can read up to `n_read_bytes` and copy up to `n_copied_bytes`, and has memory for both.
    ///
    /// # Errors
    /// Too little of it, or no kernel to read with.
    pub fn timer(&self, n_read_bytes: usize, n_copied_bytes: usize) -> Result<CudaTimer<'_>, KernelError> {
        let most_bytes = n_read_bytes.max(n_copied_bytes);
        let lead_bytes = most_bytes.min(LEAD_BYTES) / 16 * 16;
        let buffer = |n_bytes| DeviceBuffer::new(&self.device, "a measurement", n_bytes);
        Ok(CudaTimer {
            cuda: self,
            read: self.kernels.read_all()?,
            bytes: self.random_buffer(lead_bytes + most_bytes)?,
            copy: buffer(n_copied_bytes)?,
            sum: buffer(4)?,
            lead_bytes,
            before: self.timed_event()?,
            after: self.timed_event()?,
        })
    }

    /// The rate of a square product by cuBLASLt.
    fn product_tflop_per_s(&self, dim: usize) -> Result<f64, KernelError> {
        let timer = self.timer(LEAD_BYTES.min(dim * dim * 16), 0)?;
        let n_bytes = dim * dim * self.dtype.size();
        let (x, w) = (self.random_buffer(n_bytes)?, self.random_buffer(n_bytes)?);
        let out = DeviceBuffer::new(&self.device, "a measurement", n_bytes)?;
        let product = Product {
            rows: dim,
            n_in: dim,
            n_out: dim,
            dtype: self.dtype,
            out_dtype: self.dtype,
            x: x.address(),
            w: w.address(),
            out: out.address(),
        };
        // SAFETY: three square matrices of the compute type.
        let seconds = best(|| timer.seconds(|| unsafe { self.product(product) }))?;
        Ok(2.0 * (dim as f64).powi(3) / seconds / 1e12)
    }

    /// Random numbers of the compute type within -1 and 1.
    fn random_buffer(&self, n_bytes: usize) -> Result<DeviceBuffer, KernelError> {
        // Of no length that a row has, so that rows differ.
        const N_DIFFERENT: usize = 1_000_003;
        let mut buffer = DeviceBuffer::new(&self.device, "a measurement", n_bytes)?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        };
        let mut first = Vec::with_capacity(N_DIFFERENT * self.dtype.size());
        for _ in 0..N_DIFFERENT.min(n_bytes.div_ceil(self.dtype.size())) {
            match self.dtype {
                DType::F32 => first.extend_from_slice(&next().to_le_bytes()),
                DType::F16 => first.extend_from_slice(&half::f16::from_f32(next()).to_le_bytes()),
                DType::Bf16 => first.extend_from_slice(&half::bf16::from_f32(next()).to_le_bytes()),
            }
        }
        first.truncate(n_bytes);
        buffer.write_now(0, &first)?;
        let mut n_filled = first.len();
        while n_filled < n_bytes {
            let n_more = n_filled.min(n_bytes - n_filled);
            let (from, to) = (buffer.address(), buffer.address() + n_filled as u64);
            // SAFETY: both within the buffer, and apart.
            unsafe { result::memcpy_dtod_async(to, from, n_more, self.device.compute.cu_stream()) }
                .during(|| "fill a buffer".to_owned())?;
            n_filled += n_more;
        }
        Ok(buffer)
    }

    fn timed_event(&self) -> Result<CudaEvent, CudaError> {
        self.device
            .context
            .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .during(timing)
    }
}

impl CudaTimer<'_> {
    /// Seconds that the device spends on what `queue` queues, from an idle device with cold caches. What is done for the first
    /// time, such as choosing a product's algorithm, must have been done before.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn seconds(&self, queue: impl FnOnce()) -> Result<f64, KernelError> {
        let stream = &self.cuda.device.compute;
        self.queue_read(0, self.lead_bytes);
        self.before.record(stream).during(timing)?;
        queue();
        self.after.record(stream).during(timing)?;
        let ms = self.before.elapsed_ms(&self.after).during(timing)?;
        Ok(f64::from(ms) / 1e3)
    }

    /// Seconds of a kernel that only reads so many bytes.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn read_seconds(&self, n_bytes: usize) -> Result<f64, KernelError> {
        self.bytes.assert_within(self.lead_bytes, n_bytes);
        self.seconds(|| self.queue_read(self.lead_bytes, n_bytes))
    }

    /// Seconds of a copy of so many bytes within the device.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn copy_seconds(&self, n_bytes: usize) -> Result<f64, KernelError> {
        self.bytes.assert_within(self.lead_bytes, n_bytes);
        self.copy.assert_within(0, n_bytes);
        let (from, to) = (self.bytes.address() + self.lead_bytes as u64, self.copy.address());
        self.seconds(|| {
            // SAFETY: both buffers have as many bytes.
            unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.cuda.device.compute.cu_stream()) }
                .or_stop("copy within the device");
        })
    }

    /// Pinned memory of the host, to copy to and from.
    ///
    /// # Errors
    /// Not as much memory that can be locked.
    pub fn host_bytes(&self, n_bytes: usize) -> Result<HostBytes, KernelError> {
        Ok(HostBytes(PinnedBuffer::new(&self.cuda.device.context, n_bytes)?))
    }

    /// Seconds of one copy from the device.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn to_host_seconds(&self, host: &mut HostBytes) -> Result<f64, KernelError> {
        let to = host.0.as_mut_slice();
        self.bytes.assert_within(self.lead_bytes, to.len());
        let from = self.bytes.address() + self.lead_bytes as u64;
        self.seconds(|| {
            // SAFETY: as many bytes in both, which stay until the copy is waited for.
            unsafe { result::memcpy_dtoh_async(to, from, self.cuda.device.compute.cu_stream()) }
                .or_stop("copy to the host");
        })
    }

    /// Seconds of one copy to the device.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn from_host_seconds(&self, host: &HostBytes) -> Result<f64, KernelError> {
        let from = host.0.as_slice();
        self.copy.assert_within(0, from.len());
        self.seconds(|| {
            // SAFETY: as many bytes in both, which stay until the copy is waited for.
            unsafe { result::memcpy_htod_async(self.copy.address(), from, self.cuda.device.compute.cu_stream()) }
                .or_stop("copy from the host");
        })
    }

    fn queue_read(&self, offset: usize, n_bytes: usize) {
        let args = Args::new()
            .address(self.sum.address())
            .address(self.bytes.address() + offset as u64)
            .u64(n_bytes as u64 / 16)
            .u32(1);
        let launch = launch::read_all(self.cuda.device.n_multiprocessors);
        // SAFETY: as many runs of 16 bytes as the buffer has there; the sum has a word.
        unsafe { self.read.launch(&self.cuda.device.compute, launch, &args) };
    }
}

/// Pinned memory of the host.
pub struct HostBytes(PinnedBuffer);

fn timing() -> String {
    "time the device".to_owned()
}

fn best(mut run: impl FnMut() -> Result<f64, KernelError>) -> Result<f64, KernelError> {
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..N_RUNS {
        best = best.min(run()?);
    }
    Ok(best)
}
