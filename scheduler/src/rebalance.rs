//! Which running requests should go on elsewhere, so that instances are evenly free and a request that waits finds room.
//! Advice only: who moves them, and whether the move succeeds, is told back.
//!
//! Freeness is Llumnix's (Sun et al., OSDI '24, section 4.4.1): blocks that are free over sequences that share them, about
//! the steps an instance can still make. [`InstanceState::freeness`] has the terms.

use std::collections::BTreeMap;

use crate::ids::{InstanceId, Nanos, RequestId, Role};
use crate::placement::{ClusterView, InstanceState, MOVE_PROTOCOL_VERSION};

/// Bounds of a rebalancer.
#[derive(Clone, Debug, PartialEq)]
pub struct RebalanceConfig {
    /// Two instances are even when the freer is not more than this many times as free.
    pub max_ratio: f64,
    /// Moves under way at once, whoever ordered them.
    pub max_moves: usize,
    /// A request that moved, or whose move failed, is left alone this long; each further failure doubles it.
    pub cooldown: Nanos,
    /// Longest that failures make the cooldown.
    pub max_cooldown: Nanos,
    /// Blocks of an instance kept clear while a request of high priority generates there, as a share of all it has.
    pub priority_headroom: f64,
}

impl Default for RebalanceConfig {
    fn default() -> Self {
        RebalanceConfig {
            max_ratio: 1.5,
            max_moves: 2,
            cooldown: Nanos::from_secs(2),
            max_cooldown: Nanos::from_secs(60),
            priority_headroom: 0.25,
        }
    }
}

/// A request that generates.
#[derive(Clone, Debug, PartialEq)]
pub struct RunningRequest {
    /// Its identity.
    pub id: RequestId,
    /// Where it generates.
    pub instance: InstanceId,
    /// Blocks it holds, over all choices.
    pub n_blocks: u32,
    /// Choices that have not ended.
    pub n_choices: u32,
    /// The oldest protocol that can say all of it.
    pub needs_version: u32,
    /// Lower is more urgent; below 0 is high priority.
    pub priority: i32,
}

/// The request that waits longest for a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingRequest {
    /// Blocks it would take.
    pub n_blocks: u32,
    /// Its choices.
    pub n_choices: u32,
}

/// Why a move is proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebalanceReason {
    /// Its instance is much less free than another.
    Balance,
    /// What is free lies apart: without this request, and maybe more, its instance has room for the one that waits.
    Defragment,
}

impl RebalanceReason {
    /// As a label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            RebalanceReason::Balance => "balance",
            RebalanceReason::Defragment => "defragment",
        }
    }
}

/// A move that would help.
#[derive(Clone, Debug, PartialEq)]
pub struct MoveProposal {
    /// Which request.
    pub request: RequestId,
    /// Where it generates.
    pub from: InstanceId,
    /// Where it should.
    pub to: InstanceId,
    /// Why.
    pub reason: RebalanceReason,
}

#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Nanos,
    n_failures: u32,
}

/// Proposes moves. Equal facts give equal proposals.
#[derive(Clone, Debug)]
pub struct Rebalancer {
    config: RebalanceConfig,
    resting: BTreeMap<RequestId, Rest>,
}

/// How free an instance would be with other contents.
fn freeness(n_available: f64, n_sequences: f64) -> f64 {
    n_available / n_sequences.max(1.0)
}

impl Rebalancer {
    /// A rebalancer that has proposed nothing.
    pub fn new(config: RebalanceConfig) -> Rebalancer {
        assert!(
            config.max_ratio > 1.0,
            "instances that are equally free must count as even"
        );
        Rebalancer {
            config,
            resting: BTreeMap::new(),
        }
    }

    /// A proposed move has ended.
    pub fn ended(&mut self, now: Nanos, request: RequestId, has_moved: bool) {
        let n_failures = if has_moved {
            0
        } else {
            self.resting.get(&request).map_or(0, |rest| rest.n_failures) + 1
        };
        let length = self.config.cooldown.0 << n_failures.saturating_sub(1).min(16);
        let until = now.saturating_add(Nanos(length.min(self.config.max_cooldown.0)));
        self.resting.insert(request, Rest { until, n_failures });
    }

    /// What should move now: at most one request, because the next look sees what that does.
    pub fn propose(
        &mut self,
        now: Nanos,
        view: &ClusterView,
        running: &[RunningRequest],
        waiting: Option<&WaitingRequest>,
    ) -> Option<MoveProposal> {
        self.resting
            .retain(|id, _| running.iter().any(|request| request.id == *id));
        if view.moves().len() >= self.config.max_moves {
            return None;
        }
        let may_move = |request: &&RunningRequest| {
            !view.moves().contains_key(&request.id)
                && self.resting.get(&request.id).is_none_or(|rest| now >= rest.until)
        };
        let movable: Vec<&RunningRequest> = running.iter().filter(may_move).collect();
        waiting
            .and_then(|waiting| defragment(view, running, &movable, waiting))
            .or_else(|| self.balance(view, running, &movable))
    }

    /// Blocks to be kept clear on an instance.
    fn headroom(&self, instance: &InstanceState, running: &[RunningRequest]) -> u32 {
        let mut here = running.iter().filter(|request| request.instance == instance.info.id);
        if here.any(|request| request.priority < 0) {
            (f64::from(instance.info.n_blocks_total) * self.config.priority_headroom) as u32
        } else {
            0
        }
    }

    /// Of all moves that even out two uneven instances, the one that leaves the less free of them freest. Moving never
    /// makes the destination the less free one, so the lower freeness of a pair only rises, and a load that stands still
    /// comes to rest. A request of high priority stays where its headroom is; others make room for it.
    fn balance(
        &self,
        view: &ClusterView,
        running: &[RunningRequest],
        movable: &[&RunningRequest],
    ) -> Option<MoveProposal> {
        let mut best: Option<(f64, MoveProposal)> = None;
        for request in movable.iter().filter(|request| request.priority >= 0) {
            let source = view.instances().get(&request.instance);
            let Some(source) = source.filter(|source| !source.is_draining()) else {
                continue;
            };
            let (n_blocks, n_choices) = (f64::from(request.n_blocks), f64::from(request.n_choices));
            let n_source = f64::from(source.n_sequences());
            // A request that has its instance to itself gains nothing elsewhere.
            if n_source <= n_choices {
                continue;
            }
            let headroom = self.headroom(source, running);
            let free_source = source.freeness(headroom);
            let n_available = f64::from(source.n_blocks_available()) - f64::from(headroom);
            let source_after = freeness(n_available + n_blocks, n_source - n_choices);
            for (to, destination) in view.instances() {
                if !takes(source, destination, request, Taken::default()) {
                    continue;
                }
                let headroom = self.headroom(destination, running);
                let free_destination = destination.freeness(headroom);
                let is_uneven = free_destination > free_source.max(0.0) * self.config.max_ratio;
                let n_available = f64::from(destination.n_blocks_available()) - f64::from(headroom);
                let destination_after =
                    freeness(n_available - n_blocks, f64::from(destination.n_sequences()) + n_choices);
                let helps = free_source < source_after && source_after <= destination_after;
                if is_uneven && helps && best.as_ref().is_none_or(|(most, _)| source_after > *most) {
                    let proposal = MoveProposal {
                        request: request.id,
                        from: request.instance.clone(),
                        to: to.clone(),
                        reason: RebalanceReason::Balance,
                    };
                    best = Some((source_after, proposal));
                }
            }
        }
        best.map(|(_, proposal)| proposal)
    }
}

/// Makes room for a request that has it nowhere: on the instance where the fewest blocks must leave for that, and only if
/// they all find a place elsewhere. What moves away already counts as gone.
fn defragment(
    view: &ClusterView,
    running: &[RunningRequest],
    movable: &[&RunningRequest],
    waiting: &WaitingRequest,
) -> Option<MoveProposal> {
    let generates = |state: &&InstanceState| state.info.role != Role::Prefill && state.is_usable();
    let mut generating = view.instances().values().filter(generates);
    if generating.any(|state| state.has_room(waiting.n_blocks, waiting.n_choices)) {
        return None;
    }
    let plans = view.instances().values().filter(generates);
    let plans = plans.filter_map(|source| Evacuation::of(source, view, running, movable, waiting));
    let best = plans.min_by_key(|plan| plan.n_blocks)?;
    let (request, to) = best.first?;
    Some(MoveProposal {
        request: request.id,
        from: request.instance.clone(),
        to,
        reason: RebalanceReason::Defragment,
    })
}

/// Who would have to leave an instance so that a request that waits finds room there.
struct Evacuation<'a> {
    n_blocks: u32,
    /// Who goes next and where; nobody when enough is on its way.
    first: Option<(&'a RunningRequest, InstanceId)>,
}

impl<'a> Evacuation<'a> {
    /// `None` when not enough of them find a place elsewhere.
    fn of(
        source: &InstanceState,
        view: &ClusterView,
        running: &[RunningRequest],
        movable: &[&'a RunningRequest],
        waiting: &WaitingRequest,
    ) -> Option<Evacuation<'a>> {
        let id = &source.info.id;
        let leaving = running.iter().filter(|request| request.instance == *id);
        let leaving = leaving.filter(|request| view.moves().contains_key(&request.id));
        let (mut n_blocks_free, mut n_sequences) = (source.n_blocks_available(), source.n_sequences());
        for request in leaving {
            n_blocks_free += request.n_blocks;
            n_sequences = n_sequences.saturating_sub(request.n_choices);
        }
        let here = movable.iter().copied().filter(|request| request.instance == *id);
        let mut here: Vec<&RunningRequest> = here.collect();
        here.sort_by_key(|request| (request.n_blocks, request.id));
        // What this plan itself puts elsewhere.
        let mut taken: BTreeMap<&InstanceId, Taken> = BTreeMap::new();
        let mut evacuation = Evacuation {
            n_blocks: 0,
            first: None,
        };
        loop {
            let missing_blocks = waiting.n_blocks.saturating_sub(n_blocks_free);
            if missing_blocks == 0 && n_sequences + waiting.n_choices <= source.info.max_num_seqs {
                return Some(evacuation);
            }
            // The smallest that is enough by itself, else the largest.
            let enough = here.iter().position(|request| request.n_blocks >= missing_blocks);
            let chosen = here.remove(enough.or_else(|| here.len().checked_sub(1))?);
            let mut places = view.instances().iter();
            let place = places.find(|(to, state)| {
                let taken = taken.get(to).copied().unwrap_or_default();
                takes(source, state, chosen, taken)
            });
            let Some((to, _)) = place else { continue };
            taken.entry(to).or_default().add(chosen);
            n_blocks_free += chosen.n_blocks;
            n_sequences = n_sequences.saturating_sub(chosen.n_choices);
            evacuation.n_blocks += chosen.n_blocks;
            evacuation.first.get_or_insert_with(|| (chosen, to.clone()));
        }
    }
}

/// What a plan has put on an instance before.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    n_blocks: u32,
    n_choices: u32,
}

impl Taken {
    fn add(&mut self, request: &RunningRequest) {
        // A block for each choice to grow into.
        self.n_blocks += request.n_blocks + request.n_choices;
        self.n_choices += request.n_choices;
    }
}

/// Whether `destination` may be asked to take `request` from `source`, besides what it has `taken`. Other bits than the source's are not risked for the
/// sake of balance.
fn takes(source: &InstanceState, destination: &InstanceState, request: &RunningRequest, taken: Taken) -> bool {
    let (from, to) = (&source.info, &destination.info);
    let speaks = |version| version >= request.needs_version.max(MOVE_PROTOCOL_VERSION);
    let mut all = taken;
    all.add(request);
    from.id != to.id
        && from.fingerprint == to.fingerprint
        && from.numerics_class == to.numerics_class
        && to.role != Role::Prefill
        && speaks(from.protocol_version)
        && speaks(to.protocol_version)
        && destination.has_room(all.n_blocks, all.n_choices)
}

#[cfg(test)]
mod tests;
