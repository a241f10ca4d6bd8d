//! The operators of the CUDA device: shapes checked here, kernels and products queued on the compute stream. Attention and
//! experts are in files of their own.

use std::borrow::Cow;

use super::function::Args;
use super::gemm;
use super::graphs::DecodeGraphs;
use super::launch;
use super::opened::{Cuda, CudaMode};
use super::sampler::CudaSampler;
use super::tensor::{CudaExperts, CudaMatrix, CudaRope, CudaTensor, CudaVector, Expert};
use super::weights::upload;
use crate::backend::{
    Activation, AttentionParams, Backend, ExpertNames, MoeParams, RaggedBatch, RecordingRun, RopeAppendParams,
    RopeParams, SampledIds,
};
use crate::cpu::rope_table;
use crate::error::KernelError;
use crate::kv::KvCache;
use crate::layout::DType;
use crate::packed::PackedWeights;

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Matrix = CudaMatrix;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Experts = CudaExperts;
    type Sampler = CudaSampler;

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
        Ok(CudaTensor::for_host(&self.device, DType::F32, max_rows, cols)?)
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
            buffer: upload(&self.device, weights, name, bytes)?,
            n_out,
            n_in,
        })
    }

    fn vector(&self, weights: &PackedWeights, name: &str) -> Result<CudaVector, KernelError> {
        let vector = weights.vector(name)?;
        Ok(CudaVector {
            buffer: upload(&self.device, weights, name, bytemuck::cast_slice(&vector.data))?,
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
        let ids_at = match &*self.recording.borrow() {
            Some(recording) => {
                recording.assert_rows("embed", ids.len());
                recording.ids
            }
            None => self.uploads.borrow_mut().put(ids),
        };
        self.embed_from(out, table, ids_at, ids.len(), scale);
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
        let product = self.product_of(x.rows(), x, w, to, out.dtype);
        // SAFETY: x is `[rows, n_in]`, w `[n_out, n_in]`, out `[rows, n_out]`, of the dtypes said.
        unsafe { self.product(product) };
    }

    fn prepare_linear(&self, out: &mut CudaTensor, x: &CudaTensor, w: &CudaMatrix) -> usize {
        let max_rows = out.max_rows().min(x.max_rows());
        assert!(
            (out.cols(), x.cols()) == (w.n_out, w.n_in),
            "prepare_linear: x of {} columns, out of {}, weight [{}, {}]",
            x.cols(),
            out.cols(),
            w.n_out,
            w.n_in
        );
        let is_chosen_now = |&rows: &usize| {
            let product = self.product_of(rows, x, w, out.address_mut(), out.dtype);
            // SAFETY: both tensors have memory for so many rows, of the dtypes said; what is in them does not matter.
            unsafe { self.prepare_product(product) }
        };
        gemm::rows_of_large_steps(max_rows).filter(is_chosen_now).count()
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
        let n_rows = rows.len();
        let rows_at = match &*self.recording.borrow() {
            Some(recording) => {
                recording.assert_rows("gather_rows", n_rows);
                recording.wanted_rows
            }
            None => {
                let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
                self.uploads.borrow_mut().put(&rows)
            }
        };
        let args = Args::new()
            .address(to)
            .address(x.address())
            .address(rows_at)
            .u32(x.cols() as u32);
        // SAFETY: out is `[rows.len(), cols]`, and each row is one of x.
        unsafe {
            self.kernels
                .gather_rows
                .launch(&self.device.compute, launch::rows(n_rows as u32), &args)
        };
    }

    fn recordable_rows(&self) -> Vec<usize> {
        self.graphs
            .borrow()
            .as_ref()
            .map_or_else(Vec::new, DecodeGraphs::n_rows)
    }

    fn begin_recording(&self, batches: &[RaggedBatch<'_>], run: RecordingRun) -> Result<(), KernelError> {
        Ok(self.start_recording(batches, run)?)
    }

    fn end_recording(&self, out: &CudaTensor, run: RecordingRun) -> Result<(), KernelError> {
        Ok(self.stop_recording(out, run)?)
    }

    fn replay(
        &self,
        out: &mut CudaTensor,
        ids: &[u32],
        sampled: Option<SampledIds<'_, Cuda>>,
        batches: &[RaggedBatch<'_>],
        kv: &mut KvCache,
    ) -> bool {
        self.replay_step(out, ids, sampled, batches, kv)
    }

    fn sampler(&self, max_rows: usize, vocab: usize) -> Result<Option<CudaSampler>, KernelError> {
        CudaSampler::new(self, max_rows, vocab).map(Some)
    }

    fn to_host<'a>(&self, x: &'a CudaTensor) -> Cow<'a, [f32]> {
        let n = x.n_elements();
        if let Some(mut host) = x.spare.take() {
            self.fetch(x, &mut host);
            let _ = x.host.set(host);
        }
        match x.host.get() {
            Some(host) => Cow::Borrowed(&bytemuck::cast_slice(host.as_slice())[..n]),
            None => Cow::Owned(self.fetch_copy(x)),
        }
    }
}

impl Cuda {
    /// The embedding of the `n_rows` ids at an address of the device, all below the table's rows.
    pub(super) fn embed_from(&self, out: &mut CudaTensor, table: &CudaMatrix, ids_at: u64, n_rows: usize, scale: f32) {
        self.assert_typed("embed", &[out]);
        let to = out.resize("embed", n_rows, table.n_in);
        let args = Args::new()
            .address(to)
            .address(table.buffer.address())
            .address(ids_at)
            .f32(scale)
            .u32(table.n_in as u32);
        // SAFETY: `[n_rows, n_in]` of out, `[n_out, n_in]` of the table, and ids below n_out.
        unsafe {
            self.kernels
                .embed
                .launch(&self.device.compute, launch::rows(n_rows as u32), &args)
        };
    }
}
