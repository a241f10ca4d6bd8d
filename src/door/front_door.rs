//! The front door as a `Generator`: admits requests and gives each a task that drives it to its terminal state.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use baton_scheduler::ids::Nanos;
use futures::future::BoxFuture;
use tokio_util::task::TaskTracker;

use super::admission::Admission;
use super::cluster::Cluster;
use super::driver::RequestDriver;
use super::move_metrics::MoveMetrics;
use super::moves::OpenRequests;
use super::{DoorLoad, Generator, Rejection, RequestStream, Submission};

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
