//! What travels between the parties: ordered streams that are cut with all that is on them, and calls.

use std::collections::VecDeque;

use baton_scheduler::ids::Epoch;
use baton_scheduler::request::Failure;
use baton_scheduler::transfer::{ChoicePlan, KvRange};

/// An instance in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Life {
    pub instance: usize,
    pub incarnation: u32,
}

/// What is known of a choice: how many tokens, and whether it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Output {
    pub n_tokens: u32,
    pub has_ended: bool,
}

/// What an instance says to a front door.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Said {
    Token { choice: u32, index: u32 },
    ChoiceFinished { choice: u32 },
    Finished,
    Failed(Failure),
    Moving,
    MoveCancelled,
    Joined,
}

/// A call that opens a front door's stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    pub epoch: Epoch,
    pub known: Vec<Output>,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Local,
    Handoff { prefill: Life },
    Attach { source: Life },
}

/// A front door's stream. The default is one that both ends have forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EventStream {
    pub to: Option<Life>,
    /// Until the call is served.
    pub opening: Option<Opening>,
    pub words: VecDeque<(Epoch, Said)>,
    pub is_open_at_door: bool,
    pub is_open_at_instance: bool,
    pub is_cut: bool,
}

/// A frame of a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Frame {
    Accepted,
    Kv(KvRange),
    FirstTokens,
    State(Vec<Output>),
    Ended(Option<Failure>),
}

impl Frame {
    /// Whether the source hears when the link takes it.
    pub fn is_metered(&self) -> bool {
        matches!(self, Frame::Kv(_) | Frame::FirstTokens | Frame::State(_))
    }
}

/// What the destination of a transfer asks for, of each choice: first block and room, and tokens known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    pub is_migration: bool,
    pub rooms: Vec<ChoicePlan>,
    pub known: Vec<Output>,
}

/// A transfer's stream. The default is one that both ends have forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TransferStream {
    pub from: Option<Life>,
    /// Until the call is served.
    pub opening: Option<Wanted>,
    pub frames: VecDeque<Frame>,
    pub is_open_at_destination: bool,
    pub is_open_at_source: bool,
    pub is_cut: bool,
}

/// A front door's word to a source, and the answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResumeCall {
    pub to: Life,
    pub epoch: Epoch,
    pub stage: CallStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallStage {
    /// On its way; `is_awaited` unless nobody wants the answer any more.
    Asked,
    Answered {
        is_told: bool,
    },
}
