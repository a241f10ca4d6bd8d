//! Operators that treat each row alone: embedding, norms, gated activations, biases, soft caps.
//!
//! Bits: a row's sum of squares runs in 16 lanes in ascending order, then a balanced tree. Bound: cache bandwidth.

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Kernel, LANES, Simd, widen_bf16};
use super::tensor::{CpuMatrix, SharedMut};
use crate::backend::Activation;
use crate::layout::DType;
use crate::packed::PANEL;

/// Elements below which the caller works alone.
const INLINE_ELEMENTS: usize = 1 << 16;

/// Splits `rows` over the threads when they hold enough elements; `task(first_row, n_rows)`.
pub(crate) fn for_rows(pool: &mut Pool, rows: usize, elements: usize, task: impl Fn(usize, usize) + Sync) {
    if rows * elements < INLINE_ELEMENTS || pool.n_threads() == 1 {
        task(0, rows);
        return;
    }
    let per_item = rows.div_ceil(4 * pool.n_threads());
    pool.for_each(rows.div_ceil(per_item), &|item| {
        let first_row = item * per_item;
        task(first_row, per_item.min(rows - first_row));
    });
}

/// `out[r] = scale * table[ids[r]]`, `out: [ids.len(), n_in]`.
pub(crate) fn embed(pool: &mut Pool, dtype: DType, out: &mut [f32], table: &CpuMatrix, ids: &[u32], scale: f32) {
    let hidden = table.n_in;
    for id in ids {
        assert!(
            (*id as usize) < table.n_out,
            "embed: token id {id} is outside the table of {} rows",
            table.n_out
        );
    }
    let words = table.words();
    let target = SharedMut::new(out);
    for_rows(pool, ids.len(), 16 * hidden, |first_row, n_rows| {
        // SAFETY: rows first_row.. of out belong to this item alone, and out is [ids.len(), hidden].
        let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(first_row * hidden), n_rows * hidden) };
        for (row, id) in out.chunks_exact_mut(hidden.max(1)).zip(&ids[first_row..]) {
            let (panel_idx, lane) = (*id as usize / PANEL, *id as usize % PANEL);
            let column = words[panel_idx * table.n_words * PANEL..][..table.n_words * PANEL][lane..]
                .iter()
                .step_by(PANEL);
            match dtype {
                DType::Bf16 => {
                    for (pair, word) in row.chunks_mut(2).zip(column) {
                        pair[0] = scale * widen_bf16(*word as u16);
                        if let Some(odd) = pair.get_mut(1) {
                            *odd = scale * widen_bf16((*word >> 16) as u16);
                        }
                    }
                }
                DType::F32 | DType::F16 => {
                    for (element, word) in row.iter_mut().zip(column) {
                        *element = scale * f32::from_bits(*word);
                    }
                }
            }
        }
    });
}

/// RMS norm of one row. Pointers, because a row may be normalised in place.
pub(crate) struct NormRow<'a> {
    /// The row to normalise, `[cols]`.
    x: *const f32,
    /// Normalised here, `[cols]`; may be `x`.
    out: *mut f32,
    /// `[cols]`
    weight: &'a [f32],
    eps: f32,
    borrowed: std::marker::PhantomData<(&'a [f32], &'a mut [f32])>,
}

impl<'a> NormRow<'a> {
    /// `out = norm(x) * weight`
    pub(crate) fn new(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) -> NormRow<'a> {
        assert!(out.len() == weight.len() && x.len() == weight.len());
        NormRow {
            x: x.as_ptr(),
            out: out.as_mut_ptr(),
            weight,
            eps,
            borrowed: std::marker::PhantomData,
        }
    }

    /// `x = norm(x) * weight`
    pub(crate) fn in_place(x: &'a mut [f32], weight: &'a [f32], eps: f32) -> NormRow<'a> {
        assert!(x.len() == weight.len());
        let out = x.as_mut_ptr();
        NormRow {
            x: out,
            out,
            weight,
            eps,
            borrowed: std::marker::PhantomData,
        }
    }
}

impl Kernel for NormRow<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.weight.len();
        let (full, tail) = (cols / LANES * LANES, cols % LANES);
        let mut squares = simd.splat(0.0);
        // SAFETY: out, x and weight are all `cols` long (asserted when it was made); full + tail == cols. Each element is
        // read before it is written.
        unsafe {
            for col in (0..full).step_by(LANES) {
                let x = simd.load(self.x.add(col));
                squares = simd.mul_add(x, x, squares);
            }
            if tail > 0 {
                let x = simd.load_partial(self.x.add(full), tail, 0.0);
                squares = simd.mul_add(x, x, squares);
            }
            let mean = simd.reduce_add(squares) / cols as f32;
            let scale = simd.splat(1.0 / (mean + self.eps).sqrt());
            for col in (0..full).step_by(LANES) {
                let x = simd.mul(simd.load(self.x.add(col)), scale);
                simd.store(self.out.add(col), simd.mul(x, simd.load(self.weight.as_ptr().add(col))));
            }
            if tail > 0 {
                let x = simd.mul(simd.load_partial(self.x.add(full), tail, 0.0), scale);
                let weight = simd.load_partial(self.weight.as_ptr().add(full), tail, 0.0);
                simd.store_partial(self.out.add(full), tail, simd.mul(x, weight));
            }
        }
    }
}

/// `out = rms_norm(x) * weight`, all `[rows, cols]`.
pub(crate) fn rms_norm(isa: Isa, pool: &mut Pool, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let cols = weight.len();
    assert!(cols > 0 && out.len() == x.len() && x.len().is_multiple_of(cols));
    let target = SharedMut::new(out);
    for_rows(pool, x.len() / cols, cols, |first_row, n_rows| {
        for row_idx in first_row..first_row + n_rows {
            // SAFETY: this row of out belongs to this item alone.
            let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(row_idx * cols), cols) };
            dispatch(isa, NormRow::new(out, &x[row_idx * cols..][..cols], weight, eps));
        }
    });
}

/// `residual += x`, then `out = rms_norm(residual) * weight`, all `[rows, cols]`.
pub(crate) fn add_rms_norm(
    isa: Isa,
    pool: &mut Pool,
    out: &mut [f32],
    residual: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
) {
    let cols = weight.len();
    assert!(cols > 0 && out.len() == x.len() && residual.len() == x.len() && x.len().is_multiple_of(cols));
    let (out, residual) = (SharedMut::new(out), SharedMut::new(residual));
    for_rows(pool, x.len() / cols, cols, |first_row, n_rows| {
        for row_idx in first_row..first_row + n_rows {
            // SAFETY: this row of out and of residual belongs to this item alone.
            let (out, residual) = unsafe {
                (
                    std::slice::from_raw_parts_mut(out.get().add(row_idx * cols), cols),
                    std::slice::from_raw_parts_mut(residual.get().add(row_idx * cols), cols),
                )
            };
            for (sum, x) in residual.iter_mut().zip(&x[row_idx * cols..]) {
                *sum += x;
            }
            dispatch(isa, NormRow::new(out, residual, weight, eps));
        }
    });
}

/// `out = act(gate) * up` of one row.
struct GatedRow<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
    activation: Activation,
}

impl Kernel for GatedRow<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.out.len();
        let (full, tail) = (cols / LANES * LANES, cols % LANES);
        assert!(self.gate.len() == cols && self.up.len() == cols);
        // SAFETY: out, gate and up are all `cols` long; full + tail == cols.
        unsafe {
            for col in (0..full).step_by(LANES) {
                let gate = simd.load(self.gate.as_ptr().add(col));
                let up = simd.load(self.up.as_ptr().add(col));
                simd.store(self.out.as_mut_ptr().add(col), gated(simd, gate, up, self.activation));
            }
            if tail > 0 {
                let gate = simd.load_partial(self.gate.as_ptr().add(full), tail, 0.0);
                let up = simd.load_partial(self.up.as_ptr().add(full), tail, 0.0);
                simd.store_partial(
                    self.out.as_mut_ptr().add(full),
                    tail,
                    gated(simd, gate, up, self.activation),
                );
            }
        }
    }
}

#[inline(always)]
fn gated<S: Simd>(simd: S, gate: S::V, up: S::V, activation: Activation) -> S::V {
    match activation {
        Activation::Silu => simd.mul(simd.mul_sigmoid(gate, gate), up),
        Activation::GeluTanh => {
            // x (1 + tanh y) / 2 = x sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
            const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769_2;
            let cubic = simd.mul_add(simd.mul(gate, gate), simd.splat(0.044_715), simd.splat(1.0));
            let twice = simd.mul(simd.mul(gate, cubic), simd.splat(TWICE_SQRT_2_OVER_PI));
            simd.mul(simd.mul_sigmoid(gate, twice), up)
        }
        Activation::ClampedSwish { alpha, limit } => {
            let gate = simd.min(simd.splat(limit), gate);
            let up = simd.min(simd.splat(limit), simd.max(simd.splat(-limit), up));
            let gate = simd.mul_sigmoid(gate, simd.mul(gate, simd.splat(alpha)));
            simd.mul(gate, simd.add(up, simd.splat(1.0)))
        }
    }
}

/// `out = act(gate) * up`, `gate_up: [rows, 2 * ffn]`, `out: [rows, ffn]`.
pub(crate) fn gated_rows(
    isa: Isa,
    pool: &mut Pool,
    out: &mut [f32],
    gate_up: &[f32],
    ffn: usize,
    activation: Activation,
) {
    assert!(ffn > 0 && gate_up.len() == 2 * out.len());
    let target = SharedMut::new(out);
    // The exponential makes an element some four times as dear as in a norm.
    for_rows(pool, gate_up.len() / (2 * ffn), 4 * ffn, |first_row, n_rows| {
        for row_idx in first_row..first_row + n_rows {
            let (gate, up) = gate_up[row_idx * 2 * ffn..][..2 * ffn].split_at(ffn);
            // SAFETY: this row of out belongs to this item alone.
            let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(row_idx * ffn), ffn) };
            dispatch(
                isa,
                GatedRow {
                    out,
                    gate,
                    up,
                    activation,
                },
            );
        }
    });
}

/// `cap * tanh(x / cap)` of some elements.
struct SoftCap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Kernel for SoftCap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for chunk in self.x.chunks_mut(LANES) {
            // SAFETY: a chunk is at most 16 long.
            unsafe {
                let x = simd.load_partial(chunk.as_ptr(), chunk.len(), 0.0);
                simd.store_partial(chunk.as_mut_ptr(), chunk.len(), simd.soft_cap(x, self.cap));
            }
        }
    }
}

/// `x = cap * tanh(x / cap)`, `x: [rows, cols]`.
pub(crate) fn soft_cap(isa: Isa, pool: &mut Pool, x: &mut [f32], cols: usize, cap: f32) {
    let rows = x.len() / cols.max(1);
    let target = SharedMut::new(x);
    for_rows(pool, rows, 4 * cols, |first_row, n_rows| {
        // SAFETY: these rows belong to this item alone.
        let x = unsafe { std::slice::from_raw_parts_mut(target.get().add(first_row * cols), n_rows * cols) };
        dispatch(isa, SoftCap { x, cap });
    });
}

/// `x[r] += bias`, `x: [rows, bias.len()]`.
pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
    assert!(!bias.is_empty() && x.len().is_multiple_of(bias.len()));
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias;
        }
    }
}
