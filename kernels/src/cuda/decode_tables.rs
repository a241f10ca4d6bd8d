//! What a recorded decode step reads that differs from step to step: ids, positions, slots, plans and block tables, at places
//! that depend on the number of rows alone. Fills bytes; copies and launches nothing.

use bytemuck::Pod;

use super::batch::NO_SLOT;
use super::limits::StepLimits;
use super::plan::{Item, Kernels, Merge, Plan, PlanSize, Sequence, Shape, Splits};
use super::upload::ALIGNMENT;
use crate::backend::RaggedBatch;

/// Attention items of a layer group that a recorded step has at most. Only fixed splits have more, and a step that needs them
/// is not replayed: every replay starts a CTA for each.
const MAX_ITEMS: usize = 8192;

/// Row counts that decode steps are padded to, up to `n_sequences`, which is one of them: those that vLLM captures.
pub(super) fn padded_rows(n_sequences: usize) -> Vec<usize> {
    let fine = [1, 2, 4].into_iter().chain((8..256).step_by(8));
    let sizes = fine.chain((256..n_sequences).step_by(16));
    let mut sizes: Vec<usize> = sizes.take_while(|size| *size < n_sequences).collect();
    sizes.extend((n_sequences > 0).then_some(n_sequences));
    sizes
}

/// Where the arrays of a step of so many rows are, in bytes from the tables' beginning.
pub(super) struct DecodeTables {
    pub(super) n_rows: usize,
    /// `[n_rows]` u32
    pub(super) ids: usize,
    /// `[n_rows]` u32
    pub(super) positions: usize,
    /// `[n_rows]` u32
    pub(super) rope_variants: usize,
    /// `[n_rows]` u32: every row.
    pub(super) wanted_rows: usize,
    pub(super) groups: Vec<GroupTables>,
    /// Of all groups, one after the other, u32. Last: how many there are differs from step to step.
    pub(super) block_tables: usize,
    /// With tables of the longest contexts.
    pub(super) n_bytes: usize,
    splits: Splits,
    block_size: usize,
}

/// The same of one layer group.
pub(super) struct GroupTables {
    pub(super) shape: Shape,
    pub(super) size: PlanSize,
    /// `[n_rows]` u64
    pub(super) slots: usize,
    /// `[size.decode]` items
    pub(super) decode: usize,
    /// `[size.prefill]` items
    pub(super) prefill: usize,
    /// `[size.merges]`
    pub(super) merges: usize,
}

impl DecodeTables {
    /// For steps of up to `n_rows` sequences.
    pub(super) fn new(
        n_rows: usize,
        limits: &StepLimits,
        kernels: Kernels,
        splits: Splits,
        max_partial_rows: u32,
    ) -> DecodeTables {
        let mut n_bytes = 0;
        let mut place = |n: usize, size: usize| {
            let at = n_bytes;
            n_bytes = (at + n * size).next_multiple_of(ALIGNMENT);
            at
        };
        let [ids, positions, rope_variants, wanted_rows] = [(); 4].map(|()| place(n_rows, size_of::<u32>()));
        let groups = limits.windows.iter().map(|window| {
            let shape = limits.shape(*window, kernels);
            let largest = PlanSize::of_decode(shape, splits, n_rows as u32, limits.n_context as u32);
            let size = PlanSize {
                prefill: largest.prefill.min(MAX_ITEMS),
                n_partial_rows: largest.n_partial_rows.min(max_partial_rows),
                ..largest
            };
            GroupTables {
                shape,
                size,
                slots: place(n_rows, size_of::<u64>()),
                decode: place(size.decode, size_of::<Item>()),
                prefill: place(size.prefill, size_of::<Item>()),
                merges: place(size.merges, size_of::<Merge>()),
            }
        });
        let groups: Vec<GroupTables> = groups.collect();
        let block_tables = place(groups.len() * n_rows * limits.n_table_blocks(), size_of::<u32>());
        DecodeTables {
            n_rows,
            ids,
            positions,
            rope_variants,
            wanted_rows,
            groups,
            block_tables,
            n_bytes,
            splits,
            block_size: limits.block_size,
        }
    }

    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    /// Fills the tables of a step in which every sequence has one new token, up to `n_rows` of them, with the block tables of
    /// each layer group. How many bytes from the beginning have become the step's; `None` where attention has more items than a
    /// recorded step takes.
    pub(super) fn fill(
        &self,
        bytes: &mut [u8],
        plan: &mut Plan,
        ids: &[u32],
        batches: &[RaggedBatch<'_>],
    ) -> Option<usize> {
        assert_eq!(batches.len(), self.groups.len(), "a batch for each layer group");
        let n_rows = self.n_rows;
        let mut n_table_blocks = 0;
        for (group, batch) in self.groups.iter().zip(batches) {
            let planned: Vec<Sequence> = batch
                .sequences
                .iter()
                .enumerate()
                .map(|(row, sequence)| {
                    assert_eq!(sequence.n_tokens, 1, "tokens of a sequence of a decode step");
                    let blocks = array::<u32>(bytes, self.block_tables, n_table_blocks + sequence.block_table.len());
                    blocks[n_table_blocks..].copy_from_slice(sequence.block_table);
                    let first_block = n_table_blocks as u32;
                    n_table_blocks += sequence.block_table.len();
                    Sequence {
                        first_row: row as u32,
                        start_pos: sequence.start_pos as u32,
                        n_tokens: 1,
                        first_block,
                    }
                })
                .collect();
            plan.refresh(group.shape, self.splits, &planned);
            if !plan.fits(group.size) {
                return None;
            }
            plan.pad_to(group.size);
            array(bytes, group.decode, group.size.decode).copy_from_slice(&plan.decode);
            array(bytes, group.prefill, group.size.prefill).copy_from_slice(&plan.prefill);
            array(bytes, group.merges, group.size.merges).copy_from_slice(&plan.merges);
            let slots = batch.sequences.iter().map(|sequence| {
                let block = sequence.block_table[sequence.start_pos / self.block_size];
                u64::from(block) * self.block_size as u64 + (sequence.start_pos % self.block_size) as u64
            });
            padded(array(bytes, group.slots, n_rows), slots, NO_SLOT);
        }
        let sequences = batches.first().map_or(&[][..], |batch| batch.sequences);
        let positions = sequences.iter().map(|sequence| sequence.start_pos as u32);
        let rope_variants = sequences.iter().map(|sequence| sequence.rope_variant as u32);
        padded(array(bytes, self.ids, n_rows), ids.iter().copied(), 0);
        padded(array(bytes, self.positions, n_rows), positions, 0);
        padded(array(bytes, self.rope_variants, n_rows), rope_variants, 0);
        padded(array(bytes, self.wanted_rows, n_rows), 0..n_rows as u32, 0);
        Some(self.block_tables + n_table_blocks * size_of::<u32>())
    }
}

fn array<T: Pod>(bytes: &mut [u8], at: usize, n: usize) -> &mut [T] {
    bytemuck::cast_slice_mut(&mut bytes[at..at + n * size_of::<T>()])
}

/// Values, and `filler` from where they end.
fn padded<T>(to: &mut [T], values: impl ExactSizeIterator<Item = T>, filler: T)
where
    T: Copy,
{
    let (own, rest) = to.split_at_mut(values.len());
    own.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    rest.fill(filler);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::RaggedSequence;

    #[test]
    fn steps_are_padded_to_few_rows_and_never_to_fewer() {
        for limit in [0, 1, 2, 3, 4, 5, 8, 9, 100, 255, 256, 257, 300, 512] {
            let sizes = padded_rows(limit);
            assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]), "{sizes:?}");
            assert_eq!(sizes.last().copied().unwrap_or(0), limit);
            for n in 5..=limit {
                let padded = sizes.iter().find(|size| **size >= n).unwrap();
                assert!(padded - n < 8 || (n > 256 && padded - n < 16), "{n} in {sizes:?}");
            }
        }
        assert_eq!(padded_rows(20), [1, 2, 4, 8, 16, 20]);
    }

    fn limits() -> StepLimits {
        StepLimits {
            n_rows: 64,
            n_sequences: 8,
            n_context: 1000,
            block_size: 16,
            n_heads: 6,
            n_kv_heads: 2,
            head_dim: 64,
            windows: vec![None, Some(70)],
            n_recorded_sequences: 8,
            n_fetched: 0,
            experts: None,
        }
    }

    /// What lies in the tables is what a step of the same sequences would upload, and the rest does nothing.
    #[test]
    fn tables_hold_the_step_and_fill_up_with_nothing() {
        let (n_rows, splits) = (4, Splits::Balanced { n_ctas: 16 });
        let tables = DecodeTables::new(n_rows, &limits(), Kernels::TensorCore, splits, u32::MAX);
        let mut bytes = vec![0xee_u8; tables.n_bytes + 256];
        let aligned = bytes.as_ptr().align_offset(256);
        let bytes = &mut bytes[aligned..][..tables.n_bytes];
        let blocks: [Vec<u32>; 4] = [vec![9; 50], vec![7, 8], vec![5; 63], vec![3]];
        let sequence = |table: usize, start_pos: usize, rope_variant: usize| RaggedSequence {
            start_pos,
            n_tokens: 1,
            block_table: &blocks[table],
            rope_variant,
        };
        let full = [sequence(0, 799, 0), sequence(1, 17, 1), sequence(3, 0, 0)];
        let windowed = [sequence(2, 799, 0), sequence(3, 17 - 16, 1), sequence(1, 0, 0)];
        let batches = [&full[..], &windowed[..]].map(|sequences| RaggedBatch { sequences });
        let mut plan = Plan::default();
        let n_used = tables.fill(bytes, &mut plan, &[11, 12, 13], &batches).unwrap();
        assert!(bytes[n_used..].iter().all(|byte| *byte == 0xee));
        let group = &tables.groups[0];
        assert_eq!(array::<u32>(bytes, tables.ids, n_rows), [11, 12, 13, 0]);
        assert_eq!(array::<u32>(bytes, tables.positions, n_rows), [799, 17, 0, 0]);
        assert_eq!(array::<u32>(bytes, tables.rope_variants, n_rows), [0, 1, 0, 0]);
        assert_eq!(array::<u32>(bytes, tables.wanted_rows, n_rows), [0, 1, 2, 3]);
        let slots = [9 * 16 + 15, 8 * 16 + 1, 3 * 16, u64::MAX];
        assert_eq!(array::<u64>(bytes, group.slots, n_rows), slots);
        let mut first_block = 0;
        for (group, sequences) in tables.groups.iter().zip([full, windowed]) {
            for (row, sequence) in sequences.iter().enumerate() {
                let n_blocks = sequence.block_table.len();
                let found = &array::<u32>(bytes, tables.block_tables, first_block + n_blocks)[first_block..];
                assert_eq!(found, sequence.block_table);
                let items = array::<Item>(bytes, group.decode, group.size.decode);
                let own = items
                    .iter()
                    .filter(|item| item.n_queries > 0 && item.first_row == row as u32);
                assert!(own.clone().count() > 0 && own.clone().all(|item| item.first_block == first_block as u32));
                first_block += n_blocks;
            }
            let items = array::<Item>(bytes, group.decode, group.size.decode);
            assert!(items.iter().all(|item| item.first_row < 3));
        }
    }

    /// In deterministic mode a long context of many sequences is more than a recorded step takes.
    #[test]
    fn a_step_with_too_many_items_does_not_fit() {
        let limits = StepLimits {
            n_context: 1 << 20,
            n_kv_heads: 8,
            n_heads: 8,
            ..limits()
        };
        let splits = Splits::Fixed { tokens: 256 };
        let tables = DecodeTables::new(2, &limits, Kernels::TensorCore, splits, 1 << 17);
        let blocks = vec![0; (1 << 20) / 16];
        let mut bytes = vec![0_u64; tables.n_bytes / 8];
        let mut fits = |start_pos: usize| {
            let sequences = [RaggedSequence {
                start_pos,
                n_tokens: 1,
                block_table: &blocks,
                rope_variant: 0,
            }];
            let batch = RaggedBatch { sequences: &sequences };
            let bytes = bytemuck::cast_slice_mut(&mut bytes);
            tables
                .fill(bytes, &mut Plan::bounded(1 << 17), &[1], &[batch, batch])
                .is_some()
        };
        assert!(fits(200_000) && !fits(300_000));
    }
}
