//! A sequence's blocks in order, as handles and as the plain ids that kernels read.

use crate::block_pool::{BlockPool, HeldBlock, IsPinned};

/// Blocks of one sequence; block `i` contains tokens `i * block_size ..`.
#[derive(Debug, Default)]
pub(super) struct BlockTable {
    blocks: Vec<HeldBlock>,
    ids: Vec<u32>,
}

impl BlockTable {
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn blocks(&self) -> &[HeldBlock] {
        &self.blocks
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(super) fn push(&mut self, block: HeldBlock) {
        self.ids.push(block.id().0);
        self.blocks.push(block);
    }

    /// Takes the last block away.
    pub(super) fn pop(&mut self) -> Option<HeldBlock> {
        self.ids.pop();
        self.blocks.pop()
    }

    /// Puts another block with the same contents in place of one, which is returned.
    pub(super) fn replace(&mut self, block_idx: usize, block: HeldBlock) -> HeldBlock {
        self.ids[block_idx] = block.id().0;
        std::mem::replace(&mut self.blocks[block_idx], block)
    }

    /// Gives all blocks back, the last first, so that a prefix outlives what follows it in the cache.
    pub(super) fn release(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        self.ids.clear();
        while let Some(block) = self.blocks.pop() {
            pool.release(block, is_pinned);
        }
    }
}
