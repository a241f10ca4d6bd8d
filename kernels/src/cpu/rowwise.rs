//! Operators that treat each row alone: embedding, norms, gated activation, gathering.
//!
//! Bits: a row's sum of squares runs in 16 lanes in ascending order, then a balanced tree. Bound: cache bandwidth.

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Kernel, LANES, Simd, widen_bf16};
use super::tensor::{CpuMatrix, SharedMut};
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

/// `out[r] = table[ids[r]]`, `out: [ids.len(), n_in]`.
pub(crate) fn embed(pool: &mut Pool, dtype: DType, out: &mut [f32], table: &CpuMatrix, ids: &[u32]) {
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
                        pair[0] = widen_bf16(*word as u16);
                        if let Some(odd) = pair.get_mut(1) {
                            *odd = widen_bf16((*word >> 16) as u16);
                        }
                    }
                }
                DType::F32 | DType::F16 => {
                    for (element, word) in row.iter_mut().zip(column) {
                        *element = f32::from_bits(*word);
                    }
                }
            }
        }
    });
}

/// RMS norm of rows, after an optional addition into the residual.
pub(crate) struct NormRow<'a> {
    /// Normalised here, `[cols]`.
    pub(crate) out: &'a mut [f32],
    /// The row to normalise.
    pub(crate) x: &'a [f32],
    /// `[cols]`
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for NormRow<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.x.len();
        let (full, tail) = (cols / LANES * LANES, cols % LANES);
        let mut squares = simd.splat(0.0);
        // SAFETY: out, x and weight are all `cols` long (asserted by the operator); full + tail == cols.
        unsafe {
            for col in (0..full).step_by(LANES) {
                let x = simd.load(self.x.as_ptr().add(col));
                squares = simd.mul_add(x, x, squares);
            }
            if tail > 0 {
                let x = simd.load_partial(self.x.as_ptr().add(full), tail, 0.0);
                squares = simd.mul_add(x, x, squares);
            }
            let mean = simd.reduce_add(squares) / cols as f32;
            let scale = simd.splat(1.0 / (mean + self.eps).sqrt());
            for col in (0..full).step_by(LANES) {
                let x = simd.mul(simd.load(self.x.as_ptr().add(col)), scale);
                simd.store(
                    self.out.as_mut_ptr().add(col),
                    simd.mul(x, simd.load(self.weight.as_ptr().add(col))),
                );
            }
            if tail > 0 {
                let x = simd.mul(simd.load_partial(self.x.as_ptr().add(full), tail, 0.0), scale);
                let weight = simd.load_partial(self.weight.as_ptr().add(full), tail, 0.0);
                simd.store_partial(self.out.as_mut_ptr().add(full), tail, simd.mul(x, weight));
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
            dispatch(
                isa,
                NormRow {
                    out,
                    x: &x[row_idx * cols..][..cols],
                    weight,
                    eps,
                },
            );
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
            dispatch(
                isa,
                NormRow {
                    out,
                    x: residual,
                    weight,
                    eps,
                },
            );
        }
    });
}

/// `out = silu(gate) * up` of one row.
struct SiluRow<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SiluRow<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.out.len();
        let (full, tail) = (cols / LANES * LANES, cols % LANES);
        assert!(self.gate.len() == cols && self.up.len() == cols);
        // SAFETY: out, gate and up are all `cols` long; full + tail == cols.
        unsafe {
            for col in (0..full).step_by(LANES) {
                let y = silu_mul(
                    simd,
                    simd.load(self.gate.as_ptr().add(col)),
                    simd.load(self.up.as_ptr().add(col)),
                );
                simd.store(self.out.as_mut_ptr().add(col), y);
            }
            if tail > 0 {
                let gate = simd.load_partial(self.gate.as_ptr().add(full), tail, 0.0);
                let up = simd.load_partial(self.up.as_ptr().add(full), tail, 0.0);
                simd.store_partial(self.out.as_mut_ptr().add(full), tail, silu_mul(simd, gate, up));
            }
        }
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(simd: S, gate: S::V, up: S::V) -> S::V {
    let exp = simd.exp(simd.sub(simd.splat(0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), exp)), up)
}

/// `out = silu(gate) * up`, `gate_up: [rows, 2 * ffn]`, `out: [rows, ffn]`.
pub(crate) fn silu_mul_rows(isa: Isa, pool: &mut Pool, out: &mut [f32], gate_up: &[f32], ffn: usize) {
    assert!(ffn > 0 && gate_up.len() == 2 * out.len());
    let target = SharedMut::new(out);
    // The exponential makes an element some four times as dear as in a norm.
    for_rows(pool, gate_up.len() / (2 * ffn), 4 * ffn, |first_row, n_rows| {
        for row_idx in first_row..first_row + n_rows {
            let (gate, up) = gate_up[row_idx * 2 * ffn..][..2 * ffn].split_at(ffn);
            // SAFETY: this row of out belongs to this item alone.
            let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(row_idx * ffn), ffn) };
            dispatch(isa, SiluRow { out, gate, up });
        }
    });
}
