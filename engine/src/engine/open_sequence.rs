//! What the step loop keeps of a sequence besides its scheduling: how it samples and whom it tells.
//! Telling never waits: a channel has room for all that its sequence can say.

use std::ops::Range;
use std::time::Instant;

use baton_kernels::KvCache;
use baton_scheduler::request::{Failure, Finish, PortableState, SamplingParams, Token, TokenLogprobs};
use tokio::sync::{mpsc, oneshot};

use super::command::Granted;
use super::events::{EngineEvent, Timed};
use super::handoff::PrefillEvent;
use super::load::OpenPermit;

/// Whom a sequence tells.
pub(super) enum Outlet {
    Generation(mpsc::Sender<Timed<EngineEvent>>),
    Prefill {
        events: mpsc::Sender<Timed<PrefillEvent>>,
        /// Leading blocks made ready, or not wanted.
        n_ready: usize,
    },
}

pub(super) struct OpenSequence {
    pub(super) outlet: Outlet,
    /// Of a reservation that has not been answered.
    pub(super) reply: Option<oneshot::Sender<Result<Granted, Failure>>>,
    pub(super) sampling: SamplingParams,
    pub(super) n_prompt: usize,
    /// Index of the next token.
    pub(super) next_index: u32,
    /// Those computed so far, until they are told.
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    has_started: bool,
    _permit: OpenPermit,
}

/// KV blocks that a step completes for a sequence that will be handed over.
pub(super) struct ReadyBlocks<'a> {
    pub(super) events: &'a mpsc::Sender<Timed<PrefillEvent>>,
    pub(super) blocks: Range<usize>,
    pub(super) block_table: &'a [u32],
}

impl ReadyBlocks<'_> {
    /// Pins the blocks in one layer and tells of them.
    pub(super) fn tell(&self, layer: usize, kv: &mut KvCache) {
        let reads = self.block_table[self.blocks.clone()]
            .iter()
            .map(|&block| kv.pin(layer, block))
            .collect();
        let event = PrefillEvent::LayerReady {
            layer,
            blocks: self.blocks.clone(),
            reads,
        };
        send(self.events, event);
    }
}

impl OpenSequence {
    pub(super) fn new(state: &PortableState, outlet: Outlet, permit: OpenPermit) -> OpenSequence {
        OpenSequence {
            outlet,
            reply: None,
            sampling: state.request.sampling.clone(),
            n_prompt: state.request.prompt_ids.len(),
            next_index: state.choices[0].output.len() as u32,
            prompt_logprobs: Vec::new(),
            has_started: false,
            _permit: permit,
        }
    }

    /// Whether nobody listens any more.
    pub(super) fn is_abandoned(&self) -> bool {
        match &self.outlet {
            Outlet::Generation(events) => events.is_closed(),
            Outlet::Prefill { events, .. } => events.is_closed(),
        }
    }

    pub(super) fn tell_started(&mut self, n_cached_tokens: usize) {
        if std::mem::replace(&mut self.has_started, true) {
            return;
        }
        match &self.outlet {
            Outlet::Generation(events) => send(events, EngineEvent::PrefillStarted { n_cached_tokens }),
            Outlet::Prefill { events, .. } => send(events, PrefillEvent::Started { n_cached_tokens }),
        }
    }

    /// Told only while there is room beyond what must still be told: preemptions have no bound of their own.
    pub(super) fn tell_preempted(&mut self) {
        self.prompt_logprobs.clear();
        if let Outlet::Generation(events) = &self.outlet {
            let n_tokens_left = (self.sampling.max_tokens - self.next_index) as usize;
            if events.capacity() > n_tokens_left + 3 {
                send(events, EngineEvent::Preempted);
            }
        }
    }

    pub(super) fn tell_token(&mut self, token: Token, finish: Option<Finish>) {
        self.next_index = token.index + 1;
        let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
        let has_prompt_logprobs = token.index == 0 && self.sampling.prompt_logprobs.is_some();
        match &self.outlet {
            Outlet::Generation(events) => {
                if has_prompt_logprobs {
                    send(events, EngineEvent::PromptLogprobs(prompt_logprobs));
                }
                send(events, EngineEvent::Token(token));
                if let Some(finish) = finish {
                    send(events, EngineEvent::Finished(finish));
                }
            }
            Outlet::Prefill { events, .. } => {
                if has_prompt_logprobs {
                    send(events, PrefillEvent::PromptLogprobs(prompt_logprobs));
                }
                send(events, PrefillEvent::FirstToken(token, finish));
            }
        }
    }

    /// The token handed over with a joining sequence was its last.
    pub(super) fn tell_finished(&mut self, finish: Finish) {
        if let Outlet::Generation(events) = &self.outlet {
            send(events, EngineEvent::Finished(finish));
        }
    }

    pub(super) fn tell_failed(&mut self, failure: Failure) {
        match (self.reply.take(), &self.outlet) {
            // Whoever asked has gone if this fails.
            (Some(reply), _) => drop(reply.send(Err(failure))),
            (None, Outlet::Generation(events)) => send(events, EngineEvent::Failed(failure)),
            // After the first token this is a no-op for the listener: it has heard its terminal event.
            (None, Outlet::Prefill { events, .. }) => send(events, PrefillEvent::Failed(failure)),
        }
    }
}

fn send<E>(events: &mpsc::Sender<Timed<E>>, event: E) {
    match events.try_send(Timed {
        at: Instant::now(),
        event,
    }) {
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
        Err(mpsc::error::TrySendError::Full(_)) => panic!("a sequence said more than it can"),
    }
}
