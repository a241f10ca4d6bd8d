//! What operators ask of a scheduler process, behind the API key: what there is, and that something be moved, emptied or
//! used otherwise.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster::{self, operator_server};
use baton_proto::convert::role_from_wire;
use baton_scheduler::ids::InstanceId;
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::door::{Cluster, EmptyingTotals, MoveError, MoveReason, OpenRequest, OpenRequests, n_open};

/// How often a drain says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The service.
#[derive(Clone)]
pub struct OperatorService {
    cluster: Arc<Cluster>,
    requests: OpenRequests,
    emptying: EmptyingTotals,
}

impl OperatorService {
    /// Answers from a front door's cluster and requests.
    pub fn new(cluster: Arc<Cluster>, requests: OpenRequests, emptying: EmptyingTotals) -> OperatorService {
        OperatorService {
            cluster,
            requests,
            emptying,
        }
    }
}

fn status(error: MoveError) -> Status {
    let message = error.to_string();
    match error {
        MoveError::UnknownRequest(_) | MoveError::UnknownInstance { .. } => Status::not_found(message),
        MoveError::Refused(_) => Status::failed_precondition(message),
        MoveError::Failed { .. } => Status::aborted(message),
    }
}

fn request_status(request: &OpenRequest) -> cluster::RequestStatus {
    let progress = request.progress();
    let name = |instance: Option<InstanceId>| instance.map(|id| id.to_string()).unwrap_or_default();
    cluster::RequestStatus {
        request_id: request.id.to_string(),
        label: request.label.to_string(),
        stage: progress.stage.as_str().to_owned(),
        decode_instance: name(progress.decode),
        prefill_instance: name(progress.prefill),
        destination_instance: name(progress.destination),
        n_prompt_tokens: request.n_prompt_tokens,
        n_choices: request.n_choices,
        n_output_tokens: progress.n_output_tokens,
        max_tokens: request.max_tokens,
        epoch: progress.epoch,
        n_moves: progress.n_moves,
        age_seconds: request.opened_at.elapsed().as_secs_f64(),
    }
}

type DrainStream = Pin<Box<dyn Stream<Item = Result<cluster::DrainProgress, Status>> + Send>>;

#[tonic::async_trait]
impl operator_server::Operator for OperatorService {
    type DrainStream = DrainStream;

    async fn list_instances(
        &self,
        _request: Request<cluster::ListInstancesRequest>,
    ) -> Result<Response<cluster::ListInstancesResponse>, Status> {
        let members = self.cluster.members().into_iter();
        let instances = members
            .map(|member| cluster::InstanceStatus {
                joined_seconds_ago: member.joined_at.elapsed().as_secs(),
                draining: self.cluster.is_draining(&InstanceId::new(&member.join.instance_id)),
                join: Some(member.join),
                load: Some(member.load),
            })
            .collect();
        Ok(Response::new(cluster::ListInstancesResponse { instances }))
    }

    async fn list_requests(
        &self,
        _request: Request<cluster::ListRequestsRequest>,
    ) -> Result<Response<cluster::ListRequestsResponse>, Status> {
        let requests = self.requests.all();
        let requests = requests.iter().map(|request| request_status(request)).collect();
        Ok(Response::new(cluster::ListRequestsResponse { requests }))
    }

    async fn move_one(
        &self,
        request: Request<cluster::MoveOneRequest>,
    ) -> Result<Response<cluster::MoveOneResponse>, Status> {
        let asked = request.into_inner();
        let request = self.requests.find(&asked.request_id).map_err(status)?;
        let to = (!asked.to.is_empty()).then(|| InstanceId::new(&asked.to));
        let moved = request.move_to(to, MoveReason::Operator).await.map_err(status)?;
        Ok(Response::new(cluster::MoveOneResponse {
            from: moved.from.to_string(),
            to: moved.to.to_string(),
            seconds: moved.took.as_secs_f64(),
        }))
    }

    async fn drain(&self, request: Request<cluster::DrainRequest>) -> Result<Response<DrainStream>, Status> {
        let asked = request.into_inner();
        let id = InstanceId::new(&asked.instance_id);
        self.cluster.set_draining(&id, !asked.undo).map_err(status)?;
        tracing::info!(instance = %id, undo = asked.undo, "drain");
        let (progress, receiver) = mpsc::channel(1);
        let (service, before) = (self.clone(), self.emptying.get(&id));
        tokio::spawn(async move {
            loop {
                let n_open = n_open(&service.cluster, &service.requests, &id);
                let (n_moved, n_failed) = service.emptying.get(&id);
                let is_off = asked.undo || !service.cluster.is_draining(&id);
                let done = !asked.undo && n_open == 0;
                let message = cluster::DrainProgress {
                    n_open,
                    n_moved: (n_moved - before.0) as u32,
                    n_failed_moves: (n_failed - before.1) as u32,
                    done,
                };
                // Whoever watches may leave; the drain goes on.
                if progress.send(Ok(message)).await.is_err() || done || is_off {
                    return;
                }
                tokio::time::sleep(PROGRESS_INTERVAL).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn set_role(
        &self,
        request: Request<cluster::SetRoleRequest>,
    ) -> Result<Response<cluster::SetRoleResponse>, Status> {
        let asked = request.into_inner();
        let role = role_from_wire(&asked.role).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let id = InstanceId::new(&asked.instance_id);
        let previous = self.cluster.set_role(&id, role).map_err(status)?;
        tracing::info!(instance = %id, from = previous.as_str(), to = role.as_str(), "role changed");
        Ok(Response::new(cluster::SetRoleResponse {
            previous: previous.as_str().to_owned(),
        }))
    }
}
