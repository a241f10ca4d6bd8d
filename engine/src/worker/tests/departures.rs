//! Destinations and front doors that go away, at every point of a request's life: both sides free what they held.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use baton_proto::cluster::{self, generate_event::Event, transfer_frame::Frame, worker_client::WorkerClient};
use baton_scheduler::timeline::Moment;
use futures::StreamExt;
use futures::stream;
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::super::WorkerOptions;
use super::cluster::*;

async fn transfer_frames(
    mut client: WorkerClient<Channel>,
    request: cluster::PrefillRequest,
) -> Streaming<cluster::TransferFrame> {
    client.prefill(request).await.unwrap().into_inner()
}

/// A client whose connection takes a few bytes more than it has read.
async fn slow_reader(address: &str) -> WorkerClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = endpoint.initial_stream_window_size(16).connect().await.unwrap();
    WorkerClient::new(channel)
}

fn with_stall_deadline(name: &'static str, stall_deadline: Duration) -> Setup {
    let mut setup = Setup::new(name);
    setup.options = WorkerOptions {
        stall_deadline,
        heartbeat: stall_deadline / 4,
        ..WorkerOptions::default()
    };
    setup
}

#[tokio::test]
async fn a_destination_that_goes_away_frees_the_source() {
    let (prefill, permits) = Setup::new("prefill-0").start_gated().await;
    // Before the first step, and after some of the frames.
    for n_frames in [1, 3] {
        let state = greedy(&prompt(n_frames, 900), 9);
        let mut stream = transfer_frames(prefill.client(), prefill.prefill_request(&state)).await;
        let mut n_heard = 0;
        while n_heard < n_frames {
            if n_heard == 1 {
                permits.send(()).unwrap();
            }
            let heard = timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
            n_heard += u32::from(matches!(heard.frame, Some(Frame::Accepted(_) | Frame::Kv(_))));
        }
        drop(stream);
        // The step that waits at the gate is the last one in which it may be.
        prefill.until("idle", Instance::is_idle).await;
        permits.send(()).unwrap();
        prefill.settle().await;
        let totals = prefill.totals();
        assert_eq!((totals.n_failed, totals.n_sent), (0, 0), "nobody wanted it any more");
    }
    assert_eq!(prefill.load().engine.n_cancelled, 2);
    drop(permits);
    prefill.stop().await;
}

#[tokio::test]
async fn a_destination_that_stops_reading_is_given_up() {
    let stall_deadline = Duration::from_millis(300);
    let prefill = with_stall_deadline("prefill-0", stall_deadline).start().await;
    let request = prefill.prefill_request(&greedy(&prompt(1, 500), 9));
    let mut stream = transfer_frames(slow_reader(&prefill.address).await, request).await;
    prefill.until("failed", |prefill| prefill.totals().n_failed == 1).await;
    prefill.settle().await;
    let totals = prefill.totals();
    assert!(totals.bytes_sent < kv_bytes(32), "{totals:?}");
    assert_eq!(totals.n_sent, 0);
    // What was on the way still comes, and then the stream ends without a typed end.
    let rest = async {
        while let Some(frame) = stream.message().await.unwrap() {
            assert!(!matches!(frame.frame, Some(Frame::Ended(_))));
        }
    };
    timeout(PATIENCE, rest).await.unwrap();
    drop(stream);
    prefill.stop().await;
}

#[tokio::test]
async fn a_front_door_that_stops_reading_is_given_up() {
    let stall_deadline = Duration::from_millis(300);
    let decode = with_stall_deadline("decode-0", stall_deadline).start().await;
    let request = decode.request(&greedy(&prompt(1, 20), 900), None);
    let mut client = slow_reader(&decode.address).await;
    let mut stream = client.generate(request).await.unwrap().into_inner();
    decode.until("called", |decode| !decode.is_idle()).await;
    // The engine buffers all tokens, so the sequence may have ended long before.
    decode.settle().await;
    let rest = async {
        while let Some(event) = stream.message().await.unwrap() {
            assert!(!matches!(event.event, Some(Event::Ended(_))), "it did not hear the end");
        }
    };
    timeout(PATIENCE, rest).await.unwrap();
    drop((stream, client));
    decode.stop().await;
}

#[tokio::test]
async fn a_front_door_that_leaves_before_the_reservation_is_forgotten() {
    let decode = Setup::new("decode-0").start().await;
    let source = FakeSource::start(|request| {
        stream::iter([frame(Frame::Accepted(accepted(&request)))]).chain(stream::pending())
    })
    .await;
    let state = greedy(&prompt(1, 40), 9);
    let mut first = decode.open(decode.request(&state, Some(source.peer()))).await;
    hear(&mut first, is_moment(Moment::Reserved)).await;
    // The second waits for the prefix that the first is about to bring.
    let second = decode.open(decode.request(&state, Some(source.peer()))).await;
    decode
        .until("deferred", |decode| decode.load().scheduler.n_deferrals == 1)
        .await;
    drop(second);
    decode
        .until("cancelled", |decode| decode.load().engine.n_cancelled == 1)
        .await;
    assert_eq!(decode.load().batch.n_reserved, 1);
    drop(first);
    decode.settle().await;
    decode.until("closed", |_| source.n_open.load(SeqCst) == 0).await;
    assert_eq!((source.n_calls.load(SeqCst), decode.totals().n_received), (1, 0));
    decode.stop().await;
}

#[tokio::test]
async fn a_front_door_that_leaves_while_the_source_does_not_answer_is_forgotten() {
    let decode = Setup::new("decode-0").start().await;
    let source = FakeSource::silent().await;
    let mut stream = decode
        .open(decode.request(&greedy(&prompt(1, 40), 9), Some(source.peer())))
        .await;
    hear(&mut stream, is_moment(Moment::Reserved)).await;
    decode.until("called", |_| source.n_open.load(SeqCst) == 1).await;
    drop(stream);
    decode.settle().await;
    decode.until("closed", |_| source.n_open.load(SeqCst) == 0).await;
    decode.stop().await;
}

#[tokio::test]
async fn a_front_door_that_leaves_during_the_transfer_frees_both() {
    let (prefill, permits) = Setup::new("prefill-0").start_gated().await;
    let decode = Setup::new("decode-0").start().await;
    let mut stream = decode
        .open(decode.request(&greedy(&prompt(1, 200), 9), Some(prefill.peer())))
        .await;
    permits.send(()).unwrap();
    hear(&mut stream, is_moment(Moment::TransferStarted)).await;
    drop(stream);
    decode.settle().await;
    permits.send(()).unwrap();
    prefill.settle().await;
    drop(permits);
    assert_eq!(prefill.load().engine.n_cancelled, 1);
    assert_eq!((decode.totals().n_received, decode.totals().n_failed), (0, 0));
    assert!(decode.totals().bytes_received < kv_bytes(13));
    stop([decode, prefill]).await;
}

#[tokio::test]
async fn a_front_door_that_leaves_while_tokens_are_decoded_frees_at_once() {
    let prefill = Setup::new("prefill-0").start().await;
    let (decode, permits) = Setup::new("decode-0").start_gated().await;
    // A local prompt's first step gives token 0; after a handoff it gives token 1.
    for (source, last_index) in [(Some(prefill.peer()), 2), (None, 1)] {
        let before = decode.load().engine;
        let mut stream = decode.open(decode.request(&greedy(&prompt(1, 40), 900), source)).await;
        permits.send(()).unwrap();
        permits.send(()).unwrap();
        hear(
            &mut stream,
            |event| matches!(event, Event::Token(token) if token.index == last_index),
        )
        .await;
        // No token comes meanwhile that could tell the instance that nobody hears it.
        drop(stream);
        decode.until("idle", Instance::is_idle).await;
        // The step that waits at the gate is the last one that it is in.
        permits.send(()).unwrap();
        decode.settle().await;
        let after = decode.load().engine;
        assert_eq!(after.n_cancelled, before.n_cancelled + 1);
        assert_eq!(after.n_steps, before.n_steps + 3);
    }
    drop(permits);
    stop([decode, prefill]).await;
}
