//! Running requests that move between instances: what the front door hears is the undisturbed run, whoever speaks, and
//! every failure of a move leaves exactly one side with the request.

use std::time::Duration;

use baton_proto::cluster::transfer_frame::Frame;
use baton_proto::cluster::{self, generate_event::Event};
use baton_scheduler::ids::{Epoch, TokenId};
use baton_scheduler::request::{Failure, PortableState, SamplingParams, Token};
use baton_scheduler::timeline::Moment;
use crossbeam::channel;
use tokio::time::timeout;
use tonic::Streaming;

use super::super::TransportKind;
use super::super::WorkerOptions;
use super::cluster::*;

fn warm(n: u32, n_prompt: usize, max_tokens: u32) -> PortableState {
    let sampling = SamplingParams {
        max_tokens,
        temperature: 0.9,
        seed: 3,
        n,
        logprobs: Some(1),
        presence_penalty: 0.4,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        ..SamplingParams::default()
    };
    state(&prompt(9, n_prompt), sampling)
}

/// Lets an instance make a step every now and then, so that it can be caught in the act.
struct Pump(tokio::task::JoinHandle<()>);

impl Drop for Pump {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn slow(setup: Setup) -> (Instance, Pump) {
    let (instance, permits) = setup.start_gated().await;
    let pump = async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(2));
        while permits.send(()).is_ok() {
            ticks.tick().await;
        }
    };
    (instance, Pump(tokio::spawn(pump)))
}

/// A front door's side of one request: what it has heard, from whomever.
struct Door {
    state: PortableState,
    stream: Streaming<cluster::GenerateEvent>,
}

impl Door {
    async fn open(instance: &Instance, state: &PortableState) -> Door {
        let stream = instance.open(instance.request(state, None)).await;
        Door {
            state: state.clone(),
            stream,
        }
    }

    fn take(&mut self, choice: u32, token: Token) {
        let output = &mut self.state.choices[choice as usize].output;
        if token.index as usize == output.len() {
            output.push(token);
        } else {
            // A copied token says what was said before.
            assert_eq!(output[token.index as usize], token);
        }
    }

    /// Hears until an event that `is_it`; the tokens before it are kept.
    async fn hear(&mut self, is_it: impl Fn(&Event) -> bool) -> cluster::GenerateEvent {
        let hearing = async {
            loop {
                let event = self.stream.message().await.unwrap().expect("the stream goes on");
                let found = is_it(event.event.as_ref().unwrap());
                match event.event.clone().unwrap() {
                    Event::Token(token) => {
                        let (choice, token) = baton_proto::convert::token_from_wire(token);
                        self.take(choice, token);
                    }
                    Event::ChoiceFinished(finished) => {
                        let finish = finished.finish.unwrap().try_into().unwrap();
                        self.state.choices[finished.choice as usize].finish = Some(finish);
                    }
                    _ => {}
                }
                if found {
                    return event;
                }
            }
        };
        timeout(PATIENCE, hearing).await.expect("the event comes")
    }

    async fn hear_tokens(&mut self, n: usize) {
        while self
            .state
            .choices
            .iter()
            .any(|choice| choice.finish.is_none() && choice.output.len() < n)
        {
            self.hear(|event| matches!(event, Event::Token(_) | Event::ChoiceFinished(_)))
                .await;
        }
    }

    async fn hear_end(&mut self) -> cluster::Ended {
        match self.hear(|event| matches!(event, Event::Ended(_))).await.event {
            Some(Event::Ended(ended)) => ended,
            _ => unreachable!("it was waited for"),
        }
    }

    fn attach_request(&self, source: &Instance, destination: &Instance, epoch: u32) -> cluster::AttachRequest {
        let mut state = self.state.clone();
        state.epoch = Epoch(epoch);
        cluster::AttachRequest {
            handshake: Some(destination.handshake()),
            state: Some((&state).into()),
            source: Some(source.peer()),
        }
    }

    async fn attach(&self, source: &Instance, destination: &Instance, epoch: u32) -> Streaming<cluster::GenerateEvent> {
        let request = self.attach_request(source, destination, epoch);
        destination.client().attach(request).await.unwrap().into_inner()
    }

    fn ids(&self) -> Vec<Vec<TokenId>> {
        let choices = self.state.choices.iter();
        choices
            .map(|choice| choice.output.iter().map(|token| token.id).collect())
            .collect()
    }
}

/// The same request undisturbed.
async fn undisturbed(state: &PortableState) -> PortableState {
    let local = Setup::new("mixed-0").start().await;
    let mut door = Door::open(&local, state).await;
    door.hear_end().await;
    let state = door.state.clone();
    drop(door);
    local.stop().await;
    state
}

fn migrate_request(source: &Instance, door: &Door) -> cluster::MigrateRequest {
    let choices = door.state.choices.iter().map(|choice| cluster::ChoiceRoom {
        first_block: 0,
        first_blocks: Vec::new(),
        n_blocks: 60,
        n_known_tokens: choice.output.len() as u32,
    });
    cluster::MigrateRequest {
        handshake: Some(source.handshake()),
        request_id: door.state.request.id.0.to_be_bytes().to_vec(),
        transfer_id: 5,
        to: "elsewhere".to_owned(),
        choices: choices.collect(),
        offer: None,
    }
}

async fn frame_of(frames: &mut Streaming<cluster::TransferFrame>, is_it: impl Fn(&Frame) -> bool) -> Frame {
    let hearing = async {
        loop {
            let frame = frames
                .message()
                .await
                .unwrap()
                .expect("the stream goes on")
                .frame
                .unwrap();
            if is_it(&frame) {
                return frame;
            }
        }
    };
    timeout(PATIENCE, hearing).await.expect("the frame comes")
}

async fn resume(source: &Instance, door: &Door, epoch: u32) -> Option<Failure> {
    let request = cluster::ResumeRequest {
        handshake: Some(source.handshake()),
        request_id: door.state.request.id.0.to_be_bytes().to_vec(),
        epoch,
        next_index: door
            .state
            .choices
            .iter()
            .map(|choice| choice.output.len() as u32)
            .collect(),
    };
    let answer = source.client().resume(request).await.unwrap().into_inner();
    answer.failure.map(Into::into)
}

#[tokio::test]
async fn moved_at_any_time_it_is_as_undisturbed() {
    for n in [1, 3] {
        let fresh = warm(n, 100, 120);
        let expected = undisturbed(&fresh).await;
        for (n_known, kind) in [1, 2, 12, 13, 28, 60]
            .into_iter()
            .zip(TransportKind::ALL.into_iter().filter(|kind| !kind.needs_card()).cycle())
        {
            let (source, pump) = slow(Setup::by("decode-0", kind)).await;
            let destination = Setup::by("decode-1", kind).start().await;
            let mut door = Door::open(&source, &fresh).await;
            door.hear_tokens(n_known).await;
            let mut attached = Door {
                state: door.state.clone(),
                stream: door.attach(&source, &destination, 6).await,
            };
            let joined = attached.hear(is_moment(Moment::Joined)).await;
            assert_eq!(joined.epoch, 6);
            door.hear(|event| matches!(event, Event::Moving(_))).await;
            // Settled: the source's stream is dropped, which frees there.
            drop(door);
            let ended = attached.hear_end().await;
            assert!(ended.kv_bytes_received >= kv_bytes((100 + n_known - 1) / BLOCK_SIZE));
            let by_kind = destination.service.transport_totals().bytes_received[kind as usize];
            assert_eq!(by_kind, ended.kv_bytes_received, "by {kind}");
            assert_eq!(
                attached.state.choices, expected.choices,
                "n = {n}, after {n_known} tokens"
            );
            drop((attached, pump));
            source
                .until("rid of it", |source| source.totals().n_moved_out == 1)
                .await;
            assert_eq!(destination.totals().n_moved_in, 1);
            assert_eq!(source.totals().n_moves_failed + destination.totals().n_moves_failed, 0);
            stop([destination, source]).await;
        }
    }
}

#[tokio::test]
async fn what_the_destination_holds_does_not_travel_and_choices_share_their_prompt() {
    let fresh = warm(3, 160, 90);
    let expected = undisturbed(&fresh).await;
    let (source, pump) = slow(Setup::new("decode-0")).await;
    let destination = Setup::new("decode-1").start().await;
    // The destination has seen the prompt.
    let mut seen = fresh.clone();
    seen.request.sampling.max_tokens = 1;
    let mut other = Door::open(&destination, &seen).await;
    other.hear_end().await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(40).await;
    let mut attached = Door {
        state: door.state.clone(),
        stream: door.attach(&source, &destination, 6).await,
    };
    attached.hear(is_moment(Moment::Joined)).await;
    drop(door);
    let ended = attached.hear_end().await;
    assert_eq!(attached.state.choices, expected.choices);
    // Of the prompt's ten blocks nothing, of each choice what it has generated: 40 tokens and what was added meanwhile.
    let (least, most) = (kv_bytes(3 * 2), kv_bytes(3 * 6));
    assert!(
        (least..=most).contains(&ended.kv_bytes_received),
        "{}",
        ended.kv_bytes_received
    );
    drop((other, attached, pump));
    stop([destination, source]).await;
}

/// The source has generated far more than fits the slack of what the front door knows.
#[tokio::test]
async fn a_front_door_that_is_far_behind_moves_a_request_all_the_same() {
    let fresh = warm(2, 50, 240);
    let expected = undisturbed(&fresh).await;
    let (source, pump) = slow(Setup::new("decode-0")).await;
    let destination = Setup::new("decode-1").start().await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(3).await;
    let behind = door.state.clone();
    door.hear_tokens(150).await;
    let latest = std::mem::replace(&mut door.state, behind.clone());
    let mut attached = Door {
        state: behind,
        stream: door.attach(&source, &destination, 6).await,
    };
    door.state = latest;
    attached.hear(is_moment(Moment::Joined)).await;
    drop(door);
    attached.hear_end().await;
    assert_eq!(attached.state.choices, expected.choices);
    drop((attached, pump));
    assert_eq!(destination.totals().n_moved_in, 1);
    stop([destination, source]).await;
}

/// The link takes so long for the first stage that the request would generate far more than there is room for.
#[tokio::test]
async fn a_request_that_would_outgrow_its_room_waits_and_moves() {
    let fresh = warm(2, 200, 200);
    let expected = undisturbed(&fresh).await;
    let mut setup = Setup::new("decode-0");
    setup.options.move_bytes_per_second = Some(2 * kv_bytes(200 / BLOCK_SIZE));
    let (source, pump) = slow(setup).await;
    let destination = Setup::new("decode-1").start().await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(3).await;
    let mut attached = Door {
        state: door.state.clone(),
        stream: door.attach(&source, &destination, 6).await,
    };
    attached.hear(|event| matches!(event, Event::Accepted(_))).await;
    // From here on its steps take no time.
    drop(pump);
    attached.hear(is_moment(Moment::Joined)).await;
    // Where its room ends, and perhaps before it heard of that.
    assert!((1..=2).contains(&source.load().engine.n_held_back));
    drop(door);
    attached.hear_end().await;
    assert_eq!(attached.state.choices, expected.choices);
    drop(attached);
    assert_eq!(destination.totals().n_moved_in, 1);
    stop([destination, source]).await;
}

/// Whoever asked where a request stands has reserved room, and does not come.
#[tokio::test]
async fn a_request_stands_still_for_a_destination_only_as_long_as_it_asks() {
    let fresh = warm(2, 50, 80);
    let expected = undisturbed(&fresh).await;
    let (source, pump) = slow(Setup::new("decode-0")).await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(3).await;
    let request = |n_more_tokens| cluster::StandingRequest {
        handshake: Some(source.handshake()),
        request_id: fresh.request.id.0.to_be_bytes().to_vec(),
        n_more_tokens,
    };
    let ask = async |n_more_tokens| {
        let mut answers = source
            .client()
            .standing(request(n_more_tokens))
            .await
            .unwrap()
            .into_inner();
        let answer = answers.message().await.unwrap().expect("an answer comes");
        assert_eq!(answer.failure, None);
        (answer.n_output_tokens, answers)
    };
    // A peer that agrees on nothing is answered, and that is all.
    let (_, mut answers) = ask(0).await;
    assert_eq!(answers.message().await.unwrap(), None);
    let (standing, answers) = ask(8).await;
    source
        .until("held back", |source| source.load().batch.n_paused == 2)
        .await;
    // The step that was in flight when it came so far gives one more.
    let agreed = standing[0] as usize + 8..=standing[0] as usize + 9;
    door.hear_tokens(*agreed.start()).await;
    for choice in &door.state.choices {
        assert!(
            agreed.contains(&choice.output.len()),
            "{} of {agreed:?}",
            choice.output.len()
        );
    }
    drop(answers);
    door.hear_end().await;
    assert_eq!(door.state.choices, expected.choices);
    drop((door, pump));
    source.stop().await;
}

#[tokio::test]
async fn a_dropped_move_goes_on_at_the_source_and_says_so() {
    let fresh = warm(2, 200, 100);
    let expected = undisturbed(&fresh).await;
    let mut setup = Setup::new("decode-0");
    // A frame now and then, so that the move is caught in its first stage.
    setup.options.move_bytes_per_second = Some(20_000);
    let (source, pump) = slow(setup).await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(3).await;
    let request = migrate_request(&source, &door);
    let mut frames = source.client().migrate(request.clone()).await.unwrap().into_inner();
    frame_of(&mut frames, |frame| matches!(frame, Frame::Kv(_))).await;
    // A second mover is refused while the first is at it.
    let mut second = source.client().migrate(request).await.unwrap().into_inner();
    let ended = frame_of(&mut second, |frame| matches!(frame, Frame::Ended(_))).await;
    let Frame::Ended(ended) = ended else { unreachable!() };
    assert!(matches!(Failure::from(ended.failure.unwrap()), Failure::Busy(_)));
    drop(frames);
    door.hear(|event| matches!(event, Event::MoveCancelled(_))).await;
    door.hear_end().await;
    assert_eq!(door.state.choices, expected.choices);
    drop((door, second, pump));
    source.stop().await;
}

#[tokio::test]
async fn after_the_state_only_the_front_door_lets_the_source_go_on() {
    let fresh = warm(2, 50, 80);
    let expected = undisturbed(&fresh).await;
    let (source, pump) = slow(Setup::new("decode-0")).await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(5).await;
    let mut frames = source
        .client()
        .migrate(migrate_request(&source, &door))
        .await
        .unwrap()
        .into_inner();
    let moved = frame_of(&mut frames, |frame| matches!(frame, Frame::MovedState(_))).await;
    let Frame::MovedState(moved) = moved else {
        unreachable!()
    };
    door.hear(|event| matches!(event, Event::Moving(_))).await;
    drop(frames);
    // Everything the source says before it is paused is in the state, and it says nothing after.
    let n_said: Vec<usize> = moved.choices.iter().map(|choice| 5 + choice.output.len()).collect();
    assert_eq!(
        resume(&source, &door, 5).await.map(|failure| failure.is_retryable()),
        Some(false),
        "a stale epoch"
    );
    let silent = timeout(Duration::from_millis(100), door.hear_tokens(n_said[0] + 1)).await;
    assert!(silent.is_err(), "a paused source spoke");
    assert!(door.ids().iter().zip(&n_said).all(|(ids, &n_said)| ids.len() <= n_said));
    assert_eq!(resume(&source, &door, 7).await, None);
    assert!(resume(&source, &door, 7).await.is_some(), "said twice");
    let next = door
        .hear(|event| matches!(event, Event::Token(token) if token.index as usize == n_said[0]))
        .await;
    assert_eq!(next.epoch, 7);
    door.hear_end().await;
    assert_eq!(door.state.choices, expected.choices);
    drop((door, pump));
    assert_eq!(source.totals().n_resumed, 1);
    source.stop().await;
}

#[tokio::test]
async fn a_paused_source_that_nobody_speaks_to_ends_and_frees() {
    let fresh = warm(1, 50, 80);
    let mut setup = Setup::new("decode-0");
    setup.options = WorkerOptions {
        resume_deadline: Duration::from_millis(50),
        ..WorkerOptions::default()
    };
    let (source, pump) = slow(setup).await;
    let mut door = Door::open(&source, &fresh).await;
    door.hear_tokens(5).await;
    let mut frames = source
        .client()
        .migrate(migrate_request(&source, &door))
        .await
        .unwrap()
        .into_inner();
    frame_of(&mut frames, |frame| matches!(frame, Frame::MovedState(_))).await;
    let ended = door.hear_end().await;
    let Some(cluster::ended::How::Failure(failure)) = ended.how else {
        panic!("{ended:?}")
    };
    assert!(matches!(Failure::from(failure), Failure::InstanceLost(_)));
    drop((frames, door, pump));
    source.stop().await;
}

#[tokio::test]
async fn a_front_door_that_leaves_during_a_move_frees_both_ends() {
    let fresh = warm(2, 150, 100);
    for paused in [false, true] {
        let (source, pump) = slow(Setup::new("decode-0")).await;
        let destination = Setup::new("decode-1").start().await;
        let mut door = Door::open(&source, &fresh).await;
        door.hear_tokens(4).await;
        let attached = door.attach(&source, &destination, 6).await;
        if paused {
            door.hear(|event| matches!(event, Event::Moving(_))).await;
        }
        drop((attached, door));
        // Both settle only when nothing is held.
        drop(pump);
        stop([destination, source]).await;
    }
}

#[tokio::test]
async fn what_cannot_be_moved_is_refused() {
    let (source, permits) = Setup::new("decode-0").start_gated().await;
    let destination = Setup::new("decode-1").start().await;
    let fresh = warm(1, 100, 50);
    // Not here at all.
    let door = Door {
        state: undisturbed(&fresh).await,
        stream: destination.open(destination.request(&fresh, None)).await,
    };
    let mut known = fresh.clone();
    known.choices[0].output = door.state.choices[0].output[..4].to_vec();
    let elsewhere = Door {
        state: known.clone(),
        stream: door.stream,
    };
    let mut attached = Door {
        state: known,
        stream: elsewhere.attach(&source, &destination, 9).await,
    };
    let ended = attached.hear_end().await;
    let Some(cluster::ended::How::Failure(failure)) = ended.how else {
        panic!("{ended:?}")
    };
    assert!(matches!(Failure::from(failure), Failure::InstanceLost(_)));
    // In its prefill.
    let waiting = Door::open(&source, &fresh).await;
    let mut frames = source
        .client()
        .migrate(migrate_request(&source, &waiting))
        .await
        .unwrap()
        .into_inner();
    permits.send(()).unwrap();
    let ended = frame_of(&mut frames, |frame| matches!(frame, Frame::Ended(_))).await;
    let Frame::Ended(ended) = ended else { unreachable!() };
    assert!(ended.failure.is_some());
    drop((attached, elsewhere, waiting, frames));
    let _: channel::Sender<()> = permits.clone();
    drop(permits);
    stop([destination, source]).await;
}
