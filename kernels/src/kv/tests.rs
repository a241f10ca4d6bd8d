//! Pins, writers and what they keep away from each other.

use std::os::fd::{AsFd as _, OwnedFd};

use memmap2::MmapOptions;
use proptest::prelude::*;

use super::*;
use crate::layout::DType;

const LAYOUT: KvLayout = KvLayout {
    n_layers: 2,
    n_kv_heads: 2,
    block_size: 4,
    head_dim: 6,
    dtype: DType::Bf16,
};

fn cache() -> KvCache {
    KvCache::new(LAYOUT, 5).unwrap()
}

fn panics(f: impl FnOnce()) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err()
}

#[test]
fn what_is_written_is_read_and_neighbours_stay_zero() {
    let mut kv = cache();
    let part = LAYOUT.part_bytes();
    let key: Vec<u8> = (0..part).map(|i| i as u8).collect();
    let value: Vec<u8> = (0..part).map(|i| !(i as u8)).collect();
    let mut writer = kv.write_handle(3).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| writer.write(1, &key, &value).unwrap());
    });
    writer.seal();
    let read = kv.pin(1, 3);
    assert_eq!((read.key(), read.value()), (&key[..], &value[..]));
    let mut both = vec![0; LAYOUT.layer_block_bytes()];
    read.copy_to(&mut both);
    assert_eq!(both, [key, value].concat());
    for (layer, block) in [(0, 3), (1, 2), (1, 4), (0, 0)] {
        let other = kv.pin(layer, block);
        assert!(other.key().iter().chain(other.value()).all(|byte| *byte == 0));
    }
}

#[test]
fn prefaulting_touches_all_and_changes_nothing() {
    for mut kv in [cache(), KvCache::shared(LAYOUT, 5).unwrap()] {
        let part = vec![7; LAYOUT.part_bytes()];
        let mut writer = kv.write_handle(1).unwrap();
        writer.write(1, &part, &part).unwrap();
        writer.seal();
        let n_bytes = kv.prefault().run().unwrap();
        assert_eq!(n_bytes, kv.memory.geometry.n_bytes);
        if let Some(share) = kv.share() {
            let file = std::fs::File::from(share.as_fd().try_clone_to_owned().unwrap());
            let n_sectors = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
            assert!(n_sectors * 512 >= n_bytes as u64, "{n_sectors} sectors");
        }
        assert_eq!(kv.pin(1, 1).value(), part);
        assert!(kv.pin(0, 1).value().iter().all(|&byte| byte == 0));
        let prefault = kv.prefault();
        drop(kv);
        assert_eq!(prefault.run().unwrap(), 0, "of a cache that has gone");
    }
}

#[test]
fn pins_count_clones_over_layers_and_outlive_the_cache() {
    let mut kv = cache();
    let a = kv.pin(0, 2);
    let b = kv.pin(1, 2);
    let c = b.clone();
    drop(a);
    assert!(kv.is_pinned(2));
    drop(b);
    assert!(kv.is_pinned(2) && !kv.is_pinned(1));
    std::thread::spawn(move || drop(c)).join().unwrap();
    assert!(!kv.is_pinned(2));
    let last = kv.pin(0, 0);
    drop(kv);
    assert!(last.key().iter().all(|byte| *byte == 0));
}

#[test]
fn writers_are_unique_and_exclude_pins() {
    let mut kv = cache();
    let writer = kv.write_handle(1).unwrap();
    assert!(kv.is_writing(1));
    assert!(matches!(
        kv.write_handle(1),
        Err(KernelError::BlockBusy {
            block: 1,
            state: "being written"
        })
    ));
    assert!(panics(|| drop(kv.pin(0, 1))));
    drop(writer);
    assert!(!kv.is_writing(1));
    let pin = kv.pin(0, 1);
    assert!(matches!(
        kv.write_handle(1),
        Err(KernelError::BlockBusy {
            block: 1,
            state: "pinned"
        })
    ));
    // A reservation that fails leaves nothing behind.
    assert!(kv.reserve_write(&[0, 2, 1]).is_err());
    assert!(!kv.is_writing(0) && !kv.is_writing(2));
    drop(pin);
    assert_eq!(kv.reserve_write(&[0, 2, 1]).unwrap().len(), 3);
    assert!(matches!(
        kv.write_handle(5),
        Err(KernelError::BlockOutOfRange { block: 5, n_blocks: 5 })
    ));
}

#[test]
fn writes_of_the_wrong_size_or_layer_are_refused() {
    let mut kv = cache();
    let part = vec![1; LAYOUT.part_bytes()];
    let mut writer = kv.write_handle(0).unwrap();
    let error = writer.write(0, &part, &part[1..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "value of block 0, layer 0: expected 96 bytes, found 95"
    );
    assert!(matches!(
        writer.write(2, &part, &part),
        Err(KernelError::LayerOutOfRange { layer: 2, .. })
    ));
    writer.seal();
    assert!(kv.pin(0, 0).key().iter().all(|byte| *byte == 0));
}

#[test]
fn the_forward_pass_is_kept_off_pinned_and_unfinished_blocks() {
    let mut kv = cache();
    let refused = |kv: &mut KvCache, layer, block| {
        panics(|| {
            kv.append_block(layer, block);
        })
    };
    let pin = kv.pin(0, 0);
    kv.begin_append();
    assert!(refused(&mut kv, 0, 0));
    // Another layer of a pinned block may still be appended to: that is layer-wise transfer.
    kv.append_block(1, 0);
    assert!(refused(&mut kv, 1, 0), "two appends to one block in one batch");
    drop(pin);
    kv.begin_append();
    kv.append_block(0, 0);
    let writer = kv.write_handle(1).unwrap();
    assert!(refused(&mut kv, 0, 1));
    assert!(panics(|| kv.assert_readable(0, &[0, 1])));
    drop(writer);
    kv.assert_readable(0, &[0, 1]);
}

#[test]
fn copy_block_copies_every_layer_and_respects_pins() {
    let mut kv = cache();
    let part = LAYOUT.part_bytes();
    let mut writer = kv.write_handle(0).unwrap();
    writer.write(0, &vec![1; part], &vec![2; part]).unwrap();
    writer.write(1, &vec![3; part], &vec![4; part]).unwrap();
    assert!(kv.copy_block(0, 4).is_err());
    writer.seal();
    kv.copy_block(0, 4).unwrap();
    let bytes: Vec<u8> = (0..2)
        .flat_map(|layer| [kv.pin(layer, 4).key()[0], kv.pin(layer, 4).value()[part - 1]])
        .collect();
    assert_eq!(bytes, [1, 2, 3, 4]);
    let _pin = kv.pin(1, 4);
    assert!(matches!(
        kv.copy_block(0, 4),
        Err(KernelError::BlockBusy {
            block: 4,
            state: "pinned"
        })
    ));
}

#[test]
fn unsupported_layouts_are_refused() {
    for layout in [
        KvLayout {
            dtype: DType::F16,
            ..LAYOUT
        },
        KvLayout { head_dim: 5, ..LAYOUT },
        KvLayout { n_layers: 0, ..LAYOUT },
    ] {
        assert!(matches!(KvCache::new(layout, 1), Err(KernelError::Layout { .. })));
    }
    assert!(KvCache::new(LAYOUT, 0).is_err());
    assert!(KvCache::new(LAYOUT, usize::MAX / 1000).is_err());
}

/// What another process would map: a second mapping of the same file.
fn foreign(kv: &KvCache) -> ForeignKv {
    let file = kv.share().unwrap().as_fd().try_clone_to_owned().unwrap();
    ForeignKv::map(&file, kv.layout(), kv.n_blocks()).unwrap()
}

fn shared_with_blocks(blocks: &[u32]) -> KvCache {
    let mut kv = KvCache::shared(LAYOUT, 9).unwrap();
    let part = LAYOUT.part_bytes();
    for &block in blocks {
        kv.set_generation(block, 10 + block);
        let mut writer = kv.write_handle(block).unwrap();
        for layer in 0..LAYOUT.n_layers {
            let byte = (block as usize * 4 + layer * 2) as u8;
            writer.write(layer, &vec![byte; part], &vec![byte + 1; part]).unwrap();
        }
    }
    kv
}

proptest! {
    /// Whatever blocks are asked for, in runs or not, each arrives in its own writer.
    #[test]
    fn foreign_blocks_arrive_where_they_should(
        from in Just((0..9u32).collect::<Vec<_>>()).prop_shuffle(),
        to in prop_oneof![Just((0..9u32).collect::<Vec<_>>()), Just((0..9u32).collect::<Vec<_>>()).prop_shuffle()],
        sorted in any::<bool>(),
        n in 1..9usize,
    ) {
        let mut from = from[..n].to_vec();
        if sorted {
            from.sort_unstable();
        }
        let source = shared_with_blocks(&from);
        let foreign = foreign(&source);
        let mut kv = KvCache::new(LAYOUT, 9).unwrap();
        let mut writers = kv.reserve_write(&to[..n]).unwrap();
        let blocks: Vec<(u32, u32)> = from.iter().map(|&block| (block, 10 + block)).collect();
        for layer in 0..LAYOUT.n_layers {
            foreign.copy(layer, &blocks, &mut writers).unwrap();
        }
        drop(writers);
        for (&from, &to) in from.iter().zip(&to) {
            for layer in 0..LAYOUT.n_layers {
                let byte = (from as usize * 4 + layer * 2) as u8;
                let read = kv.pin(layer, to);
                prop_assert!(read.key().iter().all(|&found| found == byte));
                prop_assert!(read.value().iter().all(|&found| found == byte + 1));
            }
        }
        for &other in &to[n..] {
            prop_assert!(kv.pin(0, other).key().iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn a_block_of_another_generation_is_refused() {
    let mut source = shared_with_blocks(&[1, 2]);
    let foreign = foreign(&source);
    let mut kv = cache();
    let mut writers = kv.reserve_write(&[0, 1]).unwrap();
    foreign.copy(0, &[(1, 11), (2, 12)], &mut writers).unwrap();
    assert_eq!(source.pin(0, 2).generation(), 12);
    source.set_generation(2, 13);
    let error = foreign.copy(0, &[(1, 11), (2, 12)], &mut writers).unwrap_err();
    assert_eq!(
        error.to_string(),
        "block 2 of the other process has generation 13, expected 12"
    );
    assert!(matches!(
        foreign.copy(0, &[(1, 11), (9, 0)], &mut writers),
        Err(KernelError::BlockOutOfRange { block: 9, n_blocks: 9 })
    ));
    assert!(foreign.copy(2, &[(1, 11), (2, 13)], &mut writers).is_err());
}

/// A writer that rewrites a block over and over, as no owner of a pinned block would: each copy that succeeds is whole.
#[test]
fn no_copy_succeeds_with_bytes_of_two_generations() {
    const WIDE: KvLayout = KvLayout {
        n_layers: 1,
        n_kv_heads: 8,
        block_size: 16,
        head_dim: 64,
        dtype: DType::Bf16,
    };
    let mut source = KvCache::shared(WIDE, 1).unwrap();
    let foreign = foreign(&source);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut n_whole, mut n_stale) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut generation = 0;
            while !stop.load(Ordering::Relaxed) {
                generation += 1;
                source.set_generation(0, generation);
                let part = vec![generation as u8; WIDE.part_bytes()];
                source.write_handle(0).unwrap().write(0, &part, &part).unwrap();
                // Even ones are stable for a while, so that some copies can succeed.
                if generation.is_multiple_of(2) {
                    std::thread::yield_now();
                }
            }
        });
        let mut kv = KvCache::new(WIDE, 1).unwrap();
        // A generation is announced before its bytes are there, so only those of a copy made later than an equal one count.
        let began = std::time::Instant::now();
        while (n_whole < 200 || n_stale < 200) && began.elapsed().as_secs() < 5 {
            let generation = foreign.generation(0);
            let mut writers = kv.reserve_write(&[0]).unwrap();
            let copied = foreign.copy(0, &[(0, generation)], &mut writers);
            drop(writers);
            match copied {
                Ok(()) => {
                    n_whole += 1;
                    let read = kv.pin(0, 0);
                    // Of this generation, or still of the one before: never of a later one.
                    let (now, before) = (generation as u8, generation.wrapping_sub(1) as u8);
                    let is_fine = |byte: &u8| *byte == now || *byte == before;
                    assert!(
                        read.key().iter().chain(read.value()).all(is_fine),
                        "generation {generation}"
                    );
                }
                Err(KernelError::Stale { .. }) => n_stale += 1,
                Err(error) => panic!("{error}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(n_whole > 0, "{n_whole} whole, {n_stale} stale");
}

#[test]
fn shared_memory_can_be_neither_written_nor_resized_by_who_gets_it() {
    let kv = KvCache::shared(LAYOUT, 2).unwrap();
    let file = std::fs::File::from(kv.share().unwrap().as_fd().try_clone_to_owned().unwrap());
    let n_bytes = file.metadata().unwrap().len();
    assert!(file.set_len(n_bytes / 2).is_err());
    assert!(file.set_len(n_bytes * 2).is_err());
    assert!(std::os::unix::fs::FileExt::write_at(&file, &[1], 0).is_err());
    assert!(MmapOptions::new().map_raw(&file).is_err());
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(&file, punch, 0, n_bytes).is_err());
    assert!(MmapOptions::new().map_raw_read_only(&file).is_ok());
    assert!(cache().share().is_none());
}

#[test]
fn only_files_that_fit_are_mapped() {
    let refusal = |file: OwnedFd, n_blocks| {
        let error = ForeignKv::map(&file, LAYOUT, n_blocks).err().expect("refused");
        error.to_string()
    };
    let kv = KvCache::shared(LAYOUT, 2).unwrap();
    let file = || kv.share().unwrap().as_fd().try_clone_to_owned().unwrap();
    assert!(refusal(file(), 3).contains("expected"));
    let unsealed = rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&unsealed, 1 << 20).unwrap();
    assert!(refusal(unsealed, 2).contains("not sealed"));
    assert!(refusal(tempfile::tempfile().unwrap().into(), 2).contains("cannot map"));
    assert!(ForeignKv::map(&file(), LAYOUT, usize::MAX / 8).is_err());
}
