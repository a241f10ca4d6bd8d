//! The instances this front door can reach and the policy that picks from them. Fed by the registry; asked by requests.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::convert::{WireError, instance_info_from_wire, prefix_events_from_wire};
use baton_proto::link::{LinkError, LinkOptions, MAX_MESSAGE_BYTES, PresentSecret};
use baton_proto::{cluster, speaks};
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId, Nanos, RequestId, Role};
use baton_scheduler::placement::{
    ClusterView, InstanceLoad, OpenPlacement, Placement, PlacementRequest, Policy, ViewEvent, min_protocol_version,
};
use baton_scheduler::prefix_cache::PrefixKey;
use baton_scheduler::request::Request;
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::admission::Wanted;
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
}

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
}

/// The cluster as one front door knows it.
pub struct Cluster {
    state: Mutex<State>,
    /// Grows with every change that may let a waiting request in.
    changed: watch::Sender<u64>,
    link: LinkOptions,
    started_at: Instant,
}

/// Instances of a placement, ready to be called.
pub(super) struct Reachable {
    pub(super) placement: Placement,
    pub(super) decode: InstanceClient,
    pub(super) decode_incarnation: Incarnation,
    pub(super) fingerprint: Vec<u8>,
    pub(super) prefill: Option<cluster::Peer>,
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

    /// Whether some instance could ever take the prompt and one token more.
    ///
    /// # Errors
    /// `Invalid` when every generating instance is too small. An empty cluster refuses nothing: instances may yet join.
    pub fn check_fits(&self, request: &Request) -> Result<(), Rejection> {
        let state = self.state.lock();
        let n_prompt = request.prompt_ids.len() as u64;
        let generating = state
            .view
            .instances()
            .values()
            .filter(|instance| instance.info.role != Role::Prefill);
        let longest = generating.map(|instance| {
            let info = &instance.info;
            let n_held = u64::from(info.n_blocks_total) * u64::from(info.block_size);
            n_held.min(u64::from(info.max_model_len))
        });
        match longest.max() {
            Some(longest) if n_prompt >= longest => Err(Rejection::Invalid(format!(
                "the prompt has {n_prompt} tokens, expected fewer than the {longest} that the largest instance holds"
            ))),
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
            may_hand_over: true,
        };
        let placement = state.policy.place(self.now(), asked, &state.view)?;
        let computing = placement.prefill.as_ref().unwrap_or(&placement.decode);
        let n_cached = state.view.n_cached_tokens(computing, &prefix_keys, n_tokens);
        let peer = |id: &InstanceId| -> Option<cluster::Peer> {
            let join = &state.members.get(id)?.join;
            Some(cluster::Peer {
                instance_id: join.instance_id.clone(),
                incarnation: join.incarnation,
                address: join.address.clone(),
            })
        };
        let member = state.members.get(&placement.decode)?;
        let block_size = member.join.block_size;
        let decode = WorkerClient::with_interceptor(member.channel.clone(), self.link.present_secret())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let reachable = Reachable {
            decode,
            decode_incarnation: Incarnation(member.join.incarnation),
            fingerprint: member.join.fingerprint.clone(),
            prefill: match &placement.prefill {
                Some(prefill) => Some(peer(prefill)?),
                None => None,
            },
            placement: placement.clone(),
        };
        let open = OpenPlacement {
            placement,
            n_blocks: asked.n_blocks(block_size),
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

    /// Bound on opening a connection, with a little for the answer.
    pub(super) fn call_timeout(&self) -> Duration {
        self.link.connect_timeout + self.link.keepalive
    }
}
