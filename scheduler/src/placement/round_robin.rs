//! Each pool in turn, skipping the full and the avoided. The yardstick for the other policies.

use crate::ids::{InstanceId, Nanos, Role};
use crate::placement::{ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, prefers_local};

/// Takes decode (or mixed) instances in turn, and prefill instances in turn.
#[derive(Debug)]
pub struct RoundRobin {
    disaggregation: Disaggregation,
    n_decode: usize,
    n_prefill: usize,
}

impl RoundRobin {
    /// Starts with the first instance of each pool.
    pub fn new(disaggregation: Disaggregation) -> RoundRobin {
        RoundRobin {
            disaggregation,
            n_decode: 0,
            n_prefill: 0,
        }
    }
}

fn in_turn<'a>(pool: &[&'a InstanceId], turn: &mut usize) -> Option<&'a InstanceId> {
    let chosen = pool.get(*turn % pool.len().max(1)).copied();
    *turn = turn.wrapping_add(1);
    chosen
}

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round-robin"
    }

    fn place(&mut self, _now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement> {
        let pools = candidates(&request, view);
        let decode = in_turn(&pools.decode, &mut self.n_decode)?.clone();
        if view.instances()[&decode].info.role == Role::Mixed {
            return Some(Placement { decode, prefill: None });
        }
        let Some(prefill) = in_turn(&pools.prefill_for(&decode, view), &mut self.n_prefill) else {
            return Some(Placement { decode, prefill: None });
        };
        let mut placement = Placement {
            decode,
            prefill: Some(prefill.clone()),
        };
        if prefers_local(self.disaggregation, &request, &placement, view) {
            placement.prefill = None;
        }
        Some(placement)
    }
}
