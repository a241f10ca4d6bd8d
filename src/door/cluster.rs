//! The instances this front door can reach and the policy that picks from them. Fed by the registry; asked by requests.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::convert::{WireError, instance_info_from_wire, prefix_events_from_wire, role_from_wire};
use baton_proto::link::{LinkError, LinkOptions, MAX_MESSAGE_BYTES, PresentSecret};
use baton_proto::{cluster, speaks};
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId, Nanos, RequestId, Role};
use baton_scheduler::placement::{
    ClusterView, InstanceLoad, MOVE_PROTOCOL_VERSION, OpenPlacement, Placement, PlacementRequest, Policy, ViewEvent,
    choose_destination, min_protocol_version,
};
use baton_scheduler::prefix_cache::PrefixKey;
use baton_scheduler::rebalance::WaitingRequest;
use baton_scheduler::request::Request;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::admission::{Purpose, Wanted};
use super::moves::{MoveError, MoveReason};
use super::{InstanceView, Rejection};

/// A client of an instance's worker service.
pub(super) type InstanceClient = WorkerClient<InterceptedService<Channel, PresentSecret>>;

/// Why a worker may not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Its report is malformed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Its address cannot be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It speaks another protocol.
    #[error("protocol version {found} of {instance_id}, expected {expected}")]
    Protocol {
        /// Who.
        instance_id: String,
        /// Its version.
        found: u32,
        /// Ours.
        expected: u32,
    },
}

/// A member of the cluster: what it said of itself last.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it is.
    pub join: cluster::WorkerJoin,
    /// Its load.
    pub load: cluster::WorkerLoad,
    /// When it joined.
    pub joined_at: Instant,
    channel: Channel,
    commands: Option<Commands>,
}

/// Commands to a worker.
pub type Commands = mpsc::Sender<Result<cluster::RegistryCommand, tonic::Status>>;

struct State {
    view: ClusterView,
    policy: Box<dyn Policy>,
    members: BTreeMap<InstanceId, Member>,
}

/// Whose prefix keys are equal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct KeySpace {
    pub(super) fingerprint: Fingerprint,
    pub(super) block_size: u32,
    pub(super) short_context: Option<u32>,
}

/// The cluster as one front door knows it.
pub struct Cluster {
    state: Mutex<State>,
    /// Grows with every change that may let a waiting request in.
    changed: watch::Sender<u64>,
    link: LinkOptions,
    /// The request that found no room last.
    waiting: Mutex<Option<WaitingRequest>>,
    started_at: Instant,
}

/// An instance that can be called.
#[derive(Clone)]
pub(super) struct Called {
    pub(super) client: InstanceClient,
    pub(super) peer: cluster::Peer,
    pub(super) fingerprint: Vec<u8>,
}

/// Instances of a placement, ready to be called.
pub(super) struct Reachable {
    pub(super) placement: Placement,
    pub(super) decode: Called,
    pub(super) prefill: Option<cluster::Peer>,
}

impl State {
    fn unknown(&self, id: &InstanceId) -> MoveError {
        let known: Vec<&str> = self.members.keys().map(|id| &*id.0).collect();
        MoveError::UnknownInstance {
            found: id.to_string(),
            known: known.join(", "),
        }
    }

    fn check_known(&self, id: &InstanceId) -> Result<(), MoveError> {
        if self.members.contains_key(id) {
            Ok(())
        } else {
            Err(self.unknown(id))
        }
    }

    /// Whether an instance besides `id` generates and may be given requests.
    fn others_generate(&self, id: &InstanceId) -> bool {
        let mut instances = self.view.instances().values();
        instances.any(|other| {
            other.info.id != *id && other.info.role != Role::Prefill && !other.is_draining() && other.load.healthy
        })
    }
}

impl Member {
    /// Whether the command could be given.
    fn command(&mut self, command: cluster::registry_command::Command) -> bool {
        let command = cluster::RegistryCommand { command: Some(command) };
        let commands = self.commands.as_ref();
        commands.is_some_and(|commands| commands.try_send(Ok(command)).is_ok())
    }

    fn peer(&self) -> cluster::Peer {
        cluster::Peer {
            instance_id: self.join.instance_id.clone(),
            incarnation: self.join.incarnation,
            address: self.join.address.clone(),
            protocol_version: self.join.protocol_version,
        }
    }

    fn called(&self, link: &LinkOptions) -> Called {
        self.called_over(self.channel.clone(), link)
    }

    fn called_over(&self, channel: Channel, link: &LinkOptions) -> Called {
        let client = WorkerClient::with_interceptor(channel, link.present_secret())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Called {
            client,
            peer: self.peer(),
            fingerprint: self.join.fingerprint.clone(),
        }
    }
}

impl Cluster {
    /// An empty cluster.
    pub fn new(policy: Box<dyn Policy>, link: LinkOptions) -> Cluster {
        let state = State {
            view: ClusterView::new(),
            policy,
            members: BTreeMap::new(),
        };
        Cluster {
            state: Mutex::new(state),
            changed: watch::channel(0).0,
            link,
            waiting: Mutex::new(None),
            started_at: Instant::now(),
        }
    }

    /// The front door's clock.
    pub fn now(&self) -> Nanos {
        Nanos(self.started_at.elapsed().as_nanos() as u64)
    }

    /// Fires when a waiting request may find room.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn notify(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// A worker joined, or came back as a new incarnation.
    ///
    /// # Errors
    /// A malformed or incompatible report.
    pub fn join(&self, join: cluster::WorkerJoin) -> Result<(InstanceId, Incarnation), JoinError> {
        if !speaks(join.protocol_version) {
            return Err(JoinError::Protocol {
                instance_id: join.instance_id,
                found: join.protocol_version,
                expected: baton_proto::PROTOCOL_VERSION,
            });
        }
        let info = instance_info_from_wire(&join)?;
        let channel = self.link.channel(&join.address)?;
        let (id, incarnation) = (info.id.clone(), info.incarnation);
        let member = Member {
            join,
            load: cluster::WorkerLoad::default(),
            joined_at: Instant::now(),
            channel,
            commands: None,
        };
        let mut state = self.state.lock();
        state.members.insert(id.clone(), member);
        state.view.apply(ViewEvent::Joined(info));
        drop(state);
        self.notify();
        Ok((id, incarnation))
    }

    /// A worker's report.
    ///
    /// # Errors
    /// A malformed report.
    pub fn report(
        &self,
        id: &InstanceId,
        incarnation: Incarnation,
        report: cluster::WorkerReport,
    ) -> Result<(), WireError> {
        let prefix = report.prefix.as_ref().map(prefix_events_from_wire).transpose()?;
        let mut state = self.state.lock();
        if let Some(events) = prefix {
            state.view.apply(ViewEvent::Prefix(id.clone(), incarnation, events));
        }
        if let Some(load) = report.load {
            if load.leaving
                && state
                    .view
                    .instances()
                    .get(id)
                    .is_some_and(|instance| !instance.is_draining())
            {
                tracing::info!(instance = %id, "asks to be emptied");
                state.view.apply(ViewEvent::Draining(id.clone(), true));
            }
            state
                .view
                .apply(ViewEvent::Load(id.clone(), incarnation, InstanceLoad::from(&load)));
            let current = state
                .members
                .get_mut(id)
                .filter(|member| member.join.incarnation == incarnation.0);
            if let Some(member) = current {
                member.load = load;
            }
        }
        drop(state);
        self.notify();
        Ok(())
    }

    /// A worker's membership ended.
    pub fn leave(&self, id: &InstanceId, incarnation: Incarnation) {
        let mut state = self.state.lock();
        state.view.apply(ViewEvent::Left(id.clone(), incarnation));
        if state
            .members
            .get(id)
            .is_some_and(|member| member.join.incarnation == incarnation.0)
        {
            state.members.remove(id);
        }
        drop(state);
        self.notify();
    }

    /// Those that speak at least `version`.
    pub(super) fn incarnations(&self, version: u32) -> BTreeSet<(InstanceId, Incarnation)> {
        let state = self.state.lock();
        let members = state
            .members
            .iter()
            .filter(|(_, member)| member.join.protocol_version >= version);
        members
            .map(|(id, member)| (id.clone(), Incarnation(member.join.incarnation)))
            .collect()
    }

    /// A member over a connection of its own, so that an answer that nobody reads holds up no other call.
    pub(super) fn called_apart(&self, id: &InstanceId, incarnation: Incarnation) -> Option<Called> {
        let state = self.state.lock();
        let member = state.members.get(id)?;
        let channel = self.link.channel(&member.join.address).ok()?;
        (member.join.incarnation == incarnation.0).then(|| member.called_over(channel, &self.link))
    }

    /// The members, by name.
    pub fn members(&self) -> Vec<Member> {
        self.state.lock().members.values().cloned().collect()
    }

    /// The instances as shown to clients and operators.
    pub fn instances(&self) -> Vec<InstanceView> {
        let state = self.state.lock();
        let instances = state.view.instances().values();
        instances
            .map(|instance| InstanceView {
                id: instance.info.id.clone(),
                role: instance.info.role,
                n_running: instance.load.n_running,
                n_waiting: instance.load.n_waiting,
                n_blocks_total: instance.info.n_blocks_total,
                n_blocks_free: instance.load.n_blocks_free,
                n_blocks_cached: instance.load.n_blocks_cached,
                block_size: instance.info.block_size,
                n_layer_groups: instance.info.n_groups(),
                ready: instance.load.healthy,
            })
            .collect()
    }

    /// Why no request could be served now, if none could.
    pub fn not_ready(&self) -> Option<String> {
        let state = self.state.lock();
        let mut instances = state.view.instances().values();
        if state.members.is_empty() {
            return Some("no instance has joined".into());
        }
        let generates = |role| role != Role::Prefill;
        if instances.any(|instance| generates(instance.info.role) && instance.load.healthy) {
            None
        } else {
            Some("no healthy decode or mixed instance".into())
        }
    }

    /// Whether some instance could ever take the prompt, and one token more unless it is to be embedded.
    ///
    /// # Errors
    /// `Invalid` when every generating instance is too small. An empty cluster refuses nothing: instances may yet join.
    pub fn check_fits(&self, request: &Request) -> Result<(), Rejection> {
        let state = self.state.lock();
        let n_prompt = request.prompt_ids.len() as u64;
        let n_tokens = n_prompt + u64::from(request.sampling.max_tokens.min(1));
        let generating = state
            .view
            .instances()
            .values()
            .filter(|instance| instance.info.role != Role::Prefill);
        let longest = generating.map(|instance| u64::from(instance.info.longest_sequence()));
        match longest.max() {
            Some(longest) if n_tokens > longest => {
                let most = longest + n_prompt - n_tokens;
                Err(Rejection::Invalid(format!(
                    "the prompt has {n_prompt} tokens, expected at most {most}: the largest instance holds {longest}"
                )))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// What prefix keys are made of here. Instances that disagree cannot exchange KV, and their hits are not counted.
    pub(super) fn key_space(&self) -> Option<KeySpace> {
        let state = self.state.lock();
        let info = &state.view.instances().values().next()?.info;
        Some(KeySpace {
            fingerprint: info.fingerprint,
            block_size: info.block_size,
            short_context: info.short_context,
        })
    }

    /// Places a request now, if there is room, and counts it until [`Cluster::close`].
    pub(super) fn try_place(&self, wanted: &Wanted, prefix_keys: Vec<PrefixKey>) -> Option<Reachable> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let (request, avoided, n_tokens) = (&wanted.request, &wanted.avoided, wanted.n_tokens());
        let asked = PlacementRequest {
            request,
            prefix_keys: &prefix_keys,
            n_tokens,
            avoided,
            needs_version: min_protocol_version(&request.sampling),
            may_hand_over: wanted.may_hand_over,
            objectives: wanted.objectives,
        };
        let placement = state.policy.place(self.now(), asked, &state.view)?;
        let placement = match wanted.purpose {
            Purpose::Generation => placement,
            Purpose::Embedding => placement.for_prompt_only(),
        };
        let computing = placement.prefill.as_ref().unwrap_or(&placement.decode);
        let n_cached = state.view.n_cached_tokens(computing, &prefix_keys, n_tokens);
        let member = state.members.get(&placement.decode)?;
        let n_blocks = asked.n_blocks(&state.view.instances().get(&placement.decode)?.info);
        let prefill = match &placement.prefill {
            Some(prefill) => Some(state.members.get(prefill)?.peer()),
            None => None,
        };
        let reachable = Reachable {
            decode: member.called(&self.link),
            prefill,
            placement: placement.clone(),
        };
        let open = OpenPlacement {
            placement,
            n_blocks,
            n_choices: asked.n_choices(),
            n_prefill_tokens: n_tokens - n_cached,
            prefix_keys,
        };
        state.view.apply(ViewEvent::Placed(request.id, open));
        Some(reachable)
    }

    /// The prompt of a placed request is computed.
    pub(super) fn prefill_done(&self, request: RequestId) {
        self.state.lock().view.apply(ViewEvent::PrefillDone(request));
    }

    /// An instance answered Busy.
    pub(super) fn busy(&self, instance: &InstanceId) {
        self.state.lock().view.apply(ViewEvent::Busy(instance.clone()));
    }

    /// A placed request left its instances.
    pub(super) fn close(&self, request: RequestId) {
        self.state.lock().view.apply(ViewEvent::Closed(request));
        self.notify();
    }

    /// A request that generates on `from` should go on elsewhere: an instance that can take it. It counts there from now
    /// on, until [`Cluster::moved`] or [`Cluster::move_ended`].
    ///
    /// # Errors
    /// When the named one is unknown or cannot take it, or, without a name, when none can.
    pub(super) fn destination(
        &self,
        request: &Request,
        from: &InstanceId,
        to: Option<&InstanceId>,
        n_tokens: u32,
        n_choices: u32,
    ) -> Result<(InstanceId, Called), MoveError> {
        let mut state = self.state.lock();
        let refused = |reason: String| MoveError::Refused(reason);
        let source = state.view.instances().get(from);
        let source = source.ok_or_else(|| refused(format!("its instance, {from}, is not a member any more")))?;
        let needs_version = min_protocol_version(&request.sampling).max(MOVE_PROTOCOL_VERSION);
        // Blocks of each choice, and room for it to grow while it moves.
        let n_blocks = n_choices * (source.info.n_blocks_for(n_tokens) + source.info.n_groups());
        let to = match to {
            Some(to) => {
                let Some(destination) = state.view.instances().get(to) else {
                    return Err(state.unknown(to));
                };
                let why_not = if to == from {
                    Some("it runs there already".to_owned())
                } else if destination.info.role == Role::Prefill {
                    Some("it is a prefill instance".to_owned())
                } else if destination.info.fingerprint != source.info.fingerprint {
                    Some("it serves another model, dtype or layout".to_owned())
                } else if destination.info.protocol_version < needs_version {
                    Some("it speaks an older protocol".to_owned())
                } else if destination.is_draining() {
                    Some("it is being drained".to_owned())
                } else if destination.n_sequences().saturating_add(n_choices) > destination.info.max_num_seqs {
                    let (has, max) = (destination.n_sequences(), destination.info.max_num_seqs);
                    Some(format!(
                        "{n_choices} more sequences are wanted, it has {has} of at most {max}"
                    ))
                } else if destination.n_blocks_available() < n_blocks {
                    let available = destination.n_blocks_available();
                    Some(format!("{n_blocks} blocks are wanted, {available} are available"))
                } else {
                    None
                };
                match why_not {
                    Some(why_not) => return Err(refused(format!("not to {to}: {why_not}"))),
                    None => to.clone(),
                }
            }
            None => choose_destination(&state.view, from, n_blocks, n_choices, needs_version)
                .ok_or_else(|| refused("no other instance could take it".to_owned()))?,
        };
        let Some(member) = state.members.get(&to) else {
            return Err(state.unknown(&to));
        };
        let called = member.called(&self.link);
        state.view.apply(ViewEvent::MoveStarted(request.id, to.clone()));
        Ok((to, called))
    }

    /// A move has settled: the request generates on `to`.
    pub(super) fn moved(&self, request: RequestId, to: &InstanceId) {
        self.state.lock().view.apply(ViewEvent::Moved(request, to.clone()));
        self.notify();
    }

    /// A move came to nothing.
    pub(super) fn move_ended(&self, request: RequestId) {
        self.state.lock().view.apply(ViewEvent::MoveEnded(request));
        self.notify();
    }

    /// Where commands to a member go, as long as its membership lasts.
    pub fn set_commands(&self, id: &InstanceId, incarnation: Incarnation, commands: Commands) {
        let mut state = self.state.lock();
        let current = state.members.get_mut(id);
        if let Some(member) = current.filter(|member| member.join.incarnation == incarnation.0) {
            member.commands = Some(commands);
        }
    }

    /// Marks an instance as being emptied, or takes it back into use.
    ///
    /// # Errors
    /// When it is unknown, or when nothing else could generate.
    pub fn set_draining(&self, id: &InstanceId, is_draining: bool) -> Result<(), MoveError> {
        let mut state = self.state.lock();
        state.check_known(id)?;
        if is_draining && !state.others_generate(id) {
            return Err(MoveError::Refused(format!("nothing but {id} could generate")));
        }
        state.view.apply(ViewEvent::Draining(id.clone(), is_draining));
        drop(state);
        self.notify();
        Ok(())
    }

    /// Uses an instance as `role` from now on. Answers its role before.
    ///
    /// # Errors
    /// When it is unknown, when it cannot be told, or when nothing would be left that generates.
    pub fn set_role(&self, id: &InstanceId, role: Role) -> Result<Role, MoveError> {
        let mut state = self.state.lock();
        state.check_known(id)?;
        if role == Role::Prefill && !state.others_generate(id) {
            return Err(MoveError::Refused(format!("nothing but {id} could generate")));
        }
        let member = state.members.get_mut(id).expect("it is known");
        let previous = role_from_wire(&member.join.role).unwrap_or(Role::Mixed);
        let told = member.command(cluster::registry_command::Command::Role(role.as_str().to_owned()));
        if !told {
            return Err(MoveError::Refused(format!("{id} takes no commands now")));
        }
        member.join.role = role.as_str().to_owned();
        let incarnation = Incarnation(member.join.incarnation);
        state.view.apply(ViewEvent::RoleChanged(id.clone(), incarnation, role));
        drop(state);
        self.notify();
        Ok(previous)
    }

    /// Tells a member that asked for it that it is empty.
    pub(super) fn say_drained(&self, id: &InstanceId) {
        let mut state = self.state.lock();
        if let Some(member) = state.members.get_mut(id) {
            member.command(cluster::registry_command::Command::Drained(true));
        }
    }

    /// Instances whose generating requests should go elsewhere: being drained, or used for prefill.
    pub(super) fn to_be_emptied(&self) -> Vec<(InstanceId, MoveReason)> {
        let state = self.state.lock();
        let instances = state.view.instances().values();
        instances
            .filter_map(|instance| {
                let reason = if instance.is_draining() {
                    MoveReason::Drain
                } else if instance.info.role == Role::Prefill {
                    MoveReason::Role
                } else {
                    return None;
                };
                Some((instance.info.id.clone(), reason))
            })
            .collect()
    }

    /// Whether an instance is being emptied.
    pub fn is_draining(&self, id: &InstanceId) -> bool {
        let state = self.state.lock();
        state
            .view
            .instances()
            .get(id)
            .is_some_and(|instance| instance.is_draining())
    }

    /// The request that found no room last, as long as it waits.
    pub(super) fn waiting(&self) -> Option<WaitingRequest> {
        *self.waiting.lock()
    }

    /// Says which request waits for room, or that none does any more.
    pub(super) fn set_waiting(&self, waiting: Option<WaitingRequest>) {
        *self.waiting.lock() = waiting;
    }

    /// Blocks that `n_choices` sequences of one context take, and grow into.
    pub(super) fn n_blocks_wanted(&self, n_tokens: u32, n_choices: u32) -> u32 {
        let state = self.state.lock();
        let any = state.view.instances().values().next();
        any.map_or(0, |any| {
            any.info.n_blocks_for(n_tokens) + n_choices * any.info.n_groups()
        })
    }

    /// Runs `look` on the view.
    pub(super) fn with_view<T>(&self, look: impl FnOnce(&ClusterView) -> T) -> T {
        look(&self.state.lock().view)
    }

    /// Bound on opening a connection, with a little for the answer.
    pub(super) fn call_timeout(&self) -> Duration {
        self.link.connect_timeout + self.link.keepalive
    }
}
