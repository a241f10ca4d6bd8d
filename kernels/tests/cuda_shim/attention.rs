//! Paged attention: every head size, groups of every kind, windows, caps and sinks; split and whole; and in deterministic
//! mode the same bits however a context came about.

use baton_kernels::cuda::plan::{Item, Kernels, Plan, PlanSize, Sequence, Shape, Splits};
use baton_kernels::cuda::{launch, sources};
use baton_kernels::{AttentionParams, DType, WINDOW_GRAIN, reference};

use crate::args;
use crate::harness::*;

/// A layer's attention, and sequences given as (tokens in the cache before the step, new tokens).
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    head_dim: usize,
    n_kv_heads: usize,
    group: usize,
    block_shift: u32,
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: bool,
    sequences: Vec<(usize, usize)>,
}

const BALANCED: Splits = Splits::Balanced { n_ctas: 48 };
const WHOLE: Splits = Splits::Balanced { n_ctas: 1 };
const FIXED: Splits = Splits::Fixed { tokens: 128 };

/// One sequence's values, by position: `q: [n_tokens, n_heads * head_dim]`, `k, v: [n_tokens, n_kv_heads * head_dim]`.
struct Values {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(dtype: DType, head_dim: usize, sequences: &[(usize, usize)]) -> Case {
        Case {
            dtype,
            head_dim,
            n_kv_heads: 2,
            group: 3,
            block_shift: 4,
            window: None,
            soft_cap: None,
            sinks: false,
            sequences: sequences.to_vec(),
        }
    }

    fn n_heads(&self) -> usize {
        self.n_kv_heads * self.group
    }

    fn shape(&self) -> Shape {
        let has_tensor_cores = self.dtype != DType::F32 && sources::HEAD_DIMS.contains(&(self.head_dim as u32));
        Shape {
            n_heads: self.n_heads() as u32,
            n_kv_heads: self.n_kv_heads as u32,
            head_dim: self.head_dim as u32,
            window: self.window.map(|window| window as u32),
            kernels: if has_tensor_cores {
                Kernels::TensorCore
            } else {
                Kernels::Scalar
            },
        }
    }

    fn params(&self) -> AttentionParams<Vec<f32>> {
        let sinks = || values(77, DType::F32, self.n_heads()).iter().map(|x| 2.0 * x).collect();
        AttentionParams {
            n_heads: self.n_heads(),
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            soft_cap: self.soft_cap,
            sinks: self.sinks.then(sinks),
        }
    }

    /// A sequence's values depend on its number and the position alone.
    fn values(&self, sequence_idx: usize) -> Values {
        let n_tokens = self.sequences[sequence_idx].0 + self.sequences[sequence_idx].1;
        let of = |seed: u64, scale: f32, width: usize| {
            let all: Vec<f32> = (0..n_tokens)
                .flat_map(|position| values(seed + 1000 * position as u64, DType::F32, width))
                .map(|x| scale * x)
                .collect();
            reference::round(self.dtype, &all)
        };
        let seed = 3 * sequence_idx as u64;
        Values {
            q: of(seed, 3.0, self.n_heads() * self.head_dim),
            k: of(seed + 1, 3.0, self.n_kv_heads * self.head_dim),
            v: of(seed + 2, 1.0, self.n_kv_heads * self.head_dim),
        }
    }

    fn expected(&self) -> Vec<f32> {
        let (q_width, kv_width) = (self.n_heads() * self.head_dim, self.n_kv_heads * self.head_dim);
        let mut out = Vec::new();
        for (sequence_idx, (start_pos, n_tokens)) in self.sequences.iter().enumerate() {
            let values = self.values(sequence_idx);
            for position in *start_pos..start_pos + n_tokens {
                let q = &values.q[position * q_width..][..q_width];
                let seen = (position + 1) * kv_width;
                let (k, v) = (&values.k[..seen], &values.v[..seen]);
                out.extend(reference::attention_row(q, k, v, self.n_kv_heads, &self.params()));
            }
        }
        out
    }

    /// The device's answer.
    fn run(&self, splits: Splits, order: Order) -> Matrix {
        let block_size = 1 << self.block_shift;
        let (head_dim, n_kv_heads, q_width) = (self.head_dim, self.n_kv_heads, self.n_heads() * self.head_dim);
        let kv_width = n_kv_heads * head_dim;
        let blocks_of = |(start_pos, n_tokens): &(usize, usize)| (start_pos + n_tokens).div_ceil(block_size);
        let n_blocks: usize = self.sequences.iter().map(blocks_of).sum();
        // What no token fills is NaN, and so are q, k and v of the batch where the cache is to be read.
        let mut key = vec![f32::NAN; n_blocks * block_size * kv_width];
        let mut value = key.clone();
        let mut qkv = Vec::new();
        let mut block_tables = Vec::new();
        let mut sequences = Vec::new();
        let mut n_rows = 0;
        for (sequence_idx, (start_pos, n_tokens)) in self.sequences.iter().copied().enumerate() {
            let values = self.values(sequence_idx);
            sequences.push(Sequence {
                first_row: n_rows as u32,
                start_pos: start_pos as u32,
                n_tokens: n_tokens as u32,
                first_block: block_tables.len() as u32,
            });
            let first_block = block_tables.len();
            for block_idx in 0..blocks_of(&(start_pos, n_tokens)) {
                // Blocks lie in the cache in the opposite order.
                let block = n_blocks - 1 - first_block - block_idx;
                block_tables.push(block as u32);
                let tokens = block_idx * block_size..(start_pos + n_tokens).min((block_idx + 1) * block_size);
                for token in tokens {
                    for kv_head in 0..n_kv_heads {
                        let to = ((block * n_kv_heads + kv_head) * block_size + token % block_size) * head_dim;
                        let from = token * kv_width + kv_head * head_dim;
                        key[to..][..head_dim].copy_from_slice(&values.k[from..][..head_dim]);
                        value[to..][..head_dim].copy_from_slice(&values.v[from..][..head_dim]);
                    }
                }
            }
            // Blocks that the contract says are not read are no blocks at all.
            if let Some(window) = self.window {
                let first_read = (start_pos + 1).saturating_sub(window) / WINDOW_GRAIN * WINDOW_GRAIN / block_size;
                block_tables[first_block..][..first_read].fill(u32::MAX);
            }
            for position in start_pos..start_pos + n_tokens {
                qkv.extend_from_slice(&values.q[position * q_width..][..q_width]);
                qkv.extend(std::iter::repeat_n(f32::NAN, 2 * kv_width));
            }
            n_rows += n_tokens;
        }
        let params = self.params();
        let (dtype, shape) = (self.dtype, self.shape());
        // With room for one tile's partial states, so that fixed splits run in waves.
        let longest = sequences.iter().map(|s| s.start_pos + s.n_tokens).max().unwrap_or(0);
        let mut plan = Plan::bounded(PlanSize::least_partial_rows(shape, splits, longest));
        plan.refresh(shape, splits, &sequences);
        let (qkv, key, value) = (
            Matrix::new(dtype, &qkv),
            Matrix::new(dtype, &key),
            Matrix::new(dtype, &value),
        );
        let mut out = Matrix::unwritten(dtype, n_rows * q_width);
        let mut partial_out = vec![f32::NAN; plan.n_partial_rows as usize * head_dim];
        let mut partial_stats = vec![f32::NAN; plan.n_partial_rows as usize * 2];
        let sinks = params.sinks.as_ref().map_or(NULL, Arg::from);
        let attend = |entry: &str,
                      instance: Option<u32>,
                      grid: launch::Launch,
                      items: &[Item],
                      out: &mut Matrix,
                      partial_out: &mut Vec<f32>,
                      partial_stats: &mut Vec<f32>| {
            if items.is_empty() {
                return;
            }
            let items = items.to_vec();
            let args = args![
                out,
                &qkv,
                &key,
                &value,
                &block_tables,
                &items,
                partial_out,
                partial_stats,
                sinks,
                shape.n_heads,
                shape.n_kv_heads,
                shape.head_dim,
                self.block_shift,
                params.scale,
                params.soft_cap.unwrap_or(0.0),
                shape.window.unwrap_or(0),
            ];
            let entry = format!("{entry}_{dtype}");
            match instance {
                Some(head_dim) => launch_for_head_dim(&entry, head_dim, grid, order, args),
                None => launch(&entry, grid, order, args),
            }
        };
        if !plan.decode.is_empty() {
            let grid = launch::attention_decode(plan.decode.len() as u32, shape.head_dim);
            let instance = Some(shape.head_dim);
            attend(
                "attention_decode",
                instance,
                grid,
                &plan.decode,
                &mut out,
                &mut partial_out,
                &mut partial_stats,
            );
        }
        for wave in &plan.waves {
            let items = &plan.prefill[wave.prefill.clone()];
            let (entry, instance, grid) = match shape.kernels {
                Kernels::TensorCore => {
                    let grid = launch::attention_prefill(items.len() as u32, shape.head_dim);
                    ("attention_prefill", Some(shape.head_dim), grid)
                }
                Kernels::Scalar => ("attention_scalar", None, launch::attention_scalar(items.len() as u32)),
            };
            attend(
                entry,
                instance,
                grid,
                items,
                &mut out,
                &mut partial_out,
                &mut partial_stats,
            );
            let merges = plan.merges[wave.merges.clone()].to_vec();
            if merges.is_empty() {
                continue;
            }
            let args = args![
                &mut out,
                &partial_out,
                &partial_stats,
                &merges,
                sinks,
                shape.n_heads,
                shape.n_kv_heads,
                shape.head_dim
            ];
            let grid = plan.merge_launch(shape, merges.len());
            launch(&format!("attention_merge_{dtype}"), grid, order, args);
        }
        out
    }

    fn check(&self, splits: Splits) {
        let what = format!("{self:?}, {splits:?}");
        // The kernels are the same wherever the cuts lie: one kind of them shows a missing barrier.
        let found = match splits {
            Splits::Balanced { .. } => in_both_orders(&what, |order| self.run(splits, order)),
            Splits::Fixed { .. } => self.run(splits, Order::Forward),
        };
        assert_close(&what, self.dtype, &found.values(), &self.expected());
    }
}

/// Decode tokens with contexts around a tile's and a split's end, and chunks of odd lengths behind odd prefixes.
const MIXED: [(usize, usize); 7] = [(0, 1), (15, 1), (16, 1), (300, 1), (0, 5), (63, 66), (131, 17)];

#[test]
fn every_head_size_is_the_references() {
    if !has_compiler() {
        return;
    }
    for head_dim in sources::HEAD_DIMS {
        for dtype in [DType::F16, DType::Bf16] {
            Case::new(dtype, head_dim as usize, &MIXED).check(BALANCED);
        }
    }
}

#[test]
fn scalar_attention_takes_any_head_size() {
    if !has_compiler() {
        return;
    }
    for (dtype, head_dim) in [(DType::F32, 1), (DType::F32, 16), (DType::F32, 33), (DType::Bf16, 48)] {
        for splits in [WHOLE, BALANCED, FIXED] {
            Case::new(dtype, head_dim, &MIXED).check(splits);
        }
    }
}

#[test]
fn every_kind_of_layer_is_the_references() {
    if !has_compiler() {
        return;
    }
    for dtype in [DType::Bf16, DType::F32] {
        for (window, soft_cap, sinks) in [
            (Some(1), None, false),
            (Some(9), None, true),
            (None, Some(2.0), false),
            (None, None, true),
            (Some(70), Some(5.0), true),
            (Some(250), None, false),
        ] {
            for splits in [BALANCED, FIXED] {
                let case = Case {
                    window,
                    soft_cap,
                    sinks,
                    ..Case::new(dtype, 64, &MIXED)
                };
                case.check(splits);
            }
        }
    }
}

/// One head to many, groups that do not divide a tile, more heads than a decode item takes, and other block sizes.
#[test]
fn every_group_and_block_size_is_the_references() {
    if !has_compiler() {
        return;
    }
    for (n_kv_heads, group, block_shift) in [(1, 1, 4), (3, 1, 3), (1, 8, 5), (1, 16, 4), (2, 17, 0), (1, 35, 6)] {
        for splits in [WHOLE, FIXED] {
            let case = Case {
                n_kv_heads,
                group,
                block_shift,
                ..Case::new(DType::Bf16, 64, &[(200, 1), (0, 1), (170, 9)])
            };
            case.check(splits);
        }
    }
}

/// In deterministic mode a token's bits are the same decoded one by one, prefilled in chunks, or whole, alone or in company.
#[test]
fn deterministic_mode_does_not_know_how_a_context_came_about() {
    if !has_compiler() {
        return;
    }
    for (dtype, head_dim) in [(DType::Bf16, 64), (DType::F16, 192), (DType::F32, 20)] {
        for window in [None, Some(100)] {
            let of = |sequences: &[(usize, usize)]| {
                let case = Case {
                    window,
                    sinks: true,
                    ..Case::new(dtype, head_dim, sequences)
                };
                case.run(FIXED, Order::Forward).values()
            };
            let n_tokens = 290;
            let whole = of(&[(0, n_tokens)]);
            let width = whole.len() / n_tokens;
            for chunks in [&[1, 63, 65, 161][..], &[257, 33]] {
                let mut start_pos = 0;
                for n_new in chunks {
                    let expected = &whole[start_pos * width..][..n_new * width];
                    let chunk = (start_pos, *n_new);
                    assert!(
                        of(&[chunk]) == expected,
                        "{dtype}, {head_dim}, window {window:?}: {chunk:?}"
                    );
                    assert!(
                        of(&[chunk, (77, 1)])[..expected.len()] == *expected,
                        "{dtype}: {chunk:?} in company"
                    );
                    start_pos += n_new;
                }
            }
            for position in [0, 63, 128, 289] {
                let expected = &whole[position * width..][..width];
                assert!(
                    of(&[(position, 1)]) == expected,
                    "{dtype}, window {window:?}: decoded at {position}"
                );
            }
        }
    }
}

/// Items that only fill a captured grid write nothing.
#[test]
fn items_without_queries_do_nothing() {
    if !has_compiler() {
        return;
    }
    let items = vec![Item::default(); 2];
    let mut out = Matrix::unwritten(DType::Bf16, 64);
    let before = out.clone();
    let grids = [
        ("attention_decode_bf16", launch::attention_decode(2, 64)),
        ("attention_prefill_bf16", launch::attention_prefill(2, 64)),
    ];
    for (entry, grid) in grids {
        let args = args![
            &mut out, NULL, NULL, NULL, NULL, &items, NULL, NULL, NULL, 2_u32, 1_u32, 64_u32, 4_u32, 1.0_f32, 0.0_f32,
            0_u32
        ];
        launch_for_head_dim(entry, 64, grid, Order::Forward, args);
    }
    let args = args![
        &mut out, NULL, NULL, NULL, NULL, &items, NULL, NULL, NULL, 2_u32, 1_u32, 64_u32, 4_u32, 1.0_f32, 0.0_f32,
        0_u32
    ];
    launch(
        "attention_scalar_bf16",
        launch::attention_scalar(2),
        Order::Forward,
        args,
    );
    assert!(out == before);
}
