//! The sending end of a handoff: drives a prefill job and the link by the source machine, which decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};

use baton_kernels::KvRead;
use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_proto::convert::token_to_wire;
use baton_proto::link::KV_FRAME_BYTES;
use baton_scheduler::ids::Nanos;
use baton_scheduler::request::{Failure, Finish, PortableState, Token};
use baton_scheduler::timeline::Moment;
use baton_scheduler::transfer::{EndsBy, KvRange, Source, SourceAction, SourceFact, TransferId, TransferPlan};
use futures::Stream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::counters::add;
use super::local::prompt_logprobs;
use super::service::Worker;
use crate::engine::{PrefillEvent, PrefillJob, Timed};

type FrameResult = Result<cluster::TransferFrame, Status>;

/// KV frames and tokens on the link at once: one on its way while the next is packed.
const MAX_IN_FLIGHT: u32 = 2;
/// Besides those: the answer, three moments, prompt log-probabilities, and the typed end.
const N_EXTRA_FRAMES: usize = 6;

/// Counts what the connection has taken.
#[derive(Default)]
struct Taken {
    n_metered: AtomicU64,
    changed: Notify,
}

/// Whether the machine counts a frame as in flight.
fn is_metered(frame: &cluster::TransferFrame) -> bool {
    matches!(
        frame.frame,
        Some(Frame::Kv(_) | Frame::FirstToken(_) | Frame::Progress(_))
    )
}

/// Starts the prefill of a request from another instance; the stream's drop ends it.
pub(super) fn serve_prefill(
    worker: &Arc<Worker>,
    request: cluster::PrefillRequest,
) -> impl Stream<Item = FrameResult> + use<> {
    let (frames, receiver) = mpsc::channel(MAX_IN_FLIGHT as usize + N_EXTRA_FRAMES);
    let taken = Arc::new(Taken::default());
    let driver = Arc::clone(worker);
    let driver_taken = Arc::clone(&taken);
    worker.tasks.spawn(async move {
        let failure = match SourceDriver::start(&driver, request, frames.clone()) {
            Ok(source) => {
                source.run(&driver_taken).await;
                return;
            }
            Err(failure) => failure,
        };
        add(&driver.counters.n_failed, 1);
        let _ = frames.try_send(Ok(ended(Some(&failure))));
    });
    ReceiverStream::new(receiver).map(move |frame| {
        if frame.as_ref().is_ok_and(is_metered) {
            taken.n_metered.fetch_add(1, AcqRel);
            taken.changed.notify_one();
        }
        frame
    })
}

fn ended(failure: Option<&Failure>) -> cluster::TransferFrame {
    let ended = cluster::PrefillEnded {
        failure: failure.map(Into::into),
    };
    cluster::TransferFrame {
        frame: Some(Frame::Ended(ended)),
    }
}

struct SourceDriver {
    worker: Arc<Worker>,
    transfer: TransferId,
    machine: Source,
    job: PrefillJob,
    /// Per layer, the pinned blocks that were made ready and have not been packed.
    pinned: Vec<VecDeque<KvRead>>,
    token: Option<(Token, Option<Finish>)>,
    n_cached_tokens: u32,
    frames: mpsc::Sender<FrameResult>,
    opened_at: Instant,
    sent_first_frame: bool,
}

impl SourceDriver {
    fn start(
        worker: &Arc<Worker>,
        request: cluster::PrefillRequest,
        frames: mpsc::Sender<FrameResult>,
    ) -> Result<SourceDriver, Failure> {
        worker.identity.check_caller(request.handshake.as_ref())?;
        let state = request
            .state
            .ok_or_else(|| Failure::Invalid("field state is missing".into()))?;
        let state = PortableState::try_from(state).map_err(|error| Failure::Invalid(error.to_string()))?;
        let layout = worker.engine.layout();
        let job = worker.engine.prefill(state, request.first_block as usize)?;
        let plan = TransferPlan::handoff(layout.n_layers as u32, request.first_block, job.n_blocks() as u32);
        let per_frame = (KV_FRAME_BYTES / layout.layer_block_bytes()).max(1) as u32;
        let stall_deadline = nanos(worker.options.stall_deadline);
        let driver = SourceDriver {
            worker: Arc::clone(worker),
            transfer: TransferId(request.transfer_id),
            machine: Source::new(plan, MAX_IN_FLIGHT, per_frame, EndsBy::Source, stall_deadline),
            job,
            pinned: (0..layout.n_layers).map(|_| VecDeque::new()).collect(),
            token: None,
            n_cached_tokens: 0,
            frames,
            opened_at: Instant::now(),
            sent_first_frame: false,
        };
        driver.push(Frame::Accepted(driver.worker.identity.accepted()));
        Ok(driver)
    }

    async fn run(mut self, taken: &Taken) {
        let mut heartbeat = interval_at(
            Instant::now() + self.worker.options.heartbeat,
            self.worker.options.heartbeat,
        );
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let frames = self.frames.clone();
        while !self.machine.is_closed() {
            tokio::select! {
                () = frames.closed() => self.apply(SourceFact::Dropped),
                Some(timed) = self.job.next() => self.take_event(timed),
                () = taken.changed.notified() => {
                    for _ in 0..taken.n_metered.swap(0, AcqRel) {
                        self.apply(SourceFact::Sent);
                    }
                }
                _ = heartbeat.tick() => self.apply(SourceFact::Tick),
            }
        }
    }

    fn take_event(&mut self, timed: Timed<PrefillEvent>) {
        match timed.event {
            PrefillEvent::Started { n_cached_tokens } => {
                self.n_cached_tokens = n_cached_tokens as u32;
                self.push_moment(Moment::PrefillStarted, timed.at.into());
            }
            PrefillEvent::LayerReady { layer, blocks, reads } => {
                self.pinned[layer].extend(reads);
                self.apply(SourceFact::Ready(KvRange {
                    choice: 0,
                    layer: layer as u32,
                    first_block: blocks.start as u32,
                    n_blocks: blocks.len() as u32,
                }));
            }
            PrefillEvent::PromptLogprobs(logprobs) => self.push(Frame::PromptLogprobs(prompt_logprobs(&logprobs))),
            PrefillEvent::FirstTokens(first) => {
                self.push_moment(Moment::PrefillFinished, timed.at.into());
                let ends = first.iter().all(|(_, finish)| finish.is_some());
                self.token = first.into_iter().next();
                self.apply(SourceFact::Token { ends });
            }
            PrefillEvent::Failed(failure) => self.apply(SourceFact::ComputeFailed(failure)),
        }
    }

    fn apply(&mut self, fact: SourceFact) {
        let now = nanos(self.opened_at.elapsed());
        let is_tick = fact == SourceFact::Tick;
        for action in self.machine.apply(now, fact) {
            match action {
                SourceAction::SendKv(range) => self.send_kv(range),
                SourceAction::SendToken => {
                    let (token, finish) = self.token.as_ref().expect("the machine sends a token it was told of");
                    let first_token = cluster::FirstToken {
                        token: Some(token_to_wire(0, token)),
                        finish: finish.map(Into::into),
                        n_cached_tokens: self.n_cached_tokens,
                        ..Default::default()
                    };
                    self.push(Frame::FirstToken(first_token));
                }
                SourceAction::SendProgress => self.push(Frame::Progress(cluster::Progress {
                    n_steps: self.worker.engine.n_beats(),
                })),
                SourceAction::SendEnd(failure) => {
                    let counters = &self.worker.counters;
                    add(
                        if failure.is_none() {
                            &counters.n_sent
                        } else {
                            &counters.n_failed
                        },
                        1,
                    );
                    let _ = self.frames.try_send(Ok(ended(failure.as_ref())));
                }
                // Everything held is in `self`, which the closed machine ends.
                SourceAction::Release => {
                    // A tick gives up a destination that takes nothing; one that closes the stream counts that itself.
                    if is_tick {
                        add(&self.worker.counters.n_failed, 1);
                    }
                }
            }
        }
    }

    fn send_kv(&mut self, range: KvRange) {
        let reads: Vec<KvRead> = self.pinned[range.layer as usize]
            .drain(..range.n_blocks as usize)
            .collect();
        let frame = self.worker.transport.pack(self.transfer, range, reads);
        let counters = &self.worker.counters;
        add(&counters.bytes_sent, frame.data.len() as u64);
        add(&counters.n_frames_sent, 1);
        if self.token.is_none() {
            add(&counters.n_early_frames, 1);
        }
        if !std::mem::replace(&mut self.sent_first_frame, true) {
            self.push_moment(Moment::TransferStarted, Instant::now());
        }
        self.push(Frame::Kv(frame));
    }

    fn push_moment(&self, moment: Moment, at: Instant) {
        let elapsed = at.saturating_duration_since(self.opened_at);
        self.push(Frame::Moment(cluster::MomentReached {
            moment: moment as u32,
            elapsed_ns: elapsed.as_nanos() as u64,
        }));
    }

    /// The channel has room for whatever the machine has in flight and for each frame that comes once; a receiver that
    /// has gone is told by `closed`.
    fn push(&self, frame: Frame) {
        let frame = cluster::TransferFrame { frame: Some(frame) };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.frames.try_send(Ok(frame)) {
            unreachable!("more frames on the link than the machine allows");
        }
    }
}

pub(super) fn nanos(duration: std::time::Duration) -> Nanos {
    Nanos(duration.as_nanos() as u64)
}
