//! The receiving end of a handoff: reserves, opens one stream to the source, and follows the destination machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use baton_proto::cluster::{self, generate_event::Event, transfer_frame::Frame};
use baton_proto::convert::{token_from_wire, token_to_wire};
use baton_scheduler::batch::Numerics;
use baton_scheduler::request::{Failure, Finish, PortableState, Token};
use baton_scheduler::timeline::Moment;
use baton_scheduler::transfer::{
    Destination, DestinationAction, DestinationFact, EndsBy, KvRange, TransferId, TransferPlan,
};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};

use super::counters::add;
use super::local;
use super::outlet::{Gone, Outlet, Used};
use super::service::Worker;
use super::source::nanos;
use crate::engine::{Generation, Reservation};

static NEXT_TRANSFER: AtomicU64 = AtomicU64::new(1);

/// Receives a request's KV from `source` and generates it, to the terminal state.
pub(super) async fn receive(worker: &Arc<Worker>, state: PortableState, source: cluster::Peer, outlet: Outlet) {
    let reservation = tokio::select! {
        reservation = worker.engine.reserve(state.clone()) => reservation,
        () = outlet.closed() => return,
    };
    let reservation = match reservation {
        Ok(reservation) => reservation,
        Err(failure) => return outlet.fail(&failure, "", Used::default()).await,
    };
    let answered = async {
        outlet.send(Event::Accepted(worker.identity.accepted())).await?;
        outlet.moment(Moment::Reserved).await
    };
    if answered.await.is_err() {
        return;
    }
    let driver = DestinationDriver::new(worker, state, source, reservation, outlet);
    // A front door that has gone needs no answer; all that is held goes with the driver.
    let _ = driver.run().await;
}

struct DestinationDriver {
    worker: Arc<Worker>,
    state: PortableState,
    source: cluster::Peer,
    transfer: TransferId,
    first_block: u32,
    machine: Destination,
    reservation: Option<Reservation>,
    numerics: Numerics,
    token: Option<(Token, Option<Finish>)>,
    generation: Option<Generation>,
    outlet: Outlet,
    used: Used,
    opened_at: Instant,
    /// The frame whose fact is being applied.
    frame: Option<cluster::KvFrame>,
    is_over: bool,
}

impl DestinationDriver {
    fn new(
        worker: &Arc<Worker>,
        state: PortableState,
        source: cluster::Peer,
        reservation: Reservation,
        outlet: Outlet,
    ) -> DestinationDriver {
        let first_block = reservation.choices[0].n_blocks_held as u32;
        let n_layers = worker.engine.layout().n_layers as u32;
        let plan = TransferPlan::handoff(n_layers, first_block, reservation.choices[0].n_blocks_total as u32);
        let transfer = TransferId(NEXT_TRANSFER.fetch_add(1, Relaxed));
        let opened_at = Instant::now();
        add(&worker.counters.n_blocks_not_sent, u64::from(first_block));
        DestinationDriver {
            worker: Arc::clone(worker),
            state,
            source,
            transfer,
            first_block,
            machine: Destination::handoff(
                transfer,
                plan,
                nanos(worker.options.progress_deadline),
                nanos(opened_at.elapsed()),
            ),
            reservation: Some(reservation),
            numerics: Numerics::Same,
            token: None,
            generation: None,
            outlet,
            used: Used::default(),
            opened_at,
            frame: None,
            is_over: false,
        }
    }

    async fn open(&self) -> Result<Streaming<cluster::TransferFrame>, Status> {
        let mut client = self
            .worker
            .peers
            .client(&self.source)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let request = cluster::PrefillRequest {
            handshake: Some(
                self.worker
                    .identity
                    .handshake(baton_scheduler::ids::Incarnation(self.source.incarnation)),
            ),
            state: Some((&self.state).into()),
            transfer_id: self.transfer.0,
            first_block: self.first_block,
            offer: None,
        };
        Ok(client.prefill(request).await?.into_inner())
    }

    async fn run(mut self) -> Result<(), Gone> {
        let opening = tokio::time::timeout(self.worker.options.progress_deadline, self.open());
        let mut stream = tokio::select! {
            opened = opening => match opened {
                Ok(Ok(stream)) => Some(stream),
                Ok(Err(status)) => {
                    self.apply(DestinationFact::Dropped { reason: status.message().to_owned() }).await?;
                    None
                }
                Err(_) => {
                    self.apply(DestinationFact::Dropped { reason: "no answer to the call".into() }).await?;
                    None
                }
            },
            () = self.outlet.closed() => return Err(Gone),
        };
        let opened_after = self.outlet.elapsed();
        while !(self.is_over && self.machine.is_closed()) {
            if self.machine.is_closed() {
                stream = None;
            }
            let tick_at = self
                .machine
                .next_tick()
                .map(|at| self.opened_at + std::time::Duration::from_nanos(at.0));
            tokio::select! {
                () = self.outlet.closed(), if !self.is_over => {
                    self.apply(DestinationFact::Cancelled).await?;
                    // Whatever is held, the generation included, goes with the driver.
                    return Err(Gone);
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
                        Some(timed) => local::forward(&self.outlet, timed, &mut self.used).await?,
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

    async fn take_frame(
        &mut self,
        frame: cluster::TransferFrame,
        opened_after: std::time::Duration,
    ) -> Result<(), Gone> {
        let fact = match frame.frame {
            Some(Frame::Accepted(accepted)) => match self.worker.identity.check_source(&self.source, &accepted) {
                Ok(()) => {
                    if accepted.numerics_class != self.worker.identity.numerics_class {
                        self.numerics = Numerics::Other;
                        add(&self.worker.counters.n_other_numerics, 1);
                    }
                    DestinationFact::Accepted {
                        ends_by: EndsBy::Source,
                    }
                }
                Err(failure) => DestinationFact::Ended { failure: Some(failure) },
            },
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
            Some(Frame::FirstToken(first)) => match self.first_token(first) {
                Ok((token, finish, n_cached_tokens)) => {
                    self.used.n_cached_tokens = n_cached_tokens;
                    self.token = Some((token, finish));
                    DestinationFact::Token { ends: finish.is_some() }
                }
                Err(failure) => DestinationFact::Ended { failure: Some(failure) },
            },
            Some(Frame::PromptLogprobs(logprobs)) => return self.outlet.send(Event::PromptLogprobs(logprobs)).await,
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
            Some(Frame::MovedState(_)) | None => return Ok(()),
        };
        self.apply(fact).await
    }

    /// The first token, refused before anybody hears of it unless it is the one that is owed.
    fn first_token(&self, wire: cluster::FirstToken) -> Result<(Token, Option<Finish>, u32), Failure> {
        let lost = |message: String| Failure::InstanceLost(message);
        let token = wire.token.ok_or_else(|| lost("a first token without a token".into()))?;
        let (index, n_vocab) = (self.state.choices[0].output.len(), self.worker.engine.vocab_size());
        if token.index as usize != index || token.id as usize >= n_vocab {
            return Err(lost(format!(
                "the first token is id {} with index {}, expected an id less than {n_vocab} with index {index}",
                token.id, token.index
            )));
        }
        let finish = wire.finish.map(Finish::try_from).transpose();
        let finish = finish.map_err(|error| lost(error.to_string()))?;
        Ok((token_from_wire(token).1, finish, wire.n_cached_tokens))
    }

    async fn apply(&mut self, fact: DestinationFact) -> Result<(), Gone> {
        let now = nanos(self.opened_at.elapsed());
        for action in self.machine.apply(now, fact) {
            match action {
                DestinationAction::Write(range) => self.write(range).await?,
                DestinationAction::Refuse(why) => {
                    tracing::warn!(request_id = %self.state.request.id, ?why, "KV frame refused");
                    add(&self.worker.counters.n_frames_refused, 1);
                    self.frame = None;
                }
                DestinationAction::Deliver => {
                    let (token, _) = self
                        .token
                        .as_ref()
                        .expect("the machine delivers a token it was told of");
                    self.used.has_token = true;
                    self.outlet.send(Event::Token(token_to_wire(0, token))).await?;
                }
                DestinationAction::Join => self.join().await?,
                DestinationAction::Finish => {
                    let (_, finish) = self.token.as_ref().expect("a token ended the request");
                    self.reservation = None;
                    self.outlet
                        .finish(finish.expect("the machine finishes on a final token"), self.used)
                        .await;
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

    async fn write(&mut self, range: KvRange) -> Result<(), Gone> {
        let frame = self
            .frame
            .take()
            .expect("a frame's fact is applied with the frame at hand");
        let reservation = self.reservation.as_mut().expect("blocks are reserved until the join");
        let first = (range.first_block - self.first_block) as usize;
        let writers = &mut reservation.choices[0].writers[first..first + range.n_blocks as usize];
        match self.worker.transport.land(&frame, writers) {
            Ok(n_bytes) => {
                self.used.kv_bytes_received += n_bytes;
                add(&self.worker.counters.bytes_received, n_bytes);
                add(&self.worker.counters.n_frames_received, 1);
            }
            Err(error) => {
                // The frame counts as landed in the machine, so the transfer must not go on.
                let source = self.source.instance_id.clone();
                self.fail(&Failure::InstanceLost(error.to_string()), &source).await;
                self.machine
                    .apply(nanos(self.opened_at.elapsed()), DestinationFact::Cancelled);
            }
        }
        Ok(())
    }

    async fn join(&mut self) -> Result<(), Gone> {
        // A failed write closed the request already.
        let Some(reservation) = self.reservation.take() else {
            return Ok(());
        };
        self.outlet.moment(Moment::TransferFinished).await?;
        let (token, _) = self.token.clone().expect("a sequence joins with its token");
        match reservation.join(vec![token], self.numerics) {
            Ok(generation) => {
                self.generation = Some(generation);
                add(&self.worker.counters.n_received, 1);
                self.outlet.moment(Moment::Joined).await
            }
            Err(failure) => {
                // Our own step loop refused it.
                self.fail(&failure, "").await;
                Ok(())
            }
        }
    }

    /// Ends the request badly; `blamed` is empty when this instance is at fault.
    async fn fail(&mut self, failure: &Failure, blamed: &str) {
        if self.is_over {
            return;
        }
        self.is_over = true;
        self.reservation = None;
        if *failure != Failure::Cancelled {
            add(&self.worker.counters.n_failed, 1);
        }
        tracing::info!(request_id = %self.state.request.id, source = %self.source.instance_id, %failure, "handoff failed");
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
