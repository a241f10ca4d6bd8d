//! How a step's attention is cut into work items of nearly equal size, and which partial results are joined afterwards
//! (FlashInfer's plan and run, Ye et al., arXiv:2501.01005). Pure and without allocation once warm; launches nothing.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::launch::{self, Launch};
use crate::backend::WINDOW_GRAIN;

/// One CTA's work; `struct Item` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// Row of the batch of the sequence's first new token.
    pub first_row: u32,
    /// That token's position.
    pub start_pos: u32,
    /// Where the sequence's table begins among all block tables.
    pub first_block: u32,
    /// KV head.
    pub kv_head: u32,
    /// First packed query: token times group, plus head of the group.
    pub first_query: u32,
    /// Packed queries; 0 does nothing.
    pub n_queries: u32,
    /// First token read; a multiple of [`WINDOW_GRAIN`].
    pub kv_start: u32,
    /// One past the last token read.
    pub kv_end: u32,
    /// First row of the partial state, or [`NONE`] where the result is whole.
    pub partial: u32,
    reserved: [u32; 3],
}

/// Queries whose partial states are joined; `struct Merge` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Merge {
    /// Row of the batch of the sequence's first new token.
    pub first_row: u32,
    /// First packed query.
    pub first_query: u32,
    /// Packed queries; 0 does nothing.
    pub n_queries: u32,
    /// KV head.
    pub kv_head: u32,
    /// First partial row of the first split; those of the next are `n_queries` further.
    pub partial: u32,
    /// Splits.
    pub n_splits: u32,
    reserved: [u32; 2],
}

/// No partial row: the item writes the result itself.
pub const NONE: u32 = u32::MAX;

/// Cuts lie at multiples of this many tokens from where an item's tokens begin: a whole tile of every kernel.
const GRAIN: u32 = 64;

/// Fewer tokens than this are not worth a CTA of their own and a merge.
const SMALLEST_SPLIT: u32 = 128;

const _: () = assert!(GRAIN as usize == WINDOW_GRAIN && SMALLEST_SPLIT.is_multiple_of(GRAIN));

/// Which kernels run a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// `attention_decode` and `attention_prefill`: bf16 and f16, head sizes of [`super::sources::HEAD_DIMS`].
    TensorCore,
    /// `attention_scalar` for all: f32, and other head sizes up to 256.
    Scalar,
}

/// What a layer's attention looks like to the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: u32,
    /// KV heads.
    pub n_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Tokens that a query sees, itself included; `None` shows all.
    pub window: Option<u32>,
    /// Which kernels.
    pub kernels: Kernels,
}

/// Where contexts are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splits {
    /// So that about `n_ctas` items of like size come out; what else is in the batch moves the cuts.
    Balanced {
        /// CTAs that the card runs at once.
        n_ctas: u32,
    },
    /// At multiples of `tokens`, itself a multiple of 64, of every context, and one kernel for decode and prefill:
    /// deterministic mode.
    Fixed {
        /// Tokens between cuts.
        tokens: u32,
    },
}

/// A sequence of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Row of its first new token.
    pub first_row: u32,
    /// That token's position.
    pub start_pos: u32,
    /// New tokens, at least 1.
    pub n_tokens: u32,
    /// Where its table begins among all block tables.
    pub first_block: u32,
}

/// A step's attention as work items. Kept between steps and refreshed in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// For `attention_decode`, before everything else.
    pub decode: Vec<Item>,
    /// For `attention_prefill`, or `attention_scalar`.
    pub prefill: Vec<Item>,
    /// For `attention_merge`.
    pub merges: Vec<Merge>,
    /// What runs together, one after the other.
    pub waves: Vec<Wave>,
    /// Rows of the partial state that the items use: of the largest wave.
    pub n_partial_rows: u32,
    max_partial_rows: Option<u32>,
    tiles: Vec<Item>,
}

/// Items and then the merges of their partial states, which no other wave sees: a later one uses the same rows. There is one,
/// unless the plan's partial rows are bounded and its splits fixed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wave {
    /// Of [`Plan::prefill`].
    pub prefill: Range<usize>,
    /// Of [`Plan::merges`].
    pub merges: Range<usize>,
}

/// Sizes that every plan of a kind stays within: what a captured graph is built for, and what memory is set aside for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanSize {
    /// Items for `attention_decode`.
    pub decode: usize,
    /// Items for `attention_prefill` or `attention_scalar`.
    pub prefill: usize,
    /// Merges.
    pub merges: usize,
    /// Rows of the partial state.
    pub n_partial_rows: u32,
}

/// The list that a sequence's items go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Decode,
    Prefill,
}

impl Shape {
    pub(super) fn new(
        [n_heads, n_kv_heads]: [usize; 2],
        head_dim: usize,
        window: Option<usize>,
        kernels: Kernels,
    ) -> Shape {
        Shape {
            n_heads: n_heads as u32,
            n_kv_heads: n_kv_heads as u32,
            head_dim: head_dim as u32,
            // A window of more tokens than there can be shows all.
            window: window.and_then(|window| u32::try_from(window).ok()),
            kernels,
        }
    }

    fn group(&self) -> u32 {
        self.n_heads / self.n_kv_heads
    }

    /// Packed queries that an item takes.
    fn tile_queries(&self, kernel: Kernel) -> u32 {
        match (kernel, self.kernels) {
            (Kernel::Decode, _) => launch::DECODE_QUERIES,
            (Kernel::Prefill, Kernels::TensorCore) => launch::prefill_queries(self.head_dim),
            (Kernel::Prefill, Kernels::Scalar) => launch::SCALAR_QUERIES,
        }
    }

    /// Which kernel takes a sequence.
    fn kernel_of(&self, splits: Splits, n_tokens: u32) -> Kernel {
        match (self.kernels, splits, n_tokens) {
            (Kernels::TensorCore, Splits::Balanced { .. }, 1) => Kernel::Decode,
            (Kernels::TensorCore | Kernels::Scalar, Splits::Balanced { .. } | Splits::Fixed { .. }, _) => {
                Kernel::Prefill
            }
        }
    }
}

impl PlanSize {
    /// For steps of at most `n_sequences` that each add one token, none beyond `max_context` tokens.
    pub fn of_decode(shape: Shape, splits: Splits, n_sequences: u32, max_context: u32) -> PlanSize {
        let kernel = shape.kernel_of(splits, 1);
        let tile = shape.tile_queries(kernel);
        let n_tiles = n_sequences * shape.n_kv_heads * shape.group().div_ceil(tile);
        let (n_items, n_merges, n_partial_items) = match splits {
            // A tile that is cut has two parts at least, so those of all are at most twice what may be added.
            Splits::Balanced { n_ctas } => (n_ctas.max(n_tiles + n_ctas / 2), n_tiles.min(n_ctas / 2), n_ctas),
            Splits::Fixed { tokens } => {
                let n_items = n_tiles * max_context.div_ceil(tokens);
                (n_items, n_tiles, n_items)
            }
        };
        let (decode, prefill) = match kernel {
            Kernel::Decode => (n_items as usize, 0),
            Kernel::Prefill => (0, n_items as usize),
        };
        PlanSize {
            decode,
            prefill,
            merges: n_merges as usize,
            n_partial_rows: n_partial_items * tile.min(shape.group()),
        }
    }

    /// For any step of at most `n_sequences` with `n_rows` new tokens in all, none beyond `max_context`. Partial rows are those
    /// of a plan bounded to [`PlanSize::least_partial_rows`] or `max_partial_rows`, whichever is more.
    pub fn of_step(
        shape: Shape,
        splits: Splits,
        n_sequences: u32,
        n_rows: u32,
        max_context: u32,
        max_partial_rows: u32,
    ) -> PlanSize {
        let n_sequences = n_sequences.min(n_rows);
        // Each sequence may have one tile that is not full.
        let n_tiles = |tile: u32| shape.n_kv_heads as usize * (n_sequences + n_rows * shape.group() / tile) as usize;
        let prefill_tile = shape.tile_queries(Kernel::Prefill);
        match splits {
            Splits::Balanced { n_ctas } => {
                let n_items = |n_tiles: usize| (n_ctas as usize).max(n_tiles + n_ctas as usize / 2);
                let decode_tile = match shape.kernels {
                    Kernels::TensorCore => shape.tile_queries(Kernel::Decode),
                    Kernels::Scalar => 0,
                };
                PlanSize {
                    decode: if decode_tile == 0 {
                        0
                    } else {
                        n_items(n_tiles(decode_tile))
                    },
                    prefill: n_items(n_tiles(prefill_tile)),
                    merges: n_ctas as usize,
                    n_partial_rows: n_ctas * (decode_tile + prefill_tile),
                }
            }
            Splits::Fixed { tokens } => PlanSize {
                decode: 0,
                prefill: n_tiles(prefill_tile) * max_context.div_ceil(tokens) as usize,
                merges: n_tiles(prefill_tile),
                n_partial_rows: max_partial_rows.max(PlanSize::least_partial_rows(shape, splits, max_context)),
            },
        }
    }

    /// Partial rows of the longest context's tile: no plan of fixed splits can do with fewer.
    pub fn least_partial_rows(shape: Shape, splits: Splits, max_context: u32) -> u32 {
        match splits {
            Splits::Balanced { .. } => 0,
            Splits::Fixed { tokens } => shape.tile_queries(Kernel::Prefill) * max_context.div_ceil(tokens),
        }
    }

    /// Bytes of the items and merges.
    pub fn n_bytes(&self) -> usize {
        (self.decode + self.prefill) * size_of::<Item>() + self.merges * size_of::<Merge>()
    }
}

impl Plan {
    /// Plans of fixed splits that use at most so many partial rows at a time.
    pub fn bounded(max_partial_rows: u32) -> Plan {
        Plan {
            max_partial_rows: Some(max_partial_rows),
            ..Plan::default()
        }
    }

    /// Plans a step anew.
    pub fn refresh(&mut self, shape: Shape, splits: Splits, sequences: &[Sequence]) {
        assert!(
            shape.n_kv_heads > 0 && shape.n_heads.is_multiple_of(shape.n_kv_heads) && shape.window != Some(0),
            "plan: {shape:?}"
        );
        if let Splits::Fixed { tokens } = splits {
            assert!(
                tokens > 0 && tokens.is_multiple_of(GRAIN),
                "plan: cuts every {tokens} tokens"
            );
        }
        self.merges.clear();
        self.waves.clear();
        self.n_partial_rows = 0;
        let mut decode = std::mem::take(&mut self.decode);
        let mut prefill = std::mem::take(&mut self.prefill);
        let n_rows = self.cut_all(&mut decode, shape, splits, sequences, Kernel::Decode, 0);
        let n_rows = self.cut_all(&mut prefill, shape, splits, sequences, Kernel::Prefill, n_rows);
        self.end_wave(&mut prefill, n_rows);
        (self.decode, self.prefill) = (decode, prefill);
    }

    /// What came after the wave before is one more.
    fn end_wave(&mut self, prefill: &mut [Item], n_partial_rows: u32) {
        let (first_item, first_merge) = self
            .waves
            .last()
            .map_or((0, 0), |wave| (wave.prefill.end, wave.merges.end));
        // The longest first, so that the last to be started are short.
        prefill[first_item..].sort_by_key(|item| std::cmp::Reverse(item.kv_end - item.kv_start));
        self.waves.push(Wave {
            prefill: first_item..prefill.len(),
            merges: first_merge..self.merges.len(),
        });
        self.n_partial_rows = self.n_partial_rows.max(n_partial_rows);
    }

    /// Items of the sequences that one kernel takes, in a wave that has `n_partial_rows`; how many its last wave has then.
    fn cut_all(
        &mut self,
        items: &mut Vec<Item>,
        shape: Shape,
        splits: Splits,
        sequences: &[Sequence],
        kernel: Kernel,
        mut n_partial_rows: u32,
    ) -> u32 {
        items.clear();
        self.tiles.clear();
        for sequence in sequences
            .iter()
            .filter(|s| shape.kernel_of(splits, s.n_tokens) == kernel)
        {
            self.tiles.extend(tiles(shape, *sequence, shape.tile_queries(kernel)));
        }
        let largest = match splits {
            Splits::Balanced { n_ctas } => balanced_split(&self.tiles, n_ctas / shape.n_kv_heads),
            Splits::Fixed { tokens } => tokens,
        };
        let tiles = std::mem::take(&mut self.tiles);
        for tile in &tiles {
            let (length, n_parts) = match splits {
                Splits::Balanced { .. } => {
                    let n_tokens = tile.kv_end - tile.kv_start;
                    let length = n_tokens.div_ceil(n_tokens.div_ceil(largest)).next_multiple_of(GRAIN);
                    (length, n_tokens.div_ceil(length))
                }
                Splits::Fixed { tokens } => (tokens, tile.kv_end.div_ceil(tokens) - tile.kv_start / tokens),
            };
            // Fixed cuts count from the beginning of the context, balanced ones from where the tile's tokens begin.
            let origin = match splits {
                Splits::Balanced { .. } => tile.kv_start,
                Splits::Fixed { tokens } => tile.kv_start / tokens * tokens,
            };
            let n_tile_rows = if n_parts == 1 { 0 } else { n_parts * tile.n_queries };
            for kv_head in 0..shape.n_kv_heads {
                let is_full = |most: u32| n_partial_rows > 0 && n_partial_rows + n_tile_rows > most;
                if matches!(splits, Splits::Fixed { .. }) && self.max_partial_rows.is_some_and(is_full) {
                    self.end_wave(items, n_partial_rows);
                    n_partial_rows = 0;
                }
                let partial = n_partial_rows;
                for part_idx in 0..n_parts {
                    items.push(Item {
                        kv_head,
                        kv_start: tile.kv_start.max(origin + part_idx * length),
                        kv_end: tile.kv_end.min(origin + (part_idx + 1) * length),
                        partial: if n_parts == 1 {
                            NONE
                        } else {
                            partial + part_idx * tile.n_queries
                        },
                        ..*tile
                    });
                }
                if n_parts > 1 {
                    n_partial_rows += n_tile_rows;
                    self.merges.push(Merge {
                        first_row: tile.first_row,
                        first_query: tile.first_query,
                        n_queries: tile.n_queries,
                        kv_head,
                        partial,
                        n_splits: n_parts,
                        reserved: [0; 2],
                    });
                }
            }
        }
        self.tiles = tiles;
        n_partial_rows
    }

    /// Whether [`Plan::pad_to`] can fill it up to that size.
    pub fn fits(&self, size: PlanSize) -> bool {
        self.waves.len() == 1
            && self.decode.len() <= size.decode
            && self.prefill.len() <= size.prefill
            && self.merges.len() <= size.merges
            && self.n_partial_rows <= size.n_partial_rows
    }

    /// Fills up to `size` with items that do nothing, so that a captured graph can run it.
    pub fn pad_to(&mut self, size: PlanSize) {
        assert!(
            self.fits(size),
            "plan: {} decode items, {} prefill items, {} merges and {} partial rows for {size:?}",
            self.decode.len(),
            self.prefill.len(),
            self.merges.len(),
            self.n_partial_rows
        );
        self.decode.resize(size.decode, Item::default());
        self.prefill.resize(size.prefill, Item::default());
        self.merges.resize(size.merges, Merge::default());
        self.waves = vec![Wave {
            prefill: 0..size.prefill,
            merges: 0..size.merges,
        }];
    }

    /// How `attention_merge` is launched for `n_merges` of this plan, padding included.
    pub fn merge_launch(&self, shape: Shape, n_merges: usize) -> Launch {
        let kernel = if self.prefill.is_empty() {
            Kernel::Decode
        } else {
            Kernel::Prefill
        };
        let tile = shape.tile_queries(kernel);
        launch::attention_merge(n_merges as u32, tile)
    }
}

/// A sequence's packed queries in tiles, each with all the tokens that its queries see, for KV head 0.
fn tiles(shape: Shape, sequence: Sequence, tile_queries: u32) -> impl Iterator<Item = Item> {
    let group = shape.group();
    let n_queries = sequence.n_tokens * group;
    (0..n_queries).step_by(tile_queries as usize).map(move |first_query| {
        let n_queries = tile_queries.min(n_queries - first_query);
        let end_of = |query: u32| sequence.start_pos + query / group + 1;
        let first_seen = shape
            .window
            .map_or(0, |window| end_of(first_query).saturating_sub(window));
        Item {
            first_row: sequence.first_row,
            start_pos: sequence.start_pos,
            first_block: sequence.first_block,
            kv_head: 0,
            first_query,
            n_queries,
            kv_start: first_seen / GRAIN * GRAIN,
            kv_end: end_of(first_query + n_queries - 1),
            partial: NONE,
            reserved: [0; 3],
        }
    })
}

/// The smallest number of tokens, a multiple of [`GRAIN`], so that parts no longer than it are at most `n_parts`. Where the tiles
/// alone are nearly as many or more, half of `n_parts` may be added to them: of contexts of like length none is cut then, and
/// one that is much longer than the others is not left to one CTA, on which all would wait.
fn balanced_split(tiles: &[Item], n_parts: u32) -> u32 {
    let most_parts = u64::from(n_parts).max(tiles.len() as u64 + u64::from(n_parts / 2));
    let longest = tiles.iter().map(|tile| tile.kv_end - tile.kv_start).max().unwrap_or(0);
    let fits = |length: u32| {
        let parts = tiles
            .iter()
            .map(|tile| u64::from((tile.kv_end - tile.kv_start).div_ceil(length)));
        parts.sum::<u64>() <= most_parts
    };
    let (mut low, mut high) = (
        SMALLEST_SPLIT / GRAIN,
        longest.div_ceil(GRAIN).max(SMALLEST_SPLIT / GRAIN),
    );
    while low < high {
        let middle = (low + high) / 2;
        if fits(middle * GRAIN) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low * GRAIN
}

#[cfg(test)]
mod tests;
