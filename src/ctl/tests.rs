//! The operator's questions against a scripted scheduler process.

use std::sync::Arc;

use baton_proto::cluster::operator_server::{Operator, OperatorServer};
use baton_proto::cluster::{self, InstanceStatus, RequestStatus, WorkerJoin, WorkerLoad};
use baton_proto::link::{ClusterSecret, LinkOptions};
use futures::stream::BoxStream;
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status};

use super::requests::{MOVING, QUEUED};
use super::*;
use crate::config::Setting as _;

/// What the fake scheduler process answers; tests change it while it runs.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) instances: Vec<InstanceStatus>,
    /// `None`: a server that does not know the question.
    pub(crate) requests: Option<Vec<RequestStatus>>,
    pub(crate) drain: Vec<Result<cluster::DrainProgress, Status>>,
    pub(crate) moved: Vec<cluster::MoveOneRequest>,
    pub(crate) drained: Vec<cluster::DrainRequest>,
    pub(crate) roles: Vec<cluster::SetRoleRequest>,
}

/// A scheduler process that plays a script.
#[derive(Clone, Default)]
pub(crate) struct FakeOperator(pub(crate) Arc<Mutex<Script>>);

#[tonic::async_trait]
impl Operator for FakeOperator {
    type DrainStream = BoxStream<'static, Result<cluster::DrainProgress, Status>>;

    async fn list_instances(
        &self,
        _: Request<cluster::ListInstancesRequest>,
    ) -> Result<Response<cluster::ListInstancesResponse>, Status> {
        let instances = self.0.lock().instances.clone();
        Ok(Response::new(cluster::ListInstancesResponse { instances }))
    }

    async fn list_requests(
        &self,
        _: Request<cluster::ListRequestsRequest>,
    ) -> Result<Response<cluster::ListRequestsResponse>, Status> {
        let requests = self.0.lock().requests.clone();
        let requests = requests.ok_or_else(|| Status::unimplemented("of another time"))?;
        Ok(Response::new(cluster::ListRequestsResponse { requests }))
    }

    async fn move_one(
        &self,
        request: Request<cluster::MoveOneRequest>,
    ) -> Result<Response<cluster::MoveOneResponse>, Status> {
        let request = request.into_inner();
        if request.request_id != "r-1" {
            return Err(Status::not_found(format!(
                "request_id is {:?}, which is not open here",
                request.request_id
            )));
        }
        let to = if request.to.is_empty() {
            "decode-1".to_owned()
        } else {
            request.to.clone()
        };
        self.0.lock().moved.push(request);
        let from = "decode-0".to_owned();
        Ok(Response::new(cluster::MoveOneResponse {
            from,
            to,
            seconds: 0.0125,
        }))
    }

    async fn drain(&self, request: Request<cluster::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        let mut script = self.0.lock();
        script.drained.push(request.into_inner());
        let progress = std::mem::take(&mut script.drain);
        Ok(Response::new(Box::pin(tokio_stream::iter(progress))))
    }

    async fn set_role(
        &self,
        request: Request<cluster::SetRoleRequest>,
    ) -> Result<Response<cluster::SetRoleResponse>, Status> {
        self.0.lock().roles.push(request.into_inner());
        let previous = "decode".to_owned();
        Ok(Response::new(cluster::SetRoleResponse { previous }))
    }
}

/// An instance with 100 blocks, 10 of them held.
pub(crate) fn instance(id: &str, role: &str, n_running: u32) -> InstanceStatus {
    InstanceStatus {
        join: Some(WorkerJoin {
            instance_id: id.into(),
            role: role.into(),
            address: "unix:/run/x.sock".into(),
            incarnation: 0xab,
            n_blocks_total: 100,
            pid: 7,
            ..WorkerJoin::default()
        }),
        load: Some(WorkerLoad {
            n_running,
            n_blocks_free: 60,
            n_blocks_cached: 30,
            healthy: true,
            ledger_whole: true,
            ..WorkerLoad::default()
        }),
        joined_seconds_ago: 12,
        draining: false,
    }
}

/// A request that decodes on decode-0.
pub(crate) fn request(id: &str, stage: &str, age_seconds: f64) -> RequestStatus {
    RequestStatus {
        request_id: id.into(),
        label: format!("client {id}"),
        stage: stage.into(),
        decode_instance: "decode-0".into(),
        n_prompt_tokens: 7,
        n_choices: 1,
        n_output_tokens: 3,
        max_tokens: 16,
        epoch: 1,
        age_seconds,
        ..RequestStatus::default()
    }
}

impl FakeOperator {
    /// Two instances, and a server that knows every question.
    pub(crate) fn with_two_instances() -> FakeOperator {
        let operator = FakeOperator::default();
        let instances = vec![instance("prefill-0", "prefill", 0), instance("decode-0", "decode", 3)];
        *operator.0.lock() = Script {
            instances,
            requests: Some(Vec::new()),
            ..Script::default()
        };
        operator
    }

    /// Serves on `listener`, behind the secret `s3cret`.
    pub(crate) fn serve(&self, listener: tokio::net::TcpListener) -> tokio::task::JoinHandle<()> {
        let secret = Some(ClusterSecret::new("s3cret").expect("printable"));
        let guard = LinkOptions {
            secret,
            ..LinkOptions::default()
        }
        .require_secret();
        let service = OperatorServer::with_interceptor(self.clone(), guard);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(async move {
            let served = server.serve_with_incoming(TcpListenerStream::new(listener)).await;
            served.expect("the listener works");
        })
    }

    /// Serves on a free port.
    pub(crate) async fn start(&self) -> Address {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = Address::parse(&listener.local_addr().expect("bound").to_string()).expect("an address");
        self.serve(listener);
        address
    }
}

/// How tests ask `server`.
pub(crate) fn config(server: Address, secret: Option<&str>) -> CtlConfig {
    let cluster_secret = secret.and_then(Secret::parse);
    CtlConfig {
        server,
        json: false,
        timeout: Duration::from_secs(20),
        api_key: None,
        cluster_secret,
    }
}

async fn ask(operator: &FakeOperator, json: bool, order: Order) -> Result<String, CallError> {
    let link = OperatorLink::open(&config(operator.start().await, Some("s3cret"))).expect("a valid configuration");
    answer(&link, json, order).await
}

/// The cells of the line that begins with `id`.
fn cells<'a>(table: &'a str, id: &str) -> Vec<&'a str> {
    let line = table.lines().find(|line| line.starts_with(id)).expect("a line for it");
    line.split("  ")
        .map(str::trim)
        .filter(|cell| !cell.is_empty())
        .collect()
}

#[tokio::test]
async fn instances_are_listed_by_name_with_their_moves() {
    let operator = FakeOperator::with_two_instances();
    let moving = RequestStatus {
        destination_instance: "prefill-0".into(),
        ..request("a", MOVING, 1.0)
    };
    operator.0.lock().requests = Some(vec![moving, request("b", "decode", 1.0)]);
    let text = ask(&operator, false, Order::Instances).await.expect("an answer");
    let expected = [
        "decode-0",
        "decode",
        "ok",
        "3",
        "0",
        "0/1",
        "10/100",
        "0",
        "12.0s",
        "7",
        "unix:/run/x.sock",
    ];
    assert_eq!(cells(&text, "decode-0"), expected);
    assert_eq!(cells(&text, "prefill-0")[5], "1/0");
    assert!(text.find("decode-0") < text.find("prefill-0"), "{text}");

    let json = ask(&operator, true, Order::Instances).await.expect("an answer");
    let rows: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        (&rows[0]["id"], &rows[0]["incarnation"]),
        (&"decode-0".into(), &"00000000000000ab".into())
    );
    assert_eq!(
        (&rows[0]["n_moving_out"], &rows[0]["draining"]),
        (&1.into(), &false.into())
    );
}

#[tokio::test]
async fn a_server_that_cannot_list_requests_still_lists_instances() {
    let operator = FakeOperator::with_two_instances();
    operator.0.lock().requests = None;
    let text = ask(&operator, false, Order::Instances).await.expect("an answer");
    assert_eq!(cells(&text, "decode-0")[5], "-");
    let error = ask(&operator, false, Order::Requests)
        .await
        .expect_err("not known there");
    assert_eq!(error.to_string(), "Unimplemented: of another time");
}

#[test]
fn the_state_says_first_what_is_worst() {
    let row = |draining, n_running, n_open, change: fn(&mut WorkerLoad)| {
        let mut status = instance("x", "decode", n_running);
        status.draining = draining;
        let load = status.load.as_mut().expect("a load");
        load.n_open = n_open;
        change(load);
        InstanceRow::from(status).state()
    };
    assert_eq!(row(false, 1, 1, |_| ()), "ok");
    assert_eq!(
        row(true, 0, 1, |_| ()),
        "draining",
        "a paused request is no running one"
    );
    assert_eq!(
        row(true, 1, 0, |_| ()),
        "draining",
        "workers of version 1 do not count open ones"
    );
    assert_eq!(row(true, 0, 0, |_| ()), "drained");
    assert_eq!(row(false, 0, 0, |load| load.leaving = true), "leaving");
    assert_eq!(row(true, 0, 0, |load| load.ledger_whole = false), "leaking");
    assert_eq!(row(true, 0, 0, |load| load.healthy = false), "stuck");
}

#[tokio::test]
async fn requests_are_listed_oldest_first_with_where_they_go() {
    let operator = FakeOperator::with_two_instances();
    let moving = RequestStatus {
        destination_instance: "decode-1".into(),
        n_choices: 2,
        n_moves: 1,
        ..request("mover", MOVING, 2.0)
    };
    let handed_over = RequestStatus {
        prefill_instance: "prefill-0".into(),
        ..request("fresh", "prefill", 0.5)
    };
    let queued = RequestStatus {
        decode_instance: String::new(),
        ..request("queued", QUEUED, 75.0)
    };
    operator.0.lock().requests = Some(vec![handed_over, queued, moving]);
    let text = ask(&operator, false, Order::Requests).await.expect("an answer");
    let ids: Vec<&str> = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(ids, ["queued", "mover", "fresh"]);
    let expected = [
        "mover",
        "moving",
        "decode-0 -> decode-1",
        "3/32",
        "7",
        "2",
        "1",
        "1",
        "2.0s",
        "client mover",
    ];
    assert_eq!(cells(&text, "mover"), expected);
    assert_eq!(cells(&text, "fresh")[2], "prefill-0 -> decode-0");
    assert_eq!((cells(&text, "queued")[2], cells(&text, "queued")[8]), ("-", "1m15s"));
    let json = ask(&operator, true, Order::Requests).await.expect("an answer");
    let rows: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        (&rows[1]["destination_instance"], &rows[1]["n_moves"]),
        (&"decode-1".into(), &1.into())
    );
}

#[tokio::test]
async fn a_request_is_moved_where_it_is_told_or_where_the_policy_chooses() {
    let operator = FakeOperator::with_two_instances();
    let migrate = |id: &str, to: Option<&str>| Order::Migrate {
        id: id.into(),
        to: to.map(str::to_owned),
    };
    let text = ask(&operator, false, migrate("r-1", None)).await.expect("moved");
    assert_eq!(text, "r-1 moved: decode-0 -> decode-1 in 12.5 ms");
    let json = ask(&operator, true, migrate("r-1", Some("mixed-3")))
        .await
        .expect("moved");
    let row: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&row["to"], &row["seconds"]), (&"mixed-3".into(), &0.0125.into()));
    let asked: Vec<String> = operator
        .0
        .lock()
        .moved
        .iter()
        .map(|request| request.to.clone())
        .collect();
    assert_eq!(asked, ["", "mixed-3"]);

    let error = ask(&operator, false, migrate("r-9", None)).await.expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "NotFound: request_id is \"r-9\", which is not open here"
    );
}

fn progress(n_open: u32, n_moved: u32, done: bool) -> Result<cluster::DrainProgress, Status> {
    Ok(cluster::DrainProgress {
        n_open,
        n_moved,
        n_failed_moves: 1,
        done,
    })
}

#[tokio::test]
async fn a_drain_is_followed_until_the_instance_is_empty() {
    let operator = FakeOperator::with_two_instances();
    operator.0.lock().drain = vec![
        progress(2, 0, false),
        progress(2, 0, false),
        progress(1, 1, false),
        progress(0, 2, true),
    ];
    let link = OperatorLink::open(&config(operator.start().await, Some("s3cret"))).expect("valid");
    let mut seen = Vec::new();
    let last = changes::drain(&link, "decode-0", |row| seen.push(row.text()))
        .await
        .expect("empty");
    assert!(last.done);
    let expected = [
        "decode-0: 2 open, 0 moved, 1 moves failed",
        "decode-0: 1 open, 1 moved, 1 moves failed",
        "decode-0: empty; 2 moved, 1 moves failed",
    ];
    assert_eq!(seen, expected, "each change once");
    let drained = operator.0.lock().drained.clone();
    assert_eq!((drained[0].instance_id.as_str(), drained[0].undo), ("decode-0", false));
}

#[tokio::test]
async fn a_drain_that_ends_early_is_an_error() {
    let operator = FakeOperator::with_two_instances();
    operator.0.lock().drain = vec![progress(2, 0, false)];
    let drain = || Order::Drain {
        id: "decode-0".into(),
        undo: false,
    };
    let error = ask(&operator, true, drain()).await.expect_err("not empty");
    assert!(matches!(error, CallError::Unfinished), "{error}");

    operator.0.lock().drain = vec![
        progress(2, 0, false),
        Err(Status::failed_precondition("the only decode instance")),
    ];
    let error = ask(&operator, true, drain()).await.expect_err("refused");
    assert!(
        matches!(&error, CallError::Refused(status) if status.code() == Code::FailedPrecondition),
        "{error}"
    );
}

#[tokio::test]
async fn a_drain_is_undone_and_a_role_is_changed() {
    let operator = FakeOperator::with_two_instances();
    let undo = Order::Drain {
        id: "decode-0".into(),
        undo: true,
    };
    assert_eq!(
        ask(&operator, false, undo.clone()).await.expect("undone"),
        "decode-0 is in use again"
    );
    assert!(
        ask(&operator, true, undo)
            .await
            .expect("undone")
            .ends_with(r#""done":true}"#)
    );
    assert!(operator.0.lock().drained.iter().all(|request| request.undo));

    let role = Order::Role {
        id: "decode-0".into(),
        role: Role::Prefill,
    };
    assert_eq!(
        ask(&operator, false, role).await.expect("changed"),
        "decode-0: decode -> prefill"
    );
    assert_eq!(operator.0.lock().roles[0].role, "prefill");
}

#[tokio::test]
async fn refusals_and_silence_are_one_line_with_the_address() {
    let message = async |server: &Address, secret| {
        let error = run(&config(server.clone(), secret), Order::Instances)
            .await
            .expect_err("no answer");
        format!("{error:#}")
    };
    let server = FakeOperator::with_two_instances().start().await;
    let refused = message(&server, None).await;
    assert!(
        refused.starts_with(&format!("scheduler at {server}: ")) && refused.contains("secret"),
        "{refused}"
    );

    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let closed = Address::parse(&listener.local_addr().expect("bound").to_string()).expect("an address");
    drop(listener);
    let failed = message(&closed, None).await;
    assert!(
        failed.starts_with(&format!("scheduler at {closed}: ")) && !failed.contains('\n'),
        "{failed}"
    );
}
