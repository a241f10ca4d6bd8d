//! Pure scheduling: facts and `now` go in, decisions come out. No I/O, no clock, no threads, no randomness of its own.

pub mod arbiter;
pub mod batch;
pub mod block_events;
pub mod block_pool;
pub mod cost;
pub mod ids;
pub mod layer_groups;
pub mod pacer;
pub mod placement;
pub mod prefix_cache;
pub mod rebalance;
pub mod request;
pub mod simulation;
pub mod timeline;
pub mod transfer;
