//! The device as one step thread has it: opened, with its kernels, its cache, and what operators share. The operators are in
//! `backend`, `attention`, `rope` and `moe`.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::result;

use super::batch::DeviceBatch;
use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::{CudaError, During as _};
use super::function::Args;
use super::gemm::{Gemm, Product};
use super::graphs::{DecodeGraphs, Recording};
use super::images::{ImageFolders, ImageOrigin};
use super::kernels::Kernels;
use super::kv::{DeviceKv, Staging};
use super::launch;
use super::limits::StepLimits;
use super::place::{CudaKvArena, CudaPlace};
use super::probe::CudaCard;
use super::scratch::Scratch;
use super::tensor::{CudaMatrix, CudaTensor};
use super::upload::Uploads;
use crate::backend::{Activation, RaggedBatch};
use crate::error::KernelError;
use crate::kv::KvCache;
use crate::layout::{DType, KvLayout};

/// Whether a row's bits may depend on what else is in the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CudaMode {
    /// They may: products by cuBLASLt, attention cut to fill the card.
    #[default]
    Fast,
    /// They may not: products by our own kernel, attention cut at fixed positions of the context.
    Deterministic,
}

/// How a [`Cuda`] computes, and what it is loaded from.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// The driver's number of the card.
    pub ordinal: usize,
    /// Of activations, weights and KV: bf16, f16, or f32, which is for tests.
    pub dtype: DType,
    /// Size of the model's attention heads.
    pub head_dim: usize,
    /// What a row's bits may depend on.
    pub mode: CudaMode,
    /// Folders with the driver's and the toolkit's libraries, looked through before the system's own.
    pub libraries: Vec<PathBuf>,
    /// Where compiled kernels are.
    pub images: ImageFolders,
}

/// The CUDA device of one step thread. A failure of the card or its driver while a step runs panics with one line: the
/// context is lost, and with it everything that it held.
pub struct Cuda {
    /// Once limits are known. Goes before what it launches.
    pub(super) graphs: RefCell<Option<DecodeGraphs>>,
    pub(super) kernels: Kernels,
    gemm: Option<Gemm>,
    pub(super) uploads: RefCell<Uploads>,
    /// Of the step that is being queued.
    pub(super) batches: RefCell<Vec<DeviceBatch>>,
    pub(super) scratch: RefCell<Scratch>,
    pub(super) recording: RefCell<Option<Recording>>,
    pub(super) dtype: DType,
    pub(super) mode: CudaMode,
    pub(super) head_dim: usize,
    place: CudaPlace,
    pub(super) device: Arc<Device>,
}

impl Cuda {
    /// Opens the card and loads its kernels.
    ///
    /// # Errors
    /// Whatever [`super::probe`] finds missing, a kernel that cannot be had, or no cuBLASLt.
    pub fn new(options: CudaOptions) -> Result<Cuda, KernelError> {
        Cuda::at(options, CudaPlace::default())
    }

    /// The same for an instance that has its place among others on the card.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn at(options: CudaOptions, place: CudaPlace) -> Result<Cuda, KernelError> {
        let CudaOptions { dtype, mode, .. } = options;
        let device = Device::open(options.ordinal, &options.libraries, &place)?;
        let kernels = Kernels::load(&device, dtype, options.head_dim, mode, options.images)?;
        let gemm = match mode {
            CudaMode::Fast => Some(Gemm::new(&device)?),
            CudaMode::Deterministic => None,
        };
        Ok(Cuda {
            kernels,
            gemm,
            uploads: RefCell::new(Uploads::new(Arc::clone(&device))),
            batches: RefCell::default(),
            scratch: RefCell::default(),
            graphs: RefCell::default(),
            recording: RefCell::default(),
            head_dim: options.head_dim,
            dtype,
            mode,
            place,
            device,
        })
    }

    /// The card.
    pub fn card(&self) -> &CudaCard {
        &self.device.card
    }

    /// Multiprocessors that its work runs on: the card's, or its share of them.
    pub fn n_multiprocessors(&self) -> u32 {
        self.device.n_multiprocessors
    }

    /// Each source of kernels with where its image came from.
    pub fn kernel_origins(&self) -> Vec<(String, ImageOrigin)> {
        self.kernels.origins()
    }

    /// Bytes of the card's memory that nobody has.
    ///
    /// # Errors
    /// A driver that does not say.
    pub fn free_bytes(&self) -> Result<usize, KernelError> {
        Ok(self.device.free_bytes()?)
    }

    /// Sets aside what operators need between their kernels for any step within `limits`, before the KV cache takes what is
    /// left. From then on a step allocates nothing, and one beyond the limits panics.
    ///
    /// # Errors
    /// Too little memory.
    pub fn reserve(&self, limits: &StepLimits) -> Result<(), KernelError> {
        let (kernels, splits) = (self.kernels.attention.kind(), self.splits());
        let plan = limits.plan_size(kernels, splits);
        self.scratch
            .borrow_mut()
            .reserve(&self.device, limits, plan, self.dtype)?;
        let graphs = DecodeGraphs::new(&self.device, limits, kernels, splits, plan)?;
        let n_bytes = limits.upload_bytes(plan) + graphs.table_bytes();
        self.uploads.borrow_mut().reserve(n_bytes)?;
        *self.graphs.borrow_mut() = Some(graphs);
        Ok(())
    }

    /// A KV cache in the card's memory.
    ///
    /// # Errors
    /// A layout that cannot be stored, another dtype than the device's, or too little memory.
    pub fn kv_cache(&self, layout: KvLayout, n_blocks: usize) -> Result<KvCache, KernelError> {
        self.kv_cache_within(layout, |_| n_blocks)
    }

    /// A KV cache of as many blocks as `n_blocks` makes of the bytes that nobody has; where instances share an arena, only
    /// the first is asked.
    ///
    /// # Errors
    /// As [`Cuda::kv_cache`].
    pub fn kv_cache_within(
        &self,
        layout: KvLayout,
        n_blocks: impl FnOnce(usize) -> usize,
    ) -> Result<KvCache, KernelError> {
        if !layout.block_size.is_power_of_two() {
            let reason = "block_size must be a power of two on a CUDA device";
            return Err(KernelError::Layout { layout, reason });
        }
        let alone = CudaKvArena::new(1);
        let arena = self.place.arena.as_deref().unwrap_or(&alone);
        // Before the part, which takes what is left.
        let staging = Staging::new(&self.device, layout)?;
        let part = arena.part(&self.device, layout, n_blocks)?;
        let (device, kernels, n_blocks) = (Arc::clone(&self.device), Arc::clone(&self.kernels.kv), part.n_blocks);
        let planes = DeviceKv::new(device, kernels, layout, part, staging)?;
        KvCache::on_device(layout, n_blocks, planes)
    }

    /// Sets a tensor's rows from the host's `[rows, cols]`. For tests and for models fed from the host.
    pub fn set(&self, tensor: &mut CudaTensor, values: &[f32]) {
        assert!(
            tensor.cols() > 0 && values.len().is_multiple_of(tensor.cols()),
            "{} values in rows of {}",
            values.len(),
            tensor.cols()
        );
        let to = tensor.resize("set", values.len() / tensor.cols(), tensor.cols());
        let from = self.uploads.borrow_mut().put(values);
        match (&self.kernels.from_f32, tensor.dtype) {
            (Some(convert), dtype) if dtype != DType::F32 => {
                let args = Args::new().address(to).address(from).u64(values.len() as u64);
                // SAFETY: as many f32 were uploaded, and the tensor has room for as many of its own type.
                unsafe { convert.launch(&self.device.compute, launch::elements(values.len() as u64), &args) };
            }
            _ => {
                let n_bytes = size_of_val(values);
                // SAFETY: both have as many bytes.
                unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.device.compute.cu_stream()) }
                    .or_stop("set a tensor");
            }
        }
    }

    pub(super) fn buffer(&self, what: &str, bytes: &[u8]) -> Result<DeviceBuffer, CudaError> {
        let mut buffer = DeviceBuffer::new(&self.device, what, bytes.len())?;
        buffer.write_now(0, bytes)?;
        Ok(buffer)
    }

    pub(super) fn f32_buffer(&self, what: &str, values: &[f32]) -> Result<Arc<DeviceBuffer>, CudaError> {
        self.buffer(what, bytemuck::cast_slice(values)).map(Arc::new)
    }

    /// Queues `out = x w^T` into `[rows, n_out]`.
    ///
    /// # Safety
    /// The addresses point to what the product says and stay until the work is done.
    pub(super) unsafe fn product(&self, product: Product) {
        match &self.gemm {
            // SAFETY: the caller's promise.
            Some(gemm) => unsafe { gemm.run(product) },
            None => {
                let linear = self.kernels.linear.as_ref().expect("loaded where there is no cuBLASLt");
                // SAFETY: the caller's promise.
                unsafe { linear.run(&self.device.compute, product) };
            }
        }
    }

    /// Has the way of computing products of as many rows chosen, where there is a choice that is not made; whether it was now.
    ///
    /// # Safety
    /// As of [`Cuda::product`].
    pub(super) unsafe fn prepare_product(&self, product: Product) -> bool {
        // SAFETY: the caller's promise.
        self.gemm.as_ref().is_some_and(|gemm| unsafe { gemm.prepare(product) })
    }

    /// `x w^T` of `rows` rows into `out`.
    pub(super) fn product_of(
        &self,
        rows: usize,
        x: &CudaTensor,
        w: &CudaMatrix,
        out: u64,
        out_dtype: DType,
    ) -> Product {
        Product {
            rows,
            n_in: w.n_in,
            n_out: w.n_out,
            dtype: self.dtype,
            out_dtype,
            x: x.address(),
            w: w.buffer.address(),
            out,
        }
    }

    pub(super) fn assert_typed(&self, op: &str, tensors: &[&CudaTensor]) {
        for tensor in tensors {
            assert!(
                tensor.dtype == self.dtype,
                "{op}: a tensor is {}, the device computes in {}",
                tensor.dtype,
                self.dtype
            );
        }
    }

    pub(super) fn assert_batch(
        &self,
        op: &str,
        qkv: &CudaTensor,
        batch: RaggedBatch<'_>,
        n_heads: usize,
        kv: &KvCache,
    ) {
        let layout = kv.layout();
        self.assert_typed(op, &[qkv]);
        assert!(
            layout.dtype == self.dtype,
            "{op}: the KV cache is {}, the device computes in {}",
            layout.dtype,
            self.dtype
        );
        let (rows, cols) = (qkv.rows(), qkv.cols());
        assert!(
            rows == batch.n_rows(),
            "{op}: {rows} rows of qkv for a batch of {}",
            batch.n_rows()
        );
        assert!(
            n_heads > 0
                && n_heads.is_multiple_of(layout.n_kv_heads)
                && cols == (n_heads + 2 * layout.n_kv_heads) * layout.head_dim,
            "{op}: qkv of {cols} columns for {n_heads} heads over {layout:?}"
        );
        for (sequence_idx, sequence) in batch.sequences.iter().enumerate() {
            let (n_tokens, n_blocks) = (sequence.start_pos + sequence.n_tokens, sequence.block_table.len());
            assert!(
                sequence.n_tokens > 0 && n_blocks >= layout.blocks_for(n_tokens),
                "{op}: sequence {sequence_idx} has {n_tokens} tokens, {} of them new, and {n_blocks} blocks of {}",
                sequence.n_tokens,
                layout.block_size
            );
        }
    }

    /// The tensor as f32; waits for everything queued.
    pub(super) fn fetch_copy(&self, x: &CudaTensor) -> Vec<f32> {
        let n_bytes = x.n_elements() * size_of::<f32>();
        if n_bytes == 0 {
            return Vec::new();
        }
        // Not at hand twice: what is fetched is widened in the same scratch.
        let mut landing = std::mem::take(&mut self.scratch.borrow_mut().landing);
        let host = landing.at_least(&self.device, n_bytes);
        self.fetch(x, host);
        let values = bytemuck::cast_slice(&host.as_slice()[..n_bytes]).to_vec();
        self.scratch.borrow_mut().landing = landing;
        values
    }

    /// The tensor as f32 in pinned memory; waits for everything queued.
    pub(super) fn fetch(&self, x: &CudaTensor, host: &mut PinnedBuffer) {
        let fetching = "copy a tensor to the host";
        let n_bytes = x.n_elements() * size_of::<f32>();
        if n_bytes == 0 {
            return;
        }
        let from = match (&self.kernels.to_f32, x.dtype) {
            (Some(convert), dtype) if dtype != DType::F32 => {
                let to = self.scratch.borrow_mut().widened.at_least(&self.device, n_bytes);
                let n = x.n_elements() as u64;
                let args = Args::new().address(to).address(x.address()).u64(n);
                // SAFETY: both have room for n elements of their types.
                unsafe { convert.launch(&self.device.compute, launch::elements(n), &args) };
                to
            }
            _ => x.address(),
        };
        let to = &mut host.as_mut_slice()[..n_bytes];
        self.device.context.bind_to_thread().or_stop(fetching);
        // SAFETY: as many bytes at both, and the host's are not touched before they are waited for.
        unsafe { result::memcpy_dtoh_async(to, from, self.device.compute.cu_stream()) }.or_stop(fetching);
        self.device.compute.synchronize().or_stop(fetching);
    }

    /// `out = act(gate) * up`.
    ///
    /// # Safety
    /// `gate_up: [rows, 2 * ffn]` and `out: [rows, ffn]` of the compute type, until the work is done.
    pub(super) unsafe fn gated_at(&self, out: u64, gate_up: u64, rows: usize, ffn: usize, activation: Activation) {
        let (code, alpha, limit) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::ClampedSwish { alpha, limit } => (2, alpha, limit),
        };
        let n = (rows * ffn) as u64;
        let args = Args::new()
            .address(out)
            .address(gate_up)
            .u64(n)
            .u32(ffn as u32)
            .u32(code)
            .f32(alpha)
            .f32(limit);
        // SAFETY: the caller's promise.
        unsafe {
            self.kernels
                .gated
                .launch(&self.device.compute, launch::elements(n), &args)
        };
    }
}
