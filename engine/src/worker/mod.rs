//! The worker service: what an instance offers to front doors and to other instances, over gRPC. It decides nothing about
//! transfers (the machines in `scheduler` do) and nothing about batches (the step loop does).

mod counters;
mod destination;
mod identity;
mod local;
mod membership;
mod outlet;
mod peers;
mod service;
mod source;
mod transport;

use std::time::Duration;

use baton_proto::link::LinkOptions;

pub use counters::{TransferCounters, TransferTotals};
pub use identity::Identity;
pub use membership::{Membership, Standing, join_registry};
pub use service::{WorkerService, serve};
pub use transport::{GrpcTransport, KvTransport, TransportError};

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
}

impl Default for WorkerOptions {
    fn default() -> Self {
        WorkerOptions {
            link: LinkOptions::default(),
            progress_deadline: Duration::from_secs(10),
            stall_deadline: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
            report_interval: Duration::from_millis(100),
        }
    }
}

#[cfg(test)]
mod tests;
