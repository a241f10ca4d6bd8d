//! From one running engine to another, copying what a migration would carry.

use baton_kernels::KvWrite;
use baton_scheduler::batch::Numerics;

use super::super::hash_model::N_LAYERS;
use super::super::{MoveStage, PausedMove, Reservation, RunningMove};
use super::choices::{all_alone, assert_choices_as_alone, choices, cut};
use super::*;

/// Hears the events of a generation until every choice has at least `n_tokens`, or has ended.
async fn hear(generation: &mut Generation, known: &mut [ChoiceState], n_tokens: usize) {
    while known
        .iter()
        .any(|choice| choice.finish.is_none() && choice.output.len() < n_tokens)
    {
        let Some(timed) = generation.next().await else { return };
        take(timed.event, known);
    }
}

fn take(event: EngineEvent, known: &mut [ChoiceState]) {
    match event {
        EngineEvent::Token { choice, token } => known[choice as usize].output.push(token),
        EngineEvent::ChoiceFinished { choice, finish } => known[choice as usize].finish = Some(finish),
        EngineEvent::Failed(failure) => panic!("{failure}"),
        _ => {}
    }
}

/// Of each choice, the writers and the first block that is owed.
struct Landing {
    writers: Vec<Vec<KvWrite>>,
    held: Vec<usize>,
    from: Vec<u32>,
    n_landed: usize,
}

impl Landing {
    fn of(reservation: &mut Reservation) -> Landing {
        let choices = &mut reservation.choices;
        for choice in choices.iter() {
            assert_eq!(choice.grant.len(), choice.n_blocks_total - choice.n_blocks_held);
        }
        Landing {
            held: choices.iter().map(|choice| choice.n_blocks_held).collect(),
            from: choices.iter().map(|choice| choice.n_blocks_held as u32).collect(),
            writers: choices
                .iter_mut()
                .map(|choice| std::mem::take(&mut choice.writers))
                .collect(),
            n_landed: 0,
        }
    }

    /// Copies a stage, as a transfer would. False when a choice has outgrown its room.
    fn land(&mut self, stage: &MoveStage) -> bool {
        assert_eq!(stage.choices.len(), self.from.len());
        for (choice, pinned) in stage.choices.iter().enumerate() {
            assert_eq!(pinned.blocks.start, self.from[choice] as usize);
            assert_eq!((pinned.ids.len(), pinned.reads.len()), (pinned.blocks.len(), N_LAYERS));
            if pinned.blocks.end > self.held[choice] + self.writers[choice].len() && !pinned.blocks.is_empty() {
                return false;
            }
            for (layer, reads) in pinned.reads.iter().enumerate() {
                for ((block_idx, read), (id, _)) in pinned.blocks.clone().zip(reads).zip(&pinned.ids) {
                    assert_eq!((read.layer(), read.block()), (layer, id.0));
                    let writer = &mut self.writers[choice][block_idx - self.held[choice]];
                    writer.write(layer, read.key(), read.value()).unwrap();
                    self.n_landed += 1;
                }
            }
            self.from[choice] = pinned.blocks.end as u32;
        }
        true
    }
}

/// Moves a request that has been heard as far as `known` says. `None` when it ended before it could be paused.
async fn carry(
    source: &EngineHandle,
    destination: &EngineHandle,
    state: &PortableState,
    known: &[ChoiceState],
) -> Option<(Generation, Vec<ChoiceState>, RunningMove)> {
    let moved = PortableState {
        choices: known.to_vec(),
        ..state.clone()
    };
    let mut running = source.start_move(state.request.id).await.ok()?;
    assert_eq!(running.n_choices(), known.len());
    let mut reservation = destination.reserve_moved(moved, 8).await.unwrap();
    let mut landing = Landing::of(&mut reservation);
    let stage = running.pin_full(&landing.from).await.ok()?;
    assert!(landing.land(&stage));
    drop(stage);
    let PausedMove { stage, outputs } = running.pause(&landing.from).await.ok()?;
    assert!(landing.land(&stage), "eight blocks of slack are enough");
    drop((stage, landing));
    let generation = reservation.join_moved(outputs.clone(), Numerics::Same).unwrap();
    Some((generation, outputs, running))
}

fn moving_engine(n_blocks: usize) -> EngineHandle {
    engine(n_blocks)
}

/// Moves at every token index; what is said before, comes with the move, and is said after is as undisturbed.
async fn move_at_every_index(n: u32, seed: u64) {
    let probe = moving_engine(64);
    let fresh = choices(&prompt(2, 9), 24, seed, n);
    let all = all_alone(&probe, &fresh);
    let longest = all.iter().map(|choice| choice.output.len()).max().unwrap();
    let (mut n_moved, mut n_ended_before) = (0, 0);
    for n_tokens in 1..longest {
        let (source, destination) = (moving_engine(64), moving_engine(64));
        let mut generation = source.generate(fresh.clone()).unwrap();
        let mut known = vec![ChoiceState::default(); n as usize];
        hear(&mut generation, &mut known, n_tokens).await;
        let Some((joined, outputs, running)) = carry(&source, &destination, &fresh, &known).await else {
            n_ended_before += 1;
            continue;
        };
        n_moved += 1;
        for (choice, known) in outputs.iter().zip(&known) {
            assert_eq!(choice.output[..known.output.len()], known.output);
        }
        // Whoever speaks now has told what came with the move; the destination tells the rest.
        let state = PortableState {
            choices: outputs
                .iter()
                .zip(&known)
                .map(|(come, known)| ChoiceState {
                    output: come.output.clone(),
                    finish: known.finish,
                })
                .collect(),
            ..fresh.clone()
        };
        let said = listen(joined).await;
        assert_choices_as_alone(&destination, &state, &said);
        // The source says nothing more, and holds all until its stream goes.
        assert_eq!(
            source.load().batch.n_paused,
            outputs.iter().filter(|choice| choice.finish.is_none()).count()
        );
        drop(generation);
        drop(running);
        settle(&source).await;
        settle(&destination).await;
        assert_eq!(destination.load().engine.n_joined, 1);
        assert_eq!(
            destination.load().scheduler.n_prefill_tokens,
            0,
            "nothing was computed twice"
        );
    }
    assert!(
        n_moved > n_ended_before,
        "{n_moved} moved, {n_ended_before} ended before"
    );
}

#[tokio::test]
async fn one_choice_moves_at_every_index() {
    move_at_every_index(1, 11).await;
}

#[tokio::test]
async fn three_choices_move_at_every_index() {
    for seed in [11, 5] {
        move_at_every_index(3, seed).await;
    }
}

/// An engine whose steps wait for permits, so that a test knows where a request stands.
fn gated(n_blocks: usize) -> (channel::Sender<()>, EngineHandle) {
    let (permits, gate) = channel::bounded(0);
    (
        permits,
        engine_of(HashModel::new(n_blocks, BLOCK_SIZE).gated(gate), n_blocks),
    )
}

/// Asks something of an engine whose steps wait: the step it is in is let through, and no other.
async fn ask<T>(permits: &channel::Sender<()>, question: impl Future<Output = T>) -> T {
    let mut question = std::pin::pin!(question);
    let asked = futures::poll!(question.as_mut());
    assert!(asked.is_pending());
    let permits = permits.clone();
    let permit = tokio::task::spawn_blocking(move || permits.send(()));
    let answer = question.await;
    permit.await.unwrap().unwrap();
    answer
}

/// A prompt of which the first choice ends well before the others.
fn uneven(probe: &EngineHandle) -> (PortableState, Vec<ChoiceState>) {
    (0..200)
        .map(|seed| choices(&prompt(4, 10), 40, seed, 3))
        .map(|state| {
            let all = all_alone(probe, &state);
            (state, all)
        })
        .find(|(_, all)| {
            let n_first = all[0].output.len();
            (6..12).contains(&n_first) && all[1..].iter().all(|choice| choice.output.len() > n_first + 6)
        })
        .expect("one of many seeds is uneven")
}

/// The front door knows less than the source: the choice that was to bring the prompt has ended before anything was
/// pinned. Its prompt comes all the same, for the others share it.
#[tokio::test]
async fn a_finish_in_between_leaves_the_others_their_prompt() {
    let probe = engine(64);
    let (fresh, all) = uneven(&probe);
    let n_first = all[0].output.len();
    for pins_before in [false, true] {
        let (source, destination) = (gated(64), engine(64));
        let (permits, source) = source;
        let mut generation = source.generate(fresh.clone()).unwrap();
        let mut known = vec![ChoiceState::default(); 3];
        let mut running = None;
        let n_known = n_first - 2;
        let state = PortableState {
            choices: cut(&all, |_| n_known),
            ..fresh.clone()
        };
        let mut reservation = destination.reserve_moved(state.clone(), 8).await.unwrap();
        let mut landing = Landing::of(&mut reservation);
        while known[0].finish.is_none() {
            if known[0].output.len() == n_known && running.is_none() {
                let mut started = ask(&permits, source.start_move(fresh.request.id)).await.unwrap();
                if pins_before {
                    let stage = ask(&permits, started.pin_full(&landing.from)).await.unwrap();
                    assert!(landing.land(&stage));
                }
                running = Some(started);
            } else {
                permits.send(()).unwrap();
            }
            let n_tokens = known[0].output.len() + 1;
            hear(&mut generation, &mut known, n_tokens).await;
        }
        let mut running = running.unwrap();
        let paused = ask(&permits, running.pause(&landing.from)).await.unwrap();
        assert_eq!(paused.outputs[0], all[0]);
        let n_prompt_blocks = 10 / BLOCK_SIZE;
        let first = &paused.stage.choices[0];
        if !pins_before {
            assert_eq!(first.blocks, 0..n_prompt_blocks);
        }
        assert!(landing.land(&paused.stage));
        drop(landing);
        let joined = reservation.join_moved(paused.outputs.clone(), Numerics::Same).unwrap();
        let state = PortableState {
            choices: paused
                .outputs
                .iter()
                .zip(&state.choices)
                .map(|(come, known)| ChoiceState {
                    output: come.output.clone(),
                    finish: known.finish,
                })
                .collect(),
            ..fresh.clone()
        };
        let said = listen(joined).await;
        assert_choices_as_alone(&destination, &state, &said);
        drop((paused.stage, running, generation, permits));
        settle(&source).await;
        settle(&destination).await;
    }
}

#[tokio::test]
async fn a_pause_leaves_tokens_unchanged() {
    let engine = moving_engine(64);
    // What is pinned at the pause may be read for long after the resumption: the last blocks are then copied.
    for keeps_pins in [false, true] {
        for by_drop in [false, true] {
            let state = choices(&prompt(2, 9), 40, 11, 3);
            let mut generation = engine.generate(state.clone()).unwrap();
            let mut known = vec![ChoiceState::default(); 3];
            let mut stages = Vec::new();
            let mut n_pauses = 0;
            for n_tokens in 1..40 {
                hear(&mut generation, &mut known, n_tokens).await;
                let Ok(mut running) = engine.start_move(state.request.id).await else {
                    continue;
                };
                let Ok(paused) = running.pause(&[0, 0, 0]).await else {
                    continue;
                };
                n_pauses += 1;
                for _ in 0..3 {
                    engine.take_prefix_events().await.unwrap();
                }
                assert!(engine.load().batch.n_paused > 0);
                if keeps_pins {
                    let bytes = paused.stage.choices.iter().flat_map(|choice| &choice.reads).flatten();
                    let bytes: Vec<Vec<u8>> = bytes.map(|read| read.key().to_vec()).collect();
                    stages.push((bytes, paused.stage));
                }
                if by_drop {
                    drop(running);
                } else {
                    running.resume().unwrap();
                }
            }
            while let Some(timed) = generation.next().await {
                take(timed.event, &mut known);
            }
            assert!(n_pauses > 1, "{n_pauses} pauses");
            assert_eq!(known, all_alone(&engine, &state));
            for (bytes, stage) in stages {
                let now = stage.choices.iter().flat_map(|choice| &choice.reads).flatten();
                assert!(
                    now.map(|read| read.key()).eq(bytes.iter().map(Vec::as_slice)),
                    "pinned bytes stay"
                );
            }
            settle(&engine).await;
        }
    }
}

#[tokio::test]
async fn a_paused_request_that_is_cancelled_frees_everything() {
    let engine = engine(64);
    let mut state = choices(&prompt(2, 9), 60, 11, 3);
    state.request.sampling.stop_token_ids.clear();
    let mut generation = engine.generate(state.clone()).unwrap();
    hear(&mut generation, &mut vec![ChoiceState::default(); 3], 2).await;
    let mut running = engine.start_move(state.request.id).await.unwrap();
    let paused = running.pause(&[0; 3]).await.unwrap();
    drop(generation);
    // The mover hears of it; what it has pinned waits for it.
    let ended = loop {
        match running.pin_full(&[0; 3]).await {
            Err(failure) => break failure,
            Ok(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(ended, Failure::Busy("the request has ended".to_owned()));
    assert!(engine.load().batch.ledger.held == 0 || !engine.load().batch.ledger.is_whole());
    drop(paused);
    settle(&engine).await;
    assert_eq!((engine.load().engine.n_cancelled, engine.load().n_open), (1, 0));
}

#[tokio::test]
async fn a_move_is_refused_until_every_choice_decodes() {
    let (permits, engine) = gated(64);
    let state = choices(&prompt(2, 30), 30, 11, 2);
    let busy = |failure: Result<RunningMove, Failure>| match failure {
        Err(Failure::Busy(message)) => message,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it moves"),
    };
    let id = state.request.id;
    assert!(busy(engine.start_move(id).await).contains("does not run here"));
    let mut generation = engine.generate(state.clone()).unwrap();
    // The first of two chunks.
    generation.next().await.unwrap();
    assert_eq!(
        busy(ask(&permits, engine.start_move(id)).await),
        "not every choice is decoding"
    );
    let mut known = vec![ChoiceState::default(); 2];
    permits.send(()).unwrap();
    hear(&mut generation, &mut known, 1).await;
    let mut running = ask(&permits, engine.start_move(id)).await.unwrap();
    assert!(busy(ask(&permits, engine.start_move(id)).await).contains("under way"));
    let wrong = ask(&permits, running.pin_full(&[0])).await.map(|_| ()).unwrap_err();
    assert_eq!(wrong, Failure::Invalid("1 first blocks, expected 2".to_owned()));
    let wrong = ask(&permits, running.pin_full(&[0, 99])).await.map(|_| ()).unwrap_err();
    assert!(
        matches!(&wrong, Failure::Invalid(message) if message.starts_with("choice 1 is asked")),
        "{wrong}"
    );
    drop(running);
    let again = ask(&permits, engine.start_move(id)).await.unwrap();
    drop(permits);
    while let Some(timed) = generation.next().await {
        take(timed.event, &mut known);
    }
    assert_eq!(known, all_alone(&engine, &state));
    drop(again);
    engine.shutdown().await;
    assert!(matches!(engine.start_move(id).await, Err(Failure::Internal(_))));
}

/// A preempted choice cannot be moved as it was; what was pinned of it keeps its bytes, and its tokens stay the same.
#[tokio::test]
async fn a_preempted_request_is_not_moved() {
    let engine = engine(14);
    let states: Vec<PortableState> = (0..3)
        .map(|i| {
            let mut state = choices(&prompt(i, 7), 22, u64::from(i), 2);
            state.request.id = RequestId(u128::from(i) + 100);
            state.request.sampling.stop_token_ids.clear();
            state
        })
        .collect();
    let mut generations: Vec<Generation> = states
        .iter()
        .map(|state| engine.generate(state.clone()).unwrap())
        .collect();
    let mut known: Vec<Vec<ChoiceState>> = vec![vec![ChoiceState::default(); 2]; 3];
    let mut n_refused = 0;
    for n_tokens in 1..22 {
        for (i, state) in states.iter().enumerate() {
            hear(&mut generations[i], &mut known[i], n_tokens).await;
            let started = engine.start_move(state.request.id).await;
            let pinned = match started {
                Ok(mut running) => running.pin_full(&[0; 2]).await.map(|stage| drop((running, stage))),
                Err(failure) => Err(failure),
            };
            n_refused += usize::from(matches!(pinned, Err(Failure::Busy(message)) if message == "preempted"));
        }
    }
    for (i, state) in states.iter().enumerate() {
        while let Some(timed) = generations[i].next().await {
            take(timed.event, &mut known[i]);
        }
        assert_eq!(known[i], all_alone(&engine, state));
    }
    assert!(engine.load().scheduler.n_preemptions > 0);
    let _ = n_refused;
    settle(&engine).await;
}

#[tokio::test]
async fn outputs_that_cannot_be_are_refused() {
    let engine = engine(64);
    let fresh = choices(&prompt(2, 9), 24, 11, 2);
    let all = all_alone(&engine, &fresh);
    let state = PortableState {
        choices: cut(&all, |_| 2),
        ..fresh.clone()
    };
    let mut wrong_index = cut(&all, |_| 3);
    wrong_index[1].output[2].index = 7;
    let mut other_token = cut(&all, |_| 3);
    other_token[1].output[0].id ^= 1;
    for outputs in [
        cut(&all, |_| 1),
        wrong_index,
        other_token,
        cut(&all, |_| 3)[..1].to_vec(),
    ] {
        let reservation = engine.reserve_moved(state.clone(), 1).await.unwrap();
        let said = listen(reservation.join_moved(outputs, Numerics::Same).unwrap()).await;
        assert!(matches!(said.end, Some(Err(_))), "{said:?}");
    }
    let reservation = engine.reserve_moved(state.clone(), 1).await.unwrap();
    let first = vec![all[0].output[2].clone(), all[1].output[2].clone()];
    let said = listen(reservation.join(first, Numerics::Same).unwrap()).await;
    assert!(matches!(said.end, Some(Err(Failure::Internal(_)))), "{said:?}");
    let fresh = engine.reserve_moved(fresh, 1).await.map(|_| ());
    assert!(matches!(fresh, Err(Failure::Invalid(_))));
    settle(&engine).await;
}
