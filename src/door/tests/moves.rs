//! Each way a move can go, told by the instances of both sides: what the client gets, who is told what, and what is counted.

use std::time::Duration;

use baton_scheduler::request::{Failure, Finish};
use tonic::Status;

use super::fake_worker::{Words, choice_finished, failed, finished, joined, move_cancelled, moving, token, token_of};
use super::*;

/// A move's deadline in tests that wait for it to pass.
const SHORT: Duration = Duration::from_millis(50);

fn with_move_deadline(move_deadline: Duration) -> FrontDoorOptions {
    FrontDoorOptions {
        move_deadline,
        ..FrontDoorOptions::default()
    }
}

fn patient() -> FrontDoorOptions {
    with_move_deadline(PATIENCE)
}

/// A request that moves: its client has two tokens, the source decodes, the destination is attached.
struct Moving {
    bench: Bench,
    client: RequestStream,
    source: Words,
    destination: Words,
    order: JoinHandle<Result<Moved, MoveError>>,
}

async fn next_token(client: &mut RequestStream) -> u32 {
    match soon("a token", client.next()).await {
        Some(DoorEvent::Token { token, .. }) => token.index,
        other => panic!("{other:?} where a token was due"),
    }
}

async fn begin(options: FrontDoorOptions) -> Moving {
    begin_within(options, None).await
}

async fn begin_within(options: FrontDoorOptions, deadline: Option<Duration>) -> Moving {
    let mut bench = Bench::new(&[64, 64], options).await;
    let mut client = bench.door.submit(submission(1, deadline)).await.expect("admitted");
    let source = bench.generated().await;
    for index in 0..2 {
        source.say(token(index));
        assert_eq!(next_token(&mut client).await, index);
    }
    let order = bench.order(None);
    let destination = bench.attached().await;
    assert_ne!(destination.instance, source.instance);
    let named = destination.source.as_ref().expect("a source");
    assert_eq!(named.instance_id, source.instance, "the source is named");
    assert_eq!((source.epoch(), destination.epoch()), (1, 2));
    assert_eq!(destination.n_known(), [2]);
    Moving {
        bench,
        client,
        source,
        destination,
        order,
    }
}

impl Moving {
    /// The source has paused, as far as the front door has heard: the token it said before came.
    async fn pauses(&mut self) {
        self.source.say(moving());
        self.source.say(token(2));
        assert_eq!(next_token(&mut self.client).await, 2);
    }

    async fn ends_with(&mut self, indexes: impl IntoIterator<Item = u32>) {
        let (tokens, last) = rest(&mut self.client).await;
        let expected: Vec<(u32, u32)> = indexes.into_iter().map(|index| (0, index)).collect();
        assert_eq!(tokens, expected);
        assert!(
            matches!(
                last,
                DoorEvent::Ended {
                    finish: Finish::Length,
                    ..
                }
            ),
            "{last:?}"
        );
        self.bench.assert_idle();
    }

    async fn reason_of_failure(&mut self) -> String {
        let answer = soon("the order's answer", &mut self.order).await.expect("no panic");
        match answer {
            Err(MoveError::Failed { to, reason }) => {
                assert_eq!(to.to_string(), self.destination.instance);
                assert_eq!(self.bench.n_moves("failed"), 1);
                reason
            }
            other => panic!("{other:?} where the move was to fail"),
        }
    }

    /// The source is told to go on after its tokens up to `n_known`, and does, to the end.
    async fn goes_on_at_the_source(&mut self, n_known: u32) {
        let resume = self.bench.resumed().await;
        assert_eq!(resume.instance, self.source.instance);
        assert_eq!((resume.request.epoch, &resume.request.next_index), (3, &vec![n_known]));
        resume.answer(Ok(None));
        for event in [token(n_known), token(n_known + 1), finished()] {
            self.source.say_in(3, event);
        }
        self.ends_with(n_known..n_known + 2).await;
        assert_eq!(self.bench.door.move_metrics().replays.get(), 0);
    }

    /// The request is generated again, in `epoch`, after the `n_known` tokens that the client has.
    async fn is_replayed(&mut self, epoch: u32, n_known: u32) {
        let replay = self.bench.generated().await;
        assert_eq!((replay.epoch(), replay.n_known()), (epoch, vec![n_known as usize]));
        for event in [token(n_known), finished()] {
            replay.say(event);
        }
        self.ends_with([n_known]).await;
        assert_eq!(self.bench.door.move_metrics().replays.get(), 1);
    }
}

#[tokio::test]
async fn a_settled_move_gives_the_tokens_of_both_streams_once_and_in_order() {
    let mut it = begin(patient()).await;
    it.pauses().await;
    // It knew two tokens when it was attached, so it says the third again.
    for event in [joined(), token(2), token(3), token(4)] {
        it.destination.say(event);
    }
    let moved = soon("the order's answer", &mut it.order)
        .await
        .expect("no panic")
        .expect("moved");
    assert_eq!(moved.from.to_string(), it.source.instance);
    assert_eq!(moved.to.to_string(), it.destination.instance);
    it.source.closed().await;
    assert_eq!(it.bench.only_request().progress().n_moves, 1);
    it.destination.say(finished());
    it.ends_with([3, 4]).await;
    let metrics = it.bench.door.move_metrics();
    assert_eq!(
        (it.bench.n_moves("settled"), metrics.stale.get(), metrics.replays.get()),
        (1, 1, 0)
    );
}

#[tokio::test]
async fn a_token_of_the_destination_settles_the_move_as_its_word_does() {
    let mut it = begin(patient()).await;
    it.destination.say(token(2));
    it.source.closed().await;
    it.destination.say(finished());
    it.ends_with([2]).await;
    assert_eq!(it.bench.n_moves("settled"), 1);
}

#[tokio::test]
async fn what_the_source_says_late_is_not_heard() {
    let mut it = begin(patient()).await;
    // On its way when the move settles: heard before it, or never; the destination says it in any case.
    it.source.say(token(2));
    it.destination.say(joined());
    it.source.closed().await;
    it.source.say(token(3));
    it.source
        .say(failed(&Failure::Internal("of a stream that nobody has".into())));
    for event in [token(2), token(3), finished()] {
        it.destination.say(event);
    }
    it.ends_with([2, 3]).await;
}

#[tokio::test]
async fn a_busy_destination_leaves_the_request_at_its_source() {
    let mut it = begin(patient()).await;
    it.destination.say(failed(&Failure::Busy("no blocks".into())));
    assert!(it.reason_of_failure().await.contains("no blocks"));
    it.goes_on_at_the_source(2).await;
}

#[tokio::test]
async fn a_move_that_the_source_cancels_before_it_pauses_is_off() {
    let mut it = begin(patient()).await;
    it.source.say(move_cancelled(&Failure::Busy("too long".into())));
    assert!(it.reason_of_failure().await.contains("too long"));
    it.destination.closed().await;
    it.goes_on_at_the_source(2).await;
}

#[tokio::test]
async fn a_move_that_the_source_cancels_after_it_pauses_is_off() {
    let mut it = begin(patient()).await;
    it.pauses().await;
    it.source.say(move_cancelled(&Failure::InstanceLost("stuck".into())));
    assert!(it.reason_of_failure().await.contains("stuck"));
    it.destination.closed().await;
    it.goes_on_at_the_source(3).await;
}

#[tokio::test]
async fn a_source_goes_on_when_its_destination_dies() {
    let mut it = begin(patient()).await;
    it.pauses().await;
    it.destination.die();
    it.goes_on_at_the_source(3).await;
    assert_eq!(it.bench.n_moves("failed"), 1);
}

#[tokio::test]
async fn a_source_goes_on_when_its_destination_says_nothing_in_time() {
    let mut it = begin(with_move_deadline(SHORT)).await;
    it.pauses().await;
    assert!(it.reason_of_failure().await.contains("in time"));
    it.destination.closed().await;
    it.goes_on_at_the_source(3).await;
}

#[tokio::test]
async fn a_source_that_has_ended_before_it_is_told_to_go_on_is_heard_to_the_end() {
    let mut it = begin(patient()).await;
    it.destination.say(failed(&Failure::Busy("no blocks".into())));
    let resume = it.bench.resumed().await;
    resume.answer(Ok(Some(Failure::InstanceLost("the request is not open here".into()))));
    for event in [token(2), finished()] {
        it.source.say(event);
    }
    it.ends_with([2]).await;
    assert_eq!(it.bench.door.move_metrics().replays.get(), 0);
}

#[tokio::test]
async fn a_source_that_cannot_be_told_to_go_on_is_replaced() {
    let mut it = begin(patient()).await;
    it.destination.say(failed(&Failure::Busy("no blocks".into())));
    let resume = it.bench.resumed().await;
    resume.answer(Err(Status::unavailable("died")));
    it.is_replayed(4, 2).await;
    it.source.closed().await;
}

#[tokio::test]
async fn a_destination_is_awaited_when_the_source_dies() {
    let mut it = begin(patient()).await;
    it.pauses().await;
    it.source.die();
    it.source.closed().await;
    for event in [joined(), token(3), finished()] {
        it.destination.say(event);
    }
    it.ends_with([3]).await;
    assert_eq!(it.bench.n_moves("settled"), 1);
    assert_eq!(it.bench.door.move_metrics().replays.get(), 0);
}

#[tokio::test]
async fn a_destination_that_does_not_join_in_time_after_its_source_died_is_given_up() {
    let mut it = begin(with_move_deadline(SHORT)).await;
    it.pauses().await;
    it.source.die();
    it.is_replayed(3, 3).await;
    it.destination.closed().await;
    assert_eq!(it.bench.n_moves("failed"), 1);
}

#[tokio::test]
async fn a_request_whose_instances_both_die_is_replayed() {
    for source_first in [true, false] {
        let mut it = begin(patient()).await;
        it.pauses().await;
        let (first, second) = match source_first {
            true => (&it.source, &it.destination),
            false => (&it.destination, &it.source),
        };
        first.die();
        first.closed().await;
        let epoch = if source_first {
            second.die();
            3
        } else {
            // It was told to go on, in epoch 3, and dies before it says a word.
            let resume = it.bench.resumed().await;
            it.source.die();
            resume.answer(Ok(None));
            4
        };
        it.is_replayed(epoch, 3).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_its_request_moves_frees_both_sides() {
    let Moving {
        bench,
        client,
        source,
        destination,
        order,
    } = begin(patient()).await;
    source.say(moving());
    drop(client);
    source.closed().await;
    destination.closed().await;
    let answer = soon("the order's answer", order).await.expect("no panic");
    assert!(matches!(answer, Err(MoveError::Refused(_))), "{answer:?}");
    soon("the end", bench.door.drained()).await;
    bench.assert_idle();
    assert_eq!(bench.n_moves("overtaken"), 1);
}

#[tokio::test]
async fn a_deadline_that_passes_while_the_request_moves_ends_it() {
    let mut it = begin_within(patient(), Some(Duration::from_millis(400))).await;
    it.source.say(moving());
    let (_, last) = rest(&mut it.client).await;
    assert_eq!(last, DoorEvent::Failed(Failure::DeadlineExceeded));
    it.source.closed().await;
    it.destination.closed().await;
    it.bench.assert_idle();
}

#[tokio::test]
async fn a_request_that_finishes_while_it_moves_has_no_use_for_its_destination() {
    let mut it = begin(patient()).await;
    it.source.say(token(2));
    it.source.say(finished());
    it.ends_with([2]).await;
    it.destination.closed().await;
    let answer = soon("the order's answer", &mut it.order).await.expect("no panic");
    assert!(matches!(answer, Err(MoveError::Refused(_))), "{answer:?}");
    assert_eq!(it.bench.n_moves("overtaken"), 1);
}

#[tokio::test]
async fn a_choice_that_has_finished_moves_along_and_finishes_once() {
    let mut bench = Bench::new(&[64, 64], patient()).await;
    let mut two = submission(1, None);
    two.request.sampling.n = 2;
    let mut client = bench.door.submit(two).await.expect("admitted");
    let source = bench.generated().await;
    for event in [token_of(0, 0), token_of(1, 0), choice_finished(0), token_of(1, 1)] {
        source.say(event);
    }
    for _ in 0..4 {
        assert!(soon("an event", client.next()).await.is_some());
    }
    let order = bench.order(None);
    let destination = bench.attached().await;
    let finishes: Vec<bool> = destination
        .state
        .choices
        .iter()
        .map(|choice| choice.finish.is_some())
        .collect();
    assert_eq!((destination.n_known(), finishes), (vec![1, 2], vec![true, false]));
    source.say(moving());
    let words = [
        joined(),
        choice_finished(0),
        token_of(1, 1),
        token_of(1, 2),
        choice_finished(1),
        finished(),
    ];
    for event in words {
        destination.say(event);
    }
    let mut heard = Vec::new();
    while let Some(event) = soon("an event", client.next()).await {
        heard.push(event);
    }
    let [
        DoorEvent::Token { choice: 1, token },
        DoorEvent::ChoiceFinished { choice: 1, .. },
        DoorEvent::Ended { .. },
    ] = &heard[..]
    else {
        panic!("{heard:?}")
    };
    assert_eq!(token.index, 2);
    assert!(soon("the order's answer", order).await.expect("no panic").is_ok());
}

#[tokio::test]
async fn a_named_destination_without_room_is_refused_and_says_what_it_lacks() {
    let mut bench = Bench::new(&[64, 1], patient()).await;
    let mut client = bench.door.submit(submission(1, None)).await.expect("admitted");
    let source = bench.generated().await;
    source.say(token(0));
    assert_eq!(next_token(&mut client).await, 0);
    let answer = soon("the order's answer", bench.order(Some("decode-1")))
        .await
        .expect("no panic");
    let message = answer.expect_err("no room").to_string();
    assert_eq!(
        message,
        "request cannot be moved: not to decode-1: 2 blocks are wanted, 1 are available"
    );
    assert_eq!(bench.n_moves("refused"), 1);
    source.say(finished());
    rest(&mut client).await;
}
