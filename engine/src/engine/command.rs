//! What handles ask of the step loop.

use baton_kernels::KvWrite;
use baton_scheduler::batch::{Grant, Numerics};
use baton_scheduler::ids::SequenceId;
use baton_scheduler::prefix_cache::PrefixEvent;
use baton_scheduler::request::{Failure, PortableState, Token};
use crossbeam::channel::Sender;
use tokio::sync::{mpsc, oneshot};

use super::events::{EngineEvent, Timed};
use super::handoff::PrefillEvent;
use super::load::OpenPermit;

/// What a granted reservation has, with the means to write it.
pub(super) struct Granted {
    pub(super) sequence: SequenceId,
    pub(super) grant: Grant,
    pub(super) writers: Vec<KvWrite>,
}

/// What part of the prefix cache's history is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PrefixQuery {
    Changes,
    Everything,
}

pub(super) enum Command {
    Generate {
        state: Box<PortableState>,
        events: mpsc::Sender<Timed<EngineEvent>>,
        permit: OpenPermit,
    },
    Prefill {
        state: Box<PortableState>,
        first_block: usize,
        events: mpsc::Sender<Timed<PrefillEvent>>,
        permit: OpenPermit,
    },
    Reserve {
        state: Box<PortableState>,
        events: mpsc::Sender<Timed<EngineEvent>>,
        reply: oneshot::Sender<Result<Granted, Failure>>,
        permit: OpenPermit,
    },
    Join {
        sequence: SequenceId,
        first: Token,
        numerics: Numerics,
    },
    PrefixEvents {
        query: PrefixQuery,
        reply: oneshot::Sender<Vec<PrefixEvent>>,
    },
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
