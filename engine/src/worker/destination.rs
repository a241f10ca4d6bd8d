//! The receiving end of a handoff or a migration: reserves, opens one stream to the source, and follows the destination
//! machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use baton_proto::cluster::{self, generate_event::Event, transfer_frame::Frame};
use baton_proto::convert::{choice_from_wire, first_blocks_to_wire, token_from_wire, token_to_wire};
use baton_scheduler::batch::{MoveRoom, Numerics};
use baton_scheduler::layer_groups::LayerPlace;
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, Token};
use baton_scheduler::timeline::Moment;
use baton_scheduler::transfer::{
    ChoicePlan, Destination, DestinationAction, DestinationFact, KvRange, OwedBlocks, TransferId, TransferPlan,
};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};

use super::counters::add;
use super::local;
use super::open_requests::Registered;
use super::outlet::{Gone, Outlet, Used};
use super::service::Worker;
use super::source::nanos;
use super::transport::{KvReceiver, Offer};
use crate::engine::{Generation, Reservation};

static NEXT_TRANSFER: AtomicU64 = AtomicU64::new(1);

/// Room for what a moving choice generates before it pauses, besides a share of its context.
const MIN_SLACK_BLOCKS: usize = 8;
/// A long context takes long to send, and grows meanwhile.
const CONTEXT_BLOCKS_PER_SLACK_BLOCK: usize = 32;

/// How long a source may take to say how far it has come; without that, room is reserved by what the front door knows.
const STANDING_DEADLINE: Duration = Duration::from_secs(1);

/// Which kind of transfer brings the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Handoff,
    Migration,
}

/// What both kinds begin with.
pub(super) struct Taken {
    pub(super) state: PortableState,
    pub(super) source: cluster::Peer,
    /// The answer to the front door.
    pub(super) accepted: cluster::Accepted,
    pub(super) registered: Registered,
}

/// Blocks for a request, and the call by which its source holds it back until it knows of them.
struct Reserved {
    reservation: Reservation,
    hold: Option<Hold>,
}

type Hold = Streaming<cluster::StandingResponse>;

/// Receives a request's KV from a prefill instance and generates it, to the terminal state.
pub(super) async fn receive(worker: &Arc<Worker>, taken: Taken) {
    let state = taken.state.clone();
    let reserving = async {
        let reservation = worker.engine.reserve(state).await?;
        Ok(Reserved {
            reservation,
            hold: None,
        })
    };
    take_over(worker, Kind::Handoff, taken, reserving).await;
}

/// Takes a running request over from where it runs, to the terminal state.
pub(super) async fn attach(worker: &Arc<Worker>, taken: Taken) {
    let block_size = worker.engine.layout().block_size;
    let (state, source) = (taken.state.clone(), taken.source.clone());
    let reserving = async {
        let (standing, hold) = standing(worker, &state, &source).await.unzip();
        let standing = standing.unwrap_or_default().into_iter();
        let known = state.choices.iter().map(|choice| choice.output.len());
        let ahead = known.zip(standing.chain(std::iter::repeat(0)));
        let n_ahead: Vec<usize> = ahead.map(|(known, standing)| standing.saturating_sub(known)).collect();
        let outputs = state.choices.iter().zip(&n_ahead);
        let longest = outputs.map(|(choice, &n_ahead)| choice.output.len() + n_ahead).max();
        let n_context = state.request.prompt_ids.len() + longest.unwrap_or(0);
        let room = MoveRoom {
            n_slack_blocks: MIN_SLACK_BLOCKS + n_context.div_ceil(block_size) / CONTEXT_BLOCKS_PER_SLACK_BLOCK,
            n_ahead,
        };
        let reservation = worker.engine.reserve_moved(state, room).await?;
        Ok(Reserved { reservation, hold })
    };
    take_over(worker, Kind::Migration, taken, reserving).await;
}

/// How many tokens of each choice the source has, and the call by which it is held back to what there is room for at least. A
/// source that does not say is where the front door takes it to be.
async fn standing(worker: &Arc<Worker>, state: &PortableState, source: &cluster::Peer) -> Option<(Vec<usize>, Hold)> {
    // It may be a step further before it stands still.
    let n_more_tokens = (MIN_SLACK_BLOCKS - 1) * worker.engine.layout().block_size;
    let asking = async {
        let mut client = worker.peers.client(source).ok()?;
        let request = cluster::StandingRequest {
            handshake: Some(worker.identity.handshake(source)),
            request_id: state.request.id.0.to_be_bytes().to_vec(),
            n_more_tokens: n_more_tokens as u32,
        };
        let mut hold = client.standing(request).await.ok()?.into_inner();
        let answer = hold.message().await.ok()??;
        let n_output_tokens = answer.n_output_tokens.into_iter().map(|n| n as usize);
        Some((n_output_tokens.collect(), hold))
    };
    tokio::time::timeout(STANDING_DEADLINE, asking).await.ok()?
}

async fn take_over(
    worker: &Arc<Worker>,
    kind: Kind,
    taken: Taken,
    reserving: impl Future<Output = Result<Reserved, Failure>>,
) {
    let outlet = &taken.registered.open.outlet;
    let reserved = tokio::select! {
        reserved = reserving => reserved,
        () = outlet.closed() => return,
    };
    let reserved = match reserved {
        Ok(reserved) => reserved,
        Err(failure) => return outlet.fail(&failure, "", Used::default()).await,
    };
    let answered = async {
        outlet.send(Event::Accepted(taken.accepted.clone())).await?;
        outlet.moment(Moment::Reserved).await
    };
    if answered.await.is_err() {
        return;
    }
    let driver = DestinationDriver::new(worker, kind, taken, reserved);
    // A front door that has gone needs no answer; all that is held goes with the driver.
    let _ = driver.run().await;
}

struct DestinationDriver {
    worker: Arc<Worker>,
    kind: Kind,
    state: PortableState,
    source: cluster::Peer,
    transfer: TransferId,
    plan: TransferPlan,
    machine: Destination,
    reservation: Option<Reservation>,
    /// Until the source has answered to what there is room for.
    hold: Option<Hold>,
    /// What was offered to the source.
    offer: Option<Offer>,
    receiver: Option<Box<dyn KvReceiver>>,
    numerics: Numerics,
    /// First tokens of a handoff, one for each choice.
    first: Vec<(Token, Option<Finish>)>,
    /// Complete outputs of a moved request.
    outputs: Vec<ChoiceState>,
    generation: Option<Generation>,
    registered: Registered,
    outlet: Arc<Outlet>,
    used: Used,
    opened_at: Instant,
    /// The frame whose fact is being applied.
    frame: Option<cluster::KvFrame>,
    is_over: bool,
}

impl DestinationDriver {
    fn new(worker: &Arc<Worker>, kind: Kind, taken: Taken, reserved: Reserved) -> DestinationDriver {
        let Reserved { reservation, hold } = reserved;
        let Taken {
            state,
            source,
            registered,
            accepted: _,
        } = taken;
        let choices = reservation.choices.iter().map(|choice| ChoicePlan {
            first_blocks: choice
                .layer_groups
                .iter()
                .map(|group| group.n_blocks_held as u32)
                .collect(),
            n_blocks: choice.n_blocks_total as u32,
        });
        let plan = TransferPlan {
            layer_groups: worker.engine.layer_groups().of_layers(),
            choices: choices.collect(),
        };
        let transfer = TransferId(NEXT_TRANSFER.fetch_add(1, Relaxed));
        let held = plan.choices.iter().flat_map(|choice| &choice.first_blocks);
        let n_held: u64 = held.map(|&first| u64::from(first)).sum();
        add(&worker.counters.n_blocks_not_sent, n_held);
        let opened_at = Instant::now();
        let begin = match kind {
            Kind::Handoff => Destination::handoff,
            Kind::Migration => Destination::migration,
        };
        let progress_deadline = nanos(worker.options.progress_deadline);
        DestinationDriver {
            worker: Arc::clone(worker),
            kind,
            state,
            source,
            transfer,
            machine: begin(transfer, plan.clone(), progress_deadline, nanos(opened_at.elapsed())),
            plan,
            reservation: Some(reservation),
            hold,
            offer: None,
            receiver: None,
            numerics: Numerics::Same,
            first: Vec::new(),
            outputs: Vec::new(),
            generation: None,
            outlet: Arc::clone(&registered.open.outlet),
            registered,
            used: Used::default(),
            opened_at,
            frame: None,
            is_over: false,
        }
    }

    /// Opens the stream, or says how that failed.
    async fn open(&self) -> Result<(Streaming<cluster::TransferFrame>, Offer), DestinationFact> {
        let offered = self.worker.transports.offer(&self.source).await;
        let offered = offered.map_err(|error| DestinationFact::Ended {
            failure: Some(error.failure()),
        })?;
        let dropped = |status: Status| DestinationFact::Dropped {
            reason: status.message().to_owned(),
        };
        let frames = self.call(offered.to_wire()).await.map_err(dropped)?;
        Ok((frames, offered))
    }

    async fn call(&self, offer: cluster::TransportOffer) -> Result<Streaming<cluster::TransferFrame>, Status> {
        let client = self.worker.peers.client(&self.source);
        let mut client = client.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let handshake = Some(self.worker.identity.handshake(&self.source));
        let offer = Some(offer);
        let frames = match self.kind {
            Kind::Handoff => {
                let (first_block, first_blocks) = first_blocks_to_wire(&self.plan.choices[0].first_blocks);
                let request = cluster::PrefillRequest {
                    handshake,
                    state: Some((&self.state).into()),
                    transfer_id: self.transfer.0,
                    first_block,
                    first_blocks,
                    offer,
                };
                client.prefill(request).await?
            }
            Kind::Migration => {
                let rooms = self.plan.choices.iter().zip(&self.state.choices);
                let choices = rooms.map(|(plan, known)| {
                    let (first_block, first_blocks) = first_blocks_to_wire(&plan.first_blocks);
                    cluster::ChoiceRoom {
                        first_block,
                        first_blocks,
                        n_blocks: plan.n_blocks,
                        n_known_tokens: known.output.len() as u32,
                    }
                });
                let request = cluster::MigrateRequest {
                    handshake,
                    request_id: self.state.request.id.0.to_be_bytes().to_vec(),
                    transfer_id: self.transfer.0,
                    to: self.worker.identity.instance.to_string(),
                    choices: choices.collect(),
                    offer,
                };
                client.migrate(request).await?
            }
        };
        Ok(frames.into_inner())
    }

    async fn run(mut self) -> Result<(), Gone> {
        let outlet = Arc::clone(&self.outlet);
        let open = Arc::clone(&self.registered.open);
        let opening = tokio::time::timeout(self.worker.options.progress_deadline, self.open());
        let mut stream = tokio::select! {
            opened = opening => match opened {
                Ok(Ok((stream, offer))) => {
                    self.offer = Some(offer);
                    Some(stream)
                }
                Ok(Err(fact)) => {
                    self.apply(fact).await?;
                    None
                }
                Err(_) => {
                    self.apply(DestinationFact::Dropped { reason: "no answer to the call".into() }).await?;
                    None
                }
            },
            () = outlet.closed() => return Err(Gone),
        };
        let opened_after = outlet.elapsed();
        while !(self.is_over && self.machine.is_closed()) {
            if self.machine.is_closed() {
                stream = None;
            }
            let tick_at = self
                .machine
                .next_tick()
                .map(|at| self.opened_at + Duration::from_nanos(at.0));
            tokio::select! {
                () = outlet.closed(), if !self.is_over => {
                    self.apply(DestinationFact::Cancelled).await?;
                    // Whatever is held, the generation included, goes with the driver.
                    return Err(Gone);
                }
                failure = open.given_up(), if !self.is_over => {
                    self.fail(&failure, "").await;
                    return Ok(());
                }
                message = next(&mut stream), if stream.is_some() => match message {
                    Ok(Some(frame)) => self.take_frame(frame, opened_after).await?,
                    Ok(None) => self.apply(DestinationFact::Dropped { reason: "no typed end".into() }).await?,
                    Err(status) => {
                        let reason = format!("{}: {}", status.code(), status.message());
                        self.apply(DestinationFact::Dropped { reason }).await?;
                    }
                },
                timed = next_event(&mut self.generation), if self.generation.is_some() => {
                    let is_last = match timed {
                        Some(timed) => local::forward(&outlet, timed, &mut self.used).await?,
                        None => true,
                    };
                    if is_last {
                        self.generation = None;
                        self.is_over = true;
                    }
                }
                () = sleep_until(tick_at.unwrap_or_else(Instant::now)), if tick_at.is_some() => {
                    self.apply(DestinationFact::Tick).await?;
                }
            }
        }
        Ok(())
    }

    async fn take_frame(&mut self, frame: cluster::TransferFrame, opened_after: Duration) -> Result<(), Gone> {
        self.hold = None;
        let fact = match frame.frame {
            Some(Frame::Accepted(accepted)) => self.accepted(&accepted),
            Some(Frame::Progress(progress)) => DestinationFact::Progress {
                n_steps: progress.n_steps,
            },
            Some(Frame::Kv(kv)) => {
                let transfer = TransferId(kv.transfer_id);
                let range = KvRange {
                    choice: kv.choice,
                    layer: kv.layer,
                    first_block: kv.first_block,
                    n_blocks: kv.n_blocks,
                };
                self.frame = Some(kv);
                DestinationFact::Kv { transfer, range }
            }
            Some(Frame::FirstToken(first)) => match self.first_tokens(first) {
                Ok(first) => {
                    let ends = first.iter().all(|(_, finish)| finish.is_some());
                    self.first = first;
                    DestinationFact::Token { ends }
                }
                Err(failure) => DestinationFact::Ended { failure: Some(failure) },
            },
            Some(Frame::MovedState(moved)) => match self.moved_state(moved) {
                Ok(owed) => DestinationFact::State { owed },
                Err(failure) => DestinationFact::Ended { failure: Some(failure) },
            },
            Some(Frame::PromptLogprobs(logprobs)) => return self.outlet.send(Event::PromptLogprobs(logprobs)).await,
            // The moments of a request that moves are its first transfer's.
            Some(Frame::Moment(_)) if self.kind == Kind::Migration => return Ok(()),
            Some(Frame::Moment(moment)) => {
                // The source's clock starts when it hears of the request, which is when our call was answered.
                let elapsed_ns = moment.elapsed_ns + opened_after.as_nanos() as u64;
                return self
                    .outlet
                    .send(Event::Moment(cluster::MomentReached { elapsed_ns, ..moment }))
                    .await;
            }
            Some(Frame::Ended(ended)) => DestinationFact::Ended {
                failure: ended.failure.map(Into::into),
            },
            // A frame of a newer protocol that this one does not know cannot be owed to us.
            None => return Ok(()),
        };
        self.apply(fact).await
    }

    fn accepted(&mut self, accepted: &cluster::Accepted) -> DestinationFact {
        let worker = &self.worker;
        let offer = self.offer.as_ref().expect("a source answers to an offer");
        let receiver = worker.identity.check_source(&self.source, accepted).and_then(|()| {
            let receiver = worker.transports.receiver(offer, accepted);
            receiver.map_err(|error| error.failure())
        });
        match receiver {
            Ok(receiver) => {
                if accepted.numerics_class != worker.identity.numerics_class {
                    self.numerics = Numerics::Other;
                    add(&worker.counters.n_other_numerics, 1);
                }
                let ends_by = receiver.kind().ends_by();
                self.receiver = Some(receiver);
                DestinationFact::Accepted { ends_by }
            }
            Err(failure) => DestinationFact::Ended { failure: Some(failure) },
        }
    }

    /// A handoff's first tokens, refused before anybody hears of them unless they are those that are owed.
    fn first_tokens(&mut self, wire: cluster::FirstToken) -> Result<Vec<(Token, Option<Finish>)>, Failure> {
        let lost = |message: String| Failure::InstanceLost(message);
        self.used.n_cached_tokens = wire.n_cached_tokens;
        let token = wire.token.ok_or_else(|| lost("a first token without a token".into()))?;
        let n_vocab = self.worker.engine.vocab_size();
        let mut first = Vec::with_capacity(1 + wire.more.len());
        for (number, token) in (0..).zip(std::iter::once(token).chain(wire.more)) {
            let index = self.state.choices.get(number).map(|choice| choice.output.len());
            if index != Some(token.index as usize) || token.choice as usize != number || token.id as usize >= n_vocab {
                return Err(lost(format!(
                    "the first token of choice {} is id {} with index {}, expected an id less than {n_vocab} with \
                     choice {number} and index {index:?}",
                    token.choice, token.id, token.index
                )));
            }
            first.push((token_from_wire(token).1, None));
        }
        if first.len() != self.state.choices.len() {
            let (found, expected) = (first.len(), self.state.choices.len());
            return Err(lost(format!("first tokens of {found} choices, expected {expected}")));
        }
        let finish = |finish: cluster::Finish| Finish::try_from(finish).map_err(|error| lost(error.to_string()));
        first[0].1 = wire.finish.map(finish).transpose()?;
        for finished in wire.finished {
            let choice = first
                .get_mut(finished.choice as usize)
                .ok_or_else(|| lost(format!("an end of choice {}, which was not asked for", finished.choice)))?;
            choice.1 = finished.finish.map(finish).transpose()?;
        }
        Ok(first)
    }

    /// Completes the outputs of a moved request. Returns what is owed of each choice.
    fn moved_state(&mut self, wire: cluster::MovedState) -> Result<Vec<OwedBlocks>, Failure> {
        let lost = |message: String| Failure::InstanceLost(message);
        if wire.choices.len() != self.state.choices.len() {
            let (found, expected) = (wire.choices.len(), self.state.choices.len());
            return Err(lost(format!("the state has {found} choices, expected {expected}")));
        }
        let (n_vocab, block_size) = (self.worker.engine.vocab_size(), self.worker.engine.layout().block_size);
        let n_prompt = self.state.request.prompt_ids.len();
        let mut outputs = Vec::with_capacity(wire.choices.len());
        let mut owed = Vec::with_capacity(wire.choices.len());
        // The first choice that ran when the blocks were reserved holds the full blocks of the prompt for all.
        let holder = self.state.choices.iter().position(|choice| choice.finish.is_none());
        for (number, (wire, known)) in wire.choices.into_iter().zip(&self.state.choices).enumerate() {
            let first_index = known.output.len() as u32;
            let lacking = choice_from_wire(wire, first_index).map_err(|error| lost(error.to_string()))?;
            if let Some(token) = lacking.output.iter().find(|token| token.id as usize >= n_vocab) {
                return Err(lost(format!(
                    "the state has token id {}, expected less than {n_vocab}",
                    token.id
                )));
            }
            let output: Vec<Token> = known.output.iter().cloned().chain(lacking.output).collect();
            let finish = lacking.finish.or(known.finish);
            // The last token's KV is not computed yet.
            let n_kv_tokens = n_prompt + output.len() - 1;
            owed.push(match finish {
                None => OwedBlocks::All(n_kv_tokens.div_ceil(block_size) as u32),
                Some(_) if holder == Some(number) => OwedBlocks::Shared((n_prompt / block_size) as u32),
                Some(_) => OwedBlocks::Shared(0),
            });
            outputs.push(ChoiceState { output, finish });
        }
        self.outputs = outputs;
        Ok(owed)
    }

    async fn apply(&mut self, fact: DestinationFact) -> Result<(), Gone> {
        let now = nanos(self.opened_at.elapsed());
        for action in self.machine.apply(now, fact) {
            match action {
                DestinationAction::Write(range) => self.write(range).await,
                DestinationAction::Refuse(why) => {
                    tracing::warn!(request_id = %self.state.request.id, ?why, "KV frame refused");
                    add(&self.worker.counters.n_frames_refused, 1);
                    self.frame = None;
                }
                DestinationAction::Deliver => {
                    self.used.has_token = true;
                    for (choice, (token, _)) in (0..).zip(&self.first) {
                        self.outlet.send(Event::Token(token_to_wire(choice, token))).await?;
                    }
                }
                DestinationAction::Join => self.join().await?,
                DestinationAction::Finish => {
                    self.reservation = None;
                    let finishes: Vec<Finish> = self.first.iter().filter_map(|(_, finish)| *finish).collect();
                    for (choice, &finish) in (0..).zip(&finishes) {
                        self.outlet.choice_finished(choice, finish).await?;
                    }
                    let last = *finishes.last().expect("the machine finishes on final tokens");
                    self.outlet.finish(last, self.used).await;
                    self.is_over = true;
                }
                DestinationAction::Fail(failure) => {
                    let source = self.source.instance_id.clone();
                    self.fail(&failure, &source).await;
                }
                // The stream goes when the machine is closed.
                DestinationAction::Close => {}
            }
        }
        Ok(())
    }

    async fn write(&mut self, range: KvRange) {
        let frame = self
            .frame
            .take()
            .expect("a frame's fact is applied with the frame at hand");
        let reservation = self.reservation.as_mut().expect("blocks are reserved until the join");
        let receiver = self.receiver.as_mut().expect("frames are written after the answer");
        let first = (range.first_block - self.plan.first_block(range.choice, range.layer)) as usize;
        let LayerPlace { layer_group, slot } = self.worker.engine.layer_groups().place(range.layer as usize);
        let reserved = &mut reservation.choices[range.choice as usize].layer_groups[layer_group];
        let writers = &mut reserved.writers[first..first + range.n_blocks as usize];
        match receiver.land(&frame, slot, writers) {
            Ok(n_bytes) => {
                self.used.kv_bytes_received += n_bytes;
                add(&self.worker.counters.bytes_received, n_bytes);
                add(&self.worker.counters.n_frames_received, 1);
            }
            Err(error) => {
                // The frame counts as landed in the machine, so the transfer must not go on.
                add(&self.worker.counters.n_frames_refused, 1);
                let source = self.source.instance_id.clone();
                self.fail(&Failure::InstanceLost(error.to_string()), &source).await;
                self.machine
                    .apply(nanos(self.opened_at.elapsed()), DestinationFact::Cancelled);
            }
        }
    }

    async fn join(&mut self) -> Result<(), Gone> {
        // A failed write closed the request already.
        let Some(reservation) = self.reservation.take() else {
            return Ok(());
        };
        let joined = match self.kind {
            Kind::Handoff => {
                self.outlet.moment(Moment::TransferFinished).await?;
                let first = self.first.iter().map(|(token, _)| token.clone()).collect();
                reservation.join(first, self.numerics)
            }
            Kind::Migration => reservation.join_moved(self.outputs.clone(), self.numerics),
        };
        match joined {
            Ok(generation) => self.generation = Some(generation),
            Err(failure) => {
                // Our own step loop refused it.
                self.fail(&failure, "").await;
                return Ok(());
            }
        }
        match self.kind {
            Kind::Handoff => add(&self.worker.counters.n_received, 1),
            Kind::Migration => add(&self.worker.counters.n_moved_in, 1),
        }
        self.outlet.moment(Moment::Joined).await?;
        if self.kind == Kind::Migration {
            self.tell_copied().await?;
        }
        Ok(())
    }

    /// What the front door may lack of what the source generated: it settles the move, so it is said after the join.
    async fn tell_copied(&mut self) -> Result<(), Gone> {
        self.used.has_token = true;
        for ((number, moved), known) in (0..).zip(&self.outputs).zip(&self.state.choices) {
            for token in &moved.output[known.output.len()..] {
                self.outlet.send(Event::Token(token_to_wire(number, token))).await?;
            }
            if let (Some(finish), None) = (moved.finish, known.finish) {
                self.outlet.choice_finished(number, finish).await?;
            }
        }
        Ok(())
    }

    /// Ends the request badly; `blamed` is empty when this instance is at fault.
    async fn fail(&mut self, failure: &Failure, blamed: &str) {
        if self.is_over {
            return;
        }
        self.is_over = true;
        self.reservation = None;
        self.generation = None;
        if *failure != Failure::Cancelled {
            match self.kind {
                Kind::Handoff => add(&self.worker.counters.n_failed, 1),
                Kind::Migration => add(&self.worker.counters.n_moves_failed, 1),
            }
        }
        tracing::info!(
            request_id = %self.state.request.id,
            source = %self.source.instance_id,
            kind = ?self.kind,
            %failure,
            "transfer failed"
        );
        self.outlet.fail(failure, blamed, self.used).await;
    }
}

async fn next(
    stream: &mut Option<Streaming<cluster::TransferFrame>>,
) -> Result<Option<cluster::TransferFrame>, Status> {
    match stream {
        Some(stream) => stream.message().await,
        None => std::future::pending().await,
    }
}

async fn next_event(generation: &mut Option<Generation>) -> Option<crate::engine::Timed<crate::engine::EngineEvent>> {
    match generation {
        Some(generation) => generation.next().await,
        None => std::future::pending().await,
    }
}
