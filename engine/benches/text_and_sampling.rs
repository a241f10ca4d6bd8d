//! What the step loop and the front door do for each token beside the model: sampling and text. Vocabulary of Llama 3.

use std::hint::black_box;

use baton_engine::philox::uniform_f64;
use baton_engine::sampler::Sampler;
use baton_engine::text::Tokenizer;
use baton_scheduler::request::SamplingParams;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const VOCAB_SIZE: usize = 128_256;

/// Logits whose spread is that of a real model's: a few large ones over a broad bulk.
fn logits() -> Vec<f32> {
    (0..VOCAB_SIZE as u32)
        .map(|id| {
            let uniform = |word: u32| uniform_f64(1, [id, word, 0, 0]) as f32;
            (uniform(0) + uniform(1) + uniform(2) + uniform(3) - 2.0) * 5.0 + if id % 9973 == 0 { 8.0 } else { 0.0 }
        })
        .collect()
}

fn sampling(criterion: &mut Criterion) {
    let logits = logits();
    let base = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    };
    let cases = [
        (
            "greedy",
            SamplingParams {
                temperature: 0.0,
                ..base.clone()
            },
        ),
        ("temperature", base.clone()),
        (
            "top_p_0.9",
            SamplingParams {
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "top_k_50",
            SamplingParams {
                top_k: 50,
                ..base.clone()
            },
        ),
        (
            "greedy_logprobs_20",
            SamplingParams {
                temperature: 0.0,
                logprobs: Some(20),
                ..base
            },
        ),
    ];
    let mut group = criterion.benchmark_group("sample_128k");
    group.throughput(Throughput::Bytes((VOCAB_SIZE * 4) as u64));
    for (name, params) in cases {
        let mut sampler = Sampler::new();
        let mut index = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                index += 1;
                sampler.sample(black_box(&logits), &params, 0, index).unwrap()
            });
        });
    }
    group.finish();
}

fn text(criterion: &mut Criterion) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tokenizers/llama3/tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(path).unwrap()).unwrap();
    let prompt = "The lighthouse keeper counted the waves, and wrote the number in a green notebook. ".repeat(50);
    let ids = tokenizer.encode(&prompt).unwrap();
    let mut group = criterion.benchmark_group("text");
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| tokenizer.encode(black_box(&prompt)).unwrap())
    });
    group.bench_function("detokenize_stream", |bencher| {
        bencher.iter(|| {
            let mut stream = tokenizer.stream();
            ids.iter().map(|&id| stream.push(id).unwrap().len()).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group!(benches, sampling, text);
criterion_main!(benches);
