//! What the step loop keeps of a request besides its scheduling: how it samples, what it has generated, and whom it tells.
//! Telling never waits: a channel has room for all that its request can say.

use std::ops::Range;
use std::sync::Weak;
use std::time::{Duration, Instant};

use baton_kernels::KvCache;
use baton_scheduler::batch::BatchConfig;
use baton_scheduler::ids::RequestId;
use baton_scheduler::layer_groups::{LayerGroups, LayerPlace};
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, SamplingParams, Token, TokenLogprobs};
use tokio::sync::{mpsc, oneshot};

use super::command::{Granted, Purpose};
use super::events::{EngineEvent, Timed};
use super::handoff::PrefillEvent;
use super::hidden_sum::HiddenSum;
use super::load::OpenPermit;
use super::prepared::Prepared;
use crate::constraint::GroupConstraint;

/// Whom a request tells.
pub(super) enum Outlet {
    Generation(mpsc::Sender<Timed<EngineEvent>>),
    Prefill {
        events: mpsc::Sender<Timed<PrefillEvent>>,
        /// Of each layer group, leading blocks made ready, or not wanted.
        n_ready: Vec<usize>,
    },
    Embedding {
        /// Until it is given.
        answer: Option<oneshot::Sender<Result<Vec<f32>, Failure>>>,
        sum: HiddenSum,
    },
}

/// Who waits for a reservation that has not been answered.
pub(super) struct Waiter {
    pub(super) reply: oneshot::Sender<Result<Granted, Failure>>,
    pub(super) purpose: Purpose,
}

/// How far a request may go, because somebody has made room for so much elsewhere, or is about to.
pub(super) struct Hold {
    /// Dead once the holder has gone.
    pub(super) holder: Weak<()>,
    /// Tokens of each choice at which it stands still.
    pub(super) n_most_tokens: Vec<usize>,
    /// Since when it stands still for this.
    pub(super) stopped_at: Option<Instant>,
}

/// How long a request stands still for a holder: then whoever waits for its tokens comes first, and the move may fail.
const HOLD_PATIENCE: Duration = Duration::from_secs(2);

impl Hold {
    pub(super) fn new(holder: Weak<()>, n_most_tokens: Vec<usize>) -> Hold {
        Hold {
            holder,
            n_most_tokens,
            stopped_at: None,
        }
    }

    /// Whether the holder has gone, or has taken too long.
    pub(super) fn is_over(&self) -> bool {
        self.holder.strong_count() == 0 || self.stopped_at.is_some_and(|at| at.elapsed() >= HOLD_PATIENCE)
    }

    /// Whether one of the choices that go on may go no further.
    pub(super) fn is_reached(&self, choices: &[ChoiceState]) -> bool {
        let mut choices = choices.iter().zip(&self.n_most_tokens);
        choices.any(|(choice, &n_most)| choice.finish.is_none() && choice.output.len() >= n_most)
    }
}

/// Whether a request still has something to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    More,
    All,
}

pub(super) struct OpenGroup {
    pub(super) request: RequestId,
    pub(super) outlet: Outlet,
    pub(super) waiter: Option<Waiter>,
    pub(super) sampling: SamplingParams,
    /// Compiled; absent where the request has none.
    pub(super) constraint: Option<Box<GroupConstraint>>,
    pub(super) n_prompt: usize,
    /// All that was generated, here and before.
    pub(super) choices: Vec<ChoiceState>,
    /// Those computed so far, until they are told.
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    /// Whether it began with its prompt, so that the prompt's log-probabilities are its to tell.
    is_fresh: bool,
    /// Whoever moves it; dead once that has gone.
    pub(super) mover: Option<Weak<()>>,
    pub(super) hold: Option<Hold>,
    has_started: bool,
    /// The device gave one of its rows back: the host samples all that follow.
    pub(super) is_left_to_host: bool,
    _permit: OpenPermit,
}

/// KV blocks that a step completes for a request that will be handed over.
pub(super) struct ReadyBlocks<'a> {
    events: &'a mpsc::Sender<Timed<PrefillEvent>>,
    layer_groups: &'a LayerGroups,
    /// Of each layer group.
    blocks: Vec<Range<usize>>,
    block_tables: &'a [Vec<u32>],
}

impl<'a> ReadyBlocks<'a> {
    /// The blocks before `end` that a prefill has not been told of; `None` of a request that nobody fetches, or when there are
    /// none.
    pub(super) fn until(
        end: usize,
        outlet: &'a Outlet,
        layer_groups: &'a LayerGroups,
        block_tables: &'a [Vec<u32>],
    ) -> Option<ReadyBlocks<'a>> {
        let Outlet::Prefill { events, n_ready } = outlet else {
            return None;
        };
        let blocks: Vec<Range<usize>> = n_ready.iter().map(|&n_ready| n_ready..end.max(n_ready)).collect();
        let has_any = blocks.iter().any(|blocks| !blocks.is_empty());
        has_any.then_some(ReadyBlocks {
            events,
            layer_groups,
            blocks,
            block_tables,
        })
    }

    /// Pins the blocks in one layer and tells of them.
    pub(super) fn tell(&self, layer: usize, kv: &mut KvCache) {
        let LayerPlace { layer_group, slot } = self.layer_groups.place(layer);
        let blocks = self.blocks[layer_group].clone();
        if blocks.is_empty() {
            return;
        }
        let reads = self.block_tables[layer_group][blocks.clone()].iter();
        let reads = reads.map(|&block| kv.pin(slot, block)).collect();
        send(self.events, PrefillEvent::LayerReady { layer, blocks, reads });
    }
}

impl Outlet {
    /// A prefill's blocks before `end` are ready in every layer. Returns the blocks of layers that are so for the first time.
    pub(super) fn note_ready(&mut self, end: usize, layer_groups: &LayerGroups) -> u64 {
        let Outlet::Prefill { n_ready, .. } = self else {
            return 0;
        };
        let newly = layer_groups.places().iter();
        let newly = newly
            .map(|place| end.saturating_sub(n_ready[place.layer_group]) as u64)
            .sum();
        n_ready.iter_mut().for_each(|n_ready| *n_ready = end.max(*n_ready));
        newly
    }
}

impl OpenGroup {
    pub(super) fn new(prepared: Prepared, outlet: Outlet, permit: OpenPermit) -> (PortableState, OpenGroup) {
        let Prepared { state, constraint } = prepared;
        let open = OpenGroup {
            request: state.request.id,
            outlet,
            waiter: None,
            sampling: state.request.sampling.clone(),
            constraint,
            n_prompt: state.request.prompt_ids.len(),
            choices: state.choices.clone(),
            prompt_logprobs: Vec::new(),
            is_fresh: state.is_fresh(),
            mover: None,
            hold: None,
            has_started: false,
            is_left_to_host: false,
            _permit: permit,
        };
        (state, open)
    }

    /// Whether nobody listens any more.
    pub(super) fn is_abandoned(&self) -> bool {
        match &self.outlet {
            Outlet::Generation(events) => events.is_closed(),
            Outlet::Prefill { events, .. } => events.is_closed(),
            Outlet::Embedding { answer, .. } => answer.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    /// Whether whoever moves it is still there.
    pub(super) fn is_moving(&self) -> bool {
        self.mover.as_ref().is_some_and(|mover| mover.strong_count() > 0)
    }

    pub(super) fn tell_started(&mut self, n_cached_tokens: usize) {
        if std::mem::replace(&mut self.has_started, true) {
            return;
        }
        match &self.outlet {
            Outlet::Generation(events) => send(events, EngineEvent::PrefillStarted { n_cached_tokens }),
            Outlet::Prefill { events, .. } => send(events, PrefillEvent::Started { n_cached_tokens }),
            Outlet::Embedding { .. } => {}
        }
    }

    /// Told only while there is room beyond what must still be told: preemptions have no bound of their own.
    pub(super) fn tell_preempted(&mut self) {
        self.prompt_logprobs.clear();
        if let Outlet::Embedding { sum, .. } = &mut self.outlet {
            sum.restart();
        }
        if let Outlet::Generation(events) = &self.outlet
            && events.capacity() > n_events_left(&self.choices, self.sampling.max_tokens) + 3
        {
            send(events, EngineEvent::Preempted);
        }
    }

    /// Its prompt was reported where it was computed.
    pub(super) fn note_arrival(&mut self) {
        self.is_fresh = false;
    }

    /// Of a fresh request, once, before its first tokens.
    fn take_prompt_logprobs(&mut self) -> Option<Vec<TokenLogprobs>> {
        let is_due = self.is_fresh && self.sampling.prompt_logprobs.is_some();
        self.is_fresh = false;
        is_due.then(|| std::mem::take(&mut self.prompt_logprobs))
    }

    /// The next token of a choice that is generated here.
    pub(super) fn tell_token(&mut self, choice: u32, token: Token, finish: Option<Finish>) -> Told {
        let prompt_logprobs = self.take_prompt_logprobs();
        let Outlet::Generation(events) = &self.outlet else {
            unreachable!("a handed over request tells its first tokens together");
        };
        if let Some(prompt_logprobs) = prompt_logprobs {
            send(events, EngineEvent::PromptLogprobs(prompt_logprobs));
        }
        self.choices[choice as usize].output.push(token.clone());
        send(events, EngineEvent::Token { choice, token });
        match finish {
            Some(finish) => self.tell_finished(choice, finish),
            None => Told::More,
        }
    }

    /// The first tokens of a request that is handed over.
    pub(super) fn tell_first_tokens(&mut self, first: Vec<(Token, Option<Finish>)>) {
        let prompt_logprobs = self.take_prompt_logprobs();
        let Outlet::Prefill { events, .. } = &self.outlet else {
            unreachable!("only a handed over request has first tokens alone");
        };
        if let Some(prompt_logprobs) = prompt_logprobs {
            send(events, PrefillEvent::PromptLogprobs(prompt_logprobs));
        }
        send(events, PrefillEvent::FirstTokens(first));
    }

    /// A choice whose last token has been told, or has been handed over, has ended.
    pub(super) fn tell_finished(&mut self, choice: u32, finish: Finish) -> Told {
        self.choices[choice as usize].finish = Some(finish);
        let Outlet::Generation(events) = &self.outlet else {
            unreachable!("a handed over request ends elsewhere");
        };
        send(events, EngineEvent::ChoiceFinished { choice, finish });
        if self.choices.iter().any(|choice| choice.finish.is_none()) {
            return Told::More;
        }
        send(events, EngineEvent::Finished(finish));
        Told::All
    }

    /// Tells the ends that the state of a request did not know but its tokens show.
    pub(super) fn tell_ends(&mut self, config: &BatchConfig, state: &PortableState) -> Told {
        for choice in 0..state.choices.len() {
            if let (None, Some(finish)) = (self.choices[choice].finish, config.finish_of(state, choice))
                && self.tell_finished(choice as u32, finish) == Told::All
            {
                return Told::All;
            }
        }
        let finish = self.choices.last().and_then(|choice| choice.finish);
        match (finish, &self.outlet) {
            (Some(finish), Outlet::Generation(events)) if self.choices.iter().all(|choice| choice.finish.is_some()) => {
                send(events, EngineEvent::Finished(finish));
                Told::All
            }
            _ => Told::More,
        }
    }

    /// Refuses first tokens that do not continue the request, one for each choice.
    pub(super) fn check_first(&self, first: &[Token], n_vocab: usize) -> Result<(), String> {
        if first.len() != self.choices.len() {
            let n_choices = self.choices.len();
            return Err(format!("{} first tokens, expected {n_choices}", first.len()));
        }
        for (Token { index, id, .. }, choice) in first.iter().zip(&self.choices) {
            let expected = choice.output.len();
            if *index as usize != expected || *id as usize >= n_vocab {
                return Err(format!(
                    "first token {id} has index {index}, expected a known token with index {expected}"
                ));
            }
        }
        Ok(())
    }

    /// Refuses outputs that are not whole.
    pub(super) fn check_outputs(&self, outputs: &[ChoiceState], n_vocab: usize) -> Result<(), String> {
        if outputs.len() != self.choices.len() {
            return Err(format!(
                "{} choices have come, expected {}",
                outputs.len(),
                self.choices.len()
            ));
        }
        for (choice, ChoiceState { output, .. }) in outputs.iter().enumerate() {
            let is_wrong = |(i, token): &(usize, &Token)| token.index as usize != *i || token.id as usize >= n_vocab;
            if let Some((i, Token { index, id, .. })) = output.iter().enumerate().find(is_wrong) {
                return Err(format!(
                    "token {id} of choice {choice} has index {index}, expected a known token with index {i}"
                ));
            }
        }
        Ok(())
    }

    pub(super) fn tell_failed(&mut self, failure: Failure) {
        match (self.waiter.take(), &mut self.outlet) {
            // Whoever asked has gone if this fails.
            (Some(waiter), _) => drop(waiter.reply.send(Err(failure))),
            (None, Outlet::Generation(events)) => send(events, EngineEvent::Failed(failure)),
            // After the first tokens this is a no-op for the listener: it has heard its terminal event.
            (None, Outlet::Prefill { events, .. }) => send(events, PrefillEvent::Failed(failure)),
            (None, Outlet::Embedding { answer, .. }) => {
                if let Some(answer) = answer.take() {
                    // Whoever asked may have gone.
                    let _ = answer.send(Err(failure));
                }
            }
        }
    }

    /// Every token of a request that is embedded has been computed.
    pub(super) fn tell_embedding(mut self) {
        let Outlet::Embedding { answer, sum } = &mut self.outlet else {
            unreachable!("only a request that is embedded has hidden states");
        };
        if let Some(answer) = answer.take() {
            // Whoever asked may have gone.
            let _ = answer.send(Ok(sum.mean()));
        }
    }
}

/// Tokens and ends that the choices may still tell.
pub(super) fn n_events_left(choices: &[ChoiceState], max_tokens: u32) -> usize {
    choices
        .iter()
        .filter(|choice| choice.finish.is_none())
        .map(|choice| (max_tokens as usize).saturating_sub(choice.output.len()) + 1)
        .sum()
}

fn send<E>(events: &mpsc::Sender<Timed<E>>, event: E) {
    match events.try_send(Timed {
        at: Instant::now(),
        event,
    }) {
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
        Err(mpsc::error::TrySendError::Full(_)) => panic!("a request said more than it can"),
    }
}
