//! The requests whose streams are open here, so that a move finds them and their front door's word reaches them.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_scheduler::ids::{Epoch, RequestId};
use baton_scheduler::request::Failure;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use super::outlet::Outlet;

/// Words of a front door that may wait for a mover.
const MAX_WORDS: usize = 4;

#[derive(Clone, Default)]
pub(super) struct OpenRequests(Arc<Mutex<BTreeMap<RequestId, Arc<OpenRequest>>>>);

/// A request with an open stream.
pub(super) struct OpenRequest {
    pub(super) outlet: Arc<Outlet>,
    /// Where the mover of the move under way hears the front door.
    mover: Mutex<Option<mpsc::Sender<Epoch>>>,
    given_up: watch::Sender<Option<Failure>>,
}

/// A request stays findable as long as this lives.
pub(super) struct Registered {
    requests: OpenRequests,
    id: RequestId,
    pub(super) open: Arc<OpenRequest>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut requests = self.requests.0.lock();
        if requests.get(&self.id).is_some_and(|open| Arc::ptr_eq(open, &self.open)) {
            requests.remove(&self.id);
        }
    }
}

/// The one move of a request that may be under way; dropping it allows the next.
pub(super) struct MoverSeat {
    pub(super) open: Arc<OpenRequest>,
    pub(super) words: mpsc::Receiver<Epoch>,
}

impl Drop for MoverSeat {
    fn drop(&mut self) {
        *self.open.mover.lock() = None;
    }
}

impl OpenRequests {
    /// A newer stream of the same request takes the place of an older one, which its front door has closed.
    pub(super) fn register(&self, id: RequestId, outlet: Arc<Outlet>) -> Registered {
        let open = Arc::new(OpenRequest {
            outlet,
            mover: Mutex::new(None),
            given_up: watch::channel(None).0,
        });
        self.0.lock().insert(id, Arc::clone(&open));
        Registered {
            requests: self.clone(),
            id,
            open,
        }
    }

    fn get(&self, id: RequestId) -> Result<Arc<OpenRequest>, Failure> {
        let open = self.0.lock().get(&id).cloned();
        open.ok_or_else(|| Failure::InstanceLost(format!("request {id} is not open here")))
    }

    /// Takes the seat of the request's mover.
    ///
    /// # Errors
    /// `InstanceLost` when the request is not here, `Busy` when it is moving already.
    pub(super) fn begin_move(&self, id: RequestId) -> Result<MoverSeat, Failure> {
        let open = self.get(id)?;
        let mut mover = open.mover.lock();
        if mover.is_some() {
            return Err(Failure::Busy(format!("a move of request {id} is under way")));
        }
        let (sender, words) = mpsc::channel(MAX_WORDS);
        *mover = Some(sender);
        drop(mover);
        Ok(MoverSeat { open, words })
    }

    /// The front door lets a request go on in `epoch`, whether it is paused, about to be, or went on by itself.
    ///
    /// # Errors
    /// `InstanceLost` when the request is not here, `Invalid` when it speaks in that epoch or a newer one already: the
    /// word is late or was said twice.
    pub(super) fn resume(&self, id: RequestId, epoch: Epoch) -> Result<(), Failure> {
        let open = self.get(id)?;
        open.outlet.advance_epoch(epoch)?;
        if let Some(mover) = &*open.mover.lock() {
            // A mover that has ended has resumed; one that has not taken four words is about to take the first.
            let _ = mover.try_send(epoch);
        }
        Ok(())
    }
}

impl OpenRequest {
    /// Ends the request badly from outside its own task.
    pub(super) fn give_up(&self, failure: Failure) {
        self.given_up.send_replace(Some(failure));
    }

    /// Waits for [`OpenRequest::give_up`].
    pub(super) async fn given_up(&self) -> Failure {
        let mut given_up = self.given_up.subscribe();
        let failure = given_up.wait_for(Option::is_some).await.map(|failure| failure.clone());
        match failure {
            Ok(Some(failure)) => failure,
            // The sender lives in `self`, and the condition is that there is one.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn register(requests: &OpenRequests, epoch: u32) -> Registered {
        let (outlet, _events) = Outlet::new(Epoch(epoch), Duration::from_secs(1));
        requests.register(RequestId(7), Arc::new(outlet))
    }

    #[test]
    fn one_move_at_a_time_and_a_stale_word_is_refused() {
        let requests = OpenRequests::default();
        let unknown = requests.resume(RequestId(7), Epoch(9));
        assert!(matches!(unknown, Err(Failure::InstanceLost(_))), "{unknown:?}");
        let registered = register(&requests, 3);
        let mut seat = requests.begin_move(RequestId(7)).unwrap();
        assert!(matches!(requests.begin_move(RequestId(7)), Err(Failure::Busy(_))));
        for stale in [2, 3] {
            let refused = requests.resume(RequestId(7), Epoch(stale));
            assert!(matches!(refused, Err(Failure::Invalid(_))), "{refused:?}");
        }
        requests.resume(RequestId(7), Epoch(5)).unwrap();
        assert_eq!(seat.words.try_recv(), Ok(Epoch(5)));
        assert_eq!(registered.open.outlet.epoch(), Epoch(5));
        assert!(requests.resume(RequestId(7), Epoch(5)).is_err(), "said twice");
        drop(seat);
        assert!(requests.begin_move(RequestId(7)).is_ok());
    }

    #[test]
    fn a_newer_stream_is_not_forgotten_with_the_older_one() {
        let requests = OpenRequests::default();
        let older = register(&requests, 1);
        let newer = register(&requests, 4);
        drop(older);
        assert!(
            requests.resume(RequestId(7), Epoch(3)).is_err(),
            "the newer one speaks in 4"
        );
        assert!(requests.resume(RequestId(7), Epoch(6)).is_ok());
        drop(newer);
        assert!(requests.begin_move(RequestId(7)).is_err());
    }
}
