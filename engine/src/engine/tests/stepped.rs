//! An engine that computes only the steps that a test lets through, and a request caught in the act on it.

use std::future::Future;

use baton_scheduler::batch::BatchConfig;
use futures::FutureExt as _;

use super::choices::all_alone;
use super::*;

/// Hears the events of a generation until every choice has at least `n_tokens`, or has ended.
pub(super) async fn hear(generation: &mut Generation, known: &mut [ChoiceState], n_tokens: usize) {
    while known
        .iter()
        .any(|choice| choice.finish.is_none() && choice.output.len() < n_tokens)
    {
        let Some(timed) = generation.next().await else { return };
        take(timed.event, known);
    }
}

pub(super) fn take(event: EngineEvent, known: &mut [ChoiceState]) {
    match event {
        EngineEvent::Token { choice, token } => known[choice as usize].output.push(token),
        EngineEvent::ChoiceFinished { choice, finish } => known[choice as usize].finish = Some(finish),
        EngineEvent::Failed(failure) => panic!("{failure}"),
        _ => {}
    }
}

/// All that has been told so far.
pub(super) fn hear_told(generation: &mut Generation, known: &mut [ChoiceState]) {
    while let Some(Some(timed)) = generation.next().now_or_never() {
        take(timed.event, known);
    }
}

/// An engine whose steps wait for permits, so that a test knows where a request stands. Dropping the permits lets them go.
pub(super) struct Stepped {
    pub(super) permits: channel::Sender<()>,
    pub(super) engine: EngineHandle,
}

impl Stepped {
    pub(super) fn new(n_blocks: usize) -> Stepped {
        Stepped::limited_by(batch_config(n_blocks))
    }

    pub(super) fn limited_by(config: BatchConfig) -> Stepped {
        let (permits, gate) = channel::bounded(0);
        let model = model(config.n_blocks).gated(gate);
        let engine = start(model, EngineConfig::new(config)).unwrap();
        let engine = engine.with_constraints(constraints::compiler());
        Stepped { permits, engine }
    }

    /// Lets so many steps through; there must be work for them.
    pub(super) fn steps(&self, n_steps: usize) {
        (0..n_steps).for_each(|_| self.permits.send(()).unwrap());
    }

    /// Lets as many steps through as it takes until something has happened.
    pub(super) async fn until<T>(&self, event: impl Future<Output = T>) -> T {
        self.within(usize::MAX, event).await
    }

    /// Asks the engine something. If it waits in a step, that one is let through, and no other.
    pub(super) async fn ask<T>(&self, question: impl Future<Output = T>) -> T {
        self.within(1, question).await
    }

    /// Lets at most so many steps through until something has happened.
    async fn within<T>(&self, mut n_steps: usize, event: impl Future<Output = T>) -> T {
        let mut event = std::pin::pin!(event);
        loop {
            if let std::task::Poll::Ready(outcome) = futures::poll!(event.as_mut()) {
                return outcome;
            }
            if n_steps > 0 && self.permits.try_send(()).is_ok() {
                n_steps -= 1;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Lets steps through until the load says so many paused choices.
    pub(super) async fn until_paused(&self, n_paused: usize) {
        let is_so = async {
            while self.engine.load().batch.n_paused != n_paused {
                let health = self.engine.health();
                assert!(!matches!(health, Health::Dead(_)), "{health:?}");
                tokio::task::yield_now().await;
            }
        };
        self.until(is_so).await;
    }
}

/// A request of which every choice has a token.
pub(super) struct Caught {
    pub(super) source: Stepped,
    pub(super) state: PortableState,
    pub(super) generation: Generation,
    /// What has been told.
    pub(super) known: Vec<ChoiceState>,
}

impl Caught {
    pub(super) async fn on(source: Stepped, state: PortableState) -> Caught {
        let mut generation = source.engine.generate(state.clone()).unwrap();
        let mut known = vec![ChoiceState::default(); state.request.sampling.n as usize];
        source.steps(1);
        hear(&mut generation, &mut known, 1).await;
        Caught {
            source,
            state,
            generation,
            known,
        }
    }

    /// With two choices that only end by their length.
    pub(super) async fn two_choices() -> Caught {
        let mut state = choices::choices(&prompt(2, 9), 40, 11, 2);
        state.request.sampling.stop_token_ids.clear();
        Caught::on(Stepped::new(64), state).await
    }

    /// Nobody steps in any more: it ends as if nobody had, and nothing of it is left but what `held` keeps.
    pub(super) async fn ends_as_alone<T>(mut self, held: T) {
        let Stepped { permits, engine } = self.source;
        drop(permits);
        while let Some(timed) = self.generation.next().await {
            take(timed.event, &mut self.known);
        }
        assert_eq!(self.known, all_alone(&engine, &self.state));
        drop(held);
        settle(&engine).await;
    }
}
