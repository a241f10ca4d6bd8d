//! Taking a running request to another instance: its full blocks while it goes on, the rest while it stands still.
//! Moves no bytes; the transfer is done by whoever holds these.

use std::ops::Range;
use std::sync::Arc;

use baton_kernels::KvRead;
use baton_scheduler::batch::GroupId;
use baton_scheduler::ids::{BlockId, Generation as BlockGeneration};
use baton_scheduler::request::{ChoiceState, Failure};
use crossbeam::channel::Sender;
use tokio::sync::oneshot;

use super::command::{Command, WakeOnDrop};
use super::events::silence;
use super::handoff::refused;

/// Blocks of one choice, pinned in every layer.
#[derive(Default)]
pub struct StageBlocks {
    /// One past the last block, in every layer group that has come so far.
    pub end: usize,
    /// Of each layer group.
    pub layer_groups: Vec<GroupBlocks>,
    /// Their contents, of each layer those of its group, as they are as long as any clone lives.
    pub reads: Vec<Vec<KvRead>>,
}

/// Blocks of one choice in one layer group.
#[derive(Default)]
pub struct GroupBlocks {
    /// Places of the blocks in the choice's table.
    pub blocks: Range<usize>,
    /// Which blocks they are here, one for each place.
    pub ids: Vec<(BlockId, BlockGeneration)>,
}

/// What one look at a moving request gave.
#[derive(Default)]
pub struct MoveStage {
    /// One entry for each choice. Of one that has ended, nothing but what is left of the prompt's full blocks, which other
    /// choices may share with it at the destination.
    pub choices: Vec<StageBlocks>,
}

/// A request that stands still.
pub struct PausedMove {
    /// The blocks left, the partial last one of each choice included.
    pub stage: MoveStage,
    /// All that each choice has generated here and before, and how it ended if it has. What was pinned is the KV of all
    /// tokens but the last one of each choice that goes on.
    pub outputs: Vec<ChoiceState>,
}

/// A request that somebody is about to move. It goes no further than was agreed; dropping this lets it.
pub struct HeldRequest {
    pub(super) n_output_tokens: Vec<usize>,
    // Dropped in this order: the loop wakes to a holder that has gone.
    pub(super) _holder: Arc<()>,
    pub(super) _wake: WakeOnDrop,
}

impl HeldRequest {
    /// How many tokens each choice had generated when it was held.
    pub fn n_output_tokens(&self) -> &[usize] {
        &self.n_output_tokens
    }
}

/// The right to move a running request. It goes on until it is paused; dropping this lets a paused one go on.
pub struct RunningMove {
    pub(super) group: GroupId,
    pub(super) n_choices: usize,
    // Dropped in this order: the loop wakes to a mover that has gone.
    pub(super) mover: Arc<()>,
    pub(super) _wake: WakeOnDrop,
    pub(super) commands: Sender<Command>,
}

impl RunningMove {
    /// Choices of the request, those that have ended included.
    pub fn n_choices(&self) -> usize {
        self.n_choices
    }

    /// Pins of each choice, in each layer group, the blocks from `from` on that are full and whose KV is complete. The request goes on; should it
    /// be preempted, what is pinned stays as it is.
    ///
    /// # Errors
    /// `Busy` when a choice has been preempted or all have ended, `Invalid` when `from` cannot be meant for it,
    /// `InstanceLost` or `Internal` when the engine has ended.
    pub async fn pin_full(&mut self, from: &[Vec<u32>]) -> Result<MoveStage, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::PinFull {
            group: self.group,
            mover: Arc::downgrade(&self.mover),
            from: from.to_vec(),
            reply,
        })?;
        answer.await.map_err(|_| silence())?
    }

    /// Takes the request out of the coming steps, and pins the blocks left, the partial last ones included. It keeps its
    /// blocks and places until [`RunningMove::resume`], a drop, or the end of its [`super::Generation`].
    ///
    /// # Errors
    /// As [`RunningMove::pin_full`]; it is not paused then.
    pub async fn pause(&mut self, from: &[Vec<u32>]) -> Result<PausedMove, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Pause {
            group: self.group,
            mover: Arc::downgrade(&self.mover),
            from: from.to_vec(),
            reply,
        })?;
        answer.await.map_err(|_| silence())?
    }

    /// Lets a paused request go on with the token it would have had. What is pinned stays as it is.
    ///
    /// # Errors
    /// `Busy` when the command queue is full: try again, or drop this.
    pub fn resume(&mut self) -> Result<(), Failure> {
        self.send(Command::Resume {
            group: self.group,
            mover: Arc::downgrade(&self.mover),
        })
    }

    fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.try_send(command).map_err(|error| refused(&error))
    }
}
