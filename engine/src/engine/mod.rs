//! One instance's engine: a thread that owns device, KV cache and batch scheduler, and the handles others hold on it.
//! Knows requests, their choices and blocks; no peers, no text, no transfer protocol.
//!
//! An [`EngineHandle`] sends commands through a bounded channel. What comes back goes through one bounded channel for each
//! request, large enough for all it can ever say, so that the step loop never waits for a reader. Dropping the reading end
//! (a [`Generation`], [`Reservation`] or [`PrefillJob`]) cancels the request before the next step is launched. Dropping a
//! [`RunningMove`] cancels nothing: a paused request goes on.

mod block_watch;
mod command;
mod device_clock;
mod events;
mod handle;
mod handoff;
#[cfg(test)]
pub(crate) mod hash_model;
mod hidden_sum;
mod load;
mod moving;
mod open_group;
mod prepared;
mod step;
mod step_arrivals;
mod step_loop;
mod step_masks;
mod step_moves;
#[cfg(test)]
mod tests;
#[cfg(test)]
#[path = "tests/mod.rs"]
#[allow(clippy::duplicate_mod, reason = "all of it again, over a model that runs ahead")]
mod tests_ahead;
mod watchdog;

pub use block_watch::BlockWatch;
pub use events::{EngineEvent, Generation, Timed};
pub use handle::{AsyncScheduling, EngineConfig, EngineError, EngineHandle, start};
pub use handoff::{PrefillEvent, PrefillJob, Reservation, ReservedBlocks, ReservedChoice};
pub use load::{EngineCounters, LoadReport};
pub use moving::{GroupBlocks, HeldRequest, MoveStage, PausedMove, RunningMove, StageBlocks};
pub use prepared::Prepared;
pub use watchdog::Health;

pub use baton_scheduler::batch::Numerics;
