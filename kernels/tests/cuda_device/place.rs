//! Several instances of a process on one card: what they have in common, and what each has for itself.

use std::sync::Arc;

use baton_kernels::cuda::{Cuda, CudaKvArena, CudaMode, CudaPlace, CudaTurn};
use baton_kernels::{Backend, DType, KvRead, KvWrite};

use crate::controls::{allocated_bytes, last_launch, set};
use crate::support::{LAYOUT, Values, Weights, device_at, is_alone, tensor, try_device_at};

const ARENA_PIECE: i64 = 2 << 20;

fn cuda(place: CudaPlace) -> Option<Cuda> {
    device_at(DType::F32, CudaMode::Fast, LAYOUT.head_dim, place)
}

/// Run in a process of its own, so that no other test's memory is counted.
#[test]
fn instances_share_weights_that_go_with_the_last() {
    if !is_alone("place::instances_share_weights_that_go_with_the_last") {
        return;
    }
    const N: usize = 64;
    const MATRIX_BYTES: i64 = (N * N * 4) as i64;
    let folder = tempfile::tempdir().unwrap();
    let values = Values(1).vec(N * N);
    let weights = Weights::default()
        .matrix("matrix", N, N, &values)
        .vector("vector", &values[..N]);
    let instances = [(); 2].map(|()| cuda(CudaPlace::default()).unwrap());
    let before = allocated_bytes();
    let loaded = instances.each_ref().map(|cuda| {
        // Each maps the file for itself, as instances do.
        let packed = weights.pack_into(folder.path(), "shared", DType::F32);
        (
            cuda.matrix(&packed, "matrix").unwrap(),
            cuda.vector(&packed, "vector").unwrap(),
        )
    });
    let once = MATRIX_BYTES + 4 * N as i64;
    assert_eq!(allocated_bytes() - before, once);
    // Other weights are others', whatever they are called.
    let other = weights.pack_into(folder.path(), "other", DType::F32);
    let other = instances[1].matrix(&other, "matrix").unwrap();
    assert_eq!(allocated_bytes() - before, once + MATRIX_BYTES);
    drop(other);
    let [(matrix, vector), (second_matrix, second_vector)] = loaded;
    drop((matrix, vector));
    assert_eq!(allocated_bytes() - before, once);
    // What is left computes as before.
    let x = Values(2).vec(N);
    let mut out = instances[1].tensor(1, N).unwrap();
    instances[1].begin_step();
    instances[1].linear(&mut out, &tensor(&instances[1], N, &x), &second_matrix);
    let found = instances[1].to_host(&out).to_vec();
    for (row, found) in values.chunks(N).zip(&found) {
        let expected: f32 = row.iter().zip(&x).map(|(w, x)| w * x).sum();
        assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
    }
    drop(out);
    let computed = allocated_bytes();
    drop((second_matrix, second_vector));
    assert_eq!(computed - allocated_bytes(), once);
}

/// Run in a process of its own, so that no other test's memory is counted.
#[test]
fn instances_have_one_allocation_for_their_caches() {
    if !is_alone("place::instances_have_one_allocation_for_their_caches") {
        return;
    }
    let arena = Arc::new(CudaKvArena::new(2));
    let instances = [(); 2].map(|()| {
        let arena = Some(Arc::clone(&arena));
        cuda(CudaPlace {
            arena,
            ..CudaPlace::default()
        })
        .unwrap()
    });
    let before = allocated_bytes();
    // Staging comes with a cache; the second is not asked how large its part is.
    let first = instances[0].kv_cache_within(LAYOUT, |free_bytes| {
        assert!(free_bytes > 1 << 20);
        5
    });
    let mut first = first.unwrap();
    let with_one = allocated_bytes() - before;
    let mut second = instances[1]
        .kv_cache_within(LAYOUT, |_| panic!("it is settled"))
        .unwrap();
    let with_two = allocated_bytes() - before;
    assert_eq!((first.n_blocks(), second.n_blocks()), (5, 5));
    let staging = with_two - with_one;
    assert_eq!(with_one - staging, 2 * ARENA_PIECE, "both caches came with the first");
    // What is written in one is not in the other, until it is handed over.
    let data: Vec<u8> = (0..5 * LAYOUT.layer_block_bytes()).map(|i| (i * 7 + 1) as u8).collect();
    let blocks = [0, 1, 2, 3, 4];
    let mut writers = first.reserve_write(&blocks).unwrap();
    KvWrite::scatter(&mut writers, 1, &data).unwrap();
    drop(writers);
    let reads = blocks.map(|block| second.pin(1, block));
    assert!(KvRead::gather(&reads).as_ref().iter().all(|byte| *byte == 0));
    drop(reads);
    let mut writers = second.reserve_write(&blocks).unwrap();
    let reads = blocks.map(|block| first.pin(1, block));
    KvWrite::copy_from(&mut writers, 1, &reads).unwrap();
    drop((writers, reads, first));
    let reads = blocks.map(|block| second.pin(1, block));
    assert_eq!(KvRead::gather(&reads).as_ref(), data);
}

/// Run in a process of its own, as it changes how much memory the card has.
#[test]
fn the_first_leaves_the_others_as_much_as_it_has() {
    if !is_alone("place::the_first_leaves_the_others_as_much_as_it_has") {
        return;
    }
    const ACTIVATIONS: usize = 16 << 20;
    let arena = Arc::new(CudaKvArena::new(2));
    let place = CudaPlace {
        arena: Some(arena),
        ..CudaPlace::default()
    };
    // Of products, staging and activations an instance has some 120 MiB.
    drop(cuda(CudaPlace::default()).unwrap());
    set(c"total_bytes", 384 << 20);
    let instances = [(); 2].map(|()| {
        let cuda = cuda(place.clone()).unwrap();
        let activations = cuda.tensor(ACTIVATIONS, 1).expect("room for its activations");
        let percent_of_each = 40;
        let n_blocks = |free_bytes: usize| free_bytes / 100 * percent_of_each / LAYOUT.block_bytes();
        let kv = cuda.kv_cache_within(LAYOUT, n_blocks).expect("room for its cache");
        (cuda, activations, kv)
    });
    let [first, second] = instances.each_ref().map(|(_, _, kv)| kv.n_blocks());
    assert!(
        first == second && first * LAYOUT.block_bytes() > 32 << 20,
        "{first} and {second} blocks"
    );
}

/// Where a kernel of its compute stream runs, and before what.
fn compute(cuda: &Cuda) -> (i64, i64) {
    let x = tensor(cuda, 4, &[1.0; 4]);
    let mut sum = tensor(cuda, 4, &[2.0; 4]);
    cuda.add(&mut sum, &x);
    let launched = last_launch();
    assert_eq!(*cuda.to_host(&sum), [3.0; 4]);
    launched
}

/// Run in a process of its own, as it asks what was launched last and changes what the driver can do.
#[test]
fn prompts_have_a_share_of_the_card_and_generating_goes_first() {
    if !is_alone("place::prompts_have_a_share_of_the_card_and_generating_goes_first") {
        return;
    }
    let place = |turn, multiprocessor_percent| CudaPlace {
        turn,
        multiprocessor_percent,
        ..CudaPlace::default()
    };
    let decode = cuda(CudaPlace::default()).unwrap();
    let prefill = cuda(place(CudaTurn::Last, Some(55))).unwrap();
    let unlimited = cuda(place(CudaTurn::Last, Some(100))).unwrap();
    assert_eq!(compute(&decode), (-5, 16));
    // 55 % of 16 are 8, which the card can split.
    assert_eq!((compute(&prefill), prefill.n_multiprocessors()), ((0, 8), 8));
    assert_eq!((compute(&unlimited), unlimited.n_multiprocessors()), ((0, 16), 16));
    // Copies of KV go before prompts, on their share, and after steps that generate.
    let mut kv = prefill.kv_cache(LAYOUT, 2).unwrap();
    drop(KvRead::gather(&[kv.pin(0, 1)]));
    assert_eq!(last_launch(), (-3, 8));
    let mut kv = decode.kv_cache(LAYOUT, 2).unwrap();
    drop(KvRead::gather(&[kv.pin(0, 1)]));
    assert_eq!(last_launch(), (-3, 16));
    drop((kv, prefill));
    set(c"green_contexts", 0);
    let Err(refused) = try_device_at(DType::F32, CudaMode::Fast, 8, place(CudaTurn::Last, Some(30))).unwrap() else {
        panic!("no green context");
    };
    assert_eq!(
        refused.to_string(),
        "device cuda: 30% of the multiprocessors: the driver (CUDA 13.0) makes no green context of this card, for which \
         CUDA 12.4 or newer is needed: CUDA_ERROR_OF_THE_STAND_IN (an error of the stand-in)"
    );
}
