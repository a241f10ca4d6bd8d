//! Decodes go to the instance of highest freeness (Llumnix, OSDI '24), prompts to the prefill instance with the least predicted
//! wait. Blind to prefix caches, as the paper's dispatch is.

use crate::ids::{Nanos, Role};
use crate::placement::least_loaded::least;
use crate::placement::{ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, prefers_local};

/// Dispatch by freeness; meant to run together with the rebalancer, which moves by the same measure.
#[derive(Debug)]
pub struct Llumnix {
    disaggregation: Disaggregation,
}

impl Llumnix {
    /// The policy.
    pub fn new(disaggregation: Disaggregation) -> Llumnix {
        Llumnix { disaggregation }
    }
}

impl Policy for Llumnix {
    fn name(&self) -> &'static str {
        "llumnix"
    }

    fn place(&mut self, _now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement> {
        let pools = candidates(&request, view);
        let decode = least(&pools.decode, |id| -view.instances()[id].freeness(0))?.clone();
        let mut placement = Placement { decode, prefill: None };
        if view.instances()[&placement.decode].info.role == Role::Mixed {
            return Some(placement);
        }
        placement.prefill = least(&pools.prefill_for(&placement.decode, view), |id| {
            view.instances()[id].prefill_backlog().0 as f64
        })
        .cloned();
        if placement.prefill.is_some() && prefers_local(self.disaggregation, &request, &placement, view) {
            placement.prefill = None;
        }
        Some(placement)
    }
}
