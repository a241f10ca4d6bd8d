//! What handles ask of the step loop.

use std::sync::Weak;

use baton_scheduler::batch::{GroupId, MoveRoom, Numerics};
use baton_scheduler::ids::RequestId;
use baton_scheduler::prefix_cache::PrefixEvent;
use baton_scheduler::request::{ChoiceState, Failure, Token};
use crossbeam::channel::Sender;
use tokio::sync::{mpsc, oneshot};

use super::block_watch::Changes;
use super::events::{EngineEvent, Timed};
use super::handoff::{PrefillEvent, ReservedChoice};
use super::load::OpenPermit;
use super::moving::{MoveStage, PausedMove};
use super::prepared::Prepared;

/// What a granted reservation has, with the means to write it.
pub(super) struct Granted {
    pub(super) group: GroupId,
    pub(super) choices: Vec<ReservedChoice>,
}

/// What a reservation is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Handoff,
    Move(MoveRoom),
}

/// What a reservation waits for besides its KV.
pub(super) enum Arrived {
    /// The first token of each choice.
    First(Vec<Token>),
    /// All that each choice has generated.
    Outputs(Vec<ChoiceState>),
}

/// What part of the prefix cache's history is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PrefixQuery {
    Changes,
    Everything,
}

/// A running group, and the life of who moves it.
pub(super) struct StartedMove {
    pub(super) group: GroupId,
    pub(super) n_choices: usize,
}

pub(super) enum Command {
    Generate {
        state: Box<Prepared>,
        events: mpsc::Sender<Timed<EngineEvent>>,
        permit: OpenPermit,
    },
    Prefill {
        state: Box<Prepared>,
        first_blocks: Vec<usize>,
        events: mpsc::Sender<Timed<PrefillEvent>>,
        permit: OpenPermit,
    },
    Reserve {
        state: Box<Prepared>,
        purpose: Purpose,
        events: mpsc::Sender<Timed<EngineEvent>>,
        reply: oneshot::Sender<Result<Granted, Failure>>,
        permit: OpenPermit,
    },
    Embed {
        state: Box<Prepared>,
        answer: oneshot::Sender<Result<Vec<f32>, Failure>>,
        permit: OpenPermit,
    },
    Join {
        group: GroupId,
        arrived: Arrived,
        numerics: Numerics,
    },
    /// How many tokens each choice has, and from here on at most so many more.
    Hold {
        request: RequestId,
        n_tokens: usize,
        /// Dead once the holder has gone.
        holder: Weak<()>,
        reply: oneshot::Sender<Result<Vec<usize>, Failure>>,
    },
    StartMove {
        request: RequestId,
        /// Blocks that the destination has for each choice.
        room: Vec<usize>,
        /// Dead once the mover has gone.
        mover: Weak<()>,
        reply: oneshot::Sender<Result<StartedMove, Failure>>,
    },
    PinFull {
        group: GroupId,
        mover: Weak<()>,
        from: Vec<Vec<u32>>,
        reply: oneshot::Sender<Result<MoveStage, Failure>>,
    },
    Pause {
        group: GroupId,
        mover: Weak<()>,
        from: Vec<Vec<u32>>,
        reply: oneshot::Sender<Result<PausedMove, Failure>>,
    },
    Resume {
        group: GroupId,
        mover: Weak<()>,
    },
    PrefixEvents {
        query: PrefixQuery,
        reply: oneshot::Sender<Vec<PrefixEvent>>,
    },
    WatchBlocks(mpsc::Sender<Changes>),
    /// Something was dropped: look again.
    Wake,
}

/// Wakes the step loop when dropped, so that what was dropped before it is noticed at once. When the channel is full
/// the loop is about to look anyway.
pub(super) struct WakeOnDrop(pub(super) Sender<Command>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        let _ = self.0.try_send(Command::Wake);
    }
}
