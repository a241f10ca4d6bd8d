//! The decode instance with the fewest sequences for its size, the prefill instance with the shortest backlog.

use crate::ids::{InstanceId, Nanos, Role};
use crate::placement::{ClusterView, Disaggregation, Placement, PlacementRequest, Policy, candidates, prefers_local};

/// Spreads load; blind to prefix caches.
#[derive(Debug)]
pub struct LeastLoaded {
    disaggregation: Disaggregation,
}

impl LeastLoaded {
    /// The policy.
    pub fn new(disaggregation: Disaggregation) -> LeastLoaded {
        LeastLoaded { disaggregation }
    }
}

/// The smallest of `pool` by `key`; ties by name.
pub(super) fn least<'a>(pool: &[&'a InstanceId], mut key: impl FnMut(&InstanceId) -> f64) -> Option<&'a InstanceId> {
    pool.iter()
        .copied()
        .min_by(|a, b| key(a).total_cmp(&key(b)).then_with(|| a.cmp(b)))
}

/// Share of an instance that is taken: the fuller of its batch and its blocks.
pub(super) fn fill(id: &InstanceId, view: &ClusterView) -> f64 {
    let state = &view.instances()[id];
    let sequences = f64::from(state.n_sequences()) / f64::from(state.info.max_num_seqs.max(1));
    let blocks = 1.0 - f64::from(state.n_blocks_available()) / f64::from(state.info.n_blocks_total.max(1));
    sequences.max(blocks)
}

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least-loaded"
    }

    fn place(&mut self, _now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement> {
        let pools = candidates(&request, view);
        let decode = least(&pools.decode, |id| fill(id, view))?.clone();
        if view.instances()[&decode].info.role == Role::Mixed {
            return Some(Placement { decode, prefill: None });
        }
        let prefill = least(&pools.prefill_for(&decode, view), |id| {
            view.instances()[id].prefill_backlog().0 as f64
        })
        .cloned();
        let mut placement = Placement { decode, prefill };
        if placement.prefill.is_some() && prefers_local(self.disaggregation, &request, &placement, view) {
            placement.prefill = None;
        }
        Some(placement)
    }
}
