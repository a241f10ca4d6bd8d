//! Pins, writers and what they keep away from each other.

use super::*;

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
