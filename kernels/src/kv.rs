//! The memory of the KV cache, and the handles through which anything but the forward pass reaches it.
//! Knows which (layer, block) is pinned or being written; who owns a block is the block pool's business.
//!
//! Soundness rests on one rule: pins and writers are *created* only through `&mut KvCache`, and *dropped* anywhere. So a
//! (layer, block) without a pin cannot gain one while the forward pass holds the cache, and the checks below are final.

mod foreign;
mod handles;
mod memory;
mod prefault;
mod staged;

use std::cell::RefCell;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use memory::{Geometry, KvMemory, Part};

pub use foreign::{ForeignKv, KvShare};
use handles::Staged;
pub use handles::{KvBytes, KvRead, KvWrite};
pub use prefault::KvPrefault;
pub use staged::{ForeignStaging, KvStaging, StagedPlace, StagingGeometry};

use crate::cuda::{DeviceKv, Fence};
use crate::error::KernelError;
use crate::layout::KvLayout;

/// Owner of the KV memory of one process; lives on the step thread.
///
/// Memory is zero and untouched at the start: pages come with their first use, or before it by [`KvCache::prefault`].
pub struct KvCache {
    memory: Arc<KvMemory>,
    /// Per block, the append that last touched it: no two sequences of a batch may append to one block.
    append_marks: Vec<u64>,
    append_mark: u64,
    /// Of a device: behind everything it has been given, until it is given more.
    fence: RefCell<Option<Fence>>,
}

impl KvCache {
    /// Maps zeroed memory for `n_blocks` blocks; nothing is touched yet.
    ///
    /// # Errors
    /// An f16 layout, an odd or zero dimension, or no address space.
    pub fn new(layout: KvLayout, n_blocks: usize) -> Result<KvCache, KernelError> {
        Ok(KvCache::over(KvMemory::anonymous(Geometry::new(layout, n_blocks)?)?))
    }

    /// As [`KvCache::new`], in memory that other processes of this host can be given to read ([`KvCache::share`]).
    ///
    /// # Errors
    /// As [`KvCache::new`], or a system without sealed memory files.
    pub fn shared(layout: KvLayout, n_blocks: usize) -> Result<KvCache, KernelError> {
        Ok(KvCache::over(KvMemory::shared(Geometry::new(layout, n_blocks)?)?))
    }

    /// The same in memory of a device.
    pub(crate) fn on_device(layout: KvLayout, n_blocks: usize, planes: DeviceKv) -> Result<KvCache, KernelError> {
        let geometry = Geometry::new(layout, n_blocks)?;
        Ok(KvCache::over(KvMemory::on_device(geometry, planes)?))
    }

    fn over(memory: KvMemory) -> KvCache {
        KvCache {
            append_marks: vec![0; memory.geometry.n_blocks],
            append_mark: 0,
            fence: RefCell::new(None),
            memory: Arc::new(memory),
        }
    }

    /// The right to let other processes read; `None` of a cache that is this process's alone.
    pub fn share(&self) -> Option<KvShare> {
        let memory = Arc::clone(&self.memory);
        memory.file.as_ref()?;
        let card = match memory.device().map(DeviceKv::handle).transpose() {
            Ok(card) => card,
            Err(error) => {
                tracing::info!(%error, "other processes cannot read this KV memory in place");
                None
            }
        };
        let share = KvShare { memory, card };
        let is_readable = !share.is_on_card() || share.card.is_some() || share.staging().is_some();
        is_readable.then_some(share)
    }

    /// The way to have all pages before they are needed.
    pub fn prefault(&self) -> KvPrefault {
        KvPrefault::of(&self.memory)
    }

    /// Says that what the block holds from here on is another's: must be called before anything is written for it, so
    /// that readers of shared memory see that the block is not what they mean ([`ForeignKv::copy`]).
    pub fn set_generation(&mut self, block: u32, generation: u32) {
        self.memory.generation(block).store(generation, Ordering::Relaxed);
        // No later write of the block comes before it.
        fence(Ordering::SeqCst);
    }

    /// Shape of the cache.
    pub fn layout(&self) -> KvLayout {
        self.memory.geometry.layout
    }

    /// Blocks of the cache.
    pub fn n_blocks(&self) -> usize {
        self.memory.geometry.n_blocks
    }

    /// Pins one (layer, block) so that it can be read anywhere. Panics outside the cache or under a writer.
    pub fn pin(&mut self, layer: usize, block: u32) -> KvRead {
        self.memory.assert_readable(layer, block);
        self.memory.add_pin(layer, block);
        let on_device = self.current_fence().map(|fence| Staged {
            fence,
            bytes: OnceLock::new(),
        });
        KvRead {
            memory: Arc::clone(&self.memory),
            layer,
            block,
            on_device,
        }
    }

    /// Behind everything that the device has been given; `None` on the host, where what was called is done.
    fn current_fence(&self) -> Option<Fence> {
        let device = self.memory.device()?;
        let mut fence = self.fence.borrow_mut();
        Some(fence.get_or_insert_with(|| device.fence()).clone())
    }

    /// Says that the device is about to be given work on blocks.
    pub(crate) fn queue_work(&self) {
        *self.fence.borrow_mut() = None;
    }

    /// Device addresses of a layer's K and V parts of block 0; block `b` is `b * part_bytes` further. `None` on the host.
    pub(crate) fn layer_addresses(&self, layer: usize) -> Option<(u64, u64)> {
        let device = self.memory.device()?;
        let at = |part| device.address(self.memory.geometry.plane_offset(layer, 0, part));
        Some((at(Part::Key), at(Part::Value)))
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
        self.memory.geometry.check_block(block)?;
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
            fence: self.current_fence(),
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
        self.memory.geometry.check_block(from)?;
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
        let layout = self.memory.geometry.layout;
        let parts = (0..layout.n_layers).flat_map(|layer| [(layer, Part::Key), (layer, Part::Value)]);
        if let Some(device) = self.memory.device() {
            self.queue_work();
            let offset = |layer, block, part| self.memory.geometry.plane_offset(layer, block, part);
            let parts = parts.map(|(layer, part)| (offset(layer, from, part), offset(layer, to, part)));
            device.copy_parts(parts, layout.part_bytes());
            return Ok(());
        }
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
    /// Panics if [`KvCache::claim_append`] does, or on a device.
    pub(crate) fn append_block(&mut self, layer: usize, block: u32) -> (*mut u8, *mut u8) {
        self.claim_append(layer, block);
        (
            self.memory.part(layer, block, Part::Key),
            self.memory.part(layer, block, Part::Value),
        )
    }

    /// Panics if the (layer, block) is pinned, the block has a writer, or another sequence of this append has it.
    pub(crate) fn claim_append(&mut self, layer: usize, block: u32) {
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
    }

    /// As [`KvCache::claim_append`], of every layer at once.
    pub(crate) fn claim_append_in_all_layers(&mut self, block: u32) {
        if self.is_pinned(block) {
            for layer in 0..self.layout().n_layers {
                let pins = self.memory.layer_pins[self.memory.pin_index(layer, block)].load(Ordering::Acquire);
                assert!(
                    pins == 0,
                    "append to layer {layer}, block {block}, which is pinned {pins} times"
                );
            }
        }
        self.claim_append(0, block);
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

#[cfg(test)]
mod tests;
