//! KV of the card to the host and back in frames, as transports have it, by a wall clock, beside one copy of as many bytes.
//! Layer by layer, as a prefill tells of it; from one thread. And within the card, as between two of its instances.

use std::hint::black_box;
use std::time::Instant;

use baton_kernels::cuda::CudaMode;
use baton_kernels::{KvCache, KvLayout, KvRead, KvWrite};

use crate::device::DTYPE;
use crate::point::{Limit, Limits, Point, Report};
use crate::{Options, Scale, or_fail};

/// Bytes of a frame between hosts; within one, four times as many.
const FRAME_BYTES: usize = 1 << 20;

pub fn run(options: &Options, report: &mut Report) {
    let (layout, n_blocks) = match options.scale {
        // 64 KiB a (layer, block), 256 MiB in all: 2,048 tokens of Llama-3-8B.
        Scale::Full => (layout(32, 8, 128), 128),
        Scale::Smoke => (layout(2, 1, 64), 3),
    };
    let cuda = options.source.open(layout.head_dim, CudaMode::Fast);
    let n_bytes = n_blocks * layout.block_bytes();
    let limits = Limits::new(&cuda, n_bytes, n_bytes, None);
    let mut kv = or_fail(cuda.kv_cache(layout, 2 * n_blocks));
    let per_frame = (FRAME_BYTES / layout.layer_block_bytes()).max(1);
    let point = |op, limit| Point {
        op,
        case: format!("{n_blocks} blocks of {} layers", layout.n_layers),
        limit,
        aim: None,
    };
    report.measure_by(&limits, point("kv_to_host", Limit::ToHost(n_bytes)), || {
        let started = Instant::now();
        for layer in 0..layout.n_layers {
            for reads in pinned(&mut kv, layer, n_blocks).chunks(per_frame) {
                black_box(KvRead::gather(reads).as_ref());
            }
        }
        started.elapsed().as_secs_f64()
    });
    let frame = vec![0x3c; per_frame * layout.layer_block_bytes()];
    report.measure_by(&limits, point("kv_from_host", Limit::FromHost(n_bytes)), || {
        let started = Instant::now();
        let mut writers = writers(&mut kv, n_blocks);
        for layer in 0..layout.n_layers {
            for writers in writers.chunks_mut(per_frame) {
                let n_bytes = writers.len() * layout.layer_block_bytes();
                or_fail(KvWrite::scatter(writers, layer, &frame[..n_bytes]));
            }
        }
        writers.into_iter().for_each(KvWrite::seal);
        started.elapsed().as_secs_f64()
    });
    report.measure_by(&limits, point("kv_within_card", Limit::Copy(2 * n_bytes)), || {
        let started = Instant::now();
        let mut writers = writers(&mut kv, n_blocks);
        for layer in 0..layout.n_layers {
            let pinned = pinned(&mut kv, layer, n_blocks);
            let frames = writers.chunks_mut(4 * per_frame).zip(pinned.chunks(4 * per_frame));
            for (writers, reads) in frames {
                or_fail(KvWrite::copy_from(writers, layer, reads));
            }
        }
        writers.into_iter().for_each(KvWrite::seal);
        started.elapsed().as_secs_f64()
    });
    report.measure(&limits, point("kv_copy_blocks", Limit::Copy(2 * n_bytes)), || {
        for block in 0..n_blocks as u32 {
            or_fail(kv.copy_block(block, n_blocks as u32 + block));
        }
    });
}

/// The first blocks.
fn pinned(kv: &mut KvCache, layer: usize, n_blocks: usize) -> Vec<KvRead> {
    (0..n_blocks as u32).map(|block| kv.pin(layer, block)).collect()
}

/// As many blocks behind those.
fn writers(kv: &mut KvCache, n_blocks: usize) -> Vec<KvWrite> {
    let blocks = n_blocks as u32..2 * n_blocks as u32;
    blocks.map(|block| or_fail(kv.write_handle(block))).collect()
}

fn layout(n_layers: usize, n_kv_heads: usize, head_dim: usize) -> KvLayout {
    KvLayout {
        n_layers,
        n_kv_heads,
        block_size: 16,
        head_dim,
        dtype: DTYPE,
    }
}
