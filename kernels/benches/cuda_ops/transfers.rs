//! KV of the card to the host and back by the handles that transports use, by a wall clock, beside one copy of as many bytes.
//! Layer by layer, as a prefill tells of it; from one thread.

use std::time::Instant;

use baton_kernels::KvLayout;
use baton_kernels::cuda::CudaMode;

use crate::device::DTYPE;
use crate::point::{Limit, Limits, Point, Report};
use crate::{Options, Scale, or_fail};

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
    let (first, second) = (0..n_blocks as u32, n_blocks as u32..2 * n_blocks as u32);
    let mut host = vec![0_u8; layout.layer_block_bytes()];
    let point = |op, limit| Point {
        op,
        case: format!("{n_blocks} blocks of {} layers", layout.n_layers),
        limit,
        aim: None,
    };
    report.measure_by(&limits, point("kv_to_host", Limit::ToHost(n_bytes)), || {
        let started = Instant::now();
        for layer in 0..layout.n_layers {
            for block in first.clone() {
                kv.pin(layer, block).copy_to(&mut host);
            }
        }
        started.elapsed().as_secs_f64()
    });
    let part = vec![0x3c; layout.part_bytes()];
    report.measure_by(&limits, point("kv_from_host", Limit::FromHost(n_bytes)), || {
        let started = Instant::now();
        let writers: Vec<_> = second.clone().map(|block| or_fail(kv.write_handle(block))).collect();
        for mut writer in writers {
            for layer in 0..layout.n_layers {
                or_fail(writer.write(layer, &part, &part));
            }
            writer.seal();
        }
        started.elapsed().as_secs_f64()
    });
    report.measure(&limits, point("kv_copy_blocks", Limit::Copy(2 * n_bytes)), || {
        for (from, to) in first.clone().zip(second.clone()) {
            or_fail(kv.copy_block(from, to));
        }
    });
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
