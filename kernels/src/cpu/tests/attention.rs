//! Rope, the append and attention, on whole sequences: close to the reference, and the same bits however they are cut.

use proptest::prelude::*;

use super::*;

/// One sequence's qkv rows, and how to run them.
struct Case {
    layout: KvLayout,
    n_heads: usize,
    n_tokens: usize,
    qkv: Vec<f32>,
    rope: RopeParams,
    kind: Kind,
}

/// What a layer's attention has beyond the plain softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kind {
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: bool,
    /// Of each head, or of the whole projection.
    qk_norm: Option<bool>,
}

impl Case {
    fn new(seed: u64, layout: KvLayout, n_heads: usize, n_tokens: usize) -> Case {
        let cols = (n_heads + 2 * layout.n_kv_heads) * layout.head_dim;
        let inv_freq = (0..layout.head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
        let rope = RopeParams {
            inv_freq,
            attention_factor: 1.0,
        };
        let qkv = Values(seed).vec(n_tokens * cols).iter().map(|x| 3.0 * x).collect();
        Case {
            layout,
            n_heads,
            n_tokens,
            qkv,
            rope,
            kind: Kind::default(),
        }
    }

    fn with(self, kind: Kind) -> Case {
        Case { kind, ..self }
    }

    fn sinks(&self) -> Option<Vec<f32>> {
        let sinks = || Values(5).vec(self.n_heads).iter().map(|x| 2.0 * x).collect();
        self.kind.sinks.then(sinks)
    }

    /// Weights of the norms of q and k.
    fn qk_norm(&self) -> Option<[Vec<f32>; 2]> {
        let is_whole = self.kind.qk_norm?;
        let len = |heads: usize| if is_whole { heads } else { 1 } * self.layout.head_dim;
        Some([(6, self.n_heads), (7, self.layout.n_kv_heads)].map(|(seed, heads)| Values(seed).vec(len(heads))))
    }

    fn cols(&self) -> usize {
        (self.n_heads + 2 * self.layout.n_kv_heads) * self.layout.head_dim
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

    /// Attention output of every token, with the sequence cut into `chunks`; `companion` tokens of another sequence
    /// stand before it in every batch.
    fn run(&self, cpu: &Cpu, chunks: &[usize], companion: usize, reversed: bool) -> Vec<f32> {
        assert_eq!(chunks.iter().sum::<usize>(), self.n_tokens);
        let n_blocks = self.layout.blocks_for(self.n_tokens);
        let n_companion_blocks = self.layout.blocks_for(companion * chunks.len());
        let mut kv = KvCache::new(self.layout, n_blocks + n_companion_blocks).unwrap();
        let mut block_table: Vec<u32> = (0..n_blocks as u32).collect();
        let companion_table: Vec<u32> = (n_blocks as u32..).take(n_companion_blocks).collect();
        if reversed {
            block_table.reverse();
        }
        // The first variant turns the other way: only this sequence asks for the second.
        let other = RopeParams {
            inv_freq: self.rope.inv_freq.iter().map(|f| -f).collect(),
            attention_factor: 2.0,
        };
        let variants = [other, self.rope.clone()];
        let rope = cpu
            .rope(&variants, self.n_tokens.max(companion * chunks.len()))
            .unwrap();
        let vector = |data: Vec<f32>| CpuVector { data: data.into() };
        let qk_norm = self.qk_norm().map(|[query, key]| QkNorm {
            query: vector(query),
            key: vector(key),
            eps: 1e-5,
        });
        let params = self.params(vector);
        let layer = self.layout.n_layers - 1;
        let out_cols = self.n_heads * self.layout.head_dim;
        let mut outputs = Vec::new();
        let mut start_pos: usize = 0;
        for (chunk_idx, n_tokens) in chunks.iter().copied().enumerate() {
            let mut rows = Values(99 + chunk_idx as u64).vec(companion * self.cols());
            rows.extend_from_slice(&self.qkv[start_pos * self.cols()..][..n_tokens * self.cols()]);
            let mut qkv = tensor(cpu, self.cols(), &rows);
            let mut sequences = Vec::new();
            if companion > 0 {
                let start_pos = companion * chunk_idx;
                sequences.push(RaggedSequence {
                    start_pos,
                    n_tokens: companion,
                    block_table: &companion_table,
                    rope_variant: 0,
                });
            }
            sequences.push(RaggedSequence {
                start_pos,
                n_tokens,
                block_table: &block_table,
                rope_variant: 1,
            });
            let batch = RaggedBatch { sequences: &sequences };
            let heads = RopeAppendParams {
                n_heads: self.n_heads,
                rope: &rope,
                qk_norm: qk_norm.as_ref(),
            };
            cpu.rope_append(&mut qkv, batch, heads, layer, &mut kv);
            let mut out = cpu.tensor(companion + n_tokens, out_cols).unwrap();
            // Blocks that the contract says are not read are no blocks at all.
            let mut seen = block_table.clone();
            if let Some(window) = self.kind.window {
                let first_seen = (start_pos + 1).saturating_sub(window);
                seen[..first_seen / WINDOW_GRAIN * WINDOW_GRAIN / self.layout.block_size].fill(u32::MAX);
            }
            let mut sequences = sequences.clone();
            sequences.last_mut().unwrap().block_table = &seen;
            let batch = RaggedBatch { sequences: &sequences };
            cpu.attention(&mut out, &qkv, batch, &params, layer, &kv);
            outputs.extend_from_slice(&out.as_slice()[companion * out_cols..]);
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
            outputs.extend(reference::attention_row(
                q,
                &keys,
                &values,
                n_kv_heads,
                &self.params(|sinks| sinks),
            ));
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

const KINDS: [Kind; 6] = [
    PLAIN,
    Kind {
        window: Some(1),
        ..PLAIN
    },
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
        sinks: true,
        qk_norm: Some(false),
        ..PLAIN
    },
    Kind {
        window: Some(250),
        soft_cap: Some(5.0),
        ..PLAIN
    },
];

#[test]
fn attention_is_close_to_the_reference_on_odd_sizes() {
    for dtype in DTYPES {
        for (n_kv_heads, group, block_size, head_dim, n_tokens) in [
            (1, 1, 1, 2, 1),
            (2, 3, 16, 64, 17),
            (1, 4, 16, 32, 257),
            (3, 1, 5, 22, 33),
            (1, 8, 32, 128, 40),
            (1, 40, 16, 16, 5),
            (1, 2, 16, 24, 700),
        ] {
            let layout = layout(n_kv_heads, block_size, head_dim, dtype);
            for kind in KINDS {
                let case = Case::new(7, layout, n_kv_heads * group, n_tokens).with(kind);
                let expected = case.expected();
                for cpu in devices(dtype, 2) {
                    let found = case.run(&cpu, &[n_tokens], 0, false);
                    // In bf16, a rotated q or k may fall on the other side of a rounding boundary than the reference's.
                    let tolerance = if dtype == DType::F32 { 2e-5 } else { 2e-2 };
                    assert_close(&cpu, &found, &expected, tolerance);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn attention_bits_do_not_depend_on_chunks_batch_or_threads(
        seed in any::<u64>(),
        chunks in prop::collection::vec(1_usize..150, 1..5),
        (n_kv_heads, group) in prop_oneof![Just((1, 1)), Just((2, 4)), Just((1, 3)), Just((3, 1))],
        block_size in prop_oneof![Just(16_usize), Just(7)],
        head_dim in prop_oneof![Just(64_usize), Just(24), Just(34)],
        dtype in prop_oneof![Just(DType::F32), Just(DType::Bf16)],
        companion in 0_usize..40,
        kind in prop::sample::select(&KINDS[..]),
    ) {
        let n_tokens = chunks.iter().sum();
        let case = Case::new(seed, layout(n_kv_heads, block_size, head_dim, dtype), n_kv_heads * group, n_tokens).with(kind);
        let token_by_token = vec![1; n_tokens];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let device = |n_threads| Cpu::new(CpuOptions { n_threads, dtype, isa: Some(isa) }).unwrap();
            let at_once = bits(&case.run(&device(1), &[n_tokens], 0, false));
            for (n_threads, chunks, companion, reversed) in [
                (1, &token_by_token, 0, false),
                (2, &chunks, companion, true),
                (3, &chunks, 0, false),
                (3, &vec![n_tokens], companion, true),
            ] {
                let found = bits(&case.run(&device(n_threads), chunks, companion, reversed));
                prop_assert!(found == at_once, "{isa} {dtype} on {n_threads} threads in {} chunks", chunks.len());
            }
        }
    }
}

#[test]
fn rope_leaves_values_behind_its_dimensions_alone() {
    let layout = layout(1, 4, 8, DType::F32);
    for cpu in devices(DType::F32, 1) {
        let rope = cpu
            .rope(
                &[RopeParams {
                    inv_freq: vec![1.0],
                    attention_factor: 1.0,
                }],
                4,
            )
            .unwrap();
        let mut kv = KvCache::new(layout, 1).unwrap();
        let row: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut qkv = tensor(&cpu, 24, &row);
        let sequences = [RaggedSequence {
            start_pos: 2,
            n_tokens: 1,
            block_table: &[0],
            rope_variant: 0,
        }];
        let heads = RopeAppendParams {
            n_heads: 1,
            rope: &rope,
            qk_norm: None,
        };
        cpu.rope_append(&mut qkv, RaggedBatch { sequences: &sequences }, heads, 1, &mut kv);
        let (sin, cos) = 2.0_f32.sin_cos();
        let expected = [-sin, cos, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        assert_close(&cpu, &qkv.as_slice()[..8], &expected, 1e-6);
        let pin = kv.pin(1, 0);
        let stored = |bytes: &[u8]| bytemuck::cast_slice::<u8, f32>(bytes).to_vec();
        assert_eq!(stored(pin.value())[16..24], row[16..]);
        assert_close(&cpu, &stored(pin.key())[18..24], &row[10..16], 1e-6);
        assert!(
            stored(pin.key())[..16]
                .iter()
                .chain(&stored(pin.key())[24..])
                .all(|x| *x == 0.0)
        );
    }
}

#[test]
#[should_panic(expected = "two sequences of a batch append to block 0")]
fn two_sequences_may_not_append_to_one_block() {
    let case = Case::new(1, layout(1, 4, 8, DType::F32), 1, 2);
    let cpu = Cpu::new(CpuOptions {
        n_threads: 1,
        dtype: DType::F32,
        isa: None,
    })
    .unwrap();
    let mut kv = KvCache::new(case.layout, 1).unwrap();
    let mut qkv = tensor(&cpu, case.cols(), &case.qkv);
    let sequence = RaggedSequence {
        start_pos: 0,
        n_tokens: 1,
        block_table: &[0],
        rope_variant: 0,
    };
    let batch = RaggedBatch {
        sequences: &[
            sequence,
            RaggedSequence {
                start_pos: 1,
                ..sequence
            },
        ],
    };
    let heads = RopeAppendParams {
        n_heads: 1,
        rope: &cpu.rope(&[case.rope], 4).unwrap(),
        qk_norm: None,
    };
    cpu.rope_append(&mut qkv, batch, heads, 0, &mut kv);
}
