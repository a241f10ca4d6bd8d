//! Least predicted cost over all pairs, cached prefixes counted on both ends (after Mooncake's TTFT = queue + prefill +
//! transfer), plus a charge for fullness so that one hot prefix does not fill one instance.

use crate::ids::Nanos;
use crate::placement::{
    ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, computing_choices, fullness_cost,
    predicted_cost,
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
            for prefill in computing_choices(self.disaggregation, &request, decode, &pools, view) {
                let placement = Placement {
                    decode: decode.clone(),
                    prefill: prefill.cloned(),
                };
                let cost = predicted_cost(&request, &placement, view) + fullness_cost(decode, view);
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, placement));
                }
            }
        }
        best.map(|(_, placement)| placement)
    }
}
