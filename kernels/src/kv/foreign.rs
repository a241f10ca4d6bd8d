//! The KV memory of another process of this host, read in place. Whoever reads says which generation of a block is meant,
//! and hears afterwards whether that is what was read; that the other process keeps the block meanwhile is its promise.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use memmap2::MmapRaw;

use super::memory::{Geometry, KvMemory, Part};
use super::{KvStaging, KvWrite};
use crate::cuda::{CudaMemoryHandle, ForeignPlanes};
use crate::error::KernelError;
use crate::layout::KvLayout;
use crate::sealed_memory::{self, copy_changing};

/// The right to let other processes read a [`KvCache`](super::KvCache). Keeps its memory alive.
#[derive(Clone)]
pub struct KvShare {
    pub(super) memory: Arc<KvMemory>,
    pub(super) card: Option<CudaMemoryHandle>,
}

impl KvShare {
    /// Shape of the cache.
    pub fn layout(&self) -> KvLayout {
        self.memory.geometry.layout
    }

    /// Blocks of the cache.
    pub fn n_blocks(&self) -> usize {
        self.memory.geometry.n_blocks
    }

    /// Whether a card has the blocks; then the file has their generations alone.
    pub fn is_on_card(&self) -> bool {
        self.memory.device().is_some()
    }

    /// The name of the blocks' memory, where a card has them and others may map it.
    pub fn card(&self) -> Option<&CudaMemoryHandle> {
        self.card.as_ref()
    }

    /// The host's memory through which blocks leave a card, where others may map that.
    pub fn staging(&self) -> Option<KvStaging<'_>> {
        let memory = self.memory.device()?.staging()?;
        Some(KvStaging {
            file: memory.file(),
            geometry: memory.geometry(),
        })
    }
}

impl AsFd for KvShare {
    /// The sealed file: whoever gets it can map it for reading, and neither write nor resize it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.file.as_ref().expect("only shared memory is shared").as_fd()
    }
}

/// Blocks of another process's [`KvCache`](super::KvCache), mapped for reading.
pub struct ForeignKv {
    map: MmapRaw,
    geometry: Geometry,
    /// Where the blocks are, unless they are in the map.
    card: Option<ForeignPlanes>,
}

impl ForeignKv {
    /// Maps what a [`KvShare`] of `layout` and `n_blocks` has given.
    ///
    /// # Errors
    /// A file that may shrink under its reader or has another size, or no address space.
    pub fn map(file: &OwnedFd, layout: KvLayout, n_blocks: usize) -> Result<ForeignKv, KernelError> {
        let geometry = Geometry::new(layout, n_blocks)?;
        Ok(ForeignKv {
            map: sealed_memory::map(file, geometry.n_bytes)?,
            geometry,
            card: None,
        })
    }

    /// Maps what a [`KvShare`] of a card's memory has given, for copies into the cache of `near`.
    ///
    /// # Errors
    /// As [`ForeignKv::map`]; `near` is not of a card, or of another one; or its process has gone.
    pub fn map_on_card(
        file: &OwnedFd,
        layout: KvLayout,
        n_blocks: usize,
        handle: &CudaMemoryHandle,
        near: &KvShare,
    ) -> Result<ForeignKv, KernelError> {
        let geometry = Geometry::new(layout, n_blocks)?;
        let Some(device) = near.memory.device() else {
            return Err(KernelError::Foreign {
                error: io::Error::other("it is on a card, ours is on the host"),
            });
        };
        Ok(ForeignKv {
            map: sealed_memory::map(file, geometry.generation_bytes())?,
            geometry,
            card: Some(device.open(handle, n_blocks)?),
        })
    }

    /// Whether a card has the blocks.
    pub fn is_on_card(&self) -> bool {
        self.card.is_some()
    }

    /// Shape of the cache.
    pub fn layout(&self) -> KvLayout {
        self.geometry.layout
    }

    /// Copies `(block, generation)` pairs of one layer into `writers`, in order.
    ///
    /// The bytes are meant only if this succeeds: as with a seqlock, a block is copied first and its generation looked at
    /// again afterwards. The owner stores a new generation and then, behind a fence, the new bytes; we load bytes, and then,
    /// behind a fence, the generation. So if we have loaded any new byte, we load the new generation too.
    ///
    /// # Errors
    /// A block outside the cache, or one whose generation is another, before or after the copy.
    ///
    /// # Panics
    /// Unless there is one writer for each block, of the same layout.
    pub fn copy(&self, layer: usize, blocks: &[(u32, u32)], writers: &mut [KvWrite]) -> Result<(), KernelError> {
        assert_eq!(blocks.len(), writers.len(), "each block has its writer");
        self.geometry.check_layer(layer)?;
        for (&(block, _), writer) in blocks.iter().zip(&*writers) {
            self.geometry.check_block(block)?;
            assert_eq!(
                writer.memory.geometry.layout, self.geometry.layout,
                "layouts are compared before"
            );
        }
        self.check(blocks)?;
        let to = writers.first().map(|writer| Arc::clone(&writer.memory));
        let device = to.as_ref().and_then(|memory| memory.device());
        if let Some(card) = &self.card {
            let device = device.expect("opened for a cache of this card");
            let pairs = blocks.iter().zip(KvWrite::blocks_of_one_cache(writers));
            let pairs: Vec<[u32; 2]> = pairs.map(|(&(from, _), to)| [from, to]).collect();
            // SAFETY: mapped on this card for as long as we live, with as many blocks of this layout. What the owner does to
            // them meanwhile, the check of the generations then tells; the copy is through by then.
            unsafe { device.take(card.planes(), [layer, layer], &pairs, &KvWrite::fences(writers)) };
        } else if let Some(device) = device {
            let to_blocks = KvWrite::blocks_of_one_cache(writers);
            device.scatter(layer, &to_blocks, &KvWrite::fences(writers), |listed, staged| {
                self.stage(layer, &blocks[listed], staged);
            });
        } else {
            for part in [Part::Key, Part::Value] {
                self.copy_parts(layer, part, blocks, writers);
            }
        }
        // Full: the loads of a string copy are not promised to precede a later load otherwise.
        fence(Ordering::SeqCst);
        self.check(blocks)
    }

    /// Copies one part of each block; runs of neighbours at both ends go at once.
    fn copy_parts(&self, layer: usize, part: Part, blocks: &[(u32, u32)], writers: &mut [KvWrite]) {
        let part_bytes = self.geometry.layout.part_bytes();
        let mut first = 0;
        while first < blocks.len() {
            let follows = |idx: &usize| {
                let n = (*idx - first) as u32;
                blocks[*idx].0.checked_sub(n) == Some(blocks[first].0)
                    && writers[*idx].block.checked_sub(n) == Some(writers[first].block)
                    && Arc::ptr_eq(&writers[*idx].memory, &writers[first].memory)
            };
            let n = 1 + (first + 1..blocks.len()).take_while(follows).count();
            let last = first + n - 1;
            let source = self
                .map
                .as_ptr()
                .wrapping_add(self.geometry.part_at(layer, blocks[first].0, part));
            // Asserts that the last block is within the mapping too.
            self.geometry.part_at(layer, blocks[last].0, part);
            let writer = &writers[first];
            let target = writer.memory.part(layer, writer.block, part);
            // SAFETY: parts of neighbouring blocks are neighbours, so `n` of them lie within either mapping. The target is
            // ours: the handles of the run are its blocks' only writers. The source may change while it is read, which the
            // copy allows, and the caller's check of the generations then tells.
            unsafe { copy_changing(source, target, n * part_bytes) };
            first += n;
        }
    }

    /// Copies K of all the blocks, then V of all, to where a device fetches them.
    fn stage(&self, layer: usize, blocks: &[(u32, u32)], staged: &mut [u8]) {
        let part_bytes = self.geometry.layout.part_bytes();
        let parts = [Part::Key, Part::Value].into_iter();
        let parts = parts.flat_map(|part| blocks.iter().map(move |&(block, _)| (block, part)));
        for ((block, part), staged) in parts.zip(staged.chunks_exact_mut(part_bytes)) {
            let source = self
                .map
                .as_ptr()
                .wrapping_add(self.geometry.part_at(layer, block, part));
            // SAFETY: a part lies within the mapping, and the chunk has as many bytes and is ours. The source may change
            // while it is read, which the copy allows.
            unsafe { copy_changing(source, staged.as_mut_ptr(), part_bytes) };
        }
    }

    fn check(&self, blocks: &[(u32, u32)]) -> Result<(), KernelError> {
        for &(block, expected) in blocks {
            let found = self.generation(block);
            if found != expected {
                return Err(KernelError::Stale { block, expected, found });
            }
        }
        fence(Ordering::Acquire);
        Ok(())
    }

    pub(super) fn generation(&self, block: u32) -> u32 {
        let at = self.map.as_mut_ptr().wrapping_add(self.geometry.generation_at(block));
        // SAFETY: an aligned word within the mapping, which lives as long as `self`, which every process touches by atomics
        // alone, and which we only load: relaxed, as read-only memory allows.
        unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Relaxed)
    }
}
