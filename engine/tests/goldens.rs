//! The decoder against an independent implementation's numbers (tests/data/models), for every instruction set of this machine.
//! Tolerances are those of goldens.json; f32 is the test that decides correctness.

mod cuda;
mod golden_model;
#[path = "../../kernels/tests/cuda_device/stand_in/mod.rs"]
mod stand_in;

use baton_engine::forward::{ForwardPass, LogitsWanted, NewTokens, StepSequence};
use baton_engine::model::{CpuLoadOptions, Decoder, DecoderLimits, LoadFormat, LoadOptions, ModelFolder, load_cpu};
use baton_engine::sampler::Sampler;
use baton_kernels::{Backend, Cpu, DType, Isa};
use baton_scheduler::batch::RELEASED_BLOCK;
use baton_scheduler::request::SamplingParams;

use golden_model::{Golden, Prompt, models, models_folder};

/// For what any model shows as well as another.
const ONE_MODEL: &str = "llama3-tied-ropescaled";
const SHARDED_MODEL: &str = "llama-untied-sharded";
const BLOCK_SIZE: usize = 16;
const MAX_LEN: usize = 512;
/// A power of two: every odd step scatters.
const N_KV_BLOCKS: usize = 256;

fn options(dtype: DType, isa: Option<Isa>) -> CpuLoadOptions {
    CpuLoadOptions {
        model: LoadOptions {
            dtype,
            block_size: BLOCK_SIZE,
            limits: DecoderLimits {
                max_batch_tokens: MAX_LEN,
                max_model_len: MAX_LEN,
            },
            packed_dir: None,
            load_format: LoadFormat::Safetensors,
        },
        n_threads: 2,
        isa,
        n_kv_blocks: N_KV_BLOCKS,
    }
}

/// The instruction sets of this machine, portable always among them.
fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

fn load(model: &str, dtype: DType, isa: Option<Isa>) -> Decoder<Cpu> {
    let folder = ModelFolder::open(models_folder().join(model)).unwrap();
    load_cpu(&folder, &options(dtype, isa), &mut |_, _| {}).unwrap()
}

/// Logits of every position of `tokens`, computed in steps of at most `chunk` tokens over scattered blocks.
fn logits_of<B: Backend>(decoder: &mut Decoder<B>, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    // Neither in order nor starting at block 0; those of the layer groups alternate.
    let windows = decoder.config().sliding_windows();
    let scattered = |i: usize| ((i * 7 + 3) % N_KV_BLOCKS) as u32;
    let n_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let table = |group: usize| (0..n_blocks).map(|i| scattered(i * windows.len() + group)).collect();
    let mut block_tables: Vec<Vec<u32>> = (0..windows.len()).map(table).collect();
    let mut rows = Vec::new();
    let n_layers = decoder.config().n_layers;
    let short_context = decoder.config().short_context();
    let rope_variant = usize::from(short_context.is_some_and(|short_context| tokens.len() > short_context));
    for (chunk_idx, chunk_tokens) in tokens.chunks(chunk).enumerate() {
        // What no query of the step sees is not there.
        for (table, window) in block_tables.iter_mut().zip(&windows) {
            let first_seen = window.map_or(0, |window| {
                (chunk_idx * chunk + 1).saturating_sub(window.n_tokens) / window.grain * window.grain
            });
            table[..first_seen / BLOCK_SIZE].fill(RELEASED_BLOCK);
        }
        let sequence = StepSequence {
            tokens: NewTokens::Known(chunk_tokens),
            start_pos: chunk_idx * chunk,
            block_tables: &block_tables,
            rope_variant,
            logits: LogitsWanted::All,
        };
        let mut layers = Vec::new();
        let vocab_size = decoder.vocab_size();
        let logits = decoder
            .step(&[sequence], &mut |layer, _| layers.push(layer))
            .unwrap()
            .logits;
        rows.extend(logits.chunks(vocab_size).map(<[f32]>::to_vec));
        assert_eq!(layers, (0..n_layers).collect::<Vec<_>>());
    }
    assert_eq!(rows.len(), tokens.len());
    rows
}

fn logprob(row: &[f32], id: u32) -> f32 {
    Sampler::new().logprobs(row, id, 0).unwrap().logprob
}

fn top1(row: &[f32]) -> u32 {
    Sampler::new().sample(row, &SamplingParams::default(), 0, 0).unwrap().id
}

/// Everything goldens.json says about one prompt, from logits of every position.
fn check_f32<B: Backend>(decoder: &mut Decoder<B>, golden: &Golden, prompt: &Prompt, what: &str) {
    let tolerance = golden.tolerances.f32_max_abs_logit;
    let near = |got: f32, want: f32, at: &str| {
        assert!(
            (got - want).abs() <= tolerance,
            "{what} {at}: {got}, expected {want} within {tolerance}"
        );
    };
    let n_prompt = prompt.input_ids.len();
    let continued: Vec<u32> = [&*prompt.input_ids, &prompt.greedy.ids].concat();
    let rows = logits_of(decoder, &continued, MAX_LEN);

    let last = &rows[n_prompt - 1];
    for (&id, &logit) in prompt.last_logits.top_ids.iter().zip(&prompt.last_logits.top_logits) {
        near(last[id as usize], logit, &format!("last logit of {id}"));
    }
    let mean = last.iter().map(|&logit| f64::from(logit)).sum::<f64>() / last.len() as f64;
    near(mean as f32, prompt.last_logits.mean, "mean of the last logits");

    for (position, row) in rows[..n_prompt].iter().enumerate() {
        let expected = prompt.positions.top1_ids[position];
        near(
            logprob(row, expected),
            prompt.positions.top1_logprobs[position],
            &format!("top 1 at {position}"),
        );
        if position + 1 < n_prompt {
            let next = prompt.input_ids[position + 1];
            let expected = prompt.positions.next_token_logprobs[position];
            near(
                logprob(row, next),
                expected,
                &format!("log-probability of the prompt's {position}"),
            );
        }
    }
    // The continuation is forced, so that one near tie does not change every later step.
    for (step, &id) in prompt.greedy.ids.iter().enumerate() {
        let row = &rows[n_prompt - 1 + step];
        near(
            logprob(row, id),
            prompt.greedy.logprobs[step],
            &format!("greedy log-probability {step}"),
        );
        if prompt.greedy.gaps[step] >= golden.tolerances.f32_min_gap_for_equal_token {
            assert_eq!(top1(row), id, "{what}: greedy token {step}");
        }
    }
    let forced: Vec<u32> = [&*prompt.input_ids, &prompt.forced.ids].concat();
    let rows = logits_of(decoder, &forced, MAX_LEN);
    for (step, &id) in prompt.forced.ids.iter().enumerate() {
        let got = logprob(&rows[n_prompt - 1 + step], id);
        near(
            got,
            prompt.forced.logprobs[step],
            &format!("forced log-probability {step}"),
        );
    }
}

#[test]
fn f32_equals_the_goldens() {
    for model in &models() {
        let golden = Golden::load(model);
        for isa in available() {
            let mut decoder = load(model, DType::F32, Some(isa));
            for prompt in &golden.prompts {
                check_f32(&mut decoder, &golden, prompt, &format!("{model} {isa} {}", prompt.name));
            }
        }
    }
}

#[test]
fn bf16_is_as_near_as_bf16_can_be() {
    for model in &models() {
        let golden = Golden::load(model);
        let tolerances = &golden.tolerances;
        for isa in available() {
            let mut decoder = load(model, DType::Bf16, Some(isa));
            for prompt in &golden.prompts {
                let what = format!("{model} {isa} {}", prompt.name);
                let n_prompt = prompt.input_ids.len();
                let continued: Vec<u32> = [&*prompt.input_ids, &prompt.greedy.ids].concat();
                let rows = logits_of(&mut decoder, &continued, MAX_LEN);
                let last = &rows[n_prompt - 1];
                for (&id, &logit) in prompt.last_logits.top_ids.iter().zip(&prompt.last_logits.top_logits) {
                    let error = (last[id as usize] - logit).abs();
                    assert!(
                        error <= tolerances.bf16_max_abs_logit.unwrap_or(f32::INFINITY),
                        "{what}: logit of {id} is off by {error}"
                    );
                }
                for (step, &id) in prompt.greedy.ids.iter().enumerate() {
                    if prompt.greedy.gaps[step] >= tolerances.bf16_min_gap_for_equal_token.unwrap_or(f32::INFINITY) {
                        assert_eq!(top1(&rows[n_prompt - 1 + step]), id, "{what}: greedy token {step}");
                    }
                }
                let n_equal = (0..n_prompt)
                    .filter(|&i| top1(&rows[i]) == prompt.positions.top1_ids[i])
                    .count();
                // The share is over all positions of a model; one prompt alone may be a few positions worse.
                let least = (n_prompt as f32 * tolerances.bf16_min_top1_agreement).floor() - 3.0;
                assert!(
                    n_equal as f32 >= least,
                    "{what}: top 1 agrees at {n_equal} of {n_prompt} positions"
                );
            }
        }
    }
}

/// Whole, in chunks that cross blocks, and token by token: the same bits.
#[test]
fn chunks_do_not_change_a_bit() {
    for model in &models() {
        let golden = Golden::load(model);
        let prompt = golden.prompts.iter().find(|prompt| prompt.name == "long_200").unwrap();
        for isa in available() {
            for dtype in [DType::F32, DType::Bf16] {
                let mut decoder = load(model, dtype, Some(isa));
                let whole = logits_of(&mut decoder, &prompt.input_ids, MAX_LEN);
                for chunk in [1, 7, 16, 33] {
                    let chunked = logits_of(&mut decoder, &prompt.input_ids, chunk);
                    assert!(whole == chunked, "{model} {isa} {dtype} in chunks of {chunk}");
                }
            }
        }
    }
}

/// A prefill chunk, a decode token and a sequence without logits in one step: each row as if it were alone.
#[test]
fn a_mixed_batch_does_not_change_a_bit() {
    let golden = Golden::load(ONE_MODEL);
    let (a, b) = (&golden.prompts[0].input_ids, &golden.prompts[1].input_ids);
    for dtype in [DType::F32, DType::Bf16] {
        let mut decoder = load(ONE_MODEL, dtype, None);
        let alone_a = logits_of(&mut decoder, a, MAX_LEN);
        let alone_b = logits_of(&mut decoder, b, MAX_LEN);
        let vocab_size = decoder.vocab_size();
        let (table_a, table_b): ([Vec<u32>; 1], [Vec<u32>; 1]) = ([(0..8).collect()], [(8..40).collect()]);
        let table_c = [vec![50]];
        let (before_last, last) = b.split_at(b.len() - 1);
        let sequence = |tokens, start_pos, block_tables, logits| StepSequence {
            tokens: NewTokens::Known(tokens),
            start_pos,
            block_tables,
            rope_variant: 0,
            logits,
        };
        let none = decoder
            .step(
                &[sequence(before_last, 0, &table_b, LogitsWanted::None)],
                &mut |_, _| {},
            )
            .unwrap();
        assert!(none.logits.is_empty() && none.hidden.is_empty());
        let step = [
            sequence(a, 0, &table_a, LogitsWanted::All),
            sequence(&b[..3], 0, &table_c, LogitsWanted::None),
            sequence(last, before_last.len(), &table_b, LogitsWanted::Last),
        ];
        let rows: Vec<Vec<f32>> = decoder
            .step(&step, &mut |_, _| {})
            .unwrap()
            .logits
            .chunks(vocab_size)
            .map(<[f32]>::to_vec)
            .collect();
        assert_eq!(rows.len(), a.len() + 1);
        assert!(rows[..a.len()] == alone_a[..], "{dtype}: the prefill chunk");
        assert!(rows[a.len()] == alone_b[b.len() - 1], "{dtype}: the decode token");
    }
}

/// Packed once on disk, mapped by the second decoder, and the same as packed in memory.
#[test]
fn a_packed_file_is_shared() {
    let golden = Golden::load(SHARDED_MODEL);
    let folder = ModelFolder::open(models_folder().join(SHARDED_MODEL)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut on_disk = options(DType::F32, None);
    on_disk.model.packed_dir = Some(directory.path().to_owned());
    let prompt = &golden.prompts[0].input_ids;
    let expected = logits_of(&mut load(SHARDED_MODEL, DType::F32, None), prompt, MAX_LEN);
    let mut n_reports = Vec::new();
    for _ in 0..2 {
        let mut n_calls = 0;
        let mut decoder = load_cpu(&folder, &on_disk, &mut |_, _| n_calls += 1).unwrap();
        assert!(logits_of(&mut decoder, prompt, MAX_LEN) == expected);
        n_reports.push(n_calls);
    }
    assert!(n_reports[0] > 0 && n_reports[1] == 0, "packed {n_reports:?} times");
}

#[test]
fn dummy_weights_need_no_files_and_depend_on_the_seed() {
    let config = std::fs::read(models_folder().join(ONE_MODEL).join("config.json")).unwrap();
    let folder = ModelFolder::from_embedded(&[("config.json", config.leak())]).unwrap();
    let logits = |seed: u64| {
        let mut options = options(DType::Bf16, None);
        options.model.load_format = LoadFormat::Dummy { seed };
        let mut decoder = load_cpu(&folder, &options, &mut |_, _| {}).unwrap();
        (
            logits_of(&mut decoder, &[1, 2, 3], MAX_LEN).concat(),
            decoder.transfer_fingerprint(),
        )
    };
    let (first, fingerprint) = logits(1);
    assert!(first.iter().all(|logit| logit.is_finite() && logit.abs() < 10.0));
    assert!(first.iter().any(|logit| *logit != first[0]));
    assert!(logits(1) == (first, fingerprint));
    assert!(logits(2).1 != fingerprint);
}
