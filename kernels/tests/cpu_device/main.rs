//! The CPU device by the bodies that every device shares, on every instruction set of this machine; and what it promises alone:
//! the same bits whatever the batch, the chunks and the number of threads.

#[allow(dead_code, reason = "shared with tests that ask for more")]
#[path = "../bodies/mod.rs"]
mod bodies;

use baton_kernels::{Backend as _, Cpu, CpuOptions, DType, Isa, KvCache, KvLayout, Packing};
use bodies::attention::{Blocks, Case, KINDS, layout};
use bodies::{TestDevice, attention, bits, moe, products, rows};
use proptest::prelude::*;

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

impl TestDevice for Cpu {
    const PACKING: Packing = Packing::Panels;

    fn stored(&self) -> DType {
        DType::F32
    }

    fn filled(&self, cols: usize, values: &[f32]) -> Self::Tensor {
        let mut tensor = self.tensor(values.len() / cols, cols).unwrap();
        tensor.set(values);
        tensor
    }

    fn cache(&self, layout: KvLayout, n_blocks: usize) -> KvCache {
        KvCache::new(layout, n_blocks).unwrap()
    }
}

fn cpu(dtype: DType, isa: Isa, n_threads: usize) -> Cpu {
    Cpu::new(CpuOptions {
        n_threads,
        dtype,
        isa: Some(isa),
    })
    .unwrap()
}

/// Every instruction set of this machine, in every dtype.
fn classes() -> impl Iterator<Item = (DType, Isa)> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.flat_map(|isa| DTYPES.map(|dtype| (dtype, isa)))
}

#[test]
fn products_are_close_to_the_reference_on_odd_sizes() {
    for (dtype, isa) in classes() {
        for size in products::ODD_SIZES {
            products::are_close(&cpu(dtype, isa, 2), size);
        }
    }
}

#[test]
fn a_row_of_a_product_has_the_same_bits_in_any_batch_and_on_any_threads() {
    for (dtype, isa) in classes() {
        let alone = cpu(dtype, isa, 1);
        for n_threads in [1, 2, 3] {
            let batches = [2, 3, 5, 6, 7, 8, 13, 32, 61];
            products::rows_are_independent(&alone, &cpu(dtype, isa, n_threads), (61, 391, 200), &batches);
        }
    }
}

#[test]
fn row_operators_are_close_to_the_reference_and_row_independent() {
    for (dtype, isa) in classes() {
        for size in rows::ODD_SIZES.into_iter().chain([(130, 523), (2, 4096)]) {
            rows::are_close(&cpu(dtype, isa, 2), size);
        }
    }
}

#[test]
fn embed_and_gather_return_the_rows_asked_for() {
    for (dtype, isa) in classes() {
        rows::are_found_again(&cpu(dtype, isa, 2));
    }
}

#[test]
fn experts_are_close_to_the_reference_and_rows_independent() {
    for (dtype, isa) in classes() {
        for mixture in moe::ODD_SIZES {
            for n_threads in [1, 2] {
                moe::rows_are_sums_of_their_experts(&cpu(dtype, isa, n_threads), mixture);
            }
        }
    }
}

#[test]
fn attention_is_close_to_the_reference_on_odd_sizes() {
    for (dtype, isa) in classes() {
        for (n_kv_heads, group, block_size, head_dim, n_tokens) in [
            (1, 1, 1, 2, 1),
            (2, 3, 16, 64, 17),
            (1, 4, 16, 32, 257),
            (3, 1, 5, 22, 33),
            (1, 8, 32, 128, 40),
            (1, 40, 16, 16, 5),
            (1, 2, 16, 24, 700),
        ] {
            for kind in KINDS {
                let case = Case::new(
                    7,
                    layout(n_kv_heads, block_size, head_dim, dtype),
                    group,
                    n_tokens,
                    kind,
                );
                case.is_close(&cpu(dtype, isa, 2), &[n_tokens], 0);
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
        let case = Case::new(seed, layout(n_kv_heads, block_size, head_dim, dtype), group, n_tokens, kind);
        let token_by_token = vec![1; n_tokens];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let at_once = bits(&case.run(&cpu(dtype, isa, 1), &[n_tokens], 0, Blocks::InOrder));
            for (n_threads, chunks, companion, blocks) in [
                (1, &token_by_token, 0, Blocks::InOrder),
                (2, &chunks, companion, Blocks::Reversed),
                (3, &chunks, 0, Blocks::InOrder),
                (3, &vec![n_tokens], companion, Blocks::Reversed),
            ] {
                let found = bits(&case.run(&cpu(dtype, isa, n_threads), chunks, companion, blocks));
                prop_assert!(found == at_once, "{isa} {dtype} on {n_threads} threads in {} chunks", chunks.len());
            }
        }
    }
}

#[test]
fn rope_leaves_values_behind_its_dimensions_alone() {
    for (dtype, isa) in classes().filter(|(dtype, _)| *dtype == DType::F32) {
        attention::rope_leaves_values_behind_its_dimensions_alone(&cpu(dtype, isa, 1));
    }
}

#[test]
#[should_panic(expected = "two sequences of a batch append to block 0")]
fn two_sequences_may_not_append_to_one_block() {
    attention::two_sequences_append_to_one_block(&cpu(DType::F32, Isa::Portable, 1));
}
