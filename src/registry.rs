//! The registry of a scheduler process: workers are members for as long as their stream lives. It stores nothing.

use std::pin::Pin;
use std::sync::Arc;

use baton_proto::cluster::registry_command::Command;
use baton_proto::cluster::registry_server::RegistryServer;
use baton_proto::cluster::{self, registry_server};
use baton_proto::link::RequireSecret;
use baton_scheduler::ids::{Incarnation, InstanceId};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status, Streaming};

use crate::api::grpc;
use crate::door::Cluster;

/// Commands that may wait for a worker.
const MAX_COMMANDS: usize = 4;

/// The service.
#[derive(Clone)]
pub struct RegistryService {
    cluster: Arc<Cluster>,
    stopping: CancellationToken,
}

impl RegistryService {
    /// A registry that feeds `cluster` until `stopping`.
    pub fn new(cluster: Arc<Cluster>, stopping: CancellationToken) -> RegistryService {
        RegistryService { cluster, stopping }
    }
}

/// The service behind the cluster's secret.
pub type Guarded = InterceptedService<RegistryServer<RegistryService>, RequireSecret>;

/// The service as a route of the scheduler's port.
pub fn route(service: Guarded) -> axum::Router {
    grpc::add(axum::Router::new(), service)
}

type CommandStream = Pin<Box<dyn Stream<Item = Result<cluster::RegistryCommand, Status>> + Send>>;

#[tonic::async_trait]
impl registry_server::Registry for RegistryService {
    type JoinStream = CommandStream;

    async fn join(
        &self,
        request: Request<Streaming<cluster::WorkerReport>>,
    ) -> Result<Response<CommandStream>, Status> {
        let mut reports = request.into_inner();
        let first = reports
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("the stream ended before its first report"))?;
        let join = first
            .join
            .clone()
            .ok_or_else(|| Status::invalid_argument("field join is missing in the first report"))?;
        let (role, model) = (join.role.clone(), join.model.clone());
        let (id, incarnation) = self
            .cluster
            .join(join)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        tracing::info!(instance = %id, %incarnation, role, model, "instance joined");
        let membership = Membership {
            cluster: Arc::clone(&self.cluster),
            id,
            incarnation,
        };
        membership.report(first)?;
        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        self.cluster
            .set_commands(&membership.id, membership.incarnation, commands.clone());
        let welcome = cluster::RegistryCommand {
            command: Some(Command::Welcome(true)),
        };
        commands
            .try_send(Ok(welcome))
            .expect("an empty channel takes a command");
        let stopping = self.stopping.clone();
        tokio::spawn(async move {
            loop {
                let report = tokio::select! {
                    report = reports.message() => report,
                    () = commands.closed() => break,
                    () = stopping.cancelled() => break,
                };
                let reported = match report {
                    Ok(Some(report)) => membership.report(report),
                    Ok(None) => break,
                    Err(status) => {
                        tracing::debug!(instance = %membership.id, reason = status.message(), "membership broke");
                        break;
                    }
                };
                if let Err(status) = reported {
                    let _ = commands.try_send(Err(status));
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// A worker's membership, ended on drop.
struct Membership {
    cluster: Arc<Cluster>,
    id: InstanceId,
    incarnation: Incarnation,
}

impl Membership {
    fn report(&self, report: cluster::WorkerReport) -> Result<(), Status> {
        self.cluster
            .report(&self.id, self.incarnation, report)
            .map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        tracing::info!(instance = %self.id, incarnation = %self.incarnation, "instance left");
        self.cluster.leave(&self.id, self.incarnation);
    }
}
