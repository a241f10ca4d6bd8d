//! The arithmetic of one attention item: transposed keys, scores, softmax, weighted sums, merging of splits.
//! Works on scratch alone: no pages, no batch.

use super::{KEY_TILES, SPLIT};
use crate::cpu::simd::{Dot, LANES, Simd};

/// `key[word][token] = rows[token][word]`.
///
/// # Safety
/// Rows are readable for `n_words` words, `key` writable for `n_words * 16`.
#[inline(always)]
pub(super) unsafe fn transpose_key<S: Simd>(simd: S, rows: &[*const u8; LANES], n_words: usize, key: *mut u32) {
    let full = n_words / LANES * LANES;
    // SAFETY: the caller's promise.
    unsafe {
        for word_idx in (0..full).step_by(LANES) {
            let rows = rows.map(|row| row.cast::<u32>().add(word_idx));
            simd.transpose(&rows, key.add(word_idx * LANES));
        }
        for word_idx in full..n_words {
            for (token, row) in rows.iter().enumerate() {
                *key.add(word_idx * LANES + token) = row.cast::<u32>().add(word_idx).read_unaligned();
            }
        }
    }
}

/// Scores of `KEY_TILES` tiles of 16 tokens, for all queries.
#[derive(Clone, Copy)]
pub(super) struct Scores<V> {
    /// `[n_queries][query_words]`
    pub(super) query: *const u32,
    pub(super) query_words: usize,
    /// `[KEY_TILES][n_words][16]`
    pub(super) key: *const u32,
    pub(super) n_words: usize,
    /// `[n_queries][SPLIT]`, at the first of the tokens
    pub(super) scores: *mut f32,
    pub(super) scale: V,
}

impl<V: Copy> Scores<V> {
    /// # Safety
    /// The pointers hold what the fields say.
    #[inline(always)]
    pub(super) unsafe fn all<S: Simd<V = V>, D: Dot>(self, simd: S, n_queries: usize) {
        let mut query_idx = 0;
        // SAFETY: each call handles queries below n_queries.
        unsafe {
            while query_idx + 8 <= n_queries {
                self.some::<S, D, 8>(simd, query_idx);
                query_idx += 8;
            }
            if query_idx + 4 <= n_queries {
                self.some::<S, D, 4>(simd, query_idx);
                query_idx += 4;
            }
            while query_idx < n_queries {
                self.some::<S, D, 1>(simd, query_idx);
                query_idx += 1;
            }
        }
    }

    /// # Safety
    /// As `all`, for QUERIES queries from `first` on.
    #[inline(always)]
    unsafe fn some<S: Simd<V = V>, D: Dot, const QUERIES: usize>(self, simd: S, first: usize) {
        let mut sums = [[simd.splat(0.0); KEY_TILES]; QUERIES];
        // SAFETY: the caller's promise.
        unsafe {
            for word_idx in 0..self.n_words {
                let key: [D::Words<S>; KEY_TILES] = std::array::from_fn(|tile_idx| {
                    D::load(simd, self.key.add((tile_idx * self.n_words + word_idx) * LANES))
                });
                for (query_idx, sums) in sums.iter_mut().enumerate() {
                    let query = D::splat(simd, *self.query.add((first + query_idx) * self.query_words + word_idx));
                    for (sum, key) in sums.iter_mut().zip(key) {
                        *sum = D::dot(simd, *sum, query, key);
                    }
                }
            }
            for (query_idx, sums) in sums.iter().enumerate() {
                for (tile_idx, sum) in sums.iter().enumerate() {
                    let scores = self.scores.add((first + query_idx) * SPLIT + tile_idx * LANES);
                    simd.store(scores, simd.mul(*sum, self.scale));
                }
            }
        }
    }
}

/// `cap * tanh(score / cap)` of every score.
#[inline(always)]
pub(super) fn soft_cap<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    for chunk in scores.chunks_mut(LANES) {
        // SAFETY: a chunk is at most 16 long.
        unsafe {
            let x = simd.load_partial(chunk.as_ptr(), chunk.len(), 0.0);
            simd.store_partial(chunk.as_mut_ptr(), chunk.len(), simd.soft_cap(x, cap));
        }
    }
}

/// Turns scores into `e^(score - max)`; returns the maximum and the sum. Empty: -inf and 0.
#[inline(always)]
pub(super) fn softmax<S: Simd>(simd: S, scores: &mut [f32]) -> [f32; 2] {
    if scores.is_empty() {
        return [f32::NEG_INFINITY, 0.0];
    }
    let (full, tail) = (scores.len() / LANES * LANES, scores.len() % LANES);
    let p = scores.as_mut_ptr();
    // SAFETY: full + tail == scores.len().
    unsafe {
        let mut max = simd.splat(f32::NEG_INFINITY);
        for start in (0..full).step_by(LANES) {
            max = simd.max(max, simd.load(p.add(start)));
        }
        if tail > 0 {
            max = simd.max(max, simd.load_partial(p.add(full), tail, f32::NEG_INFINITY));
        }
        let max = simd.reduce_max(max);
        let splat = simd.splat(max);
        let mut sum = simd.splat(0.0);
        for start in (0..full).step_by(LANES) {
            let weight = simd.exp(simd.sub(simd.load(p.add(start)), splat));
            simd.store(p.add(start), weight);
            sum = simd.add(sum, weight);
        }
        if tail > 0 {
            // Missing lanes are -inf, whose exponential is exactly 0.
            let weight = simd.exp(simd.sub(simd.load_partial(p.add(full), tail, f32::NEG_INFINITY), splat));
            simd.store_partial(p.add(full), tail, weight);
            sum = simd.add(sum, weight);
        }
        [max, simd.reduce_add(sum)]
    }
}

/// Widens one stored head of V, zero behind `head_dim`.
///
/// # Safety
/// `row` is readable for `head_dim` stored elements; `wide.len()` is `head_dim` rounded up to 16.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd, D: Dot>(simd: S, row: *const u8, head_dim: usize, wide: &mut [f32]) {
    let size = 4 / D::PER_WORD;
    let (full, tail) = (head_dim / LANES * LANES, head_dim % LANES);
    // SAFETY: the caller's promise; the tail is copied to a buffer of 16 first.
    unsafe {
        for start in (0..full).step_by(LANES) {
            simd.store(wide.as_mut_ptr().add(start), D::widen(simd, row.add(start * size)));
        }
        if tail > 0 {
            let mut stored = [0_u8; 4 * LANES];
            std::ptr::copy_nonoverlapping(row.add(full * size), stored.as_mut_ptr(), tail * size);
            simd.store(wide.as_mut_ptr().add(full), D::widen(simd, stored.as_ptr()));
        }
    }
}

/// `out[query] += sum over tokens of weights[query][token] * value[token]`, tokens in order.
#[derive(Clone, Copy)]
pub(super) struct WeightedSum<L> {
    /// 16 elements of V, by token and dim
    pub(super) load: L,
    pub(super) padded_dim: usize,
    /// `[n_queries][SPLIT]`, at the first token
    pub(super) weights: *const f32,
    /// `[n_queries][padded_dim]`
    pub(super) out: *mut f32,
}

impl<L: Copy> WeightedSum<L> {
    /// Queries four at a time from the first token that any of them sees to the last that all see, then one at a time over
    /// the rest. Tokens that a query does not see yet have a weight of 0.
    ///
    /// # Safety
    /// The pointers hold what the fields say, for the tokens of `seen(query)`.
    #[inline(always)]
    pub(super) unsafe fn all<S: Simd>(self, simd: S, n_queries: usize, seen: impl Fn(usize) -> std::ops::Range<usize>)
    where
        L: Fn(usize, usize) -> S::V,
    {
        let mut query_idx = 0;
        // SAFETY: the caller's promise; dims stay below padded_dim, a multiple of 16.
        unsafe {
            while query_idx < n_queries {
                let n = if query_idx + 4 <= n_queries { 4 } else { 1 };
                // A later query never begins or ends earlier.
                let common = seen(query_idx);
                if n == 4 {
                    self.over_dims::<S, 4>(simd, query_idx, common.start, common.end);
                    for one in query_idx + 1..query_idx + 4 {
                        let end = seen(one).end;
                        if end > common.end {
                            self.over_dims::<S, 1>(simd, one, common.end, end);
                        }
                    }
                } else {
                    self.over_dims::<S, 1>(simd, query_idx, common.start, common.end);
                }
                query_idx += n;
            }
        }
    }

    /// # Safety
    /// As `all`, for tokens `start..end` and QUERIES queries from `first` on.
    #[inline(always)]
    unsafe fn over_dims<S: Simd, const QUERIES: usize>(self, simd: S, first: usize, start: usize, end: usize)
    where
        L: Fn(usize, usize) -> S::V,
    {
        let mut dim = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while dim + 4 * LANES <= self.padded_dim {
                self.some::<S, QUERIES, 4>(simd, first, dim, start, end);
                dim += 4 * LANES;
            }
            while dim < self.padded_dim {
                self.some::<S, QUERIES, 1>(simd, first, dim, start, end);
                dim += LANES;
            }
        }
    }

    /// # Safety
    /// As `over_dims`, for dims `dim..dim + 16 * VECTORS`.
    #[inline(always)]
    unsafe fn some<S: Simd, const QUERIES: usize, const VECTORS: usize>(
        self,
        simd: S,
        first: usize,
        dim: usize,
        start: usize,
        end: usize,
    ) where
        L: Fn(usize, usize) -> S::V,
    {
        // SAFETY: the caller's promise.
        unsafe {
            let at =
                |query_idx: usize, vector_idx: usize| (first + query_idx) * self.padded_dim + dim + vector_idx * LANES;
            let mut sums: [[S::V; VECTORS]; QUERIES] = std::array::from_fn(|query_idx| {
                std::array::from_fn(|vector_idx| simd.load(self.out.add(at(query_idx, vector_idx))))
            });
            for token in start..end {
                let value: [S::V; VECTORS] =
                    std::array::from_fn(|vector_idx| (self.load)(token, dim + vector_idx * LANES));
                for (query_idx, sums) in sums.iter_mut().enumerate() {
                    let weight = simd.splat(*self.weights.add((first + query_idx) * SPLIT + token));
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum = simd.mul_add(weight, value, *sum);
                    }
                }
            }
            for (query_idx, sums) in sums.iter().enumerate() {
                for (vector_idx, sum) in sums.iter().enumerate() {
                    simd.store(self.out.add(at(query_idx, vector_idx)), *sum);
                }
            }
        }
    }
}

/// Merges a split into the total, both relative to their maxima. Stats are the maximum and the sum of weights.
#[inline(always)]
pub(super) fn merge<S: Simd>(
    simd: S,
    total: &mut [f32],
    [max, sum]: [f32; 2],
    part: &[f32],
    [part_max, part_sum]: [f32; 2],
) -> [f32; 2] {
    assert!(total.len() == part.len() && total.len().is_multiple_of(LANES));
    let new_max = if part_max > max { part_max } else { max };
    let keep = simd.exp(simd.splat(max - new_max));
    let take = simd.exp(simd.splat(part_max - new_max));
    // SAFETY: both are equally long, a multiple of 16.
    unsafe {
        for start in (0..total.len()).step_by(LANES) {
            let p = total.as_mut_ptr().add(start);
            let taken = simd.mul(simd.load(part.as_ptr().add(start)), take);
            simd.store(p, simd.mul_add(simd.load(p), keep, taken));
        }
    }
    let (keep, take) = (simd.to_array(keep)[0], simd.to_array(take)[0]);
    [new_max, sum * keep + part_sum * take]
}
