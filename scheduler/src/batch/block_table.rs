//! A sequence's blocks in order, one table for each layer group, as handles and as the plain ids that kernels read.

use std::ops::Range;

use crate::block_pool::{BlockPool, HeldBlock, IsPinned};

/// In place of the id of a block that the sequence no longer has, or never had, because no query sees it.
pub const RELEASED_BLOCK: u32 = u32::MAX;

/// Blocks of one sequence; block `i` of a table contains tokens `i * block_size ..` in the layers of its group. The first ones
/// may have been given up.
#[derive(Debug)]
pub(super) struct BlockTables {
    tables: Vec<BlockTable>,
    /// Of all blocks, those given up included: `[n_groups][n_blocks]`.
    ids: Vec<Vec<u32>>,
}

#[derive(Debug, Default)]
struct BlockTable {
    n_released: usize,
    /// Those from `n_released` on.
    blocks: Vec<HeldBlock>,
}

impl BlockTables {
    /// Empty tables, one for each of `n_groups` layer groups.
    pub(super) fn new(n_groups: usize) -> BlockTables {
        BlockTables {
            tables: (0..n_groups).map(|_| BlockTable::default()).collect(),
            ids: vec![Vec::new(); n_groups],
        }
    }

    /// Blocks of a table, those given up included.
    pub(super) fn len(&self, layer_group: usize) -> usize {
        self.ids[layer_group].len()
    }

    /// Blocks of the shortest table, those given up included.
    pub(super) fn n_covered(&self) -> usize {
        self.ids.iter().map(Vec::len).min().unwrap_or(0)
    }

    /// Leading blocks of a table that were given up.
    pub(super) fn n_released(&self, layer_group: usize) -> usize {
        self.tables[layer_group].n_released
    }

    /// The blocks of a table that are here.
    pub(super) fn blocks(&self, layer_group: usize) -> &[HeldBlock] {
        &self.tables[layer_group].blocks
    }

    pub(super) fn get(&self, layer_group: usize, block_idx: usize) -> Option<&HeldBlock> {
        let table = &self.tables[layer_group];
        table.blocks.get(block_idx.checked_sub(table.n_released)?)
    }

    /// Some of the blocks, none of them given up.
    pub(super) fn range(&self, layer_group: usize, range: Range<usize>) -> &[HeldBlock] {
        let table = &self.tables[layer_group];
        &table.blocks[range.start - table.n_released..range.end - table.n_released]
    }

    pub(super) fn ids(&self) -> &[Vec<u32>] {
        &self.ids
    }

    pub(super) fn push(&mut self, layer_group: usize, block: HeldBlock) {
        self.ids[layer_group].push(block.id().0);
        self.tables[layer_group].blocks.push(block);
    }

    /// Begins a table with `n` blocks that are not needed.
    pub(super) fn skip(&mut self, layer_group: usize, n: usize) {
        let ids = &mut self.ids[layer_group];
        assert!(ids.is_empty(), "a table of {} blocks skips {n}", ids.len());
        ids.resize(n, RELEASED_BLOCK);
        self.tables[layer_group].n_released = n;
    }

    /// Puts another block with the same contents in place of one, which is returned.
    pub(super) fn replace(&mut self, layer_group: usize, block_idx: usize, block: HeldBlock) -> HeldBlock {
        self.ids[layer_group][block_idx] = block.id().0;
        let table = &mut self.tables[layer_group];
        std::mem::replace(&mut table.blocks[block_idx - table.n_released], block)
    }

    /// Gives up the blocks of a table before `end`, the last first, so that a prefix outlives what follows it in the cache.
    pub(super) fn release_head(
        &mut self,
        layer_group: usize,
        end: usize,
        pool: &mut BlockPool,
        is_pinned: IsPinned<'_>,
    ) {
        let table = &mut self.tables[layer_group];
        let n = end.saturating_sub(table.n_released).min(table.blocks.len());
        for block in table.blocks.drain(..n).rev() {
            pool.release(block, is_pinned);
        }
        self.ids[layer_group][table.n_released..][..n].fill(RELEASED_BLOCK);
        table.n_released += n;
    }

    /// Gives all blocks back, the last first, so that what the groups have of a prefix is evicted together.
    pub(super) fn release(&mut self, pool: &mut BlockPool, is_pinned: IsPinned<'_>) {
        let n_blocks = self.ids.iter().map(Vec::len).max().unwrap_or(0);
        for block_idx in (0..n_blocks).rev() {
            for table in &mut self.tables {
                let is_here = table.n_released + table.blocks.len() > block_idx;
                if let Some(block) = table.blocks.pop_if(|_| is_here) {
                    pool.release(block, is_pinned);
                }
            }
        }
        self.tables.iter_mut().for_each(|table| table.n_released = 0);
        self.ids.iter_mut().for_each(Vec::clear);
    }
}
