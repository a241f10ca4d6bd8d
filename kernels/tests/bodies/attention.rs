//! Rope, the append and attention on whole sequences: close to the reference; and the same bits however they are cut, wherever
//! their blocks lie and whatever stands beside them, where a device promises that.

use baton_kernels::{
    AttentionParams, DType, KvLayout, QkNorm, RaggedBatch, RaggedSequence, RopeAppendParams, RopeParams, WINDOW_GRAIN,
    reference,
};

use super::{TestDevice, Values, assert_close, bits, vector};

/// What a layer's attention has beyond the plain softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Kind {
    pub window: Option<usize>,
    pub soft_cap: Option<f32>,
    pub sinks: bool,
    pub qk_norm: Option<Normed>,
}

/// What a norm of q and k is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normed {
    EachHead,
    Projection,
}

pub const PLAIN: Kind = Kind {
    window: None,
    soft_cap: None,
    sinks: false,
    qk_norm: None,
};

pub const KINDS: [Kind; 7] = [
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
        qk_norm: Some(Normed::Projection),
        ..PLAIN
    },
    Kind {
        sinks: true,
        qk_norm: Some(Normed::EachHead),
        ..PLAIN
    },
    Kind {
        window: Some(70),
        qk_norm: Some(Normed::EachHead),
        ..PLAIN
    },
    Kind {
        window: Some(250),
        soft_cap: Some(5.0),
        ..PLAIN
    },
];

/// Where a sequence's blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    InOrder,
    Reversed,
}

/// One sequence's qkv rows, and what is done with them.
pub struct Case {
    pub layout: KvLayout,
    pub n_heads: usize,
    pub n_tokens: usize,
    pub kind: Kind,
    qkv: Vec<f32>,
    rope: RopeParams,
}

pub fn layout(n_kv_heads: usize, block_size: usize, head_dim: usize, dtype: DType) -> KvLayout {
    KvLayout {
        n_layers: 2,
        n_kv_heads,
        block_size,
        head_dim,
        dtype,
    }
}

impl Case {
    pub fn new(seed: u64, layout: KvLayout, group: usize, n_tokens: usize, kind: Kind) -> Case {
        let n_heads = layout.n_kv_heads * group;
        let cols = (n_heads + 2 * layout.n_kv_heads) * layout.head_dim;
        let qkv: Vec<f32> = Values(seed).vec(n_tokens * cols).iter().map(|x| 3.0 * x).collect();
        Case {
            layout,
            n_heads,
            n_tokens,
            kind,
            // What a device that stores f32 takes as it is, and one that does not would round to the same.
            qkv: reference::round(layout.dtype, &qkv),
            rope: RopeParams {
                inv_freq: (0..layout.head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect(),
                attention_factor: 1.0,
            },
        }
    }

    fn cols(&self) -> usize {
        (self.n_heads + 2 * self.layout.n_kv_heads) * self.layout.head_dim
    }

    /// Weights of the norms of q and k.
    fn qk_norm(&self) -> Option<[Vec<f32>; 2]> {
        let len = |n_heads: usize| match self.kind.qk_norm {
            Some(Normed::Projection) => n_heads * self.layout.head_dim,
            Some(Normed::EachHead) | None => self.layout.head_dim,
        };
        let weights = [(6, self.n_heads), (7, self.layout.n_kv_heads)];
        self.kind
            .qk_norm
            .map(|_| weights.map(|(seed, n_heads)| Values(seed).vec(len(n_heads))))
    }

    fn params<V>(&self, vector: impl Fn(Vec<f32>) -> V) -> AttentionParams<V> {
        let sinks = || Values(5).vec(self.n_heads).iter().map(|x| 2.0 * x).collect();
        AttentionParams {
            n_heads: self.n_heads,
            scale: 1.0 / (self.layout.head_dim as f32).sqrt(),
            window: self.kind.window,
            soft_cap: self.kind.soft_cap,
            sinks: self.kind.sinks.then(sinks).map(vector),
        }
    }

    /// Attention output of every token, with the sequence cut into `chunks`; `companion` tokens of another sequence stand
    /// before it in every batch.
    pub fn run<B: TestDevice>(&self, device: &B, chunks: &[usize], companion: usize, blocks: Blocks) -> Vec<f32> {
        assert_eq!(chunks.iter().sum::<usize>(), self.n_tokens);
        let layout = self.layout;
        let n_blocks = layout.blocks_for(self.n_tokens);
        let n_companion_blocks = layout.blocks_for(companion * chunks.len());
        let mut kv = device.cache(layout, n_blocks + n_companion_blocks);
        let companion_table: Vec<u32> = (0..n_companion_blocks as u32).collect();
        let mut block_table: Vec<u32> = (n_companion_blocks as u32..).take(n_blocks).collect();
        if blocks == Blocks::Reversed {
            block_table.reverse();
        }
        // The first variant turns the other way: only this sequence asks for the second.
        let other = RopeParams {
            inv_freq: self.rope.inv_freq.iter().map(|f| -f).collect(),
            attention_factor: 2.0,
        };
        let max_positions = self.n_tokens.max(companion * chunks.len());
        let rope = device.rope(&[other, self.rope.clone()], max_positions).unwrap();
        let qk_norm = self.qk_norm().map(|[query, key]| QkNorm {
            query: vector(device, &query),
            key: vector(device, &key),
            eps: 1e-5,
        });
        let params = self.params(|sinks| vector(device, &sinks));
        let layer = layout.n_layers - 1;
        let out_cols = self.n_heads * layout.head_dim;
        let mut outputs = Vec::new();
        let mut start_pos: usize = 0;
        for (chunk_idx, n_tokens) in chunks.iter().copied().enumerate() {
            device.begin_step();
            let mut rows = Values(99 + chunk_idx as u64).vec(companion * self.cols());
            rows.extend_from_slice(&self.qkv[start_pos * self.cols()..][..n_tokens * self.cols()]);
            let mut qkv = device.filled(self.cols(), &rows);
            // Blocks that the contract says are not read are no blocks at all.
            let mut seen = block_table.clone();
            if let Some(window) = self.kind.window {
                let first_seen = (start_pos + 1).saturating_sub(window);
                seen[..first_seen / WINDOW_GRAIN * WINDOW_GRAIN / layout.block_size].fill(u32::MAX);
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
                    block_table: &seen,
                    rope_variant: 1,
                },
            ];
            let batch = RaggedBatch {
                sequences: &sequences[usize::from(companion == 0)..],
            };
            let heads = RopeAppendParams {
                n_heads: self.n_heads,
                rope: &rope,
                qk_norm: qk_norm.as_ref(),
            };
            device.rope_append(&mut qkv, batch, heads, layer, &mut kv);
            let mut out = device.tensor(companion + n_tokens, out_cols).unwrap();
            device.attention(&mut out, &qkv, batch, &params, layer, &kv);
            outputs.extend_from_slice(&device.to_host(&out)[companion * out_cols..]);
            start_pos += n_tokens;
        }
        outputs
    }

    fn expected(&self) -> Vec<f32> {
        let (head_dim, n_kv_heads) = (self.layout.head_dim, self.layout.n_kv_heads);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut outputs = Vec::new();
        let params = self.params(|sinks| sinks);
        for (position, row) in self.qkv.chunks_exact(self.cols()).enumerate() {
            let mut row = row.to_vec();
            let (turned, _) = row.split_at_mut((self.n_heads + n_kv_heads) * head_dim);
            if let Some([query, key]) = self.qk_norm() {
                let (q, k) = turned.split_at_mut(self.n_heads * head_dim);
                q.copy_from_slice(&reference::rms_norm(q, &query, 1e-5));
                k.copy_from_slice(&reference::rms_norm(k, &key, 1e-5));
            }
            for head in turned.chunks_exact_mut(head_dim) {
                reference::rope(head, &self.rope, position);
            }
            let row = reference::round(self.layout.dtype, &row);
            let (q, kv) = row.split_at(self.n_heads * head_dim);
            let (key, value) = kv.split_at(n_kv_heads * head_dim);
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
            outputs.extend(reference::attention_row(q, &keys, &values, n_kv_heads, &params));
        }
        outputs
    }

    pub fn is_close<B: TestDevice>(&self, device: &B, chunks: &[usize], companion: usize) {
        // In 16 bits, a rotated q or k may fall on the other side of a rounding boundary than the reference's.
        let tolerance = match self.layout.dtype {
            DType::F32 => 2e-5,
            DType::F16 => 4e-3,
            DType::Bf16 => 2e-2,
        };
        let found = self.run(device, chunks, companion, Blocks::Reversed);
        assert_close(device, &found, &self.expected(), tolerance);
    }
}

/// A rotation of fewer dimensions than a head has, and what the append leaves of a block as it was.
pub fn rope_leaves_values_behind_its_dimensions_alone<B: TestDevice>(device: &B) {
    let layout = layout(1, 4, 8, DType::F32);
    let rope = RopeParams {
        inv_freq: vec![1.0],
        attention_factor: 1.0,
    };
    let rope = device.rope(&[rope], 4).unwrap();
    let mut kv = device.cache(layout, 1);
    let row: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let mut qkv = device.filled(24, &row);
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
    device.begin_step();
    device.rope_append(&mut qkv, RaggedBatch { sequences: &sequences }, heads, 1, &mut kv);
    let (sin, cos) = 2.0_f32.sin_cos();
    let expected = [-sin, cos, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    assert_close(device, &device.to_host(&qkv)[..8], &expected, 1e-6);
    let pin = kv.pin(1, 0);
    let stored = |bytes: &[u8]| -> Vec<f32> {
        let words = bytes.chunks_exact(4).map(|word| word.try_into().expect("four bytes"));
        words.map(f32::from_le_bytes).collect()
    };
    let (key, value) = (stored(pin.key()), stored(pin.value()));
    assert_eq!(bits(&value[16..24]), bits(&row[16..]));
    assert_close(device, &key[18..24], &row[10..16], 1e-6);
    assert!(key[..16].iter().chain(&key[24..]).all(|x| *x == 0.0));
}

/// Panics: `two sequences of a batch append to block 0`.
pub fn two_sequences_append_to_one_block<B: TestDevice>(device: &B) {
    let case = Case::new(1, layout(1, 4, 8, DType::F32), 1, 2, PLAIN);
    let mut kv = device.cache(case.layout, 1);
    let mut qkv = device.filled(case.cols(), &case.qkv);
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
        rope: &device.rope(&[case.rope], 4).unwrap(),
        qk_norm: None,
    };
    let batch = RaggedBatch {
        sequences: &[sequence, after],
    };
    device.rope_append(&mut qkv, batch, heads, 0, &mut kv);
}
