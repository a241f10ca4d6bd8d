//! One mapping with the KV of one process: the generation of every block, then its bytes; and who reads or writes what.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::cuda::DeviceKv;
use crate::error::KernelError;
use crate::layout::{DType, KvLayout};
use crate::sealed_memory;

/// The bytes of blocks begin on a huge page.
const PLANES_ALIGN: usize = 2 << 20;

#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Key,
    Value,
}

/// Where things are in the mapping. Every process that maps it computes the same.
///
/// `[n_blocks]` generations, 32 bits each; then from a huge page on `[n_layers][K, V][n_blocks]` parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) layout: KvLayout,
    pub(super) n_blocks: usize,
    planes_at: usize,
    pub(super) n_bytes: usize,
}

impl Geometry {
    pub(super) fn new(layout: KvLayout, n_blocks: usize) -> Result<Geometry, KernelError> {
        let refuse = |reason| Err(KernelError::Layout { layout, reason });
        let dimensions = [layout.n_layers, layout.n_kv_heads, layout.block_size, layout.head_dim];
        if dimensions.contains(&0) {
            return refuse("every dimension must be at least 1");
        }
        if !layout.head_dim.is_multiple_of(2) {
            return refuse("head_dim must be even");
        }
        if n_blocks == 0 || u32::try_from(n_blocks).is_err() {
            return refuse("the number of blocks must be 1 to 2^32 - 1");
        }
        // The layout may come from another process, so no product of it is trusted.
        let n_bytes = dimensions
            .into_iter()
            .chain([2, layout.dtype.size(), n_blocks])
            .try_fold(1_usize, usize::checked_mul);
        let planes_at = (n_blocks * size_of::<AtomicU32>()).next_multiple_of(PLANES_ALIGN);
        let n_bytes = n_bytes
            .and_then(|n_bytes| n_bytes.checked_add(planes_at))
            .filter(|&n_bytes| isize::try_from(n_bytes).is_ok());
        let Some(n_bytes) = n_bytes else {
            return refuse("the cache does not fit the address space");
        };
        Ok(Geometry {
            layout,
            n_blocks,
            planes_at,
            n_bytes,
        })
    }

    pub(super) fn generation_at(&self, block: u32) -> usize {
        assert!((block as usize) < self.n_blocks, "block {block}");
        block as usize * size_of::<AtomicU32>()
    }

    /// Start of a part; its `part_bytes` lie within the mapping.
    pub(super) fn part_at(&self, layer: usize, block: u32, part: Part) -> usize {
        assert!(
            layer < self.layout.n_layers && (block as usize) < self.n_blocks,
            "layer {layer}, block {block}"
        );
        let plane = 2 * layer + matches!(part, Part::Value) as usize;
        self.planes_at + (plane * self.n_blocks + block as usize) * self.layout.part_bytes()
    }

    /// Start of a part within the planes.
    pub(super) fn plane_offset(&self, layer: usize, block: u32, part: Part) -> usize {
        self.part_at(layer, block, part) - self.planes_at
    }

    /// Bytes of the generations, with what lies between them and the planes.
    pub(super) fn generation_bytes(&self) -> usize {
        self.planes_at
    }

    fn check_host_dtype(&self) -> Result<(), KernelError> {
        match self.layout.dtype {
            DType::F32 | DType::Bf16 => Ok(()),
            DType::F16 => Err(KernelError::Layout {
                layout: self.layout,
                reason: "f16 is not stored on the host, expected f32 or bf16",
            }),
        }
    }

    pub(super) fn check_layer(&self, layer: usize) -> Result<(), KernelError> {
        let n_layers = self.layout.n_layers;
        if layer < n_layers {
            Ok(())
        } else {
            Err(KernelError::LayerOutOfRange { layer, n_layers })
        }
    }

    pub(super) fn check_block(&self, block: u32) -> Result<(), KernelError> {
        if (block as usize) < self.n_blocks {
            Ok(())
        } else {
            Err(KernelError::BlockOutOfRange {
                block,
                n_blocks: self.n_blocks,
            })
        }
    }
}

/// Where the bytes of blocks are.
pub(super) enum Home {
    /// In the mapping, behind the generations.
    Host,
    /// In device memory; the mapping holds the generations alone.
    Device(DeviceKv),
}

pub(super) struct KvMemory {
    map: MmapRaw,
    pub(super) home: Home,
    pub(super) geometry: Geometry,
    /// What is mapped, when other processes may map it too.
    pub(super) file: Option<OwnedFd>,
    /// `[n_layers, n_blocks]`
    pub(super) layer_pins: Box<[AtomicU32]>,
    /// `[n_blocks]`: the sum over layers, so that asking for a whole block is one load.
    pub(super) block_pins: Box<[AtomicU32]>,
    /// `[n_blocks]`
    pub(super) writing: Box<[AtomicBool]>,
}

impl KvMemory {
    /// Memory of this process alone.
    pub(super) fn anonymous(geometry: Geometry) -> Result<KvMemory, KernelError> {
        geometry.check_host_dtype()?;
        let map = MmapOptions::new()
            .len(geometry.n_bytes)
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| out_of_memory(geometry, error))?;
        Ok(KvMemory::over(map.into(), geometry, None, Home::Host))
    }

    /// Memory of a device; generations in memory that other processes may map for reading, where there is such memory.
    pub(super) fn on_device(geometry: Geometry, planes: DeviceKv) -> Result<KvMemory, KernelError> {
        let (map, file) = match sealed_memory::create(geometry.generation_bytes()) {
            Ok((map, file)) => (map, Some(file)),
            Err(_) => {
                let map = MmapOptions::new().len(geometry.generation_bytes()).map_anon();
                (map.map_err(|error| out_of_memory(geometry, error))?.into(), None)
            }
        };
        Ok(KvMemory::over(map, geometry, file, Home::Device(planes)))
    }

    /// Memory that other processes may map for reading.
    pub(super) fn shared(geometry: Geometry) -> Result<KvMemory, KernelError> {
        geometry.check_host_dtype()?;
        let (map, file) = sealed_memory::create(geometry.n_bytes).map_err(|error| out_of_memory(geometry, error))?;
        Ok(KvMemory::over(map, geometry, Some(file), Home::Host))
    }

    fn over(map: MmapRaw, geometry: Geometry, file: Option<OwnedFd>, home: Home) -> KvMemory {
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for the KV cache");
        }
        let counters = |n| (0..n).map(|_| AtomicU32::new(0)).collect();
        let n_blocks = geometry.n_blocks;
        KvMemory {
            map,
            home,
            geometry,
            file,
            layer_pins: counters(geometry.layout.n_layers * n_blocks),
            block_pins: counters(n_blocks),
            writing: (0..n_blocks).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Gives the range pages to be written to, without changing what they hold.
    pub(super) fn populate(&self, offset: usize, n_bytes: usize) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        return self.map.advise_range(memmap2::Advice::PopulateWrite, offset, n_bytes);
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (offset, n_bytes);
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Bytes of the host's mapping.
    pub(super) fn host_bytes(&self) -> usize {
        match self.home {
            Home::Host => self.geometry.n_bytes,
            Home::Device(_) => self.geometry.generation_bytes(),
        }
    }

    /// The device that has the blocks, unless the host has them.
    pub(super) fn device(&self) -> Option<&DeviceKv> {
        match &self.home {
            Home::Host => None,
            Home::Device(planes) => Some(planes),
        }
    }

    /// Start of a part on the host; in range because every caller has checked layer and block, which is asserted again here.
    pub(super) fn part(&self, layer: usize, block: u32, part: Part) -> *mut u8 {
        assert!(
            matches!(self.home, Home::Host),
            "blocks of a device have no address on the host"
        );
        self.map
            .as_mut_ptr()
            .wrapping_add(self.geometry.part_at(layer, block, part))
    }

    pub(super) fn generation(&self, block: u32) -> &AtomicU32 {
        let at = self.map.as_mut_ptr().wrapping_add(self.geometry.generation_at(block));
        // SAFETY: an aligned word within the mapping, which lives as long as `self`, and which only atomics touch.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    pub(super) fn pin_index(&self, layer: usize, block: u32) -> usize {
        layer * self.geometry.n_blocks + block as usize
    }

    pub(super) fn add_pin(&self, layer: usize, block: u32) {
        self.block_pins[block as usize].fetch_add(1, Ordering::Relaxed);
        let before = self.layer_pins[self.pin_index(layer, block)].fetch_add(1, Ordering::Relaxed);
        assert!(
            before < u32::MAX / 2,
            "layer {layer}, block {block} is pinned {before} times"
        );
    }

    pub(super) fn assert_readable(&self, layer: usize, block: u32) {
        let Geometry { layout, n_blocks, .. } = self.geometry;
        assert!(
            layer < layout.n_layers && (block as usize) < n_blocks,
            "layer {layer}, block {block} is outside a cache of {} layers and {n_blocks} blocks",
            layout.n_layers,
        );
        let writing = self.writing[block as usize].load(Ordering::Acquire);
        assert!(
            !writing,
            "layer {layer}, block {block} is used while it is being written"
        );
    }
}

fn out_of_memory(geometry: Geometry, error: io::Error) -> KernelError {
    KernelError::OutOfMemory {
        what: "KV cache",
        bytes: geometry.n_bytes,
        error,
    }
}
