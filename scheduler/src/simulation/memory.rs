//! The KV memory of one instance: what each slot of each block contains, and which blocks are being read or written by a
//! transfer. Contents are hashes of all tokens up to the slot's own and of the layer, so that a wrong block, or one of another
//! layer group, is noticed where it is used.

use super::random::mix;
use crate::batch::{RELEASED_BLOCK, SlidingWindow};
use crate::ids::{BlockId, Generation, TokenId};
use crate::layer_groups::LayerGroups;

/// What the KV of a token after a context is.
pub(super) fn after(context: u64, token: TokenId) -> u64 {
    mix(context ^ (u64::from(token) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// What a layer keeps of it.
fn in_layer(context: u64, layer: usize) -> u64 {
    context.wrapping_add(layer as u64)
}

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) layer_groups: LayerGroups,
    /// Of each layer group.
    windows: Vec<Option<SlidingWindow>>,
    pub(super) block_size: usize,
    n_blocks: usize,
    slots: Vec<u64>,
    n_readers: Vec<u32>,
    n_writers: Vec<u32>,
    /// As published to those who read by themselves.
    generations: Vec<Generation>,
}

impl Memory {
    pub(super) fn new(
        layer_groups: LayerGroups,
        windows: Vec<Option<SlidingWindow>>,
        n_blocks: usize,
        block_size: usize,
    ) -> Memory {
        Memory {
            slots: vec![0; layer_groups.n_slots() * n_blocks * block_size],
            layer_groups,
            windows,
            block_size,
            n_blocks,
            n_readers: vec![0; n_blocks],
            n_writers: vec![0; n_blocks],
            generations: vec![Generation(0); n_blocks],
        }
    }

    pub(super) fn is_pinned(&self, block: BlockId) -> bool {
        self.n_readers[block.0 as usize] > 0 || self.n_writers[block.0 as usize] > 0
    }

    pub(super) fn publish(&mut self, allocated: Vec<(BlockId, Generation)>) {
        for (block, generation) in allocated {
            assert!(
                !self.is_pinned(block),
                "{block:?} was given out while a transfer used it"
            );
            let before = std::mem::replace(&mut self.generations[block.0 as usize], generation);
            assert_ne!(
                before, generation,
                "{block:?} was given out again in the generation it had"
            );
        }
    }

    pub(super) fn generation(&self, block: BlockId) -> Generation {
        self.generations[block.0 as usize]
    }

    pub(super) fn pin(&mut self, block: BlockId) {
        self.n_readers[block.0 as usize] += 1;
    }

    /// Pins blocks of a layer group once for each of its layers.
    pub(super) fn pin_in_layers(&mut self, layer_group: usize, blocks: &[(BlockId, Generation)]) {
        let n_layers = self.layers_of(layer_group).count();
        for (block, _) in blocks {
            (0..n_layers).for_each(|_| self.pin(*block));
        }
    }

    pub(super) fn unpin(&mut self, block: BlockId) {
        let n = &mut self.n_readers[block.0 as usize];
        *n = n.checked_sub(1).expect("a block was unpinned twice");
    }

    pub(super) fn begin_write(&mut self, block: BlockId) {
        assert!(!self.is_pinned(block), "{block:?} is reserved for two writers");
        self.n_writers[block.0 as usize] += 1;
    }

    pub(super) fn end_write(&mut self, block: BlockId) {
        let n = &mut self.n_writers[block.0 as usize];
        *n = n.checked_sub(1).expect("a block was sealed twice");
    }

    pub(super) fn n_pins(&self) -> u32 {
        self.n_readers.iter().chain(&self.n_writers).sum()
    }

    pub(super) fn n_layers(&self) -> usize {
        self.layer_groups.n_layers()
    }

    /// The layers whose KV lies in blocks of a layer group.
    pub(super) fn layers_of(&self, layer_group: usize) -> impl Iterator<Item = usize> + use<'_> {
        let places = self.layer_groups.places().iter().enumerate();
        places.filter_map(move |(layer, place)| (place.layer_group == layer_group).then_some(layer))
    }

    fn at(&self, slot: usize, block: BlockId, position: usize) -> usize {
        (slot * self.n_blocks + block.0 as usize) * self.block_size + position
    }

    pub(super) fn block(&self, layer: usize, block: BlockId) -> &[u64] {
        let at = self.at(self.layer_groups.place(layer).slot, block, 0);
        &self.slots[at..at + self.block_size]
    }

    /// Bytes that have come for a block reserved in this generation.
    pub(super) fn land(&mut self, layer: usize, block: BlockId, generation: Generation, contents: &[u64]) {
        assert_eq!(
            self.generation(block),
            generation,
            "{block:?} was written after it was reused"
        );
        assert!(
            self.n_writers[block.0 as usize] > 0,
            "{block:?} is written by nobody's right"
        );
        let at = self.at(self.layer_groups.place(layer).slot, block, 0);
        self.slots[at..at + self.block_size].copy_from_slice(contents);
    }

    pub(super) fn copy_block(&mut self, from: BlockId, to: BlockId) {
        assert!(!self.is_pinned(to), "a copy goes to {to:?}, which a transfer uses");
        for slot in 0..self.layer_groups.n_slots() {
            let (from, to) = (self.at(slot, from, 0), self.at(slot, to, 0));
            self.slots.copy_within(from..from + self.block_size, to);
        }
    }

    /// Reads the KV of `tokens[..n_computed]` as far as the layers see it, and writes that of the rest, as a forward pass does.
    /// Returns what the last one's row is a function of.
    pub(super) fn compute(&mut self, tokens: &[TokenId], n_computed: usize, end: usize, tables: &[Vec<u32>]) -> u64 {
        let mut context = 0;
        for (position, &token) in tokens[..end].iter().enumerate() {
            context = after(context, token);
            for layer in 0..self.n_layers() {
                let place = self.layer_groups.place(layer);
                let block = tables[place.layer_group][position / self.block_size];
                if block == RELEASED_BLOCK {
                    let window = self.windows[place.layer_group].map_or(usize::MAX, |window| window.n_tokens);
                    assert!(
                        position.saturating_add(window) <= n_computed,
                        "position {position}, layer {layer}: the query at {n_computed} sees a block that was given up"
                    );
                    continue;
                }
                let block = BlockId(block);
                let at = self.at(place.slot, block, position % self.block_size);
                if position < n_computed {
                    assert_eq!(
                        self.slots[at],
                        in_layer(context, layer),
                        "position {position}, layer {layer}: {block:?} does not contain what it should"
                    );
                } else {
                    assert!(
                        !self.is_pinned(block),
                        "{block:?} is appended to while a transfer uses it"
                    );
                    self.slots[at] = in_layer(context, layer);
                }
            }
        }
        context
    }
}
