//! The memory of the KV cache, and the handles through which anything but the forward pass reaches it.
//! Knows which (layer, block) is pinned or being written; who owns a block is the block pool's business.
//!
//! Soundness rests on one rule: pins and writers are *created* only through `&mut KvCache`, and *dropped* anywhere. So a
//! (layer, block) without a pin cannot gain one while the forward pass holds the cache, and the checks below are final.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::error::KernelError;
use crate::layout::{DType, KvLayout};

/// Owner of the KV memory of one process; lives on the step thread.
///
/// Memory is zero and untouched at the start: pages come with their first use.
pub struct KvCache {
    memory: Arc<KvMemory>,
    /// Per block, the append that last touched it: no two sequences of a batch may append to one block.
    append_marks: Vec<u64>,
    append_mark: u64,
}

struct KvMemory {
    map: MmapRaw,
    layout: KvLayout,
    n_blocks: usize,
    /// `[n_layers, n_blocks]`
    layer_pins: Box<[AtomicU32]>,
    /// `[n_blocks]`: the sum over layers, so that asking for a whole block is one load.
    block_pins: Box<[AtomicU32]>,
    /// `[n_blocks]`
    writing: Box<[AtomicBool]>,
}

/// A pin on one (layer, block): its bytes stay as they are while any clone lives. Dropping the last one unpins.
pub struct KvRead {
    memory: Arc<KvMemory>,
    layer: usize,
    block: u32,
}

/// The only writer of one block, over all layers. Dropping it, sealed or not, ends the writing.
pub struct KvWrite {
    memory: Arc<KvMemory>,
    block: u32,
}

impl KvCache {
    /// Maps zeroed memory for `n_blocks` blocks; nothing is touched yet.
    ///
    /// # Errors
    /// An f16 layout, an odd or zero dimension, or no address space.
    pub fn new(layout: KvLayout, n_blocks: usize) -> Result<KvCache, KernelError> {
        let refuse = |reason| Err(KernelError::Layout { layout, reason });
        if layout.dtype == DType::F16 {
            return refuse("f16 is not stored, expected f32 or bf16");
        }
        if layout.n_layers == 0 || layout.n_kv_heads == 0 || layout.block_size == 0 || layout.head_dim == 0 {
            return refuse("every dimension must be at least 1");
        }
        if !layout.head_dim.is_multiple_of(2) {
            return refuse("head_dim must be even");
        }
        if n_blocks == 0 || u32::try_from(n_blocks).is_err() {
            return refuse("the number of blocks must be 1 to 2^32 - 1");
        }
        let Some(bytes) = layout.block_bytes().checked_mul(n_blocks) else {
            return refuse("the cache does not fit the address space");
        };
        let what = "KV cache";
        let map = MmapOptions::new()
            .len(bytes)
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| KernelError::OutOfMemory { what, bytes, error })?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for the KV cache");
        }
        let counters = |n| (0..n).map(|_| AtomicU32::new(0)).collect();
        Ok(KvCache {
            memory: Arc::new(KvMemory {
                map: map.into(),
                layout,
                n_blocks,
                layer_pins: counters(layout.n_layers * n_blocks),
                block_pins: counters(n_blocks),
                writing: (0..n_blocks).map(|_| AtomicBool::new(false)).collect(),
            }),
            append_marks: vec![0; n_blocks],
            append_mark: 0,
        })
    }

    /// Shape of the cache.
    pub fn layout(&self) -> KvLayout {
        self.memory.layout
    }

    /// Blocks of the cache.
    pub fn n_blocks(&self) -> usize {
        self.memory.n_blocks
    }

    /// Pins one (layer, block) so that it can be read anywhere. Panics outside the cache or under a writer.
    pub fn pin(&mut self, layer: usize, block: u32) -> KvRead {
        self.memory.assert_readable(layer, block);
        self.memory.add_pin(layer, block);
        KvRead {
            memory: Arc::clone(&self.memory),
            layer,
            block,
        }
    }

    /// Whether any layer of the block is pinned: such a block must not be given to another sequence yet.
    pub fn is_pinned(&self, block: u32) -> bool {
        self.memory.block_pins[block as usize].load(Ordering::Acquire) > 0
    }

    /// Whether a [`KvWrite`] of the block lives.
    pub fn is_writing(&self, block: u32) -> bool {
        self.memory.writing[block as usize].load(Ordering::Acquire)
    }

    /// The writer of a block.
    ///
    /// # Errors
    /// The block is out of range, pinned, or being written.
    pub fn write_handle(&mut self, block: u32) -> Result<KvWrite, KernelError> {
        self.memory.check_block(block)?;
        if self.is_writing(block) {
            return Err(KernelError::BlockBusy {
                block,
                state: "being written",
            });
        }
        if self.is_pinned(block) {
            return Err(KernelError::BlockBusy { block, state: "pinned" });
        }
        self.memory.writing[block as usize].store(true, Ordering::Relaxed);
        Ok(KvWrite {
            memory: Arc::clone(&self.memory),
            block,
        })
    }

    /// Writers of all the blocks, or of none.
    ///
    /// # Errors
    /// As [`KvCache::write_handle`], for the first block that cannot be written.
    pub fn reserve_write(&mut self, blocks: &[u32]) -> Result<Vec<KvWrite>, KernelError> {
        blocks.iter().map(|block| self.write_handle(*block)).collect()
    }

    /// Copies a whole block, all layers, for copy-on-write.
    ///
    /// # Errors
    /// Out of range, `to` pinned or being written, or `from` being written.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<(), KernelError> {
        self.memory.check_block(from)?;
        if self.is_writing(from) {
            return Err(KernelError::BlockBusy {
                block: from,
                state: "being written",
            });
        }
        let _writer = self.write_handle(to)?;
        if from == to {
            return Ok(());
        }
        let layout = self.memory.layout;
        for layer in 0..layout.n_layers {
            for part in [Part::Key, Part::Value] {
                // SAFETY: both parts lie within the map and differ, as the blocks do; `from` has no writer and `to` no
                // reader, and neither can gain one while we hold `&mut self`.
                unsafe {
                    let source = self.memory.part(layer, from, part);
                    std::ptr::copy_nonoverlapping(source, self.memory.part(layer, to, part), layout.part_bytes());
                }
            }
        }
        Ok(())
    }

    /// Starts an append of the forward pass: blocks given to [`KvCache::append_block`] until the next call must differ.
    pub(crate) fn begin_append(&mut self) {
        self.append_mark += 1;
    }

    /// Pointers to the K and V parts of a block that the forward pass is about to append to.
    ///
    /// Panics if the (layer, block) is pinned, the block has a writer, or another sequence of this append has it.
    pub(crate) fn append_block(&mut self, layer: usize, block: u32) -> (*mut u8, *mut u8) {
        self.memory.assert_readable(layer, block);
        let pins = self.memory.layer_pins[self.memory.pin_index(layer, block)].load(Ordering::Acquire);
        assert!(
            pins == 0,
            "append to layer {layer}, block {block}, which is pinned {pins} times"
        );
        let mark = std::mem::replace(&mut self.append_marks[block as usize], self.append_mark);
        assert!(
            mark != self.append_mark,
            "two sequences of a batch append to block {block}"
        );
        (
            self.memory.part(layer, block, Part::Key),
            self.memory.part(layer, block, Part::Value),
        )
    }

    /// Checks that the forward pass may read these blocks of a layer for as long as it borrows the cache.
    pub(crate) fn assert_readable(&self, layer: usize, blocks: &[u32]) {
        for block in blocks {
            self.memory.assert_readable(layer, *block);
        }
    }

    /// Where a layer's K and V parts start; block `b` is `b * part_bytes` further.
    pub(crate) fn layer_base(&self, layer: usize) -> (*const u8, *const u8) {
        (
            self.memory.part(layer, 0, Part::Key),
            self.memory.part(layer, 0, Part::Value),
        )
    }
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
        let (key, value) = out.split_at_mut(self.memory.layout.part_bytes());
        key.copy_from_slice(self.key());
        value.copy_from_slice(self.value());
    }

    fn bytes(&self, part: Part) -> &[u8] {
        let bytes = self.memory.layout.part_bytes();
        // SAFETY: within the map, which the Arc keeps; nobody writes a pinned (layer, block): appends and copies assert
        // its pins, and a writer is refused while any layer is pinned.
        unsafe { std::slice::from_raw_parts(self.memory.part(self.layer, self.block, part), bytes) }
    }
}

impl Clone for KvRead {
    fn clone(&self) -> KvRead {
        self.memory.add_pin(self.layer, self.block);
        KvRead {
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

    /// Writes both parts of one layer.
    ///
    /// # Errors
    /// A layer out of range, or parts that are not exactly `part_bytes` long; nothing is written then.
    pub fn write(&mut self, layer: usize, key: &[u8], value: &[u8]) -> Result<(), KernelError> {
        let layout = self.memory.layout;
        if layer >= layout.n_layers {
            return Err(KernelError::LayerOutOfRange {
                layer,
                n_layers: layout.n_layers,
            });
        }
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

    /// Ends the writing: from now on the block can be read, appended to and pinned.
    pub fn seal(self) {}
}

impl Drop for KvWrite {
    fn drop(&mut self) {
        self.memory.writing[self.block as usize].store(false, Ordering::Release);
    }
}

#[derive(Clone, Copy)]
enum Part {
    Key,
    Value,
}

impl KvMemory {
    /// Start of a part; in range because every caller has checked layer and block, which is asserted again here.
    fn part(&self, layer: usize, block: u32, part: Part) -> *mut u8 {
        assert!(
            layer < self.layout.n_layers && (block as usize) < self.n_blocks,
            "layer {layer}, block {block}"
        );
        let plane = 2 * layer + matches!(part, Part::Value) as usize;
        let offset = (plane * self.n_blocks + block as usize) * self.layout.part_bytes();
        self.map.as_mut_ptr().wrapping_add(offset)
    }

    fn pin_index(&self, layer: usize, block: u32) -> usize {
        layer * self.n_blocks + block as usize
    }

    fn add_pin(&self, layer: usize, block: u32) {
        self.block_pins[block as usize].fetch_add(1, Ordering::Relaxed);
        let before = self.layer_pins[self.pin_index(layer, block)].fetch_add(1, Ordering::Relaxed);
        assert!(
            before < u32::MAX / 2,
            "layer {layer}, block {block} is pinned {before} times"
        );
    }

    fn check_block(&self, block: u32) -> Result<(), KernelError> {
        if (block as usize) < self.n_blocks {
            Ok(())
        } else {
            Err(KernelError::BlockOutOfRange {
                block,
                n_blocks: self.n_blocks,
            })
        }
    }

    fn assert_readable(&self, layer: usize, block: u32) {
        assert!(
            layer < self.layout.n_layers && (block as usize) < self.n_blocks,
            "layer {layer}, block {block} is outside a cache of {} layers and {} blocks",
            self.layout.n_layers,
            self.n_blocks
        );
        let writing = self.writing[block as usize].load(Ordering::Acquire);
        assert!(
            !writing,
            "layer {layer}, block {block} is used while it is being written"
        );
    }
}

#[cfg(test)]
mod tests;
