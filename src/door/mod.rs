//! The front door's core: what it accepts from the APIs and what it streams back. It knows token ids only; text, templates
//! and stop strings belong to `api`, how requests reach instances to the files below.

mod admission;
mod cluster;
mod driver;
mod embedding;
mod emptying;
mod front_door;
mod kv_events;
mod move_metrics;
mod moves;
mod outbox;
mod rebalancing;
mod streams;

use std::sync::Arc;
use std::time::Duration;

use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::ids::{InstanceId, Nanos, Role};
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::request::{Failure, Finish, Request, Token, TokenLogprobs};
use baton_scheduler::timeline::Timeline;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::mpsc;

pub use cluster::{Cluster, Commands, JoinError, Member};
pub use emptying::{EmptyingTotals, keep_emptying, n_open};
pub use front_door::{FrontDoor, FrontDoorOptions};
pub use move_metrics::MoveMetrics;
pub use moves::{MoveError, MoveReason, Moved, OpenRequest, OpenRequests, RequestProgress, RequestStage};
pub use rebalancing::{Rebalancing, keep_balanced};

/// A validated request on its way in.
#[derive(Clone, Debug)]
pub struct Submission {
    /// What to generate.
    pub request: Request,
    /// Lower is more urgent: the order of admission, and below 0 the rebalancer keeps room clear beside it.
    pub priority: i32,
    /// Time left for the whole request, from now.
    pub deadline: Option<Duration>,
    /// Latencies it should have; the slo-aware policy aims at them.
    pub objectives: RequestObjectives,
    /// The client's name for it (`x-request-id`), for logs.
    pub label: Arc<str>,
    /// Moments so far: received and tokenized.
    pub timeline: Timeline,
}

/// Token counts of a request, for usage reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub n_prompt_tokens: u32,
    /// Tokens generated.
    pub n_completion_tokens: u32,
    /// Prompt tokens that a prefix cache held.
    pub n_cached_tokens: u32,
}

/// What comes back, in order. `Ended` or `Failed` is last and comes exactly once.
#[derive(Clone, Debug, PartialEq)]
pub enum DoorEvent {
    /// Log-probabilities of each prompt token after the first; before the first token.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// The next token of a choice; its indexes are consecutive from 0.
    Token {
        /// Which of the choices.
        choice: u32,
        /// The token.
        token: Token,
    },
    /// A choice ended well; one for each, before `Ended`.
    ChoiceFinished {
        /// Which of the choices.
        choice: u32,
        /// Why.
        finish: Finish,
    },
    /// The request ended well.
    Ended {
        /// Of the choice that ended last.
        finish: Finish,
        /// What it used.
        usage: Usage,
        /// When its moments came.
        timeline: Timeline,
    },
    /// The request ended badly, perhaps after some tokens.
    Failed(Failure),
}

/// A request's events. Dropping it cancels the request everywhere.
#[derive(Debug)]
pub struct RequestStream {
    events: mpsc::Receiver<DoorEvent>,
}

impl RequestStream {
    /// A stream and the sender that feeds it; the feeder learns of cancellation by `Sender::closed`.
    pub fn channel(capacity: usize) -> (mpsc::Sender<DoorEvent>, RequestStream) {
        let (sender, events) = mpsc::channel(capacity);
        (sender, RequestStream { events })
    }

    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<DoorEvent> {
        self.events.recv().await
    }
}

/// Why a request was not admitted. Nothing was computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Rejection {
    /// The queue is full; try again after this long.
    #[error("over capacity: {n_queued} requests are waiting, the limit is {limit}")]
    OverCapacity {
        /// Requests waiting now.
        n_queued: usize,
        /// The queue's bound.
        limit: usize,
        /// When to come back.
        retry_after: Duration,
    },
    /// It can never run: longer than the model allows, say.
    #[error("{0}")]
    Invalid(String),
    /// Nothing can serve it now: no instances, or the server is stopping.
    #[error("{0}")]
    Unavailable(String),
}

/// Why there is no embedding.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EmbedError {
    /// It was not admitted.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// It ended badly.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// One instance as the front door sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceView {
    /// Its name.
    pub id: InstanceId,
    /// What it is used for.
    pub role: Role,
    /// Sequences in its batches.
    pub n_running: u32,
    /// Sequences waiting there.
    pub n_waiting: u32,
    /// Blocks it has.
    pub n_blocks_total: u32,
    /// Blocks neither held nor cached.
    pub n_blocks_free: u32,
    /// Blocks of earlier prompts that can be evicted.
    pub n_blocks_cached: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// Layer groups of its model: a token is in a block of each.
    pub n_layer_groups: u32,
    /// Whether it can take requests.
    pub ready: bool,
}

/// The front door's state, for `/health`, `/metrics` and the Load call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DoorLoad {
    /// Requests waiting for admission.
    pub n_queued: usize,
    /// Requests admitted and not ended.
    pub n_running: usize,
    /// Why no request could be served now, if none could; `None` is healthy.
    pub not_ready: Option<String>,
    /// The instances.
    pub instances: Vec<InstanceView>,
}

impl InstanceView {
    /// Blocks that sequences hold.
    pub fn n_blocks_held(&self) -> u32 {
        let rest = self.n_blocks_free.saturating_add(self.n_blocks_cached);
        self.n_blocks_total.saturating_sub(rest)
    }

    /// Tokens for which so many blocks are enough, if none are given up.
    pub fn n_tokens_of(&self, n_blocks: u32) -> u64 {
        u64::from(n_blocks) * u64::from(self.block_size) / u64::from(self.n_layer_groups.max(1))
    }
}

impl DoorLoad {
    /// The part of all instances' blocks that sequences hold, 0 to 1; 0 without blocks.
    pub fn kv_usage(&self) -> f64 {
        let sum =
            |blocks: fn(&InstanceView) -> u32| self.instances.iter().map(|one| f64::from(blocks(one))).sum::<f64>();
        let (held, total) = (sum(InstanceView::n_blocks_held), sum(|one| one.n_blocks_total));
        if total > 0.0 { held / total } else { 0.0 }
    }
}

/// Takes requests and streams tokens back: the cluster, or a paced null model that measures the front door alone.
pub trait Generator: Send + Sync + 'static {
    /// Waits for admission (bounded) and starts the request. Dropping the future withdraws it.
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<RequestStream, Rejection>>;

    /// The mean of the hidden states of the request's prompt, not normalised. Dropping the future cancels it everywhere.
    fn embed(&self, submission: Submission) -> BoxFuture<'_, Result<Vec<f32>, EmbedError>>;

    /// What prefix caches hold without a salt, block by block: at first all of it, then every change. Without end; dropping it
    /// ends it.
    ///
    /// # Errors
    /// `Busy` when too many listen already.
    fn kv_events(&self) -> Result<BoxStream<'static, Vec<BlockEvent>>, Failure>;

    /// State now.
    fn load(&self) -> DoorLoad;

    /// The front door's clock, for timelines.
    fn now(&self) -> Nanos;
}

#[cfg(test)]
mod tests;
