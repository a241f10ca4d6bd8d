//! The calls a front door makes for one request: streams to instances, and the word that lets a source go on.

use baton_proto::cluster::{self, generate_event::Event};
use baton_proto::{cluster::GenerateEvent, common_version};
use baton_scheduler::ids::{Epoch, InstanceId, Nanos};
use baton_scheduler::request::{Failure, PortableState};
use futures::future::BoxFuture;
use tonic::{Status, Streaming};

use super::cluster::{Called, Cluster, InstanceClient, Reachable};

/// A stream to an instance that generates, or will.
pub(super) struct OpenStream {
    pub(super) events: Streaming<GenerateEvent>,
    pub(super) instance: InstanceId,
    pub(super) opened_at: Nanos,
    called: Called,
}

impl OpenStream {
    /// What the stream says next: an event, or why it broke.
    pub(super) async fn next(&mut self) -> Result<GenerateEvent, Failure> {
        let lost = |reason: &str| Failure::InstanceLost(format!("{}: {reason}", self.instance));
        match self.events.message().await {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err(lost("its stream ended without a typed end")),
            Err(status) => Err(lost(&said(&status))),
        }
    }

    /// As the source of a move.
    pub(super) fn peer(&self) -> cluster::Peer {
        self.called.peer.clone()
    }
}

pub(super) fn said(status: &Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

pub(super) fn handshake(called: &Called) -> Option<cluster::Handshake> {
    Some(cluster::Handshake {
        protocol_version: common_version(called.peer.protocol_version),
        fingerprint: called.fingerprint.clone(),
        callee_incarnation: called.peer.incarnation,
    })
}

/// A call under way.
pub(super) type Opening = BoxFuture<'static, Result<OpenStream, (Failure, InstanceId)>>;

async fn opened(
    call: impl Future<Output = Result<tonic::Response<Streaming<GenerateEvent>>, Status>>,
    called: Called,
    opened_at: Nanos,
    limit: std::time::Duration,
) -> Result<OpenStream, (Failure, InstanceId)> {
    let instance = InstanceId::new(&called.peer.instance_id);
    let lost = |reason: &str| (Failure::InstanceLost(format!("{instance}: {reason}")), instance.clone());
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(OpenStream {
            events: response.into_inner(),
            instance,
            opened_at,
            called,
        }),
        Ok(Err(status)) => Err(lost(&said(&status))),
        Err(_) => Err(lost("no answer to the call")),
    }
}

/// Calls the placed decode instance.
pub(super) fn generate(cluster: &Cluster, state: &PortableState, placed: Reachable) -> Opening {
    let Reachable { decode, prefill, .. } = placed;
    let request = cluster::GenerateRequest {
        handshake: handshake(&decode),
        state: Some(state.into()),
        prefill,
    };
    let (opened_at, limit) = (cluster.now(), cluster.call_timeout());
    let mut client = decode.client.clone();
    Box::pin(async move { opened(client.generate(request), decode, opened_at, limit).await })
}

/// Calls the destination of a move.
pub(super) fn attach(cluster: &Cluster, state: &PortableState, source: cluster::Peer, destination: Called) -> Opening {
    let request = cluster::AttachRequest {
        handshake: handshake(&destination),
        state: Some(state.into()),
        source: Some(source),
    };
    let (opened_at, limit) = (cluster.now(), cluster.call_timeout());
    let mut client = destination.client.clone();
    Box::pin(async move { opened(client.attach(request), destination, opened_at, limit).await })
}

/// Tells the source of a failed move to go on. Whatever it answers, it was told, or has nothing to resume; then its stream
/// says what became of the request, and giving that up would compute again what is on its way.
///
/// # Errors
/// `InstanceLost` when nobody answers.
pub(super) fn resume(
    cluster: &Cluster,
    source: &OpenStream,
    state: &PortableState,
    epoch: Epoch,
) -> BoxFuture<'static, Result<(), Failure>> {
    let request = cluster::ResumeRequest {
        handshake: handshake(&source.called),
        request_id: state.request.id.0.to_be_bytes().to_vec(),
        epoch: epoch.0,
        next_index: state.choices.iter().map(|choice| choice.output.len() as u32).collect(),
    };
    let (instance, limit) = (source.instance.clone(), cluster.call_timeout());
    let mut client: InstanceClient = source.called.client.clone();
    Box::pin(async move {
        let lost = |reason: &str| Failure::InstanceLost(format!("{instance} could not be told to go on: {reason}"));
        match tokio::time::timeout(limit, client.resume(request)).await {
            Ok(Ok(answer)) => {
                if let Some(failure) = answer.into_inner().failure {
                    let failure = Failure::from(failure);
                    tracing::debug!(%instance, %failure, "there is nothing to resume");
                }
                Ok(())
            }
            Ok(Err(status)) => Err(lost(&said(&status))),
            Err(_) => Err(lost("no answer to the call")),
        }
    })
}

/// Whether an event says that a destination decodes.
pub(super) fn is_joined(event: &Event) -> bool {
    use baton_scheduler::timeline::Moment;
    matches!(event, Event::Moment(reached) if reached.moment == Moment::Joined as u32)
}
