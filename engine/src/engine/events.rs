//! What a generating request says, and the handle that hears it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use baton_scheduler::request::{Failure, Finish, Token, TokenLogprobs};
use futures::Stream;
use tokio::sync::mpsc;

use super::command::WakeOnDrop;

/// Something and when the step loop said it.
#[derive(Clone, Debug)]
pub struct Timed<E> {
    /// When.
    pub at: Instant,
    /// What.
    pub event: E,
}

/// What happens to a generating request, in order for each of its choices. Ends with exactly one `Finished` or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEvent {
    /// The first chunk of its context is in the coming step.
    PrefillStarted {
        /// Leading tokens that the prefix cache had.
        n_cached_tokens: usize,
    },
    /// Log-probabilities of the prompt's tokens after the first, `[n_prompt - 1]`; before the first token.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// The next token of a choice.
    Token {
        /// The choice's number.
        choice: u32,
        /// The token.
        token: Token,
    },
    /// A choice ended well.
    ChoiceFinished {
        /// The choice's number.
        choice: u32,
        /// How.
        finish: Finish,
    },
    /// A choice lost its blocks and will recompute; nothing is lost but time.
    Preempted,
    /// Every choice ended well, the last one like this.
    Finished(Finish),
    /// It ended badly.
    Failed(Failure),
}

impl EngineEvent {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, EngineEvent::Finished(_) | EngineEvent::Failed(_))
    }
}

/// A running request. Dropping it cancels all its choices.
pub struct Generation {
    // Dropped in this order: the loop wakes to a closed channel.
    pub(super) events: mpsc::Receiver<Timed<EngineEvent>>,
    pub(super) _wake: WakeOnDrop,
    pub(super) has_ended: bool,
}

impl Generation {
    /// The next event; `None` after the terminal one. Cancel safe.
    pub async fn next(&mut self) -> Option<Timed<EngineEvent>> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Timed<EngineEvent>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|timed| {
            let timed = timed.unwrap_or_else(|| Timed {
                at: Instant::now(),
                event: EngineEvent::Failed(silence()),
            });
            self.has_ended = timed.event.is_terminal();
            Some(timed)
        })
    }
}

impl Stream for Generation {
    type Item = Timed<EngineEvent>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Timed<EngineEvent>>> {
        self.poll_event(context)
    }
}

/// The end of a sequence whose step loop went away without a word.
pub(super) fn silence() -> Failure {
    Failure::Internal("the step loop ended without an answer".to_owned())
}
