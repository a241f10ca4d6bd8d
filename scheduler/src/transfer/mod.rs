//! The transfer state machine: facts in, actions out, on both ends of a handoff. It moves no bytes and owns no stream.
//!
//! The destination reserves, opens one stream to the source, and pulls; the life of the stream is the lease. Every state
//! ends by a fact that someone owes within a deadline, or by [`DestinationFact::Tick`] and [`SourceFact::Tick`].

mod destination;
mod source;

use serde::{Deserialize, Serialize};

pub use destination::{Destination, DestinationAction, DestinationFact, RefusedFrame};
pub use source::{Source, SourceAction, SourceFact};

/// Identity of a transfer, unique at its destination within one incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TransferId(pub u64);

/// Consecutive blocks of a sequence in one layer; indexes into its block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvRange {
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

/// What travels: in each layer the blocks from `first_block` up to `n_blocks`; none when the destination holds them all,
/// and then only the token is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransferPlan {
    /// Layers of the model.
    pub n_layers: u32,
    /// Blocks before this one are already at the destination.
    pub first_block: u32,
    /// Blocks of the sequence that hold its prompt.
    pub n_blocks: u32,
}

impl TransferPlan {
    /// (layer, block) pairs that travel.
    pub const fn n_layer_blocks(&self) -> u64 {
        (self.n_blocks - self.first_block) as u64 * self.n_layers as u64
    }
}

#[cfg(test)]
mod tests;
