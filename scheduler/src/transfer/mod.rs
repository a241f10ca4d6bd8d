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
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChoicePlan {
    /// Of each layer group, the first block that is owed: those before it are already at the destination, or no query there will
    /// see them.
    pub first_blocks: Vec<u32>,
    /// Handoff: blocks of the context. Migration: blocks the destination has reserved, which the context may not outgrow.
    /// Those before `first_blocks` are counted in.
    pub n_blocks: u32,
}

/// What travels: in each layer, of each choice, the blocks from its group's first on; perhaps none, when the destination holds
/// them all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransferPlan {
    /// Of each layer of the model, its group.
    pub layer_groups: Vec<u32>,
    /// A handoff has one, whatever the number of choices; a migration one for each.
    pub choices: Vec<ChoicePlan>,
}

impl TransferPlan {
    /// A handoff's plan: one context.
    pub fn handoff(layer_groups: Vec<u32>, first_blocks: Vec<u32>, n_blocks: u32) -> TransferPlan {
        TransferPlan {
            layer_groups,
            choices: vec![ChoicePlan { first_blocks, n_blocks }],
        }
    }

    /// The first block owed of a choice in a layer.
    pub fn first_block(&self, choice: u32, layer: u32) -> u32 {
        let layer_group = self.layer_groups[layer as usize];
        self.choices[choice as usize].first_blocks[layer_group as usize]
    }

    fn check(&self) {
        let n_groups = self.layer_groups.iter().max().map_or(0, |last| *last as usize + 1);
        for choice in &self.choices {
            assert!(
                choice.first_blocks.len() == n_groups,
                "{n_groups} layer groups, expected a first block of each: {self:?}"
            );
            assert!(
                choice.first_blocks.iter().all(|first| *first <= choice.n_blocks),
                "more blocks held than there are: {self:?}"
            );
        }
    }

    /// The first block owed of every choice in each layer, `[n_choices][n_layers]`.
    fn firsts_of_layers(&self) -> Vec<Vec<u32>> {
        let of_choice = |choice: &ChoicePlan| {
            let groups = self.layer_groups.iter();
            groups.map(|&group| choice.first_blocks[group as usize]).collect()
        };
        self.choices.iter().map(of_choice).collect()
    }

    /// The first block owed of every choice in each layer group, `[n_choices][n_groups]`.
    fn firsts(&self) -> Vec<Vec<u32>> {
        self.choices.iter().map(|choice| choice.first_blocks.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
