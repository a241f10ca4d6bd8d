//! The stream of one request's events to its front door: numbered by epoch, bounded, and cut when nobody reads it.

use std::sync::atomic::{
    AtomicU32,
    Ordering::{AcqRel, Acquire},
};
use std::time::Duration;

use baton_proto::cluster::{self, generate_event::Event};
use baton_scheduler::ids::Epoch;
use baton_scheduler::request::{Failure, Finish};
use baton_scheduler::timeline::Moment;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

/// Events that may wait for the connection; the engine's own buffer lies behind.
const CAPACITY: usize = 64;

/// The front door has gone, or reads nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// What a request used, for its last message.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    pub(super) n_cached_tokens: u32,
    pub(super) kv_bytes_received: u64,
    /// Whether its first token is out.
    pub(super) has_token: bool,
}

pub(super) struct Outlet {
    events: mpsc::Sender<Result<cluster::GenerateEvent, Status>>,
    /// Grows when the front door lets a paused request go on.
    epoch: AtomicU32,
    opened_at: Instant,
    stall_deadline: Duration,
}

impl Outlet {
    pub(super) fn new(
        epoch: Epoch,
        stall_deadline: Duration,
    ) -> (Outlet, mpsc::Receiver<Result<cluster::GenerateEvent, Status>>) {
        let (events, receiver) = mpsc::channel(CAPACITY);
        (
            Outlet {
                events,
                epoch: AtomicU32::new(epoch.0),
                opened_at: Instant::now(),
                stall_deadline,
            },
            receiver,
        )
    }

    /// The epoch in which events are said.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Acquire))
    }

    /// From now on events are said in `epoch`.
    ///
    /// # Errors
    /// `Invalid` unless it is newer.
    pub(super) fn advance_epoch(&self, epoch: Epoch) -> Result<(), Failure> {
        let before = self.epoch.fetch_max(epoch.0, AcqRel);
        if before < epoch.0 {
            Ok(())
        } else {
            Err(Failure::Invalid(format!(
                "epoch is {}, expected more than {before}",
                epoch.0
            )))
        }
    }

    /// Ends when the front door closes the stream.
    pub(super) async fn closed(&self) {
        self.events.closed().await;
    }

    pub(super) async fn send(&self, event: Event) -> Result<(), Gone> {
        let event = cluster::GenerateEvent {
            epoch: self.epoch().0,
            event: Some(event),
        };
        self.events
            .send_timeout(Ok(event), self.stall_deadline)
            .await
            .map_err(|_| Gone)
    }

    /// Time since the request came.
    pub(super) fn elapsed(&self) -> Duration {
        self.opened_at.elapsed()
    }

    /// Reports a moment that is now.
    pub(super) async fn moment(&self, moment: Moment) -> Result<(), Gone> {
        self.moment_at(moment, Instant::now()).await
    }

    pub(super) async fn moment_at(&self, moment: Moment, at: Instant) -> Result<(), Gone> {
        let elapsed = at.saturating_duration_since(self.opened_at);
        self.send(Event::Moment(cluster::MomentReached {
            moment: moment as u32,
            elapsed_ns: elapsed.as_nanos() as u64,
        }))
        .await
    }

    pub(super) async fn choice_finished(&self, choice: u32, finish: Finish) -> Result<(), Gone> {
        let finish = Some(finish.into());
        self.send(Event::ChoiceFinished(cluster::ChoiceFinished { choice, finish }))
            .await
    }

    /// Ends the stream well; `finish` is the choice's that ended last.
    pub(super) async fn finish(&self, finish: Finish, used: Used) {
        self.end(cluster::ended::How::Finish(finish.into()), used).await;
    }

    /// Ends the stream badly; `blamed` is the instance at fault when it is not this one.
    pub(super) async fn fail(&self, failure: &Failure, blamed: &str, used: Used) {
        let failure = cluster::Failure {
            instance_id: blamed.to_owned(),
            ..failure.into()
        };
        self.end(cluster::ended::How::Failure(failure), used).await;
    }

    async fn end(&self, how: cluster::ended::How, used: Used) {
        let ended = cluster::Ended {
            how: Some(how),
            n_cached_tokens: used.n_cached_tokens,
            kv_bytes_received: used.kv_bytes_received,
        };
        // A front door that has gone knows its request is over.
        let _ = self.send(Event::Ended(ended)).await;
    }
}
