//! Steps of the CUDA device as its driver sees them: recorded decode steps are one launch and one copy and have the bits of
//! steps that are queued kernel by kernel, no step allocates, and none has anything to choose first. On a card (REQUIRE_GPU=1)
//! or on the stand-in for its driver. The stand-in counts for the whole process, so the tests of this file take turns.

#[path = "../../kernels/tests/cuda_device/controls.rs"]
#[allow(
    unsafe_code,
    dead_code,
    reason = "shared with the kernels' tests, which use all of it"
)]
mod controls;
#[allow(dead_code, reason = "shared with tests that read more of them")]
mod golden_model;
#[path = "cuda/load.rs"]
mod load;
#[path = "../../kernels/tests/cuda_device/stand_in/mod.rs"]
mod stand_in;

use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard};

use baton_engine::forward::{ForwardPass as _, LogitsWanted, NewTokens, StepSequence};
use baton_engine::model::{
    CudaKvSize, CudaLoadOptions, Decoder, DecoderLimits, LoadFormat, LoadOptions, ModelFolder, load_cuda_at,
};
use baton_kernels::DType;
use baton_kernels::cuda::{Cuda, CudaMode, CudaPlace};
use baton_scheduler::batch::RELEASED_BLOCK;
use golden_model::{models, models_folder};
use load::load_options;
use stand_in::Driver;

const BLOCK_SIZE: usize = 16;
const N_KV_BLOCKS: usize = 512;
const MAX_LEN: usize = 160;
const MAX_BATCH_TOKENS: usize = 128;
const MAX_NUM_SEQS: usize = 4;

/// Windows and sinks, experts and rotary tables of two lengths show in long contexts alone.
const LONG: [&str; 3] = ["mistral-swa32", "gpt-oss-bf16", "gemma3-two-ropes"];

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn load(model: &str, dtype: DType, mode: CudaMode, max_graph_seqs: usize) -> Option<Decoder<Cuda>> {
    load_at(
        CudaPlace::default(),
        MAX_BATCH_TOKENS,
        model,
        dtype,
        mode,
        max_graph_seqs,
    )
}

/// The same somewhere on the card, for steps of so many tokens.
fn load_at(
    place: CudaPlace,
    max_batch_tokens: usize,
    model: &str,
    dtype: DType,
    mode: CudaMode,
    max_graph_seqs: usize,
) -> Option<Decoder<Cuda>> {
    let folder = ModelFolder::open(models_folder().join(model)).unwrap();
    let model = LoadOptions {
        dtype,
        block_size: BLOCK_SIZE,
        limits: DecoderLimits {
            max_batch_tokens,
            max_model_len: MAX_LEN,
        },
        packed_dir: None,
        load_format: LoadFormat::Safetensors,
    };
    let options = CudaLoadOptions {
        max_num_seqs: MAX_NUM_SEQS,
        mode,
        max_graph_seqs,
        ..load_options(model, CudaKvSize::Blocks(N_KV_BLOCKS))?
    };
    Some(load_cuda_at(&folder, &options, place, &mut |_, _| {}).unwrap())
}

/// What the stand-in has been asked for; a card does not tell.
fn count(name: &CStr) -> Option<i64> {
    matches!(stand_in::driver(), Some(Driver::StandIn(_))).then(|| controls::count(name))
}

/// Calls since `before` was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calls {
    allocations: i64,
    launches: i64,
    graph_launches: i64,
    copies_to_device: i64,
}

impl Calls {
    fn now() -> Option<Calls> {
        Some(Calls {
            allocations: count(c"device_allocations")? + count(c"pinned_allocations")?,
            launches: count(c"launches")?,
            graph_launches: count(c"graph_launches")?,
            copies_to_device: count(c"copies_to_device")?,
        })
    }

    fn since(self, before: Calls) -> Calls {
        Calls {
            allocations: self.allocations - before.allocations,
            launches: self.launches - before.launches,
            graph_launches: self.graph_launches - before.graph_launches,
            copies_to_device: self.copies_to_device - before.copies_to_device,
        }
    }
}

/// A sequence that is computed piece by piece; its tokens depend on its number and their positions.
struct Running {
    number: u32,
    n_computed: usize,
    block_tables: Vec<Vec<u32>>,
}

impl Running {
    /// In blocks from `first_block` on, neither in order nor of one layer group alone.
    fn new(number: u32, first_block: u32, n_groups: usize) -> Running {
        let n_blocks = MAX_LEN.div_ceil(BLOCK_SIZE) as u32;
        let table = |group: u32| {
            let block = |i: u32| first_block + (n_blocks - 1 - i) * n_groups as u32 + group;
            (0..n_blocks).map(block).collect()
        };
        Running {
            number,
            n_computed: 0,
            block_tables: (0..n_groups as u32).map(table).collect(),
        }
    }

    fn tokens(&self, n_tokens: usize) -> Vec<u32> {
        let token = |position: usize| (position as u32 * 31 + self.number * 57 + 3) % 97;
        (self.n_computed..self.n_computed + n_tokens).map(token).collect()
    }
}

/// Computes `n_tokens` of each sequence named, in one step, and wants the last row of each.
fn step(decoder: &mut Decoder<Cuda>, running: &mut [Running], parts: &[(usize, usize)]) -> Vec<u32> {
    let windows = decoder.config().sliding_windows();
    let n_layers = decoder.config().n_layers;
    for &(idx, _) in parts {
        let n_computed = running[idx].n_computed;
        for (table, window) in running[idx].block_tables.iter_mut().zip(&windows) {
            let first_seen = window.map_or(0, |window| {
                (n_computed + 1).saturating_sub(window.n_tokens) / window.grain * window.grain
            });
            table[..first_seen / BLOCK_SIZE].fill(RELEASED_BLOCK);
        }
    }
    let tokens: Vec<Vec<u32>> = parts
        .iter()
        .map(|&(idx, n_tokens)| running[idx].tokens(n_tokens))
        .collect();
    let sequences: Vec<StepSequence<'_>> = parts
        .iter()
        .zip(&tokens)
        .map(|(&(idx, _), tokens)| StepSequence {
            tokens: NewTokens::Known(tokens),
            start_pos: running[idx].n_computed,
            block_tables: &running[idx].block_tables,
            rope_variant: 0,
            logits: LogitsWanted::Last,
        })
        .collect();
    let mut layers = Vec::new();
    let logits = decoder
        .step(&sequences, &mut |layer, _| layers.push(layer))
        .unwrap()
        .logits;
    let bits = logits.iter().map(|logit| logit.to_bits()).collect();
    assert_eq!(layers, (0..n_layers).collect::<Vec<_>>());
    for &(idx, n_tokens) in parts {
        running[idx].n_computed += n_tokens;
    }
    bits
}

/// Prompts in chunks beside running sequences, batches that grow and shrink across the recorded sizes, a context across a
/// block's end, and a sequence that begins anew in other blocks.
fn script(first_prompt: usize) -> Vec<Vec<(usize, usize)>> {
    let decode = |idxs: &[usize]| idxs.iter().map(|&idx| (idx, 1)).collect();
    vec![
        vec![(0, first_prompt)],
        decode(&[0]),
        vec![(0, 1), (1, 14)],
        decode(&[0, 1]),
        decode(&[1, 0]),
        vec![(2, 3), (1, 1)],
        decode(&[0, 1, 2]),
        vec![(3, 5)],
        decode(&[3, 0, 1, 2]),
        decode(&[2, 1, 3]),
        decode(&[2]),
        vec![(4, 6)],
        decode(&[4, 0]),
    ]
}

/// All bits of the script, and of each step what the driver was asked for.
fn run(decoder: &mut Decoder<Cuda>, script: &[Vec<(usize, usize)>]) -> Vec<(Vec<u32>, Option<Calls>)> {
    let n_groups = decoder.config().layer_groups().n_groups();
    let n_blocks = (MAX_LEN.div_ceil(BLOCK_SIZE) * n_groups) as u32;
    // The fifth takes over the blocks of the fourth.
    let place = |number: u32| number.min(3) * n_blocks;
    let mut running: Vec<Running> = (0..5)
        .map(|number| Running::new(number, place(number), n_groups))
        .collect();
    let mut steps = Vec::new();
    for parts in script {
        let before = Calls::now();
        let bits = step(decoder, &mut running, parts);
        steps.push((bits, Calls::now().map(|now| now.since(before.unwrap()))));
    }
    steps
}

fn is_decode(parts: &[(usize, usize)]) -> bool {
    parts.iter().all(|&(_, n_tokens)| n_tokens == 1)
}

fn check(model: &str, dtype: DType, mode: CudaMode, first_prompt: usize) {
    let script = script(first_prompt);
    let Some(mut plain) = load(model, dtype, mode, 0) else {
        return;
    };
    // Once for what is chosen at the first use of a shape.
    let warm = run(&mut plain, &script);
    let expected = run(&mut plain, &script);
    drop(plain);
    let mut recorded = load(model, dtype, mode, MAX_NUM_SEQS).unwrap();
    run(&mut recorded, &script);
    let found = run(&mut recorded, &script);
    let same_bits = warm.iter().zip(&expected).all(|(warm, again)| warm.0 == again.0);
    assert!(same_bits, "{model}: other bits the second time");
    let mut n_replayed = 0;
    let is_card = matches!(stand_in::driver(), Some(Driver::Card));
    for (step_idx, parts) in script.iter().enumerate() {
        let what = format!("{model} {dtype} {mode:?}, step {step_idx}: {parts:?}");
        let ((expected, plain_calls), (found, calls)) = (&expected[step_idx], &found[step_idx]);
        // On a card the library may choose another algorithm for the rows that a step is padded to.
        if !is_card || mode == CudaMode::Deterministic {
            assert!(found == expected, "{what}: other bits than kernel by kernel");
        }
        n_replayed += u64::from(is_decode(parts));
        let (Some(plain_calls), Some(calls)) = (plain_calls, calls) else {
            continue;
        };
        assert_eq!(
            (plain_calls.allocations, calls.allocations),
            (0, 0),
            "{what}: allocations"
        );
        assert!(plain_calls.graph_launches == 0 && plain_calls.launches > 0, "{what}");
        let one_launch = Calls {
            allocations: 0,
            launches: 0,
            graph_launches: 1,
            copies_to_device: 1,
        };
        if is_decode(parts) {
            assert_eq!(*calls, one_launch, "{what}");
        } else {
            assert_eq!(calls.graph_launches, 0, "{what}");
        }
    }
    assert_eq!(recorded.n_replayed_steps(), 2 * n_replayed, "{model}");
}

#[test]
fn recorded_steps_have_the_bits_of_steps_kernel_by_kernel() {
    let _turn = turn();
    for model in models() {
        let first_prompt = if LONG.contains(&&*model) { 94 } else { 7 };
        check(&model, DType::F32, CudaMode::Fast, first_prompt);
    }
}

#[test]
fn recorded_steps_on_tensor_cores_do_too() {
    let _turn = turn();
    for mode in [CudaMode::Fast, CudaMode::Deterministic] {
        check("llama3-tied-ropescaled", DType::Bf16, mode, 30);
    }
    check("gpt-oss-bf16", DType::Bf16, CudaMode::Deterministic, 7);
}

/// With half of the multiprocessors, as an instance for prompts has beside one that generates. Attention is then cut into
/// other pieces, so that bits are compared on the same share.
#[test]
fn recorded_steps_on_a_share_of_the_card_do_too() {
    let _turn = turn();
    let script = script(7);
    let load = |max_graph_seqs| {
        let place = CudaPlace {
            multiprocessor_percent: Some(50),
            ..CudaPlace::default()
        };
        let model = "llama3-tied-ropescaled";
        load_at(
            place,
            MAX_BATCH_TOKENS,
            model,
            DType::F32,
            CudaMode::Deterministic,
            max_graph_seqs,
        )
    };
    let Some(mut plain) = load(0) else { return };
    let expected = run(&mut plain, &script);
    drop(plain);
    let mut recorded = load(MAX_NUM_SEQS).unwrap();
    let found = run(&mut recorded, &script);
    let same_bits = expected
        .iter()
        .zip(&found)
        .all(|(expected, found)| expected.0 == found.0);
    assert!(same_bits, "other bits than kernel by kernel");
    let n_decode = script.iter().filter(|parts| is_decode(parts)).count();
    assert_eq!(recorded.n_replayed_steps(), n_decode as u64);
}

/// Nothing is left to be chosen when the first prompts come.
#[test]
fn the_first_large_step_is_queued_as_the_next_is() {
    let _turn = turn();
    let parts = [0, 1, 2, 3].map(|idx| (idx, 130));
    let max_batch_tokens = parts.iter().map(|(_, n_tokens)| n_tokens).sum();
    let model = "llama3-tied-ropescaled";
    let place = CudaPlace::default();
    let decoder = load_at(place, max_batch_tokens, model, DType::F32, CudaMode::Fast, MAX_NUM_SEQS);
    let Some(mut decoder) = decoder else { return };
    let script = [parts.to_vec()];
    let mut only_step = || run(&mut decoder, &script).remove(0);
    let ((first, first_calls), (second, second_calls)) = (only_step(), only_step());
    assert!(first == second, "other bits the second time");
    assert_eq!(first_calls, second_calls);
}

/// What cannot be recorded is computed kernel by kernel.
#[test]
fn a_step_that_cannot_be_recorded_is_computed() {
    let _turn = turn();
    if !matches!(stand_in::driver(), Some(Driver::StandIn(_))) {
        return;
    }
    let model = "llama-untied-sharded";
    let steps = [vec![(0, 4)], vec![(0, 1)]];
    let mut plain = load(model, DType::F32, CudaMode::Fast, 0).unwrap();
    let expected = run(&mut plain, &steps);
    for (setting, value, usual) in [
        (c"captured_launch_result", 1, 0),
        (c"end_capture_result", 901, 0),
        (c"graph_bytes", 1 << 50, 64 << 10),
    ] {
        controls::set(setting, value);
        let decoder = load(model, DType::F32, CudaMode::Fast, MAX_NUM_SEQS);
        controls::set(setting, usual);
        let found = run(&mut decoder.unwrap(), &steps);
        for ((expected, _), (found, calls)) in expected.iter().zip(&found) {
            let calls = calls.unwrap();
            assert!(found == expected, "{setting:?}: other bits");
            assert!(
                calls.graph_launches == 0 && calls.launches > 0,
                "{setting:?}: {calls:?}"
            );
        }
    }
}
