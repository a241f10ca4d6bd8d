//! The cluster as one front door sees it: events in, a deterministic picture out. Load reports, and its own placements
//! that are not yet in them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cost::{CostFit, CostModel, StepSample};
use crate::ids::{Fingerprint, Incarnation, InstanceId, Nanos, RequestId, Role};
use crate::placement::Placement;
use crate::prefix_cache::{PrefixEvent, PrefixKey};

/// What an instance is, for as long as its incarnation lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// Its name.
    pub id: InstanceId,
    /// Which life.
    pub incarnation: Incarnation,
    /// The protocol version it speaks at best.
    pub protocol_version: u32,
    /// What it is used for.
    pub role: Role,
    /// Whom it can exchange KV with.
    pub fingerprint: Fingerprint,
    /// Whose bits equal its own.
    pub numerics_class: String,
    /// Tokens of a block.
    pub block_size: u32,
    /// Blocks it has.
    pub n_blocks_total: u32,
    /// Sequences it batches at most.
    pub max_num_seqs: u32,
    /// Longest sequence it takes.
    pub max_model_len: u32,
    /// As [`BatchConfig::short_context`](crate::batch::BatchConfig::short_context).
    pub short_context: Option<u32>,
    /// Bytes of KV of one token over all layers.
    pub kv_bytes_per_token: u64,
    /// Of each layer group, the most blocks that a running sequence holds, where a window bounds them: as
    /// [`BatchConfig::most_blocks`](crate::batch::BatchConfig::most_blocks).
    pub most_blocks: Vec<Option<u32>>,
}

impl InstanceInfo {
    /// Blocks that a sequence takes to grow by one of each layer group.
    pub fn n_groups(&self) -> u32 {
        self.most_blocks.len() as u32
    }

    /// Blocks that a sequence of `n_tokens` holds, over all layer groups.
    pub fn n_blocks_for(&self, n_tokens: u32) -> u32 {
        let n_blocks = n_tokens.div_ceil(self.block_size);
        let of_group = |most: &Option<u32>| most.unwrap_or(n_blocks).min(n_blocks);
        self.most_blocks.iter().map(of_group).sum()
    }

    /// Tokens of the longest sequence that it takes and that its blocks hold.
    pub fn longest_sequence(&self) -> u32 {
        match self.n_blocks_for(self.max_model_len) <= self.n_blocks_total {
            true => self.max_model_len,
            false => self.n_blocks_total / self.n_groups() * self.block_size,
        }
    }
}

/// What an instance says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLoad {
    /// Sequences in its batches.
    pub n_running: u32,
    /// Sequences waiting there.
    pub n_waiting: u32,
    /// Blocks neither held nor cached.
    pub n_blocks_free: u32,
    /// Blocks that can be evicted.
    pub n_blocks_cached: u32,
    /// Prompt tokens accepted and not computed yet.
    pub n_prefill_tokens_pending: u64,
    /// False when work is pending and no step has been made for too long.
    pub healthy: bool,
    /// Steps since the last report, at most a few.
    pub step_samples: Vec<StepSample>,
}

/// What changes the view.
#[derive(Clone, Debug, PartialEq)]
pub enum ViewEvent {
    /// An instance joined, or a new incarnation of it.
    Joined(InstanceInfo),
    /// An incarnation left. Ignored when a newer one has joined since.
    Left(InstanceId, Incarnation),
    /// A load report. Ignored when of another incarnation.
    Load(InstanceId, Incarnation, InstanceLoad),
    /// Changes of an instance's prefix cache, in order. Ignored when of another incarnation.
    Prefix(InstanceId, Incarnation, Vec<PrefixEvent>),
    /// This front door placed a request.
    Placed(RequestId, OpenPlacement),
    /// The prompt of a placed request is computed.
    PrefillDone(RequestId),
    /// A placed request left its instances, whatever the reason.
    Closed(RequestId),
    /// An instance answered Busy: it is full until its next report.
    Busy(InstanceId),
    /// An incarnation is used for something else from now on; what runs there goes on. Ignored when of another incarnation.
    RoleChanged(InstanceId, Incarnation, Role),
    /// An instance is being emptied, or no longer: it gets no placement and is no move's destination. A new incarnation starts
    /// undrained. Ignored when unknown.
    Draining(InstanceId, bool),
    /// A placed request is being moved: it counts at the destination too until `Moved` or `MoveEnded`. A second start replaces
    /// the first. Ignored when the request is unknown or already there.
    MoveStarted(RequestId, InstanceId),
    /// The move came to nothing: the request counts where it was alone.
    MoveEnded(RequestId),
    /// A placed request generates on another instance now, which holds its KV. Ignored when the request is unknown.
    Moved(RequestId, InstanceId),
}

/// A placement of this front door that still holds something.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenPlacement {
    /// Where it runs.
    pub placement: Placement,
    /// Blocks reserved at the decode instance at the start, for all choices. What they grow by is in its reports.
    pub n_blocks: u32,
    /// Choices generated: as many places in the batch.
    pub n_choices: u32,
    /// Prompt tokens to compute, as predicted.
    pub n_prefill_tokens: u32,
    /// Keys of its prompt's full blocks: cached on its instances soon.
    pub prefix_keys: Vec<PrefixKey>,
}

/// One instance in the view.
#[derive(Clone, Debug)]
pub struct InstanceState {
    /// What it is.
    pub info: InstanceInfo,
    /// Its last report.
    pub load: InstanceLoad,
    /// Expected times, fitted to its reported steps.
    pub cost: CostModel,
    fit: CostFit,
    /// Whether `cost` was fitted to steps of this incarnation.
    is_measured: bool,
    is_busy: bool,
    is_draining: bool,
    /// Brought by moves that began since the last report, which cannot be in it.
    n_unreported_sequences: u32,
    n_unreported_blocks: u32,
    cached: BTreeSet<PrefixKey>,
    /// Keys of own open placements, with how many hold each.
    expected: BTreeMap<PrefixKey, u32>,
    n_own_sequences: u32,
    n_own_blocks: u32,
    n_own_prefill_tokens: u64,
}

impl InstanceState {
    fn new(info: InstanceInfo) -> InstanceState {
        let load = InstanceLoad {
            n_blocks_free: info.n_blocks_total,
            healthy: true,
            ..InstanceLoad::default()
        };
        InstanceState {
            info,
            load,
            cost: CostModel::default(),
            fit: CostFit::default(),
            is_measured: false,
            is_busy: false,
            is_draining: false,
            n_unreported_sequences: 0,
            n_unreported_blocks: 0,
            cached: BTreeSet::new(),
            expected: BTreeMap::new(),
            n_own_sequences: 0,
            n_own_blocks: 0,
            n_own_prefill_tokens: 0,
        }
    }

    /// Sequences there, reported or placed and not reported yet.
    pub fn n_sequences(&self) -> u32 {
        let n_reported = self.load.n_running + self.load.n_waiting;
        self.n_own_sequences.max(n_reported + self.n_unreported_sequences)
    }

    /// Blocks that a new sequence could take.
    pub fn n_blocks_available(&self) -> u32 {
        let reported = self.load.n_blocks_free + self.load.n_blocks_cached;
        let reported = reported.saturating_sub(self.n_unreported_blocks);
        reported.min(self.info.n_blocks_total.saturating_sub(self.n_own_blocks))
    }

    /// Prompt tokens waiting there.
    pub fn n_prefill_tokens_pending(&self) -> u64 {
        self.n_own_prefill_tokens.max(self.load.n_prefill_tokens_pending)
    }

    /// Expected time until a new prompt is begun.
    pub fn prefill_backlog(&self) -> Nanos {
        match self.n_prefill_tokens_pending() {
            0 => Nanos::ZERO,
            n_tokens => self.cost.prefill(n_tokens, 0),
        }
    }

    /// Whether it answered Busy since its last report.
    pub fn is_marked_busy(&self) -> bool {
        self.is_busy
    }

    /// Llumnix's freeness (OSDI '24, algorithm 1), in blocks for each sequence: `(total - virtual usages) / batch size`. Each
    /// decoding sequence takes a block every `block_size` steps, so it is proportional to the steps until none is left.
    ///
    /// Virtual usages are the blocks held; the demand of the first sequence waiting there, taken as the mean of those held
    /// since reports do not tell it; `n_headroom_blocks` kept clear for requests of high priority (0 where none is); and
    /// infinite usage of an instance being emptied. It may be negative.
    pub fn freeness(&self, n_headroom_blocks: u32) -> f64 {
        if self.is_draining {
            return f64::NEG_INFINITY;
        }
        let n_sequences = f64::from(self.n_sequences().max(1));
        let n_available = f64::from(self.n_blocks_available());
        let n_held = f64::from(self.info.n_blocks_total) - n_available;
        let n_running = f64::from(self.load.n_running.max(1));
        let head_of_line = if self.load.n_waiting > 0 {
            n_held / n_running
        } else {
            0.0
        };
        (n_available - head_of_line - f64::from(n_headroom_blocks)) / n_sequences
    }

    /// Whether it is being emptied.
    pub fn is_draining(&self) -> bool {
        self.is_draining
    }

    /// Whether new work may be given to it at all, room aside.
    pub fn is_usable(&self) -> bool {
        self.load.healthy && !self.is_busy && !self.is_draining
    }

    /// Whether it can take `n_choices` sequences of `n_blocks` together now, and keep a block of each layer group for each
    /// running one to grow into, as the instance itself will ask.
    pub fn has_room(&self, n_blocks: u32, n_choices: u32) -> bool {
        let n_headroom = self.load.n_running.saturating_mul(self.info.n_groups());
        self.is_usable()
            && self.n_sequences().saturating_add(n_choices) <= self.info.max_num_seqs
            && self.n_blocks_available() >= n_blocks.saturating_add(n_headroom)
    }
}

/// Whether two instances compute the same model with the same instructions, so that one's speed is a guess at the other's.
fn is_kin(a: &InstanceInfo, b: &InstanceInfo) -> bool {
    a.fingerprint == b.fingerprint && a.numerics_class == b.numerics_class
}

/// The cluster as this front door sees it.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    instances: BTreeMap<InstanceId, InstanceState>,
    open: BTreeMap<RequestId, OpenPlacement>,
    /// Destinations of open placements that are being moved.
    moving: BTreeMap<RequestId, InstanceId>,
}

impl ClusterView {
    /// An empty cluster.
    pub fn new() -> ClusterView {
        ClusterView::default()
    }

    /// The instances, by name.
    pub fn instances(&self) -> &BTreeMap<InstanceId, InstanceState> {
        &self.instances
    }

    /// This front door's open placements.
    pub fn open_placements(&self) -> &BTreeMap<RequestId, OpenPlacement> {
        &self.open
    }

    /// Moves under way, each with its destination.
    pub fn moves(&self) -> &BTreeMap<RequestId, InstanceId> {
        &self.moving
    }

    /// Prompt tokens at the start of `prefix_keys` that the instance holds or will soon hold, in whole blocks, always less
    /// than `n_tokens` (the last token must be computed).
    pub fn n_cached_tokens(&self, instance: &InstanceId, prefix_keys: &[PrefixKey], n_tokens: u32) -> u32 {
        let Some(state) = self.instances.get(instance) else {
            return 0;
        };
        let n_blocks = prefix_keys
            .iter()
            .take_while(|key| state.cached.contains(key) || state.expected.contains_key(key))
            .count() as u32;
        (n_blocks * state.info.block_size)
            .min(n_tokens.saturating_sub(1) / state.info.block_size * state.info.block_size)
    }

    /// Replaces what an instance is expected to take, by a profile.
    pub fn set_cost(&mut self, instance: &InstanceId, cost: CostModel) {
        if let Some(state) = self.instances.get_mut(instance) {
            state.cost = cost;
        }
    }

    /// Takes one event.
    pub fn apply(&mut self, event: ViewEvent) {
        match event {
            ViewEvent::Joined(info) => self.join(info),
            ViewEvent::Left(id, incarnation) => {
                if self.of_incarnation(&id, incarnation).is_some() {
                    self.instances.remove(&id);
                }
            }
            ViewEvent::Load(id, incarnation, load) => {
                if let Some(state) = self.of_incarnation(&id, incarnation) {
                    for sample in &load.step_samples {
                        state.fit.add(sample);
                    }
                    if let Some(model) = state.fit.model(&state.cost) {
                        state.cost = model;
                        state.is_measured = true;
                    }
                    state.is_busy = false;
                    state.n_unreported_sequences = 0;
                    state.n_unreported_blocks = 0;
                    state.load = load;
                    self.share_cost(&id);
                }
            }
            ViewEvent::Prefix(id, incarnation, events) => {
                if let Some(state) = self.of_incarnation(&id, incarnation) {
                    for event in events {
                        match event {
                            PrefixEvent::Stored(key) => drop(state.cached.insert(key)),
                            PrefixEvent::Removed(key) => drop(state.cached.remove(&key)),
                            PrefixEvent::Cleared => state.cached.clear(),
                        }
                    }
                }
            }
            ViewEvent::Placed(request, placement) => {
                self.apply(ViewEvent::Closed(request));
                self.count(&placement, None, 1);
                self.open.insert(request, placement);
            }
            ViewEvent::PrefillDone(request) => self.change(request, |open, _| open.n_prefill_tokens = 0),
            ViewEvent::Closed(request) => {
                let moving = self.moving.remove(&request);
                if let Some(placement) = self.open.remove(&request) {
                    self.count(&placement, moving.as_ref(), -1);
                }
            }
            ViewEvent::MoveStarted(request, to) => {
                let starts = self.open.get(&request).filter(|open| open.placement.decode != to);
                if let Some((n_choices, n_blocks)) = starts.map(|open| (open.n_choices, open.n_blocks)) {
                    if let Some(state) = self.instances.get_mut(&to) {
                        state.n_unreported_sequences += n_choices;
                        state.n_unreported_blocks += n_blocks;
                    }
                    self.change(request, |_, moving| *moving = Some(to));
                }
            }
            ViewEvent::MoveEnded(request) => self.change(request, |_, moving| *moving = None),
            ViewEvent::Moved(request, to) => self.change(request, |open, moving| {
                *moving = None;
                open.placement = Placement {
                    decode: to,
                    prefill: None,
                };
                open.n_prefill_tokens = 0;
            }),
            ViewEvent::RoleChanged(id, incarnation, role) => {
                if let Some(state) = self.of_incarnation(&id, incarnation) {
                    state.info.role = role;
                }
            }
            ViewEvent::Draining(id, is_draining) => {
                if let Some(state) = self.instances.get_mut(&id) {
                    state.is_draining = is_draining;
                }
            }
            ViewEvent::Busy(id) => {
                if let Some(state) = self.instances.get_mut(&id) {
                    state.is_busy = true;
                }
            }
        }
    }

    /// Changes an open placement and its move, and what they count for.
    fn change(&mut self, request: RequestId, change: impl FnOnce(&mut OpenPlacement, &mut Option<InstanceId>)) {
        let Some(mut placement) = self.open.remove(&request) else {
            return;
        };
        let mut moving = self.moving.remove(&request);
        self.count(&placement, moving.as_ref(), -1);
        change(&mut placement, &mut moving);
        self.count(&placement, moving.as_ref(), 1);
        self.open.insert(request, placement);
        if let Some(to) = moving {
            self.moving.insert(request, to);
        }
    }

    fn of_incarnation(&mut self, id: &InstanceId, incarnation: Incarnation) -> Option<&mut InstanceState> {
        self.instances
            .get_mut(id)
            .filter(|state| state.info.incarnation == incarnation)
    }

    /// Lends the measured cost of `id` to its kin that have not been measured themselves. Without it an instance that looks
    /// slow by default would never be chosen, and so never be measured.
    fn share_cost(&mut self, id: &InstanceId) {
        let Some(lender) = self.instances.get(id).filter(|state| state.is_measured) else {
            return;
        };
        let (cost, lender) = (lender.cost.clone(), lender.info.clone());
        for state in self
            .instances
            .values_mut()
            .filter(|state| !state.is_measured && is_kin(&state.info, &lender))
        {
            state.cost = cost.clone();
        }
    }

    fn join(&mut self, info: InstanceInfo) {
        let id = info.id.clone();
        let mut state = InstanceState::new(info);
        if let Some(previous) = self.instances.remove(&id) {
            // The same machine and model: its speed is still the best guess.
            state.cost = previous.cost;
            // A report repeated by the same life, as after a change of role, ends no drain.
            state.is_draining = previous.is_draining && previous.info.incarnation == state.info.incarnation;
        } else {
            let kin = self
                .instances
                .values()
                .find(|other| other.is_measured && is_kin(&other.info, &state.info));
            if let Some(kin) = kin {
                state.cost = kin.cost.clone();
            }
        }
        self.instances.insert(id.clone(), state);
        // Placements on an earlier incarnation are still open here; their ends will be counted down.
        let open: Vec<(OpenPlacement, Option<InstanceId>)> = self
            .open
            .iter()
            .map(|(request, open)| (open.clone(), self.moving.get(request).cloned()))
            .collect();
        for (placement, moving) in &open {
            self.count_on(&id, placement, moving.as_ref(), 1);
        }
    }

    fn count(&mut self, open: &OpenPlacement, moving: Option<&InstanceId>, sign: i64) {
        let (decode, prefill) = (&open.placement.decode, open.placement.prefill.as_ref());
        let involved: BTreeSet<&InstanceId> = [Some(decode), prefill, moving].into_iter().flatten().collect();
        for id in involved {
            self.count_on(id, open, moving, sign);
        }
    }

    fn count_on(&mut self, id: &InstanceId, open: &OpenPlacement, moving: Option<&InstanceId>, sign: i64) {
        let Some(state) = self.instances.get_mut(id) else {
            return;
        };
        let computes = open.placement.prefill.as_ref().unwrap_or(&open.placement.decode) == id;
        let decodes = open.placement.decode == *id || moving == Some(id);
        if !computes && !decodes {
            return;
        }
        if computes {
            state.n_own_prefill_tokens =
                (state.n_own_prefill_tokens as i64 + sign * i64::from(open.n_prefill_tokens)) as u64;
        }
        if decodes {
            state.n_own_sequences = (i64::from(state.n_own_sequences) + sign * i64::from(open.n_choices)) as u32;
            state.n_own_blocks = (i64::from(state.n_own_blocks) + sign * i64::from(open.n_blocks)) as u32;
        }
        for &key in &open.prefix_keys {
            let n = state.expected.entry(key).or_insert(0);
            *n = (i64::from(*n) + sign) as u32;
            if *n == 0 {
                state.expected.remove(&key);
            }
        }
    }
}
