//! Models with windowed layers, all of them or some beside full ones: blocks that no query sees are given up where a sequence
//! runs and not sent where it goes, and no token is another one for that.

use std::ops::RangeInclusive;

use serde_json::{Value, json};

use super::cluster::{Cluster, dummy_model_with, prompt};
use super::moves::{ask, move_one, running};

const WINDOW: usize = 64;
/// Wide enough that a step takes milliseconds: the front door then stays within a window's slack of what an instance has
/// generated, on a loaded machine too.
const HIDDEN: u32 = 1024;
const N_PROMPT: usize = 600;
const N_OUTPUT: usize = 400;
const BLOCK_SIZE: usize = 16;
/// Blocks of a layer group with a window that a sequence holds while it decodes: the window, 128 tokens that are kept beside
/// it, what rounding to 64 leaves, and the rounding of both ends to blocks.
const WINDOWED: RangeInclusive<usize> = 4..=(WINDOW + 128 + 64) / BLOCK_SIZE + 2;

/// A model of 8 layers of 4 KV heads of 64, in bf16.
struct Windowed {
    name: &'static str,
    config: Value,
    n_full_groups: usize,
    n_windowed_groups: usize,
    layers_of_group: usize,
}

impl Windowed {
    fn all() -> Windowed {
        Windowed {
            name: "windows",
            config: json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW,
                            "num_key_value_heads": 4 }),
            n_full_groups: 0,
            n_windowed_groups: 1,
            layers_of_group: 8,
        }
    }

    /// Every fourth layer sees everything.
    fn beside_full() -> Windowed {
        Windowed {
            name: "windows-beside-full",
            config: json!({
                "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": WINDOW,
                "num_key_value_heads": 4,
                "sliding_window_pattern": 4, "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh"
            }),
            n_full_groups: 1,
            n_windowed_groups: 3,
            layers_of_group: 2,
        }
    }

    fn block_bytes(&self) -> usize {
        BLOCK_SIZE * self.layers_of_group * 2 * 4 * 64 * 2
    }

    /// Blocks that a sequence of so many tokens holds.
    fn n_held(&self, n_tokens: RangeInclusive<usize>) -> RangeInclusive<usize> {
        let (least, most) = (
            n_tokens.start().div_ceil(BLOCK_SIZE),
            n_tokens.end().div_ceil(BLOCK_SIZE),
        );
        let of = |n_full: usize, n_windowed: usize| self.n_full_groups * n_full + self.n_windowed_groups * n_windowed;
        of(least, *WINDOWED.start())..=of(most, *WINDOWED.end())
    }

    /// A long answer that moves: it holds what it should where it runs, it is moved without what nobody sees, and the tokens
    /// and log-probabilities are those of the whole context computed in chunks elsewhere.
    async fn runs_and_moves(&self, transport: &str, pools: &[&str]) {
        let model = dummy_model_with(self.name, 8, HIDDEN, &self.config);
        let base = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
        let more = [
            "--disaggregation-threshold",
            "0",
            "--prefix-caching",
            "off",
            "--kv-memory",
            "64MiB",
        ];
        let cluster = Cluster::serve(&[&base[..], &more, &["--kv-transport", transport], pools].concat()).await;
        let ids = prompt(3, N_PROMPT);
        let options = json!({ "max_tokens": N_OUTPUT, "temperature": 0 });
        let asked = ask(&cluster, &ids, &options);
        let meanwhile = async {
            let request = running(&cluster, 20).await;
            let at = request.decode_instance.clone();
            let expected = self.n_held(N_PROMPT..=N_PROMPT + N_OUTPUT);
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
                    let held = (join.n_blocks_total - load.n_blocks_free - load.n_blocks_cached) as usize;
                    load.n_running == 1 && expected.contains(&held)
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

        // The move carried the windows, and what full layers see.
        cluster.until_counter(&moved_to, "moves_in_total", |n| n == 1).await;
        let n_bytes = cluster.counter(&moved_to, "kv_bytes_received_total").await as usize;
        let most = *self.n_held(N_PROMPT..=N_PROMPT + N_OUTPUT).end() * self.block_bytes();
        assert!(n_bytes <= most, "{n_bytes} bytes, expected at most {most}");
        let by_transport = format!("kv_bytes_received_by_{}_total", transport.replace('-', "_"));
        assert_eq!(cluster.counter(&moved_to, &by_transport).await as usize, n_bytes);
        cluster.until_idle_and_whole().await;
    }
}

const APART: &[&str] = &["--prefill", "1", "--decode", "2"];

#[tokio::test(flavor = "multi_thread")]
async fn blocks_out_of_every_window_are_given_up_and_not_sent() {
    Windowed::all().runs_and_moves("grpc", APART).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn windowed_layers_beside_full_ones_give_theirs_up_and_move_by_grpc() {
    Windowed::beside_full().runs_and_moves("grpc", APART).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn windowed_layers_beside_full_ones_move_by_shared_memory() {
    Windowed::beside_full().runs_and_moves("shared-memory", APART).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn windowed_layers_beside_full_ones_move_in_process() {
    let together = ["--mixed", "2", "--colocate"];
    Windowed::beside_full().runs_and_moves("in-process", &together).await;
}

/// A sequence for which the memory is too small if no block were given up.
#[tokio::test(flavor = "multi_thread")]
async fn what_fits_only_because_blocks_are_given_up_is_served() {
    let windowed = Windowed::beside_full();
    let model = dummy_model_with(windowed.name, 8, HIDDEN, &windowed.config);
    let n_tokens = 3000;
    // The full group has all of it, the windowed ones at most what a chunk of 64 tokens needs besides.
    let n_blocks = n_tokens / BLOCK_SIZE + 1 + 3 * (WINDOWED.end() + 64 / BLOCK_SIZE);
    assert!(n_blocks < 2 * n_tokens / BLOCK_SIZE, "of four groups");
    let memory = format!("{}KiB", n_blocks * windowed.block_bytes() / 1024);
    let arguments = [
        "--model",
        model.to_str().expect("UTF-8"),
        "--load-format",
        "dummy",
        "--mixed",
        "1",
        "--max-batch-tokens",
        "64",
        "--kv-memory",
        &memory,
        "--max-model-len",
        "3000",
    ];
    let cluster = Cluster::serve(&arguments).await;
    let (ids, options) = (prompt(5, 2900), json!({ "max_tokens": 99, "temperature": 0 }));
    let (first, again) = tokio::join!(ask(&cluster, &ids, &options), ask(&cluster, &ids, &options));
    assert_eq!(first, again);
    assert_eq!(first[0].0.as_array().map(Vec::len), Some(99));
    cluster.until_idle_and_whole().await;
}

/// Several choices, with shared prompts and prefix hits on both sides of each move.
#[tokio::test(flavor = "multi_thread")]
async fn choices_with_windowed_layers_beside_full_ones_move_to_and_fro() {
    let windowed = Windowed::beside_full();
    let model = dummy_model_with(windowed.name, 8, HIDDEN, &windowed.config);
    let base = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    let more = ["--disaggregation-threshold", "0", "--kv-memory", "64MiB"];
    let cluster = Cluster::serve(&[&base[..], &more, APART].concat()).await;
    let ids = prompt(9, 333);
    let options = |salt: &str| json!({ "n": 3, "max_tokens": 120, "temperature": 0.9, "seed": 77, "cache_salt": salt });
    let undisturbed = ask(&cluster, &ids, &options("undisturbed")).await;
    for round in 0..2 {
        let options = options("moved");
        let asked = ask(&cluster, &ids, &options);
        let moves = async {
            for step in 0..3 {
                let request = running(&cluster, 3 * (5 + 20 * step)).await;
                move_one(&cluster, &request.request_id, "").await.expect("it moves");
            }
        };
        let (moved, ()) = tokio::join!(asked, moves);
        assert_eq!(moved, undisturbed, "round {round}");
    }
    cluster.until_idle_and_whole().await;
}
