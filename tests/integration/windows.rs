//! A model whose layers all have a window: blocks that no query sees are given up where it runs and not sent where it goes,
//! and no token is another one for that.

use serde_json::json;

use super::cluster::{Cluster, dummy_model_with, prompt};
use super::moves::{ask, move_one, running};

const WINDOW: u32 = 64;
const N_PROMPT: usize = 600;
const N_OUTPUT: usize = 150;

#[tokio::test(flavor = "multi_thread")]
async fn blocks_out_of_every_window_are_given_up_and_not_sent() {
    let more = json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW });
    let model = dummy_model_with("windows", 8, 512, &more);
    let cluster = Cluster::serve(&[
        "--model",
        model.to_str().expect("UTF-8"),
        "--load-format",
        "dummy",
        "--disaggregation-threshold",
        "0",
        "--prefill",
        "1",
        "--decode",
        "2",
        "--prefix-caching",
        "off",
        "--kv-transport",
        "grpc",
    ])
    .await;
    let ids = prompt(3, N_PROMPT);
    let options = json!({ "max_tokens": N_OUTPUT, "temperature": 0 });
    let asked = ask(&cluster, &ids, &options);
    let meanwhile = async {
        let request = running(&cluster, 20).await;
        let at = request.decode_instance.clone();
        // The window, what is kept beside it, and the rounding of both: far from the 39 blocks of the context.
        cluster
            .until("given up", |instances| {
                let status = instances
                    .iter()
                    .find(|status| status.join.as_ref().is_some_and(|join| join.instance_id == at))
                    .expect("it is there");
                let (join, load) = (
                    status.join.as_ref().expect("joined"),
                    status.load.as_ref().expect("a load"),
                );
                let held = join.n_blocks_total - load.n_blocks_free - load.n_blocks_cached;
                load.n_running == 1 && (4..=18).contains(&held)
            })
            .await;
        let (from, to) = move_one(&cluster, &request.request_id, "").await.expect("it moves");
        assert_ne!(from, to);
        to
    };
    let (answer, moved_to) = tokio::join!(asked, meanwhile);
    let (tokens, logprobs) = &answer[0];
    let tokens: Vec<u32> = serde_json::from_value(tokens.clone()).expect("ids");
    assert_eq!(tokens.len(), N_OUTPUT);

    // Prompt and output as one prompt, which another instance computes in chunks: the same bits.
    let forced = [&ids[..], &tokens].concat();
    let body = json!({ "prompt": forced, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1 });
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let reported = answer["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .expect("token_logprobs");
    assert_eq!(
        reported[N_PROMPT..N_PROMPT + N_OUTPUT],
        *logprobs.as_array().expect("logprobs")
    );

    // Of 39 blocks and more the move carried those of the window: 64 KiB each, of 8 layers with 4 KV heads of 64 in bf16.
    let block_bytes = 16 * 8 * 2 * 4 * 64 * 2;
    cluster.until_counter(&moved_to, "moves_in_total", |n| n == 1).await;
    let n_bytes = cluster.counter(&moved_to, "kv_bytes_received_total").await;
    assert!(
        n_bytes <= 18 * block_bytes,
        "{n_bytes} bytes for blocks of {block_bytes}"
    );
    cluster.until_idle_and_whole().await;
}
