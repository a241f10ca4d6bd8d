//! The sending end of a handoff: drives a prefill job and the link by the source machine, which decides.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_kernels::KvRead;
use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_proto::convert::{first_blocks_from_wire, token_to_wire};
use baton_scheduler::ids::Nanos;
use baton_scheduler::request::{Failure, Finish, PortableState, Token};
use baton_scheduler::timeline::Moment;
use baton_scheduler::transfer::{KvRange, Source, SourceAction, SourceFact, TransferId, TransferPlan};
use futures::Stream;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::counters::add;
use super::frames::{FrameLink, FrameResult, MAX_IN_FLIGHT, frame_link};
use super::local::prompt_logprobs;
use super::service::Worker;
use super::transport::KvSender;
use crate::engine::{PrefillEvent, PrefillJob, Timed};

/// Starts the prefill of a request from another instance; the stream's drop ends it.
pub(super) fn serve_prefill(
    worker: &Arc<Worker>,
    request: cluster::PrefillRequest,
) -> impl Stream<Item = FrameResult> + use<> {
    let (link, frames) = frame_link();
    let driver = Arc::clone(worker);
    worker.tasks.spawn(async move {
        match SourceDriver::start(&driver, request, link.clone()).await {
            Ok(source) => source.run().await,
            Err(failure) => {
                add(&driver.counters.n_failed, 1);
                link.end(Some(&failure));
            }
        }
    });
    frames
}

struct SourceDriver {
    worker: Arc<Worker>,
    machine: Source,
    sender: Box<dyn KvSender>,
    /// What the destination may still read in place.
    held: Vec<KvRead>,
    /// Why a frame could not be packed.
    trouble: Option<Failure>,
    job: PrefillJob,
    /// Per layer, the pinned blocks that were made ready and have not been packed.
    pinned: Vec<VecDeque<KvRead>>,
    /// First tokens, one for each choice, once they are sampled.
    first: Vec<(Token, Option<Finish>)>,
    n_cached_tokens: u32,
    link: FrameLink,
    sent_first_frame: bool,
    is_counted: bool,
}

impl SourceDriver {
    async fn start(
        worker: &Arc<Worker>,
        request: cluster::PrefillRequest,
        link: FrameLink,
    ) -> Result<SourceDriver, Failure> {
        worker.identity.check_caller(request.handshake.as_ref())?;
        let state = request
            .state
            .ok_or_else(|| Failure::Invalid("field state is missing".into()))?;
        let state = PortableState::try_from(state).map_err(|error| Failure::Invalid(error.to_string()))?;
        let prepared = worker.engine.prepare(state).await?;
        let transfer = TransferId(request.transfer_id);
        let sender = worker.transports.sender(transfer, request.offer.as_ref(), "the caller");
        let sender = sender.map_err(|error| error.failure())?;
        let accepted = cluster::Accepted {
            transport: sender.kind().as_str().to_owned(),
            ..worker.identity.accepted(request.handshake.as_ref())
        };
        let layout = worker.engine.layout();
        let first_blocks = first_blocks_from_wire(request.first_block, request.first_blocks);
        let firsts: Vec<usize> = first_blocks.iter().map(|&first| first as usize).collect();
        let job = worker.engine.prefill(prepared, &firsts)?;
        let layer_groups = worker.engine.layer_groups().of_layers();
        let n_layers = layer_groups.len();
        let plan = TransferPlan::handoff(layer_groups, first_blocks, job.n_blocks() as u32);
        let per_frame = (sender.frame_bytes() / layout.layer_block_bytes()).max(1) as u32;
        let stall_deadline = nanos(worker.options.stall_deadline);
        link.push(Frame::Accepted(accepted));
        Ok(SourceDriver {
            worker: Arc::clone(worker),
            machine: Source::new(plan, MAX_IN_FLIGHT, per_frame, sender.kind().ends_by(), stall_deadline),
            sender,
            held: Vec::new(),
            trouble: None,
            job,
            pinned: (0..n_layers).map(|_| VecDeque::new()).collect(),
            first: Vec::new(),
            n_cached_tokens: 0,
            link,
            sent_first_frame: false,
            is_counted: false,
        })
    }

    async fn run(mut self) {
        let heartbeat = self.worker.options.heartbeat;
        let mut heartbeat = interval_at(Instant::now() + heartbeat, heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let link = self.link.clone();
        while !self.machine.is_closed() {
            if let Some(failure) = self.trouble.take() {
                self.apply(SourceFact::ComputeFailed(failure));
                continue;
            }
            tokio::select! {
                () = link.closed() => self.apply(SourceFact::Dropped),
                Some(timed) = self.job.next() => self.take_event(timed),
                n_taken = link.taken() => {
                    for _ in 0..n_taken {
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
                self.link.push_moment(Moment::PrefillStarted, timed.at.into());
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
            PrefillEvent::PromptLogprobs(logprobs) => {
                self.link.push(Frame::PromptLogprobs(prompt_logprobs(&logprobs)));
            }
            PrefillEvent::FirstTokens(first) => {
                self.link.push_moment(Moment::PrefillFinished, timed.at.into());
                let ends = first.iter().all(|(_, finish)| finish.is_some());
                self.first = first;
                self.apply(SourceFact::Token { ends });
            }
            PrefillEvent::Failed(failure) => self.apply(SourceFact::ComputeFailed(failure)),
        }
    }

    fn apply(&mut self, fact: SourceFact) {
        let now = nanos(self.link.opened_at().elapsed());
        let is_tick = fact == SourceFact::Tick;
        for action in self.machine.apply(now, fact) {
            match action {
                SourceAction::SendKv(range) => self.send_kv(range),
                SourceAction::SendToken => self.link.push(Frame::FirstToken(self.first_token())),
                SourceAction::SendProgress => self.link.push(Frame::Progress(cluster::Progress {
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
                    self.is_counted = true;
                    self.link.end(failure.as_ref());
                }
                // Everything held is in `self`, which the closed machine ends.
                SourceAction::Release => {
                    let counters = &self.worker.counters;
                    if self.machine.has_sent_all() && !self.is_counted {
                        add(&counters.n_sent, 1);
                    } else if is_tick {
                        // A tick gives up a destination that takes nothing; one that closes the stream counts itself.
                        add(&counters.n_failed, 1);
                    }
                }
            }
        }
    }

    fn first_token(&self) -> cluster::FirstToken {
        let mut tokens = (0..)
            .zip(&self.first)
            .map(|(choice, (token, _))| token_to_wire(choice, token));
        let token = tokens.next();
        let finished = (0..).zip(&self.first).skip(1);
        cluster::FirstToken {
            token,
            more: tokens.collect(),
            finish: self.first.first().and_then(|(_, finish)| *finish).map(Into::into),
            finished: finished
                .filter_map(|(choice, (_, finish))| {
                    let finish = Some((*finish)?.into());
                    Some(cluster::ChoiceFinished { choice, finish })
                })
                .collect(),
            n_cached_tokens: self.n_cached_tokens,
        }
    }

    fn send_kv(&mut self, range: KvRange) {
        let reads: Vec<KvRead> = self.pinned[range.layer as usize]
            .drain(..range.n_blocks as usize)
            .collect();
        let packed = match self.sender.pack(range, reads) {
            Ok(packed) => packed,
            Err(error) => {
                self.trouble = Some(error.failure());
                return;
            }
        };
        self.held.extend(packed.pins);
        let counters = &self.worker.counters;
        add(&counters.bytes_sent, packed.n_bytes);
        add(&counters.n_frames_sent, 1);
        if self.first.is_empty() {
            add(&counters.n_early_frames, 1);
        }
        if !std::mem::replace(&mut self.sent_first_frame, true) {
            self.link.push_moment(Moment::TransferStarted, Instant::now());
        }
        self.link.push(Frame::Kv(packed.frame));
    }
}

pub(super) fn nanos(duration: std::time::Duration) -> Nanos {
    Nanos(duration.as_nanos() as u64)
}
