//! The front door against instances that follow a script, over real sockets.

mod embeddings;
mod fake_worker;
mod kv_events;
mod moves;
mod replays;
mod slow_client;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::cluster;
use baton_proto::link::LinkOptions;
use baton_scheduler::ids::{InstanceId, RequestId};
use baton_scheduler::placement::{Disaggregation, RequestObjectives, policy};
use baton_scheduler::request::{Request, SamplingParams};
use baton_scheduler::timeline::Timeline;
use fake_worker::{Answer, Call, EmbedCall, FakeWorker, ResumeCall, Words};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::move_metrics::MoveLabels;
use super::{
    Cluster, DoorEvent, FrontDoor, FrontDoorOptions, Generator as _, MoveError, MoveReason, Moved, OpenRequest,
    RequestStream, Submission,
};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: &str, waited: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, waited).await {
        Ok(value) => value,
        Err(_) => panic!("waited too long: {what}"),
    }
}

/// A front door over decode instances that do what the test says.
struct Bench {
    door: FrontDoor,
    cluster: Arc<Cluster>,
    workers: BTreeMap<String, FakeWorker>,
    calls: mpsc::UnboundedReceiver<Call>,
    sender: mpsc::UnboundedSender<Call>,
}

async fn join_of(worker: &FakeWorker, role: &str) -> cluster::WorkerJoin {
    cluster::WorkerJoin {
        instance_id: worker.name().to_owned(),
        incarnation: 3,
        role: role.into(),
        address: worker.listen().await,
        protocol_version: baton_proto::PROTOCOL_VERSION,
        fingerprint: vec![9; 32],
        block_size: 16,
        n_blocks_total: 64,
        max_num_seqs: 2,
        max_model_len: 512,
        ..cluster::WorkerJoin::default()
    }
}

impl Bench {
    /// One instance for each size of a cache, in blocks.
    async fn new(n_blocks: &[u32], options: FrontDoorOptions) -> Bench {
        let policy = policy("least-loaded", Disaggregation::Auto).unwrap();
        let cluster = Arc::new(Cluster::new(policy, LinkOptions::default()));
        let (sender, calls) = mpsc::unbounded_channel();
        let mut workers = BTreeMap::new();
        for (i, &n_blocks_total) in n_blocks.iter().enumerate() {
            let name = format!("decode-{i}");
            let worker = FakeWorker::new(&name, sender.clone());
            let join = cluster::WorkerJoin {
                n_blocks_total,
                ..join_of(&worker, "decode").await
            };
            cluster.join(join).unwrap();
            workers.insert(name, worker);
        }
        Bench {
            door: FrontDoor::new(Arc::clone(&cluster), options),
            cluster,
            workers,
            calls,
            sender,
        }
    }

    /// One more instance, of this role and protocol version.
    async fn add(&mut self, name: &str, role: &str, protocol_version: u32) {
        let worker = FakeWorker::new(name, self.sender.clone());
        let join = cluster::WorkerJoin {
            protocol_version,
            ..join_of(&worker, role).await
        };
        self.cluster.join(join).unwrap();
        self.workers.insert(name.to_owned(), worker);
    }

    /// One instance that answers calls as scripted.
    async fn scripted(answers: Vec<Answer>, options: FrontDoorOptions) -> Bench {
        let bench = Bench::new(&[64], options).await;
        bench.worker().answers.lock().extend(answers);
        bench
    }

    fn worker(&self) -> &FakeWorker {
        &self.workers["decode-0"]
    }

    async fn call(&mut self) -> Call {
        soon("a call", self.calls.recv())
            .await
            .expect("the instances are there")
    }

    async fn generated(&mut self) -> Words {
        match self.call().await {
            Call::Generate(words) => words,
            other => panic!("{other:?} where a request was to be generated"),
        }
    }

    async fn attached(&mut self) -> Words {
        match self.call().await {
            Call::Attach(words) => words,
            other => panic!("{other:?} where a destination was to be attached to"),
        }
    }

    async fn embedded(&mut self) -> EmbedCall {
        match self.call().await {
            Call::Embed(call) => call,
            other => panic!("{other:?} where a prompt was to be embedded"),
        }
    }

    async fn resumed(&mut self) -> ResumeCall {
        match self.call().await {
            Call::Resume(call) => call,
            other => panic!("{other:?} where a source was to be resumed"),
        }
    }

    fn only_request(&self) -> Arc<OpenRequest> {
        let [request] = &self.door.requests().all()[..] else {
            panic!("one request is open")
        };
        Arc::clone(request)
    }

    fn order(&self, to: Option<&str>) -> JoinHandle<Result<Moved, MoveError>> {
        let (request, to) = (self.only_request(), to.map(InstanceId::new));
        tokio::spawn(async move { request.move_to(to, MoveReason::Operator).await })
    }

    /// Nothing is held for anybody.
    fn assert_idle(&self) {
        for instance in self.cluster.instances() {
            assert_eq!(instance.n_running, 0, "{instance:?}");
        }
    }

    /// Operators' orders that ended so.
    fn n_moves(&self, outcome: &'static str) -> u64 {
        let reason = MoveReason::Operator.as_str();
        let moves = &self.door.move_metrics().moves;
        moves.get_or_create(&MoveLabels { reason, outcome }).get()
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
        priority: 0,
        deadline,
        objectives: RequestObjectives::default(),
        label: Arc::from("test"),
        timeline: Timeline::default(),
    }
}

/// The tokens a client got, by choice and index, and its terminal event.
async fn rest(stream: &mut RequestStream) -> (Vec<(u32, u32)>, DoorEvent) {
    let (mut tokens, mut last) = (Vec::new(), None);
    while let Some(event) = soon("an event", stream.next()).await {
        assert!(last.is_none(), "an event after the terminal one: {event:?}");
        match event {
            DoorEvent::Token { choice, token } => {
                assert_eq!(token.id, 100 + token.index, "a token of nobody's");
                tokens.push((choice, token.index));
            }
            DoorEvent::PromptLogprobs(_) | DoorEvent::ChoiceFinished { .. } => {}
            terminal => last = Some(terminal),
        }
    }
    (tokens, last.expect("a terminal event"))
}
