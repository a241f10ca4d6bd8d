//! `out = x w^T`: the blocked product of activations and packed panels.
//!
//! Shapes: x `[rows, n_in]` f32; w `[n_panels][n_words][64]` words; out `[rows, n_out]` f32.
//! Split of work: items are (panel, block of rows). Within an item, words go in blocks of 64 (16 KiB of weights, in L1),
//! and for each block all register tiles of rows pass over it while the next block is prefetched; sums rest in a scratch
//! of `[rows, 64]` f32 between blocks.
//! Bits: an output element is one lane that adds its words in ascending order from 0, whatever the tile, block or thread.
//! Bound: read bandwidth up to some 16 rows, then the dot products.

use std::cell::RefCell;

use super::dispatch::dispatch;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Dot, Kernel, LANES, Simd};
use super::tensor::{CpuMatrix, SharedMut};
use crate::aligned::AlignedBuf;
use crate::packed::PANEL;

/// Words of the inner dimension per block: 64 * 256 bytes of weights, a third of the smallest L1 we tune for.
const BLOCK_WORDS: usize = 64;

/// Rows per item at most: their sums and their words of one block stay in L2 (96 KiB each).
const MAX_BLOCK_ROWS: usize = 384;

/// Below this many multiply-adds a product is done by the caller alone; waking a thread costs more.
const INLINE_WORK: usize = 1 << 17;

thread_local! {
    static SUMS: RefCell<AlignedBuf<f32>> = RefCell::default();
}

/// `packed` is scratch for the activations as words, `[n_blocks][rows][BLOCK_WORDS]`.
pub(crate) fn linear<D: Dot>(
    isa: Isa,
    pool: &mut Pool,
    packed: &mut AlignedBuf<u32>,
    out: &mut [f32],
    x: &[f32],
    rows: usize,
    w: &CpuMatrix,
) {
    if rows == 0 {
        return;
    }
    let work = rows * w.n_in * w.n_out;
    let parallel = work >= INLINE_WORK && pool.n_threads() > 1;
    let n_blocks = w.n_words.div_ceil(BLOCK_WORDS);
    let packed = packed.at_least(n_blocks * rows * BLOCK_WORDS);

    let target = SharedMut::new(packed);
    let pack_rows = rows.div_ceil(4 * pool.n_threads()).max(1);
    let pack = |item: usize| {
        let first_row = item * pack_rows;
        let n_rows = pack_rows.min(rows - first_row);
        dispatch(
            isa,
            Pack::<D> {
                x,
                n_in: w.n_in,
                rows,
                first_row,
                n_rows,
                out: target,
                dot: std::marker::PhantomData,
            },
        );
    };
    run(
        pool,
        parallel && rows * w.n_in >= 1 << 16,
        rows.div_ceil(pack_rows),
        &pack,
    );

    // Few panels: rows are split too, so that every thread has something.
    let n_panels = w.n_panels();
    let wanted = (4 * pool.n_threads()).div_ceil(n_panels);
    let block_rows = rows.div_ceil(wanted).clamp(24.min(rows), MAX_BLOCK_ROWS);
    let n_row_blocks = rows.div_ceil(block_rows);
    let block_rows = rows.div_ceil(n_row_blocks);
    let packed = &*packed;
    let target = SharedMut::new(out);
    let product = |item: usize| {
        let (panel_idx, row_block) = (item / n_row_blocks, item % n_row_blocks);
        let first_row = row_block * block_rows;
        let n_rows = block_rows.min(rows.saturating_sub(first_row));
        if n_rows == 0 {
            return;
        }
        SUMS.with_borrow_mut(|sums| {
            let sums = sums.at_least(n_rows * PANEL);
            let dot = std::marker::PhantomData;
            dispatch(
                isa,
                Product::<D> {
                    packed,
                    rows,
                    first_row,
                    n_rows,
                    w,
                    panel_idx,
                    sums,
                    out: target,
                    dot,
                },
            );
        });
    };
    run(pool, parallel, n_panels * n_row_blocks, &product);
}

fn run(pool: &mut Pool, parallel: bool, n_items: usize, task: &(dyn Fn(usize) + Sync)) {
    if parallel {
        pool.for_each(n_items, task)
    } else {
        (0..n_items).for_each(task)
    }
}

/// Rounds rows of x to words, `out: [n_blocks][rows][BLOCK_WORDS]`, missing words of the last block as zero.
struct Pack<'a, D> {
    x: &'a [f32],
    n_in: usize,
    rows: usize,
    first_row: usize,
    n_rows: usize,
    out: SharedMut<u32>,
    dot: std::marker::PhantomData<D>,
}

impl<D: Dot> Kernel for Pack<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let step = LANES * D::PER_WORD;
        let block = BLOCK_WORDS * D::PER_WORD;
        for row_idx in self.first_row..self.first_row + self.n_rows {
            let x = &self.x[row_idx * self.n_in..][..self.n_in];
            for (block_idx, x_block) in x.chunks(block).enumerate() {
                // SAFETY: the scratch holds n_blocks * rows * BLOCK_WORDS words; this row's of this block are ours alone.
                let out = unsafe { self.out.get().add((block_idx * self.rows + row_idx) * BLOCK_WORDS) };
                for start in (0..block).step_by(step) {
                    let rest = x_block.get(start..).unwrap_or(&[]);
                    // SAFETY: reads at most `rest.len()` elements, writes 16 of this block's 64 words.
                    unsafe { D::pack(simd, rest.as_ptr(), rest.len().min(step), out.add(start / D::PER_WORD)) };
                }
            }
        }
    }
}

/// One panel of 64 columns for a block of rows.
struct Product<'a, D> {
    /// `[n_blocks][rows][BLOCK_WORDS]`
    packed: &'a [u32],
    rows: usize,
    first_row: usize,
    n_rows: usize,
    w: &'a CpuMatrix,
    panel_idx: usize,
    /// `[n_rows][PANEL]`
    sums: &'a mut [f32],
    /// `[rows, n_out]`
    out: SharedMut<f32>,
    dot: std::marker::PhantomData<D>,
}

impl<D: Dot> Kernel for Product<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n_words = self.w.n_words;
        let words = &self.w.words()[self.panel_idx * n_words * PANEL..][..n_words * PANEL];
        let (tile_rows, tile_vectors) = S::TILE;
        let n_tiles = self.n_rows.div_ceil(tile_rows);
        for block_idx in 0..n_words.div_ceil(BLOCK_WORDS) {
            let start = block_idx * BLOCK_WORDS;
            let n_steps = BLOCK_WORDS.min(n_words - start);
            let block = &words[start * PANEL..][..n_steps * PANEL];
            let x = &self.packed[(block_idx * self.rows + self.first_row) * BLOCK_WORDS..][..self.n_rows * BLOCK_WORDS];
            for tile_idx in 0..n_tiles {
                // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
                let first = self.n_rows * tile_idx / n_tiles;
                let n_rows = self.n_rows * (tile_idx + 1) / n_tiles - first;
                let tile = Tile {
                    x: x[first * BLOCK_WORDS..][..n_rows * BLOCK_WORDS].as_ptr(),
                    w: block.as_ptr(),
                    sums: self.sums[first * PANEL..][..n_rows * PANEL].as_mut_ptr(),
                    n_steps,
                    is_first: block_idx == 0,
                    prefetch: Prefetch::of(tile_idx, n_tiles, tile_vectors),
                };
                // SAFETY: the slices above hold what `Tile` says for n_rows rows and n_steps words.
                unsafe {
                    match (n_rows, tile_vectors) {
                        (1, 4) => tile.run::<S, D, 1, 4>(simd),
                        (2, 4) => tile.run::<S, D, 2, 4>(simd),
                        (3, 4) => tile.run::<S, D, 3, 4>(simd),
                        (4, 4) => tile.run::<S, D, 4, 4>(simd),
                        (5, 4) => tile.run::<S, D, 5, 4>(simd),
                        (6, 4) => tile.run::<S, D, 6, 4>(simd),
                        (1, 2) => tile.run::<S, D, 1, 2>(simd),
                        (2, 2) => tile.run::<S, D, 2, 2>(simd),
                        (3, 2) => tile.run::<S, D, 3, 2>(simd),
                        (4, 2) => tile.run::<S, D, 4, 2>(simd),
                        (5, 2) => tile.run::<S, D, 5, 2>(simd),
                        (6, 2) => tile.run::<S, D, 6, 2>(simd),
                        (1, 1) => tile.run::<S, D, 1, 1>(simd),
                        (2, 1) => tile.run::<S, D, 2, 1>(simd),
                        (3, 1) => tile.run::<S, D, 3, 1>(simd),
                        (4, 1) => tile.run::<S, D, 4, 1>(simd),
                        other => unreachable!("no register tile of {other:?}"),
                    }
                }
            }
        }
        let n_out = self.w.n_out;
        let first_col = self.panel_idx * PANEL;
        let n_cols = PANEL.min(n_out - first_col);
        for row_idx in 0..self.n_rows {
            let sums = &self.sums[row_idx * PANEL..][..n_cols];
            // SAFETY: out is [rows, n_out]; this item alone writes these columns of these rows.
            unsafe {
                let out = self.out.get().add((self.first_row + row_idx) * n_out + first_col);
                std::ptr::copy_nonoverlapping(sums.as_ptr(), out, n_cols);
            }
        }
    }
}

/// Which lines of the next block a tile prefetches: `lines` of the four of each step, from `first_line` on.
#[derive(Clone, Copy)]
struct Prefetch {
    first_line: usize,
    lines: usize,
}

impl Prefetch {
    #[inline(always)]
    fn of(tile_idx: usize, n_tiles: usize, tile_vectors: usize) -> Prefetch {
        let lines = 4_usize.div_ceil(n_tiles);
        let first_line = tile_idx * lines;
        // Narrow tiles pass over a block several times; they rely on the hardware's prefetcher.
        let lines = if tile_vectors == 4 {
            lines.min(4_usize.saturating_sub(first_line))
        } else {
            0
        };
        Prefetch { first_line, lines }
    }
}

/// One register tile over one block.
#[derive(Clone, Copy)]
struct Tile {
    /// `[rows][BLOCK_WORDS]`
    x: *const u32,
    /// `[n_steps][PANEL]`, and the next block behind it
    w: *const u32,
    /// `[rows][PANEL]`
    sums: *mut f32,
    n_steps: usize,
    is_first: bool,
    prefetch: Prefetch,
}

impl Tile {
    /// # Safety
    /// The pointers hold what the fields say, for ROWS rows.
    #[inline(always)]
    unsafe fn run<S: Simd, D: Dot, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        for first_vector in (0..PANEL / LANES).step_by(VECTORS) {
            // SAFETY: the caller's promise, and columns of this vector group lie within the panel.
            unsafe {
                match self.prefetch.lines {
                    0 => self.pass::<S, D, ROWS, VECTORS, 0>(simd, first_vector * LANES),
                    1 => self.pass::<S, D, ROWS, VECTORS, 1>(simd, first_vector * LANES),
                    2 => self.pass::<S, D, ROWS, VECTORS, 2>(simd, first_vector * LANES),
                    _ => self.pass::<S, D, ROWS, VECTORS, 4>(simd, first_vector * LANES),
                }
            }
        }
    }

    /// # Safety
    /// As `run`, and `first_col + VECTORS * 16 <= PANEL`.
    #[inline(always)]
    unsafe fn pass<S: Simd, D: Dot, const ROWS: usize, const VECTORS: usize, const LINES: usize>(
        self,
        simd: S,
        first_col: usize,
    ) {
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        let at = |row_idx: usize, vector_idx: usize| row_idx * PANEL + first_col + vector_idx * LANES;
        // SAFETY: every access stays within [ROWS][PANEL] sums, [ROWS][BLOCK_WORDS] x and [n_steps][PANEL] w, as
        // row_idx < ROWS, step < n_steps <= BLOCK_WORDS; prefetched addresses are never dereferenced.
        unsafe {
            if !self.is_first {
                for (row_idx, sums) in sums.iter_mut().enumerate() {
                    for (vector_idx, sum) in sums.iter_mut().enumerate() {
                        *sum = simd.load(self.sums.add(at(row_idx, vector_idx)));
                    }
                }
            }
            let next = self
                .w
                .wrapping_add(self.n_steps * PANEL + self.prefetch.first_line * LANES);
            for step in 0..self.n_steps {
                for line in 0..LINES {
                    simd.prefetch(next.wrapping_add(step * PANEL + line * LANES));
                }
                let w: [D::Words<S>; VECTORS] = std::array::from_fn(|vector_idx| {
                    D::load(simd, self.w.add(step * PANEL + first_col + vector_idx * LANES))
                });
                for (row_idx, sums) in sums.iter_mut().enumerate() {
                    let x = D::splat(simd, *self.x.add(row_idx * BLOCK_WORDS + step));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = D::dot(simd, *sum, x, w);
                    }
                }
            }
            for (row_idx, sums) in sums.iter().enumerate() {
                for (vector_idx, sum) in sums.iter().enumerate() {
                    simd.store(self.sums.add(at(row_idx, vector_idx)), *sum);
                }
            }
        }
    }
}
