//! From one running engine to another, copying what a migration would carry.

use baton_kernels::KvWrite;
use baton_scheduler::batch::{MoveRoom, Numerics};

use super::super::hash_model::N_LAYERS;
use super::super::{GroupBlocks, MoveStage, PausedMove, Reservation, RunningMove};
use super::choices::{all_alone, assert_choices_as, assert_choices_as_alone, choices, cut};
use super::constraints::{constrained, constrained_engine};
use super::stepped::{Caught, Stepped, hear, take};
use super::*;

/// Of each choice, the writers and the first block that is owed.
struct Landing {
    writers: Vec<Vec<KvWrite>>,
    held: Vec<usize>,
    from: Vec<Vec<u32>>,
    n_landed: usize,
}

impl Landing {
    fn of(reservation: &mut Reservation) -> Landing {
        let choices = &mut reservation.choices;
        for choice in choices.iter() {
            let [group] = choice.layer_groups.as_slice() else {
                panic!("the model has one layer group")
            };
            assert_eq!(group.grant.len(), choice.n_blocks_total - group.n_blocks_held);
        }
        Landing {
            held: choices
                .iter()
                .map(|choice| choice.layer_groups[0].n_blocks_held)
                .collect(),
            from: choices
                .iter()
                .map(|choice| vec![choice.layer_groups[0].n_blocks_held as u32])
                .collect(),
            writers: choices
                .iter_mut()
                .map(|choice| std::mem::take(&mut choice.layer_groups[0].writers))
                .collect(),
            n_landed: 0,
        }
    }

    /// Copies a stage, as a transfer would. False when a choice has outgrown its room.
    fn land(&mut self, stage: &MoveStage) -> bool {
        assert_eq!(stage.choices.len(), self.from.len());
        for (choice, pinned) in stage.choices.iter().enumerate() {
            let GroupBlocks { blocks, ids } = &pinned.layer_groups[0];
            assert_eq!((blocks.start, blocks.end), (self.from[choice][0] as usize, pinned.end));
            assert_eq!((ids.len(), pinned.reads.len()), (blocks.len(), N_LAYERS));
            if blocks.end > self.held[choice] + self.writers[choice].len() && !blocks.is_empty() {
                return false;
            }
            for (layer, reads) in pinned.reads.iter().enumerate() {
                for ((block_idx, read), (id, _)) in blocks.clone().zip(reads).zip(ids) {
                    assert_eq!((read.layer(), read.block()), (layer, id.0));
                    let writer = &mut self.writers[choice][block_idx - self.held[choice]];
                    writer.write(layer, read.key(), read.value()).unwrap();
                    self.n_landed += 1;
                }
            }
            self.from[choice] = vec![pinned.end as u32];
        }
        true
    }
}

/// More blocks for each choice than any test's request fills.
fn ample(state: &PortableState) -> Vec<usize> {
    vec![64; state.request.sampling.n as usize]
}

#[derive(Clone, Copy, PartialEq)]
enum Stages {
    /// Full blocks first, the rest at the pause.
    Two,
    /// All at the pause.
    One,
}

/// Moves a request at about `n_tokens` tokens. What is said before, comes with the move, and is said after is as
/// undisturbed, `all`. False when it ended before it could be paused.
async fn move_after(n_tokens: usize, fresh: &PortableState, all: &[ChoiceState], stages: Stages) -> bool {
    let (source, destination) = (Stepped::new(64), constrained_engine(64));
    let n = fresh.request.sampling.n as usize;
    let mut generation = source.engine.generate(fresh.clone()).unwrap();
    let mut known = vec![ChoiceState::default(); n];
    source.steps(n_tokens);
    hear(&mut generation, &mut known, n_tokens).await;
    let Ok(mut running) = source
        .ask(source.engine.start_move(fresh.request.id, ample(fresh)))
        .await
    else {
        return false;
    };
    assert_eq!(running.n_choices(), n);
    hear(&mut generation, &mut known, 1).await;
    let state = PortableState {
        choices: known.clone(),
        ..fresh.clone()
    };
    let Ok(mut reservation) = destination.reserve_moved(state, MoveRoom::slack(8)).await else {
        panic!("there is room")
    };
    let mut landing = Landing::of(&mut reservation);
    if stages == Stages::Two {
        let Ok(stage) = source.ask(running.pin_full(&landing.from)).await else {
            return false;
        };
        assert!(landing.land(&stage));
    }
    let Ok(PausedMove { stage, outputs }) = source.ask(running.pause(&landing.from)).await else {
        return false;
    };
    assert!(landing.land(&stage), "eight blocks of slack are enough");
    drop((stage, landing));
    let joined = reservation.join_moved(outputs.clone(), Numerics::Same).unwrap();
    for (come, known) in outputs.iter().zip(&known) {
        assert_eq!(come.output[..known.output.len()], known.output);
    }
    // Whoever speaks now has told the tokens that came with the move; the destination tells the rest.
    let said = listen(joined).await;
    assert_choices_as(all, &told(fresh, &outputs, &known), &said);
    // The source says nothing more, and holds all until its stream goes.
    for _ in 0..2 {
        source.ask(source.engine.take_prefix_events()).await.unwrap();
    }
    let n_unfinished = outputs.iter().filter(|choice| choice.finish.is_none()).count();
    let load = source.engine.load();
    assert_eq!((load.batch.n_paused, load.engine.n_paused), (n_unfinished, 1));
    drop((generation, running, source.permits));
    settle(&source.engine).await;
    settle(&destination).await;
    let load = destination.load();
    assert_eq!(
        (load.engine.n_joined, load.scheduler.n_prefill_tokens),
        (1, 0),
        "nothing is computed twice"
    );
    true
}

/// The state of a request whose front door knew the ends in `known`, and heard all of `outputs` from the move.
fn told(fresh: &PortableState, outputs: &[ChoiceState], known: &[ChoiceState]) -> PortableState {
    let told = |(come, known): (&ChoiceState, &ChoiceState)| ChoiceState {
        output: come.output.clone(),
        finish: known.finish,
    };
    PortableState {
        choices: outputs.iter().zip(known).map(told).collect(),
        ..fresh.clone()
    }
}

async fn move_at_every_index(n: u32, seed: u64) {
    let fresh = choices(&prompt(2, 9), 24, seed, n);
    let all = all_alone(&engine(64), &fresh);
    move_each(&fresh, &all).await;
}

async fn move_each(fresh: &PortableState, all: &[ChoiceState]) {
    let longest = all.iter().map(|choice| choice.output.len()).max().unwrap();
    for stages in [Stages::One, Stages::Two] {
        let mut n_moved = 0;
        for n_tokens in 1..longest {
            n_moved += usize::from(move_after(n_tokens, fresh, all, stages).await);
        }
        // Starting and looking take a step each, so the last few indexes end first.
        assert!(n_moved + 5 >= longest && n_moved > 4, "{n_moved} moves of {longest}");
    }
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

/// The matchers of both choices are rebuilt at the destination, from outputs that reach it in two parts.
#[tokio::test]
async fn constrained_choices_move_at_every_index() {
    let schema = serde_json::json!({
        "type": "array", "items": { "type": "string", "minLength": 2, "maxLength": 6 }, "minItems": 4, "maxItems": 4
    });
    let fresh = constrained(4, &schema, 2);
    let all = constraints::all_alone(&engine(64), &fresh);
    assert!(all.iter().all(|choice| matches!(choice.finish, Some(Finish::Stop(_)))));
    move_each(&fresh, &all).await;
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
        let (source, destination) = (Stepped::new(64), engine(64));
        let mut generation = source.engine.generate(fresh.clone()).unwrap();
        let mut known = vec![ChoiceState::default(); 3];
        let n_known = n_first - 3;
        let state = PortableState {
            choices: cut(&all, |_| n_known),
            ..fresh.clone()
        };
        let mut reservation = destination
            .reserve_moved(state.clone(), MoveRoom::slack(8))
            .await
            .unwrap();
        let mut landing = Landing::of(&mut reservation);
        source.steps(n_known);
        let started = source
            .ask(source.engine.start_move(fresh.request.id, ample(&fresh)))
            .await;
        let mut running = started.unwrap();
        if pins_before {
            let stage = source.ask(running.pin_full(&landing.from)).await.unwrap();
            assert!(landing.land(&stage));
        }
        while known[0].finish.is_none() {
            source.steps(1);
            let n_tokens = known[0].output.len() + 1;
            hear(&mut generation, &mut known, n_tokens).await;
        }
        let paused = source.ask(running.pause(&landing.from)).await.unwrap();
        assert_eq!(paused.outputs[0], all[0]);
        let n_prompt_blocks = 10 / BLOCK_SIZE;
        let first = &paused.stage.choices[0];
        if !pins_before {
            assert_eq!(first.layer_groups[0].blocks, 0..n_prompt_blocks);
        }
        assert!(landing.land(&paused.stage));
        drop(landing);
        let joined = reservation.join_moved(paused.outputs.clone(), Numerics::Same).unwrap();
        let said = listen(joined).await;
        let state = told(&fresh, &paused.outputs, &state.choices);
        assert_choices_as_alone(&destination, &state, &said);
        drop((paused.stage, running, generation, source.permits));
        settle(&source.engine).await;
        settle(&destination).await;
    }
}

#[tokio::test]
async fn a_pause_leaves_tokens_unchanged() {
    // What is pinned at the pause may be read for long after the resumption: the last blocks are then copied.
    for keeps_pins in [false, true] {
        for by_drop in [false, true] {
            let source = Stepped::new(64);
            let state = choices(&prompt(2, 9), 40, 11, 3);
            let mut generation = source.engine.generate(state.clone()).unwrap();
            let mut known = vec![ChoiceState::default(); 3];
            let mut stages = Vec::new();
            let mut n_pauses = 0;
            source.steps(1);
            hear(&mut generation, &mut known, 1).await;
            while n_pauses < 6 {
                let Ok(mut running) = source
                    .ask(source.engine.start_move(state.request.id, ample(&state)))
                    .await
                else {
                    break;
                };
                let Ok(paused) = source.ask(running.pause(&vec![vec![0]; 3])).await else {
                    break;
                };
                n_pauses += 1;
                for _ in 0..3 {
                    source.engine.take_prefix_events().await.unwrap();
                }
                assert!(source.engine.load().batch.n_paused > 0);
                if keeps_pins {
                    let reads = paused.stage.choices.iter().flat_map(|choice| &choice.reads).flatten();
                    let bytes: Vec<Vec<u8>> = reads.map(|read| read.key().to_vec()).collect();
                    stages.push((bytes, paused.stage));
                }
                match by_drop {
                    true => drop(running),
                    false => running.resume().unwrap(),
                }
            }
            assert!(n_pauses > 1, "{n_pauses} pauses");
            let Stepped { permits, engine } = source;
            drop(permits);
            while let Some(timed) = generation.next().await {
                take(timed.event, &mut known);
            }
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

/// The mover that paused it has gone, and the next one has not asked for a pause.
#[tokio::test]
async fn the_next_mover_finds_it_running() {
    let caught = Caught::two_choices().await;
    let (source, state) = (&caught.source, &caught.state);
    let mut running = source
        .ask(source.engine.start_move(state.request.id, ample(state)))
        .await
        .unwrap();
    let paused = source.ask(running.pause(&vec![vec![0]; 2])).await.unwrap();
    drop((running, paused));
    let next = source
        .ask(source.engine.start_move(state.request.id, ample(state)))
        .await
        .unwrap();
    for _ in 0..2 {
        source.ask(source.engine.take_prefix_events()).await.unwrap();
    }
    assert_eq!(source.engine.load().batch.n_paused, 0);
    caught.ends_as_alone(next).await;
}

#[tokio::test]
async fn a_paused_request_that_is_cancelled_frees_everything() {
    let source = Stepped::new(64);
    let mut state = choices(&prompt(2, 9), 60, 11, 3);
    state.request.sampling.stop_token_ids.clear();
    let mut generation = source.engine.generate(state.clone()).unwrap();
    source.steps(2);
    hear(
        &mut generation,
        &mut [const {
            ChoiceState {
                output: Vec::new(),
                finish: None,
            }
        }; 3],
        2,
    )
    .await;
    let mut running = source
        .ask(source.engine.start_move(state.request.id, ample(&state)))
        .await
        .unwrap();
    let paused = source.ask(running.pause(&vec![vec![0]; 3])).await.unwrap();
    drop((generation, source.permits));
    let engine = source.engine;
    // The mover hears of it; what it has pinned waits for it.
    let ended = loop {
        match running.pin_full(&vec![vec![0]; 3]).await {
            Err(failure) => break failure,
            Ok(_) => engine.take_prefix_events().await.map(|_| ()).unwrap(),
        }
    };
    assert_eq!(ended, Failure::Busy("the request has ended".to_owned()));
    for _ in 0..2 {
        engine.take_prefix_events().await.unwrap();
    }
    let ledger = engine.load().batch.ledger;
    let is_partial = |choice: &&ChoiceState| !(9 + choice.output.len() - 1).is_multiple_of(BLOCK_SIZE);
    let n_partial = paused.outputs.iter().filter(is_partial).count();
    assert_eq!((ledger.held, ledger.quarantined), (0, n_partial));
    drop(paused);
    settle(&engine).await;
    assert_eq!((engine.load().engine.n_cancelled, engine.load().n_open), (1, 0));
}

#[tokio::test]
async fn a_move_is_refused_until_every_choice_decodes() {
    let source = Stepped::new(64);
    let mut state = choices(&prompt(2, 30), 30, 11, 2);
    state.request.sampling.stop_token_ids.clear();
    let busy = |failure: Result<RunningMove, Failure>| match failure {
        Err(Failure::Busy(message)) => message,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it moves"),
    };
    let start = || source.ask(source.engine.start_move(state.request.id, ample(&state)));
    assert!(busy(start().await).contains("does not run here"));
    let mut generation = source.engine.generate(state.clone()).unwrap();
    // The first of two chunks.
    generation.next().await.unwrap();
    assert_eq!(busy(start().await), "not every choice is decoding");
    let mut known = vec![ChoiceState::default(); 2];
    // Where a step is launched before the one before it is over, the question may have let none through.
    source.until(hear(&mut generation, &mut known, 1)).await;
    let mut running = start().await.unwrap();
    assert!(busy(start().await).contains("under way"));
    let wrong = source.ask(running.pin_full(&[vec![0]])).await.map(|_| ()).unwrap_err();
    assert_eq!(wrong, Failure::Invalid("1 first blocks, expected 2".to_owned()));
    let wrong = source
        .ask(running.pin_full(&[vec![0], vec![99]]))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&wrong, Failure::Invalid(message) if message.starts_with("choice 1 is asked")),
        "{wrong}"
    );
    drop(running);
    let again = start().await.unwrap();
    let Stepped { permits, engine } = source;
    drop(permits);
    while let Some(timed) = generation.next().await {
        take(timed.event, &mut known);
    }
    assert_eq!(known, all_alone(&engine, &state));
    drop(again);
    engine.shutdown().await;
    let gone = engine.start_move(state.request.id, ample(&state)).await.map(|_| ());
    assert!(matches!(gone, Err(Failure::Internal(_))));
}

/// A preempted choice cannot be moved as it was; what was pinned of it keeps its bytes, and its tokens stay the same.
#[tokio::test]
async fn a_preempted_request_is_not_moved() {
    let source = Stepped::new(16);
    let mut states: Vec<PortableState> = (0..2).map(|i| choices(&prompt(i, 7), 24, u64::from(i), 2)).collect();
    for (i, state) in (0..).zip(&mut states) {
        state.request.id = RequestId(100 + i);
        state.request.sampling.stop_token_ids.clear();
    }
    let generate = |state: &PortableState| source.engine.generate(state.clone()).unwrap();
    let mut generations: Vec<Generation> = states.iter().map(generate).collect();
    let mut known: Vec<Vec<ChoiceState>> = vec![vec![ChoiceState::default(); 2]; 2];
    source.steps(2);
    hear(&mut generations[1], &mut known[1], 1).await;
    // The younger of the two is the victim.
    let id = states[1].request.id;
    let mut running = source
        .ask(source.engine.start_move(id, ample(&states[1])))
        .await
        .unwrap();
    let mut stages = Vec::new();
    let refused = loop {
        match source.ask(running.pin_full(&vec![vec![0]; 2])).await {
            Ok(stage) => {
                let reads = stage.choices.iter().flat_map(|choice| &choice.reads).flatten();
                let bytes: Vec<Vec<u8>> = reads.map(|read| read.key().to_vec()).collect();
                stages.push((stage, bytes));
            }
            Err(failure) => break failure,
        }
    };
    assert_eq!(refused, Failure::Busy("preempted".to_owned()));
    assert!(stages.len() > 2);
    let paused = source.ask(running.pause(&vec![vec![0]; 2])).await.map(|_| ());
    assert_eq!(paused, Err(refused));
    for (stage, bytes) in stages {
        let reads = stage.choices.iter().flat_map(|choice| &choice.reads).flatten();
        assert!(
            reads.map(|read| read.key()).eq(bytes.iter().map(Vec::as_slice)),
            "pinned bytes stay"
        );
    }
    let Stepped { permits, engine } = source;
    drop((running, permits));
    for (i, state) in states.iter().enumerate() {
        while let Some(timed) = generations[i].next().await {
            take(timed.event, &mut known[i]);
        }
        assert_eq!(known[i], all_alone(&engine, state));
    }
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
        let reservation = engine.reserve_moved(state.clone(), MoveRoom::slack(1)).await.unwrap();
        let said = listen(reservation.join_moved(outputs, Numerics::Same).unwrap()).await;
        assert!(matches!(said.end, Some(Err(_))), "{said:?}");
    }
    let reservation = engine.reserve_moved(state.clone(), MoveRoom::slack(1)).await.unwrap();
    let first = vec![all[0].output[2].clone(), all[1].output[2].clone()];
    let said = listen(reservation.join(first, Numerics::Same).unwrap()).await;
    assert!(matches!(said.end, Some(Err(Failure::Internal(_)))), "{said:?}");
    let fresh = engine.reserve_moved(fresh, MoveRoom::slack(1)).await.map(|_| ());
    assert!(matches!(fresh, Err(Failure::Invalid(_))));
    settle(&engine).await;
}
