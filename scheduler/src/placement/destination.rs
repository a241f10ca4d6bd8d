//! Where a running request can be moved to.

use crate::ids::{InstanceId, Role};
use crate::placement::{ClusterView, InstanceState};

/// Moves are told in messages of this version on.
pub const MOVE_PROTOCOL_VERSION: u32 = 2;

/// Whether `state` could take over from `from` a request that needs `needs_version`, room aside.
pub(crate) fn can_take_over(from: &InstanceState, state: &InstanceState, needs_version: u32) -> bool {
    let needs_version = needs_version.max(MOVE_PROTOCOL_VERSION);
    state.info.id != from.info.id
        && state.info.role != Role::Prefill
        && state.is_usable()
        && state.info.fingerprint == from.info.fingerprint
        && state.info.protocol_version >= needs_version
        && from.info.protocol_version >= MOVE_PROTOCOL_VERSION
}

/// The instance to move a request of `n_choices` sequences and `n_blocks` blocks (growth included) to: one that generates, is
/// healthy and undrained, holds the same KV and has the room. Those whose bits equal `from`'s come first, then the freest,
/// then by name. `None` when there is none, or `from` is unknown or cannot be moved from.
pub fn choose_destination(
    view: &ClusterView,
    from: &InstanceId,
    n_blocks: u32,
    n_choices: u32,
    needs_version: u32,
) -> Option<InstanceId> {
    let from = view.instances().get(from)?;
    let rank = |state: &InstanceState| (state.info.numerics_class == from.info.numerics_class, state.freeness(0));
    let mut best: Option<(&InstanceId, (bool, f64))> = None;
    for (id, state) in view.instances() {
        if !can_take_over(from, state, needs_version) || !state.has_room(n_blocks, n_choices) {
            continue;
        }
        let found = rank(state);
        // Instances come by name: an equal one later does not replace the first.
        if best.is_none_or(|(_, best)| found > best) {
            best = Some((id, found));
        }
    }
    best.map(|(id, _)| id.clone())
}
