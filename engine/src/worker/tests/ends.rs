//! Calls that are refused: by whom, as what, naming which field; and that nothing is held for them afterwards.

use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_proto::link::{ClusterSecret, LinkOptions};
use baton_proto::{PROTOCOL_VERSION, speaks};
use baton_scheduler::request::Failure;
use std::sync::atomic::Ordering::SeqCst;
use tonic::Code;

use super::super::WorkerOptions;
use super::cluster::*;

fn kind(failure: &Failure) -> &'static str {
    match failure {
        Failure::Invalid(_) => "invalid",
        Failure::Busy(_) => "busy",
        Failure::InstanceLost(_) => "lost",
        Failure::Incompatible(_) => "incompatible",
        Failure::DeadlineExceeded => "deadline",
        Failure::Cancelled => "cancelled",
        Failure::Internal(_) => "internal",
    }
}

/// What is made of a good request, the kind of failure expected, and words of its message.
type Case = (fn(&mut cluster::GenerateRequest), &'static str, &'static str);

const CASES: &[Case] = &[
    (
        |request| request.handshake = None,
        "invalid",
        "field handshake is missing",
    ),
    (
        |request| handshake(request).protocol_version = PROTOCOL_VERSION + 1,
        "incompatible",
        "protocol version 3, expected 2",
    ),
    (
        |request| handshake(request).fingerprint = vec![8; 32],
        "incompatible",
        "fingerprint \"08080808",
    ),
    (
        |request| handshake(request).fingerprint.clear(),
        "incompatible",
        "fingerprint \"\"",
    ),
    (
        |request| handshake(request).callee_incarnation = 12,
        "lost",
        "the caller means",
    ),
    (|request| request.state = None, "invalid", "field state is missing"),
    (
        |request| wire(request).request_id.truncate(3),
        "invalid",
        "state.request_id is 3 bytes",
    ),
    (
        |request| wire(request).prompt_ids.clear(),
        "invalid",
        "state.prompt_ids is empty",
    ),
    (
        |request| wire(request).sampling = None,
        "invalid",
        "field state.sampling is missing",
    ),
    (|request| wire(request).choices.clear(), "invalid", "state.choices is 0"),
    (
        |request| wire(request).sampling.as_mut().unwrap().max_tokens = 0,
        "invalid",
        "sampling.max_tokens is 0",
    ),
    (
        |request| {
            wire(request).choices[0].output.push(cluster::Token {
                index: 4,
                id: 1,
                logprobs: None,
                choice: 0,
            });
        },
        "invalid",
        "choices.output.index",
    ),
    (
        |request| wire(request).prompt_ids[2] = 48,
        "invalid",
        "token id 48, expected less than 48",
    ),
    (
        |request| wire(request).prompt_ids = vec![1; N_BLOCKS * BLOCK_SIZE],
        "invalid",
        "the prompt has 1024 tokens",
    ),
];

fn handshake(request: &mut cluster::GenerateRequest) -> &mut cluster::Handshake {
    request.handshake.as_mut().unwrap()
}

fn wire(request: &mut cluster::GenerateRequest) -> &mut cluster::PortableState {
    request.state.as_mut().unwrap()
}

#[tokio::test]
async fn a_bad_call_of_generate_is_refused_by_name() {
    let (prefill, decode) = (
        Setup::new("prefill-0").start().await,
        Setup::new("decode-0").start().await,
    );
    for (spoil, expected, words) in CASES {
        for source in [None, Some(prefill.peer())] {
            let mut request = decode.request(&greedy(&prompt(1, 20), 4), source);
            spoil(&mut request);
            let said = decode.say(request).await;
            let (failure, blamed) = said.failure();
            assert_eq!((kind(&failure), blamed.as_str()), (*expected, ""), "{failure}");
            assert!(failure.to_string().contains(words), "{failure}, expected {words}");
            assert!(said.accepted.is_none() && said.tokens.is_empty() && said.moments.is_empty());
        }
    }
    assert_eq!(decode.load().engine.n_steps + prefill.load().engine.n_steps, 0);
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn a_bad_call_of_prefill_is_refused_by_name() {
    let prefill = Setup::new("prefill-0").start().await;
    for (spoil, expected, words) in CASES {
        let good = prefill.prefill_request(&greedy(&prompt(1, 20), 4));
        let mut spoiled = cluster::GenerateRequest {
            handshake: good.handshake.clone(),
            state: good.state.clone(),
            ..Default::default()
        };
        spoil(&mut spoiled);
        let request = cluster::PrefillRequest {
            handshake: spoiled.handshake,
            state: spoiled.state,
            ..good
        };
        assert_prefill_refused(&prefill, request, expected, words).await;
    }
    let request = cluster::PrefillRequest {
        first_block: 3,
        ..prefill.prefill_request(&greedy(&prompt(1, 20), 4))
    };
    assert_prefill_refused(&prefill, request, "invalid", "first_block is 3, expected at most 2").await;
    assert_eq!(prefill.totals().n_failed, CASES.len() as u64 + 1);
    assert_eq!(prefill.load().engine.n_steps, 0);
    prefill.stop().await;
}

async fn assert_prefill_refused(prefill: &Instance, request: cluster::PrefillRequest, expected: &str, words: &str) {
    let mut stream = prefill.client().prefill(request).await.unwrap().into_inner();
    let Some(Frame::Ended(ended)) = stream.message().await.unwrap().unwrap().frame else {
        panic!("something comes before the refusal");
    };
    let failure = Failure::from(ended.failure.unwrap());
    assert_eq!(kind(&failure), expected, "{failure}");
    assert!(failure.to_string().contains(words), "{failure}, expected {words}");
    assert!(stream.message().await.unwrap().is_none());
}

#[tokio::test]
async fn the_version_before_is_spoken_with() {
    let decode = Setup::new("decode-0").start().await;
    let state = greedy(&prompt(1, 20), 4);
    let mut versions = Vec::new();
    for version in 0..=PROTOCOL_VERSION + 2 {
        let mut request = decode.request(&state, None);
        handshake(&mut request).protocol_version = version;
        let said = decode.say(request).await;
        if said.accepted.is_some() {
            said.assert_as_alone(&state);
            versions.push(version);
        }
        assert_eq!(said.accepted.is_some(), speaks(version), "version {version}");
    }
    assert!(
        versions.contains(&PROTOCOL_VERSION) && !versions.contains(&0),
        "{versions:?}"
    );
    // A caller that does not know the incarnation means whichever.
    let mut request = decode.request(&state, None);
    handshake(&mut request).callee_incarnation = 0;
    decode.say(request).await.assert_as_alone(&state);
    decode.stop().await;
}

#[tokio::test]
async fn a_source_that_is_not_who_was_meant_is_blamed() {
    let decode = Setup::new("decode-0").start().await;
    let mut other_model = Setup::new("prefill-1");
    other_model.fingerprint = [9; 32];
    let (prefill, other_model) = (Setup::new("prefill-0").start().await, other_model.start().await);
    let earlier_life = cluster::Peer {
        incarnation: 10,
        ..prefill.peer()
    };
    let nobody = cluster::Peer {
        address: "127.0.0.1:1".to_owned(),
        instance_id: "prefill-2".to_owned(),
        ..prefill.peer()
    };
    let nowhere = cluster::Peer {
        address: String::new(),
        instance_id: "prefill-3".to_owned(),
        ..prefill.peer()
    };
    let cases = [
        (earlier_life, "lost", "the caller means"),
        (other_model.peer(), "incompatible", "fingerprint"),
        (nobody, "lost", "the transfer's stream broke"),
        (nowhere, "lost", "address \"\" is neither host:port nor unix:/path"),
    ];
    let state = greedy(&prompt(1, 20), 4);
    for (n_failed, (peer, expected, words)) in (1..).zip(cases) {
        let said = decode.generate(&state, Some(peer.clone())).await;
        let (failure, blamed) = said.failure();
        assert_eq!((kind(&failure), blamed), (expected, peer.instance_id), "{failure}");
        assert!(failure.to_string().contains(words), "{failure}, expected {words}");
        decode.settle().await;
        assert_eq!(decode.totals().n_failed, n_failed);
    }
    // The same name in its new life is another connection.
    decode
        .generate(&state, Some(prefill.peer()))
        .await
        .assert_as_alone(&state);
    stop([decode, prefill, other_model]).await;
}

#[tokio::test]
async fn a_source_whose_answer_disagrees_is_blamed() {
    type Spoil = fn(&mut cluster::Accepted);
    let cases: [(Spoil, &str); 3] = [
        (|accepted| accepted.protocol_version = 7, "incompatible"),
        (|accepted| accepted.fingerprint[31] = 0, "incompatible"),
        (|accepted| accepted.incarnation = 98, "lost"),
    ];
    let decode = Setup::new("decode-0").start().await;
    for (spoil, expected) in cases {
        let source = FakeSource::start(move |request| {
            let mut accepted = accepted(&request);
            spoil(&mut accepted);
            futures::StreamExt::chain(
                futures::stream::iter([frame(Frame::Accepted(accepted))]),
                futures::stream::pending(),
            )
        })
        .await;
        let said = decode.generate(&greedy(&prompt(1, 20), 4), Some(source.peer())).await;
        let (failure, blamed) = said.failure();
        assert_eq!((kind(&failure), blamed.as_str()), (expected, "fake-0"), "{failure}");
        decode.until("closed", |_| source.n_open.load(SeqCst) == 0).await;
    }
    decode.stop().await;
}

#[tokio::test]
async fn no_room_is_said_before_the_source_is_asked() {
    let source = FakeSource::start(|_| futures::stream::empty()).await;
    let mut setup = Setup::new("decode-0");
    setup.n_blocks = 8;
    let decode = setup.start().await;
    let held = decode
        .service
        .engine()
        .reserve(greedy(&prompt(1, 100), 9))
        .await
        .unwrap();
    decode
        .until("reserved", |decode| decode.load().batch.n_reserved == 1)
        .await;
    let ledger = decode.load().batch.ledger;
    for source in [source.peer(), source.peer()] {
        let said = decode.generate(&greedy(&prompt(2, 20), 4), Some(source)).await;
        let (failure, blamed) = said.failure();
        assert_eq!((kind(&failure), blamed.as_str()), ("busy", ""), "{failure}");
        assert!(said.accepted.is_none(), "busy is the whole answer");
        assert_eq!(decode.load().batch.ledger, ledger);
    }
    assert_eq!(source.n_calls.load(SeqCst), 0);
    drop(held);
    decode.settle().await;
    decode.generate(&greedy(&prompt(2, 20), 4), Some(source.peer())).await;
    assert_eq!(source.n_calls.load(SeqCst), 1);
    decode.stop().await;
}

/// The front door had the last token, but lost the stream before the end was said.
#[tokio::test]
async fn a_replay_with_all_its_tokens_is_ended_and_not_handed_over() {
    let source = FakeSource::start(|_| futures::stream::empty()).await;
    let decode = Setup::new("decode-0").start().await;
    let mut replay = greedy(&prompt(3, 20), 5);
    replay.choices[0].output = decode.generate(&replay, None).await.tokens;
    assert_eq!(replay.choices[0].output.len(), 5);
    let said = decode.generate(&replay, Some(source.peer())).await;
    said.assert_as_alone(&replay);
    assert!(said.tokens.is_empty());
    assert_eq!(source.n_calls.load(SeqCst), 0);
    decode.stop().await;
}

#[tokio::test]
async fn without_the_secret_nothing_is_answered() {
    let with_secret = |secret| WorkerOptions {
        link: LinkOptions {
            secret: Some(ClusterSecret::new(secret).unwrap()),
            ..LinkOptions::default()
        },
        ..WorkerOptions::default()
    };
    let (mut right, mut also_right, mut wrong) =
        (Setup::new("prefill-0"), Setup::new("decode-0"), Setup::new("decode-1"));
    right.options = with_secret("swordfish");
    also_right.options = with_secret("swordfish");
    wrong.options = with_secret("sword");
    let (prefill, decode, stranger) = (right.start().await, also_right.start().await, wrong.start().await);
    let state = greedy(&prompt(1, 20), 4);
    for secret in [None, Some("sword"), Some("swordfish2")] {
        let link = LinkOptions {
            secret: secret.map(|secret| ClusterSecret::new(secret).unwrap()),
            ..LinkOptions::default()
        };
        let channel = link.channel(&prefill.address).unwrap();
        let mut client = cluster::worker_client::WorkerClient::with_interceptor(channel, link.present_secret());
        let status = client.generate(prefill.request(&state, None)).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        let status = client.prefill(prefill.prefill_request(&state)).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
    }
    assert_eq!(prefill.load().engine.n_steps, 0);
    for (instance, secret, can) in [(&decode, "swordfish", true), (&stranger, "sword", false)] {
        let link = with_secret(secret).link;
        let channel = link.channel(&instance.address).unwrap();
        let mut client = cluster::worker_client::WorkerClient::with_interceptor(channel, link.present_secret());
        let request = instance.request(&state, Some(prefill.peer()));
        let said = listen(client.generate(request).await.unwrap().into_inner()).await;
        if can {
            said.assert_as_alone(&state);
        } else {
            let (failure, blamed) = said.failure();
            assert_eq!((kind(&failure), blamed.as_str()), ("lost", "prefill-0"));
            assert!(failure.to_string().contains("secret"), "{failure}");
        }
    }
    stop([decode, stranger, prefill]).await;
}
