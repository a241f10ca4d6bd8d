//! Mean hidden states against an independent implementation's (tests/data/models/*/embeddings.json), through the step loop:
//! whole and in chunks, cold and behind a cached prefix, alone and beside others.

use std::path::Path;
use std::sync::Arc;

use baton_engine::engine::{EngineConfig, EngineHandle, start};
use baton_engine::model::{CpuLoadOptions, DecoderLimits, LoadFormat, LoadOptions, ModelFolder, load_cpu};
use baton_kernels::DType;
use baton_scheduler::batch::BatchConfig;
use baton_scheduler::ids::{Epoch, RequestId};
use baton_scheduler::request::{PortableState, Request, SamplingParams};
use serde::Deserialize;

/// Tied and untied, with norms of q and k, soft caps and windows, a long rotary table, experts and sinks.
const MODELS: [&str; 5] = [
    "llama3-tied-ropescaled",
    "qwen3-qknorm",
    "gemma2-softcap-swa32",
    "phi3-longrope-long",
    "gpt-oss-bf16",
];
const TOLERANCE: f32 = 1e-3;
const BLOCK_SIZE: usize = 16;
const N_BLOCKS: usize = 64;

#[derive(Deserialize)]
struct Embeddings {
    prompts: Vec<Embedded>,
}

#[derive(Deserialize)]
struct Embedded {
    name: String,
    input_ids: Vec<u32>,
    mean: Vec<f32>,
}

fn folder_of(model: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/models")
        .join(model)
}

fn engine(model: &str, max_batch_tokens: usize) -> EngineHandle {
    let folder = ModelFolder::open(folder_of(model)).unwrap();
    let options = CpuLoadOptions {
        model: LoadOptions {
            dtype: DType::F32,
            block_size: BLOCK_SIZE,
            limits: DecoderLimits {
                max_batch_tokens,
                max_model_len: 512,
            },
            packed_dir: None,
            load_format: LoadFormat::Safetensors,
        },
        n_threads: 2,
        isa: None,
        n_kv_blocks: N_BLOCKS,
    };
    let decoder = load_cpu(&folder, &options, &mut |_, _| {}).unwrap();
    let batch = BatchConfig {
        max_batch_tokens,
        max_num_seqs: 8,
        max_model_len: 512,
        short_context: decoder.config().short_context().map(|n_tokens| n_tokens as u32),
        windows: decoder.config().sliding_windows(),
        ..BatchConfig::new(N_BLOCKS, BLOCK_SIZE, decoder.transfer_fingerprint())
    };
    start(decoder, EngineConfig::new(batch)).unwrap()
}

fn to_embed(ids: &[u32]) -> Request {
    Request::to_embed(RequestId(1), Arc::from(ids), 0)
}

#[tokio::test]
async fn means_agree_with_the_oracle_whole_and_in_chunks_cold_and_cached_to_the_bit() {
    for model in MODELS {
        let file = std::fs::read(folder_of(model).join("embeddings.json")).unwrap();
        let expected: Embeddings = serde_json::from_slice(&file).unwrap();
        let (whole, chunked) = (engine(model, 512), engine(model, 13));
        assert_eq!(expected.prompts.len(), 3);
        for Embedded { name, input_ids, mean } in expected.prompts {
            let ids = &input_ids;
            let cold = whole.embed(to_embed(ids)).await.unwrap();
            assert_eq!(cold.len(), mean.len());
            for (i, (got, want)) in cold.iter().zip(&mean).enumerate() {
                let off = (got - want).abs();
                assert!(
                    off <= TOLERANCE,
                    "{model} {name} [{i}]: {got}, expected {want} within {TOLERANCE}"
                );
            }
            // The prompt's blocks are cached now, and a generation beside it decodes.
            let state = PortableState::fresh(
                Request {
                    sampling: SamplingParams {
                        max_tokens: 20,
                        ..SamplingParams::default()
                    },
                    ..to_embed(ids)
                },
                Epoch(1),
            );
            let mut generation = whole.generate(state).unwrap();
            let (beside, again) = tokio::join!(whole.embed(to_embed(ids)), whole.embed(to_embed(ids)));
            while generation.next().await.is_some() {}
            let in_chunks = chunked.embed(to_embed(ids)).await.unwrap();
            for (got, how) in [
                (beside.unwrap(), "cached"),
                (again.unwrap(), "again"),
                (in_chunks, "in chunks"),
            ] {
                assert!(got == cold, "{model} {name}: {how}");
            }
        }
        whole.shutdown().await;
        chunked.shutdown().await;
    }
}
