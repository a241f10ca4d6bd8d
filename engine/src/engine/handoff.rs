//! The two halves of a handoff on their instances: blocks reserved to be written, and a prefill whose KV is read.
//! Moves no bytes; the transfer is done by whoever holds these.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use baton_kernels::{KvRead, KvWrite};
use baton_scheduler::batch::{GroupId, Numerics};
use baton_scheduler::ids::{BlockId, Generation as BlockGeneration};
use baton_scheduler::request::{ChoiceState, Failure, Finish, Token, TokenLogprobs};
use crossbeam::channel::{Sender, TrySendError};
use futures::Stream;
use tokio::sync::mpsc;

use super::command::{Arrived, Command, WakeOnDrop};
use super::events::{EngineEvent, Generation, Timed, silence};

/// What is reserved for one choice, or for the one context of a handoff.
pub struct ReservedChoice {
    /// Handoff: blocks of the context. Move: blocks there is room for, slack included.
    pub n_blocks_total: usize,
    /// What of them is to be written, in each layer group.
    pub layer_groups: Vec<ReservedBlocks>,
}

/// What is reserved for one choice in the layers of one group.
pub struct ReservedBlocks {
    /// Leading blocks that need not be sent: this instance has them, an earlier choice receives them, or no query will see them.
    /// Of a choice that has ended, the prompt's full blocks.
    pub n_blocks_held: usize,
    /// The blocks to be written, in order: those from `n_blocks_held` on.
    pub grant: Vec<(BlockId, BlockGeneration)>,
    /// Their writers, in the same order. Take them; all must be sealed or dropped before the join.
    pub writers: Vec<KvWrite>,
}

/// Blocks reserved for a request that another instance prefills, or generates so far. Dropping it frees them; those whose
/// writer still lives are reused only after that.
pub struct Reservation {
    /// Handoff: one entry, the context of all choices. Move: one for each choice.
    pub choices: Vec<ReservedChoice>,
    pub(super) group: GroupId,
    pub(super) events: mpsc::Receiver<Timed<EngineEvent>>,
    pub(super) wake: WakeOnDrop,
    pub(super) commands: Sender<Command>,
}

impl Reservation {
    /// All KV of a handoff is written and `first` was sampled from it, one token for each choice: they decode from the next
    /// step on. The generation begins after them, they are not repeated; a choice whose first token is its last is finished
    /// at once.
    ///
    /// # Errors
    /// `Busy` when the step loop's commands do not keep up, `Internal` when it has ended.
    pub fn join(self, first: Vec<Token>, numerics: Numerics) -> Result<Generation, Failure> {
        self.join_with(Arrived::First(first), numerics)
    }

    /// All KV of a move is written, of each choice that goes on that of all its `outputs` but the last token: they decode
    /// from the next step on. `outputs` are whole, one entry for each choice; the generation begins after them and repeats
    /// none. A choice that ended since the reservation is told as finished, and what was reserved for it is freed.
    ///
    /// # Errors
    /// As [`Reservation::join`].
    pub fn join_moved(self, outputs: Vec<ChoiceState>, numerics: Numerics) -> Result<Generation, Failure> {
        self.join_with(Arrived::Outputs(outputs), numerics)
    }

    fn join_with(self, arrived: Arrived, numerics: Numerics) -> Result<Generation, Failure> {
        let Reservation {
            choices,
            group,
            events,
            wake,
            commands,
        } = self;
        let groups = choices.into_iter().flat_map(|choice| choice.layer_groups);
        groups.flat_map(|group| group.writers).for_each(KvWrite::seal);
        commands
            .try_send(Command::Join {
                group,
                arrived,
                numerics,
            })
            .map_err(|error| refused(&error))?;
        Ok(Generation {
            events,
            _wake: wake,
            has_ended: false,
        })
    }
}

/// What happens to a prefill that will be handed over, in order. Ends with `FirstTokens` or `Failed`.
pub enum PrefillEvent {
    /// The first chunk of its context is in the coming step.
    Started {
        /// Leading tokens that this instance's prefix cache had.
        n_cached_tokens: usize,
    },
    /// The KV of these blocks is complete in this layer. Each (layer, block) from the first wanted block on comes once,
    /// in order in its layer.
    LayerReady {
        /// The layer.
        layer: usize,
        /// Places of the blocks in the sequence.
        blocks: Range<usize>,
        /// Their contents, one for each block, pinned as long as any clone lives.
        reads: Vec<KvRead>,
    },
    /// Log-probabilities of the prompt's tokens after the first, `[n_prompt - 1]`.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// The token after the context of each choice, after every `LayerReady`, and whether it ends the choice.
    FirstTokens(Vec<(Token, Option<Finish>)>),
    /// It ended badly.
    Failed(Failure),
}

impl PrefillEvent {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, PrefillEvent::FirstTokens(_) | PrefillEvent::Failed(_))
    }
}

/// A prefill under way. Its blocks stay its own until it is dropped, at any time; what is pinned stays until unpinned.
pub struct PrefillJob {
    // Dropped in this order: the loop wakes to a closed channel.
    pub(super) events: mpsc::Receiver<Timed<PrefillEvent>>,
    pub(super) _wake: WakeOnDrop,
    pub(super) has_ended: bool,
    pub(super) n_blocks: usize,
}

impl PrefillJob {
    /// Blocks of the whole context, those not wanted included.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// The next event; `None` after the terminal one. Cancel safe.
    pub async fn next(&mut self) -> Option<Timed<PrefillEvent>> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Timed<PrefillEvent>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|timed| {
            let timed = timed.unwrap_or_else(|| Timed {
                at: Instant::now(),
                event: PrefillEvent::Failed(silence()),
            });
            self.has_ended = timed.event.is_terminal();
            Some(timed)
        })
    }
}

impl Stream for PrefillJob {
    type Item = Timed<PrefillEvent>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Timed<PrefillEvent>>> {
        self.poll_event(context)
    }
}

/// Why a command could not be given.
pub(super) fn refused(error: &TrySendError<Command>) -> Failure {
    match error {
        TrySendError::Full(_) => Failure::Busy("the engine's command queue is full".to_owned()),
        TrySendError::Disconnected(_) => Failure::Internal("the step loop has ended".to_owned()),
    }
}
