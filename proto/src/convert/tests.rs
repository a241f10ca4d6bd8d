//! Every domain type survives the wire; what a message lacks or overdoes is named.

use super::*;
use baton_scheduler::request::Constraint;
use proptest::prelude::*;

mod version_1;

prop_compose! {
    fn logprobs()(
        logprob in -50f32..0.0,
        rank in 1u32..100,
        top in prop::collection::vec((0u32..9999, -50f32..0.0), 0..4),
    ) -> TokenLogprobs {
        TokenLogprobs { logprob, rank, top }
    }
}

prop_compose! {
    /// What rules tokens out or shifts them, on or off.
    fn rules()(
        min_p in prop_oneof![Just(0.0f32), 0f32..=1.0],
        min_tokens in 0u32..1000,
        bias in prop::collection::btree_map(any::<u32>(), -100f32..100.0, 0..4),
        allowed in prop::collection::btree_set(any::<u32>(), 0..4),
        bad_words in prop::collection::vec(prop::collection::vec(any::<u32>(), 1..4), 0..3),
        constraint in prop::option::of(("\\PC{0,20}", 0..3)),
    ) -> SamplingParams {
        let constraint = constraint.map(|(text, kind): (String, i32)| match kind {
            0 => Constraint::JsonSchema(text.into()),
            1 => Constraint::Regex(text.into()),
            _ => Constraint::Grammar(text.into()),
        });
        SamplingParams {
            min_p,
            min_tokens,
            logit_bias: bias.into_iter().collect(),
            allowed_token_ids: allowed.into_iter().collect(),
            bad_words,
            constraint,
            ..SamplingParams::default()
        }
    }
}

prop_compose! {
    fn state()(
        rules in rules(),
        id in any::<u128>(),
        prompt in prop::collection::vec(0u32..200_000, 1..50),
        outputs in prop::collection::vec(prop::collection::vec((0u32..200_000, prop::option::of(logprobs())), 0..20), 1..4),
        penalties in (-2f32..2.0, -2f32..2.0, 0.5f32..2.0),
        (max_tokens, temperature, top_k, top_p, seed) in (1u32..1000, 0f32..2.0, 0u32..100, 0.01f32..1.0, any::<u64>()),
        stop in prop::collection::vec(any::<u32>(), 0..3),
        (logprobs, prompt_logprobs) in (prop::option::of(0u8..=20), prop::option::of(0u8..=20)),
        (salt, epoch) in (any::<u64>(), any::<u32>()),
        finish in prop::option::of(prop_oneof![any::<u32>().prop_map(Finish::Stop), Just(Finish::Length)]),
    ) -> PortableState {
        let choices: Vec<ChoiceState> = outputs.into_iter().map(|output| ChoiceState {
            output: (0..).zip(output).map(|(index, (id, logprobs))| Token { index, id, logprobs }).collect(),
            finish,
        }).collect();
        PortableState {
            request: Request {
                id: RequestId(id),
                prompt_ids: Arc::from(prompt),
                sampling: SamplingParams {
                    max_tokens, temperature, top_k, top_p, seed, stop_token_ids: stop, logprobs, prompt_logprobs,
                    n: choices.len() as u32, presence_penalty: penalties.0, frequency_penalty: penalties.1, repetition_penalty: penalties.2,
                    min_tokens: rules.min_tokens.min(max_tokens),
                    ..rules
                },
                cache_salt: salt,
            },
            choices,
            epoch: Epoch(epoch),
        }
    }
}

proptest! {
    #[test]
    fn portable_state_survives_the_wire(state in state()) {
        let bytes = prost::Message::encode_to_vec(&cluster::PortableState::from(&state));
        let wire = <cluster::PortableState as prost::Message>::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(PortableState::try_from(wire).unwrap(), state);
    }
}

proptest! {
    /// A mirror fed by messages holds what a mirror fed by events holds.
    #[test]
    fn prefix_events_survive_the_wire(events in prop::collection::vec((0u8..9, 0u128..6), 0..40), cut in 0usize..40) {
        let events: Vec<PrefixEvent> = events.into_iter().map(|(kind, key)| match kind {
            0..=4 => PrefixEvent::Stored(PrefixKey(key)),
            5..=7 => PrefixEvent::Removed(PrefixKey(key)),
            _ => PrefixEvent::Cleared,
        }).collect();
        let mirror = |events: &[PrefixEvent]| {
            let mut keys = std::collections::BTreeSet::new();
            for event in events {
                match *event {
                    PrefixEvent::Stored(key) => drop(keys.insert(key)),
                    PrefixEvent::Removed(key) => drop(keys.remove(&key)),
                    PrefixEvent::Cleared => keys.clear(),
                }
            }
            keys
        };
        let (first, second) = events.split_at(cut.min(events.len()));
        let mut carried = prefix_events_from_wire(&prefix_events_to_wire(first)).unwrap();
        carried.extend(prefix_events_from_wire(&prefix_events_to_wire(second)).unwrap());
        prop_assert_eq!(mirror(&carried), mirror(&events));
    }
}

#[test]
fn failures_survive_the_wire() {
    for failure in [
        Failure::Invalid("a".into()),
        Failure::Busy("b".into()),
        Failure::InstanceLost("c".into()),
        Failure::Incompatible("d".into()),
        Failure::DeadlineExceeded,
        Failure::Cancelled,
        Failure::Internal("e".into()),
    ] {
        assert_eq!(Failure::from(cluster::Failure::from(&failure)), failure);
    }
    let newer = cluster::Failure {
        kind: 99,
        message: "x".into(),
        instance_id: String::new(),
    };
    assert_eq!(Failure::from(newer), Failure::Internal("x".into()));
}

/// One layer group is said as ever; several are said one by one.
#[test]
fn first_blocks_of_layer_groups_survive_the_wire() {
    assert_eq!(first_blocks_to_wire(&[7]), (7, Vec::new()));
    for groups in [vec![7], vec![7, 9, 9]] {
        let (first_block, first_blocks) = first_blocks_to_wire(&groups);
        assert_eq!(first_blocks_from_wire(first_block, first_blocks), groups);
    }
    let join = |most_blocks: Vec<u32>| cluster::WorkerJoin {
        instance_id: "a".into(),
        role: "decode".into(),
        fingerprint: vec![1; 32],
        block_size: 16,
        most_blocks,
        ..cluster::WorkerJoin::default()
    };
    let most_blocks = |join: &cluster::WorkerJoin| instance_info_from_wire(join).unwrap().most_blocks;
    assert_eq!(most_blocks(&join(Vec::new())), [None], "of a peer that knows no groups");
    assert_eq!(most_blocks(&join(vec![0, 5])), [None, Some(5)]);
}

#[test]
fn bad_fields_are_named() {
    let good = cluster::SamplingParams {
        max_tokens: 1,
        temperature: 1.0,
        top_p: 1.0,
        ..Default::default()
    };
    let error = SamplingParams::try_from(cluster::SamplingParams {
        top_p: f32::NAN,
        ..good.clone()
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "field sampling.top_p is NaN, expected above 0, at most 1"
    );
    let error = SamplingParams::try_from(cluster::SamplingParams {
        logprobs: Some(21),
        ..good.clone()
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "field sampling.logprobs is 21, expected 0 to 20");
    let said = |change: &dyn Fn(&mut cluster::SamplingParams)| {
        let mut wire = good.clone();
        change(&mut wire);
        SamplingParams::try_from(wire).unwrap_err().to_string()
    };
    assert_eq!(
        said(&|wire| wire.min_p = 1.5),
        "field sampling.min_p is 1.5, expected 0 to 1"
    );
    let message = said(&|wire| wire.min_tokens = 2);
    assert_eq!(message, "field sampling.min_tokens is 2, expected at most max_tokens");
    let bias = |id, bias| cluster::LogitBias { id, bias };
    assert!(said(&|wire| wire.logit_bias = vec![bias(1, f32::NAN)]).contains("sampling.logit_bias"));
    assert!(said(&|wire| wire.logit_bias = vec![bias(2, 1.0), bias(2, 1.0)]).contains("sampling.logit_bias"));
    assert!(said(&|wire| wire.allowed_token_ids = vec![2, 1]).contains("sampling.allowed_token_ids"));
    let empty = cluster::TokenSequence::default;
    assert!(said(&|wire| wire.bad_words = vec![empty()]).contains("sampling.bad_words"));
    // A language that this build does not know is not "any text".
    let unknown = said(&|wire| wire.constraint = Some(cluster::Constraint { language: None }));
    assert_eq!(unknown, "field sampling.constraint.language is missing");
    assert!(fingerprint_from_wire(&[0; 31]).is_err());
    assert!(role_from_wire("Prefill").is_err());
}

#[test]
fn embeddings_survive_the_wire_and_bad_ones_are_named() {
    let wire = cluster::EmbedRequest {
        handshake: None,
        request_id: 77u128.to_be_bytes().to_vec(),
        prompt_ids: vec![5, 6],
        cache_salt: 9,
    };
    let request = Request::try_from(wire.clone()).unwrap();
    assert_eq!(request, Request::to_embed(RequestId(77), Arc::from([5, 6]), 9));
    let cases = [
        (
            cluster::EmbedRequest {
                request_id: vec![1],
                ..wire.clone()
            },
            "field request_id is 1 bytes",
        ),
        (
            cluster::EmbedRequest {
                prompt_ids: vec![],
                ..wire
            },
            "field prompt_ids is empty",
        ),
    ];
    for (wire, words) in cases {
        assert!(
            Request::try_from(wire).unwrap_err().to_string().contains(words),
            "{words}"
        );
    }
    for embedded in [Ok(vec![1.5, -2.0]), Err(Failure::Busy("full".into()))] {
        assert_eq!(embedding_from_wire(embedding_to_wire(embedded.clone())), embedded);
    }
    let empty = cluster::EmbedResponse { answer: None };
    assert!(matches!(embedding_from_wire(empty), Err(Failure::Internal(_))));
}

#[test]
fn changes_of_cached_blocks_survive_the_wire() {
    let events = vec![
        BlockEvent::Cleared,
        BlockEvent::Stored(StoredBlock {
            key: PrefixKey(1),
            parent: None,
            tokens: Arc::from([4, 5]),
        }),
        BlockEvent::Stored(StoredBlock {
            key: PrefixKey(u128::MAX),
            parent: Some(PrefixKey(1)),
            tokens: Arc::from([6, 7]),
        }),
        BlockEvent::Removed(PrefixKey(1)),
    ];
    assert_eq!(kv_changes_from_wire(kv_changes_to_wire(&events)), Ok(events.clone()));
    let mut wire = kv_changes_to_wire(&events);
    wire.changes[3].change = Some(cluster::kv_change::Change::Removed(vec![1]));
    let error = kv_changes_from_wire(wire).unwrap_err().to_string();
    assert!(error.contains("removed is 1 bytes"), "{error}");
}
