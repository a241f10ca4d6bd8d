//! Tokens that the device samples, and steps launched behind one another: the same as the host's, one step at a time.

use std::sync::Arc;

use baton_engine::engine::{AsyncScheduling, EngineConfig, EngineEvent, EngineHandle, start};
use baton_engine::forward::{ForwardPass as _, LogitsWanted, NewTokens, SampledToken, StepSequence, TokenWanted};
use baton_engine::sampler::Sampler;
use baton_kernels::DType;
use baton_kernels::cuda::CudaMode;
use baton_scheduler::batch::BatchConfig;
use baton_scheduler::ids::{Epoch, RequestId, TokenId};
use baton_scheduler::request::{ChoiceState, PortableState, Request, SamplingParams, Token};

use super::super::{BLOCK_SIZE, N_KV_BLOCKS, ONE_MODEL};
use super::load;

const N_TOKENS: u32 = 4;

/// One greedy, one drawn with log-probabilities, one from a nucleus.
fn params() -> [SamplingParams; 3] {
    let warm = SamplingParams {
        max_tokens: N_TOKENS,
        temperature: 0.9,
        seed: 11,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let nucleus = SamplingParams {
        top_p: 0.8,
        min_p: 0.01,
        seed: 12,
        logprobs: None,
        ..warm.clone()
    };
    let greedy = SamplingParams {
        temperature: 0.0,
        logprobs: Some(0),
        ..warm.clone()
    };
    [greedy, warm, nucleus]
}

const PROMPTS: [&[TokenId]; 3] = [&[5, 9, 2, 31], &[7], &[3, 3, 8, 1, 4]];

#[test]
fn carried_tokens_are_those_that_the_host_samples() {
    let Some(mut decoder) = load(ONE_MODEL, DType::F32, CudaMode::Deterministic) else {
        return;
    };
    let params = params();
    assert!(params.iter().all(|params| decoder.can_sample(params)));
    assert!(!decoder.can_sample(&SamplingParams {
        top_k: 257,
        ..params[1].clone()
    }));
    let vocab_size = decoder.vocab_size();
    let tables: [Vec<Vec<u32>>; 3] = [vec![vec![3]], vec![vec![1]], vec![vec![7]]];
    let start_pos = |i: usize, index: u32| match index {
        0 => 0,
        _ => PROMPTS[i].len() + index as usize - 1,
    };

    // By the host, one step after the other.
    let mut by_host: [Vec<Token>; 3] = Default::default();
    for index in 0..N_TOKENS {
        let given = by_host.clone().map(|tokens| tokens.last().map(|token| [token.id]));
        let sequences: Vec<StepSequence<'_>> = (0..3)
            .map(|i| StepSequence {
                tokens: NewTokens::Known(given[i].as_ref().map_or(PROMPTS[i], |last| last)),
                start_pos: start_pos(i, index),
                block_tables: &tables[i],
                rope_variant: 0,
                logits: LogitsWanted::Last,
            })
            .collect();
        assert!(!decoder.can_run_ahead_of(&sequences));
        let logits = decoder.step(&sequences, &mut |_, _| {}).unwrap().logits.to_vec();
        for (i, row) in logits.chunks_exact(vocab_size).enumerate() {
            by_host[i].push(Sampler::new().sample(row, &params[i], 0, index).unwrap());
        }
    }

    // By the device, each step launched before the one before it is collected.
    let mut by_device: [Vec<SampledToken>; 3] = Default::default();
    let mut collect = |output: &[Option<SampledToken>]| {
        for (tokens, sampled) in by_device.iter_mut().zip(output) {
            tokens.push(sampled.clone().expect("the device sampled"));
        }
    };
    for index in 0..N_TOKENS {
        let sequences: Vec<StepSequence<'_>> = (0..3)
            .map(|i| StepSequence {
                tokens: match index {
                    0 => NewTokens::Known(PROMPTS[i]),
                    _ => NewTokens::Sampled(i),
                },
                start_pos: start_pos(i, index),
                block_tables: &tables[i],
                rope_variant: 0,
                logits: LogitsWanted::Token(TokenWanted {
                    params: &params[i],
                    choice: 0,
                    index,
                }),
            })
            .collect();
        assert!(decoder.can_run_ahead_of(&sequences));
        decoder.launch(&sequences, &mut |_, _| {}).unwrap();
        if index > 0 {
            collect(decoder.collect().unwrap().tokens);
        }
    }
    collect(decoder.collect().unwrap().tokens);
    for (host, device) in by_host.iter().zip(&by_device) {
        let host = host.iter().map(|token| (token.id, token.logprobs.clone()));
        let device = device.iter().map(|token| (token.id, token.logprobs.clone()));
        assert_eq!(device.collect::<Vec<_>>(), host.collect::<Vec<_>>());
    }
}

fn engine(async_scheduling: AsyncScheduling) -> Option<EngineHandle> {
    let decoder = load(ONE_MODEL, DType::F32, CudaMode::Deterministic)?;
    let batch = BatchConfig {
        max_num_seqs: 4,
        max_batch_tokens: 16,
        max_model_len: 64,
        ..BatchConfig::new(N_KV_BLOCKS, BLOCK_SIZE, decoder.transfer_fingerprint())
    };
    let config = EngineConfig {
        async_scheduling,
        ..EngineConfig::new(batch)
    };
    Some(start(decoder, config).unwrap())
}

async fn generate(engine: &EngineHandle, params: &SamplingParams, prompt: &[TokenId]) -> ChoiceState {
    let request = Request {
        id: RequestId(1),
        prompt_ids: Arc::from(prompt),
        sampling: params.clone(),
        cache_salt: 0,
    };
    let mut generation = engine.generate(PortableState::fresh(request, Epoch(1))).unwrap();
    let mut choice = ChoiceState::default();
    while let Some(timed) = generation.next().await {
        match timed.event {
            EngineEvent::Token { token, .. } => choice.output.push(token),
            EngineEvent::Finished(finish) => choice.finish = Some(finish),
            EngineEvent::Failed(failure) => panic!("{failure}"),
            _ => {}
        }
    }
    choice
}

/// All at once, with one among them that only the host can sample.
#[tokio::test]
async fn the_loop_gives_the_same_tokens_ahead_and_in_turn() {
    let mut said: Vec<Vec<ChoiceState>> = Vec::new();
    for async_scheduling in [AsyncScheduling::Off, AsyncScheduling::On] {
        let Some(engine) = engine(async_scheduling) else { return };
        let [greedy, warm, nucleus] = params();
        let penalised = SamplingParams {
            presence_penalty: 0.5,
            max_tokens: 2,
            ..warm.clone()
        };
        let choices = tokio::join!(
            generate(&engine, &greedy, PROMPTS[0]),
            generate(&engine, &warm, PROMPTS[1]),
            generate(&engine, &nucleus, PROMPTS[2]),
            generate(&engine, &penalised, PROMPTS[0]),
        );
        said.push(vec![choices.0, choices.1, choices.2, choices.3]);
        let counters = engine.load().engine;
        assert_eq!(
            counters.n_steps_ahead > 0,
            async_scheduling == AsyncScheduling::On,
            "{counters:?}"
        );
        engine.shutdown().await;
    }
    assert_eq!(said[0], said[1]);
    assert_eq!(said[0][0].output.len(), N_TOKENS as usize);
}
