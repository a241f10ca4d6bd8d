//! Handoffs that go well: the tokens are those of the request computed alone, and exactly the plan's bytes move.

use baton_proto::cluster::transfer_frame::Frame;
use baton_scheduler::prefix_cache::PrefixEvent;
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, SamplingParams};
use baton_scheduler::timeline::Moment;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

use super::super::TransportKind;
use super::cluster::*;
use crate::engine::hash_model;

fn warm(seed: u32, n_prompt: usize, max_tokens: u32) -> PortableState {
    let sampling = SamplingParams {
        max_tokens,
        temperature: 0.9,
        top_p: 0.95,
        seed: u64::from(seed),
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    state(&prompt(seed, n_prompt), sampling)
}

#[tokio::test]
async fn handed_over_is_as_local_and_as_alone() {
    let (prefill, decode) = (
        Setup::new("prefill-0").start().await,
        Setup::new("decode-0").start().await,
    );
    let local = Setup::new("mixed-0").start().await;
    let mut expected_bytes = 0;
    let mut n_handoffs = 0;
    for (seed, n_prompt) in [1, 15, 16, 17, 33, 200].into_iter().enumerate() {
        let fresh = warm(seed as u32, n_prompt, 24);
        let here = local.generate(&fresh, None).await;
        here.assert_as_alone(&fresh);
        assert_eq!(here.kv_bytes(), 0);

        let n_held_before = decode.totals().n_blocks_not_sent;
        let handed = decode.generate(&fresh, Some(prefill.peer())).await;
        handed.assert_as_alone(&fresh);
        assert_eq!(handed.tokens, here.tokens, "with their log-probabilities");
        let n_held = (decode.totals().n_blocks_not_sent - n_held_before) as usize;
        assert_eq!(n_held, 0, "prompts begin differently");
        assert_eq!(handed.kv_bytes(), kv_bytes(n_prompt.div_ceil(BLOCK_SIZE)));
        expected_bytes += handed.kv_bytes();
        n_handoffs += 1;

        // A replay computes the prompt and what was already delivered, and goes on with the next index.
        for n_known in [1, 7, 16, 22] {
            let mut replay = fresh.clone();
            replay.choices = vec![ChoiceState {
                output: here.tokens[..n_known].to_vec(),
                finish: None,
            }];
            let n_held_before = decode.totals().n_blocks_not_sent;
            let handed = decode.generate(&replay, Some(prefill.peer())).await;
            handed.assert_as_alone(&fresh_tail(&fresh, n_known));
            assert_eq!(handed.tokens[0].index as usize, n_known);
            let n_held = (decode.totals().n_blocks_not_sent - n_held_before) as usize;
            let n_blocks = (n_prompt + n_known).div_ceil(BLOCK_SIZE);
            assert_eq!(handed.kv_bytes(), kv_bytes(n_blocks - n_held));
            expected_bytes += handed.kv_bytes();
            n_handoffs += 1;
        }
    }
    let (sent, received) = (prefill.totals(), decode.totals());
    assert_eq!(
        (sent.bytes_sent, received.bytes_received),
        (expected_bytes, expected_bytes)
    );
    assert_eq!(sent.n_frames_sent, received.n_frames_received);
    assert_eq!((sent.n_sent, received.n_received), (n_handoffs, n_handoffs));
    assert_eq!((sent.n_failed, received.n_failed, received.n_frames_refused), (0, 0, 0));
    assert_eq!(decode.load().scheduler.n_prefill_tokens, 0, "nothing is computed twice");
    assert!(sent.n_early_frames > 0, "layers leave before the prompt is done");
    stop([decode, prefill, local]).await;
}

/// The state after `n_known` tokens, as `assert_as_alone` wants it.
fn fresh_tail(fresh: &PortableState, n_known: usize) -> PortableState {
    let (tokens, _) = hash_model::alone(fresh, N_BLOCKS * BLOCK_SIZE);
    let mut state = fresh.clone();
    state.choices[0].output = tokens[..n_known].to_vec();
    state
}

#[tokio::test]
async fn a_handoff_says_what_happens_in_order() {
    let (prefill, decode) = (
        Setup::new("prefill-0").start().await,
        Setup::new("decode-0").start().await,
    );
    let mut state = warm(3, 100, 5);
    state.request.sampling.prompt_logprobs = Some(1);
    let said = decode.generate(&state, Some(prefill.peer())).await;
    said.assert_as_alone(&state);
    let accepted = said.accepted.as_ref().unwrap();
    assert_eq!(accepted.incarnation, decode.service.identity().incarnation.0);
    assert_eq!(said.prompt_logprobs, Some(99));
    let mut moments = said.moments.clone();
    assert_eq!(moments[..2], [Moment::Reserved, Moment::PrefillStarted]);
    assert_eq!(moments[moments.len() - 2..], [Moment::TransferFinished, Moment::Joined]);
    moments.sort();
    let all = [
        Moment::Reserved,
        Moment::PrefillStarted,
        Moment::PrefillFinished,
        Moment::TransferStarted,
        Moment::TransferFinished,
        Moment::Joined,
    ];
    assert_eq!(moments, all, "each once");
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn many_at_once_between_several_instances() {
    let prefills = [
        Setup::new("prefill-0").start().await,
        Setup::new("prefill-1").start().await,
    ];
    let decodes = [
        Setup::new("decode-0").start().await,
        Setup::new("decode-1").start().await,
    ];
    let states: Vec<PortableState> = (0..12).map(|i| warm(i, 5 + 13 * (i as usize % 5), 20)).collect();
    let said = futures::future::join_all(states.iter().enumerate().map(|(i, state)| {
        let source = prefills[i % 2].peer();
        decodes[i / 2 % 2].generate(state, Some(source))
    }))
    .await;
    for (said, state) in said.iter().zip(&states) {
        said.assert_as_alone(state);
    }
    stop(decodes).await;
    stop(prefills).await;
}

#[tokio::test]
async fn by_each_transport() {
    for kind in TransportKind::ALL.into_iter().filter(|kind| !kind.needs_card()) {
        let prefill = Setup::by("prefill-0", kind).start().await;
        let decode = Setup::by("decode-0", kind).start().await;
        let states: Vec<PortableState> = (0..6).map(|i| warm(i, 5 + 23 * i as usize, 20)).collect();
        let handed = states.iter().map(|state| decode.generate(state, Some(prefill.peer())));
        let said = futures::future::join_all(handed).await;
        for (said, state) in said.iter().zip(&states) {
            said.assert_as_alone(state);
        }
        let n_bytes = said.iter().map(|said| said.kv_bytes()).sum::<u64>();
        assert!(n_bytes > 0);
        assert_eq!(
            decode.service.transport_totals().bytes_received[kind as usize],
            n_bytes,
            "by {kind}"
        );
        assert_eq!(
            prefill.service.transport_totals().bytes_sent[kind as usize],
            n_bytes,
            "by {kind}"
        );
        assert_eq!(prefill.totals().n_sent, 6);
        stop([decode, prefill]).await;
    }
}

/// Nothing falls back: each end may use one transport, and they differ.
#[tokio::test]
async fn ends_that_have_no_transport_in_common_refuse() {
    let prefill = Setup::by("prefill-0", TransportKind::Grpc).start().await;
    let decode = Setup::by("decode-0", TransportKind::InProcess).start().await;
    let elsewhere = Setup::by("decode-1", TransportKind::SharedMemory).start().await;
    for destination in [&decode, &elsewhere] {
        let said = destination.generate(&warm(1, 40, 4), Some(prefill.peer())).await;
        let (failure, blamed) = said.failure();
        assert!(matches!(failure, Failure::Incompatible(_)), "{failure}");
        assert_eq!(blamed, "prefill-0");
        assert!(said.tokens.is_empty());
    }
    stop([decode, elsewhere, prefill]).await;
}

#[tokio::test]
async fn over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefill.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let service = Setup::new("prefill-0").unserved();
    let prefill = Instance::serve_on(service, format!("unix:{}", path.display()), incoming);
    let decode = Setup::new("decode-0").start().await;
    let state = warm(2, 40, 9);
    let said = decode.generate(&state, Some(prefill.peer())).await;
    said.assert_as_alone(&state);
    assert_eq!(said.kv_bytes(), kv_bytes(3));
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn what_the_destination_holds_does_not_travel() {
    let (prefill, decode) = (
        Setup::new("prefill-0").start().await,
        Setup::new("decode-0").start().await,
    );
    // The last token has no KV yet, so 40 prompt tokens leave two full blocks and a partial one.
    let state = warm(1, 40, 6);
    assert_eq!(
        decode.generate(&state, Some(prefill.peer())).await.kv_bytes(),
        kv_bytes(3)
    );
    let again = decode.generate(&state, Some(prefill.peer())).await;
    again.assert_as_alone(&state);
    assert_eq!(again.kv_bytes(), kv_bytes(1));
    assert_eq!(decode.totals().n_blocks_not_sent, 2);
    // The prompt ends with a block that is held: only the token travels.
    let whole = greedy(&prompt(1, 32), 6);
    let said = decode.generate(&whole, Some(prefill.peer())).await;
    said.assert_as_alone(&whole);
    assert_eq!(said.kv_bytes(), 0);
    assert!(!said.moments.contains(&Moment::TransferStarted) && said.moments.contains(&Moment::Joined));
    assert_eq!(decode.totals().n_blocks_not_sent, 4);
    assert_eq!(prefill.totals().bytes_sent, kv_bytes(4));
    // Another decode instance has none of it, and gets all of it from the prefill instance's cache.
    let other = Setup::new("decode-1").start().await;
    let said = other.generate(&state, Some(prefill.peer())).await;
    said.assert_as_alone(&state);
    assert_eq!(said.kv_bytes(), kv_bytes(3));
    assert_eq!(said.end.unwrap().n_cached_tokens, 32);
    stop([decode, other, prefill]).await;
}

#[tokio::test]
async fn another_numerics_class_enters_no_prefix_cache() {
    let mut setup = Setup::new("prefill-0");
    setup.numerics_class = "hash-other";
    let (prefill, decode) = (setup.start().await, Setup::new("decode-0").start().await);
    let state = warm(1, 40, 30);
    for n_handoffs in 1..=2 {
        let said = decode.generate(&state, Some(prefill.peer())).await;
        said.assert_as_alone(&state);
        assert_eq!(
            said.kv_bytes(),
            kv_bytes(3),
            "nothing of the first is found by the second"
        );
        let totals = decode.totals();
        assert_eq!((totals.n_other_numerics, totals.n_received), (n_handoffs, n_handoffs));
    }
    decode.settle().await;
    let cache = decode.service.engine().prefix_snapshot().await.unwrap();
    assert_eq!(cache, [PrefixEvent::Cleared]);
    assert_eq!(decode.totals().n_blocks_not_sent, 0);
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn a_first_token_that_ends_the_request_joins_nothing() {
    let (prefill, decode) = (
        Setup::new("prefill-0").start().await,
        Setup::new("decode-0").start().await,
    );
    let one = greedy(&prompt(4, 50), 1);
    let said = decode.generate(&one, Some(prefill.peer())).await;
    said.assert_as_alone(&one);
    assert_eq!(said.finish(), Finish::Length);
    let (tokens, _) = hash_model::alone(&greedy(&prompt(5, 50), 9), 1024);
    let mut stopping = greedy(&prompt(5, 50), 9);
    stopping.request.sampling.stop_token_ids = vec![tokens[0].id];
    let said = decode.generate(&stopping, Some(prefill.peer())).await;
    said.assert_as_alone(&stopping);
    assert_eq!(said.finish(), Finish::Stop(tokens[0].id));
    assert!(!said.moments.contains(&Moment::Joined));
    assert_eq!((decode.totals().n_received, decode.load().engine.n_joined), (0, 0));
    assert_eq!((decode.totals().n_failed, prefill.totals().n_sent), (0, 2));
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn a_final_first_token_voids_the_kv_that_was_owed() {
    let source = FakeSource::start(|request| {
        futures::stream::iter([
            frame(Frame::Accepted(accepted(&request))),
            frame(Frame::Kv(kv(&request, 0, 0, 1))),
            frame(first_token(9, Some(Finish::Stop(9)))),
            frame(ended(None)),
        ])
    })
    .await;
    let decode = Setup::new("decode-0").start().await;
    let said = decode.generate(&greedy(&prompt(1, 50), 9), Some(source.peer())).await;
    assert_eq!((said.finish(), said.tokens.len()), (Finish::Stop(9), 1));
    assert_eq!(said.kv_bytes(), kv_bytes(1) / 3);
    decode.stop().await;
}
