//! One ragged batch as the kernels read it: uploaded once a step, used by every layer.

use super::attention::DevicePlan;
use super::upload::Uploads;
use crate::backend::{RaggedBatch, RaggedSequence};
use crate::layout::KvLayout;

/// The slot of a row that is no token.
pub(super) const NO_SLOT: u64 = u64::MAX;

/// Where the arrays of a batch are on the device.
pub(super) struct DeviceBatch {
    of: Identity,
    /// `[rows]` u32
    pub(super) positions: u64,
    /// `[rows]` u64: `block << block_shift | offset` of each row's KV.
    pub(super) slots: u64,
    /// `[rows]` u32
    pub(super) rope_variants: u64,
    /// Block tables of all sequences, one after the other, u32.
    pub(super) block_tables: u64,
    /// For each kind of layer that has attended so far.
    pub(super) plans: Vec<DevicePlan>,
    pub(super) max_position: usize,
    pub(super) max_rope_variant: usize,
}

/// What tells one batch of a step from another. Tables are told by where they lie: within a step they do not change.
#[derive(PartialEq, Eq)]
struct Identity {
    block_size: usize,
    sequences: Vec<(usize, usize, usize, *const u32, usize)>,
}

// SAFETY: the addresses are compared and never read.
unsafe impl Send for Identity {}

impl DeviceBatch {
    pub(super) fn upload(uploads: &mut Uploads, batch: RaggedBatch<'_>, layout: KvLayout) -> DeviceBatch {
        let shift = layout.block_size.trailing_zeros();
        let n_rows = batch.n_rows();
        let mut positions = Vec::with_capacity(n_rows);
        let mut slots = Vec::with_capacity(n_rows);
        let mut rope_variants = Vec::with_capacity(n_rows);
        let mut block_tables = Vec::new();
        for sequence in batch.sequences {
            for position in sequence.start_pos..sequence.start_pos + sequence.n_tokens {
                let block = sequence.block_table[position / layout.block_size];
                positions.push(position as u32);
                slots.push(u64::from(block) << shift | (position % layout.block_size) as u64);
                rope_variants.push(sequence.rope_variant as u32);
            }
            block_tables.extend_from_slice(sequence.block_table);
        }
        DeviceBatch {
            of: Identity::of(batch, layout.block_size),
            positions: uploads.put(&positions),
            slots: uploads.put(&slots),
            rope_variants: uploads.put(&rope_variants),
            block_tables: uploads.put(&block_tables),
            plans: Vec::new(),
            max_position: positions.iter().copied().max().unwrap_or(0) as usize,
            max_rope_variant: rope_variants.iter().copied().max().unwrap_or(0) as usize,
        }
    }

    /// A batch whose arrays are elsewhere: positions, slots, rope variants and block tables at these addresses. What they hold
    /// is checked by who fills them.
    pub(super) fn at_fixed_addresses(
        batch: RaggedBatch<'_>,
        block_size: usize,
        [positions, slots, rope_variants, block_tables]: [u64; 4],
        plan: DevicePlan,
    ) -> DeviceBatch {
        DeviceBatch {
            of: Identity::of(batch, block_size),
            positions,
            slots,
            rope_variants,
            block_tables,
            plans: vec![plan],
            max_position: 0,
            max_rope_variant: 0,
        }
    }

    /// Whether this is what was uploaded.
    pub(super) fn is_of(&self, batch: RaggedBatch<'_>, layout: KvLayout) -> bool {
        self.of.block_size == layout.block_size
            && self.of.sequences.len() == batch.sequences.len()
            && self
                .of
                .sequences
                .iter()
                .zip(batch.sequences)
                .all(|(a, b)| *a == told_by(b))
    }
}

impl Identity {
    fn of(batch: RaggedBatch<'_>, block_size: usize) -> Identity {
        Identity {
            block_size,
            sequences: batch.sequences.iter().map(told_by).collect(),
        }
    }
}

fn told_by(sequence: &RaggedSequence<'_>) -> (usize, usize, usize, *const u32, usize) {
    let RaggedSequence {
        start_pos,
        n_tokens,
        block_table,
        rope_variant,
    } = *sequence;
    (
        start_pos,
        n_tokens,
        rope_variant,
        block_table.as_ptr(),
        block_table.len(),
    )
}
