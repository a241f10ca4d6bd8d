//! Joining a registry, staying in it, and coming back when it goes.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use baton_proto::cluster::registry_command::Command;
use baton_proto::cluster::registry_server::{self, RegistryServer};
use baton_proto::cluster::{self, WorkerReport};
use baton_scheduler::ids::Role;
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::super::{Membership, Standing, WorkerOptions, join_registry};
use super::cluster::*;

/// One membership as the registry sees it.
struct Member {
    reports: Streaming<WorkerReport>,
    commands: mpsc::Sender<Result<cluster::RegistryCommand, Status>>,
}

impl Member {
    async fn report(&mut self) -> WorkerReport {
        let report = timeout(PATIENCE, self.reports.message()).await;
        report.expect("a report comes").unwrap().expect("the worker stays")
    }

    async fn say(&self, command: Command) {
        let command = cluster::RegistryCommand { command: Some(command) };
        self.commands.send(Ok(command)).await.unwrap();
    }
}

/// Gives each membership to the test.
struct Registry {
    members: mpsc::Sender<Member>,
    /// Calls that are never answered, before those that are.
    n_unanswered: AtomicUsize,
}

#[tonic::async_trait]
impl registry_server::Registry for Registry {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<cluster::RegistryCommand, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<WorkerReport>>) -> Result<Response<Self::JoinStream>, Status> {
        let count_down = |n: usize| n.checked_sub(1);
        if self.n_unanswered.fetch_update(SeqCst, SeqCst, count_down).is_ok() {
            std::future::pending::<()>().await;
        }
        let (commands, receiver) = mpsc::channel(4);
        let reports = request.into_inner();
        self.members.send(Member { reports, commands }).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn registry() -> (String, mpsc::Receiver<Member>) {
    hanging_registry(0).await
}

async fn hanging_registry(n_unanswered: usize) -> (String, mpsc::Receiver<Member>) {
    let (members, receiver) = mpsc::channel(4);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder().add_service(RegistryServer::new(Registry {
        members,
        n_unanswered: AtomicUsize::new(n_unanswered),
    }));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, receiver)
}

fn membership(scheduler: &str) -> Membership {
    Membership {
        scheduler: scheduler.to_owned(),
        advertise: "127.0.0.1:7".to_owned(),
        model: "hash".to_owned(),
        standing: Arc::new(Standing::new(Role::Decode)),
    }
}

fn quick(name: &'static str) -> Setup {
    let mut setup = Setup::new(name);
    setup.options = WorkerOptions {
        report_interval: Duration::from_millis(5),
        heartbeat: Duration::from_millis(200),
        ..WorkerOptions::default()
    };
    setup
}

async fn next(members: &mut mpsc::Receiver<Member>) -> Member {
    timeout(PATIENCE, members.recv())
        .await
        .expect("the worker joins")
        .unwrap()
}

#[tokio::test]
async fn a_worker_presents_itself_reports_changes_and_leaves() {
    let (address, mut members) = registry().await;
    let worker = quick("decode-0").start().await;
    let n_welcomes = Arc::new(AtomicUsize::new(0));
    let shutdown = CancellationToken::new();
    let joined = {
        let (service, shutdown, n_welcomes) = (worker.service.clone(), shutdown.clone(), Arc::clone(&n_welcomes));
        tokio::spawn(async move {
            let count = || {
                n_welcomes.fetch_add(1, SeqCst);
            };
            join_registry(&service, &membership(&address), shutdown, count).await
        })
    };
    let mut member = next(&mut members).await;
    let first = member.report().await;
    let join = first.join.expect("the first report carries the join");
    assert_eq!(
        (
            join.instance_id.as_str(),
            join.role.as_str(),
            join.address.as_str(),
            join.model.as_str()
        ),
        ("decode-0", "decode", "127.0.0.1:7", "hash")
    );
    assert_eq!((join.incarnation, join.fingerprint), (11, FINGERPRINT.to_vec()));
    assert_eq!(
        (join.block_size, join.n_blocks_total),
        (BLOCK_SIZE as u32, N_BLOCKS as u32)
    );
    assert_eq!(join.kv_bytes_per_token * (BLOCK_SIZE as u64), kv_bytes(1));
    let prefix = first.prefix.unwrap();
    assert!(prefix.cleared && prefix.stored.is_empty());
    let load = first.load.unwrap();
    assert!(load.healthy && load.ledger_whole);
    assert_eq!(load.n_blocks_free, N_BLOCKS as u32);
    member.say(Command::Welcome(true)).await;
    worker.until("welcome", |_| n_welcomes.load(SeqCst) == 1).await;

    // Two full blocks enter the prefix cache.
    let state = greedy(&prompt(1, 40), 2);
    worker.generate(&state, None).await.assert_as_alone(&state);
    let mut stored = Vec::new();
    let mut n_finished = 0;
    while stored.len() < 2 || n_finished == 0 {
        let report = member.report().await;
        assert!(report.join.is_none(), "only the first report joins");
        stored.extend(report.prefix.into_iter().flat_map(|prefix| prefix.stored));
        n_finished = report.load.unwrap().counters["sequences_finished_total"];
    }
    assert_eq!((stored.len(), n_finished), (2, 1));

    // Nothing changes, and yet it is heard.
    let heartbeat = member.report().await;
    assert!(heartbeat.prefix.is_none() && heartbeat.load.is_some());

    // A worker that stops leaves by closing its stream.
    shutdown.cancel();
    timeout(PATIENCE, joined).await.unwrap().unwrap().unwrap();
    let left = async { while let Ok(Some(_)) = member.reports.message().await {} };
    timeout(PATIENCE, left).await.expect("the membership ends");
    worker.stop().await;
}

#[tokio::test]
async fn a_worker_comes_back_with_all_it_holds() {
    let (address, mut members) = registry().await;
    let worker = quick("decode-0").start().await;
    let state = greedy(&prompt(1, 40), 2);
    worker.generate(&state, None).await;
    let n_welcomes = Arc::new(AtomicUsize::new(0));
    let shutdown = CancellationToken::new();
    let joined = {
        let (service, shutdown, n_welcomes) = (worker.service.clone(), shutdown.clone(), Arc::clone(&n_welcomes));
        tokio::spawn(async move {
            let count = || {
                n_welcomes.fetch_add(1, SeqCst);
            };
            join_registry(&service, &membership(&address), shutdown, count).await
        })
    };
    let refuse = |member: Member| async move {
        member
            .commands
            .send(Err(Status::failed_precondition("not you")))
            .await
            .unwrap();
    };
    let close = |member: Member| async move { drop(member) };
    for n_lives in 1..=3 {
        let mut member = next(&mut members).await;
        let first = member.report().await;
        assert!(first.join.is_some());
        let prefix = first.prefix.unwrap();
        assert!(prefix.cleared, "what was reported before is void");
        assert_eq!(prefix.stored.len(), 2, "in its {n_lives}. life it reports all it holds");
        member.say(Command::Welcome(true)).await;
        worker.until("welcome", |_| n_welcomes.load(SeqCst) == n_lives).await;
        if n_lives == 2 {
            refuse(member).await;
        } else {
            close(member).await;
        }
    }
    shutdown.cancel();
    timeout(PATIENCE, joined).await.unwrap().unwrap().unwrap();
    worker.stop().await;
}

#[tokio::test]
async fn a_registry_that_does_not_answer_is_asked_again() {
    let (address, mut members) = hanging_registry(1).await;
    let mut setup = quick("decode-0");
    setup.options.link.connect_timeout = Duration::from_millis(100);
    setup.options.link.keepalive = Duration::from_millis(400);
    let worker = setup.start().await;
    let shutdown = CancellationToken::new();
    let joined = {
        let (service, shutdown) = (worker.service.clone(), shutdown.clone());
        tokio::spawn(async move { join_registry(&service, &membership(&address), shutdown, || {}).await })
    };
    assert!(next(&mut members).await.report().await.join.is_some());
    shutdown.cancel();
    timeout(PATIENCE, joined).await.unwrap().unwrap().unwrap();
    worker.stop().await;
}

#[tokio::test]
async fn a_malformed_scheduler_address_is_an_error() {
    let worker = quick("decode-0").unserved();
    let joined = join_registry(&worker, &membership("not an address"), CancellationToken::new(), || {}).await;
    let message = joined.unwrap_err().to_string();
    assert!(message.contains("not an address"), "{message}");
}

#[tokio::test]
async fn a_role_given_is_kept_and_a_worker_that_leaves_says_so() {
    let (address, mut members) = registry().await;
    let worker = quick("decode-0").start().await;
    let membership = membership(&address);
    let standing = Arc::clone(&membership.standing);
    let shutdown = CancellationToken::new();
    let joined = {
        let (service, shutdown) = (worker.service.clone(), shutdown.clone());
        tokio::spawn(async move { join_registry(&service, &membership, shutdown, || {}).await })
    };
    let mut member = next(&mut members).await;
    assert_eq!(member.report().await.join.unwrap().role, "decode");
    assert!(!standing.is_member(), "it was not welcomed yet");
    member.say(Command::Welcome(true)).await;
    member.say(Command::Role("prefill".to_owned())).await;
    member.say(Command::Role("no such role".to_owned())).await;
    // A restarted scheduler process hears the role of now.
    drop(member);
    let mut member = next(&mut members).await;
    assert_eq!(member.report().await.join.unwrap().role, "prefill");
    assert_eq!(standing.role(), Role::Prefill);
    member.say(Command::Welcome(true)).await;
    standing.leave();
    while !member.report().await.load.unwrap().leaving {}
    assert!(standing.is_member());
    member.say(Command::Drained(true)).await;
    timeout(PATIENCE, standing.drained())
        .await
        .expect("it hears that it is empty");
    shutdown.cancel();
    timeout(PATIENCE, joined).await.unwrap().unwrap().unwrap();
    assert!(!standing.is_member());
    worker.stop().await;
}
