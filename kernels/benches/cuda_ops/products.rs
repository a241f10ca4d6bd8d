//! The products of Llama-3-8B by cuBLASLt and by the kernel of deterministic mode, beside the nearer of two limits.

use baton_kernels::Backend as _;
use baton_kernels::cuda::CudaMode;

use crate::device::{DTYPE, matrix, tensor};
use crate::point::{Limit, Limits, Peak, Point, Report};
use crate::{Options, Scale, or_fail};

/// `[n_in, n_out]` of each.
const LLAMA_3_8B: [(&str, usize, usize); 5] = [
    ("qkv", 4096, 6144),
    ("o", 4096, 4096),
    ("gate_up", 4096, 28_672),
    ("down", 14_336, 4096),
    ("vocab", 4096, 128_256),
];

pub fn run(options: &Options, report: &mut Report) {
    let (products, rows): (&[_], &[usize]) = match options.scale {
        Scale::Full => (&LLAMA_3_8B, &[1, 16, 64, 256, 4096]),
        Scale::Smoke => (&[("qkv", 24, 40)], &[1, 17]),
    };
    let fast = options.source.open(128, CudaMode::Fast);
    let deterministic = options.source.open(128, CudaMode::Deterministic);
    let peak = Peak::new(&fast, options.scale);
    for (op, cuda) in [("product_cublaslt", &fast), ("product_linear", &deterministic)] {
        for &(name, n_in, n_out) in products {
            let w = matrix(cuda, n_out, n_in);
            let bytes_for = |rows: usize| (n_in * n_out + rows * (n_in + n_out)) * DTYPE.size();
            let limits = Limits::new(cuda, bytes_for(rows[rows.len() - 1]), 0, Some(&peak));
            for &rows in rows {
                // Logits are wanted for the last row of each sequence only.
                if name == "vocab" && rows > 256 {
                    continue;
                }
                let x = tensor(cuda, rows, n_in);
                let mut out = or_fail(cuda.tensor(rows, n_out));
                let n_bytes = bytes_for(rows) / 16 * 16;
                let point = Point {
                    op,
                    case: format!("{name}, {rows} rows"),
                    limit: Limit::ReadOrProduct(n_bytes, 2.0 * (rows * n_in * n_out) as f64),
                    aim: None,
                };
                report.measure(&limits, point, || cuda.linear(&mut out, &x, &w));
            }
        }
    }
}
