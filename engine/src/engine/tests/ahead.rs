//! Steps launched while another is in flight: that they are, by whom they are held up, and what becomes of those that were
//! launched for nothing.

use super::super::AsyncScheduling;
use super::*;

/// Steps that were launched ahead while the requests ran together.
async fn n_steps_ahead(engine: &EngineHandle, states: &[PortableState]) -> u64 {
    let before = engine.load().engine.n_steps_ahead;
    let generations: Vec<Generation> = states
        .iter()
        .map(|state| engine.generate(state.clone()).unwrap())
        .collect();
    for (generation, state) in generations.into_iter().zip(states) {
        assert_as_alone(engine, state, &listen(generation).await);
    }
    settle(engine).await;
    engine.load().engine.n_steps_ahead - before
}

fn endless(state: PortableState) -> PortableState {
    let mut state = state;
    state.request.sampling.stop_token_ids.clear();
    state
}

#[tokio::test]
async fn only_a_model_that_can_and_may_runs_ahead() {
    let state = [endless(warm(&prompt(1, 9), 20, 7))];
    let n_ahead = n_steps_ahead(&engine(64), &state).await;
    match pace() {
        Pace::InTurn => assert_eq!(n_ahead, 0),
        Pace::Ahead => assert!(n_ahead >= 10, "{n_ahead}"),
    }
    let config = EngineConfig {
        async_scheduling: AsyncScheduling::Off,
        ..EngineConfig::new(batch_config(64))
    };
    let engine = start(model(64), config).unwrap();
    assert_eq!(n_steps_ahead(&engine, &state).await, 0);
}

/// A penalty needs the token before, so its request is in every other step; the rest goes on.
#[tokio::test]
async fn what_the_host_samples_waits_alone() {
    let engine = engine(64);
    let mut penalised = endless(warm(&prompt(2, 9), 10, 8));
    penalised.request.sampling.presence_penalty = 0.5;
    let mut limited = endless(warm(&prompt(4, 9), 10, 9));
    limited.request.sampling.top_k = 5;
    let states = [penalised, limited, endless(warm(&prompt(3, 9), 30, 9))];
    let n_ahead = n_steps_ahead(&engine, &states).await;
    assert_eq!(n_ahead > 10, pace() == Pace::Ahead, "{n_ahead}");
}

/// Many that end by a stop id while their next step is in flight, over blocks that the next ones need at once.
#[tokio::test]
async fn ends_that_nobody_foresaw_waste_a_step_and_nothing_else() {
    let engine = engine(12);
    for round in 0..8 {
        let states: Vec<PortableState> = (0..6)
            .map(|i| warm(&prompt(i, 7), 30, u64::from(round * 10 + i)))
            .collect();
        n_steps_ahead(&engine, &states).await;
    }
    let (counters, scheduler) = (engine.load().engine, engine.load().scheduler);
    let n_wasted = counters.n_step_tokens - scheduler.n_prefill_tokens - scheduler.n_decode_tokens;
    assert_eq!(n_wasted > 0, pace() == Pace::Ahead, "{n_wasted}");
}
