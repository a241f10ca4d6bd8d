//! Rope, the append and attention, by the bodies that every device shares; in deterministic mode the same bits however a context
//! is cut and whatever stands beside it.

use baton_kernels::DType;
use baton_kernels::cuda::CudaMode;

use crate::bodies::attention::{self, Blocks, Case, KINDS, Kind, Normed, PLAIN, layout};
use crate::support::{DTYPES, bits, device};

#[test]
fn attention_is_close_to_the_reference() {
    for dtype in DTYPES {
        for (n_kv_heads, group, block_size, head_dim, chunks) in [
            (1, 1, 16, 64, vec![1]),
            (2, 3, 16, 64, vec![17, 1, 1]),
            (1, 4, 16, 128, vec![130, 1]),
            (3, 1, 8, 32, vec![33, 40, 1]),
        ] {
            let Some(cuda) = device(dtype, CudaMode::Fast, head_dim) else {
                return;
            };
            for kind in KINDS {
                let layout = layout(n_kv_heads, block_size, head_dim, dtype);
                Case::new(7, layout, group, chunks.iter().sum(), kind).is_close(&cuda, &chunks, 3);
            }
        }
    }
}

#[test]
fn deterministic_bits_do_not_depend_on_chunks_or_batch() {
    for dtype in [DType::F32, DType::Bf16] {
        let kind = Kind {
            sinks: true,
            qk_norm: Some(Normed::EachHead),
            ..PLAIN
        };
        // Longer than a fixed split.
        let case = Case::new(7, layout(1, 16, 64, dtype), 2, 270, kind);
        let Some(cuda) = device(dtype, CudaMode::Deterministic, 64) else {
            return;
        };
        let at_once = bits(&case.run(&cuda, &[270], 0, Blocks::InOrder));
        for (chunks, companion) in [(vec![255, 1, 1, 13], 5), (vec![100, 170], 1)] {
            assert!(
                bits(&case.run(&cuda, &chunks, companion, Blocks::Reversed)) == at_once,
                "{dtype}: {chunks:?} beside {companion}"
            );
        }
    }
}

#[test]
fn rope_leaves_values_behind_its_dimensions_alone() {
    let Some(cuda) = device(DType::F32, CudaMode::Fast, 8) else {
        return;
    };
    attention::rope_leaves_values_behind_its_dimensions_alone(&cuda);
}

#[test]
#[should_panic(expected = "two sequences of a batch append to block 0")]
fn two_sequences_may_not_append_to_one_block() {
    let Some(cuda) = device(DType::F32, CudaMode::Fast, 8) else {
        panic!("two sequences of a batch append to block 0: nothing to test on");
    };
    attention::two_sequences_append_to_one_block(&cuda);
}
