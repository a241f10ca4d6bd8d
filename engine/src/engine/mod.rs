//! One instance's engine: a thread that owns device, KV cache and batch scheduler, and the handles others hold on it.
//! Knows sequences and blocks; no peers, no text, no transfer protocol.
//!
//! An [`EngineHandle`] sends commands through a bounded channel. What comes back goes through one bounded channel for each
//! sequence, large enough for all it can ever say, so that the step loop never waits for a reader. Dropping the reading end
//! (a [`Generation`], [`Reservation`] or [`PrefillJob`]) cancels the sequence before the step after the next.

mod command;
mod events;
mod handle;
mod handoff;
#[cfg(test)]
pub(crate) mod hash_model;
mod load;
mod open_sequence;
mod step;
mod step_loop;
#[cfg(test)]
mod tests;
mod watchdog;

pub use events::{EngineEvent, Generation, Timed};
pub use handle::{EngineConfig, EngineError, EngineHandle, start};
pub use handoff::{PrefillEvent, PrefillJob, Reservation};
pub use load::{EngineCounters, LoadReport};
pub use watchdog::Health;

pub use baton_scheduler::batch::Numerics;
