//! Grid, block and shared memory of each kernel as functions of its shapes: the numbers that host and kernels must agree on.
//! Pure; launches nothing.

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// CTAs.
    pub grid: [u32; 3],
    /// Threads of a CTA.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
}

const fn ctas(n_ctas: u32, n_threads: u32) -> Launch {
    Launch {
        grid: [n_ctas, 1, 1],
        block: [n_threads, 1, 1],
        shared_bytes: 0,
    }
}

/// Threads of a CTA of the kernels over rows and elements.
const ROW_THREADS: u32 = 256;

/// Elements that a CTA of `elementwise.cu` takes.
const ELEMENTS_PER_CTA: u64 = 2048;

/// `embed`, `gather_rows`, `rms_norm`, `add_rms_norm`, `moe_combine`: a CTA a row.
pub const fn rows(n_rows: u32) -> Launch {
    ctas(n_rows, ROW_THREADS)
}

/// `add`, `add_bias`, `soft_cap`, `gated`, `convert`.
pub const fn elements(n_elements: u64) -> Launch {
    ctas(n_elements.div_ceil(ELEMENTS_PER_CTA) as u32, ROW_THREADS)
}

/// `rope_append`: a CTA a row, with a scale for each head of q and k.
pub const fn rope_append(n_rows: u32, n_heads: u32, n_kv_heads: u32) -> Launch {
    Launch {
        shared_bytes: (n_heads + n_kv_heads) * 4,
        ..ctas(n_rows, ROW_THREADS)
    }
}

/// Elements that rows in shared memory are longer than their data (`ROW_PADDING` of `tiles.cuh`).
const ROW_PADDING: u32 = 8;

/// Packed queries of an item of `attention_decode`.
pub const DECODE_QUERIES: u32 = 16;

/// Packed queries of an item of `attention_scalar`.
pub const SCALAR_QUERIES: u32 = 4;

/// Packed queries of an item of `attention_prefill`.
pub const fn prefill_queries(head_dim: u32) -> u32 {
    if head_dim <= 128 { 128 } else { 64 }
}

/// `attention_decode`: warps that each keep some stages of 16 tokens of K and V.
pub const fn attention_decode(n_items: u32, head_dim: u32) -> Launch {
    let n_warps = if head_dim <= 128 { 4 } else { 2 };
    let n_stages = match head_dim {
        0..=64 => 4,
        65..=96 => 3,
        _ => 2,
    };
    Launch {
        shared_bytes: n_warps * n_stages * 2 * 16 * (head_dim + ROW_PADDING) * 2,
        ..ctas(n_items, 32 * n_warps)
    }
}

/// `attention_prefill`: the queries, and two stages of K and V.
pub const fn attention_prefill(n_items: u32, head_dim: u32) -> Launch {
    let n_keys = if head_dim <= 96 { 64 } else { 32 };
    Launch {
        shared_bytes: (prefill_queries(head_dim) + 2 * 2 * n_keys) * (head_dim + ROW_PADDING) * 2,
        ..ctas(n_items, 128)
    }
}

/// `attention_scalar`: a warp a query.
pub const fn attention_scalar(n_items: u32) -> Launch {
    ctas(n_items, 32 * SCALAR_QUERIES)
}

/// `attention_merge`: four queries a CTA; no merge has more than `max_queries`.
pub const fn attention_merge(n_merges: u32, max_queries: u32) -> Launch {
    Launch {
        grid: [n_merges, max_queries.div_ceil(4), 1],
        block: [128, 1, 1],
        shared_bytes: 0,
    }
}

/// `read_all`: enough CTAs to keep every load unit of `n_multiprocessors` busy.
pub const fn read_all(n_multiprocessors: u32) -> Launch {
    ctas(8 * n_multiprocessors, ROW_THREADS)
}

/// Rows up to which `linear_narrow` is taken instead of `linear`. Both give the same bits.
pub const NARROW_ROWS: u32 = 16;

/// Shared memory of a product without tensor cores, which every product has as its other path.
const SCALAR_PRODUCT_BYTES: u32 = 2 * 16 * 65 * 4;

const fn product(n_row_tiles: u32, n: u32, tile: [u32; 2], depth: u32, n_stages: u32, n_threads: u32) -> Launch {
    let [rows, cols] = tile;
    let stages = n_stages * (rows + cols) * (depth + ROW_PADDING) * 2;
    Launch {
        grid: [n_row_tiles, n.div_ceil(cols), 1],
        block: [n_threads, 1, 1],
        shared_bytes: if stages > SCALAR_PRODUCT_BYTES {
            stages
        } else {
            SCALAR_PRODUCT_BYTES
        },
    }
}

/// `linear`: out `[m, n]`.
pub const fn linear(m: u32, n: u32) -> Launch {
    product(m.div_ceil(128), n, [128, 128], 32, 3, 256)
}

/// `linear_narrow`: out `[m, n]`, m at most [`NARROW_ROWS`].
pub const fn linear_narrow(m: u32, n: u32) -> Launch {
    product(m.div_ceil(16), n, [16, 64], 64, 4, 128)
}

/// Rows of a tile of `moe_linear`.
const MOE_TILE_ROWS: u32 = 64;

/// Tiles that `moe_permute` lists at most.
pub const fn moe_tiles(n_pairs: u32, n_experts: u32) -> u32 {
    let n_with_rows = if n_pairs < n_experts { n_pairs } else { n_experts };
    n_pairs / MOE_TILE_ROWS + n_with_rows
}

/// `moe_route`: a warp a row.
pub const fn moe_route(n_rows: u32, n_experts: u32) -> Launch {
    Launch {
        shared_bytes: 4 * n_experts * 4,
        ..ctas(n_rows.div_ceil(4), 128)
    }
}

/// `moe_permute`: a CTA an expert.
pub const fn moe_permute(n_experts: u32) -> Launch {
    Launch {
        shared_bytes: n_experts * 4,
        ..ctas(n_experts, 256)
    }
}

/// `moe_linear`: out `[n_pairs, n]`; `max_tiles` as of [`moe_tiles`].
pub const fn moe_linear(max_tiles: u32, n: u32) -> Launch {
    product(max_tiles, n, [MOE_TILE_ROWS, 128], 32, 3, 256)
}

/// `kv_gather`, `kv_scatter`, `kv_move`.
pub const fn kv_copy(n_listed: u32, n_layers: u32) -> Launch {
    Launch {
        grid: [n_listed, n_layers, 2],
        block: [256, 1, 1],
        shared_bytes: 0,
    }
}

/// `token_ids`: a thread a row.
pub const fn token_ids(n_rows: u32) -> Launch {
    ctas(n_rows.div_ceil(ROW_THREADS), ROW_THREADS)
}

/// `sample`, `logprobs`: a CTA a row, with a sum for each 256 tokens of the vocabulary.
pub const fn sample(n_rows: u32, vocab: u32) -> Launch {
    Launch {
        shared_bytes: vocab.div_ceil(256) * 8,
        ..ctas(n_rows, 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::sources::HEAD_DIMS;

    /// What a CTA may have on sm_89, the smallest of the targets.
    const LARGEST_SHARED_BYTES: u32 = 99 * 1024;

    #[test]
    fn shared_memory_fits_every_target() {
        for head_dim in HEAD_DIMS {
            let decode = attention_decode(1, head_dim);
            assert!(decode.shared_bytes <= LARGEST_SHARED_BYTES, "{head_dim}: {decode:?}");
            // The warps' states lie over the stages at the end.
            let states = decode.block[0] / 32 * 16 * (head_dim + 2) * 4;
            assert!(states <= decode.shared_bytes, "{head_dim}: {states} for {decode:?}");
            let prefill = attention_prefill(1, head_dim);
            assert!(prefill.shared_bytes <= LARGEST_SHARED_BYTES, "{head_dim}: {prefill:?}");
        }
        for product in [linear(1, 1), linear_narrow(1, 1), moe_linear(1, 1)] {
            assert!(product.shared_bytes <= LARGEST_SHARED_BYTES, "{product:?}");
        }
    }
}
