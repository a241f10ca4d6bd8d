//! One instance's end of all its transfers: what it can do, what it offers, what it picks. It moves no bytes itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_kernels::{KvLayout, KvShare};
use baton_proto::cluster;
use baton_proto::link::LinkOptions;
use baton_scheduler::transfer::TransferId;
use parking_lot::Mutex;

use super::counters::{TransportCounters, TransportTotals};
use super::grpc::{GrpcReceiver, GrpcSender};
use super::handover::{Credentials, HandoverError, Owner};
use super::in_place::{InPlaceReceiver, InPlaceSender};
use super::in_process::{InProcessReceiver, InProcessSender, LivesHere, lives_here};
use super::mappings::{ForeignMemory, Mappings};
use super::staged::{StagedFrames, StagedReceiver, StagedSender};
use super::{KvReceiver, KvSender, TransportChoice, TransportError, TransportKind};
use crate::worker::Identity;

/// Peers of which it is remembered what was said about them; beyond it the oldest names are said again.
const MAX_PEERS_SAID: usize = 1024;

/// The transports of one instance.
pub struct KvTransports {
    layout: KvLayout,
    choice: TransportChoice,
    mappings: Mappings,
    /// Our memory, if other processes may read it.
    shared: Option<Shared>,
    counters: Arc<TransportCounters>,
    /// By peer: the transport last said to be used from it.
    said: Mutex<BTreeMap<u64, TransportKind>>,
    _lives_here: LivesHere,
}

/// Our memory as other processes read it.
struct Shared {
    /// By these transports.
    kinds: Vec<TransportKind>,
    is_on_card: bool,
    /// What waits for them on the host.
    frames: Arc<StagedFrames>,
    /// Hands it out.
    _owner: Owner,
}

impl Shared {
    fn kinds_of(share: &KvShare) -> Vec<TransportKind> {
        let in_place = share.card().map(|_| TransportKind::CudaIpc);
        let by_host = (!share.is_on_card() || share.staging().is_some()).then_some(TransportKind::SharedMemory);
        in_place.into_iter().chain(by_host).collect()
    }
}

/// What a destination can take from one source.
pub struct Offer {
    kinds: Vec<TransportKind>,
    memory: Option<Arc<ForeignMemory>>,
    source: String,
    source_incarnation: u64,
    /// Why the source's memory is not read in place although the source seems to run on this host.
    missing: Option<String>,
}

impl Offer {
    /// What is said to the source.
    pub fn to_wire(&self) -> cluster::TransportOffer {
        cluster::TransportOffer {
            transports: self.kinds.iter().map(|kind| kind.as_str().to_owned()).collect(),
        }
    }

    /// The transports offered, the best first.
    pub fn kinds(&self) -> &[TransportKind] {
        &self.kinds
    }

    /// Why the source's memory cannot be read in place, if that was tried.
    pub fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}

impl KvTransports {
    /// The transports of an instance whose KV has `layout`; `share` is its memory when other processes may read it.
    /// Within a runtime.
    ///
    /// # Errors
    /// Memory that other processes map was asked for, and there is none to share so or its socket cannot be opened.
    pub fn new(
        identity: &Identity,
        layout: KvLayout,
        choice: TransportChoice,
        link: &LinkOptions,
        share: Option<KvShare>,
    ) -> Result<KvTransports, TransportError> {
        let mapped = [TransportKind::SharedMemory, TransportKind::CudaIpc];
        let must_share = mapped.iter().any(|kind| choice == TransportChoice::Only(*kind));
        let credentials = Credentials::new(link.secret.as_ref());
        let near = share.clone().filter(|_| choice.allows(TransportKind::CudaIpc));
        let mut kinds = share.as_ref().map_or(Vec::new(), Shared::kinds_of);
        kinds.retain(|kind| choice.allows(*kind));
        let shared = match share {
            Some(share) if !kinds.is_empty() => {
                let (frames, is_on_card) = (Arc::<StagedFrames>::default(), share.is_on_card());
                let owner = Owner::start(
                    identity.incarnation,
                    share,
                    &identity.numerics_class,
                    credentials.clone(),
                    Arc::clone(&frames),
                );
                owner.map_err(|error| error.to_string()).map(|owner| Shared {
                    kinds,
                    is_on_card,
                    frames,
                    _owner: owner,
                })
            }
            _ => Err("the KV cache is not in memory that others can read so".to_owned()),
        };
        let shared = match shared {
            Ok(shared) => Some(shared),
            Err(reason) if must_share => {
                return Err(TransportError::Impossible {
                    wanted: choice,
                    peer: identity.instance.to_string(),
                    reason,
                });
            }
            Err(reason) => {
                tracing::debug!(reason, "this KV memory is not shared");
                None
            }
        };
        Ok(KvTransports {
            layout,
            choice,
            mappings: Mappings::new(layout, credentials, near),
            shared,
            counters: Arc::default(),
            said: Mutex::default(),
            _lives_here: LivesHere::new(identity.incarnation),
        })
    }

    /// What was moved by which transport.
    pub fn totals(&self) -> TransportTotals {
        self.counters.totals()
    }

    /// At the destination: what it can take from `source`. The first time it maps the source's memory, which takes at
    /// most a second.
    ///
    /// # Errors
    /// The one transport asked for cannot be had from this source.
    pub async fn offer(&self, source: &cluster::Peer) -> Result<Offer, TransportError> {
        let mut offer = Offer {
            kinds: Vec::new(),
            memory: None,
            source: source.instance_id.clone(),
            source_incarnation: source.incarnation,
            missing: None,
        };
        let is_here = lives_here(source.incarnation);
        if is_here && self.choice.allows(TransportKind::InProcess) {
            offer.kinds.push(TransportKind::InProcess);
        } else if self.choice.allows(TransportKind::SharedMemory) || self.choice.allows(TransportKind::CudaIpc) {
            match self.mappings.get(source.incarnation).await {
                Ok(memory) => {
                    let kinds = memory.kinds();
                    offer
                        .kinds
                        .extend(kinds.iter().filter(|kind| self.choice.allows(**kind)));
                    offer.missing = match offer.kinds.is_empty() {
                        true => Some(format!("its memory can be read by {}", names(&kinds))),
                        false => {
                            let missing = memory.missing().filter(|_| self.choice.allows(TransportKind::CudaIpc));
                            missing.map(HandoverError::to_string)
                        }
                    };
                    offer.memory = Some(memory);
                }
                Err(HandoverError::NotHere) if !is_local(&source.address) => {}
                Err(error) => offer.missing = Some(error.to_string()),
            }
        }
        if self.choice.allows(TransportKind::Grpc) {
            offer.kinds.push(TransportKind::Grpc);
        }
        if offer.kinds.is_empty() {
            let reason = match offer.missing {
                Some(reason) => reason,
                None if self.choice.allows(TransportKind::InProcess) => "it runs in another process".to_owned(),
                None => HandoverError::NotHere.to_string(),
            };
            return Err(self.impossible(offer.source, reason));
        }
        Ok(offer)
    }

    /// At the source: the best of what the destination `to` offers, to be named in the answer.
    ///
    /// # Errors
    /// Nothing of it can be used here.
    pub fn sender(
        &self,
        transfer: TransferId,
        offer: Option<&cluster::TransportOffer>,
        to: &str,
    ) -> Result<Box<dyn KvSender>, TransportError> {
        let offered: &[String] = offer.map_or(&[], |offer| &offer.transports);
        let is_offered = |kind: TransportKind| match offered {
            [] => kind == TransportKind::Grpc,
            names => names.iter().any(|name| name == kind.as_str()),
        };
        let can = |kind: &TransportKind| {
            let is_possible = match kind {
                TransportKind::InProcess | TransportKind::Grpc => true,
                TransportKind::CudaIpc | TransportKind::SharedMemory => {
                    let kinds = self.shared.as_ref().map(|shared| &shared.kinds);
                    kinds.is_some_and(|kinds| kinds.contains(kind))
                }
            };
            is_possible && self.choice.allows(*kind) && is_offered(*kind)
        };
        let Some(kind) = TransportKind::ALL.into_iter().find(can) else {
            let offered = if offered.is_empty() {
                TransportKind::Grpc.to_string()
            } else {
                offered.join(", ")
            };
            return Err(self.impossible(to.to_owned(), format!("it takes {offered}")));
        };
        let (layout, counters) = (self.layout, Arc::clone(&self.counters));
        let staged = self.shared.as_ref().filter(|shared| shared.is_on_card);
        Ok(match (kind, staged) {
            (TransportKind::SharedMemory, Some(shared)) => {
                Box::new(StagedSender::new(transfer, Arc::clone(&shared.frames), counters))
            }
            (TransportKind::InProcess, _) => Box::new(InProcessSender::new(transfer, counters)),
            (TransportKind::CudaIpc | TransportKind::SharedMemory, _) => Box::new(InPlaceSender {
                kind,
                transfer,
                layout,
                counters,
            }),
            (TransportKind::Grpc, _) => Box::new(GrpcSender { transfer, counters }),
        })
    }

    /// At the destination: what the source has picked of `offer`.
    ///
    /// # Errors
    /// It picked what was not offered.
    pub fn receiver(&self, offer: &Offer, accepted: &cluster::Accepted) -> Result<Box<dyn KvReceiver>, TransportError> {
        let name = match accepted.transport.as_str() {
            "" => TransportKind::Grpc.as_str(),
            name => name,
        };
        let kind = TransportKind::from_name(name).filter(|kind| offer.kinds.contains(kind));
        let Some(kind) = kind else {
            return Err(self.impossible(
                offer.source.clone(),
                format!("it sends by {name}, which was not offered"),
            ));
        };
        self.say(kind, offer);
        let counters = Arc::clone(&self.counters);
        Ok(match kind {
            TransportKind::InProcess => Box::new(InProcessReceiver { counters }),
            TransportKind::CudaIpc | TransportKind::SharedMemory => {
                let source = offer.memory.as_ref().map(Arc::clone);
                let source = source.expect("memory of another process is offered with its mapping");
                match kind {
                    TransportKind::SharedMemory if source.staging().is_some() => {
                        let layout = self.layout;
                        let carried = GrpcReceiver { layout, counters };
                        Box::new(StagedReceiver { source, carried })
                    }
                    _ => Box::new(InPlaceReceiver { kind, source, counters }),
                }
            }
            TransportKind::Grpc => Box::new(GrpcReceiver {
                layout: self.layout,
                counters,
            }),
        })
    }

    fn impossible(&self, peer: String, reason: String) -> TransportError {
        TransportError::Impossible {
            wanted: self.choice,
            peer,
            reason,
        }
    }

    /// Says once for each peer by what its KV comes, and again when that changes.
    fn say(&self, kind: TransportKind, offer: &Offer) {
        let mut said = self.said.lock();
        if said.insert(offer.source_incarnation, kind) == Some(kind) {
            return;
        }
        if said.len() > MAX_PEERS_SAID {
            said.pop_first();
        }
        drop(said);
        let source = &offer.source;
        match &offer.missing {
            Some(reason) if kind == TransportKind::Grpc => {
                tracing::warn!(source, transport = %kind, reason, "KV comes by gRPC on one host: it cannot be read in place");
            }
            Some(reason) => tracing::info!(source, transport = %kind, reason, "KV comes from another instance"),
            None => tracing::info!(source, transport = %kind, "KV comes from another instance"),
        }
    }
}

fn names(kinds: &[TransportKind]) -> String {
    let names: Vec<&str> = kinds.iter().map(|kind| kind.as_str()).collect();
    names.join(" or ")
}

/// Whether an address can only be of this host.
fn is_local(address: &str) -> bool {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    address.starts_with("unix:")
        || host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
