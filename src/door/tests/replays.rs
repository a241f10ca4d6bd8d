//! What ends a stream, and what the front door does then: replays, refusals, waits.

use std::time::Duration;

use baton_proto::cluster;
use baton_scheduler::arbiter::MAX_ATTEMPTS;
use baton_scheduler::ids::Nanos;
use baton_scheduler::request::{Failure, Finish};

use super::super::Rejection;
use super::fake_worker::{failed, finished, token};
use super::*;

/// The token indexes that a client got, and its terminal event.
async fn outcome(bench: &Bench, submission: Submission) -> (Vec<u32>, DoorEvent) {
    let mut stream = bench.door.submit(submission).await.expect("admitted");
    let (tokens, last) = rest(&mut stream).await;
    bench.assert_idle();
    (tokens.into_iter().map(|(_, index)| index).collect(), last)
}

#[tokio::test]
async fn a_broken_stream_is_replayed_from_the_tokens_delivered() {
    let answers = vec![
        (vec![token(0), token(1)], false),
        // The next instance repeats one token; the client must not see it twice.
        (vec![token(1), token(2), finished()], false),
    ];
    let bench = Bench::scripted(answers, FrontDoorOptions::default()).await;
    let (indexes, last) = outcome(&bench, submission(1, None)).await;
    assert_eq!(indexes, [0, 1, 2]);
    let DoorEvent::Ended { finish, usage, .. } = last else {
        panic!("{last:?}")
    };
    assert_eq!(
        (finish, usage.n_completion_tokens, usage.n_prompt_tokens),
        (Finish::Length, 3, 3)
    );
    let calls = bench.worker().calls.lock();
    let states: Vec<_> = calls.iter().map(|call| call.state.as_ref().expect("a state")).collect();
    assert_eq!(
        states.iter().map(|state| state.epoch).collect::<Vec<_>>(),
        [1, 2],
        "each attempt has a newer epoch"
    );
    let replayed: Vec<u32> = states[1].choices[0].output.iter().map(|token| token.id).collect();
    assert_eq!(replayed, [100, 101]);
    assert_eq!(states[0].sampling, states[1].sampling, "the resolved seed goes along");
}

#[tokio::test]
async fn a_skipped_token_is_an_error_and_never_a_success() {
    let bench = Bench::scripted(
        vec![(vec![token(0), token(2), finished()], false)],
        FrontDoorOptions::default(),
    )
    .await;
    let (indexes, last) = outcome(&bench, submission(1, None)).await;
    assert_eq!(indexes, [0]);
    assert!(matches!(last, DoorEvent::Failed(Failure::Internal(_))), "{last:?}");
}

#[tokio::test]
async fn three_losses_end_it_and_what_is_invalid_ends_it_at_once() {
    let lost = Failure::InstanceLost("gone".into());
    let bench_lost = Bench::scripted(vec![(vec![failed(&lost)], false); 3], FrontDoorOptions::default()).await;
    let (_, last) = outcome(&bench_lost, submission(1, None)).await;
    assert_eq!(last, DoorEvent::Failed(lost));
    assert_eq!(bench_lost.worker().calls.lock().len(), 3);

    let invalid = Failure::Invalid("token id 7, expected less than 5".into());
    let bench_invalid = Bench::scripted(vec![(vec![failed(&invalid)], false)], FrontDoorOptions::default()).await;
    let (_, last) = outcome(&bench_invalid, submission(1, None)).await;
    assert_eq!(last, DoorEvent::Failed(invalid));
}

/// The first event of a request to an instance that reports on and on that it has room.
async fn first_event_beside_reports(bench: &Bench, stream: &mut RequestStream) -> Option<DoorEvent> {
    let load = cluster::WorkerLoad {
        healthy: true,
        n_blocks_free: 64,
        ..cluster::WorkerLoad::default()
    };
    let report = cluster::WorkerReport {
        load: Some(load),
        ..cluster::WorkerReport::default()
    };
    let id = InstanceId::new("decode-0");
    loop {
        tokio::select! {
            event = stream.next() => return event,
            () = tokio::task::yield_now() => {
                bench.cluster.report(&id, baton_scheduler::ids::Incarnation(3), report.clone()).expect("a report");
            }
        }
    }
}

#[tokio::test]
async fn a_busy_instance_is_asked_again_only_after_it_reports_and_as_often_as_it_takes() {
    let busy = failed(&Failure::Busy("full".into()));
    let mut answers = vec![(vec![busy], false); 2 * MAX_ATTEMPTS as usize];
    answers.push((vec![token(0), finished()], false));
    let n_answers = answers.len();
    let bench = Bench::scripted(answers, FrontDoorOptions::default()).await;
    let mut stream = bench.door.submit(submission(1, None)).await.expect("admitted");
    let mut changes = bench.cluster.changes();
    // The refusal closes the placement, which is a change; nothing may be placed until the instance reports.
    while bench.worker().calls.lock().is_empty() || bench.door.load().n_queued > 0 {
        changes.changed().await.expect("the cluster is there");
    }
    assert_eq!(bench.worker().calls.lock().len(), 1);
    let first = first_event_beside_reports(&bench, &mut stream).await;
    assert!(matches!(first, Some(DoorEvent::Token { .. })), "{first:?}");
    assert_eq!(bench.worker().calls.lock().len(), n_answers);
}

#[tokio::test]
async fn refusals_without_end_end_with_the_wait_for_a_place() {
    let busy = failed(&Failure::Busy("full".into()));
    let options = FrontDoorOptions {
        max_queue_wait: Duration::from_millis(50),
        ..FrontDoorOptions::default()
    };
    let bench = Bench::scripted(vec![(vec![busy], false); 100_000], options).await;
    let mut stream = bench.door.submit(submission(1, None)).await.expect("admitted");
    let first = first_event_beside_reports(&bench, &mut stream).await;
    assert!(matches!(first, Some(DoorEvent::Failed(Failure::Busy(_)))), "{first:?}");
    assert!(bench.worker().calls.lock().len() > MAX_ATTEMPTS as usize);
    bench.assert_idle();
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_deadline_ends_the_wait() {
    // The instance takes two requests and keeps them; further ones wait, at most one of them.
    let keeps = || (vec![token(0)], true);
    let options = FrontDoorOptions {
        max_queue: 1,
        ..FrontDoorOptions::default()
    };
    let bench = Bench::scripted(vec![keeps(), keeps()], options).await;
    let mut held = Vec::new();
    for id in 0..2 {
        let mut stream = bench.door.submit(submission(id, None)).await.expect("admitted");
        assert!(matches!(stream.next().await, Some(DoorEvent::Token { .. })));
        held.push(stream);
    }
    let began = bench.door.now();
    let mut waiting = bench
        .door
        .submit(submission(2, Some(Duration::from_millis(80))))
        .await
        .expect("queued");
    let refused = bench
        .door
        .submit(submission(3, None))
        .await
        .expect_err("the queue is full");
    assert!(
        matches!(
            refused,
            Rejection::OverCapacity {
                limit: 1,
                n_queued: 1,
                ..
            }
        ),
        "{refused:?}"
    );
    assert_eq!(waiting.next().await, Some(DoorEvent::Failed(Failure::DeadlineExceeded)));
    assert!(bench.door.now().saturating_sub(began) >= Nanos::from_millis(80));
    assert_eq!(bench.door.load().n_queued, 0);

    // A client that leaves makes room for the next.
    bench
        .worker()
        .answers
        .lock()
        .push_back((vec![token(0), finished()], false));
    drop(held.pop());
    let (indexes, _) = outcome(&bench, submission(4, None)).await;
    assert_eq!(indexes, [0]);
}
