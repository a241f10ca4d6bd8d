//! Operators over rows, and the rotation with its append, at the sizes of Llama-3-8B: beside a copy of as many bytes.

use baton_kernels::cuda::CudaMode;
use baton_kernels::{Activation, Backend, KvLayout, RaggedBatch, RaggedSequence, RopeAppendParams, RopeParams};

use crate::device::{DTYPE, matrix, tensor, vector};
use crate::point::{Limit, Limits, Point, Report};
use crate::{Options, Scale, or_fail};

/// Width of everything.
struct Sizes {
    hidden: usize,
    ffn: usize,
    vocab: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    rows: &'static [usize],
}

const LLAMA_3_8B: Sizes = Sizes {
    hidden: 4096,
    ffn: 14_336,
    vocab: 128_256,
    n_heads: 32,
    n_kv_heads: 8,
    head_dim: 128,
    // A decode step, where a launch is what counts, and a prefill's, where bytes do.
    rows: &[64, 8192],
};

const SMOKE: Sizes = Sizes {
    hidden: 64,
    ffn: 48,
    vocab: 33,
    n_heads: 2,
    n_kv_heads: 1,
    head_dim: 64,
    rows: &[3],
};

/// Fewer bytes than this are over before they show a share of the bandwidth.
const AIMED_BYTES: usize = 64 << 20;

pub fn run(options: &Options, report: &mut Report) {
    let sizes = match options.scale {
        Scale::Full => LLAMA_3_8B,
        Scale::Smoke => SMOKE,
    };
    let cuda = &options.source.open(sizes.head_dim, CudaMode::Fast);
    let element = DTYPE.size();
    let rotated = (2 * sizes.n_heads + 4 * sizes.n_kv_heads) * sizes.head_dim;
    let most_elements = sizes.rows[sizes.rows.len() - 1] * (3 * sizes.ffn).max(4 * sizes.hidden).max(rotated);
    let limits = Limits::new(cuda, 0, most_elements * element, None);
    let weight = vector(cuda, sizes.hidden);
    let table = matrix(cuda, sizes.vocab, sizes.hidden);
    for &rows in sizes.rows {
        let mut measure = |op: &str, n_elements: usize, queue: &mut dyn FnMut()| {
            let n_bytes = n_elements * element;
            let point = Point {
                op,
                case: format!("{rows} rows"),
                limit: Limit::Copy(n_bytes),
                aim: (n_bytes >= AIMED_BYTES).then_some(0.8),
            };
            report.measure(&limits, point, queue);
        };
        let hidden = rows * sizes.hidden;
        let x = tensor(cuda, rows, sizes.hidden);
        let mut residual = tensor(cuda, rows, sizes.hidden);
        let mut out = or_fail(cuda.tensor(rows, sizes.hidden));
        measure("rms_norm", 2 * hidden, &mut || {
            cuda.rms_norm(&mut out, &x, &weight, 1e-5)
        });
        measure("add_rms_norm", 4 * hidden, &mut || {
            cuda.add_rms_norm(&mut out, &mut residual, &x, &weight, 1e-5);
        });
        measure("add", 3 * hidden, &mut || cuda.add(&mut residual, &x));
        let ids: Vec<u32> = (0..rows).map(|row| (row * 7919 % sizes.vocab) as u32).collect();
        measure("embed", 2 * hidden, &mut || {
            // Ids are uploaded by each call.
            cuda.begin_step();
            cuda.embed(&mut out, &table, &ids, 1.0);
        });
        let picked: Vec<usize> = (0..rows).rev().collect();
        measure("gather_rows", 2 * hidden, &mut || {
            cuda.begin_step();
            cuda.gather_rows(&mut out, &x, &picked);
        });
        let gate_up = tensor(cuda, rows, 2 * sizes.ffn);
        let mut gated = or_fail(cuda.tensor(rows, sizes.ffn));
        measure("gated", 3 * rows * sizes.ffn, &mut || {
            cuda.gated(&mut gated, &gate_up, Activation::Silu);
        });

        let layout = KvLayout {
            n_layers: 1,
            n_kv_heads: sizes.n_kv_heads,
            block_size: 16,
            head_dim: sizes.head_dim,
            dtype: DTYPE,
        };
        let n_blocks = layout.blocks_for(rows);
        let mut kv = or_fail(cuda.kv_cache(layout, n_blocks));
        let rope = RopeParams {
            inv_freq: (0..sizes.head_dim / 2)
                .map(|i| 500_000_f32.powf(-2.0 * i as f32 / sizes.head_dim as f32))
                .collect(),
            attention_factor: 1.0,
        };
        let rope = or_fail(cuda.rope(&[rope], rows));
        let mut qkv = tensor(cuda, rows, (sizes.n_heads + 2 * sizes.n_kv_heads) * sizes.head_dim);
        let block_table: Vec<u32> = (0..n_blocks as u32).rev().collect();
        let sequences = [RaggedSequence {
            start_pos: 0,
            n_tokens: rows,
            block_table: &block_table,
            rope_variant: 0,
        }];
        let batch = RaggedBatch { sequences: &sequences };
        cuda.begin_step();
        // q is read and written in place; k and v are read and appended.
        measure("rope_append", rows * rotated, &mut || {
            let params = RopeAppendParams {
                n_heads: sizes.n_heads,
                rope: &rope,
                qk_norm: None,
            };
            cuda.rope_append(&mut qkv, batch, params, 0, &mut kv);
        });
    }
}
