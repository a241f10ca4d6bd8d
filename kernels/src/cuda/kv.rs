//! KV memory on the device: its planes, and the ways of blocks to and from the host and from other caches of the card, from
//! any thread, on streams of their own. Which block may be read or written is `kv`'s business.
//!
//! Each way is a few calls of the driver for a whole list of blocks, and is through when its function returns: whoever
//! calls waits on the host, so that nothing that computes ever waits for a transfer.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::device::Device;
use super::error::{CudaError, During as _};
use super::function::Args;
use super::ipc::{CudaMemoryHandle, ForeignBuffer};
use super::kernels::KvKernels;
use super::launch;
use super::place::KvPart;
use super::shared_pinned::SharedPinned;
use super::staging::{Acquired, Lent, MAX_LISTED, Ring};
use crate::layout::KvLayout;

/// Slots for blocks on their way out; of these, so many may wait to be sent, or to be fetched by another process. A handoff
/// has two frames on its link; what is fetched comes back after the link's round trip, in which, if it takes 0.2 ms, the
/// fastest bus of a card (PCIe 5.0 x16, 64 GB/s) fills a dozen.
const OUTBOUND_SLOTS: usize = 16;
const OUTBOUND_LENT: usize = 14;
/// Slots for blocks on their way in, which nobody keeps.
const INBOUND_SLOTS: usize = 4;
/// Bytes of blocks in a slot, unless one block of one layer has more: what a frame carries.
const SLOT_BYTES: usize = 1 << 20;

/// The moment when everything that the compute stream had been given was done.
#[derive(Clone)]
pub(crate) struct Fence(Arc<CudaEvent>);

impl Fence {
    /// Waits on the host.
    pub(crate) fn wait(&self) {
        self.0.synchronize().or_stop("wait for the KV of a layer");
    }

    /// Each of them once; those of neighbouring blocks are mostly the same.
    pub(crate) fn distinct<'a>(fences: impl IntoIterator<Item = &'a Fence>) -> Vec<&'a Fence> {
        let mut distinct: Vec<&Fence> = Vec::new();
        for fence in fences {
            if !distinct.iter().any(|known| Arc::ptr_eq(&known.0, &fence.0)) {
                distinct.push(fence);
            }
        }
        distinct
    }
}

/// What was gathered of a list of blocks.
pub(crate) enum Gathered {
    /// Where the card has put it.
    Pinned(Lent),
    /// Copied on, as too much waits in pinned memory.
    Copied(Vec<u8>),
}

/// Where a cache of the card has its blocks.
#[derive(Clone, Copy)]
pub(crate) struct Planes {
    address: u64,
    n_blocks: u32,
}

/// A cache of the card that another process owns.
pub(crate) struct ForeignPlanes {
    buffer: ForeignBuffer,
    n_blocks: u32,
}

impl ForeignPlanes {
    /// Where the blocks are, for as long as this lives.
    pub(crate) fn planes(&self) -> Planes {
        Planes {
            address: self.buffer.address(),
            n_blocks: self.n_blocks,
        }
    }
}

/// K and V of all layers, `[n_layers][K, V][n_blocks]` parts, as on the host.
pub(crate) struct DeviceKv {
    part: KvPart,
    layout: KvLayout,
    n_blocks: u32,
    kernels: Arc<KvKernels>,
    outbound: Arc<Ring>,
    inbound: Arc<Ring>,
    device: Arc<Device>,
}

/// The ways out of a cache and into it.
pub(super) struct Staging {
    outbound: Arc<Ring>,
    inbound: Arc<Ring>,
}

impl Staging {
    /// # Errors
    /// Too little memory of either kind.
    pub(super) fn new(device: &Device, layout: KvLayout) -> Result<Staging, CudaError> {
        let slot_bytes = layout.layer_block_bytes().max(SLOT_BYTES);
        Ok(Staging {
            outbound: Ring::lending(device, OUTBOUND_SLOTS, OUTBOUND_LENT, slot_bytes)?,
            inbound: Ring::private(device, INBOUND_SLOTS, slot_bytes)?,
        })
    }
}

impl DeviceKv {
    pub(super) fn new(
        device: Arc<Device>,
        kernels: Arc<KvKernels>,
        layout: KvLayout,
        part: KvPart,
        staging: Staging,
    ) -> Result<DeviceKv, CudaError> {
        let n_bytes = layout.block_bytes() * part.n_blocks;
        // What attention reads past a sequence's end is masked, and not-a-number times nothing is not nothing.
        part.buffer.zero_part(part.offset, n_bytes, &device.compute)?;
        let Staging { outbound, inbound } = staging;
        Ok(DeviceKv {
            layout,
            n_blocks: u32::try_from(part.n_blocks).expect("as KV geometry has it"),
            part,
            kernels,
            outbound,
            inbound,
            device,
        })
    }

    /// Address of a byte of the planes.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.part.buffer.assert_within(self.part.offset, offset);
        self.part.buffer.address() + (self.part.offset + offset) as u64
    }

    /// Where the blocks are.
    pub(crate) fn planes(&self) -> Planes {
        Planes {
            address: self.address(0),
            n_blocks: self.n_blocks,
        }
    }

    /// The cache's name for other processes of the host.
    pub(crate) fn handle(&self) -> Result<CudaMemoryHandle, CudaError> {
        CudaMemoryHandle::of(&self.device, &self.part.buffer, self.part.offset)
    }

    /// The memory through which blocks leave, if other processes may read it.
    pub(crate) fn staging(&self) -> Option<&SharedPinned> {
        self.outbound.shared()
    }

    /// Maps a cache of `n_blocks` blocks of our layout that another process has named.
    pub(crate) fn open(&self, handle: &CudaMemoryHandle, n_blocks: usize) -> Result<ForeignPlanes, CudaError> {
        Ok(ForeignPlanes {
            buffer: ForeignBuffer::open(&self.device, handle)?,
            n_blocks: u32::try_from(n_blocks).expect("as KV geometry has it"),
        })
    }

    /// What the compute stream has been given so far; step thread only.
    pub(crate) fn fence(&self) -> Fence {
        Fence(self.device.fence())
    }

    /// K of all `blocks` of a layer, then V of all, once the fences are passed.
    pub(crate) fn gather(&self, layer: usize, blocks: &[u32], fences: &[&Fence]) -> Gathered {
        let part_bytes = self.layout.part_bytes();
        let n_bytes = 2 * part_bytes * blocks.len();
        if blocks.len() <= self.blocks_per_slot(&self.outbound) {
            let mut slot = self.gather_slot(layer, blocks, fences);
            return match slot.lend(n_bytes) {
                Some(lent) => Gathered::Pinned(lent),
                None => Gathered::Copied(slot.payload(n_bytes).to_vec()),
            };
        }
        let mut bytes = vec![0; n_bytes];
        let (keys, values) = bytes.split_at_mut(n_bytes / 2);
        let mut at = 0;
        for blocks in blocks.chunks(self.blocks_per_slot(&self.outbound)) {
            let slot = self.gather_slot(layer, blocks, fences);
            let half = part_bytes * blocks.len();
            let (key, value) = slot.payload(2 * half).split_at(half);
            keys[at..][..half].copy_from_slice(key);
            values[at..][..half].copy_from_slice(value);
            at += half;
        }
        Gathered::Copied(bytes)
    }

    fn gather_slot(&self, layer: usize, blocks: &[u32], fences: &[&Fence]) -> Acquired {
        let copying = "copy KV to the host";
        self.assert_within(layer, blocks);
        let mut slot = self.outbound.acquire();
        let stream = &self.device.outbound;
        self.begin(&mut slot, stream, blocks, fences, copying);
        let n_listed = blocks.len() as u32;
        let args = self.listed(&slot, [slot.payload_address(), self.address(0)], layer, n_listed);
        // SAFETY: blocks and layer lie within the planes, checked above; the payload of the slot, ours until `finish`, has
        // room for as many parts, and its list is on its way on the same stream.
        unsafe { self.kernels.gather.launch(stream, launch::kv_copy(n_listed, 1), &args) };
        let (n_bytes, from) = (self.layout.layer_block_bytes() * blocks.len(), slot.payload_address());
        let to = slot.payload_mut(n_bytes);
        // SAFETY: as many bytes at both ends of the slot, which nobody touches before `finish`.
        unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }.or_stop(copying);
        finish(&slot, stream, copying);
        slot
    }

    /// Writes one layer of `blocks`, once the fences are passed: `fill` gives the bytes, in the order of
    /// [`DeviceKv::gather`], of the blocks from one index to another. They are there on return.
    pub(crate) fn scatter(
        &self,
        layer: usize,
        blocks: &[u32],
        fences: &[&Fence],
        mut fill: impl FnMut(std::ops::Range<usize>, &mut [u8]),
    ) {
        let copying = "copy KV to the device";
        self.assert_within(layer, blocks);
        let stream = &self.device.inbound;
        let mut first = 0;
        for blocks in blocks.chunks(self.blocks_per_slot(&self.inbound)) {
            let mut slot = self.inbound.acquire();
            let n_bytes = self.layout.layer_block_bytes() * blocks.len();
            fill(first..first + blocks.len(), slot.payload_mut(n_bytes));
            first += blocks.len();
            self.begin(&mut slot, stream, blocks, fences, copying);
            let (from, to) = (slot.payload(n_bytes), slot.payload_address());
            // SAFETY: as many bytes at both ends of the slot, which nobody touches before `finish`.
            unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) }.or_stop(copying);
            let n_listed = blocks.len() as u32;
            let args = self.listed(&slot, [self.address(0), slot.payload_address()], layer, n_listed);
            // SAFETY: as for the gather, the other way; the caller is the blocks' only writer.
            unsafe { self.kernels.scatter.launch(stream, launch::kv_copy(n_listed, 1), &args) };
            finish(&slot, stream, copying);
        }
    }

    /// Copies a layer of blocks to another, `[from, to]` each, out of another cache of this card, once the fences are passed. They
    /// are there on return.
    ///
    /// # Safety
    /// `from` is a cache of this layout that this process can reach on this card until the function returns.
    pub(crate) unsafe fn take(&self, from: Planes, layers: [usize; 2], pairs: &[[u32; 2]], fences: &[&Fence]) {
        let copying = "copy KV within the card";
        let [layer_from, layer_to] = layers;
        assert!(
            layer_from < self.layout.n_layers && layer_to < self.layout.n_layers,
            "layers {layers:?}"
        );
        for [block_from, block_to] in pairs {
            assert!(
                *block_from < from.n_blocks && *block_to < self.n_blocks,
                "blocks {block_from} and {block_to} of caches of {} and {}",
                from.n_blocks,
                self.n_blocks
            );
        }
        let stream = &self.device.inbound;
        for pairs in pairs.chunks(MAX_LISTED) {
            let mut slot = self.inbound.acquire();
            self.begin(&mut slot, stream, pairs.as_flattened(), fences, copying);
            let args = Args::new()
                .address(self.address(0))
                .address(from.address)
                .address(slot.list_address())
                .u32(layer_to as u32)
                .u32(layer_from as u32)
                .u32(self.n_blocks)
                .u32(from.n_blocks)
                .u64(self.layout.part_bytes() as u64);
            // SAFETY: layer and blocks lie within both caches, checked above; the source is the caller's promise, and he is
            // the written blocks' only writer.
            unsafe {
                let launch = launch::kv_copy(pairs.len() as u32, 1);
                self.kernels.take.launch(stream, launch, &args);
            }
            finish(&slot, stream, copying);
        }
    }

    /// Whether kernels of ours reach that cache's memory: it is of this process, on this card.
    pub(crate) fn reaches(&self, other: &DeviceKv) -> bool {
        self.device.context == other.device.context
    }

    /// Queues copies of parts, `(from, to)` each, behind what computes.
    pub(crate) fn copy_parts(&self, parts: impl IntoIterator<Item = (usize, usize)>, part_bytes: usize) {
        let copying = "copy a KV block";
        self.device.context.bind_to_thread().or_stop(copying);
        for (from, to) in parts {
            let n_bytes = self.layout.block_bytes() * self.n_blocks as usize;
            assert!(
                from.max(to) + part_bytes <= n_bytes,
                "parts at {from} and {to} of {n_bytes} bytes"
            );
            let [from, to] = [from, to].map(|offset| self.address(offset));
            // SAFETY: both within the planes, and different parts.
            unsafe { result::memcpy_dtod_async(to, from, part_bytes, self.device.compute.cu_stream()) }
                .or_stop(copying);
        }
    }

    fn blocks_per_slot(&self, ring: &Ring) -> usize {
        (ring.payload_bytes() / self.layout.layer_block_bytes()).min(MAX_LISTED)
    }

    fn assert_within(&self, layer: usize, blocks: &[u32]) {
        assert!(layer < self.layout.n_layers, "layer {layer}");
        for block in blocks {
            assert!(*block < self.n_blocks, "block {block} of a cache of {}", self.n_blocks);
        }
    }

    /// Queues the waits for the fences and the copy of the list.
    fn begin(&self, slot: &mut Acquired, stream: &CudaStream, list: &[u32], fences: &[&Fence], action: &str) {
        self.device.context.bind_to_thread().or_stop(action);
        for fence in fences {
            stream.wait(&fence.0).or_stop(action);
        }
        let to = slot.list_address();
        let staged = slot.list_mut(list.len());
        staged.copy_from_slice(list);
        // SAFETY: as many numbers at both ends of the slot, which nobody touches before `finish`.
        unsafe { result::memcpy_htod_async(to, staged, stream.cu_stream()) }.or_stop(action);
    }

    /// Arguments of `kv_gather` and `kv_scatter`.
    fn listed(&self, slot: &Acquired, [to, from]: [u64; 2], layer: usize, n_listed: u32) -> Args {
        Args::new()
            .address(to)
            .address(from)
            .address(slot.list_address())
            .u32(layer as u32)
            .u32(n_listed)
            .u32(self.n_blocks)
            .u64(self.layout.part_bytes() as u64)
    }
}

/// Waits on the host for what the slot has been queued for, and perhaps for others' work before it.
fn finish(slot: &Acquired, stream: &CudaStream, action: &str) {
    slot.done.record(stream).or_stop(action);
    slot.done.synchronize().or_stop(action);
}
