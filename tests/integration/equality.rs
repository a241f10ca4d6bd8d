//! Disaggregated == mixed == alone, bit for bit: the same ids and exactly the same log-probabilities, with each event that
//! could disturb them shown to have happened.

use std::path::PathBuf;

use futures::future::join_all;
use serde_json::{Value, json};

use super::cluster::{Answer, Cluster, dummy_model, dummy_model_with, prompt};

/// Tokens of each answer: enough to outgrow what was reserved at first, several times.
const N_OUTPUT: usize = 64;

/// Requests of every kind: short and long, greedy and drawn, alike in their beginnings and not.
fn requests() -> Vec<(Vec<u32>, Value)> {
    let shared = prompt(1, 96);
    let mut requests = Vec::new();
    for i in 0..10u32 {
        let mut ids = if i % 2 == 0 { shared.clone() } else { Vec::new() };
        ids.extend(prompt(100 + i, [1, 7, 16, 33, 64, 129, 200, 15, 17, 301][i as usize]));
        let options = if i % 3 == 0 {
            json!({ "temperature": 0, "max_tokens": N_OUTPUT })
        } else {
            json!({ "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": i, "max_tokens": N_OUTPUT })
        };
        requests.push((ids, options));
    }
    requests
}

/// Each request by itself on one instance, without any prefix hit.
async fn alone(model: &str, dtype: &str) -> Vec<Answer> {
    let arguments = [
        "--model",
        model,
        "--load-format",
        "dummy",
        "--dtype",
        dtype,
        "--mixed",
        "1",
    ];
    let cluster = Cluster::serve(&arguments).await;
    let mut answers = Vec::new();
    for (i, (ids, mut options)) in requests().into_iter().enumerate() {
        options["cache_salt"] = json!(format!("alone-{i}"));
        answers.push(cluster.complete(&ids, &options).await);
    }
    assert_eq!(cluster.counter("mixed-0", "prefix_hit_tokens_total").await, 0);
    assert_eq!(cluster.counter("mixed-0", "preemptions_total").await, 0);
    answers
}

/// All requests at once, twice: the second time their prefixes are cached.
async fn together(cluster: &Cluster, expected: &[Answer], what: &str) {
    let requests = requests();
    for round in 0..2 {
        let asked = requests.iter().map(|(ids, options)| cluster.complete(ids, options));
        let answers: Vec<Answer> = join_all(asked).await;
        for (i, (answer, expected)) in answers.iter().zip(expected).enumerate() {
            assert_eq!(answer, expected, "{what}, round {round}, request {i}");
        }
    }
    cluster.until_idle_and_whole().await;
}

/// What is served, and how few of its blocks make sequences lose theirs, although each fits alone.
struct Served {
    model: PathBuf,
    n_tight_blocks: usize,
    /// K and V of 16 tokens in the layers of a block.
    block_elements: usize,
}

impl Served {
    /// 26 blocks of 4 layers.
    fn full() -> Served {
        Served {
            model: dummy_model("equality", 4, 256),
            n_tight_blocks: 26,
            block_elements: 16 * 4 * 2 * 2 * 64,
        }
    }

    /// Two full layers and four with a window, in blocks of two: 400 tokens need 25 blocks of the full group, and of each of
    /// the others the 20 that lie in a window of 64, the 128 kept beside it, the grain of 64, a chunk of 48 and one block.
    fn windowed() -> Served {
        let config = json!({
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 64,
            "sliding_window_pattern": 3, "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh"
        });
        Served {
            model: dummy_model_with("equality-windows", 6, 256, &config),
            n_tight_blocks: 66,
            block_elements: 16 * 2 * 2 * 2 * 64,
        }
    }
}

async fn equal_everywhere(dtype: &str, served: &Served) {
    let model = served.model.to_str().expect("UTF-8");
    let expected = alone(model, dtype).await;
    assert!(expected.iter().all(|answer| answer.len() == N_OUTPUT));
    let base = ["--model", model, "--load-format", "dummy", "--dtype", dtype];

    // Handed over, in chunks smaller than most prompts, beside others, with prefix hits on both ends.
    let more = ["--prefill", "1", "--decode", "1", "--disaggregation-threshold", "0"];
    let chunks = ["--max-batch-tokens", "48", "--max-num-seqs", "32"];
    let cluster = Cluster::serve(&[&base[..], &more, &chunks].concat()).await;
    together(&cluster, &expected, "disaggregated").await;
    cluster
        .until_counter("decode-0", "handoffs_received_total", |n| n == 20)
        .await;
    cluster
        .until_counter("decode-0", "kv_bytes_received_total", |n| n > 0)
        .await;
    cluster
        .until_counter("prefill-0", "prefix_hit_tokens_total", |n| n > 0)
        .await;
    cluster
        .until_counter("decode-0", "kv_blocks_not_sent_total", |n| n > 0)
        .await;
    let (sent, received) = (
        cluster.counter("prefill-0", "kv_bytes_sent_total").await,
        cluster.counter("decode-0", "kv_bytes_received_total").await,
    );
    assert_eq!(sent, received, "what was sent arrived");
    assert_eq!(cluster.counter("decode-0", "handoffs_failed_total").await, 0);
    drop(cluster);

    // The same with so little memory at the decode instance that sequences lose their blocks and recompute.
    let block_bytes = served.block_elements * if dtype == "f32" { 4 } else { 2 };
    let memory = format!("{}KiB", served.n_tight_blocks * block_bytes / 1024);
    let tight = ["--kv-memory", memory.as_str(), "--max-model-len", "400"];
    for (mode, what) in [(&more[..], "disaggregated"), (&["--mixed", "1"][..], "mixed")] {
        let cluster = Cluster::serve(&[&base[..], mode, &chunks, &tight].concat()).await;
        together(&cluster, &expected, &format!("{what} and preempted")).await;
        let decoding = if what == "mixed" { "mixed-0" } else { "decode-0" };
        // Who is preempted depends on who arrives when: again until somebody was.
        for round in 1.. {
            if cluster.counter(decoding, "preemptions_total").await > 0 {
                break;
            }
            assert!(round < 10, "nobody was preempted");
            together(&cluster, &expected, &format!("{what} and preempted")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn same_bits_in_f32() {
    equal_everywhere("f32", &Served::full()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn same_bits_in_bf16() {
    equal_everywhere("bf16", &Served::full()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn same_bits_where_windowed_layers_give_blocks_up_beside_full_ones() {
    equal_everywhere("f32", &Served::windowed()).await;
}

/// Prompts that arrive together and share a new prefix: it is computed once and moved once.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_prefix_is_computed_and_moved_once() {
    let model = dummy_model("equality", 4, 256);
    let arguments = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    let pools = ["--prefill", "2", "--decode", "2", "--disaggregation-threshold", "0"];
    let cluster = Cluster::serve(&[&arguments[..], &pools].concat()).await;
    let shared = prompt(7, 1024);
    let bodies: Vec<Vec<u32>> = (0..4u32).map(|i| [&shared[..], &prompt(50 + i, 8)].concat()).collect();
    let options = json!({ "temperature": 0, "max_tokens": 4 });
    join_all(bodies.iter().map(|ids| cluster.complete(ids, &options))).await;
    cluster.until_idle_and_whole().await;
    let mut computed = 0;
    let mut blocks_not_sent = 0;
    for i in 0..2 {
        computed += cluster.counter(&format!("prefill-{i}"), "prefill_tokens_total").await;
        blocks_not_sent += cluster
            .counter(&format!("decode-{i}"), "kv_blocks_not_sent_total")
            .await;
    }
    assert_eq!(computed, 1024 + 4 * 8, "the shared kibitoken once, each tail once");
    assert_eq!(blocks_not_sent, 3 * 64, "its 64 blocks moved once");
}
