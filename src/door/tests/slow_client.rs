//! A client that reads nothing holds up neither the moves of its request nor its end.

use std::time::Duration;

use baton_scheduler::request::Failure;

use super::fake_worker::{finished, joined, moving, token};
use super::*;

/// More than the channel to a client holds.
const N_TOKENS: u32 = 400;

async fn unread(bench: &Bench, deadline: Option<Duration>) -> RequestStream {
    let mut long = submission(1, deadline);
    long.request.sampling.max_tokens = N_TOKENS;
    bench.door.submit(long).await.expect("admitted")
}

async fn until_heard(request: &OpenRequest, n_tokens: u32) {
    let heard = async {
        while request.progress().n_output_tokens < n_tokens {
            tokio::task::yield_now().await;
        }
    };
    soon("tokens heard", heard).await;
}

#[tokio::test]
async fn a_request_moves_though_its_client_reads_nothing() {
    let mut bench = Bench::new(&[64, 64], FrontDoorOptions::default()).await;
    let mut client = unread(&bench, None).await;
    let source = bench.generated().await;
    (0..350).for_each(|index| source.say(token(index)));
    until_heard(&bench.only_request(), 350).await;
    let order = bench.order(None);
    let destination = bench.attached().await;
    assert_eq!(destination.n_known(), [350]);
    source.say(moving());
    destination.say(joined());
    assert!(soon("the order's answer", order).await.expect("no panic").is_ok());
    source.closed().await;
    (350..N_TOKENS).for_each(|index| destination.say(token(index)));
    destination.say(finished());
    // What has ended holds nothing, read or not.
    destination.closed().await;
    bench.assert_idle();
    let (tokens, last) = rest(&mut client).await;
    assert_eq!(tokens, (0..N_TOKENS).map(|index| (0, index)).collect::<Vec<_>>());
    assert!(matches!(last, DoorEvent::Ended { .. }), "{last:?}");
}

#[tokio::test]
async fn a_client_that_reads_nothing_for_too_long_is_gone() {
    let options = FrontDoorOptions {
        client_stall: Duration::from_millis(100),
        ..FrontDoorOptions::default()
    };
    let mut bench = Bench::new(&[64], options).await;
    let client = unread(&bench, None).await;
    let source = bench.generated().await;
    (0..N_TOKENS).for_each(|index| source.say(token(index)));
    source.closed().await;
    soon("the end", bench.door.drained()).await;
    bench.assert_idle();
    drop(client);
}

#[tokio::test]
async fn a_deadline_passes_though_the_client_reads_nothing() {
    let mut bench = Bench::new(&[64], FrontDoorOptions::default()).await;
    let mut client = unread(&bench, Some(Duration::from_millis(300))).await;
    let source = bench.generated().await;
    (0..N_TOKENS).for_each(|index| source.say(token(index)));
    source.closed().await;
    let (tokens, last) = rest(&mut client).await;
    assert_eq!(tokens, (0..N_TOKENS).map(|index| (0, index)).collect::<Vec<_>>());
    assert_eq!(last, DoorEvent::Failed(Failure::DeadlineExceeded));
}
