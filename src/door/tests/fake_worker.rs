//! An instance without an engine: it answers by its script, or hands each call to the test, which then speaks for it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use baton_proto::cluster::generate_event::Event;
use baton_proto::cluster::worker_server::{self, WorkerServer};
use baton_proto::cluster::{self, ended::How};
use baton_proto::convert::{embedding_to_wire, kv_changes_to_wire};
use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::request::{Failure, Finish};
use baton_scheduler::timeline::Moment;
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status};

/// One call's answer: events, and whether the stream then stays open.
pub(super) type Answer = (Vec<Event>, bool);

type Said = Result<cluster::GenerateEvent, Status>;
type Events = Pin<Box<dyn Stream<Item = Said> + Send>>;
type Changes = Pin<Box<dyn Stream<Item = Result<cluster::KvChanges, Status>> + Send>>;
type Frames = Pin<Box<dyn Stream<Item = Result<cluster::TransferFrame, Status>> + Send>>;

/// A call that the test answers.
#[derive(Debug)]
pub(super) enum Call {
    Generate(Words),
    Attach(Words),
    Resume(ResumeCall),
    Embed(EmbedCall),
    KvEvents(Listener),
}

/// A stream on which the test speaks for an instance.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) instance: String,
    pub(super) state: cluster::PortableState,
    /// Of a destination: where it is to take the request from.
    pub(super) source: Option<cluster::Peer>,
    said: mpsc::UnboundedSender<Said>,
}

impl Words {
    pub(super) fn epoch(&self) -> u32 {
        self.state.epoch
    }

    /// Tokens that the front door had, of each choice.
    pub(super) fn n_known(&self) -> Vec<usize> {
        self.state.choices.iter().map(|choice| choice.output.len()).collect()
    }

    pub(super) fn say(&self, event: Event) {
        self.say_in(self.epoch(), event);
    }

    /// As a source that was told to go on does.
    pub(super) fn say_in(&self, epoch: u32, event: Event) {
        // Whoever listened may have gone: that is what some tests are about.
        let _ = self.said.send(Ok(cluster::GenerateEvent {
            epoch,
            event: Some(event),
        }));
    }

    pub(super) fn die(&self) {
        let _ = self.said.send(Err(Status::unavailable("died")));
    }

    /// Until the front door has dropped the stream.
    pub(super) async fn closed(&self) {
        super::soon("the stream's end", self.said.closed()).await;
    }
}

/// A source that is told to go on.
#[derive(Debug)]
pub(super) struct ResumeCall {
    pub(super) instance: String,
    pub(super) request: cluster::ResumeRequest,
    reply: oneshot::Sender<Result<Option<Failure>, Status>>,
}

impl ResumeCall {
    pub(super) fn answer(self, answer: Result<Option<Failure>, Status>) {
        self.reply.send(answer).expect("the call waits");
    }
}

/// Whom an instance tells of its blocks.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) instance: String,
    said: mpsc::UnboundedSender<Result<cluster::KvChanges, Status>>,
}

impl Listener {
    pub(super) fn say(&self, events: &[BlockEvent]) {
        self.said
            .send(Ok(kv_changes_to_wire(events)))
            .expect("somebody listens");
    }

    pub(super) fn lose(self) {
        self.said
            .send(Err(Status::data_loss("fell behind")))
            .expect("somebody listens");
    }

    pub(super) async fn closed(&self) {
        super::soon("the stream's end", self.said.closed()).await;
    }
}

/// An instance that is to embed a prompt.
#[derive(Debug)]
pub(super) struct EmbedCall {
    pub(super) instance: String,
    pub(super) request: cluster::EmbedRequest,
    reply: oneshot::Sender<Result<Vec<f32>, Failure>>,
}

impl EmbedCall {
    pub(super) fn answer(self, answer: Result<Vec<f32>, Failure>) {
        self.reply.send(answer).expect("the call waits");
    }

    /// Until the front door has given the call up.
    pub(super) async fn given_up(mut self) {
        super::soon("the call's end", self.reply.closed()).await;
    }
}

#[derive(Clone)]
pub(super) struct FakeWorker {
    name: String,
    /// What calls to generate are answered with; when it is empty, the test answers.
    pub(super) answers: Arc<Mutex<VecDeque<Answer>>>,
    /// Calls that the script answered.
    pub(super) calls: Arc<Mutex<Vec<cluster::GenerateRequest>>>,
    asked: mpsc::UnboundedSender<Call>,
}

impl FakeWorker {
    pub(super) fn new(name: &str, asked: mpsc::UnboundedSender<Call>) -> FakeWorker {
        FakeWorker {
            name: name.to_owned(),
            answers: Arc::default(),
            calls: Arc::default(),
            asked,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The address it listens on.
    pub(super) async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder().add_service(WorkerServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    fn hand_over(
        &self,
        call: impl FnOnce(Words) -> Call,
        state: Option<cluster::PortableState>,
        source: Option<cluster::Peer>,
    ) -> Response<Events> {
        let (said, events) = mpsc::unbounded_channel();
        let words = Words {
            instance: self.name.clone(),
            state: state.expect("a state"),
            source,
            said,
        };
        self.asked.send(call(words)).expect("the test listens");
        Response::new(Box::pin(UnboundedReceiverStream::new(events)))
    }
}

#[tonic::async_trait]
impl worker_server::Worker for FakeWorker {
    type GenerateStream = Events;
    type PrefillStream = Frames;
    type AttachStream = Events;
    type KvEventsStream = Changes;
    type StandingStream = futures::stream::Empty<Result<cluster::StandingResponse, Status>>;
    type MigrateStream = Frames;

    async fn generate(&self, request: Request<cluster::GenerateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        let Some((events, stays_open)) = self.answers.lock().pop_front() else {
            return Ok(self.hand_over(Call::Generate, request.state, None));
        };
        let epoch = request.state.as_ref().map_or(0, |state| state.epoch);
        self.calls.lock().push(request);
        let events = futures::stream::iter(events).map(move |event| {
            Ok(cluster::GenerateEvent {
                epoch,
                event: Some(event),
            })
        });
        Ok(Response::new(if stays_open {
            Box::pin(events.chain(futures::stream::pending()))
        } else {
            Box::pin(events)
        }))
    }

    async fn attach(&self, request: Request<cluster::AttachRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        Ok(self.hand_over(Call::Attach, request.state, request.source))
    }

    async fn standing(&self, _: Request<cluster::StandingRequest>) -> Result<Response<Self::StandingStream>, Status> {
        Err(Status::unimplemented("no front door asks this"))
    }

    async fn resume(
        &self,
        request: Request<cluster::ResumeRequest>,
    ) -> Result<Response<cluster::ResumeResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        let call = ResumeCall {
            instance: self.name.clone(),
            request: request.into_inner(),
            reply,
        };
        self.asked.send(Call::Resume(call)).expect("the test listens");
        let failure = answer
            .await
            .unwrap_or_else(|_| Err(Status::unavailable("not answered")))?;
        Ok(Response::new(cluster::ResumeResponse {
            failure: failure.as_ref().map(Into::into),
        }))
    }

    async fn kv_events(&self, _: Request<cluster::KvEventsRequest>) -> Result<Response<Changes>, Status> {
        let (said, changes) = mpsc::unbounded_channel();
        let listener = Listener {
            instance: self.name.clone(),
            said,
        };
        self.asked.send(Call::KvEvents(listener)).expect("the test listens");
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(changes))))
    }

    async fn embed(&self, request: Request<cluster::EmbedRequest>) -> Result<Response<cluster::EmbedResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        let call = EmbedCall {
            instance: self.name.clone(),
            request: request.into_inner(),
            reply,
        };
        self.asked.send(Call::Embed(call)).expect("the test listens");
        let embedded = answer.await.map_err(|_| Status::unavailable("died"))?;
        Ok(Response::new(embedding_to_wire(embedded)))
    }

    async fn migrate(&self, _: Request<cluster::MigrateRequest>) -> Result<Response<Frames>, Status> {
        Err(Status::unimplemented("the front door does not ask for it"))
    }

    async fn prefill(&self, _: Request<cluster::PrefillRequest>) -> Result<Response<Frames>, Status> {
        Err(Status::unimplemented("the front door does not ask for it"))
    }
}

pub(super) fn token(index: u32) -> Event {
    token_of(0, index)
}

pub(super) fn token_of(choice: u32, index: u32) -> Event {
    Event::Token(cluster::Token {
        index,
        id: 100 + index,
        logprobs: None,
        choice,
    })
}

pub(super) fn choice_finished(choice: u32) -> Event {
    Event::ChoiceFinished(cluster::ChoiceFinished {
        choice,
        finish: Some(Finish::Length.into()),
    })
}

pub(super) fn finished() -> Event {
    ended(How::Finish(Finish::Length.into()))
}

pub(super) fn failed(failure: &Failure) -> Event {
    ended(How::Failure(failure.into()))
}

fn ended(how: How) -> Event {
    Event::Ended(cluster::Ended {
        how: Some(how),
        ..cluster::Ended::default()
    })
}

pub(super) fn joined() -> Event {
    Event::Moment(cluster::MomentReached {
        moment: Moment::Joined as u32,
        elapsed_ns: 1,
    })
}

pub(super) fn moving() -> Event {
    Event::Moving(cluster::Moving::default())
}

pub(super) fn move_cancelled(failure: &Failure) -> Event {
    Event::MoveCancelled(cluster::MoveCancelled {
        transfer_id: 0,
        failure: Some(failure.into()),
    })
}
