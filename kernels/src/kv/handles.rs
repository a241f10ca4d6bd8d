//! Pins and writers: what code outside the forward pass holds of the KV memory. Who may make them is `KvCache`'s business.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::StagedPlace;
use super::memory::{KvMemory, Part};
use crate::cuda::{Fence, Gathered, Lent};
use crate::error::KernelError;

/// A pin on one (layer, block): its bytes stay as they are while any clone lives. Dropping the last one unpins.
pub struct KvRead {
    pub(super) memory: Arc<KvMemory>,
    pub(super) layer: usize,
    pub(super) block: u32,
    pub(super) on_device: Option<Staged>,
}

/// What a pin needs beyond the mapping where the block is on a device.
pub(super) struct Staged {
    /// Behind what has written the block.
    pub(super) fence: Fence,
    /// K then V, fetched when they are first asked for.
    pub(super) bytes: OnceLock<Box<[u8]>>,
}

/// The only writer of one block, over all layers. Dropping it, sealed or not, ends the writing.
pub struct KvWrite {
    pub(super) memory: Arc<KvMemory>,
    pub(super) block: u32,
    /// Behind what has read the block, where it is on a device.
    pub(super) fence: Option<Fence>,
}

impl KvRead {
    /// The layer pinned.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The block pinned.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// The block's generation, which stays while it is pinned.
    pub fn generation(&self) -> u32 {
        self.memory.generation(self.block).load(Ordering::Relaxed)
    }

    /// Bytes of K and V.
    pub fn n_bytes(&self) -> usize {
        self.memory.geometry.layout.layer_block_bytes()
    }

    /// Whether reading waits for a device.
    pub fn is_on_device(&self) -> bool {
        self.on_device.is_some()
    }

    /// The K part, `[n_kv_heads, block_size, head_dim]`.
    pub fn key(&self) -> &[u8] {
        self.bytes(Part::Key)
    }

    /// The V part, `[n_kv_heads, block_size, head_dim]`.
    pub fn value(&self) -> &[u8] {
        self.bytes(Part::Value)
    }

    /// Copies K then V. Panics unless `out` holds exactly `layer_block_bytes`.
    pub fn copy_to(&self, out: &mut [u8]) {
        let (key, value) = out.split_at_mut(self.memory.geometry.layout.part_bytes());
        key.copy_from_slice(self.key());
        value.copy_from_slice(self.value());
    }

    fn bytes(&self, part: Part) -> &[u8] {
        let bytes = self.memory.geometry.layout.part_bytes();
        if let Some(staged) = &self.on_device {
            let (key, value) = self.fetch(staged).split_at(bytes);
            return match part {
                Part::Key => key,
                Part::Value => value,
            };
        }
        // SAFETY: within the map, which the Arc keeps; nobody writes a pinned (layer, block): appends and copies assert
        // its pins, and a writer is refused while any layer is pinned.
        unsafe { std::slice::from_raw_parts(self.memory.part(self.layer, self.block, part), bytes) }
    }
}

impl KvRead {
    /// K and V on the host; a failure of the device ends the thread, as there is nothing left to serve from.
    fn fetch<'a>(&self, staged: &'a Staged) -> &'a [u8] {
        staged.bytes.get_or_init(|| {
            let device = self.memory.device().expect("only blocks of a device are staged");
            match device.gather(self.layer, &[self.block], &[&staged.fence]) {
                Gathered::Pinned(lent) => lent.as_ref().into(),
                Gathered::Copied(bytes) => bytes.into(),
            }
        })
    }

    /// K of all the blocks, then V of all, in their order: what a frame carries. Of one layer; on a device it is one copy,
    /// which waits for what has written the blocks.
    ///
    /// # Panics
    /// If there are none, or blocks of a device are of several caches or layers.
    pub fn gather(reads: &[KvRead]) -> KvBytes {
        let first = reads.first().expect("a frame has blocks");
        let Some(device) = first.memory.device() else {
            let mut bytes = Vec::with_capacity(reads.iter().map(KvRead::n_bytes).sum());
            reads.iter().for_each(|read| bytes.extend_from_slice(read.key()));
            reads.iter().for_each(|read| bytes.extend_from_slice(read.value()));
            return KvBytes(Bytes::Heap(bytes));
        };
        let blocks = KvRead::blocks_of_one_layer(reads);
        KvBytes(match device.gather(first.layer, &blocks, &KvRead::fences(reads)) {
            Gathered::Pinned(lent) => Bytes::Pinned(lent),
            Gathered::Copied(bytes) => Bytes::Heap(bytes),
        })
    }

    /// Waits until what has written the blocks is done, where they are on a device: from then on another process may read
    /// them.
    pub fn await_written(reads: &[KvRead]) {
        KvRead::fences(reads).into_iter().for_each(Fence::wait);
    }

    /// The blocks, which must be of one layer of one cache.
    fn blocks_of_one_layer(reads: &[KvRead]) -> Vec<u32> {
        let first = &reads[0];
        let is_like_first = |read: &KvRead| Arc::ptr_eq(&read.memory, &first.memory) && read.layer == first.layer;
        assert!(reads.iter().all(is_like_first), "blocks of one layer of one cache");
        reads.iter().map(KvRead::block).collect()
    }

    fn fences(reads: &[KvRead]) -> Vec<&Fence> {
        let staged = reads.iter().filter_map(|read| read.on_device.as_ref());
        Fence::distinct(staged.map(|staged| &staged.fence))
    }
}

/// Bytes of blocks, as a frame carries them; of a device's blocks in memory that the device has written itself.
pub struct KvBytes(Bytes);

enum Bytes {
    Heap(Vec<u8>),
    Pinned(Lent),
}

impl KvBytes {
    /// Where other processes find the bytes for as long as this lives, if they may read them there.
    pub fn place(&self) -> Option<StagedPlace> {
        match &self.0 {
            Bytes::Heap(_) => None,
            Bytes::Pinned(lent) => lent.place(),
        }
    }
}

impl AsRef<[u8]> for KvBytes {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Heap(bytes) => bytes,
            Bytes::Pinned(lent) => lent.as_ref(),
        }
    }
}

impl Clone for KvRead {
    fn clone(&self) -> KvRead {
        self.memory.add_pin(self.layer, self.block);
        let on_device = self.on_device.as_ref().map(|staged| Staged {
            fence: staged.fence.clone(),
            bytes: OnceLock::new(),
        });
        KvRead {
            on_device,
            memory: Arc::clone(&self.memory),
            layer: self.layer,
            block: self.block,
        }
    }
}

impl Drop for KvRead {
    fn drop(&mut self) {
        // The layer first: a block seen as unpinned has no pinned layer. Release: our reads end before the next write.
        let index = self.memory.pin_index(self.layer, self.block);
        self.memory.layer_pins[index].fetch_sub(1, Ordering::Release);
        self.memory.block_pins[self.block as usize].fetch_sub(1, Ordering::Release);
    }
}

impl KvWrite {
    /// The block being written.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Whether writing waits for a device.
    pub fn is_on_device(&self) -> bool {
        self.fence.is_some()
    }

    /// Writes both parts of one layer.
    ///
    /// # Errors
    /// A layer out of range, or parts that are not exactly `part_bytes` long; nothing is written then.
    pub fn write(&mut self, layer: usize, key: &[u8], value: &[u8]) -> Result<(), KernelError> {
        let layout = self.memory.geometry.layout;
        self.memory.geometry.check_layer(layer)?;
        let expected = layout.part_bytes();
        for (part, bytes) in [("key", key), ("value", value)] {
            if bytes.len() != expected {
                return Err(KernelError::PartBytes {
                    part,
                    block: self.block,
                    layer,
                    expected,
                    found: bytes.len(),
                });
            }
        }
        if let (Some(device), Some(fence)) = (self.memory.device(), &self.fence) {
            device.scatter(layer, &[self.block], &[fence], |_, staged| {
                staged[..expected].copy_from_slice(key);
                staged[expected..].copy_from_slice(value);
            });
            return Ok(());
        }
        for (part, bytes) in [(Part::Key, key), (Part::Value, value)] {
            // SAFETY: within the map, which the Arc keeps. This handle is the block's only writer, and `writing`, set until
            // it drops, keeps every reader and append away.
            unsafe {
                let target = self.memory.part(layer, self.block, part);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, expected);
            }
        }
        Ok(())
    }

    /// Writes one layer of all the blocks from K of all, then V of all, in their order: what a frame carries. Into a device
    /// it is one copy, which waits for what has read the blocks.
    ///
    /// # Errors
    /// A layer out of range, or another number of bytes; nothing is written then.
    ///
    /// # Panics
    /// If blocks of a device are of several caches.
    pub fn scatter(writers: &mut [KvWrite], layer: usize, data: &[u8]) -> Result<(), KernelError> {
        let Some(first) = writers.first() else { return Ok(()) };
        let memory = Arc::clone(&first.memory);
        let part_bytes = memory.geometry.layout.part_bytes();
        let (n_writers, n_part_bytes) = (writers.len(), writers.len() * part_bytes);
        if data.len() != 2 * n_part_bytes {
            return Err(KernelError::PartBytes {
                part: "key and value",
                block: first.block,
                layer,
                expected: 2 * n_part_bytes,
                found: data.len(),
            });
        }
        let (keys, values) = data.split_at(n_part_bytes);
        let Some(device) = memory.device() else {
            let parts = keys.chunks_exact(part_bytes).zip(values.chunks_exact(part_bytes));
            return writers
                .iter_mut()
                .zip(parts)
                .try_for_each(|(writer, (key, value))| writer.write(layer, key, value));
        };
        memory.geometry.check_layer(layer)?;
        let blocks = KvWrite::blocks_of_one_cache(writers);
        device.scatter(layer, &blocks, &KvWrite::fences(writers), |listed, staged| {
            assert!(listed.end <= n_writers, "of the blocks listed");
            let bytes = listed.start * part_bytes..listed.end * part_bytes;
            let (key, value) = staged.split_at_mut(bytes.len());
            key.copy_from_slice(&keys[bytes.clone()]);
            value.copy_from_slice(&values[bytes]);
        });
        Ok(())
    }

    /// Writes one layer of all the blocks from as many pinned ones, in their order; within one card without the host.
    ///
    /// # Errors
    /// A layer out of range, or blocks of another size.
    ///
    /// # Panics
    /// Unless there is a read for each writer, and if blocks of a device are of several caches or layers.
    pub fn copy_from(writers: &mut [KvWrite], layer: usize, reads: &[KvRead]) -> Result<(), KernelError> {
        assert_eq!(writers.len(), reads.len(), "each block has its writer");
        let (Some(writer), Some(read)) = (writers.first(), reads.first()) else {
            return Ok(());
        };
        let (to, from) = (Arc::clone(&writer.memory), &read.memory);
        match (to.device(), from.device()) {
            (Some(device), Some(source)) if device.reaches(source) && to.geometry.layout == from.geometry.layout => {
                to.geometry.check_layer(layer)?;
                let from_blocks = KvRead::blocks_of_one_layer(reads);
                let pairs = from_blocks.into_iter().zip(KvWrite::blocks_of_one_cache(writers));
                let pairs: Vec<[u32; 2]> = pairs.map(|(from, to)| [from, to]).collect();
                let fences = KvRead::fences(reads).into_iter().chain(KvWrite::fences(writers));
                // SAFETY: a cache of this process and card with the same layout, whose pins we hold until it is done.
                unsafe { device.take(source.planes(), [read.layer, layer], &pairs, &Fence::distinct(fences)) };
                Ok(())
            }
            (None, None) => writers
                .iter_mut()
                .zip(reads)
                .try_for_each(|(writer, read)| writer.write(layer, read.key(), read.value())),
            _ => KvWrite::scatter(writers, layer, KvRead::gather(reads).as_ref()),
        }
    }

    /// The blocks, which must be of one cache.
    pub(super) fn blocks_of_one_cache(writers: &[KvWrite]) -> Vec<u32> {
        let is_like_first = |writer: &KvWrite| Arc::ptr_eq(&writer.memory, &writers[0].memory);
        assert!(writers.iter().all(is_like_first), "blocks of one cache");
        writers.iter().map(KvWrite::block).collect()
    }

    pub(super) fn fences(writers: &[KvWrite]) -> Vec<&Fence> {
        Fence::distinct(writers.iter().filter_map(|writer| writer.fence.as_ref()))
    }

    /// Ends the writing: from now on the block can be read, appended to and pinned.
    pub fn seal(self) {}
}

impl Drop for KvWrite {
    fn drop(&mut self) {
        self.memory.writing[self.block as usize].store(false, Ordering::Release);
    }
}
