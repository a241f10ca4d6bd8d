//! KV memory on the device: what transports read and write is ordered behind what was queued, and nothing is lost or leaked.

use baton_kernels::cuda::{Cuda, CudaMode};
use baton_kernels::{
    AttentionParams, Backend, DType, KvBytes, KvCache, KvLayout, KvRead, KvWrite, RaggedBatch, RaggedSequence,
    RopeAppendParams, RopeParams,
};

use crate::controls::{allocated_bytes, n_calls, pinned_bytes};
use crate::support::{LAYOUT, Values, bits, device, is_alone, tensor};

/// 2 heads of q, k and v each.
const COLS: usize = 48;

fn cuda() -> Option<Cuda> {
    device(DType::F32, CudaMode::Fast, LAYOUT.head_dim)
}

fn part(seed: u64) -> Vec<u8> {
    let values = Values(seed).vec(LAYOUT.elements_per_part());
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Queues the append of `n_tokens` rows to block 0 of layer 1, and returns the rows.
fn append(cuda: &Cuda, kv: &mut KvCache, n_tokens: usize) -> Vec<f32> {
    let rows = Values(3).vec(n_tokens * COLS);
    let mut qkv = tensor(cuda, COLS, &rows);
    // No rotation.
    let still = RopeParams {
        inv_freq: vec![0.0; 4],
        attention_factor: 1.0,
    };
    let sequences = [RaggedSequence {
        start_pos: 0,
        n_tokens,
        block_table: &[0],
        rope_variant: 0,
    }];
    let heads = RopeAppendParams {
        n_heads: 2,
        rope: &cuda.rope(&[still], 4).unwrap(),
        qk_norm: None,
    };
    cuda.begin_step();
    cuda.rope_append(&mut qkv, RaggedBatch { sequences: &sequences }, heads, 1, kv);
    rows
}

#[test]
fn what_is_written_is_read_and_neighbours_stay_zero() {
    let Some(cuda) = cuda() else { return };
    let mut kv = cuda.kv_cache(LAYOUT, 5).unwrap();
    let (key, value) = (part(1), part(2));
    let mut writer = kv.write_handle(3).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| writer.write(1, &key, &value).unwrap());
    });
    writer.seal();
    let read = kv.pin(1, 3);
    assert!(read.key() == key && read.value() == value);
    let mut both = vec![0; LAYOUT.layer_block_bytes()];
    read.clone().copy_to(&mut both);
    assert_eq!(both, [key.clone(), value.clone()].concat());
    for (layer, block) in [(0, 3), (1, 2), (1, 4), (0, 0)] {
        let other = kv.pin(layer, block);
        assert!(other.key().iter().chain(other.value()).all(|byte| *byte == 0));
    }
    drop(read);
    kv.copy_block(3, 0).unwrap();
    let copied = kv.pin(1, 0);
    drop(kv);
    assert!(
        copied.key() == key && copied.value() == value,
        "a pin outlives the cache"
    );
}

/// A pin made while the append is queued reads what was appended, on whatever thread it is read.
#[test]
fn a_pin_waits_for_the_append_before_it() {
    let Some(cuda) = cuda() else { return };
    let mut kv = cuda.kv_cache(LAYOUT, 2).unwrap();
    let rows = append(&cuda, &mut kv, 3);
    let pin = kv.pin(1, 0);
    let (key, value) = std::thread::spawn(move || (pin.key().to_vec(), pin.value().to_vec()))
        .join()
        .unwrap();
    let [key, value] = [key, value].map(|bytes| {
        let numbers = bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        numbers.collect::<Vec<f32>>()
    });
    for (token, row) in rows.chunks(COLS).enumerate() {
        for head in 0..2 {
            let at = (head * LAYOUT.block_size + token) * LAYOUT.head_dim;
            let of_row = |first: usize| &row[first + head * LAYOUT.head_dim..][..LAYOUT.head_dim];
            assert_eq!(
                key[at..][..LAYOUT.head_dim],
                *of_row(16),
                "k of token {token}, head {head}"
            );
            assert_eq!(
                value[at..][..LAYOUT.head_dim],
                *of_row(32),
                "v of token {token}, head {head}"
            );
        }
    }
}

/// A block that is given to a writer while attention over it is queued keeps its bytes until that is through.
#[test]
fn a_writer_waits_for_the_attention_before_it() {
    let Some(cuda) = cuda() else { return };
    let attend = |kv: &mut KvCache, meanwhile: &mut dyn FnMut(&mut KvCache)| {
        let rows = append(&cuda, kv, 4);
        let qkv = tensor(&cuda, COLS, &rows);
        let sequences = [RaggedSequence {
            start_pos: 3,
            n_tokens: 4,
            block_table: &[1, 0],
            rope_variant: 0,
        }];
        let params = AttentionParams {
            n_heads: 2,
            scale: 0.5,
            window: None,
            soft_cap: None,
            sinks: None,
        };
        let mut out = cuda.tensor(4, 16).unwrap();
        cuda.attention(&mut out, &qkv, RaggedBatch { sequences: &sequences }, &params, 1, kv);
        meanwhile(kv);
        cuda.to_host(&out).to_vec()
    };
    let mut kv = cuda.kv_cache(LAYOUT, 2).unwrap();
    let expected = attend(&mut kv, &mut |_| {});
    let found = attend(&mut kv, &mut |kv| {
        let mut writer = kv.write_handle(1).unwrap();
        writer.write(1, &part(1), &part(2)).unwrap();
    });
    assert_eq!(bits(&found), bits(&expected));
    assert!(attend(&mut kv, &mut |_| {}) != expected, "the block is another now");
}

#[test]
fn a_cache_that_does_not_fit_is_refused_in_one_line() {
    let Some(cuda) = cuda() else { return };
    let block_bytes = LAYOUT.block_bytes();
    let n_blocks = (1 << 41) / block_bytes;
    let message = cuda.kv_cache(LAYOUT, n_blocks).err().unwrap().to_string();
    let (start, end) = (
        "device cuda: the KV cache: 2199023255552 bytes of device memory, ",
        " are free",
    );
    assert!(message.starts_with(start) && message.ends_with(end), "{message}");
    let odd = KvLayout {
        block_size: 5,
        ..LAYOUT
    };
    let message = cuda.kv_cache(odd, 1).err().unwrap().to_string();
    assert!(
        message.ends_with("block_size must be a power of two on a CUDA device"),
        "{message}"
    );
}

/// Writes another pattern into both layers of each block.
fn fill(kv: &mut KvCache, blocks: &[u32]) {
    for &block in blocks {
        let mut writer = kv.write_handle(block).unwrap();
        for layer in 0..LAYOUT.n_layers {
            let seed = 100 * u64::from(block) + 10 * layer as u64;
            writer.write(layer, &part(seed), &part(seed + 1)).unwrap();
        }
    }
}

fn pins(kv: &mut KvCache, layer: usize, blocks: &[u32]) -> Vec<KvRead> {
    blocks.iter().map(|&block| kv.pin(layer, block)).collect()
}

/// What a frame of blocks that [`fill`] wrote carries.
fn frame(layer: usize, blocks: &[u32]) -> Vec<u8> {
    let seeds = |first: u64| {
        blocks
            .iter()
            .map(move |&block| 100 * u64::from(block) + 10 * layer as u64 + first)
    };
    seeds(0).chain(seeds(1)).flat_map(part).collect()
}

#[test]
fn frames_of_blocks_are_gathered_and_scattered() {
    let Some(cuda) = cuda() else { return };
    let (mut from, mut to) = (cuda.kv_cache(LAYOUT, 9).unwrap(), cuda.kv_cache(LAYOUT, 5).unwrap());
    let (sent, landed) = ([7, 0, 3], [4, 1, 2]);
    fill(&mut from, &sent);
    let bytes = KvRead::gather(&pins(&mut from, 1, &sent));
    assert_eq!(bytes.as_ref(), frame(1, &sent));
    let mut writers = to.reserve_write(&landed).unwrap();
    KvWrite::scatter(&mut writers, 0, bytes.as_ref()).unwrap();
    let refused = KvWrite::scatter(&mut writers, 0, &bytes.as_ref()[1..]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "key and value of block 4, layer 0: expected 1536 bytes, found 1535"
    );
    drop(writers);
    assert_eq!(KvRead::gather(&pins(&mut to, 0, &landed)).as_ref(), frame(1, &sent));
    let untouched = KvRead::gather(&pins(&mut to, 1, &[0, 1, 2, 3, 4]));
    assert!(untouched.as_ref().iter().all(|byte| *byte == 0));
}

/// More blocks than a slot lists go in several turns, K of all before V of all nevertheless.
#[test]
fn a_list_longer_than_a_slot_is_one_frame() {
    const SMALL: KvLayout = KvLayout {
        n_layers: 1,
        n_kv_heads: 1,
        block_size: 1,
        head_dim: 2,
        dtype: DType::F32,
    };
    const N_BLOCKS: u32 = 2 * 1024 + 3;
    let Some(cuda) = device(DType::F32, CudaMode::Fast, SMALL.head_dim) else {
        return;
    };
    let (mut from, mut to) = (
        cuda.kv_cache(SMALL, N_BLOCKS as usize).unwrap(),
        cuda.kv_cache(SMALL, N_BLOCKS as usize).unwrap(),
    );
    let ascending: Vec<u32> = (0..N_BLOCKS).collect();
    let descending: Vec<u32> = ascending.iter().rev().copied().collect();
    let data: Vec<u8> = (0..4 * N_BLOCKS).flat_map(u32::to_le_bytes).collect();
    let mut writers = from.reserve_write(&ascending).unwrap();
    KvWrite::scatter(&mut writers, 0, &data).unwrap();
    drop(writers);
    let reads = pins(&mut from, 0, &ascending);
    assert_eq!(KvRead::gather(&reads).as_ref(), data);
    let mut writers = to.reserve_write(&descending).unwrap();
    KvWrite::copy_from(&mut writers, 0, &reads).unwrap();
    drop(writers);
    assert_eq!(KvRead::gather(&pins(&mut to, 0, &descending)).as_ref(), data);
}

/// A copy between caches of one card waits for the append before the pins, and for the attention before the writers.
#[test]
fn blocks_move_between_caches_without_the_host() {
    let Some(cuda) = cuda() else { return };
    let (mut from, mut to) = (cuda.kv_cache(LAYOUT, 2).unwrap(), cuda.kv_cache(LAYOUT, 3).unwrap());
    append(&cuda, &mut from, 3);
    let reads = pins(&mut from, 1, &[0]);
    let mut writers = to.reserve_write(&[2]).unwrap();
    KvWrite::copy_from(&mut writers, 0, &reads).unwrap();
    drop(writers);
    let moved = KvRead::gather(&pins(&mut to, 0, &[2]));
    assert_eq!(moved.as_ref(), KvRead::gather(&reads).as_ref());
    assert!(moved.as_ref().iter().any(|byte| *byte != 0));
}

/// Run in a process of its own, so that only its calls are counted: a frame costs as many calls of the driver, and as much
/// pinned memory, whether it has one block or a hundred; so long as frames are kept, later ones go by ordinary memory.
#[test]
fn a_frame_is_a_few_calls_of_the_driver() {
    if !is_alone("kv::a_frame_is_a_few_calls_of_the_driver") {
        return;
    }
    const N_BLOCKS: u32 = 100;
    let cuda = cuda().unwrap();
    let mut kv = cuda.kv_cache(LAYOUT, N_BLOCKS as usize).unwrap();
    let blocks: Vec<u32> = (0..N_BLOCKS).collect();
    fill(&mut kv, &blocks);
    let counted = |work: &mut dyn FnMut()| {
        let before = n_calls();
        work();
        n_calls() - before
    };
    let (one, all) = (pins(&mut kv, 0, &[3]), pins(&mut kv, 0, &blocks));
    let mut frames: Vec<KvBytes> = Vec::new();
    let of_one = counted(&mut || frames.push(KvRead::gather(&one)));
    let of_all = counted(&mut || frames.push(KvRead::gather(&all)));
    // A wait for the append, the list, the kernel, the copy, an event recorded and waited for.
    assert_eq!((of_one, of_all), (6, 6));
    let one_by_one = counted(&mut || all.iter().for_each(|read| assert!(!read.key().is_empty())));
    assert_eq!(one_by_one, 6 * i64::from(N_BLOCKS));
    drop((one, all));
    let mut writers = kv.reserve_write(&blocks).unwrap();
    let data = frame(0, &blocks);
    assert_eq!(counted(&mut || KvWrite::scatter(&mut writers, 0, &data).unwrap()), 6);
    drop(writers);
    let pinned = pinned_bytes();
    for _ in 0..20 {
        frames.push(KvRead::gather(&pins(&mut kv, 0, &blocks)));
    }
    assert!(frames[1..].iter().all(|kept| kept.as_ref() == data));
    assert_eq!(pinned_bytes(), pinned);
}

/// Run in a process of its own, so that no other test's memory is counted.
#[test]
fn everything_is_given_back() {
    if !is_alone("kv::everything_is_given_back") {
        return;
    }
    let cuda = cuda().unwrap();
    let mut kv = cuda.kv_cache(LAYOUT, 2).unwrap();
    append(&cuda, &mut kv, 3);
    let pin = kv.pin(1, 0);
    assert!(allocated_bytes() > 0);
    drop((cuda, kv));
    assert!(!pin.key().is_empty());
    let lent = KvRead::gather(&[pin]);
    assert_eq!((allocated_bytes() > 0, pinned_bytes() > 0), (true, true));
    drop(lent);
    assert_eq!((allocated_bytes(), pinned_bytes()), (0, 0));
}
