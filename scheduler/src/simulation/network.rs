//! What travels between the parties, and how long it takes: ordered streams that are cut with all that is on them, calls
//! that can be lost and doubled, links that are slow.

use crate::ids::{BlockId, Epoch, Generation, Nanos};
use crate::request::{ChoiceState, Failure, Finish, PortableState, Token};
use crate::transfer::{ChoicePlan, EndsBy, KvRange};

/// An instance in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) instance: usize,
    pub(super) incarnation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Party {
    Door,
    Instance(usize),
}

/// What an instance says on a front door's stream.
#[derive(Clone, Debug)]
pub(super) enum Said {
    Token { choice: u32, token: Token },
    ChoiceFinished { choice: u32, finish: Finish },
    Moving,
    MoveCancelled,
    Joined,
    Ended(Result<Finish, (Failure, Option<usize>)>),
}

/// What a front door's call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Generate { prefill: Option<Life> },
    Attach { source: Life },
}

/// A front door's stream to an instance.
#[derive(Debug)]
pub(super) struct EventStream {
    pub(super) request: usize,
    /// Which front door.
    pub(super) door: u64,
    pub(super) to: Life,
    pub(super) asked: Asked,
    pub(super) state: PortableState,
    pub(super) is_open_at_door: bool,
    pub(super) is_cut: bool,
    /// When the last word said arrives: the next comes no sooner.
    pub(super) last_arrival: Nanos,
}

/// One block of one layer on its way.
#[derive(Clone, Debug)]
pub(super) enum Packed {
    Bytes(Vec<u64>),
    /// To be read where it is.
    InPlace(BlockId, Generation),
}

#[derive(Clone, Debug)]
pub(super) enum Frame {
    Accepted(EndsBy),
    Progress(u64),
    Kv(KvRange, Vec<Packed>),
    FirstTokens(Vec<(Token, Option<Finish>)>),
    /// Of each choice the tokens that the destination does not know.
    State(Vec<ChoiceState>),
    Ended(Option<Failure>),
}

impl Frame {
    /// Whether the source hears when the link takes it.
    pub(super) fn is_metered(&self) -> bool {
        !matches!(self, Frame::Accepted(_) | Frame::Ended(_))
    }

    pub(super) fn n_units(&self) -> u64 {
        match self {
            Frame::Kv(_, blocks) => {
                1 + blocks.iter().filter(|block| matches!(block, Packed::Bytes(_))).count() as u64 * 4
            }
            _ => 1,
        }
    }
}

/// What the destination of a transfer asks for.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    Handoff {
        first_blocks: Vec<u32>,
    },
    Migration {
        rooms: Vec<ChoicePlan>,
        n_known: Vec<usize>,
    },
}

/// A transfer's stream from its source.
#[derive(Debug)]
pub(super) struct TransferStream {
    pub(super) request: usize,
    pub(super) state: PortableState,
    pub(super) wanted: Wanted,
    pub(super) from: Life,
    pub(super) to: Life,
    /// Of the destination.
    pub(super) task: u64,
    pub(super) is_open_at_destination: bool,
    pub(super) is_open_at_source: bool,
    pub(super) is_cut: bool,
    pub(super) last_arrival: Nanos,
    pub(super) busy_until: Nanos,
}

/// An event, with the party that it happens to.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// At a front door of this life.
    Door(u64, AtDoor),
    /// At whatever incarnation of an instance listens when it arrives.
    Call(usize, Call),
    /// At this incarnation of an instance.
    Instance(Life, AtInstance),
    /// In the world.
    World(InWorld),
}

#[derive(Clone, Debug)]
pub(super) enum AtDoor {
    Answered {
        stream: usize,
    },
    NoAnswer {
        stream: usize,
    },
    Word {
        stream: usize,
        epoch: Epoch,
        said: Said,
    },
    Broken {
        stream: usize,
    },
    ResumeAnswered {
        request: usize,
        epoch: Epoch,
        /// False when nobody answered in time.
        is_told: bool,
    },
    Joined {
        life: Life,
    },
    Left {
        life: Life,
    },
    Report {
        life: Life,
        report: Box<Report>,
    },
    ArbiterTick {
        request: usize,
    },
    QueueWait {
        request: usize,
        placing: u32,
    },
    TryAgain {
        request: usize,
        placing: u32,
    },
    DeadlinePasses {
        request: usize,
    },
    Round,
}

#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) load: crate::placement::InstanceLoad,
    pub(super) prefix: Vec<crate::prefix_cache::PrefixEvent>,
}

#[derive(Clone, Debug)]
pub(super) enum Call {
    Open {
        stream: usize,
    },
    Transfer {
        transfer: usize,
    },
    Resume {
        door: u64,
        request: usize,
        to: Life,
        epoch: Epoch,
        is_answered: bool,
    },
}

#[derive(Clone, Debug)]
pub(super) enum AtInstance {
    Round,
    StepDone,
    StreamClosed {
        stream: usize,
    },
    Frame {
        transfer: usize,
        frame: Frame,
    },
    /// To the destination.
    TransferBroken {
        transfer: usize,
        reason: &'static str,
    },
    /// To the source.
    TransferClosed {
        transfer: usize,
    },
    Taken {
        transfer: usize,
    },
    TaskTimer {
        task: u64,
    },
    Heartbeat {
        transfer: usize,
    },
    MoverDeadline {
        transfer: usize,
    },
    MoverWord {
        transfer: usize,
        epoch: Epoch,
    },
    Report,
}

#[derive(Clone, Debug)]
pub(super) enum InWorld {
    Arrives {
        request: usize,
    },
    ClientLeaves {
        request: usize,
    },
    Fault,
    AimedFault {
        request: usize,
    },
    /// Somebody who saw a move fail tries again.
    MoveAgain {
        request: usize,
    },
    Recovers(super::faults::Recovery),
    Operator,
}
