//! The transfer state machine: facts in, actions out, on both ends of a handoff or a migration. It moves no bytes and
//! owns no stream.
//!
//! The destination reserves, opens one stream to the source, and pulls; the life of the stream is the lease. Every state
//! ends by a fact that someone owes within a deadline, or by a tick. A handoff's source ([`Source`]) sends what its
//! prefill completes; a migration's ([`MigrationSource`]) what a running group of choices has, while it goes on. Both
//! feed one [`Destination`].

mod destination;
mod link;
mod migration;
mod source;

use serde::{Deserialize, Serialize};

pub use destination::{Destination, DestinationAction, DestinationFact, OwedBlocks, RefusedFrame};
pub use migration::{FEW_BLOCKS, MAX_STAGES, MigrationAction, MigrationFact, MigrationLimits, MigrationSource, Pacing};
pub use source::{EndsBy, Source, SourceAction, SourceFact};

/// Identity of a transfer, unique at its destination within one incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TransferId(pub u64);

/// Consecutive blocks of one choice in one layer; indexes into its block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvRange {
    /// The choice whose block table is meant; 0 in a handoff, where all choices share one context.
    pub choice: u32,
    /// The layer.
    pub layer: u32,
    /// First block.
    pub first_block: u32,
    /// How many, at least 1.
    pub n_blocks: u32,
}

impl KvRange {
    /// One past the last block.
    pub const fn end_block(&self) -> u32 {
        self.first_block + self.n_blocks
    }
}

/// What may travel of one choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChoicePlan {
    /// Blocks before this one are already at the destination.
    pub first_block: u32,
    /// Handoff: blocks of the context. Migration: blocks the destination has reserved, which the context may not outgrow.
    /// Those before `first_block` are counted in.
    pub n_blocks: u32,
}

/// What travels: in each layer, of each choice, the blocks from `first_block` on; perhaps none, when the destination
/// holds them all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransferPlan {
    /// Layers of the model.
    pub n_layers: u32,
    /// A handoff has one, whatever the number of choices; a migration one for each.
    pub choices: Vec<ChoicePlan>,
}

impl TransferPlan {
    /// A handoff's plan: one context.
    pub fn handoff(n_layers: u32, first_block: u32, n_blocks: u32) -> TransferPlan {
        TransferPlan {
            n_layers,
            choices: vec![ChoicePlan { first_block, n_blocks }],
        }
    }

    fn check(&self) {
        assert!(
            self.choices.iter().all(|choice| choice.first_block <= choice.n_blocks),
            "more blocks held than there are: {self:?}"
        );
    }

    /// The first block owed of every choice.
    fn firsts(&self) -> Vec<u32> {
        self.choices.iter().map(|choice| choice.first_block).collect()
    }
}

#[cfg(test)]
mod tests;
