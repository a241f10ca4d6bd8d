//! Least predicted cost over all pairs, cached prefixes counted on both ends (after Mooncake's TTFT = queue + prefill +
//! transfer), plus a charge for fullness so that one hot prefix does not fill one instance.

use crate::ids::{Nanos, Role};
use crate::placement::least_loaded::fill;
use crate::placement::{
    ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, n_uncached, predicted_cost,
};

/// Predicted time to the first token, with prefix hits; the default.
#[derive(Debug)]
pub struct PrefixAware {
    disaggregation: Disaggregation,
}

impl PrefixAware {
    /// The policy.
    pub fn new(disaggregation: Disaggregation) -> PrefixAware {
        PrefixAware { disaggregation }
    }
}

impl Policy for PrefixAware {
    fn name(&self) -> &'static str {
        "prefix-aware"
    }

    fn place(&mut self, _now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement> {
        let pools = candidates(&request, view);
        let mut best: Option<(f64, Placement)> = None;
        for &decode in &pools.decode {
            let state = &view.instances()[decode];
            let mut prefills = Vec::new();
            if state.info.role != Role::Mixed {
                prefills = pools.prefill_for(decode, view);
            }
            let mut allows_local = true;
            if let (Disaggregation::Threshold(n_tokens), false) = (self.disaggregation, prefills.is_empty()) {
                allows_local = n_uncached(&request, decode, view) < n_tokens;
                prefills.retain(|_| !allows_local);
            }
            let pairs = prefills.iter().map(|&prefill| Some(prefill.clone()));
            for prefill in pairs.chain(allows_local.then_some(None)) {
                let placement = Placement {
                    decode: decode.clone(),
                    prefill,
                };
                // Decoding beside others makes each token later; the square keeps nearly empty instances alike.
                let fill = fill(decode, view);
                let full_step = state.cost.step(0, u64::from(state.info.max_num_seqs), 0);
                let fullness = fill * fill * full_step.0 as f64;
                let cost = predicted_cost(&request, &placement, view) + fullness;
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, placement));
                }
            }
        }
        best.map(|(_, placement)| placement)
    }
}
