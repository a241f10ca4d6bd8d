//! The CPU device: f32 activations, packed weights in f32 or bf16, operators compiled for each instruction set.
//! No model structure and no scheduling; one `Cpu` belongs to one step thread.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dispatch;
mod isa;
mod linear;
mod moe;
pub(crate) mod pool;
mod portable;
mod rope;
mod rowwise;
pub(crate) mod simd;
mod tensor;

use std::borrow::Cow;
use std::cell::RefCell;

pub use isa::Isa;
pub(crate) use rope::table as rope_table;
pub use tensor::{CpuMatrix, CpuRope, CpuTensor, CpuVector};

use crate::aligned::AlignedBuf;
use crate::backend::{
    Activation, AttentionParams, Backend, ExpertNames, MoeParams, NoSampler, RaggedBatch, RopeAppendParams, RopeParams,
};
use crate::error::KernelError;
use crate::kv::KvCache;
use crate::layout::DType;
use crate::packed::PackedWeights;
use pool::Pool;
use simd::{Bf16Words, F32Words};
use tensor::SharedMut;

/// How a [`Cpu`] computes.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// Threads of the device, the caller's included; at least 1. Results do not depend on it.
    pub n_threads: usize,
    /// What products are computed in, and KV is stored in: f32 or bf16 (sums are always f32).
    pub dtype: DType,
    /// The instruction set; None for the best there is.
    pub isa: Option<Isa>,
}

/// The CPU device of one step thread: its worker threads and its scratch memory.
pub struct Cpu {
    isa: Isa,
    dtype: DType,
    state: RefCell<State>,
}

struct State {
    pool: Pool,
    packed: AlignedBuf<u32>,
    slots: Vec<rope::Slot>,
    tiles: Vec<attention::RowTile>,
    moe: moe::Scratch,
}

/// All experts of one layer.
pub struct CpuExperts(Vec<moe::Expert>);

impl Cpu {
    /// Starts the device's threads.
    ///
    /// # Errors
    /// An instruction set that the processor lacks, f16, or a number of threads out of range.
    pub fn new(options: CpuOptions) -> Result<Cpu, KernelError> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            return Err(KernelError::Isa { isa, best: Isa::best() });
        }
        if options.dtype == DType::F16 {
            return Err(KernelError::UnsupportedDType {
                what: "CPU compute",
                dtype: options.dtype,
            });
        }
        let pool = Pool::new(options.n_threads)?;
        let state = State {
            pool,
            packed: AlignedBuf::default(),
            slots: Vec::new(),
            tiles: Vec::new(),
            moe: moe::Scratch::default(),
        };
        Ok(Cpu {
            isa,
            dtype: options.dtype,
            state: RefCell::new(state),
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.state.borrow().pool.n_threads()
    }

    fn assert_dtype(&self, op: &str, what: &str, found: DType) {
        assert!(
            found == self.dtype,
            "{op}: {what} is {found}, the device computes in {}",
            self.dtype
        );
    }

    fn assert_batch(&self, op: &str, rows: usize, batch: RaggedBatch<'_>, kv: &KvCache) {
        let layout = kv.layout();
        self.assert_dtype(op, "the KV cache", layout.dtype);
        assert!(
            rows == batch.n_rows(),
            "{op}: {rows} rows of qkv for a batch of {}",
            batch.n_rows()
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

fn assert_qkv(op: &str, cols: usize, n_heads: usize, kv: &KvCache) {
    let layout = kv.layout();
    assert!(
        n_heads > 0
            && n_heads.is_multiple_of(layout.n_kv_heads)
            && cols == (n_heads + 2 * layout.n_kv_heads) * layout.head_dim,
        "{op}: qkv of {cols} columns for {n_heads} heads over {layout:?}"
    );
}

impl Backend for Cpu {
    type Tensor = CpuTensor;
    type Matrix = CpuMatrix;
    type Vector = CpuVector;
    type Rope = CpuRope;
    type Experts = CpuExperts;
    type Sampler = NoSampler;

    fn compute_dtype(&self) -> DType {
        self.dtype
    }

    fn numerics_class(&self) -> String {
        format!("cpu-{}-{}", self.isa, self.dtype)
    }

    fn tensor(&self, max_rows: usize, cols: usize) -> Result<CpuTensor, KernelError> {
        Ok(CpuTensor::new(max_rows, cols))
    }

    fn logits(&self, max_rows: usize, cols: usize) -> Result<CpuTensor, KernelError> {
        self.tensor(max_rows, cols)
    }

    fn matrix(&self, weights: &PackedWeights, name: &str) -> Result<CpuMatrix, KernelError> {
        if weights.dtype() != self.dtype {
            let what = "packed weights".to_owned();
            return Err(KernelError::DTypeMismatch {
                what,
                expected: self.dtype,
                found: weights.dtype(),
            });
        }
        weights.matrix(name)
    }

    fn vector(&self, weights: &PackedWeights, name: &str) -> Result<CpuVector, KernelError> {
        weights.vector(name)
    }

    fn experts(&self, weights: &PackedWeights, names: &[ExpertNames]) -> Result<CpuExperts, KernelError> {
        let bias = |name: &Option<String>| name.as_ref().map(|name| self.vector(weights, name)).transpose();
        let expert = |names: &ExpertNames| {
            Ok(moe::Expert {
                gate_up: self.matrix(weights, &names.gate_up)?,
                gate_up_bias: bias(&names.gate_up_bias)?,
                down: self.matrix(weights, &names.down)?,
                down_bias: bias(&names.down_bias)?,
            })
        };
        names.iter().map(expert).collect::<Result<_, _>>().map(CpuExperts)
    }

    fn rope(&self, variants: &[RopeParams], max_positions: usize) -> Result<CpuRope, KernelError> {
        Ok(rope::table(variants, max_positions))
    }

    fn begin_step(&self) {}

    fn embed(&self, out: &mut CpuTensor, table: &CpuMatrix, ids: &[u32], scale: f32) {
        let out = out.resize("embed", ids.len(), table.n_in);
        rowwise::embed(&mut self.state.borrow_mut().pool, self.dtype, out, table, ids, scale);
    }

    fn rms_norm(&self, out: &mut CpuTensor, x: &CpuTensor, weight: &CpuVector, eps: f32) {
        assert!(
            x.cols() == weight.data.len(),
            "rms_norm: x of {} columns, weight of {}",
            x.cols(),
            weight.data.len()
        );
        let out = out.resize("rms_norm", x.rows(), x.cols());
        rowwise::rms_norm(
            self.isa,
            &mut self.state.borrow_mut().pool,
            out,
            x.as_slice(),
            &weight.data,
            eps,
        );
    }

    fn add_rms_norm(&self, out: &mut CpuTensor, residual: &mut CpuTensor, x: &CpuTensor, weight: &CpuVector, eps: f32) {
        assert!(
            x.cols() == weight.data.len() && (residual.rows(), residual.cols()) == (x.rows(), x.cols()),
            "add_rms_norm: x [{}, {}], residual [{}, {}], weight [{}]",
            x.rows(),
            x.cols(),
            residual.rows(),
            residual.cols(),
            weight.data.len()
        );
        let out = out.resize("add_rms_norm", x.rows(), x.cols());
        let pool = &mut self.state.borrow_mut().pool;
        rowwise::add_rms_norm(
            self.isa,
            pool,
            out,
            residual.as_mut_slice(),
            x.as_slice(),
            &weight.data,
            eps,
        );
    }

    fn linear(&self, out: &mut CpuTensor, x: &CpuTensor, w: &CpuMatrix) {
        assert!(
            x.cols() == w.n_in,
            "linear: x of {} columns, weight [{}, {}]",
            x.cols(),
            w.n_out,
            w.n_in
        );
        let rows = x.rows();
        let out = out.resize("linear", rows, w.n_out);
        let State { pool, packed, .. } = &mut *self.state.borrow_mut();
        match self.dtype {
            DType::Bf16 => linear::linear::<Bf16Words>(self.isa, pool, packed, out, x.as_slice(), rows, w),
            DType::F32 | DType::F16 => linear::linear::<F32Words>(self.isa, pool, packed, out, x.as_slice(), rows, w),
        }
    }

    fn add_bias(&self, x: &mut CpuTensor, bias: &CpuVector) {
        assert!(
            x.cols() == bias.data.len(),
            "add_bias: x of {} columns, bias of {}",
            x.cols(),
            bias.data.len()
        );
        rowwise::add_bias(x.as_mut_slice(), &bias.data);
    }

    fn add(&self, residual: &mut CpuTensor, x: &CpuTensor) {
        assert!(
            (residual.rows(), residual.cols()) == (x.rows(), x.cols()),
            "add: residual [{}, {}], x [{}, {}]",
            residual.rows(),
            residual.cols(),
            x.rows(),
            x.cols()
        );
        for (sum, x) in residual.as_mut_slice().iter_mut().zip(x.as_slice()) {
            *sum += x;
        }
    }

    fn soft_cap(&self, x: &mut CpuTensor, cap: f32) {
        let cols = x.cols();
        rowwise::soft_cap(self.isa, &mut self.state.borrow_mut().pool, x.as_mut_slice(), cols, cap);
    }

    fn gated(&self, out: &mut CpuTensor, gate_up: &CpuTensor, activation: Activation) {
        let ffn = gate_up.cols() / 2;
        assert!(
            gate_up.cols() == 2 * ffn && ffn > 0,
            "gated: gate_up of {} columns",
            gate_up.cols()
        );
        let out = out.resize("gated", gate_up.rows(), ffn);
        rowwise::gated_rows(
            self.isa,
            &mut self.state.borrow_mut().pool,
            out,
            gate_up.as_slice(),
            ffn,
            activation,
        );
    }

    fn moe(
        &self,
        out: &mut CpuTensor,
        x: &CpuTensor,
        router_logits: &CpuTensor,
        experts: &CpuExperts,
        params: MoeParams,
    ) {
        let experts = &experts.0[..];
        assert!(
            (router_logits.rows(), router_logits.cols()) == (x.rows(), experts.len())
                && (1..=experts.len()).contains(&params.top_k),
            "moe: {} of {} experts, x [{}, {}], router logits [{}, {}]",
            params.top_k,
            experts.len(),
            x.rows(),
            x.cols(),
            router_logits.rows(),
            router_logits.cols()
        );
        for (idx, expert) in experts.iter().enumerate() {
            assert!(
                expert.gate_up.n_in == x.cols()
                    && expert.gate_up.n_out == 2 * expert.down.n_in
                    && expert.down.n_out == x.cols(),
                "moe: expert {idx} is [{}, {}] and [{}, {}] for x of {} columns",
                expert.gate_up.n_out,
                expert.gate_up.n_in,
                expert.down.n_out,
                expert.down.n_in,
                x.cols()
            );
        }
        let out = out.resize("moe", x.rows(), x.cols());
        let State { pool, packed, moe, .. } = &mut *self.state.borrow_mut();
        let (isa, x, logits) = (self.isa, x.as_slice(), router_logits.as_slice());
        match self.dtype {
            DType::Bf16 => moe::moe::<Bf16Words>(isa, pool, packed, moe, out, x, logits, experts, params),
            DType::F32 | DType::F16 => moe::moe::<F32Words>(isa, pool, packed, moe, out, x, logits, experts, params),
        }
    }

    fn rope_append(
        &self,
        qkv: &mut CpuTensor,
        batch: RaggedBatch<'_>,
        params: RopeAppendParams<'_, Cpu>,
        layer: usize,
        kv: &mut KvCache,
    ) {
        let RopeAppendParams { n_heads, rope, qk_norm } = params;
        self.assert_batch("rope_append", qkv.rows(), batch, kv);
        assert_qkv("rope_append", qkv.cols(), n_heads, kv);
        let layout = kv.layout();
        if let Some(norm) = qk_norm {
            for (what, weight, heads) in [("query", &norm.query, n_heads), ("key", &norm.key, layout.n_kv_heads)] {
                assert!(
                    [layout.head_dim, heads * layout.head_dim].contains(&weight.data.len()),
                    "rope_append: {what} norm of {} for {heads} heads over {layout:?}",
                    weight.data.len()
                );
            }
        }
        let heads = rope::Heads { n_heads, rope, qk_norm };
        let State { pool, slots, .. } = &mut *self.state.borrow_mut();
        slots.clear();
        kv.begin_append();
        for sequence in batch.sequences {
            let mut open = None;
            for position in sequence.start_pos..sequence.start_pos + sequence.n_tokens {
                let block_idx = position / layout.block_size;
                let (key, value) = match open {
                    Some((opened_idx, parts)) if opened_idx == block_idx => parts,
                    _ => kv.append_block(layer, sequence.block_table[block_idx]),
                };
                open = Some((block_idx, (key, value)));
                let (key, value) = (SharedMut::from_ptr(key), SharedMut::from_ptr(value));
                slots.push(rope::Slot {
                    key,
                    value,
                    slot: position % layout.block_size,
                    position,
                    rope_variant: sequence.rope_variant,
                });
            }
        }
        let qkv = qkv.as_mut_slice();
        match self.dtype {
            DType::Bf16 => rope::rope_append::<Bf16Words>(self.isa, pool, qkv, slots, heads, layout),
            DType::F32 | DType::F16 => rope::rope_append::<F32Words>(self.isa, pool, qkv, slots, heads, layout),
        }
    }

    fn attention(
        &self,
        out: &mut CpuTensor,
        qkv: &CpuTensor,
        batch: RaggedBatch<'_>,
        params: &AttentionParams<CpuVector>,
        layer: usize,
        kv: &KvCache,
    ) {
        self.assert_batch("attention", qkv.rows(), batch, kv);
        assert!(
            params.window != Some(0)
                && params
                    .sinks
                    .as_ref()
                    .is_none_or(|sinks| sinks.data.len() == params.n_heads),
            "attention: window {:?}, sinks for {:?} of {} heads",
            params.window,
            params.sinks.as_ref().map(|sinks| sinks.data.len()),
            params.n_heads
        );
        assert_qkv("attention", qkv.cols(), params.n_heads, kv);
        let out = out.resize("attention", qkv.rows(), params.n_heads * kv.layout().head_dim);
        let State { pool, tiles, .. } = &mut *self.state.borrow_mut();
        let (isa, qkv) = (self.isa, qkv.as_slice());
        match self.dtype {
            DType::Bf16 => attention::attention::<Bf16Words>(isa, pool, tiles, out, qkv, batch, params, layer, kv),
            DType::F32 | DType::F16 => {
                attention::attention::<F32Words>(isa, pool, tiles, out, qkv, batch, params, layer, kv);
            }
        }
    }

    fn gather_rows(&self, out: &mut CpuTensor, x: &CpuTensor, rows: &[usize]) {
        let cols = x.cols();
        let out = out.resize("gather_rows", rows.len(), cols);
        for (out, row_idx) in out.chunks_exact_mut(cols.max(1)).zip(rows) {
            assert!(*row_idx < x.rows(), "gather_rows: row {row_idx} of {}", x.rows());
            out.copy_from_slice(&x.as_slice()[row_idx * cols..][..cols]);
        }
    }

    fn sampler(&self, _: usize, _: usize) -> Result<Option<NoSampler>, KernelError> {
        Ok(None)
    }

    fn to_host<'a>(&self, x: &'a CpuTensor) -> Cow<'a, [f32]> {
        Cow::Borrowed(x.as_slice())
    }
}

#[cfg(test)]
mod tests;
