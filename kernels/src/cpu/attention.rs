//! Causal attention over the paged cache, for prefill chunks and decode tokens alike.
//!
//! Shapes: q rows `[n_heads, head_dim]` f32; K and V blocks `[n_kv_heads, block_size, head_dim]`; out as q.
//! Split of work: items are (sequence, tile of rows, KV head), so K and V are loaded once for all query heads of the group
//! and all rows of the tile. K goes through a transposed tile of 16 tokens, so scores need no horizontal sums.
//! Bits: the context is cut at fixed positions, every 256 tokens. Within a split, a score adds over head_dim in order, the
//! weighted sum adds over tokens in order; splits merge in order. Neither tile, chunk, batch nor thread appears in that.
//! Bound: read bandwidth in decode, the dot products in prefill.

use std::cell::RefCell;

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Dot, Kernel, LANES, Simd};
use super::tensor::SharedMut;
use crate::aligned::AlignedBuf;
use crate::backend::{AttentionParams, RaggedBatch};
use crate::kv::KvCache;
use crate::layout::KvLayout;

/// Tokens of the context between two cuts.
pub(crate) const SPLIT: usize = 256;

/// Tiles of K that are scored together: twice the chains of sums, which hides the latency of the dot product.
const KEY_TILES: usize = 2;

/// Up to this many queries V is widened on the fly, without going through memory.
const DIRECT_QUERIES: usize = 8;

/// Tokens of V widened at a time: 16 KiB for heads of 64.
const VALUE_CHUNK: usize = 64;

/// Query vectors an item aims at: rows of a tile times heads of a group.
const TILE_QUERIES: usize = 32;

/// Multiply-adds below which the caller works alone.
const INLINE_WORK: usize = 1 << 17;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    query: AlignedBuf<u32>,
    key: AlignedBuf<u32>,
    scores: AlignedBuf<f32>,
    value: AlignedBuf<f32>,
    split_out: AlignedBuf<f32>,
    total_out: AlignedBuf<f32>,
    stats: AlignedBuf<f32>,
}

/// A tile of rows of one sequence.
#[derive(Clone, Copy)]
pub(crate) struct RowTile {
    sequence_idx: usize,
    /// First row in the batch, and its position.
    first_row: usize,
    first_pos: usize,
    n_rows: usize,
}

/// `qkv: [rows, (n_heads + 2 * n_kv_heads) * head_dim]`, `out: [rows, n_heads * head_dim]`; `tiles` is scratch.
#[expect(clippy::too_many_arguments, reason = "the operator's operands")]
pub(crate) fn attention<D: Dot>(
    isa: Isa,
    pool: &mut Pool,
    tiles: &mut Vec<RowTile>,
    out: &mut [f32],
    qkv: &[f32],
    batch: RaggedBatch<'_>,
    params: AttentionParams,
    layer: usize,
    kv: &KvCache,
) {
    let layout = kv.layout();
    let group = params.n_heads / layout.n_kv_heads;
    let tile_rows = (TILE_QUERIES / group).max(1);
    tiles.clear();
    let mut first_row = 0;
    let mut work = 0;
    for (sequence_idx, sequence) in batch.sequences.iter().enumerate() {
        let context = sequence.start_pos + sequence.n_tokens;
        kv.assert_readable(layer, &sequence.block_table[..layout.blocks_for(context)]);
        for start in (0..sequence.n_tokens).step_by(tile_rows) {
            let n_rows = tile_rows.min(sequence.n_tokens - start);
            let first_pos = sequence.start_pos + start;
            tiles.push(RowTile {
                sequence_idx,
                first_row: first_row + start,
                first_pos,
                n_rows,
            });
            work += (first_pos + n_rows) * n_rows * params.n_heads * layout.head_dim;
        }
        first_row += sequence.n_tokens;
    }
    // As addresses, so that threads may share them: `kv` is borrowed for the whole call.
    let (key, value) = kv.layer_base(layer);
    let (key, value) = (key as usize, value as usize);
    let target = SharedMut::new(out);
    let tiles = &*tiles;
    let task = |item: usize| {
        let tile = tiles[item / layout.n_kv_heads];
        let sequence = &batch.sequences[tile.sequence_idx];
        let pages = Pages {
            key,
            value,
            block_table: sequence.block_table,
            layout,
        };
        SCRATCH.with_borrow_mut(|scratch| {
            dispatch(
                isa,
                Item::<D> {
                    pages,
                    kv_head: item % layout.n_kv_heads,
                    tile,
                    params,
                    group,
                    qkv,
                    out: target,
                    scratch,
                    dot: std::marker::PhantomData,
                },
            );
        });
    };
    let n_items = tiles.len() * layout.n_kv_heads;
    if work < INLINE_WORK {
        (0..n_items).for_each(task)
    } else {
        pool.for_each(n_items, &task)
    }
}

/// One layer of the cache as one sequence sees it, at the addresses of its K and V parts.
#[derive(Clone, Copy)]
struct Pages<'a> {
    key: usize,
    value: usize,
    block_table: &'a [u32],
    layout: KvLayout,
}

impl Pages<'_> {
    /// Addresses of 16 tokens' heads from `first` on, which is before `end`; those from `end` on repeat the last one.
    #[inline(always)]
    fn tokens(&self, base: usize, kv_head: usize, first: usize, end: usize) -> [*const u8; LANES] {
        let KvLayout {
            block_size,
            head_dim,
            dtype,
            ..
        } = self.layout;
        let (part_bytes, head_bytes) = (self.layout.part_bytes(), head_dim * dtype.size());
        let (mut block_idx, mut slot) = (first / block_size, first % block_size);
        let start = |block_idx: usize| {
            base + self.block_table[block_idx] as usize * part_bytes + kv_head * block_size * head_bytes
        };
        if slot + LANES <= block_size {
            // All in one block, as they always are with blocks of 16, 32 and so on.
            let address = start(block_idx) + slot * head_bytes;
            let last = end - 1 - first;
            return std::array::from_fn(|offset| (address + offset.min(last) * head_bytes) as *const u8);
        }
        let mut block_start = start(block_idx);
        let mut address = block_start + slot * head_bytes;
        let mut rows = [address as *const u8; LANES];
        for (offset, row) in rows.iter_mut().enumerate().skip(1) {
            if first + offset < end {
                slot += 1;
                if slot == block_size {
                    (block_idx, slot) = (block_idx + 1, 0);
                    block_start = start(block_idx);
                }
                address = block_start + slot * head_bytes;
            }
            *row = address as *const u8;
        }
        rows
    }
}

impl Pages<'_> {
    /// Asks for 16 tokens' heads from `first` on, those before `end`.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, base: usize, kv_head: usize, first: usize, end: usize) {
        if first >= end {
            return;
        }
        let head_bytes = self.layout.head_dim * self.layout.dtype.size();
        for row in self.tokens(base, kv_head, first, end) {
            for line in (0..head_bytes).step_by(64) {
                simd.prefetch(row.wrapping_add(line));
            }
        }
    }
}

/// All query heads of one KV head for a tile of rows, over the rows' whole context.
struct Item<'a, D> {
    pages: Pages<'a>,
    kv_head: usize,
    tile: RowTile,
    params: AttentionParams,
    group: usize,
    qkv: &'a [f32],
    out: SharedMut<f32>,
    scratch: &'a mut Scratch,
    dot: std::marker::PhantomData<D>,
}

impl<D: Dot> Kernel for Item<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Item {
            pages,
            kv_head,
            tile,
            params,
            group,
            qkv,
            out,
            scratch,
            ..
        } = self;
        let KvLayout {
            n_kv_heads, head_dim, ..
        } = pages.layout;
        let n_queries = tile.n_rows * group;
        let n_words = head_dim / D::PER_WORD;
        let query_words = n_words.next_multiple_of(LANES);
        let padded_dim = head_dim.next_multiple_of(LANES);
        let context = tile.first_pos + tile.n_rows;

        let query = scratch.query.at_least(n_queries * query_words);
        let key = scratch.key.at_least(KEY_TILES * n_words * LANES);
        let scores = scratch.scores.at_least(n_queries * SPLIT);
        let value = scratch.value.at_least(VALUE_CHUNK * padded_dim);
        let split_out = scratch.split_out.at_least(n_queries * padded_dim);
        let total_out = scratch.total_out.at_least(n_queries * padded_dim);
        let (max, rest) = scratch.stats.at_least(4 * n_queries).split_at_mut(n_queries);
        let (sum, rest) = rest.split_at_mut(n_queries);
        let (split_max, split_sum) = rest.split_at_mut(n_queries);

        let q_cols = params.n_heads * head_dim;
        let qkv_cols = q_cols + 2 * n_kv_heads * head_dim;
        for query_idx in 0..n_queries {
            let (row_idx, head) = (tile.first_row + query_idx / group, kv_head * group + query_idx % group);
            let q = &qkv[row_idx * qkv_cols + head * head_dim..][..head_dim];
            for (chunk_idx, chunk) in q.chunks(LANES * D::PER_WORD).enumerate() {
                // SAFETY: reads the chunk, writes 16 of the query's words, which are padded to a multiple of 16.
                unsafe {
                    let words = query.as_mut_ptr().add(query_idx * query_words + chunk_idx * LANES);
                    D::pack(simd, chunk.as_ptr(), chunk.len(), words);
                }
            }
        }

        for split_start in (0..context).step_by(SPLIT) {
            let split_end = context.min(split_start + SPLIT);
            // Tokens of this split that a query sees: its own position is its last.
            let visible = |query_idx: usize| {
                (tile.first_pos + query_idx / group + 1)
                    .saturating_sub(split_start)
                    .min(SPLIT)
            };
            for first in (split_start..split_end).step_by(KEY_TILES * LANES) {
                for tile_idx in 0..KEY_TILES {
                    let start = first + tile_idx * LANES;
                    if start >= split_end {
                        // The scores of a missing tile are computed from what is left there, and never looked at.
                        break;
                    }
                    let rows = pages.tokens(pages.key, kv_head, start, split_end);
                    pages.prefetch(simd, pages.value, kv_head, start, split_end);
                    pages.prefetch(simd, pages.key, kv_head, start + KEY_TILES * LANES, context);
                    // SAFETY: the rows are head_dim elements of blocks checked by `attention`; a tile is n_words * 16 words.
                    unsafe { transpose_key(simd, &rows, n_words, key[tile_idx * n_words * LANES..].as_mut_ptr()) };
                }
                let scores = scores.as_mut_ptr().wrapping_add(first - split_start);
                let scale = simd.splat(params.scale);
                let dots = Scores {
                    query: query.as_ptr(),
                    query_words,
                    key: key.as_ptr(),
                    n_words,
                    scores,
                    scale,
                };
                // SAFETY: the scratch was sized above, and SPLIT is a multiple of the tokens scored together.
                unsafe { dots.all::<S, D>(simd, n_queries) };
            }
            for query_idx in 0..n_queries {
                let row = &mut scores[query_idx * SPLIT..][..visible(query_idx)];
                (split_max[query_idx], split_sum[query_idx]) = softmax(simd, row);
            }
            split_out.fill(0.0);
            let weights = scores.as_ptr();
            if n_queries <= DIRECT_QUERIES && head_dim == padded_dim {
                for first in (split_start..split_end).step_by(LANES) {
                    let rows = pages.tokens(pages.value, kv_head, first, split_end);
                    let size = 4 / D::PER_WORD;
                    // SAFETY: as for K: a row is head_dim elements of a checked block, and dim + 16 <= head_dim.
                    let load = |token: usize, dim: usize| unsafe { D::widen(simd, rows[token].add(dim * size)) };
                    let weights = weights.wrapping_add(first - split_start);
                    let sums = WeightedSum {
                        load,
                        padded_dim,
                        weights,
                        out: split_out.as_mut_ptr(),
                    };
                    let seen = |query_idx: usize| visible(query_idx).saturating_sub(first - split_start).min(LANES);
                    // SAFETY: seen() <= 16 tokens for every query, and the scratch was sized above.
                    unsafe { sums.all(simd, n_queries, seen) };
                }
            } else {
                for first in (split_start..split_end).step_by(VALUE_CHUNK) {
                    let end = split_end.min(first + VALUE_CHUNK);
                    for start in (first..end).step_by(LANES) {
                        let rows = pages.tokens(pages.value, kv_head, start, end);
                        for (row, token) in rows.iter().zip(start..end) {
                            let wide = &mut value[(token - first) * padded_dim..][..padded_dim];
                            // SAFETY: as for K: a row is head_dim elements of a checked block.
                            unsafe { widen::<S, D>(simd, *row, head_dim, wide) };
                        }
                    }
                    let wide = value.as_ptr();
                    // SAFETY: token is one of those widened above, and dim + 16 <= padded_dim.
                    let load = |token: usize, dim: usize| unsafe { simd.load(wide.add(token * padded_dim + dim)) };
                    let weights = weights.wrapping_add(first - split_start);
                    let sums = WeightedSum {
                        load,
                        padded_dim,
                        weights,
                        out: split_out.as_mut_ptr(),
                    };
                    let seen =
                        |query_idx: usize| visible(query_idx).saturating_sub(first - split_start).min(VALUE_CHUNK);
                    // SAFETY: seen() <= tokens widened in this chunk for every query, and the scratch was sized above.
                    unsafe { sums.all(simd, n_queries, seen) };
                }
            }
            for query_idx in 0..n_queries {
                if visible(query_idx) == 0 {
                    continue;
                }
                let split = (split_max[query_idx], split_sum[query_idx]);
                let part = &split_out[query_idx * padded_dim..][..padded_dim];
                let total = &mut total_out[query_idx * padded_dim..][..padded_dim];
                (max[query_idx], sum[query_idx]) = if split_start == 0 {
                    total.copy_from_slice(part);
                    split
                } else {
                    merge(simd, total, (max[query_idx], sum[query_idx]), part, split)
                };
            }
        }

        for query_idx in 0..n_queries {
            let (row_idx, head) = (tile.first_row + query_idx / group, kv_head * group + query_idx % group);
            let total = &total_out[query_idx * padded_dim..][..head_dim];
            let inverse = 1.0 / sum[query_idx];
            // SAFETY: out is [rows, n_heads * head_dim]; this item alone writes its heads of its rows.
            let out =
                unsafe { std::slice::from_raw_parts_mut(out.get().add(row_idx * q_cols + head * head_dim), head_dim) };
            for (out, total) in out.iter_mut().zip(total) {
                *out = total * inverse;
            }
        }
    }
}

/// `key[word][token] = rows[token][word]`.
///
/// # Safety
/// Rows are readable for `n_words` words, `key` writable for `n_words * 16`.
#[inline(always)]
unsafe fn transpose_key<S: Simd>(simd: S, rows: &[*const u8; LANES], n_words: usize, key: *mut u32) {
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
struct Scores<V> {
    /// `[n_queries][query_words]`
    query: *const u32,
    query_words: usize,
    /// `[KEY_TILES][n_words][16]`
    key: *const u32,
    n_words: usize,
    /// `[n_queries][SPLIT]`, at the first of the tokens
    scores: *mut f32,
    scale: V,
}

impl<V: Copy> Scores<V> {
    /// # Safety
    /// The pointers hold what the fields say.
    #[inline(always)]
    unsafe fn all<S: Simd<V = V>, D: Dot>(self, simd: S, n_queries: usize) {
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

/// Turns scores into `e^(score - max)`; returns the maximum and the sum. Empty: (-inf, 0).
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32]) -> (f32, f32) {
    if scores.is_empty() {
        return (f32::NEG_INFINITY, 0.0);
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
        (max, simd.reduce_add(sum))
    }
}

/// Widens one stored head of V, zero behind `head_dim`.
///
/// # Safety
/// `row` is readable for `head_dim` stored elements; `wide.len()` is `head_dim` rounded up to 16.
#[inline(always)]
unsafe fn widen<S: Simd, D: Dot>(simd: S, row: *const u8, head_dim: usize, wide: &mut [f32]) {
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
struct WeightedSum<L> {
    /// 16 elements of V, by token and dim
    load: L,
    padded_dim: usize,
    /// `[n_queries][SPLIT]`, at the first token
    weights: *const f32,
    /// `[n_queries][padded_dim]`
    out: *mut f32,
}

impl<L: Copy> WeightedSum<L> {
    /// Queries four at a time over the tokens that all four see, then one at a time over the rest.
    ///
    /// # Safety
    /// The pointers hold what the fields say, for `seen(query)` tokens.
    #[inline(always)]
    unsafe fn all<S: Simd>(self, simd: S, n_queries: usize, seen: impl Fn(usize) -> usize)
    where
        L: Fn(usize, usize) -> S::V,
    {
        let mut query_idx = 0;
        // SAFETY: the caller's promise; dims stay below padded_dim, a multiple of 16.
        unsafe {
            while query_idx < n_queries {
                let n = if query_idx + 4 <= n_queries { 4 } else { 1 };
                // A later query never sees less, so the first one sees what all do.
                let common = seen(query_idx);
                if n == 4 {
                    self.over_dims::<S, 4>(simd, query_idx, 0, common);
                    for one in query_idx + 1..query_idx + 4 {
                        if seen(one) > common {
                            self.over_dims::<S, 1>(simd, one, common, seen(one));
                        }
                    }
                } else {
                    self.over_dims::<S, 1>(simd, query_idx, 0, common);
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

/// Merges a split into the total: `total` and `part` are sums weighted relative to their maxima. Returns (max, sum).
#[inline(always)]
fn merge<S: Simd>(simd: S, total: &mut [f32], (max, sum): (f32, f32), part: &[f32], split: (f32, f32)) -> (f32, f32) {
    let new_max = if split.0 > max { split.0 } else { max };
    let keep = simd.exp(simd.splat(max - new_max));
    let take = simd.exp(simd.splat(split.0 - new_max));
    // SAFETY: both are padded_dim long, a multiple of 16.
    unsafe {
        for start in (0..total.len()).step_by(LANES) {
            let p = total.as_mut_ptr().add(start);
            let taken = simd.mul(simd.load(part.as_ptr().add(start)), take);
            simd.store(p, simd.mul_add(simd.load(p), keep, taken));
        }
    }
    let (keep, take) = (simd.to_array(keep)[0], simd.to_array(take)[0]);
    (new_max, sum * keep + split.1 * take)
}
