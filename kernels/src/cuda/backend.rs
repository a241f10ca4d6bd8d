//! The operators of the CUDA device: shapes checked here, kernels and products queued on the compute stream. Attention and
//! experts are in files of their own.

use std::borrow::Cow;
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
use super::images::{ImageFolders, ImageOrigin};
use super::kernels::Kernels;
use super::kv::DeviceKv;
use super::launch;
use super::probe::CudaCard;
use super::scratch::Scratch;
use super::tensor::{CudaExperts, CudaMatrix, CudaRope, CudaTensor, CudaVector, Expert};
use super::upload::Uploads;
use crate::backend::{
    Activation, AttentionParams, Backend, ExpertNames, MoeParams, RaggedBatch, RopeAppendParams, RopeParams,
};
use crate::cpu::rope_table;
use crate::error::KernelError;
use crate::kv::KvCache;
use crate::layout::{DType, KvLayout};
use crate::packed::PackedWeights;

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
    pub(super) kernels: Kernels,
    gemm: Option<Gemm>,
    pub(super) uploads: RefCell<Uploads>,
    /// Of the step that is being queued.
    pub(super) batches: RefCell<Vec<DeviceBatch>>,
    pub(super) scratch: RefCell<Scratch>,
    pub(super) dtype: DType,
    pub(super) mode: CudaMode,
    pub(super) head_dim: usize,
    pub(super) device: Arc<Device>,
}

impl Cuda {
    /// Opens the card and loads its kernels.
    ///
    /// # Errors
    /// Whatever [`super::probe`] finds missing, a kernel that cannot be had, or no cuBLASLt.
    pub fn new(options: CudaOptions) -> Result<Cuda, KernelError> {
        let CudaOptions { dtype, mode, .. } = options;
        let device = Device::open(options.ordinal, &options.libraries)?;
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
            head_dim: options.head_dim,
            dtype,
            mode,
            device,
        })
    }

    /// The card.
    pub fn card(&self) -> &CudaCard {
        &self.device.card
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

    /// A KV cache in the card's memory.
    ///
    /// # Errors
    /// A layout that cannot be stored, another dtype than the device's, or too little memory.
    pub fn kv_cache(&self, layout: KvLayout, n_blocks: usize) -> Result<KvCache, KernelError> {
        if !layout.block_size.is_power_of_two() {
            let reason = "block_size must be a power of two on a CUDA device";
            return Err(KernelError::Layout { layout, reason });
        }
        KvCache::on_device(layout, n_blocks, |n_bytes| {
            Ok(DeviceKv::new(Arc::clone(&self.device), n_bytes)?)
        })
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

    fn buffer(&self, what: &str, bytes: &[u8]) -> Result<DeviceBuffer, CudaError> {
        let mut buffer = DeviceBuffer::new(&self.device, what, bytes.len())?;
        buffer.write_now(0, bytes)?;
        Ok(buffer)
    }

    fn f32_buffer(&self, what: &str, values: &[f32]) -> Result<Arc<DeviceBuffer>, CudaError> {
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

    fn assert_typed(&self, op: &str, tensors: &[&CudaTensor]) {
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
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Matrix = CudaMatrix;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Experts = CudaExperts;

    fn compute_dtype(&self) -> DType {
        self.dtype
    }

    fn numerics_class(&self) -> String {
        let class = format!("cuda-sm{}-{}", self.device.card.capability, self.dtype);
        match self.mode {
            CudaMode::Fast => class,
            CudaMode::Deterministic => format!("{class}-deterministic"),
        }
    }

    fn tensor(&self, max_rows: usize, cols: usize) -> Result<CudaTensor, KernelError> {
        Ok(CudaTensor::new(&self.device, self.dtype, max_rows, cols)?)
    }

    fn logits(&self, max_rows: usize, cols: usize) -> Result<CudaTensor, KernelError> {
        Ok(CudaTensor::new(&self.device, DType::F32, max_rows, cols)?)
    }

    fn matrix(&self, weights: &PackedWeights, name: &str) -> Result<CudaMatrix, KernelError> {
        if weights.dtype() != self.dtype {
            return Err(KernelError::DTypeMismatch {
                what: "packed weights".to_owned(),
                expected: self.dtype,
                found: weights.dtype(),
            });
        }
        let (bytes, [n_out, n_in]) = weights.rows(name)?;
        Ok(CudaMatrix {
            buffer: Arc::new(self.buffer(name, bytes)?),
            n_out,
            n_in,
        })
    }

    fn vector(&self, weights: &PackedWeights, name: &str) -> Result<CudaVector, KernelError> {
        let vector = weights.vector(name)?;
        Ok(CudaVector {
            buffer: self.f32_buffer(name, &vector.data)?,
            len: vector.data.len(),
        })
    }

    fn experts(&self, weights: &PackedWeights, names: &[ExpertNames]) -> Result<CudaExperts, KernelError> {
        let bias = |name: &Option<String>| name.as_ref().map(|name| self.vector(weights, name)).transpose();
        let expert = |names: &ExpertNames| {
            Ok(Expert {
                gate_up: self.matrix(weights, &names.gate_up)?,
                gate_up_bias: bias(&names.gate_up_bias)?,
                down: self.matrix(weights, &names.down)?,
                down_bias: bias(&names.down_bias)?,
            })
        };
        self.kernels.load_moe(self.dtype)?;
        let experts = names.iter().map(expert).collect::<Result<Vec<_>, KernelError>>()?;
        let table = |of: &dyn Fn(&Expert) -> u64| {
            let addresses: Vec<u64> = experts.iter().map(of).collect();
            self.buffer("the table of experts", bytemuck::cast_slice(&addresses))
        };
        let bias_table = |of: &dyn Fn(&Expert) -> Option<&CudaVector>| {
            let addresses: Option<Vec<u64>> = experts
                .iter()
                .map(|expert| of(expert).map(|bias| bias.buffer.address()))
                .collect();
            addresses
                .map(|addresses| self.buffer("the table of experts", bytemuck::cast_slice(&addresses)))
                .transpose()
        };
        Ok(CudaExperts {
            gate_up: table(&|expert| expert.gate_up.buffer.address())?,
            gate_up_bias: bias_table(&|expert| expert.gate_up_bias.as_ref())?,
            down: table(&|expert| expert.down.buffer.address())?,
            down_bias: bias_table(&|expert| expert.down_bias.as_ref())?,
            experts,
        })
    }

    fn rope(&self, variants: &[RopeParams], max_positions: usize) -> Result<CudaRope, KernelError> {
        let table = rope_table(variants, max_positions);
        Ok(CudaRope {
            cos: self.f32_buffer("rotary tables", &table.cos)?,
            sin: self.f32_buffer("rotary tables", &table.sin)?,
            half_dim: table.half_dim,
            max_positions,
            n_variants: table.n_variants,
        })
    }

    fn begin_step(&self) {
        self.uploads.borrow_mut().begin_step();
        self.batches.borrow_mut().clear();
    }

    fn embed(&self, out: &mut CudaTensor, table: &CudaMatrix, ids: &[u32], scale: f32) {
        self.assert_typed("embed", &[out]);
        assert!(
            ids.iter().all(|id| (*id as usize) < table.n_out),
            "embed: an id past the table of {}",
            table.n_out
        );
        let to = out.resize("embed", ids.len(), table.n_in);
        let ids_at = self.uploads.borrow_mut().put(ids);
        let args = Args::new()
            .address(to)
            .address(table.buffer.address())
            .address(ids_at)
            .f32(scale)
            .u32(table.n_in as u32);
        // SAFETY: `[ids.len(), n_in]` of out, `[n_out, n_in]` of the table, and ids below n_out.
        unsafe {
            self.kernels
                .embed
                .launch(&self.device.compute, launch::rows(ids.len() as u32), &args)
        };
    }

    fn rms_norm(&self, out: &mut CudaTensor, x: &CudaTensor, weight: &CudaVector, eps: f32) {
        self.assert_typed("rms_norm", &[out, x]);
        assert!(
            x.cols() == weight.len,
            "rms_norm: x of {} columns, weight of {}",
            x.cols(),
            weight.len
        );
        let to = out.resize("rms_norm", x.rows(), x.cols());
        let args = Args::new()
            .address(to)
            .address(x.address())
            .address(weight.buffer.address())
            .f32(eps)
            .u32(x.cols() as u32);
        // SAFETY: out and x are `[rows, cols]`, weight `[cols]`.
        unsafe {
            self.kernels
                .rms_norm
                .launch(&self.device.compute, launch::rows(x.rows() as u32), &args)
        };
    }

    fn add_rms_norm(
        &self,
        out: &mut CudaTensor,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        weight: &CudaVector,
        eps: f32,
    ) {
        self.assert_typed("add_rms_norm", &[out, residual, x]);
        assert!(
            x.cols() == weight.len && (residual.rows(), residual.cols()) == (x.rows(), x.cols()),
            "add_rms_norm: x [{}, {}], residual [{}, {}], weight [{}]",
            x.rows(),
            x.cols(),
            residual.rows(),
            residual.cols(),
            weight.len
        );
        let to = out.resize("add_rms_norm", x.rows(), x.cols());
        let args = Args::new()
            .address(to)
            .address(residual.address_mut())
            .address(x.address())
            .address(weight.buffer.address())
            .f32(eps)
            .u32(x.cols() as u32);
        // SAFETY: out, residual and x are `[rows, cols]`, weight `[cols]`.
        unsafe {
            self.kernels
                .add_rms_norm
                .launch(&self.device.compute, launch::rows(x.rows() as u32), &args);
        }
    }

    fn linear(&self, out: &mut CudaTensor, x: &CudaTensor, w: &CudaMatrix) {
        self.assert_typed("linear", &[x]);
        assert!(
            x.cols() == w.n_in,
            "linear: x of {} columns, weight [{}, {}]",
            x.cols(),
            w.n_out,
            w.n_in
        );
        let to = out.resize("linear", x.rows(), w.n_out);
        let product = Product {
            rows: x.rows(),
            n_in: w.n_in,
            n_out: w.n_out,
            dtype: self.dtype,
            out_dtype: out.dtype,
            x: x.address(),
            w: w.buffer.address(),
            out: to,
        };
        // SAFETY: x is `[rows, n_in]`, w `[n_out, n_in]`, out `[rows, n_out]`, of the dtypes said.
        unsafe { self.product(product) };
    }

    fn add_bias(&self, x: &mut CudaTensor, bias: &CudaVector) {
        self.assert_typed("add_bias", &[x]);
        assert!(
            x.cols() == bias.len,
            "add_bias: x of {} columns, bias of {}",
            x.cols(),
            bias.len
        );
        let n = x.n_elements() as u64;
        let args = Args::new()
            .address(x.address_mut())
            .address(bias.buffer.address())
            .u64(n)
            .u32(bias.len as u32);
        // SAFETY: x is `[rows, cols]`, bias `[cols]`.
        unsafe {
            self.kernels
                .add_bias
                .launch(&self.device.compute, launch::elements(n), &args)
        };
    }

    fn add(&self, residual: &mut CudaTensor, x: &CudaTensor) {
        self.assert_typed("add", &[residual, x]);
        assert!(
            (residual.rows(), residual.cols()) == (x.rows(), x.cols()),
            "add: residual [{}, {}], x [{}, {}]",
            residual.rows(),
            residual.cols(),
            x.rows(),
            x.cols()
        );
        let n = x.n_elements() as u64;
        let args = Args::new().address(residual.address_mut()).address(x.address()).u64(n);
        // SAFETY: both have n elements.
        unsafe {
            self.kernels
                .add
                .launch(&self.device.compute, launch::elements(n), &args)
        };
    }

    fn soft_cap(&self, x: &mut CudaTensor, cap: f32) {
        let n = x.n_elements() as u64;
        let kernel = match x.dtype {
            DType::F32 => &self.kernels.soft_cap_f32,
            DType::F16 | DType::Bf16 => &self.kernels.soft_cap,
        };
        let args = Args::new().address(x.address_mut()).u64(n).f32(cap);
        // SAFETY: x has n elements, of the kernel's type.
        unsafe { kernel.launch(&self.device.compute, launch::elements(n), &args) };
    }

    fn gated(&self, out: &mut CudaTensor, gate_up: &CudaTensor, activation: Activation) {
        self.assert_typed("gated", &[out, gate_up]);
        let (rows, ffn) = (gate_up.rows(), gate_up.cols() / 2);
        assert!(
            gate_up.cols() == 2 * ffn && ffn > 0,
            "gated: gate_up of {} columns",
            gate_up.cols()
        );
        let to = out.resize("gated", rows, ffn);
        // SAFETY: gate_up is `[rows, 2 * ffn]`, out `[rows, ffn]`.
        unsafe { self.gated_at(to, gate_up.address(), rows, ffn, activation) };
    }

    fn moe(
        &self,
        out: &mut CudaTensor,
        x: &CudaTensor,
        router_logits: &CudaTensor,
        experts: &CudaExperts,
        params: MoeParams,
    ) {
        self.assert_typed("moe", &[out, x, router_logits]);
        self.mixture(out, x, router_logits, experts, params);
    }

    fn rope_append(
        &self,
        qkv: &mut CudaTensor,
        batch: RaggedBatch<'_>,
        params: RopeAppendParams<'_, Cuda>,
        layer: usize,
        kv: &mut KvCache,
    ) {
        self.assert_batch("rope_append", qkv, batch, params.n_heads, kv);
        self.rotate_and_append(qkv, batch, params, layer, kv);
    }

    fn attention(
        &self,
        out: &mut CudaTensor,
        qkv: &CudaTensor,
        batch: RaggedBatch<'_>,
        params: &AttentionParams<CudaVector>,
        layer: usize,
        kv: &KvCache,
    ) {
        self.assert_typed("attention", &[out]);
        self.assert_batch("attention", qkv, batch, params.n_heads, kv);
        assert!(
            params.window != Some(0) && params.sinks.as_ref().is_none_or(|sinks| sinks.len == params.n_heads),
            "attention: window {:?}, sinks for {:?} of {} heads",
            params.window,
            params.sinks.as_ref().map(|sinks| sinks.len),
            params.n_heads
        );
        self.attend(out, qkv, batch, params, layer, kv);
    }

    fn gather_rows(&self, out: &mut CudaTensor, x: &CudaTensor, rows: &[usize]) {
        self.assert_typed("gather_rows", &[out, x]);
        assert!(
            rows.iter().all(|row| *row < x.rows()),
            "gather_rows: a row past x of {} rows",
            x.rows()
        );
        let to = out.resize("gather_rows", rows.len(), x.cols());
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let rows_at = self.uploads.borrow_mut().put(&rows);
        let args = Args::new()
            .address(to)
            .address(x.address())
            .address(rows_at)
            .u32(x.cols() as u32);
        // SAFETY: out is `[rows.len(), cols]`, and each row is one of x.
        unsafe {
            self.kernels
                .gather_rows
                .launch(&self.device.compute, launch::rows(rows.len() as u32), &args)
        };
    }

    fn to_host<'a>(&self, x: &'a CudaTensor) -> Cow<'a, [f32]> {
        let n = x.n_elements();
        let host = x.host.get_or_init(|| self.fetch(x));
        Cow::Borrowed(&bytemuck::cast_slice(host.as_slice())[..n])
    }
}

impl Cuda {
    /// The tensor as f32 in pinned memory; waits for everything queued.
    fn fetch(&self, x: &CudaTensor) -> PinnedBuffer {
        let fetching = "copy a tensor to the host";
        let n_bytes = x.n_elements() * size_of::<f32>();
        let spare = x.spare.take().filter(|spare| spare.n_bytes() >= n_bytes);
        let mut host = spare.unwrap_or_else(|| {
            PinnedBuffer::new(&self.device.context, x.max_elements() * size_of::<f32>())
                .unwrap_or_else(|error| panic!("CUDA: {error}"))
        });
        if n_bytes == 0 {
            return host;
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
        host
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
