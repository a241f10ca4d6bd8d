//! The engine over a model whose tokens depend on every byte of KV: alone, handed over, preempted, cancelled, broken.

mod ahead;
mod block_watch;
mod choices;
mod constraints;
mod embeddings;
mod handoff;
mod holds;
mod moves;
mod stepped;
mod stress;

use std::sync::Arc;

use baton_scheduler::batch::BatchConfig;
use baton_scheduler::ids::{Epoch, Fingerprint, Nanos, RequestId, TokenId};
use baton_scheduler::prefix_cache::PrefixEvent;
use baton_scheduler::request::{
    ChoiceState, Failure, Finish, PortableState, Request, SamplingParams, Token, TokenLogprobs,
};
use crossbeam::channel;

use super::hash_model::{self, BROKEN, HashModel, PANIC, POISON, Pace};
use super::{EngineConfig, EngineEvent, EngineHandle, Generation, Health, start};

const BLOCK_SIZE: usize = 4;
const STOP: TokenId = 3;

fn batch_config(n_blocks: usize) -> BatchConfig {
    BatchConfig {
        max_num_seqs: 8,
        max_batch_tokens: 24,
        max_prompt_logprob_rows: 5,
        ..BatchConfig::new(n_blocks, BLOCK_SIZE, Fingerprint([5; 32]))
    }
}

/// Both mounts of this module run all of it: in the one, steps are launched ahead.
fn pace() -> Pace {
    match module_path!().ends_with("ahead") {
        true => Pace::Ahead,
        false => Pace::InTurn,
    }
}

fn model(n_blocks: usize) -> HashModel {
    HashModel::new(n_blocks, BLOCK_SIZE).at(pace())
}

fn engine_of(model: HashModel, n_blocks: usize) -> EngineHandle {
    start(model, EngineConfig::new(batch_config(n_blocks))).unwrap()
}

fn engine(n_blocks: usize) -> EngineHandle {
    engine_of(model(n_blocks), n_blocks)
}

fn request(prompt: &[TokenId], sampling: SamplingParams) -> PortableState {
    let request = Request {
        id: RequestId(9),
        prompt_ids: Arc::from(prompt),
        sampling,
        cache_salt: 0,
    };
    PortableState::fresh(request, Epoch(1))
}

fn greedy(prompt: &[TokenId], max_tokens: u32) -> PortableState {
    request(
        prompt,
        SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
    )
}

/// Warm, stopping, with log-probabilities.
fn warm(prompt: &[TokenId], max_tokens: u32, seed: u64) -> PortableState {
    let sampling = SamplingParams {
        max_tokens,
        temperature: 0.9,
        top_p: 0.95,
        seed,
        stop_token_ids: vec![STOP],
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    request(prompt, sampling)
}

fn prompt(seed: u32, n: usize) -> Vec<TokenId> {
    (0..n as u32).map(|i| (seed * 7 + i * 11 + i * i) % 40).collect()
}

/// What a generation said, by kind.
#[derive(Debug, Default, PartialEq)]
struct Said {
    /// The first choice's.
    tokens: Vec<Token>,
    /// Those of all choices, the first included.
    choices: Vec<ChoiceState>,
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    n_cached_tokens: Option<usize>,
    n_preemptions: usize,
    end: Option<Result<Finish, Failure>>,
}

async fn listen(mut generation: Generation) -> Said {
    let mut said = Said::default();
    while let Some(timed) = generation.next().await {
        assert!(said.end.is_none(), "something follows the end");
        match timed.event {
            EngineEvent::PrefillStarted { n_cached_tokens } => said.n_cached_tokens = Some(n_cached_tokens),
            EngineEvent::PromptLogprobs(logprobs) => {
                assert!(
                    said.choices.is_empty(),
                    "the prompt's log-probabilities come before the first token"
                );
                said.prompt_logprobs = Some(logprobs);
            }
            EngineEvent::Token { choice, token } => {
                let choice = said.choice(choice);
                assert_eq!(choice.finish, None, "a token follows the end of its choice");
                choice.output.push(token);
            }
            EngineEvent::ChoiceFinished { choice, finish } => {
                let before = said.choice(choice).finish.replace(finish);
                assert_eq!(before, None, "a choice ends once");
            }
            EngineEvent::Preempted => said.n_preemptions += 1,
            EngineEvent::Finished(finish) => {
                let mut choices = said.choices.iter();
                assert!(choices.len() == 0 || choices.any(|choice| choice.finish == Some(finish)));
                said.end = Some(Ok(finish));
            }
            EngineEvent::Failed(failure) => said.end = Some(Err(failure)),
        }
    }
    said.tokens = said
        .choices
        .first()
        .map(|choice| choice.output.clone())
        .unwrap_or_default();
    said
}

impl Said {
    fn choice(&mut self, choice: u32) -> &mut ChoiceState {
        let n_choices = self.choices.len().max(choice as usize + 1);
        self.choices.resize(n_choices, ChoiceState::default());
        &mut self.choices[choice as usize]
    }
}

/// Rounds of the step loop until nobody holds a block.
async fn settle(engine: &EngineHandle) {
    for _ in 0..100_000 {
        engine.take_prefix_events().await.unwrap();
        if engine.load().batch.ledger.is_whole() {
            return;
        }
    }
    panic!("blocks are lost: {:?}", engine.load());
}

fn assert_as_alone(engine: &EngineHandle, state: &PortableState, said: &Said) {
    let (tokens, finish) = hash_model::alone(state, engine.batch_config().max_model_len);
    assert_eq!(said.tokens, tokens[state.choices[0].output.len()..]);
    assert_eq!(said.end, Some(Ok(finish)));
}

#[tokio::test]
async fn a_request_gives_its_tokens_and_one_end() {
    let engine = engine(64);
    for (state, n_cached) in [(warm(&prompt(1, 30), 20, 7), 0), (warm(&prompt(1, 30), 20, 8), 28)] {
        let said = listen(engine.generate(state.clone()).unwrap()).await;
        assert_as_alone(&engine, &state, &said);
        assert_eq!(said.n_cached_tokens, Some(n_cached));
    }
    settle(&engine).await;
    let counters = engine.load().engine;
    assert_eq!(
        (counters.n_finished, counters.n_failed, counters.n_cancelled),
        (2, 0, 0)
    );
    engine.shutdown().await;
}

#[tokio::test]
async fn prompt_logprobs_come_first_and_whole() {
    let engine = engine(64);
    let tokens = prompt(1, 23);
    let mut state = greedy(&tokens, 3);
    listen(engine.generate(state.clone()).unwrap()).await;
    state.request.sampling.prompt_logprobs = Some(2);
    let said = listen(engine.generate(state.clone()).unwrap()).await;
    assert_as_alone(&engine, &state, &said);
    assert_eq!(
        said.prompt_logprobs,
        Some(hash_model::prompt_logprobs_alone(&tokens, 2))
    );
    assert_eq!(said.n_cached_tokens, Some(0));
}

#[tokio::test]
async fn a_replay_continues_with_the_right_index() {
    let engine = engine(64);
    let fresh = warm(&prompt(2, 9), 24, 11);
    let (tokens, _) = hash_model::alone(&fresh, engine.batch_config().max_model_len);
    for n_known in 1..tokens.len() {
        let choice = ChoiceState {
            output: tokens[..n_known].to_vec(),
            finish: None,
        };
        let state = PortableState {
            choices: vec![choice],
            ..fresh.clone()
        };
        let said = listen(engine.generate(state.clone()).unwrap()).await;
        assert_as_alone(&engine, &state, &said);
    }
}

#[tokio::test]
async fn preemption_changes_no_token() {
    let engine = engine(10);
    let states: Vec<PortableState> = (0..4).map(|i| warm(&prompt(i, 7), 26, u64::from(i))).collect();
    let states: Vec<PortableState> = states
        .into_iter()
        .map(|mut state| {
            state.request.sampling.stop_token_ids.clear();
            state
        })
        .collect();
    let generations: Vec<Generation> = states
        .iter()
        .map(|state| engine.generate(state.clone()).unwrap())
        .collect();
    let mut n_preemptions = 0;
    for (generation, state) in generations.into_iter().zip(&states) {
        let said = listen(generation).await;
        assert_as_alone(&engine, state, &said);
        n_preemptions += said.n_preemptions;
    }
    assert!(n_preemptions > 0 && engine.load().scheduler.n_preemptions > 0);
    settle(&engine).await;
}

#[tokio::test]
async fn a_dropped_generation_is_in_no_step_launched_after() {
    let (permits, gate) = channel::bounded(0);
    let model = model(64).gated(gate);
    let seen = Arc::clone(&model.seen);
    let engine = engine_of(model, 64);
    let mut generation = engine.generate(greedy(&prompt(1, 5), 1000)).unwrap();
    let permit = || permits.send(()).unwrap();
    permit();
    generation.next().await.unwrap();
    assert!(matches!(
        generation.next().await.unwrap().event,
        EngineEvent::Token { .. }
    ));
    // The loop is in its second step, or on its way to it, or will notice before.
    drop(generation);
    drop(permits);
    settle(&engine).await;
    let n_steps = seen.lock().len();
    let n_most = match pace() {
        Pace::InTurn => 2,
        // One more was launched already.
        Pace::Ahead => 3,
    };
    assert!(n_steps <= n_most, "{n_steps} steps");
    assert_eq!(engine.load().engine.n_cancelled, 1);
    engine.shutdown().await;
    assert_eq!(seen.lock().len(), n_steps);
}

#[tokio::test]
async fn a_step_that_fails_ends_its_sequences_and_no_other() {
    let engine = engine(64);
    for token in [BROKEN, POISON] {
        let said = listen(engine.generate(greedy(&[1, token], 3)).unwrap()).await;
        assert!(matches!(said.end, Some(Err(Failure::Internal(_)))), "{said:?}");
    }
    let state = greedy(&prompt(1, 5), 3);
    assert_as_alone(&engine, &state, &listen(engine.generate(state.clone()).unwrap()).await);
    settle(&engine).await;
    assert_eq!(engine.load().engine.n_failed, 2);
}

#[tokio::test]
async fn a_panic_ends_every_sequence_and_the_engine() {
    let (permits, gate) = channel::bounded(0);
    let engine = engine_of(model(64).gated(gate), 64);
    let reservation = engine.reserve(greedy(&prompt(7, 5), 9)).await.unwrap();
    let others: Vec<Generation> = (0..3)
        .map(|i| engine.generate(greedy(&prompt(i, 5), 9)).unwrap())
        .collect();
    let culprit = engine.generate(greedy(&[1, PANIC], 9)).unwrap();
    drop(permits);
    for generation in others.into_iter().chain([culprit]) {
        let said = listen(generation).await;
        assert!(matches!(&said.end, Some(Err(Failure::Internal(_)))), "{said:?}");
    }
    // The queue closes a moment after the last words.
    engine.shutdown().await;
    assert!(matches!(engine.health(), Health::Dead(words) if words.contains("asked to panic")));
    assert!(matches!(engine.generate(greedy(&[1], 1)), Err(Failure::Internal(_))));
    let first = Token {
        index: 0,
        id: 1,
        logprobs: None,
    };
    assert!(matches!(
        reservation.join(vec![first], super::Numerics::Same),
        Err(Failure::Internal(_))
    ));
}

#[tokio::test]
async fn shutdown_ends_open_sequences_as_lost() {
    let (permits, gate) = channel::bounded(0);
    let engine = engine_of(model(64).gated(gate), 64);
    let generation = engine.generate(greedy(&prompt(1, 5), 1000)).unwrap();
    permits.send(()).unwrap();
    let stopping = engine.clone();
    let shutdown = tokio::spawn(async move { stopping.shutdown().await });
    tokio::task::yield_now().await;
    drop(permits);
    let said = listen(generation).await;
    assert!(matches!(said.end, Some(Err(Failure::InstanceLost(_)))), "{said:?}");
    shutdown.await.unwrap();
    assert!(matches!(engine.health(), Health::Dead(_)));
}

#[tokio::test]
async fn what_cannot_run_is_refused_at_once() {
    let engine = engine(8);
    let refusal = |state| engine.generate(state).map(|_| ()).unwrap_err();
    let invalid = |message: &str| Failure::Invalid(message.to_owned());
    assert_eq!(
        refusal(greedy(&[1, 48], 1)),
        invalid("token id 48, expected less than 48")
    );
    assert_eq!(
        refusal(greedy(&[1; 32], 1)),
        invalid("the prompt has 32 tokens, expected at most 31")
    );
    let first_block = engine.prefill(greedy(&[1; 5], 1), &[3]).map(|_| ()).unwrap_err();
    assert_eq!(first_block, invalid("first_block is 3, expected at most 2"));
    let groups = engine.prefill(greedy(&[1; 5], 1), &[0, 0]).map(|_| ()).unwrap_err();
    assert_eq!(groups, invalid("first_blocks has 2 entries, expected 1"));
    let mut config = EngineConfig::new(batch_config(9));
    let message = |config: &EngineConfig| start(model(8), config.clone()).map(|_| ()).unwrap_err().to_string();
    assert_eq!(message(&config), "n_blocks is 9, expected 8 as in the KV cache");
    config.batch = BatchConfig {
        max_num_seqs: 0,
        ..batch_config(8)
    };
    assert_eq!(message(&config), "max_num_seqs is 0, expected at least 1");
}

#[tokio::test]
async fn a_full_house_says_busy() {
    let (permits, gate) = channel::bounded::<()>(0);
    let batch = BatchConfig {
        max_num_seqs: 2,
        max_waiting: 1,
        ..batch_config(64)
    };
    let model = model(64).gated(gate);
    let engine = start(model, EngineConfig::new(batch)).unwrap();
    let open: Vec<Generation> = (0..3)
        .map(|i| engine.generate(greedy(&prompt(i, 5), 2)).unwrap())
        .collect();
    let refusal = engine.generate(greedy(&prompt(1, 5), 2)).map(|_| ());
    assert_eq!(refusal, Err(Failure::Busy("3 sequences are open".to_owned())));
    drop(permits);
    for generation in open {
        assert!(matches!(
            listen(generation).await.end,
            Some(Ok(_) | Err(Failure::Busy(_)))
        ));
    }
    settle(&engine).await;
    assert!(engine.generate(greedy(&prompt(1, 5), 2)).is_ok());
}

#[tokio::test]
async fn pending_work_without_progress_is_stuck() {
    let (permits, gate) = channel::bounded(0);
    let engine = engine_of(model(64).gated(gate), 64);
    let far = Nanos::from_secs(1_000_000);
    engine.take_prefix_events().await.unwrap();
    assert_eq!(engine.health_at(far), Health::Well, "nothing is pending");
    let mut generation = engine.generate(greedy(&prompt(1, 5), 2)).unwrap();
    // Either the command is unread or the step waits at the gate.
    assert!(matches!(engine.health_at(far), Health::Stuck(_)));
    generation.next().await.unwrap();
    assert!(matches!(engine.health_at(far), Health::Stuck(_)));
    permits.send(()).unwrap();
    drop(permits);
    listen(generation).await;
    engine.take_prefix_events().await.unwrap();
    engine.take_prefix_events().await.unwrap();
    assert_eq!(engine.health_at(far), Health::Well);
}

#[tokio::test]
async fn prefix_events_tell_what_can_be_hit() {
    let engine = engine(64);
    let tokens = prompt(1, 10);
    listen(engine.generate(greedy(&tokens, 1)).unwrap()).await;
    let keys = baton_scheduler::prefix_cache::PrefixHasher::new(Fingerprint([5; 32]), BLOCK_SIZE).keys(0, &tokens);
    let stored: Vec<PrefixEvent> = keys.iter().map(|&key| PrefixEvent::Stored(key)).collect();
    assert_eq!(engine.take_prefix_events().await.unwrap(), stored);
    assert_eq!(engine.take_prefix_events().await.unwrap(), []);
    let everything = engine.prefix_snapshot().await.unwrap();
    assert_eq!(everything[0], PrefixEvent::Cleared);
    assert_eq!(everything.len(), 1 + stored.len());
}
