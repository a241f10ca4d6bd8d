//! What another implementation computed with the same models, through HTTP against prefill and decode processes.

use serde_json::{Value, json};

use super::cluster::{Cluster, repository};
use super::golden_models::golden_models;

struct Golden {
    folder: String,
    data: Value,
}

fn goldens() -> Vec<Golden> {
    golden_models(&repository("tests/data/models"))
        .into_iter()
        .map(|folder| {
            let text = std::fs::read_to_string(folder.join("goldens.json")).expect("goldens.json");
            Golden {
                folder: folder.to_str().expect("UTF-8").to_owned(),
                data: serde_json::from_str(&text).expect("JSON"),
            }
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_u64().expect("an id") as u32)
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .expect("numbers")
        .iter()
        .map(|number| number.as_f64().expect("a number"))
        .collect()
}

async fn compare(dtype: &str) {
    for golden in goldens() {
        // In bf16 a choice of experts that flips moves single positions by several logits, in any implementation.
        if dtype != "f32" && golden.data["tolerances"]["is_moe"] == true {
            continue;
        }
        let arguments = [
            "--model",
            &golden.folder,
            "--dtype",
            dtype,
            "--disaggregation-threshold",
            "0",
        ];
        let cluster = Cluster::serve(&arguments).await;
        let tolerances = &golden.data["tolerances"];
        let tolerance = |name: &str| tolerances[name].as_f64().expect("a tolerance");
        let (max_error, min_gap) = match dtype {
            "f32" => (tolerance("f32_max_abs_logit"), tolerance("f32_min_gap_for_equal_token")),
            _ => (
                tolerance("bf16_max_abs_logit"),
                tolerance("bf16_min_gap_for_equal_token"),
            ),
        };
        let mut worst = 0f64;
        for case in golden.data["prompts"].as_array().expect("prompts") {
            let name = case["name"].as_str().expect("a name");
            let input = ids(&case["input_ids"]);

            // Generated freely: equal until the first step that another rounding may decide otherwise.
            let greedy = &case["greedy"];
            let (expected, gaps, logprobs) = (
                ids(&greedy["ids"]),
                numbers(&greedy["gaps"]),
                numbers(&greedy["logprobs"]),
            );
            let answer = cluster
                .complete(&input, &json!({ "max_tokens": expected.len(), "temperature": 0 }))
                .await;
            assert_eq!(answer.len(), expected.len(), "{name}");
            for (step, (id, logprob)) in answer.iter().enumerate() {
                if gaps[step] < min_gap && *id != expected[step] {
                    break;
                }
                assert_eq!(*id, expected[step], "{dtype} {name} step {step}, gap {}", gaps[step]);
                let error = (logprob - logprobs[step]).abs();
                worst = worst.max(error);
                assert!(
                    error <= max_error,
                    "{dtype} {name} step {step}: log-probability off by {error}"
                );
            }

            // Forced: the prompt and the golden continuation, every position compared.
            let forced = [&input[..], &expected].concat();
            let body = json!({ "prompt": forced, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1 });
            let (status, answer) = cluster.post("/v1/completions", &body).await;
            assert_eq!(status, 200, "{answer}");
            let reported = answer["choices"][0]["logprobs"]["token_logprobs"]
                .as_array()
                .expect("token_logprobs");
            assert!(reported[0].is_null(), "the first token has no log-probability");
            let next = numbers(&case["positions"]["next_token_logprobs"]);
            let of_prompt = next.iter().take(input.len() - 1);
            for (position, expected) in of_prompt.chain(&logprobs).enumerate() {
                let error = (reported[position + 1].as_f64().expect("a number") - expected).abs();
                worst = worst.max(error);
                assert!(error <= max_error, "{dtype} {name} position {position}: off by {error}");
            }
            if let Some(text) = case["text"].as_str() {
                let body = json!({ "prompt": text, "max_tokens": 1, "return_token_ids": true });
                let (_, answer) = cluster.post("/v1/completions", &body).await;
                assert_eq!(
                    ids(&answer["choices"][0]["prompt_token_ids"]),
                    input,
                    "{name}: tokenized"
                );
            } else {
                let body = json!({ "messages": case["messages"], "max_tokens": 1, "return_token_ids": true });
                let (status, answer) = cluster.post("/v1/chat/completions", &body).await;
                assert_eq!(status, 200, "{answer}");
                assert_eq!(
                    ids(&answer["prompt_token_ids"]),
                    input,
                    "{name}: rendered and tokenized"
                );
            }
        }
        println!(
            "{dtype} {}: largest log-probability error {worst:.2e} (allowed {max_error})",
            golden.data["model"]
        );
        cluster
            .until_counter("decode-0", "kv_bytes_received_total", |n| n > 0)
            .await;
        cluster.until_idle_and_whole().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f32_through_http() {
    compare("f32").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bf16_through_http() {
    compare("bf16").await;
}
