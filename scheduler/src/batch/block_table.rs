//! A sequence's blocks in order, as handles and as the plain ids that kernels read.

use std::ops::Range;

use crate::block_pool::{BlockPool, HeldBlock, IsPinned};

/// In place of the id of a block that the sequence no longer has, or never had, because no query sees it.
pub const RELEASED_BLOCK: u32 = u32::MAX;

/// Blocks of one sequence; block `i` contains tokens `i * block_size ..`. The first ones may have been given up.
#[derive(Debug, Default)]
pub(super) struct BlockTable {
    n_released: usize,
    /// Those from `n_released` on.
    blocks: Vec<HeldBlock>,
    /// Of all.
    ids: Vec<u32>,
}

impl BlockTable {
    /// Blocks, those given up included.
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    /// Leading blocks that were given up.
    pub(super) fn n_released(&self) -> usize {
        self.n_released
    }

    /// The blocks that are here.
    pub(super) fn blocks(&self) -> &[HeldBlock] {
        &self.blocks
    }

    pub(super) fn get(&self, block_idx: usize) -> Option<&HeldBlock> {
        self.blocks.get(block_idx.checked_sub(self.n_released)?)
    }

    /// Some of the blocks, none of them given up.
    pub(super) fn range(&self, range: Range<usize>) -> &[HeldBlock] {
        &self.blocks[range.start - self.n_released..range.end - self.n_released]
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(super) fn push(&mut self, block: HeldBlock) {
        self.ids.push(block.id().0);
        self.blocks.push(block);
    }

    /// Begins a table with `n` blocks that are not needed.
    pub(super) fn skip(&mut self, n: usize) {
        assert!(self.ids.is_empty(), "a table of {} blocks skips {n}", self.ids.len());
        self.n_released = n;
        self.ids.resize(n, RELEASED_BLOCK);
    }

    /// Takes the last block away.
    pub(super) fn pop(&mut self) -> Option<HeldBlock> {
        let block = self.blocks.pop()?;
        self.ids.pop();
        Some(block)
    }

    /// Puts another block with the same contents in place of one, which is returned.
    pub(super) fn replace(&mut self, block_idx: usize, block: HeldBlock) -> HeldBlock {
        self.ids[block_idx] = block.id().0;
        std::mem::replace(&mut self.blocks[block_idx - self.n_released], block)
    }

    /// Gives up the blocks before `end`, the last first, so that a prefix outlives what follows it in the cache.
    pub(super) fn release_head(&mut self, end: usize, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        let n = end.saturating_sub(self.n_released).min(self.blocks.len());
        for block in self.blocks.drain(..n).rev() {
            pool.release(block, is_pinned);
        }
        self.ids[self.n_released..][..n].fill(RELEASED_BLOCK);
        self.n_released += n;
    }

    /// Gives all blocks back, the last first.
    pub(super) fn release(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        self.ids.clear();
        self.n_released = 0;
        while let Some(block) = self.blocks.pop() {
            pool.release(block, is_pinned);
        }
    }
}
