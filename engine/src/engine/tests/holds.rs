//! Running requests that go no further than somebody has made room for elsewhere.

use std::time::{Duration, Instant};

use baton_scheduler::batch::{BatchConfig, SlidingWindow};

use super::stepped::{Caught, Stepped, hear_told};
use super::*;

/// Somebody makes room for what a request has and some tokens more, and is told late that it may come.
#[tokio::test]
async fn a_held_request_goes_as_far_as_was_agreed() {
    let mut caught = Caught::two_choices().await;
    let (source, id) = (&caught.source, caught.state.request.id);
    for n_tokens in [5, 0] {
        let held = source.ask(source.engine.hold(id, n_tokens)).await.unwrap();
        let n_then = held.n_output_tokens().to_vec();
        source.until_paused(2).await;
        hear_told(&mut caught.generation, &mut caught.known);
        for (choice, n_then) in caught.known.iter().zip(n_then) {
            // The step that was in flight when it came so far gives one more.
            let most = n_then + n_tokens..=n_then + n_tokens + 1;
            assert!(
                most.contains(&choice.output.len()),
                "{} of {most:?}",
                choice.output.len()
            );
        }
        drop(held);
        source.until_paused(0).await;
    }
    // Nor is a holder waited for that takes too long.
    let began = Instant::now();
    let held = source.ask(source.engine.hold(id, 1)).await.unwrap();
    source.until_paused(2).await;
    source.until_paused(0).await;
    assert!(began.elapsed() >= Duration::from_secs(2));
    assert_eq!(source.engine.load().engine.n_held_back, 3);
    caught.ends_as_alone(held).await;
}

/// The model reads all that a sequence has, so that it would show at once if a window's blocks were given up.
#[tokio::test]
async fn a_request_that_is_fetched_keeps_what_its_window_leaves_behind() {
    let window = SlidingWindow {
        n_tokens: 24,
        grain: 4,
        slack: 4,
    };
    let source = Stepped::limited_by(BatchConfig {
        windows: vec![Some(window)],
        ..batch_config(64)
    });
    let mut caught = Caught::on(source, greedy(&prompt(2, 9), 200)).await;
    let (source, id) = (&caught.source, caught.state.request.id);
    let held = source.ask(source.engine.hold(id, 60)).await.unwrap();
    source.until_paused(1).await;
    let mut running = source.ask(source.engine.start_move(id, vec![30])).await.unwrap();
    drop(held);
    source.until_paused(0).await;
    source.until_paused(1).await;
    let paused = running.pause(&[vec![0]]).await.unwrap();
    assert_eq!(paused.stage.choices[0].end, 30);
    hear_told(&mut caught.generation, &mut caught.known);
    let (alone, _) = hash_model::alone(&caught.state, usize::MAX);
    let told = &caught.known[0].output;
    assert_eq!(told[..], alone[..told.len()]);
    drop((caught.generation, running, paused));
    let Stepped { permits, engine } = caught.source;
    drop(permits);
    settle(&engine).await;
}

/// A mover that looks too late finds no more than there is room for.
#[tokio::test]
async fn a_moving_request_stands_still_where_its_room_ends() {
    const N_ROOM: usize = 6;
    let caught = Caught::two_choices().await;
    let (source, id) = (&caught.source, caught.state.request.id);
    let held = source.ask(source.engine.hold(id, 1)).await.unwrap();
    source.until_paused(2).await;
    // The mover's room is what counts from now on.
    let mut running = source.ask(source.engine.start_move(id, vec![N_ROOM; 2])).await.unwrap();
    source.until_paused(0).await;
    drop(held);
    source.until_paused(2).await;
    let full = running.pin_full(&vec![vec![0]; 2]).await.unwrap();
    let paused = running.pause(&vec![vec![0]; 2]).await.unwrap();
    for (choice, full) in paused.stage.choices.iter().zip(&full.choices) {
        assert!((N_ROOM - 1..=N_ROOM).contains(&full.end), "{}", full.end);
        assert_eq!(choice.end, N_ROOM);
    }
    drop((full, paused));
    // What was paused goes on where it goes on; the room is the next mover's business.
    drop(running);
    caught.ends_as_alone(()).await;
}
