//! What a request's client has not taken yet, so that a slow client holds up neither the moves nor the deadlines of its request.
//! It decides nothing: that a client is gone is for the driver to act on.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::Instant;

use super::DoorEvent;

/// Events on their way to one client.
pub(super) struct Outbox {
    client: mpsc::Sender<DoorEvent>,
    waiting: VecDeque<DoorEvent>,
    max_waiting: usize,
    client_stall: Duration,
    /// When the client last took something, or the first of those that wait came.
    taken_at: Instant,
}

/// More events wait than the request can have.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("more events than the {max_waiting} that the request can have")]
pub(super) struct TooMany {
    max_waiting: usize,
}

impl Outbox {
    /// For a client that may leave `max_waiting` events, and counts as gone when it takes none of those for `client_stall`.
    pub(super) fn new(client: mpsc::Sender<DoorEvent>, max_waiting: usize, client_stall: Duration) -> Outbox {
        Outbox {
            client,
            waiting: VecDeque::new(),
            max_waiting,
            client_stall,
            taken_at: Instant::now(),
        }
    }

    /// Hands an event over, or keeps it behind those that wait. Those of a client that has left are dropped.
    ///
    /// # Errors
    /// When too many wait; the event is dropped.
    pub(super) fn push(&mut self, event: DoorEvent) -> Result<(), TooMany> {
        let event = if self.waiting.is_empty() {
            match self.client.try_send(event) {
                Ok(()) | Err(TrySendError::Closed(_)) => return Ok(()),
                Err(TrySendError::Full(event)) => event,
            }
        } else {
            event
        };
        if self.waiting.len() >= self.max_waiting {
            let max_waiting = self.max_waiting;
            return Err(TooMany { max_waiting });
        }
        if self.waiting.is_empty() {
            self.taken_at = Instant::now();
        }
        self.waiting.push_back(event);
        Ok(())
    }

    /// Hands over what waits, as the client takes it, and ends when the client has left or stalls; what a stalled client left
    /// is dropped. May be cancelled and called again.
    pub(super) async fn client_gone(&mut self) {
        if self.pass_on().await {
            self.client.closed().await;
        }
    }

    /// Hands over what waits, the terminal event last, to a client that may leave or stall meanwhile.
    pub(super) async fn finish(mut self) {
        self.pass_on().await;
    }

    /// Whether the client took everything.
    async fn pass_on(&mut self) -> bool {
        while !self.waiting.is_empty() {
            match tokio::time::timeout_at(self.taken_at + self.client_stall, self.client.reserve()).await {
                Ok(Ok(place)) => {
                    place.send(self.waiting.pop_front().expect("one waits"));
                    self.taken_at = Instant::now();
                }
                Ok(Err(_)) | Err(_) => {
                    self.waiting.clear();
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use baton_scheduler::request::Failure;

    use super::super::RequestStream;
    use super::*;

    const STALL: Duration = Duration::from_millis(50);

    fn event(name: usize) -> DoorEvent {
        DoorEvent::Failed(Failure::Internal(name.to_string()))
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_comes_in_order() {
        let (client, mut stream) = RequestStream::channel(2);
        let mut outbox = Outbox::new(client, 3, Duration::from_secs(60));
        for name in 0..5 {
            assert_eq!(outbox.push(event(name)), Ok(()));
        }
        assert_eq!(outbox.push(event(5)), Err(TooMany { max_waiting: 3 }));
        let reading = async {
            let mut read = Vec::new();
            while let Some(event) = stream.next().await {
                read.push(event);
            }
            read
        };
        let ((), read) = tokio::join!(outbox.finish(), reading);
        assert_eq!(read, (0..5).map(event).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_for_long_is_gone() {
        let (client, mut stream) = RequestStream::channel(1);
        let mut outbox = Outbox::new(client, 8, STALL);
        let began = Instant::now();
        for name in 0..3 {
            outbox.push(event(name)).expect("room");
        }
        assert_eq!(stream.next().await, Some(event(0)));
        // What it takes gives it the whole time again.
        outbox.client_gone().await;
        assert!(began.elapsed() >= STALL, "{:?}", began.elapsed());
        // What it left is dropped, so that the terminal event is the next.
        outbox.push(event(9)).expect("room");
        let reading = async { [stream.next().await, stream.next().await, stream.next().await] };
        let ((), read) = tokio::join!(outbox.finish(), reading);
        assert_eq!(read, [Some(event(1)), Some(event(9)), None]);
    }
}
