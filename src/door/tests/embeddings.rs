//! Embeddings: one call where the prompt is best computed, asked again elsewhere when it is lost, and given up with its client.

use std::time::Duration;

use baton_scheduler::request::{Failure, Request};

use super::super::{EmbedError, MoveError, MoveReason, Rejection, RequestStage};
use super::*;

fn to_embed(id: u128, n_tokens: u32, deadline: Option<Duration>) -> Submission {
    Submission {
        request: Request::to_embed(RequestId(id), (0..n_tokens).collect(), 7),
        ..submission(id, deadline)
    }
}

fn embed(bench: &Bench, submission: Submission) -> JoinHandle<Result<Vec<f32>, EmbedError>> {
    let door = bench.door.clone();
    tokio::spawn(async move { door.embed(submission).await })
}

#[tokio::test]
async fn what_an_instance_answers_is_passed_on() {
    let mut bench = Bench::new(&[64], FrontDoorOptions::default()).await;
    let embedding = embed(&bench, to_embed(5, 3, None));
    let call = bench.embedded().await;
    assert_eq!(
        (&*call.request.prompt_ids, call.request.cache_salt),
        (&[0, 1, 2][..], 7)
    );
    assert_eq!(bench.door.load().n_running, 1);
    let listed = bench.door.requests().all();
    let progress = listed[0].progress();
    assert_eq!(progress.stage, RequestStage::Embed);
    assert_eq!(progress.prefill.unwrap().to_string(), call.instance);
    let moved = listed[0].move_to(None, MoveReason::Operator).await;
    assert_eq!(moved, Err(MoveError::Refused("an embedding does not move".to_owned())));
    call.answer(Ok(vec![1.5, -2.5]));
    assert_eq!(embedding.await.unwrap(), Ok(vec![1.5, -2.5]));
    assert!(bench.door.requests().all().is_empty());
    assert_eq!(bench.door.load().n_running, 0);
    bench.assert_idle();
}

#[tokio::test]
async fn it_is_computed_where_prompts_are_and_never_by_a_peer_of_version_1() {
    let mut bench = Bench::new(&[64], FrontDoorOptions::default()).await;
    bench.add("prefill-0", "prefill", baton_proto::PROTOCOL_VERSION).await;
    bench.add("prefill-old", "prefill", 1).await;
    let cluster = Arc::new(Cluster::new(
        policy("least-loaded", Disaggregation::ALWAYS).unwrap(),
        LinkOptions::default(),
    ));
    for worker in bench.workers.values() {
        let role = worker.name().split('-').next().unwrap();
        let protocol_version = if worker.name().ends_with("old") { 1 } else { 2 };
        let join = cluster::WorkerJoin {
            protocol_version,
            ..join_of(worker, role).await
        };
        cluster.join(join).unwrap();
    }
    bench.door = FrontDoor::new(Arc::clone(&cluster), FrontDoorOptions::default());
    for id in 0..4 {
        let embedding = embed(&bench, to_embed(id, 100, None));
        let call = bench.embedded().await;
        assert_eq!(call.instance, "prefill-0");
        call.answer(Ok(vec![1.0]));
        assert!(embedding.await.unwrap().is_ok());
    }
}

#[tokio::test]
async fn what_is_lost_or_refused_is_asked_elsewhere_three_times_in_all() {
    let mut bench = Bench::new(&[64, 64, 64], FrontDoorOptions::default()).await;
    let embedding = embed(&bench, to_embed(1, 3, None));
    let dies = bench.embedded().await;
    let first = dies.instance.clone();
    drop(dies);
    let busy = bench.embedded().await;
    let second = busy.instance.clone();
    busy.answer(Err(Failure::Busy("full".into())));
    let third = bench.embedded().await;
    assert!(third.instance != first && third.instance != second && first != second);
    third.answer(Ok(vec![2.0]));
    assert_eq!(embedding.await.unwrap(), Ok(vec![2.0]));
    assert_eq!(bench.door.move_metrics().replays.get(), 2);

    let lost = embed(&bench, to_embed(2, 3, None));
    for _ in 0..3 {
        // A cancel that nobody asked for is a loss too.
        bench.embedded().await.answer(Err(Failure::Cancelled));
    }
    let Err(EmbedError::Failed(Failure::InstanceLost(_))) = lost.await.unwrap() else {
        panic!("it was lost three times")
    };
    let invalid = embed(&bench, to_embed(3, 3, None));
    bench.embedded().await.answer(Err(Failure::Invalid("no".into())));
    assert_eq!(invalid.await.unwrap(), Err(Failure::Invalid("no".into()).into()));
    bench.assert_idle();
}

#[tokio::test]
async fn a_client_that_leaves_and_a_deadline_give_the_call_up() {
    let mut bench = Bench::new(&[64], FrontDoorOptions::default()).await;
    let leaves = embed(&bench, to_embed(1, 3, None));
    let call = bench.embedded().await;
    leaves.abort();
    call.given_up().await;
    let late = embed(&bench, to_embed(2, 3, Some(Duration::from_millis(50))));
    let call = bench.embedded().await;
    assert_eq!(late.await.unwrap(), Err(Failure::DeadlineExceeded.into()));
    call.given_up().await;
    bench.assert_idle();
}

#[tokio::test]
async fn the_queue_is_bounded_for_it_too_and_what_can_never_fit_is_refused() {
    let options = FrontDoorOptions {
        max_queue: 1,
        ..FrontDoorOptions::default()
    };
    // Two sequences at once, and one that waits.
    let mut bench = Bench::new(&[4], options).await;
    let running: Vec<_> = (0..2).map(|id| embed(&bench, to_embed(id, 3, None))).collect();
    let calls = [bench.embedded().await, bench.embedded().await];
    let waiting = embed(&bench, to_embed(2, 3, None));
    while bench.door.load().n_queued == 0 {
        tokio::task::yield_now().await;
    }
    match bench.door.embed(to_embed(3, 3, None)).await {
        Err(EmbedError::Rejected(Rejection::OverCapacity { limit: 1, .. })) => {}
        other => panic!("{other:?}"),
    }
    calls.into_iter().for_each(|call| call.answer(Ok(vec![1.0])));
    for embedding in running {
        assert!(embedding.await.unwrap().is_ok());
    }
    bench.embedded().await.answer(Ok(vec![3.0]));
    assert_eq!(waiting.await.unwrap(), Ok(vec![3.0]));
    // All of the cache: an embedding has no token to come after it.
    let longest = embed(&bench, to_embed(4, 64, None));
    bench.embedded().await.answer(Ok(vec![4.0]));
    assert!(longest.await.unwrap().is_ok());
    match bench.door.embed(to_embed(5, 65, None)).await {
        Err(EmbedError::Rejected(Rejection::Invalid(message))) => assert!(message.contains("at most 64"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_drain_waits_for_it_and_then_nothing_is_taken() {
    let mut bench = Bench::new(&[64], FrontDoorOptions::default()).await;
    let embedding = embed(&bench, to_embed(1, 3, None));
    let call = bench.embedded().await;
    let door = bench.door.clone();
    let mut drained = tokio::spawn(async move { door.drained().await });
    assert!(futures::poll!(&mut drained).is_pending());
    call.answer(Ok(vec![1.0]));
    assert!(embedding.await.unwrap().is_ok());
    soon("the drain", drained).await.unwrap();
    let refused = bench.door.embed(to_embed(2, 3, None)).await;
    assert!(
        matches!(refused, Err(EmbedError::Rejected(Rejection::Unavailable(_)))),
        "{refused:?}"
    );
}
