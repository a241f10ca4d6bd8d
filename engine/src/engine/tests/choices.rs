//! Several choices of one request, and penalties: each choice is as if it were alone, whatever happens around it.

use baton_kernels::KvWrite;
use baton_scheduler::batch::Numerics;

use super::super::PrefillEvent;
use super::*;

/// Several choices, warm, with penalties, stopping.
pub(super) fn choices(prompt: &[TokenId], max_tokens: u32, seed: u64, n: u32) -> PortableState {
    let mut request = warm(prompt, max_tokens, seed).request;
    request.sampling = SamplingParams {
        n,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.2,
        ..request.sampling
    };
    PortableState::fresh(request, Epoch(1))
}

/// Every choice as it ends, computed alone.
pub(super) fn all_alone(engine: &EngineHandle, state: &PortableState) -> Vec<ChoiceState> {
    let max_model_len = engine.batch_config().max_model_len;
    let alone = |choice| {
        let (output, finish) = hash_model::alone_choice(state, choice, max_model_len);
        ChoiceState {
            output,
            finish: Some(finish),
        }
    };
    (0..state.request.sampling.n).map(alone).collect()
}

/// What was said is what was not known, and the end.
pub(super) fn assert_choices_as_alone(engine: &EngineHandle, state: &PortableState, said: &Said) {
    assert_choices_as(&all_alone(engine, state), state, said);
}

/// What was said is the rest of what was expected.
pub(super) fn assert_choices_as(expected: &[ChoiceState], state: &PortableState, said: &Said) {
    assert!(matches!(said.end, Some(Ok(_))), "{:?}", said.end);
    for (choice, (expected, known)) in expected.iter().zip(&state.choices).enumerate() {
        let empty = ChoiceState::default();
        let heard = said.choices.get(choice).unwrap_or(&empty);
        assert_eq!(heard.output, expected.output[known.output.len()..], "choice {choice}");
        let unheard = if known.finish.is_some() { None } else { expected.finish };
        assert_eq!(heard.finish, unheard, "the end of choice {choice}");
    }
}

/// The choices after so many tokens of each.
pub(super) fn cut(all: &[ChoiceState], n_known: impl Fn(usize) -> usize) -> Vec<ChoiceState> {
    let cut = |(choice, state): (usize, &ChoiceState)| {
        let n_known = n_known(choice).min(state.output.len());
        ChoiceState {
            output: state.output[..n_known].to_vec(),
            finish: state.finish.filter(|_| n_known == state.output.len()),
        }
    };
    all.iter().enumerate().map(cut).collect()
}

#[tokio::test]
async fn each_choice_is_as_alone() {
    let engine = engine(64);
    for (n_prompt, n_cached) in [(30, 0), (30, 28), (8, 0), (1, 0)] {
        let state = choices(&prompt(n_prompt as u32, n_prompt), 20, 7, 4);
        let said = listen(engine.generate(state.clone()).unwrap()).await;
        assert_choices_as_alone(&engine, &state, &said);
        assert_eq!(said.n_cached_tokens, Some(n_cached));
        let distinct: std::collections::BTreeSet<Vec<TokenId>> = said
            .choices
            .iter()
            .map(|choice| choice.output.iter().map(|token| token.id).collect())
            .collect();
        assert!(distinct.len() > 1, "the choices differ");
    }
    settle(&engine).await;
    let load = engine.load();
    assert_eq!((load.engine.n_finished, load.n_open), (4, 0));
    assert_eq!(load.scheduler.n_prefill_tokens, 30 + 2 + 8 + 1, "each prompt once");
}

#[tokio::test]
async fn the_first_of_n_is_the_only_one_of_one() {
    let engine = engine(64);
    let many = choices(&prompt(2, 9), 20, 5, 4);
    let one = choices(&prompt(2, 9), 20, 5, 1);
    let of_many = listen(engine.generate(many).unwrap()).await;
    let of_one = listen(engine.generate(one).unwrap()).await;
    assert_eq!(of_many.choices[0], of_one.choices[0]);
}

#[tokio::test]
async fn penalties_change_tokens_and_replay_exactly() {
    let engine = engine(64);
    let mut plain = choices(&prompt(5, 12), 24, 3, 1);
    plain.request.sampling.temperature = 0.0;
    plain.request.sampling.stop_token_ids.clear();
    let penalised = listen(engine.generate(plain.clone()).unwrap()).await;
    assert_choices_as_alone(&engine, &plain, &penalised);
    plain.request.sampling.repetition_penalty = 1.0;
    plain.request.sampling.presence_penalty = 0.0;
    plain.request.sampling.frequency_penalty = 0.0;
    let unpenalised = listen(engine.generate(plain.clone()).unwrap()).await;
    assert_ne!(penalised.tokens, unpenalised.tokens);
}

#[tokio::test]
async fn a_replay_from_every_cut_goes_on_alike() {
    let engine = engine(64);
    let fresh = choices(&prompt(2, 9), 12, 11, 3);
    let all = all_alone(&engine, &fresh);
    let longest = all.iter().map(|choice| choice.output.len()).max().unwrap();
    for n_known in 0..=longest {
        for lag in 0..3 {
            let state = PortableState {
                choices: cut(&all, |choice| n_known.saturating_sub(lag * choice)),
                ..fresh.clone()
            };
            let said = listen(engine.generate(state.clone()).unwrap()).await;
            assert_choices_as_alone(&engine, &state, &said);
        }
    }
    settle(&engine).await;
}

#[tokio::test]
async fn an_end_that_was_not_heard_is_told_again() {
    let engine = engine(64);
    let fresh = choices(&prompt(2, 9), 12, 11, 2);
    let mut state = PortableState {
        choices: all_alone(&engine, &fresh),
        ..fresh
    };
    state.choices[1].finish = None;
    let said = listen(engine.generate(state.clone()).unwrap()).await;
    assert_choices_as_alone(&engine, &state, &said);
    assert_eq!(said.end.map(Result::unwrap), said.choices[1].finish);
    assert_eq!(engine.load().scheduler.n_prefill_tokens, 0);
}

#[tokio::test]
async fn preemption_and_prefix_hits_change_no_choice() {
    let engine = engine(14);
    let states: Vec<PortableState> = (0..4)
        .map(|i| {
            let mut state = choices(&prompt(i % 2, 7), 22, u64::from(i), 1 + i % 4);
            state.request.sampling.stop_token_ids.clear();
            state
        })
        .collect();
    let generations = states
        .iter()
        .map(|state| listen(engine.generate(state.clone()).unwrap()));
    let mut n_preemptions = 0;
    for (said, state) in futures::future::join_all(generations).await.into_iter().zip(&states) {
        assert_choices_as_alone(&engine, state, &said);
        n_preemptions += said.n_preemptions;
    }
    assert!(n_preemptions > 0, "nothing was preempted");
    settle(&engine).await;
}

#[tokio::test]
async fn prompt_logprobs_come_once_for_all_choices() {
    let engine = engine(64);
    let tokens = prompt(1, 13);
    let mut state = choices(&tokens, 3, 1, 3);
    state.request.sampling.prompt_logprobs = Some(2);
    let said = listen(engine.generate(state.clone()).unwrap()).await;
    assert_choices_as_alone(&engine, &state, &said);
    assert_eq!(
        said.prompt_logprobs,
        Some(hash_model::prompt_logprobs_alone(&tokens, 2))
    );
}

#[tokio::test]
async fn choices_are_handed_over_after_one_prefill() {
    let (prefill, decode) = (engine(64), engine(64));
    for n_prompt in [10, 12] {
        let state = choices(&prompt(3, n_prompt), 15, 9, 3);
        let mut reservation = decode.reserve(state.clone()).await.unwrap();
        let [context] = reservation.choices.as_mut_slice() else {
            panic!("a handoff has one context")
        };
        let held = context.layer_groups[0].n_blocks_held;
        let mut writers: Vec<KvWrite> = std::mem::take(&mut context.layer_groups[0].writers);
        let mut job = prefill.prefill(state.clone(), &[held]).unwrap();
        let mut first = None;
        while let Some(timed) = job.next().await {
            match timed.event {
                PrefillEvent::LayerReady { layer, blocks, reads } => {
                    for (block_idx, read) in blocks.zip(reads) {
                        writers[block_idx - held]
                            .write(layer, read.key(), read.value())
                            .unwrap();
                    }
                }
                PrefillEvent::FirstTokens(tokens) => first = Some(tokens),
                PrefillEvent::Started { .. } | PrefillEvent::PromptLogprobs(_) => {}
                PrefillEvent::Failed(failure) => panic!("{failure}"),
            }
        }
        drop((job, writers));
        let first = first.unwrap();
        let known = first.iter().map(|(token, _)| ChoiceState {
            output: vec![token.clone()],
            // The destination tells of the ends.
            finish: None,
        });
        let joined = PortableState {
            choices: known.collect(),
            ..state.clone()
        };
        let first: Vec<Token> = first.into_iter().map(|(token, _)| token).collect();
        let said = listen(reservation.join(first, Numerics::Same).unwrap()).await;
        assert_choices_as_alone(&decode, &joined, &said);
    }
    settle(&prefill).await;
    settle(&decode).await;
    assert_eq!(decode.load().engine.n_joined, 2);
    assert_eq!(decode.load().scheduler.n_preemptions, 0);
}

#[tokio::test]
async fn more_choices_than_places_are_refused() {
    let engine = engine(64);
    let refused = engine
        .generate(choices(&prompt(1, 5), 3, 1, 9))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        refused,
        Failure::Invalid("n is 9, expected 1 to 8 (max_num_seqs)".to_owned())
    );
}
