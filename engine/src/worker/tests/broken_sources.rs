//! Sources that break their stream or the protocol in the middle of a transfer. The request ends as lost, the source is
//! blamed, its stream is closed, and every block is free again.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use baton_proto::cluster::{self, transfer_frame::Frame};
use baton_scheduler::request::{Failure, Finish};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::time::Instant;
use tonic::Status;

use super::super::WorkerOptions;
use super::cluster::*;

/// Blocks of the prompt in these tests.
const N_PROMPT_BLOCKS: usize = 4;

async fn decode(progress_deadline: Duration) -> Instance {
    let mut setup = Setup::new("decode-0");
    setup.options = WorkerOptions {
        progress_deadline,
        ..WorkerOptions::default()
    };
    setup.start().await
}

/// Offers a request to a scripted source and asserts that it fails on it with these words, leaving nothing behind.
/// Returns what was said before.
async fn assert_lost(decode: &Instance, source: &FakeSource, words: &str) -> Said {
    let before = decode.totals();
    let n_blocks_free = decode.load().batch.ledger.free;
    let state = greedy(&prompt(1, N_PROMPT_BLOCKS * BLOCK_SIZE - 3), 9);
    let said = decode.generate(&state, Some(source.peer())).await;
    let (failure, blamed) = said.failure();
    assert!(matches!(failure, Failure::InstanceLost(_)), "{failure:?}");
    assert!(failure.to_string().contains(words), "{failure}, expected {words}");
    assert_eq!(blamed, "fake-0");
    decode.settle().await;
    decode.until("closed", |_| source.n_open.load(SeqCst) == 0).await;
    let after = decode.totals();
    assert_eq!(after.n_failed, before.n_failed + 1);
    assert_eq!(after.n_received, before.n_received);
    assert_eq!(after.bytes_received - before.bytes_received, said.kv_bytes());
    // Nothing that came from it serves anyone.
    assert_eq!(decode.load().batch.ledger.free, n_blocks_free);
    said
}

/// The answer and layer 0, then what the test makes of it, then silence.
fn opening(request: &cluster::PrefillRequest) -> Vec<FrameResult> {
    vec![
        frame(Frame::Accepted(accepted(request))),
        frame(Frame::Kv(kv(request, 0, 0, N_PROMPT_BLOCKS as u32))),
    ]
}

fn then_silence(frames: Vec<FrameResult>) -> BoxStream<'static, FrameResult> {
    stream::iter(frames).chain(stream::pending()).boxed()
}

type Break = fn(&cluster::PrefillRequest) -> BoxStream<'static, FrameResult>;

/// How the stream goes on, words of the failure, frames refused, (layer, block) pairs that landed.
const BREAKS: &[(Break, &str, u64, usize)] = &[
    (
        |request| {
            let mut frames = opening(request);
            frames.push(Err(Status::aborted("pulled the plug")));
            stream::iter(frames).boxed()
        },
        "pulled the plug",
        0,
        4,
    ),
    (|request| stream::iter(opening(request)).boxed(), "no typed end", 0, 4),
    (|_| stream::empty().boxed(), "no typed end", 0, 0),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(ended(None)));
            then_silence(frames)
        },
        "ended the transfer with 8 layer blocks owed, token owed",
        0,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frames[1].clone());
            then_silence(frames)
        },
        "KV frame out of order: choice 0, layer 0, blocks 0..4",
        1,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(Frame::Kv(kv(request, 1, 1, 1))));
            then_silence(frames)
        },
        "KV frame out of order: choice 0, layer 1, blocks 1..2, expected Some(0)",
        1,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(Frame::Kv(kv(request, 1, 0, 5))));
            then_silence(frames)
        },
        "layer 1, blocks 0..5",
        1,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(Frame::Kv(kv(request, 3, 0, 4))));
            then_silence(frames)
        },
        "layer 3, blocks 0..4, expected None",
        1,
        4,
    ),
    (
        |request| {
            let far = cluster::KvFrame {
                n_blocks: u32::MAX,
                ..kv(request, 1, 0, 1)
            };
            let mut frames = opening(request);
            frames.push(frame(Frame::Kv(far)));
            then_silence(frames)
        },
        "layer 1, blocks 0..4294967295",
        1,
        4,
    ),
    (
        |request| {
            let short = cluster::KvFrame {
                data: vec![0; 3].into(),
                ..kv(request, 1, 0, 2)
            };
            let mut frames = opening(request);
            frames.push(frame(Frame::Kv(short)));
            then_silence(frames)
        },
        "KV frame of layer 1 has 3 bytes, expected 512",
        1,
        4,
    ),
    // The wrong size may also be that of the frame that would complete the transfer.
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(first_token(5, None)));
            frames.push(frame(Frame::Kv(kv(request, 1, 0, 4))));
            let last = cluster::KvFrame {
                data: vec![0; 1025].into(),
                ..kv(request, 2, 0, 4)
            };
            frames.push(frame(Frame::Kv(last)));
            then_silence(frames)
        },
        "KV frame of layer 2 has 1025 bytes, expected 1024",
        1,
        8,
    ),
    (
        |request| then_silence(vec![frame(Frame::Kv(kv(request, 0, 0, 4)))]),
        "KV frame out of order: choice 0, layer 0",
        1,
        0,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.extend([frame(first_token(5, None)), frame(first_token(5, None))]);
            then_silence(frames)
        },
        "first tokens came twice",
        0,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(Frame::FirstToken(cluster::FirstToken::default())));
            then_silence(frames)
        },
        "a first token without a token",
        0,
        4,
    ),
    (
        |request| {
            let Frame::FirstToken(first) = first_token(5, Some(Finish::Length)) else {
                unreachable!("made as a first token");
            };
            let nameless = cluster::FirstToken {
                finish: Some(cluster::Finish { reason: None }),
                ..first
            };
            let mut frames = opening(request);
            frames.push(frame(Frame::FirstToken(nameless)));
            then_silence(frames)
        },
        "field finish.reason is missing",
        0,
        4,
    ),
    (
        |request| {
            let mut frames = opening(request);
            frames.push(frame(first_token(48, None)));
            then_silence(frames)
        },
        "the first token of choice 0 is id 48 with index 0",
        0,
        4,
    ),
    (
        |request| {
            let Frame::FirstToken(mut first) = first_token(5, None) else {
                unreachable!("made as a first token");
            };
            first.token.as_mut().unwrap().index = 1;
            let mut frames = opening(request);
            frames.push(frame(Frame::FirstToken(first)));
            then_silence(frames)
        },
        "the first token of choice 0 is id 5 with index 1",
        0,
        4,
    ),
];

#[tokio::test]
async fn a_stream_that_breaks_loses_its_source_and_nothing_else() {
    let decode = decode(PATIENCE).await;
    for (how, words, n_refused, n_landed) in BREAKS {
        let source = FakeSource::start(|request| how(&request)).await;
        let n_refused_before = decode.totals().n_frames_refused;
        let said = assert_lost(&decode, &source, words).await;
        assert_eq!(
            decode.totals().n_frames_refused - n_refused_before,
            *n_refused,
            "{words}"
        );
        assert_eq!(said.kv_bytes(), kv_bytes(*n_landed) / 3, "{words}");
        assert!(
            said.tokens.iter().all(|token| (token.id, token.index) == (5, 0)),
            "{words}"
        );
        assert_eq!(source.n_calls.load(SeqCst), 1);
    }
    decode.stop().await;
}

#[tokio::test]
async fn a_typed_failure_of_the_source_is_passed_on() {
    let decode = decode(PATIENCE).await;
    for failure in [
        Failure::Busy("no room to run".to_owned()),
        Failure::Internal("logits are NaN".to_owned()),
        Failure::InstanceLost("the instance is stopping".to_owned()),
    ] {
        let sent = failure.clone();
        let source = FakeSource::start(move |request| {
            let mut frames = opening(&request);
            frames.push(frame(ended(Some(&sent))));
            then_silence(frames)
        })
        .await;
        let said = decode.generate(&greedy(&prompt(1, 61), 9), Some(source.peer())).await;
        assert_eq!(said.failure(), (failure, "fake-0".to_owned()));
        decode.until("closed", |_| source.n_open.load(SeqCst) == 0).await;
    }
    decode.stop().await;
}

#[tokio::test]
async fn a_frame_of_another_transfer_lands_nowhere() {
    let source = FakeSource::start(|request| {
        let foreign = cluster::KvFrame {
            transfer_id: request.transfer_id ^ 1,
            ..kv(&request, 1, 0, 4)
        };
        let mut frames = opening(&request);
        frames.extend([frame(Frame::Kv(foreign)), frame(ended(None))]);
        then_silence(frames)
    })
    .await;
    let decode = decode(PATIENCE).await;
    let said = assert_lost(&decode, &source, "8 layer blocks owed").await;
    assert_eq!(said.kv_bytes(), kv_bytes(4) / 3);
    assert_eq!(decode.totals().n_frames_refused, 1);
    decode.stop().await;
}

#[tokio::test]
async fn a_frame_of_a_newer_protocol_is_ignored() {
    let state = greedy(&prompt(1, 16), 2);
    let source = FakeSource::start(|request| {
        let mut frames = vec![
            frame(Frame::Accepted(accepted(&request))),
            Ok(cluster::TransferFrame { frame: None }),
            frame(first_token(5, None)),
        ];
        frames.extend((0..3).map(|layer| frame(Frame::Kv(kv(&request, layer, 0, 1)))));
        frames.push(frame(ended(None)));
        stream::iter(frames)
    })
    .await;
    let decode = decode(PATIENCE).await;
    let said = decode.generate(&state, Some(source.peer())).await;
    assert_eq!((said.finish(), said.tokens.len()), (Finish::Length, 2));
    decode.stop().await;
}

#[tokio::test]
async fn a_source_that_breaks_after_the_join_is_not_missed() {
    let decode = decode(PATIENCE).await;
    let source = FakeSource::start(|request| {
        let mut frames = vec![frame(Frame::Accepted(accepted(&request))), frame(first_token(5, None))];
        frames.extend((0..3).map(|layer| frame(Frame::Kv(kv(&request, layer, 0, 2)))));
        frames.push(Err(Status::aborted("pulled the plug")));
        stream::iter(frames)
    })
    .await;
    let said = decode.generate(&greedy(&prompt(1, 20), 30), Some(source.peer())).await;
    assert_eq!((said.finish(), said.tokens.len()), (Finish::Length, 30));
    assert_eq!((decode.totals().n_received, decode.totals().n_failed), (1, 0));
    decode.stop().await;
}

/// Short, because it passes in full; long against a busy machine's delays.
const DEADLINE: Duration = Duration::from_millis(400);

#[tokio::test]
async fn silence_is_lost_at_the_progress_deadline() {
    let decode = decode(DEADLINE).await;
    let unanswering = FakeSource::silent().await;
    let stalled = FakeSource::start(|request| then_silence(opening(&request))).await;
    // It lives, and its step loop hangs.
    let hung = FakeSource::start(|request| {
        let mut ticks = tokio::time::interval(DEADLINE / 20);
        let heartbeats = stream::poll_fn(move |context| ticks.poll_tick(context).map(Some))
            .map(|_| frame(Frame::Progress(cluster::Progress { n_steps: 7 })));
        stream::iter(opening(&request)).chain(heartbeats)
    })
    .await;
    for (source, words) in [
        (unanswering, "no answer to the call"),
        (stalled, "no progress from the source for 0.4 s"),
        (hung, "no progress from the source for 0.4 s"),
    ] {
        let began = Instant::now();
        assert_lost(&decode, &source, words).await;
        assert!(began.elapsed() >= DEADLINE, "{words}");
    }
    decode.stop().await;
}

#[tokio::test]
async fn steps_of_the_source_hold_the_deadline_off() {
    let decode = decode(DEADLINE).await;
    let source = FakeSource::start(|request| {
        let mut ticks = tokio::time::interval(DEADLINE / 8);
        // Twice the deadline.
        let heartbeats = stream::poll_fn(move |context| ticks.poll_tick(context).map(Some))
            .take(16)
            .enumerate()
            .map(|(i, _)| {
                let n_steps = 1 + i as u64;
                frame(Frame::Progress(cluster::Progress { n_steps }))
            });
        let last = stream::iter([Err(Status::aborted("at last"))]);
        stream::iter(opening(&request)).chain(heartbeats).chain(last)
    })
    .await;
    assert_lost(&decode, &source, "at last").await;
    decode.stop().await;
}
