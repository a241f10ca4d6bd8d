//! Sampling where the logits lie, at the vocabulary of Llama-3: beside a kernel that only reads the logits. As steps run
//! ahead: what a step sampled is collected when the one behind it is queued.

use baton_kernels::cuda::CudaMode;
use baton_kernels::{Backend as _, RowSampler as _, RowSampling};

use crate::device::{matrix, tensor};
use crate::point::{Limit, Limits, Point, Report};
use crate::{Options, Scale, fail, or_fail};

/// Depth of the product that makes the logits.
const DEPTH: usize = 64;

const GREEDY: RowSampling = RowSampling {
    seed: 11,
    index: 0,
    choice: 0,
    temperature: 0.0,
    min_p: 0.0,
    top_p: 1.0,
    top_k: 0,
    n_top: None,
};

pub fn run(options: &Options, report: &mut Report) {
    let (vocab, n_rows): (usize, &[usize]) = match options.scale {
        Scale::Full => (128_256, &[1, 64, 256]),
        Scale::Smoke => (33, &[2]),
    };
    let drawn = RowSampling {
        temperature: 1.0,
        ..GREEDY
    };
    let filtered = RowSampling {
        top_k: 50.min(vocab as u32 / 2),
        top_p: 0.9,
        ..drawn
    };
    let cases = [
        ("greedy", GREEDY),
        ("temperature", drawn),
        ("top-k and top-p", filtered),
        (
            "greedy, 5 logprobs",
            RowSampling {
                n_top: Some(5),
                ..GREEDY
            },
        ),
    ];
    let cuda = options.source.open(64, CudaMode::Fast);
    let most_rows = n_rows[n_rows.len() - 1];
    let limits = Limits::new(&cuda, most_rows * vocab * size_of::<f32>(), 0, None);
    let w = matrix(&cuda, vocab, DEPTH);
    for &n_rows in n_rows {
        let mut logits = or_fail(cuda.logits(n_rows, vocab));
        cuda.linear(&mut logits, &tensor(&cuda, n_rows, DEPTH), &w);
        let sampler = or_fail(cuda.sampler(n_rows, vocab));
        let mut sampler = sampler.unwrap_or_else(|| fail("the device does not sample"));
        for (name, sampling) in cases {
            let rows = vec![sampling; n_rows];
            let point = Point {
                op: "sample",
                case: format!("{name}, {n_rows} rows"),
                limit: Limit::Read(n_rows * vocab * size_of::<f32>() / 16 * 16),
                aim: None,
            };
            let mut sample = |is_behind_another: bool| {
                cuda.begin_step();
                sampler.sample(&cuda, &logits, 0, &rows);
                sampler.finish_step();
                if is_behind_another {
                    sampler.collect();
                }
            };
            sample(false);
            report.measure(&limits, point, || sample(true));
            sampler.collect();
        }
    }
}
