//! The worker service: what an instance offers to front doors and to other instances, over gRPC. It decides nothing about
//! transfers (the machines in `scheduler` do) and nothing about batches (the step loop does).

mod counters;
mod destination;
mod frames;
mod identity;
mod kv_events;
mod local;
mod membership;
mod mover;
mod open_requests;
mod outlet;
mod peers;
mod service;
mod source;
mod transport;

use std::time::Duration;

use baton_proto::link::LinkOptions;
use baton_scheduler::transfer::MAX_STAGES;

pub use counters::{TransferCounters, TransferTotals};
pub use identity::Identity;
pub use membership::{Membership, Standing, join_registry};
pub use service::{WorkerService, serve};
pub use transport::{
    KvReceiver, KvSender, KvTransports, Offer, Packed, TransportChoice, TransportError, TransportKind, TransportTotals,
};

/// Bounds of a worker's dealings with others.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Connections to other processes.
    pub link: LinkOptions,
    /// A transfer in which nothing moves for this long has failed.
    pub progress_deadline: Duration,
    /// A reader that takes nothing for this long is given up.
    pub stall_deadline: Duration,
    /// How often a source says that it lives, and a membership that nothing changed.
    pub heartbeat: Duration,
    /// How often a membership reports changes.
    pub report_interval: Duration,
    /// By what KV may travel.
    pub kv_transport: TransportChoice,
    /// A request that is paused for a move and hears nothing from its front door ends after this.
    pub resume_deadline: Duration,
    /// KV bytes a second that all moves out of here may send together while their requests still decode; `None` is no
    /// limit.
    pub move_bytes_per_second: Option<u64>,
    /// Stages of a move before its request pauses; with none everything is copied while it stands still.
    pub move_stages: u32,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        WorkerOptions {
            link: LinkOptions::default(),
            progress_deadline: Duration::from_secs(10),
            stall_deadline: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
            report_interval: Duration::from_millis(100),
            kv_transport: TransportChoice::Auto,
            resume_deadline: Duration::from_secs(10),
            move_bytes_per_second: None,
            move_stages: MAX_STAGES,
        }
    }
}

#[cfg(test)]
mod tests;
