//! Causal attention over the paged cache, for prefill chunks and decode tokens alike.
//!
//! Shapes: q rows `[n_heads, head_dim]` f32; K and V blocks `[n_kv_heads, block_size, head_dim]`; out as q.
//! Split of work: items are (sequence, tile of rows, KV head), so K and V are loaded once for all query heads of the group
//! and all rows of the tile. K goes through a transposed tile of 16 tokens, so scores need no horizontal sums.
//! Bits: the context is cut at fixed positions, every 256 tokens. Within a split, a score adds over head_dim in order, the
//! weighted sum adds over tokens in order; splits merge in order. Neither tile, chunk, batch nor thread appears in that.
//! Bound: read bandwidth in decode, the dot products in prefill.

mod arithmetic;

use std::cell::RefCell;

use arithmetic::{Scores, WeightedSum, merge, soft_cap, softmax, transpose_key, widen};

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Dot, Kernel, LANES, Simd};
use super::tensor::{CpuVector, SharedMut};
use crate::aligned::AlignedBuf;
use crate::backend::{AttentionParams, RaggedBatch, WINDOW_GRAIN};
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

// What a window hides is skipped in whole chunks of V and whole pairs of tiles of K.
const _: () = assert!(WINDOW_GRAIN.is_multiple_of(VALUE_CHUNK) && WINDOW_GRAIN.is_multiple_of(KEY_TILES * LANES));
const _: () = assert!(SPLIT.is_multiple_of(WINDOW_GRAIN));

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
    params: &AttentionParams<CpuVector>,
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
        let first_seen = params
            .window
            .map_or(0, |window| (sequence.start_pos + 1).saturating_sub(window));
        let first_read = first_seen / WINDOW_GRAIN * WINDOW_GRAIN / layout.block_size;
        kv.assert_readable(layer, &sequence.block_table[first_read..layout.blocks_for(context)]);
        for start in (0..sequence.n_tokens).step_by(tile_rows) {
            let n_rows = tile_rows.min(sequence.n_tokens - start);
            let first_pos = sequence.start_pos + start;
            tiles.push(RowTile {
                sequence_idx,
                first_row: first_row + start,
                first_pos,
                n_rows,
            });
            let seen = (first_pos + n_rows).min(params.window.unwrap_or(usize::MAX).saturating_add(n_rows));
            work += seen * n_rows * params.n_heads * layout.head_dim;
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
            let item = Item::<D> {
                pages,
                kv_head: item % layout.n_kv_heads,
                tile,
                params,
                group,
                qkv,
                out: target,
                dot: std::marker::PhantomData,
            };
            dispatch(isa, Work { item, scratch });
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
#[derive(Clone, Copy)]
struct Item<'a, D> {
    pages: Pages<'a>,
    kv_head: usize,
    tile: RowTile,
    params: &'a AttentionParams<CpuVector>,
    group: usize,
    qkv: &'a [f32],
    out: SharedMut<f32>,
    dot: std::marker::PhantomData<D>,
}

/// An item and the scratch of the thread that has it.
struct Work<'a, D> {
    item: Item<'a, D>,
    scratch: &'a mut Scratch,
}

/// The scratch, cut to an item's size.
struct Buffers<'a> {
    /// `[n_queries, query_words]`
    query: &'a mut [u32],
    /// `[KEY_TILES, n_words, 16]`
    key: &'a mut [u32],
    /// `[n_queries, SPLIT]`: scores, then weights
    scores: &'a mut [f32],
    /// `[VALUE_CHUNK, padded_dim]`
    value: &'a mut [f32],
    /// `[n_queries, padded_dim]`: weighted sum of this split, and of all splits so far
    split_out: &'a mut [f32],
    total_out: &'a mut [f32],
    /// `[n_queries, (maximum, sum of weights)]`, likewise
    split_stats: &'a mut [[f32; 2]],
    total_stats: &'a mut [[f32; 2]],
}

impl<D: Dot> Kernel for Work<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Work { item, scratch } = self;
        let (n_queries, padded_dim) = (item.n_queries(), item.padded_dim());
        let stats = bytemuck::cast_slice_mut(scratch.stats.at_least(4 * n_queries));
        let (split_stats, total_stats) = stats.split_at_mut(n_queries);
        let buffers = &mut Buffers {
            query: scratch.query.at_least(n_queries * item.query_words()),
            key: scratch.key.at_least(KEY_TILES * item.n_words() * LANES),
            scores: scratch.scores.at_least(n_queries * SPLIT),
            value: scratch.value.at_least(VALUE_CHUNK * padded_dim),
            split_out: scratch.split_out.at_least(n_queries * padded_dim),
            total_out: scratch.total_out.at_least(n_queries * padded_dim),
            split_stats,
            total_stats,
        };
        item.pack_queries(simd, buffers);
        buffers.total_stats.fill([f32::NEG_INFINITY, 0.0]);
        let context = item.tile.first_pos + item.tile.n_rows;
        for start in (item.first_visible(0) / SPLIT * SPLIT..context).step_by(SPLIT) {
            let split = Split {
                start,
                end: context.min(start + SPLIT),
            };
            item.score(simd, buffers, split);
            item.weigh(simd, buffers, split);
            item.merge_into_total(simd, buffers);
        }
        item.write(buffers);
    }
}

/// Tokens `start..end` of the context; start is a multiple of `SPLIT`.
#[derive(Clone, Copy)]
struct Split {
    start: usize,
    end: usize,
}

impl<D: Dot> Item<'_, D> {
    fn n_queries(&self) -> usize {
        self.tile.n_rows * self.group
    }

    fn n_words(&self) -> usize {
        self.pages.layout.head_dim / D::PER_WORD
    }

    fn query_words(&self) -> usize {
        self.n_words().next_multiple_of(LANES)
    }

    fn padded_dim(&self) -> usize {
        self.pages.layout.head_dim.next_multiple_of(LANES)
    }

    /// Row of the batch and query head of one of the item's queries, rows outermost.
    fn row_and_head(&self, query_idx: usize) -> (usize, usize) {
        (
            self.tile.first_row + query_idx / self.group,
            self.kv_head * self.group + query_idx % self.group,
        )
    }

    /// How many tokens from `first` on a query sees: its own position is its last.
    #[inline(always)]
    fn visible_from(&self, first: usize, query_idx: usize) -> usize {
        (self.tile.first_pos + query_idx / self.group + 1).saturating_sub(first)
    }

    /// The first token that a query sees; a later query never sees an earlier one.
    #[inline(always)]
    fn first_visible(&self, query_idx: usize) -> usize {
        let end = self.tile.first_pos + query_idx / self.group + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))
    }

    /// How many tokens from `first` on a query does not see yet.
    #[inline(always)]
    fn hidden_from(&self, first: usize, query_idx: usize) -> usize {
        self.first_visible(query_idx).saturating_sub(first)
    }

    #[inline(always)]
    fn pack_queries<S: Simd>(&self, simd: S, buffers: &mut Buffers<'_>) {
        let KvLayout {
            n_kv_heads, head_dim, ..
        } = self.pages.layout;
        let qkv_cols = (self.params.n_heads + 2 * n_kv_heads) * head_dim;
        for (query_idx, words) in buffers.query.chunks_exact_mut(self.query_words()).enumerate() {
            let (row_idx, head) = self.row_and_head(query_idx);
            let query = &self.qkv[row_idx * qkv_cols + head * head_dim..][..head_dim];
            for (chunk, words) in query.chunks(LANES * D::PER_WORD).zip(words.chunks_exact_mut(LANES)) {
                // SAFETY: reads the chunk, writes 16 words.
                unsafe { D::pack(simd, chunk.as_ptr(), chunk.len(), words.as_mut_ptr()) };
            }
        }
    }

    /// Scores of the split for every query, turned into weights; their maximum and sum.
    #[inline(always)]
    fn score<S: Simd>(&self, simd: S, buffers: &mut Buffers<'_>, split: Split) {
        let Item { pages, kv_head, .. } = *self;
        let (n_words, n_queries) = (self.n_words(), self.n_queries());
        let context = self.tile.first_pos + self.tile.n_rows;
        let unseen = self.hidden_from(split.start, 0) / (KEY_TILES * LANES) * KEY_TILES * LANES;
        for first in (split.start + unseen..split.end).step_by(KEY_TILES * LANES) {
            for (tile_idx, key) in buffers.key.chunks_exact_mut(n_words * LANES).enumerate() {
                let start = first + tile_idx * LANES;
                if start >= split.end {
                    // The scores of a missing tile are computed from what is left there, and never looked at.
                    break;
                }
                let rows = pages.tokens(pages.key, kv_head, start, split.end);
                pages.prefetch(simd, pages.value, kv_head, start, split.end);
                pages.prefetch(simd, pages.key, kv_head, start + KEY_TILES * LANES, context);
                // SAFETY: the rows are head_dim elements of blocks checked by `attention`; a tile is n_words * 16 words.
                unsafe { transpose_key(simd, &rows, n_words, key.as_mut_ptr()) };
            }
            let dots = Scores {
                query: buffers.query.as_ptr(),
                query_words: self.query_words(),
                key: buffers.key.as_ptr(),
                n_words,
                scores: buffers.scores[first - split.start..].as_mut_ptr(),
                scale: simd.splat(self.params.scale),
            };
            // SAFETY: the buffers are as large as said there, and SPLIT is a multiple of the tokens scored together.
            unsafe { dots.all::<S, D>(simd, n_queries) };
        }
        for (query_idx, stats) in buffers.split_stats.iter_mut().enumerate() {
            let visible = self.visible_from(split.start, query_idx).min(SPLIT);
            let hidden = self.hidden_from(split.start, query_idx).min(visible);
            let scores = &mut buffers.scores[query_idx * SPLIT..][..visible];
            if let Some(cap) = self.params.soft_cap {
                soft_cap(simd, scores, cap);
            }
            if hidden == visible {
                // Weights of queries that see nothing here may be summed beside those of others.
                scores.fill(0.0);
                *stats = [f32::NEG_INFINITY, 0.0];
                continue;
            }
            scores[..hidden].fill(f32::NEG_INFINITY);
            *stats = softmax(simd, scores);
        }
    }

    /// `split_out = weights * V` over the split.
    #[inline(always)]
    fn weigh<S: Simd>(&self, simd: S, buffers: &mut Buffers<'_>, split: Split) {
        let Item { pages, kv_head, .. } = *self;
        let (n_queries, padded_dim, head_dim) = (self.n_queries(), self.padded_dim(), pages.layout.head_dim);
        buffers.split_out.fill(0.0);
        let out = buffers.split_out.as_mut_ptr();
        let direct = n_queries <= DIRECT_QUERIES && head_dim == padded_dim;
        let n_tokens = if direct { LANES } else { VALUE_CHUNK };
        let unseen = self.hidden_from(split.start, 0) / n_tokens * n_tokens;
        for first in (split.start + unseen..split.end).step_by(n_tokens) {
            let weights = buffers.scores[first - split.start..].as_ptr();
            let seen = |query_idx: usize| {
                let end = self.visible_from(first, query_idx).min(n_tokens);
                self.hidden_from(first, query_idx).min(end)..end
            };
            let end = split.end.min(first + n_tokens);
            if direct {
                let rows = pages.tokens(pages.value, kv_head, first, end);
                let size = 4 / D::PER_WORD;
                // SAFETY: as for K: a row is head_dim elements of a checked block, and dim + 16 <= head_dim.
                let load = |token: usize, dim: usize| unsafe { D::widen(simd, rows[token].add(dim * size)) };
                // SAFETY: seen() <= 16 tokens for every query, and the buffers are as large as said there.
                unsafe {
                    WeightedSum {
                        load,
                        padded_dim,
                        weights,
                        out,
                    }
                    .all(simd, n_queries, seen)
                };
                continue;
            }
            for start in (first..end).step_by(LANES) {
                let rows = pages.tokens(pages.value, kv_head, start, end);
                let wide = buffers.value[(start - first) * padded_dim..].chunks_exact_mut(padded_dim);
                for (row, wide) in rows.iter().zip(wide).take(end - start) {
                    // SAFETY: as for K: a row is head_dim elements of a checked block.
                    unsafe { widen::<S, D>(simd, *row, head_dim, wide) };
                }
            }
            let wide = buffers.value.as_ptr();
            // SAFETY: token is one of those widened above, and dim + 16 <= padded_dim.
            let load = |token: usize, dim: usize| unsafe { simd.load(wide.add(token * padded_dim + dim)) };
            // SAFETY: seen() is at most the tokens widened, and the buffers are as large as said there.
            unsafe {
                WeightedSum {
                    load,
                    padded_dim,
                    weights,
                    out,
                }
                .all(simd, n_queries, seen)
            };
        }
    }

    #[inline(always)]
    fn merge_into_total<S: Simd>(&self, simd: S, buffers: &mut Buffers<'_>) {
        let padded_dim = self.padded_dim();
        for query_idx in 0..self.n_queries() {
            if buffers.split_stats[query_idx][1] == 0.0 {
                // It sees nothing of this split: what it sees has a weight of at least 1, the maximum's.
                continue;
            }
            let part = &buffers.split_out[query_idx * padded_dim..][..padded_dim];
            let total = &mut buffers.total_out[query_idx * padded_dim..][..padded_dim];
            let (part_stats, total_stats) = (buffers.split_stats[query_idx], &mut buffers.total_stats[query_idx]);
            if total_stats[1] == 0.0 {
                total.copy_from_slice(part);
                *total_stats = part_stats;
            } else {
                *total_stats = merge(simd, total, *total_stats, part, part_stats);
            }
        }
    }

    fn write(&self, buffers: &Buffers<'_>) {
        let head_dim = self.pages.layout.head_dim;
        for (query_idx, total) in buffers.total_out.chunks_exact(self.padded_dim()).enumerate() {
            let (row_idx, head) = self.row_and_head(query_idx);
            let offset = (row_idx * self.params.n_heads + head) * head_dim;
            // SAFETY: out is [rows, n_heads * head_dim]; this item alone writes its heads of its rows.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.get().add(offset), head_dim) };
            let [max, sum] = buffers.total_stats[query_idx];
            let sink = self
                .params
                .sinks
                .as_ref()
                .map_or(0.0, |sinks| (sinks.data[head] - max).exp());
            let inverse = 1.0 / (sum + sink);
            for (out, total) in out.iter_mut().zip(total) {
                *out = total * inverse;
            }
        }
    }
}
