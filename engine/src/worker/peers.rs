//! Connections to other instances, one for each incarnation: a restarted peer is a new connection, never an old one.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_proto::cluster;
use baton_proto::cluster::worker_client::WorkerClient;
use baton_proto::link::{LinkError, LinkOptions, MAX_MESSAGE_BYTES, PresentSecret};
use parking_lot::Mutex;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// A client of another instance's worker service.
pub type PeerClient = WorkerClient<InterceptedService<Channel, PresentSecret>>;

/// Connections kept; beyond it the ones of the oldest names are closed.
const MAX_PEERS: usize = 1024;

#[derive(Clone)]
pub(super) struct Peers {
    link: LinkOptions,
    /// By instance: its incarnation and its connection.
    channels: Arc<Mutex<BTreeMap<String, (u64, Channel)>>>,
}

impl Peers {
    pub(super) fn new(link: LinkOptions) -> Peers {
        Peers {
            link,
            channels: Arc::default(),
        }
    }

    pub(super) fn client(&self, peer: &cluster::Peer) -> Result<PeerClient, LinkError> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(&peer.instance_id) {
            Some((incarnation, channel)) if *incarnation == peer.incarnation => channel.clone(),
            _ => {
                let channel = self.link.channel(&peer.address)?;
                if channels.len() >= MAX_PEERS {
                    channels.pop_first();
                }
                channels.insert(peer.instance_id.clone(), (peer.incarnation, channel.clone()));
                channel
            }
        };
        Ok(WorkerClient::with_interceptor(channel, self.link.present_secret())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }
}
