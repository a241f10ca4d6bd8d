//! Norm and rotary embedding of q and k, and the append of k and v to the paged cache.
//!
//! Split of work: rows. Each row writes its own slot of its own block. Bound: cache bandwidth.

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::rowwise::{NormRow, for_rows};
use super::simd::{Dot, Kernel, LANES, Simd};
use super::tensor::{CpuRope, CpuVector, SharedMut};
use crate::backend::{QkNorm, RopeParams};
use crate::layout::KvLayout;

/// The table of cosines and sines, `[variants, max_positions, inv_freq.len()]` each.
pub(crate) fn table(variants: &[RopeParams], max_positions: usize) -> CpuRope {
    let half_dim = variants.first().map_or(0, |params| params.inv_freq.len());
    assert!(
        variants.iter().all(|params| params.inv_freq.len() == half_dim),
        "rope: variants of different numbers of frequencies"
    );
    let values = |function: fn(f64) -> f64| {
        let mut values = Vec::with_capacity(variants.len() * max_positions * half_dim);
        for params in variants {
            let factor = f64::from(params.attention_factor);
            for position in 0..max_positions {
                // The angle is rounded to f32, as in the models' own code; its cosine is then taken exactly.
                let angle = |f: &f32| f64::from(position as f32 * f);
                values.extend(params.inv_freq.iter().map(|f| (function(angle(f)) * factor) as f32));
            }
        }
        values.into()
    };
    CpuRope {
        cos: values(f64::cos),
        sin: values(f64::sin),
        half_dim,
        max_positions,
        n_variants: variants.len(),
    }
}

/// Where a row's k and v go: the K and V parts of its block, and the slot in it.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) key: SharedMut<u8>,
    pub(crate) value: SharedMut<u8>,
    pub(crate) slot: usize,
    pub(crate) position: usize,
    pub(crate) rope_variant: usize,
}

/// What happens to a row's heads before they are stored.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) n_heads: usize,
    pub(crate) rope: &'a CpuRope,
    pub(crate) qk_norm: Option<&'a QkNorm<CpuVector>>,
}

/// `qkv: [slots.len(), (n_heads + 2 * n_kv_heads) * head_dim]`. Slots must differ and be writable.
pub(crate) fn rope_append<D: Dot>(
    isa: Isa,
    pool: &mut Pool,
    qkv: &mut [f32],
    slots: &[Slot],
    heads: Heads<'_>,
    layout: KvLayout,
) {
    let Heads { n_heads, rope, qk_norm } = heads;
    let cols = (n_heads + 2 * layout.n_kv_heads) * layout.head_dim;
    assert!(qkv.len() == slots.len() * cols && 2 * rope.half_dim <= layout.head_dim);
    for slot in slots {
        assert!(
            slot.position < rope.max_positions && slot.rope_variant < rope.n_variants,
            "position {} of variant {} is beyond the rope table of {} variants of {}",
            slot.position,
            slot.rope_variant,
            rope.n_variants,
            rope.max_positions
        );
    }
    let target = SharedMut::new(qkv);
    for_rows(pool, slots.len(), cols, |first_row, n_rows| {
        for (row_idx, slot) in slots.iter().copied().enumerate().skip(first_row).take(n_rows) {
            // SAFETY: this row of qkv belongs to this item alone.
            let row = unsafe { std::slice::from_raw_parts_mut(target.get().add(row_idx * cols), cols) };
            let angles = (slot.rope_variant * rope.max_positions + slot.position) * rope.half_dim;
            dispatch(
                isa,
                Row::<D> {
                    row,
                    cos: &rope.cos[angles..][..rope.half_dim],
                    sin: &rope.sin[angles..][..rope.half_dim],
                    n_heads,
                    qk_norm,
                    layout,
                    slot,
                    dot: std::marker::PhantomData,
                },
            );
        }
    });
}

struct Row<'a, D> {
    /// `[n_heads + 2 * n_kv_heads, head_dim]`
    row: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    n_heads: usize,
    qk_norm: Option<&'a QkNorm<CpuVector>>,
    layout: KvLayout,
    slot: Slot,
    dot: std::marker::PhantomData<D>,
}

impl<D: Dot> Kernel for Row<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let KvLayout {
            n_kv_heads,
            block_size,
            head_dim,
            dtype,
            ..
        } = self.layout;
        let half_dim = self.cos.len();
        if let Some(QkNorm { query, key, eps }) = self.qk_norm {
            let (q, k) = self.row[..(self.n_heads + n_kv_heads) * head_dim].split_at_mut(self.n_heads * head_dim);
            for (part, weight) in [(q, &query.data), (k, &key.data)] {
                for x in part.chunks_exact_mut(weight.len()) {
                    NormRow::in_place(x, weight, *eps).run(simd);
                }
            }
        }
        for head in self.row[..(self.n_heads + n_kv_heads) * head_dim].chunks_exact_mut(head_dim) {
            let (low, high) = head[..2 * half_dim].split_at_mut(half_dim);
            // SAFETY: low, high, cos and sin are all half_dim long, and each access covers at most what is left of it.
            unsafe {
                for start in (0..half_dim).step_by(LANES) {
                    let n = LANES.min(half_dim - start);
                    rotate(
                        simd,
                        low.as_mut_ptr().add(start),
                        high.as_mut_ptr().add(start),
                        n,
                        [self.cos.as_ptr().add(start), self.sin.as_ptr().add(start)],
                    );
                }
            }
        }
        let kv = &self.row[self.n_heads * head_dim..];
        let head_bytes = head_dim * dtype.size();
        for (head_idx, head) in kv.chunks_exact(head_dim).enumerate() {
            let (part, kv_head) = if head_idx < n_kv_heads {
                (self.slot.key, head_idx)
            } else {
                (self.slot.value, head_idx - n_kv_heads)
            };
            // SAFETY: the slot's parts are [n_kv_heads, block_size, head_dim] and writable, slot < block_size, and no other
            // row has this slot (asserted when the slots were made).
            unsafe {
                let out = part.get().add((kv_head * block_size + self.slot.slot) * head_bytes);
                narrow::<S, D>(simd, head, out, dtype.size());
            }
        }
    }
}

/// # Safety
/// All pointers hold `n <= 16` f32, and low and high do not overlap.
#[inline(always)]
unsafe fn rotate<S: Simd>(simd: S, low: *mut f32, high: *mut f32, n: usize, [cos, sin]: [*const f32; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        let load = |p: *const f32| {
            if n == LANES {
                simd.load(p)
            } else {
                simd.load_partial(p, n, 0.0)
            }
        };
        let (a, b, cos, sin) = (load(low), load(high), load(cos), load(sin));
        let minus_b = simd.sub(simd.splat(0.0), b);
        let new_low = simd.mul_add(a, cos, simd.mul(minus_b, sin));
        let new_high = simd.mul_add(b, cos, simd.mul(a, sin));
        if n == LANES {
            simd.store(low, new_low);
            simd.store(high, new_high);
        } else {
            simd.store_partial(low, n, new_low);
            simd.store_partial(high, n, new_high);
        }
    }
}

/// # Safety
/// `out` is writable for `x.len()` stored elements of `size` bytes.
#[inline(always)]
unsafe fn narrow<S: Simd, D: Dot>(simd: S, x: &[f32], out: *mut u8, size: usize) {
    // SAFETY: full vectors write 16 elements of x.len(), the tail goes through a buffer of 16.
    unsafe {
        let full = x.len() / LANES * LANES;
        for start in (0..full).step_by(LANES) {
            D::narrow(simd, out.add(start * size), simd.load(x.as_ptr().add(start)));
        }
        let tail = x.len() - full;
        if tail > 0 {
            let mut stored = [0_u8; 4 * LANES];
            D::narrow(
                simd,
                stored.as_mut_ptr(),
                simd.load_partial(x.as_ptr().add(full), tail, 0.0),
            );
            std::ptr::copy_nonoverlapping(stored.as_ptr(), out.add(full * size), tail * size);
        }
    }
}
