//! A generator without a model: tokens come at fixed times. It measures the front door alone, and stands in for the cluster
//! where only the front door is of interest. It computes nothing, so its text means nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::ids::{InstanceId, Nanos, Role, TokenId};
use baton_scheduler::request::{Failure, Finish, Token, TokenLogprobs};
use baton_scheduler::timeline::Moment;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant as TimerInstant;

use crate::door::{
    DoorEvent, DoorLoad, EmbedError, Generator, InstanceView, Rejection, RequestStream, Submission, Usage,
};

/// How the null model behaves.
#[derive(Clone, Debug)]
pub struct NullOptions {
    /// From admission to the first token.
    pub first_token_after: Duration,
    /// From one token to the next.
    pub token_every: Duration,
    /// The ids it says, over and over; at least one. Choice `c` of a request begins with the `c`-th, so that choices
    /// differ.
    pub token_ids: Vec<TokenId>,
    /// Requests that run at once.
    pub max_running: usize,
    /// Length of what it gives as an embedding.
    pub embedding_size: usize,
    /// Requests that wait; one more is refused.
    pub max_queued: usize,
}

impl Default for NullOptions {
    fn default() -> NullOptions {
        NullOptions {
            first_token_after: Duration::ZERO,
            token_every: Duration::ZERO,
            token_ids: vec![0],
            max_running: 1024,
            embedding_size: 4,
            max_queued: 1024,
        }
    }
}

/// What has become of the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullCounts {
    /// Admitted.
    pub n_started: usize,
    /// Ended by themselves.
    pub n_ended: usize,
    /// Given up by the front door.
    pub n_cancelled: usize,
    /// Tokens handed over.
    pub n_tokens: usize,
}

/// The null model.
#[derive(Debug)]
pub struct NullGenerator {
    options: Arc<NullOptions>,
    permits: Arc<Semaphore>,
    n_queued: AtomicUsize,
    counts: watch::Sender<NullCounts>,
    start: Instant,
}

/// Tokens that may wait for a slow reader.
const BUFFERED_EVENTS: usize = 64;

/// Log-probability of the token the null model says; alternatives follow one unit apart.
const NULL_LOGPROB: f32 = -0.5;

impl NullGenerator {
    /// A null model.
    pub fn new(options: NullOptions) -> NullGenerator {
        assert!(!options.token_ids.is_empty(), "the null model needs something to say");
        NullGenerator {
            permits: Arc::new(Semaphore::new(options.max_running)),
            options: Arc::new(options),
            n_queued: AtomicUsize::new(0),
            counts: watch::Sender::new(NullCounts::default()),
            start: Instant::now(),
        }
    }

    /// Follows the counts.
    pub fn counts(&self) -> watch::Receiver<NullCounts> {
        self.counts.subscribe()
    }

    async fn admit(&self) -> Result<OwnedSemaphorePermit, Rejection> {
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let n_queued = self.n_queued.fetch_add(1, Ordering::Relaxed);
        let _queued = Queued(&self.n_queued);
        let limit = self.options.max_queued;
        if n_queued >= limit {
            let retry_after = self.options.first_token_after + self.options.token_every;
            return Err(Rejection::OverCapacity {
                n_queued,
                limit,
                retry_after,
            });
        }
        Ok(self
            .permits
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed"))
    }
}

/// A place in the queue, given back on drop.
struct Queued<'a>(&'a AtomicUsize);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts how an embedding ended.
struct CountedEnd<'a> {
    counts: &'a watch::Sender<NullCounts>,
    is_whole: bool,
}

impl Drop for CountedEnd<'_> {
    fn drop(&mut self) {
        self.counts.send_modify(|counts| match self.is_whole {
            true => counts.n_ended += 1,
            false => counts.n_cancelled += 1,
        });
    }
}

impl Generator for NullGenerator {
    fn submit(&self, mut submission: Submission) -> BoxFuture<'_, Result<RequestStream, Rejection>> {
        async move {
            let deadline = submission.deadline.map(|left| TimerInstant::now() + left);
            let permit = self.admit().await?;
            submission.timeline.mark(Moment::Admitted, self.now());
            self.counts.send_modify(|counts| counts.n_started += 1);
            let (events, stream) = RequestStream::channel(BUFFERED_EVENTS);
            let speaker = Speaker {
                options: self.options.clone(),
                events,
                submission,
                counts: self.counts.clone(),
                start: self.start,
            };
            tokio::spawn(async move {
                speaker.run(deadline).await;
                drop(permit);
            });
            Ok(stream)
        }
        .boxed()
    }

    fn embed(&self, submission: Submission) -> BoxFuture<'_, Result<Vec<f32>, EmbedError>> {
        async move {
            let _permit = self.admit().await?;
            self.counts.send_modify(|counts| counts.n_started += 1);
            let mut end = CountedEnd {
                counts: &self.counts,
                is_whole: false,
            };
            let embed = async {
                tokio::time::sleep(self.options.first_token_after).await;
                // As meaningless as its tokens: a wave that the prompt's length shifts.
                let n_tokens = submission.request.prompt_ids.len();
                (0..self.options.embedding_size)
                    .map(|i| ((n_tokens + i) as f32).sin())
                    .collect()
            };
            let embedding = match submission.deadline {
                Some(left) => tokio::time::timeout(left, embed)
                    .await
                    .map_err(|_| Failure::DeadlineExceeded)?,
                None => embed.await,
            };
            end.is_whole = true;
            Ok(embedding)
        }
        .boxed()
    }

    /// It has no cache.
    fn kv_events(&self) -> Result<BoxStream<'static, Vec<BlockEvent>>, Failure> {
        let nothing = futures::stream::iter([vec![BlockEvent::Cleared]]);
        Ok(nothing.chain(futures::stream::pending()).boxed())
    }

    fn load(&self) -> DoorLoad {
        let n_running = self.options.max_running - self.permits.available_permits();
        DoorLoad {
            n_queued: self.n_queued.load(Ordering::Relaxed),
            n_running,
            not_ready: None,
            instances: vec![InstanceView {
                id: InstanceId::new("null-0"),
                role: Role::Mixed,
                n_running: n_running as u32,
                n_waiting: 0,
                n_blocks_total: 0,
                n_blocks_free: 0,
                n_blocks_cached: 0,
                block_size: 0,
                n_layer_groups: 1,
                ready: true,
            }],
        }
    }

    fn now(&self) -> Nanos {
        since(self.start)
    }
}

fn since(start: Instant) -> Nanos {
    Nanos(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// One request being answered.
struct Speaker {
    options: Arc<NullOptions>,
    events: mpsc::Sender<DoorEvent>,
    submission: Submission,
    counts: watch::Sender<NullCounts>,
    start: Instant,
}

impl Speaker {
    async fn run(self, deadline: Option<TimerInstant>) {
        let (events, counts) = (self.events.clone(), self.counts.clone());
        let too_late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let is_heard = tokio::select! {
            spoken = self.speak() => spoken.is_ok(),
            () = events.closed() => false,
            () = too_late => events.try_send(DoorEvent::Failed(Failure::DeadlineExceeded)).is_ok(),
        };
        counts.send_modify(|counts| match is_heard {
            true => counts.n_ended += 1,
            false => counts.n_cancelled += 1,
        });
    }

    async fn speak(mut self) -> Result<(), mpsc::error::SendError<DoorEvent>> {
        let request = &self.submission.request;
        let n_prompt = request.prompt_ids.len();
        let sampling = request.sampling.clone();
        let first = TimerInstant::now() + self.options.first_token_after;
        if let Some(n_top) = sampling.prompt_logprobs {
            let logprobs = request.prompt_ids[1..].iter().map(|&id| logprobs(id, n_top)).collect();
            self.events.send(DoorEvent::PromptLogprobs(logprobs)).await?;
        }
        let token_ids = &self.options.token_ids;
        let mut speaking: Vec<u32> = (0..sampling.n).collect();
        let mut still_speaking = Vec::with_capacity(speaking.len());
        let mut finish = Finish::Length;
        let mut n_tokens = 0;
        for index in 0..sampling.max_tokens {
            // Times are counted from the first token, so that waking late once does not delay all that follow.
            let at = first + self.options.token_every * index;
            if at > TimerInstant::now() {
                tokio::time::sleep_until(at).await;
            }
            if index == 0 {
                self.submission.timeline.mark(Moment::FirstToken, since(self.start));
            }
            for choice in speaking.drain(..) {
                let id = token_ids[(choice as usize + index as usize) % token_ids.len()];
                let logprobs = sampling.logprobs.map(|n_top| logprobs(id, n_top));
                let token = Token { index, id, logprobs };
                self.events.send(DoorEvent::Token { choice, token }).await?;
                self.counts.send_modify(|counts| counts.n_tokens += 1);
                n_tokens += 1;
                finish = match sampling.stop_token_ids.contains(&id) {
                    true => Finish::Stop(id),
                    false if index + 1 == sampling.max_tokens => Finish::Length,
                    false => {
                        still_speaking.push(choice);
                        continue;
                    }
                };
                self.events.send(DoorEvent::ChoiceFinished { choice, finish }).await?;
            }
            std::mem::swap(&mut speaking, &mut still_speaking);
            if speaking.is_empty() {
                break;
            }
        }
        self.submission.timeline.mark(Moment::Finished, since(self.start));
        let usage = Usage {
            n_prompt_tokens: n_prompt as u32,
            n_completion_tokens: n_tokens,
            n_cached_tokens: 0,
        };
        self.events
            .send(DoorEvent::Ended {
                finish,
                usage,
                timeline: self.submission.timeline,
            })
            .await
    }
}

/// What the null model reports: the token itself first, then the ids after it.
fn logprobs(id: TokenId, n_top: u8) -> TokenLogprobs {
    let top = (0..u32::from(n_top))
        .map(|n| (id.wrapping_add(n), NULL_LOGPROB - n as f32))
        .collect();
    TokenLogprobs {
        logprob: NULL_LOGPROB,
        rank: 1,
        top,
    }
}
