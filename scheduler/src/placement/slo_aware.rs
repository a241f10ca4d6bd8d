//! Times to the first and to each further token, predicted from each instance's own cost model, against objectives.
//!
//! Among the placements that meet both, the one that costs the cluster least is taken (the cost of `prefix-aware`): an objective
//! that is met is met, and what is saved there keeps others within theirs. When none meets both, the worst ratio of prediction
//! to objective is made smallest.

use serde::{Deserialize, Serialize};

use crate::ids::Nanos;
use crate::placement::{
    ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, computing_choices, fullness_cost,
    predicted_cost,
};

/// What requests should not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SloObjectives {
    /// Time to the first token.
    pub ttft: Nanos,
    /// Time of each further token.
    pub tpot: Nanos,
}

impl Default for SloObjectives {
    /// A second to the first token, ten tokens a second after: slower is felt by a reader.
    fn default() -> Self {
        SloObjectives {
            ttft: Nanos::from_secs(1),
            tpot: Nanos::from_millis(100),
        }
    }
}

/// What one request asks for itself; absent is what the policy aims at for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestObjectives {
    /// Time to the first token.
    pub ttft: Option<Nanos>,
    /// Time of each further token.
    pub tpot: Option<Nanos>,
}

/// Meets objectives where it can.
#[derive(Debug)]
pub struct SloAware {
    disaggregation: Disaggregation,
    objectives: SloObjectives,
}

impl SloAware {
    /// The policy for `objectives`, which hold for requests that name none.
    pub fn new(disaggregation: Disaggregation, objectives: SloObjectives) -> SloAware {
        SloAware {
            disaggregation,
            objectives,
        }
    }

    /// The larger of predicted TTFT and TPOT, each over its objective.
    fn worst_ratio(&self, request: &PlacementRequest<'_>, placement: &Placement, view: &ClusterView) -> f64 {
        let objectives = SloObjectives {
            ttft: request.objectives.ttft.unwrap_or(self.objectives.ttft),
            tpot: request.objectives.tpot.unwrap_or(self.objectives.tpot),
        };
        let ttft = predicted_ttft(request, placement, view).0 as f64 / objectives.ttft.0.max(1) as f64;
        let tpot = predicted_tpot(request, placement, view).0 as f64 / objectives.tpot.0.max(1) as f64;
        ttft.max(tpot)
    }
}

/// Waiting for prompts before it, computing its own, and what of the transfer computing cannot hide.
fn predicted_ttft(request: &PlacementRequest<'_>, placement: &Placement, view: &ClusterView) -> Nanos {
    let computing = placement.prefill.as_ref().unwrap_or(&placement.decode);
    let n_held = |id| view.n_cached_tokens(id, request.prefix_keys, request.n_tokens);
    let (state, n_cached) = (&view.instances()[computing], n_held(computing));
    let compute = state
        .cost
        .prefill(u64::from(request.n_tokens - n_cached), u64::from(n_cached));
    let mut transfer = Nanos::ZERO;
    if placement.prefill.is_some() {
        let decode = &view.instances()[&placement.decode];
        let n_moved = u64::from(request.n_tokens - n_held(&placement.decode));
        transfer = decode.cost.transfer(n_moved * decode.info.kv_bytes_per_token);
    }
    state.prefill_backlog().saturating_add(compute.max(transfer))
}

/// A decode step with the request's choices in the batch, all blocks in use attended to.
fn predicted_tpot(request: &PlacementRequest<'_>, placement: &Placement, view: &ClusterView) -> Nanos {
    let state = &view.instances()[&placement.decode];
    let n_sequences = u64::from(state.n_sequences() + request.n_choices());
    let n_blocks_held = state.info.n_blocks_total.saturating_sub(state.n_blocks_available());
    let n_own = u64::from(request.n_tokens) * u64::from(request.n_choices());
    // A block holds its tokens in the layers of one group.
    let n_held = u64::from(n_blocks_held) * u64::from(state.info.block_size) / u64::from(state.info.n_groups());
    let n_context = n_held + n_own;
    state.cost.step(0, n_sequences, n_context)
}

impl Policy for SloAware {
    fn name(&self) -> &'static str {
        "slo-aware"
    }

    fn place(&mut self, _now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement> {
        let pools = candidates(&request, view);
        let mut best: Option<((f64, f64), Placement)> = None;
        for &decode in &pools.decode {
            for prefill in computing_choices(self.disaggregation, &request, decode, &pools, view) {
                let placement = Placement {
                    decode: decode.clone(),
                    prefill: prefill.cloned(),
                };
                // All that meet both objectives rank alike, before any that does not.
                let ratio = self.worst_ratio(&request, &placement, view).max(1.0);
                let cost = predicted_cost(&request, &placement, view) + fullness_cost(decode, view);
                if best.as_ref().is_none_or(|(least, _)| (ratio, cost) < *least) {
                    best = Some(((ratio, cost), placement));
                }
            }
        }
        best.map(|(_, placement)| placement)
    }
}
