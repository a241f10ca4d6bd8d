//! Pins and writers: what code outside the forward pass holds of the KV memory. Who may make them is `KvCache`'s business.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::memory::{KvMemory, Part};
use crate::cuda::Fence;
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
            let KvMemory { geometry, .. } = &*self.memory;
            let device = self.memory.device().expect("only blocks of a device are staged");
            let parts = [Part::Key, Part::Value].map(|part| geometry.plane_offset(self.layer, self.block, part));
            let mut bytes = vec![0; geometry.layout.layer_block_bytes()].into_boxed_slice();
            device.read(&staged.fence, &parts, &mut bytes);
            bytes
        })
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
        if let (Some(device), Some(fence)) = (self.memory.device(), &self.fence) {
            let offset = |part| self.memory.geometry.plane_offset(layer, self.block, part);
            device.write(fence, &[(offset(Part::Key), key), (offset(Part::Value), value)]);
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

    /// Ends the writing: from now on the block can be read, appended to and pinned.
    pub fn seal(self) {}
}

impl Drop for KvWrite {
    fn drop(&mut self) {
        self.memory.writing[self.block as usize].store(false, Ordering::Release);
    }
}
