//! What `baton doctor` finds out about a machine by trying it. It changes nothing, and needs no running cluster.

pub mod cuda;
pub mod transfer;
