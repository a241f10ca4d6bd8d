//! The front door as a `Generator`: admits requests and gives each a task that drives it to its terminal state.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::ids::Nanos;
use baton_scheduler::request::Failure;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::admission::Admission;
use super::cluster::Cluster;
use super::driver::RequestDriver;
use super::embedding::EmbeddingDriver;
use super::kv_events::{self, MAX_SUBSCRIBERS};
use super::move_metrics::MoveMetrics;
use super::moves::OpenRequests;
use super::{DoorLoad, EmbedError, Generator, Rejection, RequestStream, Submission};

/// Events that may wait for a client; behind them the instance's own buffer holds all its tokens.
const CLIENT_CAPACITY: usize = 256;

/// Bounds of a front door.
#[derive(Clone, Debug)]
pub struct FrontDoorOptions {
    /// Requests that may wait for admission.
    pub max_queue: usize,
    /// How long a request may wait to be placed before it is refused as over capacity.
    pub max_queue_wait: Duration,
    /// A client that takes nothing for this long is cancelled.
    pub client_stall: Duration,
    /// How long a request may stand still for a move before its source goes on.
    pub move_deadline: Duration,
}

impl Default for FrontDoorOptions {
    fn default() -> Self {
        FrontDoorOptions {
            max_queue: 1024,
            max_queue_wait: Duration::from_secs(120),
            client_stall: Duration::from_secs(60),
            move_deadline: Duration::from_secs(2),
        }
    }
}

/// Places requests on a cluster and streams their tokens.
#[derive(Clone)]
pub struct FrontDoor {
    cluster: Arc<Cluster>,
    admission: Arc<Admission>,
    options: FrontDoorOptions,
    requests: OpenRequests,
    metrics: MoveMetrics,
    tasks: TaskTracker,
    n_running: Arc<AtomicUsize>,
    subscribers: Arc<Semaphore>,
}

impl FrontDoor {
    /// A front door of `cluster`.
    pub fn new(cluster: Arc<Cluster>, options: FrontDoorOptions) -> FrontDoor {
        let admission = Admission::new(options.max_queue);
        FrontDoor {
            cluster,
            admission,
            options,
            requests: OpenRequests::default(),
            metrics: MoveMetrics::default(),
            tasks: TaskTracker::new(),
            n_running: Arc::default(),
            subscribers: Arc::new(Semaphore::new(MAX_SUBSCRIBERS)),
        }
    }

    /// The requests open here.
    pub fn requests(&self) -> OpenRequests {
        self.requests.clone()
    }

    /// What moves and replays come to.
    pub fn move_metrics(&self) -> &MoveMetrics {
        &self.metrics
    }

    /// Waits until every request has ended; no further ones may be submitted.
    pub async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Generator for FrontDoor {
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<RequestStream, Rejection>> {
        Box::pin(async move {
            if self.tasks.is_closed() {
                return Err(Rejection::Unavailable("the server is stopping".into()));
            }
            self.cluster.check_fits(&submission.request)?;
            let place = self.admission.enter()?;
            let (events, stream) = RequestStream::channel(CLIENT_CAPACITY);
            let listed = self.requests.list(&submission);
            let driver = RequestDriver::new(
                Arc::clone(&self.cluster),
                Arc::clone(&self.admission),
                self.options.clone(),
                submission,
                events,
                listed,
                self.metrics.clone(),
            );
            let running = Running::count(&self.n_running);
            self.tasks.spawn(async move {
                driver.run(place).await;
                drop(running);
            });
            Ok(stream)
        })
    }

    fn embed(&self, submission: Submission) -> BoxFuture<'_, Result<Vec<f32>, EmbedError>> {
        Box::pin(async move {
            if self.tasks.is_closed() {
                return Err(Rejection::Unavailable("the server is stopping".into()).into());
            }
            self.cluster.check_fits(&submission.request)?;
            let place = self.admission.enter()?;
            let listed = self.requests.list(&submission);
            let driver = EmbeddingDriver {
                cluster: Arc::clone(&self.cluster),
                admission: Arc::clone(&self.admission),
                options: self.options.clone(),
                metrics: self.metrics.clone(),
                submission,
            };
            let _running = Running::count(&self.n_running);
            Ok(self.tasks.track_future(driver.run(place, listed)).await?)
        })
    }

    fn kv_events(&self) -> Result<BoxStream<'static, Vec<BlockEvent>>, Failure> {
        let subscriber = Arc::clone(&self.subscribers).try_acquire_owned();
        let full = |_| Failure::Busy(format!("{MAX_SUBSCRIBERS} subscribers listen already"));
        let subscriber = subscriber.map_err(full)?;
        let events = kv_events::follow(Arc::clone(&self.cluster));
        // One fewer when the stream is dropped.
        Ok(events
            .map(move |events| {
                let _subscriber = &subscriber;
                events
            })
            .boxed())
    }

    fn load(&self) -> DoorLoad {
        let n_queued = self.admission.n_queued();
        DoorLoad {
            n_queued,
            n_running: self.n_running.load(Ordering::Acquire).saturating_sub(n_queued),
            not_ready: self.cluster.not_ready(),
            instances: self.cluster.instances(),
        }
    }

    fn now(&self) -> Nanos {
        self.cluster.now()
    }
}

struct Running(Arc<AtomicUsize>);

impl Running {
    fn count(n_running: &Arc<AtomicUsize>) -> Running {
        n_running.fetch_add(1, Ordering::AcqRel);
        Running(Arc::clone(n_running))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
