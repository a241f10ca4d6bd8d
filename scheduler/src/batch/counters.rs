//! What the batch scheduler reports of itself. Plain numbers; others export them.

use serde::{Deserialize, Serialize};

use crate::block_pool::Ledger;

/// What is counted, from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchCounters {
    /// Tokens computed in steps that did not sample, or as part of a longer chunk.
    pub n_prefill_tokens: u64,
    /// Tokens computed one at a time for a sequence that samples.
    pub n_decode_tokens: u64,
    /// Context tokens of sequences that could take hits.
    pub n_prefix_query_tokens: u64,
    /// Context tokens found in the prefix cache.
    pub n_prefix_hit_tokens: u64,
    /// Times a running sequence lost its blocks.
    pub n_preemptions: u64,
    /// Times a sequence began to wait for a prefix that another brings.
    pub n_deferrals: u64,
    /// Sequences refused after waiting.
    pub n_refused: u64,
}

/// How many sequences and blocks are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchLoad {
    /// Choices that run, paused ones included.
    pub n_running: usize,
    /// Of those, the paused ones: they keep blocks and places, and are in no step.
    pub n_paused: usize,
    /// Choices waiting to run, preempted ones included.
    pub n_waiting: usize,
    /// Choices of reservations, granted and deferred.
    pub n_reserved: usize,
    /// Finished prefills whose KV is still being fetched.
    pub n_handing_over: usize,
    /// Context tokens of waiting and running sequences that are not computed yet.
    pub n_pending_prefill_tokens: usize,
    /// Where every block is.
    pub ledger: Ledger,
}
