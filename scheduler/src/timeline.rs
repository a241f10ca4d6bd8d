//! The moments of a request's life, as seen by the front door. Durations come from pairs of moments.

use serde::{Deserialize, Serialize};

use crate::ids::Nanos;

/// A moment in a request's life, in the order they usually come. Append only: the names are in metrics and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The front door has read the request.
    Received,
    /// Validated, rendered and tokenized.
    Tokenized,
    /// An admission permit was granted.
    Admitted,
    /// The policy named its instances.
    Placed,
    /// The decode instance holds blocks for it.
    Reserved,
    /// The first chunk of its prompt entered a batch.
    PrefillStarted,
    /// The last chunk of its prompt was computed.
    PrefillFinished,
    /// The first KV frame left the prefill instance.
    TransferStarted,
    /// The last KV frame reached the decode instance.
    TransferFinished,
    /// The sequence joined a decode batch.
    Joined,
    /// The first token was handed to the client.
    FirstToken,
    /// The terminal state was reached.
    Finished,
}

impl Moment {
    /// Every moment, in order.
    pub const ALL: [Moment; 12] = [
        Moment::Received,
        Moment::Tokenized,
        Moment::Admitted,
        Moment::Placed,
        Moment::Reserved,
        Moment::PrefillStarted,
        Moment::PrefillFinished,
        Moment::TransferStarted,
        Moment::TransferFinished,
        Moment::Joined,
        Moment::FirstToken,
        Moment::Finished,
    ];
}

/// When each moment of one request came, on one clock. A later attempt overwrites an earlier one's moments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    at: [Option<Nanos>; Moment::ALL.len()],
}

impl Timeline {
    /// Records `moment` at `now`.
    pub fn mark(&mut self, moment: Moment, now: Nanos) {
        self.at[moment as usize] = Some(now);
    }

    /// When `moment` came, if it has.
    pub fn at(&self, moment: Moment) -> Option<Nanos> {
        self.at[moment as usize]
    }

    /// Time from `from` to `to`, when both have come.
    pub fn between(&self, from: Moment, to: Moment) -> Option<Nanos> {
        Some(self.at(to)?.saturating_sub(self.at(from)?))
    }
}
