//! The frames of one transfer on their way to the connection: bounded, and with word of what it has taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};

use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_scheduler::request::Failure;
use baton_scheduler::timeline::Moment;
use futures::Stream;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

pub(super) type FrameResult = Result<cluster::TransferFrame, Status>;

/// KV frames and tokens on the link at once: one on its way while the next is packed.
pub(super) const MAX_IN_FLIGHT: u32 = 2;
/// Besides those: the answer, three moments, prompt log-probabilities, and the typed end.
const N_EXTRA_FRAMES: usize = 6;

/// Counts what the connection has taken.
#[derive(Default)]
struct Taken {
    n_metered: AtomicU64,
    changed: Notify,
}

/// Whether the machines count a frame as in flight.
fn is_metered(frame: &cluster::TransferFrame) -> bool {
    matches!(
        frame.frame,
        Some(Frame::Kv(_) | Frame::FirstToken(_) | Frame::MovedState(_) | Frame::Progress(_))
    )
}

/// A source's end of the stream.
#[derive(Clone)]
pub(super) struct FrameLink {
    frames: mpsc::Sender<FrameResult>,
    taken: Arc<Taken>,
    opened_at: Instant,
}

/// A link, and the stream that the connection reads.
pub(super) fn frame_link() -> (FrameLink, impl Stream<Item = FrameResult> + use<>) {
    let (frames, receiver) = mpsc::channel::<FrameResult>(MAX_IN_FLIGHT as usize + N_EXTRA_FRAMES);
    let taken = Arc::new(Taken::default());
    let reader = Arc::clone(&taken);
    let stream = ReceiverStream::new(receiver).map(move |frame: FrameResult| {
        if frame.as_ref().is_ok_and(is_metered) {
            reader.n_metered.fetch_add(1, AcqRel);
            reader.changed.notify_one();
        }
        frame
    });
    let opened_at = Instant::now();
    let link = FrameLink {
        frames,
        taken,
        opened_at,
    };
    (link, stream)
}

impl FrameLink {
    /// When the transfer began: the source's clock.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Ends when the destination closes the stream.
    pub(super) async fn closed(&self) {
        self.frames.closed().await;
    }

    /// Waits until the connection has taken something, and says how many metered frames. Cancel safe.
    pub(super) async fn taken(&self) -> u64 {
        loop {
            let n_taken = self.taken.n_metered.swap(0, AcqRel);
            if n_taken > 0 {
                return n_taken;
            }
            self.taken.changed.notified().await;
        }
    }

    /// The channel has room for whatever a machine has in flight and for each frame that comes once; a receiver that has
    /// gone is told by [`FrameLink::closed`].
    pub(super) fn push(&self, frame: Frame) {
        let frame = cluster::TransferFrame { frame: Some(frame) };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.frames.try_send(Ok(frame)) {
            unreachable!("more frames on the link than the machine allows");
        }
    }

    pub(super) fn push_moment(&self, moment: Moment, at: Instant) {
        let elapsed = at.saturating_duration_since(self.opened_at);
        self.push(Frame::Moment(cluster::MomentReached {
            moment: moment as u32,
            elapsed_ns: elapsed.as_nanos() as u64,
        }));
    }

    /// The typed end.
    pub(super) fn end(&self, failure: Option<&Failure>) {
        self.push(Frame::Ended(cluster::PrefillEnded {
            failure: failure.map(Into::into),
        }));
    }
}
