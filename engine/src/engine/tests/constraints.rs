//! Constrained requests through engines: 200 random schemas, handed over, preempted, replayed, alone and in groups. Every
//! choice is as if it were alone, and every text that ended by itself is a valid document.

#[path = "../../../../tests/integration/schemas.rs"]
mod schemas;

use baton_kernels::KvWrite;
use baton_scheduler::batch::Numerics;
use baton_scheduler::request::Constraint;
use futures::StreamExt;
use serde_json::{Value, json};

use super::super::PrefillEvent;
use super::choices::{assert_choices_as, cut};
use super::*;
use crate::constraint::{ConstraintCompiler, GroupConstraint};
use crate::text::Tokenizer;

const END: TokenId = 44;
const N_BLOCKS: usize = 30;

/// Tokens of the hash model's ids, those without an effect.
const TOKENS: [&str; 44] = [
    "{", "}", "[", "]", "\"", ":", ",", "-", ".", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "c", "d",
    "e", "f", "l", "n", "r", "s", "t", "u", "true", "false", "null", "\":", "\",", "{\"", "\"}", "12", "[]", "ab",
    "],", "},", "\"a",
];

fn tokenizer() -> Tokenizer {
    let vocab: serde_json::Map<String, Value> = TOKENS
        .iter()
        .zip(0..)
        .map(|(text, id)| ((*text).to_owned(), json!(id)))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(&serde_json::to_vec(&tokenizer).unwrap()).unwrap()
}

pub(super) fn compiler() -> ConstraintCompiler {
    ConstraintCompiler::new(|| Ok((tokenizer(), vec![END])), hash_model::N_VOCAB)
}

pub(super) fn constrained_engine(n_blocks: usize) -> EngineHandle {
    engine(n_blocks).with_constraints(compiler())
}

pub(super) fn constrained(seed: u64, schema: &Value, n: u32) -> PortableState {
    let sampling = SamplingParams {
        max_tokens: 200,
        temperature: 1.0,
        seed,
        n,
        stop_token_ids: vec![END],
        logprobs: Some(1),
        presence_penalty: if seed.is_multiple_of(3) { 0.4 } else { 0.0 },
        constraint: Some(Constraint::JsonSchema(schema.to_string().into())),
        ..SamplingParams::default()
    };
    request(&prompt(seed as u32 % 5, 3 + seed as usize % 20), sampling)
}

/// Every choice as it ends, computed alone with matchers of its own.
pub(super) fn all_alone(engine: &EngineHandle, state: &PortableState) -> Vec<ChoiceState> {
    let compiler = compiler();
    let constraint = state.request.sampling.constraint.as_ref().unwrap();
    let alone = |choice| {
        let mut allowed = |output: &[TokenId]| {
            // Each time from the beginning.
            let mut group = GroupConstraint::new(compiler.compile(constraint).unwrap(), 1);
            Some(group.allowed(0, output).unwrap().clone())
        };
        let max_model_len = engine.batch_config().max_model_len;
        let (output, finish) = hash_model::alone_within(state, choice, max_model_len, &mut allowed);
        ChoiceState {
            output,
            finish: Some(finish),
        }
    };
    (0..state.request.sampling.n).map(alone).collect()
}

/// Hands a group over and gives its choices whole.
async fn handed_over(prefill: &EngineHandle, decode: &EngineHandle, state: &PortableState) -> Result<Said, Failure> {
    let mut reservation = decode.reserve(state.clone()).await?;
    let [context] = reservation.choices.as_mut_slice() else {
        panic!("a handoff has one context")
    };
    let held = context.layer_groups[0].n_blocks_held;
    let mut writers: Vec<KvWrite> = std::mem::take(&mut context.layer_groups[0].writers);
    let mut job = prefill.prefill(prefill.prepare(state.clone()).await?, &[held])?;
    let mut first = None;
    while let Some(timed) = job.next().await {
        match timed.event {
            PrefillEvent::LayerReady { layer, blocks, reads } => {
                for (block_idx, read) in blocks.zip(reads) {
                    let writer = &mut writers[block_idx - held];
                    writer.write(layer, read.key(), read.value()).unwrap();
                }
            }
            PrefillEvent::FirstTokens(tokens) => first = Some(tokens),
            PrefillEvent::Started { .. } | PrefillEvent::PromptLogprobs(_) => {}
            PrefillEvent::Failed(failure) => return Err(failure),
        }
    }
    drop((job, writers));
    let first: Vec<Token> = first.unwrap().into_iter().map(|(token, _)| token).collect();
    let mut said = listen(reservation.join(first.clone(), Numerics::Same)?).await;
    for (choice, token) in (0..).zip(first) {
        said.choice(choice).output.insert(0, token);
    }
    Ok(said)
}

/// Hands 200 requests over through a small pool, several at once.
async fn two_hundred_schemas(n: u32) {
    let (prefill, decode) = (constrained_engine(N_BLOCKS), constrained_engine(N_BLOCKS));
    let (prefill, decode) = (&prefill, &decode);
    let served = futures::stream::iter(0..200u64).map(|seed| async move {
        let schema = schemas::schema(seed);
        let state = constrained(seed, &schema, n);
        let mut n_attempts = 0;
        let said = loop {
            match handed_over(prefill, decode, &state).await {
                Err(Failure::Busy(_)) if n_attempts < 100_000 => n_attempts += 1,
                said => break said.unwrap(),
            }
            decode.take_prefix_events().await.unwrap();
        };
        assert_choices_as(&all_alone(decode, &state), &state, &said);
        let validator = jsonschema::validator_for(&schema).unwrap();
        let mut n_whole = 0;
        for choice in &said.choices {
            if choice.finish != Some(Finish::Stop(END)) {
                continue;
            }
            let ids: Vec<TokenId> = choice.output.iter().map(|token| token.id).collect();
            let text = tokenizer().decode(&ids).unwrap();
            let document: Value = serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("schema {seed}: {error}: {text} of {schema}"));
            assert!(validator.is_valid(&document), "schema {seed}: {text} of {schema}");
            n_whole += 1;
        }
        n_whole
    });
    let served: Vec<usize> = served.buffer_unordered(8).collect().await;
    let n_whole: usize = served.iter().sum();
    let n_preemptions = decode.load().scheduler.n_preemptions;
    println!("n {n}: {n_whole} whole documents, {n_preemptions} preemptions");
    assert!(n_whole > 190 * n as usize, "only {n_whole} ended by themselves");
    assert!(n_preemptions > 0, "nothing was preempted");
    settle(prefill).await;
    settle(decode).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_200_schemas_are_valid() {
    two_hundred_schemas(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_200_schemas_in_groups_are_valid() {
    two_hundred_schemas(4).await;
}

#[tokio::test]
async fn a_constrained_replay_goes_on_alike_from_every_cut() {
    let engine = constrained_engine(64);
    for seed in [5, 21] {
        let fresh = constrained(seed, &schemas::schema(seed), 2);
        let all = all_alone(&engine, &fresh);
        let longest = all.iter().map(|choice| choice.output.len()).max().unwrap();
        for n_known in 0..=longest {
            let state = PortableState {
                choices: cut(&all, |choice| n_known.saturating_sub(2 * choice)),
                ..fresh.clone()
            };
            let said = listen(engine.generate(state.clone()).unwrap()).await;
            assert_choices_as(&all, &state, &said);
        }
    }
    settle(&engine).await;
}

#[tokio::test]
async fn preemption_changes_no_constrained_token() {
    let engine = constrained_engine(24);
    let schema = json!({ "type": "array", "items": { "type": "string", "minLength": 3, "maxLength": 9 }, "minItems": 12, "maxItems": 12 });
    let states: Vec<PortableState> = (0..4)
        .map(|seed| constrained(seed, &schema, 1 + seed as u32 % 2))
        .collect();
    let generations = states
        .iter()
        .map(|state| listen(engine.generate(state.clone()).unwrap()));
    for (said, state) in futures::future::join_all(generations).await.into_iter().zip(&states) {
        assert_choices_as(&all_alone(&engine, state), state, &said);
    }
    assert!(engine.load().scheduler.n_preemptions > 0, "nothing was preempted");
    settle(&engine).await;
}

#[tokio::test]
async fn what_cannot_be_kept_is_invalid() {
    let failure_of = async |engine: &EngineHandle, state: PortableState| match engine.prepare(state).await {
        Err(failure) => failure,
        Ok(prepared) => listen(engine.generate(prepared).unwrap())
            .await
            .end
            .unwrap()
            .unwrap_err(),
    };
    let engine = constrained_engine(64);
    let bad = constrained(1, &json!({ "type": "strange" }), 1);
    let failure = failure_of(&engine, bad.clone()).await;
    assert!(
        matches!(&failure, Failure::Invalid(message) if message.starts_with("constraint: ")),
        "{failure}"
    );
    assert!(matches!(engine.reserve(bad.clone()).await, Err(Failure::Invalid(_))));
    assert!(matches!(engine.prefill(bad, &[0]), Err(Failure::Invalid(_))));
    // What was generated is not of the constraint.
    let mut other = constrained(1, &json!({ "type": "array" }), 1);
    other.choices[0].output = vec![Token {
        index: 0,
        id: 9,
        logprobs: None,
    }];
    let failure = failure_of(&engine, other).await;
    assert!(
        matches!(&failure, Failure::Invalid(message) if message.contains("token 1 of choice 0")),
        "{failure}"
    );
    // Two rules that leave nothing.
    let mut nothing = constrained(1, &json!({ "type": "array" }), 2);
    nothing.request.sampling.allowed_token_ids = [0, 1].into();
    let failure = failure_of(&engine, nothing).await;
    assert!(
        matches!(&failure, Failure::Invalid(message) if message.contains("leave no token")),
        "{failure}"
    );
    let plain = super::engine(64);
    let failure = failure_of(&plain, constrained(1, &json!({ "type": "array" }), 1)).await;
    let expected = "constraint: this model cannot be constrained: it has no tokenizer";
    assert_eq!(failure, Failure::Invalid(expected.to_owned()));
    settle(&engine).await;
}
