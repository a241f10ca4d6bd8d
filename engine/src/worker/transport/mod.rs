//! How bytes of KV get from one instance's blocks into another's. Control is always gRPC; this is only the payload, and
//! it decides neither what travels nor when.
//!
//! Each instance has one [`KvTransports`]. A transfer uses it so:
//!
//! 1. The destination asks [`KvTransports::offer`] what it can take from the source (which may map the source's memory,
//!    the first time), and puts [`Offer::to_wire`] into its request.
//! 2. The source gets a [`KvSender`] from [`KvTransports::sender`], and says `sender.kind().as_str()` in
//!    `Accepted.transport`.
//! 3. The destination gets a [`KvReceiver`] from [`KvTransports::receiver`] when it hears that.
//! 4. The source packs ranges of pinned blocks into frames. Where [`TransportKind::ends_by`] is the destination, which then
//!    reads memory of the source, the source keeps the [`Packed::pins`] *and the sender* until the destination has
//!    closed the stream, not just until its last frame is sent. A source that goes on by itself, or appends to a block it
//!    packed, drops the pins and calls [`KvSender::release`] before.
//! 5. The destination lands each frame in the writers of the blocks meant. An error ends the transfer: the blocks hold
//!    anything then.
//!
//! What both ends can do is used, the best first; nothing falls back silently. A transport that was asked for by name and
//! cannot be had is an error ([`TransportError::Impossible`]).

mod counters;
mod endpoint;
mod grpc;
mod handover;
mod in_place;
mod in_process;
mod mappings;
mod staged;

use std::fmt;
use std::str::FromStr;

use baton_kernels::{KernelError, KvRead, KvWrite};
use baton_proto::cluster::KvFrame;
use baton_proto::link::KV_FRAME_BYTES;
use baton_scheduler::request::Failure;
use baton_scheduler::transfer::{EndsBy, KvRange};

pub use counters::TransportTotals;
pub use endpoint::{KvTransports, Offer};

/// Runs what may wait for a device, on this thread; other tasks of the runtime go on elsewhere meanwhile.
fn beside_others<R>(waits: bool, work: impl FnOnce() -> R) -> R {
    if waits {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

/// A way for bytes of KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransportKind {
    /// Between instances of one process: pinned blocks are handed over, and copied once.
    InProcess,
    /// Between processes of one host on one card, or on two that reach each other's memory: the source's blocks are mapped and
    /// copied once, from card to card.
    CudaIpc,
    /// Between processes of one host: the source's blocks are read in place, and copied once; those of a card are read from
    /// memory of the host to which it has copied them.
    SharedMemory,
    /// Anywhere: the bytes travel inside the frame.
    Grpc,
}

impl TransportKind {
    /// All of them, the best first.
    pub const ALL: [TransportKind; 4] = [
        TransportKind::InProcess,
        TransportKind::CudaIpc,
        TransportKind::SharedMemory,
        TransportKind::Grpc,
    ];

    /// Its name on the wire, on command lines and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            TransportKind::InProcess => "in-process",
            TransportKind::CudaIpc => "cuda-ipc",
            TransportKind::SharedMemory => "shared-memory",
            TransportKind::Grpc => "grpc",
        }
    }

    /// Who ends a transfer that went well: whoever needs the source's blocks last.
    pub const fn ends_by(self) -> EndsBy {
        match self {
            TransportKind::Grpc => EndsBy::Source,
            TransportKind::InProcess | TransportKind::CudaIpc | TransportKind::SharedMemory => EndsBy::Destination,
        }
    }

    /// Aimed size of the blocks that one frame stands for. A frame that carries them is bounded by what a connection should
    /// have on its way; one that only names them, by how long its copy may keep a thread of the runtime.
    pub const fn frame_bytes(self) -> usize {
        match self {
            TransportKind::Grpc => KV_FRAME_BYTES,
            // About 0.3 ms.
            TransportKind::InProcess | TransportKind::CudaIpc | TransportKind::SharedMemory => 4 * KV_FRAME_BYTES,
        }
    }

    /// Whether it is for KV in the memory of cards alone.
    pub const fn needs_card(self) -> bool {
        match self {
            TransportKind::CudaIpc => true,
            TransportKind::InProcess | TransportKind::SharedMemory | TransportKind::Grpc => false,
        }
    }

    /// The one of this name.
    pub fn from_name(name: &str) -> Option<TransportKind> {
        TransportKind::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which transports an instance may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// The best that both ends can do.
    #[default]
    Auto,
    /// This one or none.
    Only(TransportKind),
}

impl TransportChoice {
    /// Whether `kind` may be used.
    pub fn allows(self, kind: TransportKind) -> bool {
        match self {
            TransportChoice::Auto => true,
            TransportChoice::Only(only) => only == kind,
        }
    }
}

impl fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TransportChoice::Auto => f.write_str("auto"),
            TransportChoice::Only(kind) => kind.fmt(f),
        }
    }
}

impl FromStr for TransportChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<TransportChoice, String> {
        let only = || TransportKind::from_name(text).map(TransportChoice::Only);
        let choice = if text == "auto" {
            Some(TransportChoice::Auto)
        } else {
            only()
        };
        choice.ok_or_else(|| format!("found {text:?}, expected auto, grpc, shared-memory, cuda-ipc or in-process"))
    }
}

/// KV that cannot be sent, or does not land.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Both ends together cannot do what one of them must.
    #[error("KV transport {wanted} to or from {peer}: {reason}")]
    Impossible {
        /// What was asked for.
        wanted: TransportChoice,
        /// The other end.
        peer: String,
        /// Why not.
        reason: String,
    },
    /// The payload has another size than its range.
    #[error("KV frame of layer {layer} has {found} bytes, expected {expected}")]
    Size {
        /// The frame's layer.
        layer: u32,
        /// Its bytes.
        found: usize,
        /// Bytes of its range.
        expected: usize,
    },
    /// The payload is not what was sent.
    #[error("KV frame of layer {layer} has checksum {found:016x}, expected {expected:016x}")]
    Checksum {
        /// The frame's layer.
        layer: u32,
        /// Of the data that came.
        found: u64,
        /// As the sender says.
        expected: u64,
    },
    /// The frame does not say what its transport needs.
    #[error("KV frame of layer {layer}: {reason}")]
    Malformed {
        /// The frame's layer.
        layer: u32,
        /// What is missing or wrong.
        reason: &'static str,
    },
    /// Memory of the source was given to another use before it was copied.
    #[error("KV frame of layer {layer}: {error}")]
    Stale {
        /// The frame's layer.
        layer: u32,
        /// Which block or slot.
        error: KernelError,
    },
    /// Nothing lies under the ticket: taken already, taken back, or of another process.
    #[error("KV frame of layer {layer}: no blocks under ticket {ticket:#x}")]
    Ticket {
        /// The frame's layer.
        layer: u32,
        /// Its ticket.
        ticket: u64,
    },
    /// Too much waits to be fetched in this process.
    #[error("{n} KV frames wait in this process to be fetched, which is the limit")]
    Full {
        /// How many.
        n: usize,
    },
    /// The reserved block refused the write.
    #[error("writing received KV: {0}")]
    Write(#[from] KernelError),
}

impl TransportError {
    /// Why a copy out of the source's memory, for a frame of that layer, has failed.
    fn of_copy(layer: u32, error: KernelError) -> TransportError {
        match error {
            KernelError::Stale { .. } | KernelError::StaleSlot { .. } => TransportError::Stale { layer, error },
            error => TransportError::Write(error),
        }
    }

    /// What the request is told.
    pub fn failure(&self) -> Failure {
        match self {
            TransportError::Impossible { .. } => Failure::Incompatible(self.to_string()),
            TransportError::Full { .. } => Failure::Busy(self.to_string()),
            _ => Failure::InstanceLost(self.to_string()),
        }
    }
}

/// A frame, and what must stay as it is until the destination has closed the stream.
pub struct Packed {
    /// To be sent.
    pub frame: KvFrame,
    /// To be held until the stream closes.
    pub pins: Vec<KvRead>,
    /// KV bytes that travel by it, inside the frame or not.
    pub n_bytes: u64,
}

/// The source's half of one transfer.
pub trait KvSender: Send + Sync {
    /// Which transport this is.
    fn kind(&self) -> TransportKind;

    /// Aimed size of the blocks that one frame stands for.
    fn frame_bytes(&self) -> usize {
        self.kind().frame_bytes()
    }

    /// The frame that makes these blocks arrive; `reads` are the range's blocks, in order.
    ///
    /// # Errors
    /// When there is no room for it.
    fn pack(&mut self, range: KvRange, reads: Vec<KvRead>) -> Result<Packed, TransportError>;

    /// Takes back what was packed and not fetched. Its drop does so too.
    fn release(&mut self) {}
}

/// The destination's half of one transfer.
pub trait KvReceiver: Send + Sync {
    /// Which transport this is.
    fn kind(&self) -> TransportKind;

    /// Makes a frame's blocks land in `writers`, the range's reserved blocks in order, where the frame's layer lies in `slot`.
    /// Returns the KV bytes moved.
    ///
    /// # Errors
    /// A frame that is not what it should be, or a block that refuses the write. The writers' blocks hold anything then.
    fn land(&mut self, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError>;
}

#[cfg(test)]
mod tests;
