//! Blocks of another process's card on their way through pinned memory of the host, which that process fills a frame at a time
//! and we have mapped. As with blocks that are read in place, the reader says which generation of a slot is meant.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use memmap2::MmapRaw;

use super::KvWrite;
use super::memory::Part;
use crate::error::KernelError;
use crate::layout::KvLayout;
use crate::sealed_memory::{self, copy_changing};

/// Slots are of whole pages, and begin on the second, behind their generations.
const PAGE_BYTES: usize = 4096;

/// What a slot held at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StagedPlace {
    /// Which slot.
    pub slot: u32,
    /// The time.
    pub generation: u32,
}

/// Where things are in the file. Every process that maps it computes the same: `[n_slots]` generations, 32 bits each; then,
/// from the second page on, slots of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingGeometry {
    n_slots: u32,
    slot_bytes: usize,
    stride: usize,
    n_bytes: usize,
}

impl StagingGeometry {
    /// `n_slots` slots of `slot_bytes`, 1 to 1024; `None` if there is no such file.
    pub fn new(n_slots: u32, slot_bytes: usize) -> Option<StagingGeometry> {
        let holds_generations = (1..=PAGE_BYTES / size_of::<AtomicU32>()).contains(&(n_slots as usize));
        let stride = slot_bytes.checked_next_multiple_of(PAGE_BYTES)?;
        let n_bytes = stride.checked_mul(n_slots as usize)?.checked_add(PAGE_BYTES)?;
        let is_possible = holds_generations && slot_bytes > 0 && isize::try_from(n_bytes).is_ok();
        is_possible.then_some(StagingGeometry {
            n_slots,
            slot_bytes,
            stride,
            n_bytes,
        })
    }

    /// How many slots there are.
    pub fn n_slots(self) -> u32 {
        self.n_slots
    }

    /// Bytes of KV that a slot holds.
    pub fn slot_bytes(self) -> usize {
        self.slot_bytes
    }

    pub(crate) fn n_bytes(self) -> usize {
        self.n_bytes
    }

    pub(crate) fn generation_at(self, slot: u32) -> usize {
        assert!(slot < self.n_slots, "slot {slot}");
        slot as usize * size_of::<AtomicU32>()
    }

    /// Start of a slot; its bytes lie within the file.
    pub(crate) fn slot_at(self, slot: u32) -> usize {
        assert!(slot < self.n_slots, "slot {slot}");
        PAGE_BYTES + slot as usize * self.stride
    }
}

/// The memory through which blocks leave a card, as other processes are given it.
#[derive(Clone, Copy, Debug)]
pub struct KvStaging<'a> {
    /// To be mapped for reading.
    pub file: BorrowedFd<'a>,
    /// What is where in it.
    pub geometry: StagingGeometry,
}

/// Another process's [`KvStaging`], mapped for reading.
pub struct ForeignStaging {
    map: MmapRaw,
    geometry: StagingGeometry,
    layout: KvLayout,
}

impl ForeignStaging {
    /// Maps what was given, with blocks of `layout`.
    ///
    /// # Errors
    /// A file that may shrink under its reader or has another size, or no address space.
    pub fn map(file: &OwnedFd, layout: KvLayout, geometry: StagingGeometry) -> Result<ForeignStaging, KernelError> {
        Ok(ForeignStaging {
            map: sealed_memory::map(file, geometry.n_bytes)?,
            geometry,
            layout,
        })
    }

    /// Copies what lies in a slot, K of all the blocks and then V of all, to one layer of `writers`, in order. The bytes are
    /// meant only if this succeeds, as with [`ForeignKv::copy`](super::ForeignKv::copy).
    ///
    /// # Errors
    /// A slot that there is not or that holds less, a layer out of range, or a generation that is another, before or after
    /// the copy.
    ///
    /// # Panics
    /// Unless the writers' blocks have our layout.
    pub fn copy(&self, place: StagedPlace, layer: usize, writers: &mut [KvWrite]) -> Result<(), KernelError> {
        let n_bytes = writers.len() * self.layout.layer_block_bytes();
        if place.slot >= self.geometry.n_slots || n_bytes > self.geometry.slot_bytes {
            return Err(KernelError::NoSuchSlot {
                slot: place.slot,
                n_bytes,
                n_slots: self.geometry.n_slots,
                slot_bytes: self.geometry.slot_bytes,
            });
        }
        let Some(first) = writers.first() else { return Ok(()) };
        let to = Arc::clone(&first.memory);
        for writer in &*writers {
            assert_eq!(
                writer.memory.geometry.layout, self.layout,
                "layouts are compared before"
            );
        }
        to.geometry.check_layer(layer)?;
        self.check(place)?;
        let part_bytes = self.layout.part_bytes();
        let source = self.map.as_ptr().wrapping_add(self.geometry.slot_at(place.slot));
        let n_writers = writers.len();
        let part_of = |part: Part, idx: usize| {
            let part = matches!(part, Part::Value) as usize;
            source.wrapping_add((part * n_writers + idx) * part_bytes)
        };
        if let Some(device) = to.device() {
            let blocks = KvWrite::blocks_of_one_cache(writers);
            device.scatter(layer, &blocks, &KvWrite::fences(writers), |listed, staged| {
                assert!(listed.end <= n_writers, "of the blocks listed");
                let (key, value) = staged.split_at_mut(listed.len() * part_bytes);
                for (part, target) in [(Part::Key, key), (Part::Value, value)] {
                    // SAFETY: parts of neighbours in the list are neighbours in the slot, within the mapping; the target
                    // has as many bytes and is ours. The source may change while it is read, which the copy allows.
                    unsafe { copy_changing(part_of(part, listed.start), target.as_mut_ptr(), target.len()) };
                }
            });
        } else {
            for (idx, writer) in writers.iter().enumerate() {
                for part in [Part::Key, Part::Value] {
                    let target = writer.memory.part(layer, writer.block, part);
                    // SAFETY: a part lies within the slot, and the target is ours: the handle is its block's only writer.
                    // The source may change while it is read, which the copy allows.
                    unsafe { copy_changing(part_of(part, idx), target, part_bytes) };
                }
            }
        }
        // Full: the loads of a string copy are not promised to precede a later load otherwise.
        fence(Ordering::SeqCst);
        self.check(place)
    }

    fn check(&self, place: StagedPlace) -> Result<(), KernelError> {
        let at = self
            .map
            .as_mut_ptr()
            .wrapping_add(self.geometry.generation_at(place.slot));
        // SAFETY: an aligned word within the mapping, which lives as long as `self`, which every process touches by atomics
        // alone, and which we only load: relaxed, as read-only memory allows.
        let found = unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        if found == place.generation {
            Ok(())
        } else {
            Err(KernelError::StaleSlot {
                slot: place.slot,
                expected: place.generation,
                found,
            })
        }
    }
}
