//! Which instances serve a request: the front door's view of the cluster, and the policies that choose from it.

mod destination;
mod least_loaded;
mod llumnix;
mod prefix_aware;
mod round_robin;
mod slo_aware;
mod view;

use serde::{Deserialize, Serialize};

use crate::ids::{InstanceId, Nanos, Role};
use crate::prefix_cache::PrefixKey;
use crate::request::{Request, SamplingParams};

pub use destination::{MOVE_PROTOCOL_VERSION, choose_destination};
pub use least_loaded::LeastLoaded;
pub use llumnix::Llumnix;
pub use prefix_aware::PrefixAware;
pub use round_robin::RoundRobin;
pub use slo_aware::{RequestObjectives, SloAware, SloObjectives};
pub use view::{ClusterView, InstanceInfo, InstanceLoad, InstanceState, OpenPlacement, ViewEvent};

/// Where a request runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Placement {
    /// Generates, and answers to the front door.
    pub decode: InstanceId,
    /// Computes the prompt and hands it over; `None` when the decode instance computes it itself.
    pub prefill: Option<InstanceId>,
}

impl Placement {
    /// Where the prompt is computed, for a request of which nothing else is wanted.
    pub fn for_prompt_only(self) -> Placement {
        Placement {
            decode: self.prefill.unwrap_or(self.decode),
            prefill: None,
        }
    }
}

/// A request to place, with what policies look at.
#[derive(Clone, Copy, Debug)]
pub struct PlacementRequest<'a> {
    /// The request.
    pub request: &'a Request,
    /// Keys of the full blocks of its prompt (and of the tokens already generated, in a replay).
    pub prefix_keys: &'a [PrefixKey],
    /// Prompt tokens, and tokens already generated in a replay: all must be in the cache before it decodes.
    pub n_tokens: u32,
    /// Instances to choose only when there is no other.
    pub avoided: &'a [InstanceId],
    /// Instances that speak less are not suitable: [`min_protocol_version`] of the request.
    pub needs_version: u32,
    /// Whether its KV may come from a prefill instance. Not when several choices each have tokens of their own already: a
    /// handoff carries one prompt.
    pub may_hand_over: bool,
    /// Its own objectives.
    pub objectives: RequestObjectives,
}

impl PlacementRequest<'_> {
    /// Choices to generate, each a place in the batch.
    pub fn n_choices(&self) -> u32 {
        self.request.sampling.n.max(1)
    }

    /// Blocks that a reservation at a decode instance takes: the tokens, and for each choice what it grows into. Choices that
    /// have tokens already share the full blocks of the prompt alone. An embedding does not grow.
    pub fn n_blocks(&self, decode: &InstanceInfo) -> u32 {
        let (n_choices, n_prompt) = (self.n_choices(), self.request.prompt_ids.len() as u32);
        let n_held = decode.n_blocks_for(self.n_tokens);
        let n_shared = if self.n_tokens > n_prompt {
            decode.n_blocks_for(n_prompt / decode.block_size * decode.block_size)
        } else {
            n_held
        };
        let n_to_grow = if self.request.sampling.max_tokens > 0 {
            n_choices * decode.n_groups()
        } else {
            0
        };
        let n_context = n_shared + n_choices * (n_held - n_shared);
        // Alone, whatever is there begins, though what it would grow into is not.
        (n_context + n_to_grow).min(decode.n_blocks_total.max(n_context))
    }
}

/// The oldest protocol version whose messages can say all of `sampling`: 2 for several choices, for penalties, for
/// whatever else narrows or shifts the distribution, and for an embedding.
pub fn min_protocol_version(sampling: &SamplingParams) -> u32 {
    let plain = sampling.n <= 1
        && sampling.max_tokens > 0
        && sampling.presence_penalty == 0.0
        && sampling.frequency_penalty == 0.0
        && sampling.repetition_penalty == 1.0
        && sampling.min_p == 0.0
        && sampling.min_tokens == 0
        && sampling.logit_bias.is_empty()
        && sampling.allowed_token_ids.is_empty()
        && sampling.bad_words.is_empty()
        && sampling.constraint.is_none();
    if plain { 1 } else { 2 }
}

/// When a prompt is computed on another instance than its decode instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Disaggregation {
    /// When that is predicted to be quicker, what it does to running decodes included.
    #[default]
    Auto,
    /// When at least this many of its tokens are not cached at the decode instance: 0 is always.
    Threshold(u32),
}

impl Disaggregation {
    /// Whenever there is a prefill instance.
    pub const ALWAYS: Disaggregation = Disaggregation::Threshold(0);
    /// Only when there is nothing else.
    pub const NEVER: Disaggregation = Disaggregation::Threshold(u32::MAX);
}

/// Chooses instances. Answers `None` when every suitable instance is full: the request waits at the front door.
pub trait Policy: Send {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Both instances in one decision, from the view alone. Equal arguments and state give equal answers.
    fn place(&mut self, now: Nanos, request: PlacementRequest<'_>, view: &ClusterView) -> Option<Placement>;
}

/// The policies by name, one of [`POLICIES`]; `slo-aware` with the default objectives.
pub fn policy(name: &str, disaggregation: Disaggregation) -> Option<Box<dyn Policy>> {
    policy_with_objectives(name, disaggregation, SloObjectives::default())
}

/// The policies by name, one of [`POLICIES`]; `objectives` are those of `slo-aware`.
pub fn policy_with_objectives(
    name: &str,
    disaggregation: Disaggregation,
    objectives: SloObjectives,
) -> Option<Box<dyn Policy>> {
    match name {
        "round-robin" => Some(Box::new(RoundRobin::new(disaggregation))),
        "least-loaded" => Some(Box::new(LeastLoaded::new(disaggregation))),
        "llumnix" => Some(Box::new(Llumnix::new(disaggregation))),
        "slo-aware" => Some(Box::new(SloAware::new(disaggregation, objectives))),
        "prefix-aware" => Some(Box::new(PrefixAware::new(disaggregation))),
        _ => None,
    }
}

/// Names that [`policy`] knows; the last is the default.
pub const POLICIES: [&str; 5] = ["round-robin", "least-loaded", "llumnix", "slo-aware", "prefix-aware"];

/// Instances that could serve a request now.
struct Pools<'a> {
    /// Decode and mixed instances with room.
    decode: Vec<&'a InstanceId>,
    /// Healthy prefill instances.
    prefill: Vec<&'a InstanceId>,
}

impl<'a> Pools<'a> {
    /// Prefill instances whose KV `decode` can take.
    fn prefill_for(&self, decode: &InstanceId, view: &ClusterView) -> Vec<&'a InstanceId> {
        let fingerprint = view.instances()[decode].info.fingerprint;
        let agrees = |id: &&&InstanceId| view.instances()[**id].info.fingerprint == fingerprint;
        self.prefill.iter().filter(agrees).copied().collect()
    }
}

/// Splits the view into pools, leaving avoided instances out. An avoided decode instance is taken when no other remains; an
/// avoided prefill instance is not, because the decode instance can compute the prompt itself.
fn candidates<'a>(request: &PlacementRequest<'_>, view: &'a ClusterView) -> Pools<'a> {
    let all = |wanted: &dyn Fn(&InstanceState) -> bool| -> Vec<&'a InstanceId> {
        let instances = view.instances().iter();
        instances.filter(|(_, state)| wanted(state)).map(|(id, _)| id).collect()
    };
    let is_avoided = |state: &InstanceState| request.avoided.contains(&state.info.id);
    let suits = |state: &InstanceState| state.is_usable() && state.info.protocol_version >= request.needs_version;
    let has_room = |state: &InstanceState| state.has_room(request.n_blocks(&state.info), request.n_choices());
    let decodes = |state: &InstanceState| state.info.role != Role::Prefill && suits(state) && has_room(state);
    let prefills = |state: &InstanceState| request.may_hand_over && state.info.role == Role::Prefill && suits(state);
    let mut decode = all(&|state| decodes(state) && !is_avoided(state));
    if decode.is_empty() {
        decode = all(&decodes);
    }
    Pools {
        decode,
        prefill: all(&|state| prefills(state) && !is_avoided(state)),
    }
}

/// How much a running decode minds being held up, against the new request's own waiting: the share of its sequences'
/// delay that a local prefill is charged with.
const INTERFERENCE_WEIGHT: f64 = 0.25;

/// What computing and moving cost beyond the request's own waiting: somebody may queue behind it, so a prefix is rather waited for
/// than computed or moved twice.
const OCCUPANCY_WEIGHT: f64 = 0.5;

/// Predicted cost in nanoseconds of a placement, both phases: time to the first token, plus the delay that computing the
/// prompt beside running decodes does to them.
fn predicted_cost(request: &PlacementRequest<'_>, placement: &Placement, view: &ClusterView) -> f64 {
    let decode = &view.instances()[&placement.decode];
    let held_by_decode = view.n_cached_tokens(&placement.decode, request.prefix_keys, request.n_tokens);
    match &placement.prefill {
        None => {
            let n_new = u64::from(request.n_tokens - held_by_decode);
            let compute = decode.cost.prefill(n_new, u64::from(held_by_decode)).0 as f64;
            let queue = decode.prefill_backlog().0 as f64;
            let delay = compute * f64::from(decode.n_sequences()) * INTERFERENCE_WEIGHT;
            queue + compute * (1.0 + OCCUPANCY_WEIGHT) + delay
        }
        Some(prefill_id) => {
            let prefill = &view.instances()[prefill_id];
            let held_by_prefill = view.n_cached_tokens(prefill_id, request.prefix_keys, request.n_tokens);
            let n_new = u64::from(request.n_tokens - held_by_prefill);
            let compute = prefill.cost.prefill(n_new, u64::from(held_by_prefill)).0 as f64;
            let n_bytes = u64::from(request.n_tokens - held_by_decode) * decode.info.kv_bytes_per_token;
            let transfer = decode.cost.transfer(n_bytes).0 as f64;
            // Layers travel while later ones are computed: only what compute cannot hide is waited for.
            let queue = prefill.prefill_backlog().0 as f64;
            queue + compute.max(transfer) + (compute + transfer) * OCCUPANCY_WEIGHT
        }
    }
}

/// What may compute the prompt for `decode` under a rule: prefill instances, and `None` for `decode` itself.
fn computing_choices<'a>(
    disaggregation: Disaggregation,
    request: &PlacementRequest<'_>,
    decode: &InstanceId,
    pools: &Pools<'a>,
    view: &ClusterView,
) -> Vec<Option<&'a InstanceId>> {
    let mut prefills = Vec::new();
    if view.instances()[decode].info.role != Role::Mixed {
        prefills = pools.prefill_for(decode, view);
    }
    let mut allows_local = true;
    if let (Disaggregation::Threshold(n_tokens), false) = (disaggregation, prefills.is_empty()) {
        allows_local = n_uncached(request, decode, view) < n_tokens;
        prefills.retain(|_| !allows_local);
    }
    prefills
        .into_iter()
        .map(Some)
        .chain(allows_local.then_some(None))
        .collect()
}

/// Fullness of a decode instance in nanoseconds: decoding beside others makes each token later; the square keeps nearly
/// empty instances alike.
fn fullness_cost(decode: &InstanceId, view: &ClusterView) -> f64 {
    let state = &view.instances()[decode];
    let fill = least_loaded::fill(decode, view);
    let full_step = state.cost.step(0, u64::from(state.info.max_num_seqs), 0);
    fill * fill * full_step.0 as f64
}

/// Whether the decode instance computes the prompt itself although `placement` names a prefill instance.
fn prefers_local(
    disaggregation: Disaggregation,
    request: &PlacementRequest<'_>,
    placement: &Placement,
    view: &ClusterView,
) -> bool {
    match disaggregation {
        Disaggregation::Threshold(n_tokens) => n_uncached(request, &placement.decode, view) < n_tokens,
        Disaggregation::Auto => {
            let local = Placement {
                decode: placement.decode.clone(),
                prefill: None,
            };
            predicted_cost(request, &local, view) <= predicted_cost(request, placement, view)
        }
    }
}

/// Tokens that somebody must compute before `decode` can go on.
fn n_uncached(request: &PlacementRequest<'_>, decode: &InstanceId, view: &ClusterView) -> u32 {
    request.n_tokens - view.n_cached_tokens(decode, request.prefix_keys, request.n_tokens)
}

#[cfg(test)]
mod tests;
