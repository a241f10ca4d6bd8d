//! The front door against a decode instance that follows a script, over real sockets.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster::generate_event::Event;
use baton_proto::cluster::worker_server::{self, WorkerServer};
use baton_proto::cluster::{self, ended::How};
use baton_proto::link::LinkOptions;
use baton_scheduler::ids::{Nanos, RequestId};
use baton_scheduler::placement::{Disaggregation, policy};
use baton_scheduler::request::{Failure, Finish, Request, SamplingParams};
use baton_scheduler::timeline::Timeline;
use futures::Stream;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Response, Status};

use super::{Cluster, DoorEvent, FrontDoor, FrontDoorOptions, Generator as _, Rejection, Submission};

/// One call's answer: events, and whether the stream then stays open.
type Answer = (Vec<Event>, bool);

#[derive(Clone, Default)]
struct Scripted {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    calls: Arc<Mutex<Vec<cluster::GenerateRequest>>>,
}

type Events = Pin<Box<dyn Stream<Item = Result<cluster::GenerateEvent, Status>> + Send>>;
type Frames = Pin<Box<dyn Stream<Item = Result<cluster::TransferFrame, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for Scripted {
    type GenerateStream = Events;
    type PrefillStream = Frames;

    async fn generate(&self, request: tonic::Request<cluster::GenerateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        let epoch = request.state.as_ref().map_or(0, |state| state.epoch);
        self.calls.lock().push(request);
        let (events, stays_open) = self.answers.lock().pop_front().expect("a call that the script knows");
        let events = futures::stream::iter(events).map_events(epoch);
        Ok(Response::new(if stays_open {
            Box::pin(futures::StreamExt::chain(events, futures::stream::pending()))
        } else {
            Box::pin(events)
        }))
    }

    type AttachStream = Events;
    type MigrateStream = Frames;

    async fn attach(&self, _: tonic::Request<cluster::AttachRequest>) -> Result<Response<Events>, Status> {
        Err(Status::unimplemented("no moves here"))
    }

    async fn migrate(&self, _: tonic::Request<cluster::MigrateRequest>) -> Result<Response<Frames>, Status> {
        Err(Status::unimplemented("no moves here"))
    }

    async fn resume(
        &self,
        _: tonic::Request<cluster::ResumeRequest>,
    ) -> Result<Response<cluster::ResumeResponse>, Status> {
        Err(Status::unimplemented("no moves here"))
    }

    async fn prefill(&self, _: tonic::Request<cluster::PrefillRequest>) -> Result<Response<Frames>, Status> {
        Err(Status::unimplemented("no prefill here"))
    }
}

trait MapEvents: Stream<Item = Event> + Sized + Send {
    fn map_events(self, epoch: u32) -> impl Stream<Item = Result<cluster::GenerateEvent, Status>> + Send {
        futures::StreamExt::map(self, move |event| {
            Ok(cluster::GenerateEvent {
                epoch,
                event: Some(event),
            })
        })
    }
}

impl<S: Stream<Item = Event> + Send> MapEvents for S {}

struct Bench {
    door: FrontDoor,
    cluster: Arc<Cluster>,
    worker: Scripted,
}

/// A front door over one decode instance that answers calls as scripted.
async fn bench(answers: Vec<Answer>, options: FrontDoorOptions) -> Bench {
    let worker = Scripted::default();
    worker.answers.lock().extend(answers);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder().add_service(WorkerServer::new(worker.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let policy = policy("least-loaded", Disaggregation::Auto).unwrap();
    let cluster = Arc::new(Cluster::new(policy, LinkOptions::default()));
    let join = cluster::WorkerJoin {
        instance_id: "decode-0".into(),
        incarnation: 3,
        role: "decode".into(),
        address,
        protocol_version: baton_proto::PROTOCOL_VERSION,
        fingerprint: vec![9; 32],
        block_size: 16,
        n_blocks_total: 64,
        max_num_seqs: 2,
        max_model_len: 512,
        ..cluster::WorkerJoin::default()
    };
    cluster.join(join).unwrap();
    Bench {
        door: FrontDoor::new(Arc::clone(&cluster), options),
        cluster,
        worker,
    }
}

fn submission(id: u128, deadline: Option<Duration>) -> Submission {
    let sampling = SamplingParams {
        max_tokens: 8,
        ..SamplingParams::default()
    };
    Submission {
        request: Request {
            id: RequestId(id),
            prompt_ids: Arc::from([1, 2, 3]),
            sampling,
            cache_salt: 0,
        },
        deadline,
        label: Arc::from("test"),
        timeline: Timeline::default(),
    }
}

fn token(index: u32) -> Event {
    Event::Token(cluster::Token {
        index,
        id: 100 + index,
        logprobs: None,
        choice: 0,
    })
}

fn finished() -> Event {
    let how = Some(How::Finish(Finish::Length.into()));
    Event::Ended(cluster::Ended {
        how,
        ..cluster::Ended::default()
    })
}

fn failed(failure: &Failure) -> Event {
    let how = Some(How::Failure(failure.into()));
    Event::Ended(cluster::Ended {
        how,
        ..cluster::Ended::default()
    })
}

/// The token indexes that a client got, and its terminal event.
async fn outcome(bench: &Bench, submission: Submission) -> (Vec<u32>, DoorEvent) {
    let mut stream = bench.door.submit(submission).await.expect("admitted");
    let mut indexes = Vec::new();
    let mut last = None;
    while let Some(event) = stream.next().await {
        assert!(last.is_none(), "an event after the terminal one: {event:?}");
        match event {
            DoorEvent::Token { token, .. } => indexes.push(token.index),
            DoorEvent::PromptLogprobs(_) | DoorEvent::ChoiceFinished { .. } => {}
            terminal => last = Some(terminal),
        }
    }
    assert!(bench.cluster.instances().iter().all(|instance| instance.n_running == 0));
    (indexes, last.expect("a terminal event"))
}

#[tokio::test]
async fn a_broken_stream_is_replayed_from_the_tokens_delivered() {
    let answers = vec![
        (vec![token(0), token(1)], false),
        // The next instance repeats one token; the client must not see it twice.
        (vec![token(1), token(2), finished()], false),
    ];
    let bench = bench(answers, FrontDoorOptions::default()).await;
    let (indexes, last) = outcome(&bench, submission(1, None)).await;
    assert_eq!(indexes, [0, 1, 2]);
    let DoorEvent::Ended { finish, usage, .. } = last else {
        panic!("{last:?}")
    };
    assert_eq!(
        (finish, usage.n_completion_tokens, usage.n_prompt_tokens),
        (Finish::Length, 3, 3)
    );
    let calls = bench.worker.calls.lock();
    let states: Vec<_> = calls.iter().map(|call| call.state.as_ref().expect("a state")).collect();
    assert_eq!(
        states.iter().map(|state| state.epoch).collect::<Vec<_>>(),
        [1, 2],
        "each attempt has a newer epoch"
    );
    let replayed: Vec<u32> = states[1].choices[0].output.iter().map(|token| token.id).collect();
    assert_eq!(replayed, [100, 101]);
    assert_eq!(states[0].sampling, states[1].sampling, "the resolved seed goes along");
}

#[tokio::test]
async fn a_skipped_token_is_an_error_and_never_a_success() {
    let bench = bench(
        vec![(vec![token(0), token(2), finished()], false)],
        FrontDoorOptions::default(),
    )
    .await;
    let (indexes, last) = outcome(&bench, submission(1, None)).await;
    assert_eq!(indexes, [0]);
    assert!(matches!(last, DoorEvent::Failed(Failure::Internal(_))), "{last:?}");
}

#[tokio::test]
async fn three_refusals_end_it_and_what_is_invalid_ends_it_at_once() {
    let lost = Failure::InstanceLost("gone".into());
    let bench_lost = bench(vec![(vec![failed(&lost)], false); 3], FrontDoorOptions::default()).await;
    let (_, last) = outcome(&bench_lost, submission(1, None)).await;
    assert_eq!(last, DoorEvent::Failed(lost));
    assert_eq!(bench_lost.worker.calls.lock().len(), 3);

    let invalid = Failure::Invalid("token id 7, expected less than 5".into());
    let bench_invalid = bench(vec![(vec![failed(&invalid)], false)], FrontDoorOptions::default()).await;
    let (_, last) = outcome(&bench_invalid, submission(1, None)).await;
    assert_eq!(last, DoorEvent::Failed(invalid));
}

#[tokio::test]
async fn a_busy_instance_is_asked_again_only_after_it_reports() {
    let busy = failed(&Failure::Busy("full".into()));
    let bench = bench(
        vec![(vec![busy], false), (vec![token(0), finished()], false)],
        FrontDoorOptions::default(),
    )
    .await;
    let mut stream = bench.door.submit(submission(1, None)).await.expect("admitted");
    let mut changes = bench.cluster.changes();
    // The refusal closes the placement, which is a change; nothing may be placed until the instance reports.
    while bench.worker.calls.lock().is_empty() || bench.door.load().n_queued > 0 {
        changes.changed().await.expect("the cluster is there");
    }
    let load = cluster::WorkerLoad {
        healthy: true,
        n_blocks_free: 64,
        ..cluster::WorkerLoad::default()
    };
    let report = cluster::WorkerReport {
        load: Some(load),
        ..cluster::WorkerReport::default()
    };
    let id = baton_scheduler::ids::InstanceId::new("decode-0");
    let mut n_reports = 0;
    let first = loop {
        tokio::select! {
            event = stream.next() => break event,
            () = tokio::task::yield_now() => {
                n_reports += 1;
                bench.cluster.report(&id, baton_scheduler::ids::Incarnation(3), report.clone()).expect("a report");
            }
        }
    };
    assert!(
        matches!(first, Some(DoorEvent::Token { .. })),
        "{first:?} after {n_reports} reports"
    );
    assert_eq!(bench.worker.calls.lock().len(), 2);
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_deadline_ends_the_wait() {
    // The instance takes two requests and keeps them; further ones wait, at most one of them.
    let keeps = || (vec![token(0)], true);
    let options = FrontDoorOptions {
        max_queue: 1,
        ..FrontDoorOptions::default()
    };
    let bench = bench(vec![keeps(), keeps()], options).await;
    let mut held = Vec::new();
    for id in 0..2 {
        let mut stream = bench.door.submit(submission(id, None)).await.expect("admitted");
        assert!(matches!(stream.next().await, Some(DoorEvent::Token { .. })));
        held.push(stream);
    }
    let began = bench.door.now();
    let mut waiting = bench
        .door
        .submit(submission(2, Some(Duration::from_millis(80))))
        .await
        .expect("queued");
    let refused = bench
        .door
        .submit(submission(3, None))
        .await
        .expect_err("the queue is full");
    assert!(
        matches!(
            refused,
            Rejection::OverCapacity {
                limit: 1,
                n_queued: 1,
                ..
            }
        ),
        "{refused:?}"
    );
    assert_eq!(waiting.next().await, Some(DoorEvent::Failed(Failure::DeadlineExceeded)));
    assert!(bench.door.now().saturating_sub(began) >= Nanos::from_millis(80));
    assert_eq!(bench.door.load().n_queued, 0);

    // A client that leaves makes room for the next.
    bench
        .worker
        .answers
        .lock()
        .push_back((vec![token(0), finished()], false));
    drop(held.pop());
    let (indexes, _) = outcome(&bench, submission(4, None)).await;
    assert_eq!(indexes, [0]);
}
