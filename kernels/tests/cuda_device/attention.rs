//! Rope, the append and attention on whole sequences: close to the reference, and in deterministic mode the same bits however
//! they are cut and whatever stands beside them.

use baton_kernels::cuda::{Cuda, CudaMode, CudaVector};
use baton_kernels::{
    AttentionParams, Backend, DType, KvLayout, QkNorm, RaggedBatch, RaggedSequence, RopeAppendParams, RopeParams,
    WINDOW_GRAIN, reference,
};

use crate::support::{Values, Weights, assert_close, bits, device, tensor};

/// What a layer's attention has beyond the plain softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kind {
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: bool,
    /// Of the whole projection, or of each head.
    qk_norm: Option<bool>,
}

/// One sequence's qkv rows, and how to run them.
struct Case {
    layout: KvLayout,
    n_heads: usize,
    n_tokens: usize,
    qkv: Vec<f32>,
    rope: RopeParams,
    kind: Kind,
}

impl Case {
    fn new(layout: KvLayout, group: usize, n_tokens: usize, kind: Kind) -> Case {
        let n_heads = layout.n_kv_heads * group;
        let cols = (n_heads + 2 * layout.n_kv_heads) * layout.head_dim;
        let rope = RopeParams {
            inv_freq: (0..layout.head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect(),
            attention_factor: 1.0,
        };
        let qkv: Vec<f32> = Values(7).vec(n_tokens * cols).iter().map(|x| 3.0 * x).collect();
        Case {
            layout,
            n_heads,
            n_tokens,
            qkv: reference::round(layout.dtype, &qkv),
            rope,
            kind,
        }
    }

    fn cols(&self) -> usize {
        (self.n_heads + 2 * self.layout.n_kv_heads) * self.layout.head_dim
    }

    fn sinks(&self) -> Option<Vec<f32>> {
        let sinks = || Values(5).vec(self.n_heads).iter().map(|x| 2.0 * x).collect();
        self.kind.sinks.then(sinks)
    }

    fn qk_norm(&self) -> Option<[Vec<f32>; 2]> {
        let is_whole = self.kind.qk_norm?;
        let len = |heads: usize| if is_whole { heads } else { 1 } * self.layout.head_dim;
        Some([(6, self.n_heads), (7, self.layout.n_kv_heads)].map(|(seed, heads)| Values(seed).vec(len(heads))))
    }

    fn params<V>(&self, vector: impl Fn(Vec<f32>) -> V) -> AttentionParams<V> {
        AttentionParams {
            n_heads: self.n_heads,
            scale: 1.0 / (self.layout.head_dim as f32).sqrt(),
            window: self.kind.window,
            soft_cap: self.kind.soft_cap,
            sinks: self.sinks().map(vector),
        }
    }

    /// Attention output of every token, with the sequence cut into `chunks`; `companion` tokens of another sequence stand
    /// before it in every batch.
    fn run(&self, cuda: &Cuda, chunks: &[usize], companion: usize) -> Vec<f32> {
        assert_eq!(chunks.iter().sum::<usize>(), self.n_tokens);
        let layout = self.layout;
        let n_blocks = layout.blocks_for(self.n_tokens);
        let n_companion_blocks = layout.blocks_for(companion * chunks.len());
        let mut kv = cuda.kv_cache(layout, n_blocks + n_companion_blocks).unwrap();
        // Neither in order nor starting at 0.
        let block_table: Vec<u32> = (0..n_blocks as u32)
            .rev()
            .map(|block| n_companion_blocks as u32 + block)
            .collect();
        let companion_table: Vec<u32> = (0..n_companion_blocks as u32).collect();
        // The first variant turns the other way: only this sequence asks for the second.
        let other = RopeParams {
            inv_freq: self.rope.inv_freq.iter().map(|f| -f).collect(),
            attention_factor: 2.0,
        };
        let max_positions = self.n_tokens.max(companion * chunks.len());
        let rope = cuda.rope(&[other, self.rope.clone()], max_positions).unwrap();
        let vector = |data: Vec<f32>| -> CudaVector {
            cuda.vector(&Weights::default().vector("v", &data).pack(layout.dtype), "v")
                .unwrap()
        };
        let qk_norm = self.qk_norm().map(|[query, key]| QkNorm {
            query: vector(query),
            key: vector(key),
            eps: 1e-5,
        });
        let params = self.params(vector);
        let layer = layout.n_layers - 1;
        let out_cols = self.n_heads * layout.head_dim;
        let mut outputs = Vec::new();
        let mut start_pos: usize = 0;
        for (chunk_idx, n_tokens) in chunks.iter().copied().enumerate() {
            cuda.begin_step();
            let mut rows = Values(99 + chunk_idx as u64).vec(companion * self.cols());
            rows.extend_from_slice(&self.qkv[start_pos * self.cols()..][..n_tokens * self.cols()]);
            let mut qkv = tensor(cuda, self.cols(), &rows);
            // Blocks that the contract says are not read are no blocks at all.
            let mut table = block_table.clone();
            if let Some(window) = self.kind.window {
                let first_seen = (start_pos + 1).saturating_sub(window);
                table[..first_seen / WINDOW_GRAIN * WINDOW_GRAIN / layout.block_size].fill(u32::MAX);
            }
            let sequences = [
                RaggedSequence {
                    start_pos: companion * chunk_idx,
                    n_tokens: companion,
                    block_table: &companion_table,
                    rope_variant: 0,
                },
                RaggedSequence {
                    start_pos,
                    n_tokens,
                    block_table: &table,
                    rope_variant: 1,
                },
            ];
            let sequences = &sequences[usize::from(companion == 0)..];
            let batch = RaggedBatch { sequences };
            let heads = RopeAppendParams {
                n_heads: self.n_heads,
                rope: &rope,
                qk_norm: qk_norm.as_ref(),
            };
            cuda.rope_append(&mut qkv, batch, heads, layer, &mut kv);
            let mut out = cuda.tensor(companion + n_tokens, out_cols).unwrap();
            cuda.attention(&mut out, &qkv, batch, &params, layer, &kv);
            outputs.extend_from_slice(&cuda.to_host(&out)[companion * out_cols..]);
            start_pos += n_tokens;
        }
        outputs
    }

    fn expected(&self) -> Vec<f32> {
        let (head_dim, n_kv_heads) = (self.layout.head_dim, self.layout.n_kv_heads);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut outputs = Vec::new();
        for (position, row) in self.qkv.chunks_exact(self.cols()).enumerate() {
            let mut row = row.to_vec();
            if let Some([query, key]) = self.qk_norm() {
                let (q, k) = row[..(self.n_heads + n_kv_heads) * head_dim].split_at_mut(self.n_heads * head_dim);
                q.copy_from_slice(&reference::rms_norm(q, &query, 1e-5));
                k.copy_from_slice(&reference::rms_norm(k, &key, 1e-5));
            }
            for head in row[..(self.n_heads + n_kv_heads) * head_dim].chunks_exact_mut(head_dim) {
                reference::rope(head, &self.rope, position);
            }
            let row = reference::round(self.layout.dtype, &row);
            let (q, kv) = row.split_at(self.n_heads * head_dim);
            let (key, value) = kv.split_at(n_kv_heads * head_dim);
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
            let params = self.params(|sinks| sinks);
            outputs.extend(reference::attention_row(q, &keys, &values, n_kv_heads, &params));
        }
        outputs
    }
}

fn layout(n_kv_heads: usize, block_size: usize, head_dim: usize, dtype: DType) -> KvLayout {
    KvLayout {
        n_layers: 2,
        n_kv_heads,
        block_size,
        head_dim,
        dtype,
    }
}

const PLAIN: Kind = Kind {
    window: None,
    soft_cap: None,
    sinks: false,
    qk_norm: None,
};

const KINDS: [Kind; 4] = [
    PLAIN,
    Kind {
        window: Some(9),
        sinks: true,
        ..PLAIN
    },
    Kind {
        soft_cap: Some(2.0),
        qk_norm: Some(true),
        ..PLAIN
    },
    Kind {
        window: Some(70),
        qk_norm: Some(false),
        ..PLAIN
    },
];

#[test]
fn attention_is_close_to_the_reference() {
    // In 16 bits, a rotated q or k may fall on the other side of a rounding boundary than the reference's.
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::Bf16, 2e-2)] {
        for (n_kv_heads, group, block_size, head_dim, chunks) in [
            (1, 1, 16, 64, vec![1]),
            (2, 3, 16, 64, vec![17, 1, 1]),
            (1, 4, 16, 128, vec![130, 1]),
            (3, 1, 8, 32, vec![33, 40, 1]),
        ] {
            let layout = layout(n_kv_heads, block_size, head_dim, dtype);
            for kind in KINDS {
                let case = Case::new(layout, group, chunks.iter().sum(), kind);
                let Some(cuda) = device(dtype, CudaMode::Fast, head_dim) else {
                    return;
                };
                assert_close(&cuda, &case.run(&cuda, &chunks, 3), &case.expected(), tolerance);
            }
        }
    }
}

#[test]
fn deterministic_bits_do_not_depend_on_chunks_or_batch() {
    for dtype in [DType::F32, DType::Bf16] {
        let kind = Kind {
            sinks: true,
            qk_norm: Some(false),
            ..PLAIN
        };
        // Longer than a fixed split.
        let case = Case::new(layout(1, 16, 64, dtype), 2, 270, kind);
        let Some(cuda) = device(dtype, CudaMode::Deterministic, 64) else {
            return;
        };
        let at_once = bits(&case.run(&cuda, &[270], 0));
        for (chunks, companion) in [(vec![255, 1, 1, 13], 5), (vec![100, 170], 1)] {
            assert!(
                bits(&case.run(&cuda, &chunks, companion)) == at_once,
                "{dtype}: {chunks:?} beside {companion}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "two sequences of a batch append to block 0")]
fn two_sequences_may_not_append_to_one_block() {
    let Some(cuda) = device(DType::F32, CudaMode::Fast, 8) else {
        panic!("two sequences of a batch append to block 0: nothing to test on");
    };
    let case = Case::new(layout(1, 4, 8, DType::F32), 1, 2, PLAIN);
    let mut kv = cuda.kv_cache(case.layout, 1).unwrap();
    let mut qkv = tensor(&cuda, case.cols(), &case.qkv);
    let sequence = RaggedSequence {
        start_pos: 0,
        n_tokens: 1,
        block_table: &[0],
        rope_variant: 0,
    };
    let after = RaggedSequence {
        start_pos: 1,
        ..sequence
    };
    let heads = RopeAppendParams {
        n_heads: 1,
        rope: &cuda.rope(&[case.rope], 4).unwrap(),
        qk_norm: None,
    };
    let batch = RaggedBatch {
        sequences: &[sequence, after],
    };
    cuda.rope_append(&mut qkv, batch, heads, 0, &mut kv);
}
