//! The same models on the CUDA device: on a card (REQUIRE_GPU=1), else through the stand-in for its driver, where a kernel
//! takes a thousand times as long, so that each model computes its shortest prompt, and a few the longest.

mod load;
mod sampled;

use baton_engine::forward::{ForwardPass as _, LogitsWanted, NewTokens, StepSequence};
use baton_engine::model::{CudaKvSize, CudaLoadOptions, Decoder, ModelFolder, load_cuda};
use baton_kernels::DType;
use baton_kernels::cuda::{Cuda, CudaMode};
use load::load_options;

use super::stand_in::{self, Driver};
use super::{MAX_LEN, N_KV_BLOCKS, check_f32, logits_of, options};
use crate::golden_model::{Golden, models, models_folder};

/// One with a window, one with experts, one with two rotary tables: beyond what a short prompt shows of them.
const LONG_ON_THE_STAND_IN: [&str; 3] = ["mistral-swa32", "gpt-oss-bf16", "gemma3-two-ropes"];

fn load(model: &str, dtype: DType, mode: CudaMode) -> Option<Decoder<Cuda>> {
    let folder = ModelFolder::open(models_folder().join(model)).unwrap();
    let options = CudaLoadOptions {
        mode,
        ..load_options(options(dtype, None).model, CudaKvSize::Blocks(N_KV_BLOCKS))?
    };
    Some(load_cuda(&folder, &options, &mut |_, _| {}).unwrap())
}

#[test]
fn f32_equals_the_goldens() {
    for model in models() {
        let golden = Golden::load(&model);
        let Some(mut decoder) = load(&model, DType::F32, CudaMode::Fast) else {
            return;
        };
        let on_card = matches!(stand_in::driver(), Some(Driver::Card));
        for prompt in &golden.prompts {
            let is_short = prompt.name == "short";
            let is_long = prompt.name == "long_200" && LONG_ON_THE_STAND_IN.contains(&&*model);
            if on_card || is_short || is_long {
                check_f32(&mut decoder, &golden, prompt, &format!("{model} cuda {}", prompt.name));
            }
        }
    }
}

/// In 16 bits on tensor cores, and in deterministic mode: near the goldens, and the same bits in chunks and beside others.
#[test]
fn deterministic_bits_do_not_depend_on_chunks_or_batch() {
    let model = "llama3-tied-ropescaled";
    let golden = Golden::load(model);
    let tolerance = golden.tolerances.bf16_max_abs_logit.unwrap();
    let prompt = golden.prompts.iter().find(|prompt| prompt.name == "short").unwrap();
    let Some(mut decoder) = load(model, DType::Bf16, CudaMode::Deterministic) else {
        return;
    };
    let tokens = &prompt.input_ids;
    let whole = logits_of(&mut decoder, tokens, MAX_LEN);
    let last = whole.last().unwrap();
    for (&id, &logit) in prompt.last_logits.top_ids.iter().zip(&prompt.last_logits.top_logits) {
        assert!((last[id as usize] - logit).abs() <= tolerance, "logit of {id}");
    }
    assert!(logits_of(&mut decoder, tokens, 3) == whole, "in chunks of 3");
    let sequence = |tokens, block_tables| StepSequence {
        tokens: NewTokens::Known(tokens),
        start_pos: 0,
        block_tables,
        rope_variant: 0,
        logits: LogitsWanted::All,
    };
    let vocab_size = decoder.vocab_size();
    let (other, own) = ([vec![1]], [vec![7, 3]]);
    let sequences = [sequence(&tokens[..2], &other), sequence(&tokens[..], &own)];
    let beside = decoder.step(&sequences, &mut |_, _| {}).unwrap().logits;
    assert!(beside[2 * vocab_size..] == whole.concat(), "beside another");
}

#[test]
fn a_cache_is_sized_by_what_is_left_and_bounds_the_longest_sequence() {
    if stand_in::driver().is_none() {
        return;
    }
    let folder = ModelFolder::open(models_folder().join(super::SHARDED_MODEL)).unwrap();
    let block_bytes = folder.config.kv_layout(16, DType::F32).block_bytes() as u64;
    let load = |kv| {
        let options = load_options(options(DType::F32, None).model, kv).unwrap();
        load_cuda(&folder, &options, &mut |_, _| {})
    };
    let mut small = load(CudaKvSize::Bytes(3 * block_bytes + 1)).unwrap();
    assert_eq!((small.kv_cache().n_blocks(), small.limits().max_model_len), (3, 48));
    let mut large = load(CudaKvSize::PercentOfFree(1)).unwrap();
    assert!(large.kv_cache().n_blocks() > 100);
    assert_eq!(large.limits().max_model_len, MAX_LEN);
    let message = load(CudaKvSize::Bytes(1 << 44)).err().unwrap().to_string();
    assert!(
        message.contains("device memory") && message.ends_with("are free"),
        "{message}"
    );
}
