//! Every operator, on every instruction set this machine has: close to the reference, and the same bits whatever the
//! batch, the chunking and the number of threads.

use std::borrow::Cow;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::backend::RaggedSequence;
use crate::layout::KvLayout;
use crate::packed::{SourceTensor, WeightKind, WeightSource, WeightSpec};
use crate::reference;

/// A small generator of our own: the tests need values, not quality.
struct Values(u64);

impl Values {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1_u64 << 23) as f32) - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn devices(dtype: DType, n_threads: usize) -> impl Iterator<Item = Cpu> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(move |isa| {
        Cpu::new(CpuOptions {
            n_threads,
            dtype,
            isa: Some(isa),
        })
        .unwrap()
    })
}

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

struct Tensors(HashMap<&'static str, (Vec<usize>, Vec<f32>)>);

impl WeightSource for Tensors {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let (shape, values) = self.0.get(name).ok_or("no such tensor")?;
        let data = Cow::Borrowed(bytemuck::cast_slice(values));
        Ok(SourceTensor {
            dtype: DType::F32,
            shape: shape.clone(),
            data,
        })
    }
}

fn weights(dtype: DType, w: &[f32], n_out: usize, n_in: usize) -> std::sync::Arc<PackedWeights> {
    let source = Tensors(
        [
            ("w", (vec![n_out, n_in], w.to_vec())),
            ("v", (vec![n_in], w[..n_in].to_vec())),
        ]
        .into(),
    );
    let spec = |name: &str, kind| WeightSpec {
        name: name.to_owned(),
        kind,
        parts: vec![name.to_owned()],
    };
    let specs = [
        spec("w", WeightKind::Matrix { n_out, n_in }),
        spec("v", WeightKind::Vector { len: n_in }),
    ];
    PackedWeights::in_memory(dtype, &specs, &source).unwrap()
}

fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> CpuTensor {
    let mut tensor = cpu.tensor(values.len() / cols, cols);
    tensor.set(values);
    tensor
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[track_caller]
fn assert_close(cpu: &Cpu, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(
            close,
            "{}: element {i} is {found}, expected {expected}",
            cpu.numerics_class()
        );
    }
}

fn linear(cpu: &Cpu, x: &[f32], w: &CpuMatrix) -> Vec<f32> {
    let x = tensor(cpu, w.n_in, x);
    let mut out = cpu.tensor(x.rows(), w.n_out);
    cpu.linear(&mut out, &x, w);
    out.as_slice().to_vec()
}

#[test]
fn linear_is_close_to_the_reference_on_odd_sizes() {
    let mut values = Values(1);
    for (rows, n_in, n_out) in [
        (1, 1, 1),
        (1, 2, 3),
        (3, 7, 65),
        (2, 64, 64),
        (5, 129, 63),
        (7, 127, 130),
        (13, 257, 192),
        (40, 300, 67),
    ] {
        let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
        for dtype in DTYPES {
            let expected = reference::linear(&reference::round(dtype, &x), &reference::round(dtype, &w), n_in);
            let packed = weights(dtype, &w, n_out, n_in);
            for cpu in devices(dtype, 2) {
                let w = cpu.matrix(&packed, "w").unwrap();
                // Sums of n_in products below 1, added in f32 one after the other.
                assert_close(&cpu, &linear(&cpu, &x, &w), &expected, 3e-7 * n_in as f32);
            }
        }
    }
}

#[test]
fn a_row_of_linear_has_the_same_bits_in_any_batch_and_on_any_threads() {
    let mut values = Values(2);
    let (rows, n_in, n_out) = (61, 391, 200);
    let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
    for dtype in DTYPES {
        let packed = weights(dtype, &w, n_out, n_in);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let device = |n_threads| {
                Cpu::new(CpuOptions {
                    n_threads,
                    dtype,
                    isa: Some(isa),
                })
                .unwrap()
            };
            let alone = device(1);
            let matrix = alone.matrix(&packed, "w").unwrap();
            let expected: Vec<f32> = x
                .chunks_exact(n_in)
                .flat_map(|row| linear(&alone, row, &matrix))
                .collect();
            for n_threads in [1, 2, 3] {
                let cpu = device(n_threads);
                for batch in [2, 3, 5, 6, 7, 8, 13, 32, 61] {
                    let found: Vec<f32> = x.chunks(batch * n_in).flat_map(|x| linear(&cpu, x, &matrix)).collect();
                    assert!(
                        bits(&found) == bits(&expected),
                        "{isa} {dtype}: {batch} rows on {n_threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn row_operators_are_close_to_the_reference_and_row_independent() {
    let mut values = Values(3);
    for (rows, cols) in [(1, 1), (3, 17), (5, 64), (130, 523), (2, 4096)] {
        let (x, y, weight) = (values.vec(rows * cols), values.vec(rows * cols), values.vec(cols));
        let gate_up: Vec<f32> = values.vec(rows * 2 * cols).iter().map(|x| 12.0 * x).collect();
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        for cpu in devices(DType::F32, 2) {
            let packed = weights(DType::F32, &weight, 1, cols);
            let vector = cpu.vector(&packed, "v").unwrap();
            let mut out = cpu.tensor(rows, cols);
            cpu.rms_norm(&mut out, &tensor(&cpu, cols, &x), &vector, 1e-5);
            assert_close(&cpu, out.as_slice(), &reference::rms_norm(&x, &weight, 1e-5), 1e-5);

            let mut residual = tensor(&cpu, cols, &x);
            cpu.add_rms_norm(&mut out, &mut residual, &tensor(&cpu, cols, &y), &vector, 1e-5);
            assert_eq!(bits(residual.as_slice()), bits(&sums));
            assert_close(&cpu, out.as_slice(), &reference::rms_norm(&sums, &weight, 1e-5), 1e-5);
            let batch = out.as_slice().to_vec();
            for (row_idx, row) in sums.chunks_exact(cols).enumerate() {
                let mut one = cpu.tensor(1, cols);
                cpu.rms_norm(&mut one, &tensor(&cpu, cols, row), &vector, 1e-5);
                assert_eq!(bits(one.as_slice()), bits(&batch[row_idx * cols..][..cols]));
            }

            cpu.silu_mul(&mut out, &tensor(&cpu, 2 * cols, &gate_up));
            assert_close(&cpu, out.as_slice(), &reference::silu_mul(&gate_up, cols), 1e-6);
        }
    }
}

/// Runs the vector exponential on slices of any length.
struct ExpAll<'a>(&'a mut [f32]);

impl simd::Kernel for ExpAll<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: simd::Simd>(self, simd: S) {
        for chunk in self.0.chunks_mut(simd::LANES) {
            // SAFETY: chunk.len() <= 16.
            unsafe {
                let x = simd.load_partial(chunk.as_ptr(), chunk.len(), 0.0);
                simd.store_partial(chunk.as_mut_ptr(), chunk.len(), simd.exp(x));
            }
        }
    }
}

#[test]
fn exp_is_accurate_over_its_range_and_exact_at_its_ends() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let x: Vec<f32> = (0..100_003).map(|i| -87.3 + 175.6 * i as f32 / 100_003.0).collect();
        let mut y = x.clone();
        dispatch::dispatch(isa, ExpAll(&mut y));
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - exact).abs() <= 3e-7 * exact,
                "{isa}: exp({x}) = {y}, expected {exact}"
            );
        }
        let mut ends = [f32::NEG_INFINITY, -88.0, 0.0, f32::INFINITY, f32::NAN];
        dispatch::dispatch(isa, ExpAll(&mut ends));
        assert_eq!(ends[..3], [0.0, 0.0, 1.0], "{isa}");
        assert!(ends[3] > 2e38 && ends[4].is_nan(), "{isa}: {ends:?}");
    }
}

#[test]
fn embed_and_gather_return_the_rows_asked_for() {
    let mut values = Values(4);
    let (vocab, hidden) = (131, 37);
    let table = values.vec(vocab * hidden);
    let ids = [0, 130, 64, 63, 64, 7];
    for dtype in DTYPES {
        let packed = weights(dtype, &table, vocab, hidden);
        let rounded = reference::round(dtype, &table);
        for cpu in devices(dtype, 2) {
            let mut out = cpu.tensor(6, hidden);
            cpu.embed(&mut out, &cpu.matrix(&packed, "w").unwrap(), &ids);
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|id| rounded[*id as usize * hidden..][..hidden].to_vec())
                .collect();
            assert_eq!(cpu.to_host(&out), expected);
            let mut some = cpu.tensor(3, hidden);
            cpu.gather_rows(&mut some, &out, &[5, 0]);
            assert_eq!(some.rows(), 2);
            assert_eq!(some.as_slice(), [&expected[5 * hidden..], &expected[..hidden]].concat());
        }
    }
}

/// One sequence's qkv rows, and how to run them.
struct Case {
    layout: KvLayout,
    n_heads: usize,
    n_tokens: usize,
    qkv: Vec<f32>,
    rope: RopeParams,
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
        }
    }

    fn cols(&self) -> usize {
        (self.n_heads + 2 * self.layout.n_kv_heads) * self.layout.head_dim
    }

    fn params(&self) -> AttentionParams {
        AttentionParams {
            n_heads: self.n_heads,
            scale: 1.0 / (self.layout.head_dim as f32).sqrt(),
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
        let rope = cpu.rope(&self.rope, self.n_tokens.max(companion * chunks.len()));
        let layer = self.layout.n_layers - 1;
        let out_cols = self.n_heads * self.layout.head_dim;
        let mut outputs = Vec::new();
        let mut start_pos = 0;
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
                });
            }
            sequences.push(RaggedSequence {
                start_pos,
                n_tokens,
                block_table: &block_table,
            });
            let batch = RaggedBatch { sequences: &sequences };
            cpu.rope_append(&mut qkv, batch, &rope, self.n_heads, layer, &mut kv);
            let mut out = cpu.tensor(companion + n_tokens, out_cols);
            cpu.attention(&mut out, &qkv, batch, self.params(), layer, &kv);
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
            for head in row[..(self.n_heads + n_kv_heads) * head_dim].chunks_exact_mut(head_dim) {
                reference::rope(head, &self.rope, position);
            }
            let row = reference::round(self.layout.dtype, &row);
            let (q, kv) = row.split_at(self.n_heads * head_dim);
            let (key, value) = kv.split_at(n_kv_heads * head_dim);
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
            outputs.extend(reference::attention_row(q, &keys, &values, n_kv_heads, self.params()));
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
        ] {
            let layout = layout(n_kv_heads, block_size, head_dim, dtype);
            let case = Case::new(7, layout, n_kv_heads * group, n_tokens);
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
    ) {
        let n_tokens = chunks.iter().sum();
        let case = Case::new(seed, layout(n_kv_heads, block_size, head_dim, dtype), n_kv_heads * group, n_tokens);
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
        let rope = cpu.rope(
            &RopeParams {
                inv_freq: vec![1.0],
                attention_factor: 1.0,
            },
            4,
        );
        let mut kv = KvCache::new(layout, 1).unwrap();
        let row: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut qkv = tensor(&cpu, 24, &row);
        let sequences = [RaggedSequence {
            start_pos: 2,
            n_tokens: 1,
            block_table: &[0],
        }];
        cpu.rope_append(&mut qkv, RaggedBatch { sequences: &sequences }, &rope, 1, 1, &mut kv);
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
    cpu.rope_append(&mut qkv, batch, &cpu.rope(&case.rope, 4), 1, 0, &mut kv);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let options = CpuOptions {
        n_threads: 1,
        dtype: DType::F16,
        isa: None,
    };
    assert!(matches!(
        Cpu::new(options),
        Err(KernelError::UnsupportedDType { dtype: DType::F16, .. })
    ));
    assert!(matches!(
        Cpu::new(CpuOptions {
            n_threads: 0,
            dtype: DType::F32,
            isa: None
        }),
        Err(KernelError::Threads { .. })
    ));
    let cpu = Cpu::new(CpuOptions {
        n_threads: 2,
        dtype: DType::Bf16,
        isa: Some(Isa::Portable),
    })
    .unwrap();
    assert_eq!(
        (cpu.numerics_class().as_str(), cpu.n_threads()),
        ("cpu-portable-bf16", 2)
    );
    let packed = weights(DType::F32, &[1.0], 1, 1);
    assert!(matches!(
        cpu.matrix(&packed, "w"),
        Err(KernelError::DTypeMismatch { .. })
    ));
    assert!(matches!(
        cpu.vector(&packed, "w"),
        Err(KernelError::MissingWeight { kind: "vector", .. })
    ));
}
