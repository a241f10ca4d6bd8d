//! What constrained decoding costs: compiling a schema, the mask of a token, reading an output again after a move. Over a
//! made-up byte-level vocabulary of Llama 3's size.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::Instant;

use baton_engine::constraint::{ConstraintCompiler, GroupConstraint};
use baton_engine::philox::uniform_f64;
use baton_engine::sampler::{History, Sampler};
use baton_engine::text::Tokenizer;
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Constraint, SamplingParams};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;

const VOCAB_SIZE: usize = 128_256;
const END: TokenId = VOCAB_SIZE as TokenId - 1;

/// What GPT-2's alphabet writes for a byte.
fn written(byte: u8) -> char {
    let is_itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if is_itself(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&other| !is_itself(other)).count() as u32;
    char::from_u32(0x100 + n_before).unwrap()
}

/// Every byte, numbers of up to three digits, what JSON is made of, and words, half of them after a space.
fn tokenizer() -> Tokenizer {
    let mut texts: BTreeSet<Vec<u8>> = (0..1000).map(|n| n.to_string().into_bytes()).collect();
    for piece in [
        "\":", "\",", "{\"", "\"}", "\": \"", "\", \"", "\"]", "},", "[{\"", "true", "false", "null", "  ", "\n  ",
    ] {
        texts.insert(piece.as_bytes().to_vec());
    }
    for i in 0u32.. {
        if texts.len() + 257 == VOCAB_SIZE {
            break;
        }
        let roll = |word: u32, n: f64| (uniform_f64(5, [i, word, 0, 0]) * n) as usize;
        let letters = (0..2 + roll(0, 8.0)).map(|at| b"etaoinshrdlucmfwypvbgkjqxz"[roll(1 + at as u32, 26.0)]);
        let space = (i % 2 == 0).then_some(b' ');
        texts.insert(space.into_iter().chain(letters).collect());
    }
    let texts = texts.into_iter().filter(|text| text.len() > 1);
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    let vocab: serde_json::Map<String, serde_json::Value> = bytes
        .chain(texts)
        .zip(0u32..)
        .map(|(text, id)| (text.into_iter().map(written).collect(), json!(id)))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(&serde_json::to_vec(&tokenizer).unwrap()).unwrap()
}

/// A list of people; `salt` makes it another schema.
fn schema(salt: u32) -> Constraint {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email"},
            "kind": {"enum": ["a", "b", salt]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
            "notes": {"type": ["string", "null"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    });
    let people =
        json!({ "type": "array", "items": person, "minItems": 40, "x-guidance": { "whitespace_flexible": false } });
    Constraint::JsonSchema(people.to_string().into())
}

/// A random walk of `n_tokens` tokens.
fn walk(compiler: &ConstraintCompiler, n_tokens: u32) -> Vec<TokenId> {
    let mut group = GroupConstraint::new(compiler.compile(&schema(0)).unwrap(), 1);
    let mut output = Vec::new();
    for index in 0..n_tokens {
        let set = group.allowed(0, &output).unwrap();
        let allowed: Vec<TokenId> = (0..END).filter(|&id| set.contains(id)).collect();
        output.push(allowed[(uniform_f64(3, [index, 0, 0, 0]) * allowed.len() as f64) as usize]);
    }
    output
}

fn constraints(criterion: &mut Criterion) {
    let tokenizer = tokenizer();
    let compiler = ConstraintCompiler::new(move || Ok((tokenizer.clone(), vec![END])), VOCAB_SIZE);
    let began = Instant::now();
    compiler.compile(&schema(0)).unwrap();
    println!("vocabulary read in {:.3} s", began.elapsed().as_secs_f64());
    let output = walk(&compiler, 400);

    // The slowest mask of a request that nothing has been matched for.
    let mut group = GroupConstraint::new(compiler.compile(&schema(0)).unwrap(), 1);
    let slowest = (0..=output.len()).map(|n| {
        let began = Instant::now();
        group.allowed(0, &output[..n]).unwrap();
        began.elapsed()
    });
    println!("slowest mask of {}: {:?}", output.len() + 1, slowest.max().unwrap());

    let mut criterion = criterion.benchmark_group("constraint_128k");
    let mut salt = 1;
    criterion.bench_function("compile", |bencher| {
        bencher.iter(|| {
            salt += 1;
            compiler.compile(&schema(salt)).unwrap()
        });
    });
    criterion.throughput(Throughput::Elements(output.len() as u64));
    criterion.bench_function("mask_after_each_of_400", |bencher| {
        bencher.iter(|| {
            let mut group = GroupConstraint::new(compiler.compile(&schema(0)).unwrap(), 1);
            for n in 1..=output.len() {
                black_box(group.allowed(0, &output[..n]).unwrap());
            }
        });
    });
    criterion.bench_function("read_400_again", |bencher| {
        bencher.iter(|| {
            let mut group = GroupConstraint::new(compiler.compile(&schema(0)).unwrap(), 1);
            black_box(group.allowed(0, &output).unwrap());
        });
    });
    let logits: Vec<f32> = (0..VOCAB_SIZE as u32)
        .map(|id| uniform_f64(1, [id, 0, 0, 0]) as f32)
        .collect();
    let allowed = group.allowed(0, &output).unwrap().clone();
    let (params, history) = (
        SamplingParams::default(),
        History {
            prompt: &[],
            output: &[],
        },
    );
    let mut sampler = Sampler::new();
    criterion.throughput(Throughput::Bytes((VOCAB_SIZE * 4) as u64));
    criterion.bench_function("greedy_within_a_mask", |bencher| {
        bencher.iter(|| {
            sampler
                .sample_after(black_box(&logits), &params, 0, history, Some(&allowed))
                .unwrap()
        });
    });
    criterion.finish();
}

criterion_group!(benches, constraints);
criterion_main!(benches);
