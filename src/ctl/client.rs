//! Calls to the operator's service, each with a bound and one line of error. What the answers mean is not decided here.

use std::time::Duration;

use baton_proto::cluster::operator_client::OperatorClient;
use baton_proto::cluster::{
    DrainProgress, DrainRequest, InstanceStatus, ListInstancesRequest, ListRequestsRequest, MoveOneRequest,
    MoveOneResponse, RequestStatus, SetRoleRequest,
};
use baton_proto::link::{ClusterSecret, LinkOptions, PresentSecret};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use super::CtlConfig;

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing came in time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// The server, or the way to it, said no.
    #[error("{}", reason(.0))]
    Refused(Status),
    /// The server closed the drain's stream early.
    #[error("the server ended the drain before the instance was empty")]
    Unfinished,
}

impl CallError {
    /// Whether the server is of a version without this call.
    fn is_unknown_call(&self) -> bool {
        matches!(self, CallError::Refused(status) if status.code() == Code::Unimplemented)
    }
}

/// A connection that failed says why only in its innermost cause.
fn reason(status: &Status) -> String {
    let code = status.code();
    match anyhow::Chain::new(status).skip(1).last() {
        Some(cause) => format!("{code:?}: {cause}"),
        None => format!("{code:?}: {}", status.message()),
    }
}

/// Shows the cluster's secret and the API key with every call.
#[derive(Clone, Debug)]
struct Credentials {
    secret: PresentSecret,
    api_key: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Credentials {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.secret.call(request)?;
        if let Some(key) = &self.api_key {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

type Client = OperatorClient<InterceptedService<Channel, Credentials>>;

/// A scheduler process as operators see it. The connection is opened with the first call, and again when it was lost.
#[derive(Clone, Debug)]
pub struct OperatorLink {
    client: Client,
    timeout: Duration,
}

impl OperatorLink {
    /// Whom `config` names.
    ///
    /// # Errors
    /// A secret or key that no header can carry.
    pub fn open(config: &CtlConfig) -> anyhow::Result<OperatorLink> {
        let secret = config.cluster_secret.as_ref();
        let link = LinkOptions {
            connect_timeout: config.timeout,
            secret: secret.map(|secret| ClusterSecret::new(secret.expose())).transpose()?,
            ..LinkOptions::default()
        };
        let api_key = match &config.api_key {
            None => None,
            Some(key) => {
                let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.expose()).parse()?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let credentials = Credentials {
            secret: link.present_secret(),
            api_key,
        };
        Ok(OperatorLink {
            client: OperatorClient::with_interceptor(link.channel(&config.server.to_string())?, credentials),
            timeout: config.timeout,
        })
    }

    /// The instances known now.
    pub async fn instances(&self) -> Result<Vec<InstanceStatus>, CallError> {
        let mut client = self.client.clone();
        let answer = self.within(client.list_instances(ListInstancesRequest {})).await?;
        Ok(answer.instances)
    }

    /// The requests open now.
    pub async fn requests(&self) -> Result<Vec<RequestStatus>, CallError> {
        let mut client = self.client.clone();
        let answer = self.within(client.list_requests(ListRequestsRequest {})).await?;
        Ok(answer.requests)
    }

    /// The same, or `None` from a server that does not know the question.
    pub async fn requests_if_told(&self) -> Result<Option<Vec<RequestStatus>>, CallError> {
        match self.requests().await {
            Ok(requests) => Ok(Some(requests)),
            Err(error) if error.is_unknown_call() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Moves a request, to where the policy chooses when `to` is empty.
    pub async fn move_one(&self, request_id: String, to: String) -> Result<MoveOneResponse, CallError> {
        let mut client = self.client.clone();
        self.within(client.move_one(MoveOneRequest { request_id, to })).await
    }

    /// Takes an instance out of use, or back into it. The stream has no bound: it ends with the instance's last request, or
    /// with the connection.
    pub async fn drain(&self, instance_id: String, undo: bool) -> Result<Streaming<DrainProgress>, CallError> {
        let mut client = self.client.clone();
        self.within(client.drain(DrainRequest { instance_id, undo })).await
    }

    /// Changes what an instance is used for; returns what it was.
    pub async fn set_role(&self, instance_id: String, role: String) -> Result<String, CallError> {
        let mut client = self.client.clone();
        let answer = self
            .within(client.set_role(SetRoleRequest { instance_id, role }))
            .await?;
        Ok(answer.previous)
    }

    async fn within<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, CallError> {
        match tokio::time::timeout(self.timeout, call).await {
            Err(_) => Err(CallError::Silent(self.timeout)),
            Ok(Err(status)) => Err(CallError::Refused(status)),
            Ok(Ok(response)) => Ok(response.into_inner()),
        }
    }
}
