//! Constrained outputs over real processes: 200 random schemas, handed over, through so little memory that sequences are
//! preempted, alone and in groups of four. What ends by itself is a valid document, and the same as on one instance alone.

use futures::StreamExt as _;
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::schemas::schema;

const N_SCHEMAS: u64 = 200;

/// The choices of schema `seed`: text, and whether it ended by itself.
async fn choices(cluster: &Cluster, seed: u64) -> Vec<(String, bool)> {
    let body = json!({
        "prompt": format!("Describe {} and {}.", seed * 37 % 91, seed * 53 % 89),
        "max_tokens": 300, "temperature": 1.0, "seed": seed, "n": if seed.is_multiple_of(2) { 4 } else { 1 },
        "response_format": { "type": "json_schema", "json_schema": { "name": "any", "schema": schema(seed) } },
    });
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let choices = answer["choices"].as_array().expect("choices").iter();
    choices
        .map(|choice| {
            let text = choice["text"].as_str().expect("text").to_owned();
            (text, choice["finish_reason"] == "stop")
        })
        .collect()
}

/// Four choices of one document each that no budget is enough for: each has 380 tokens, 24 blocks, when it is cut off.
async fn too_long_together(cluster: &Cluster) -> Value {
    let schema = json!({ "type": "array", "items": { "type": "integer" }, "minItems": 400 });
    let body = json!({
        "prompt": "Count.", "max_tokens": 380, "temperature": 1.0, "seed": 5, "n": 4,
        "response_format": { "type": "json_schema", "json_schema": { "name": "long", "schema": schema } },
    });
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 4 * 380, "{answer}");
    answer["choices"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn constrained_outputs_are_valid_documents() {
    // 40 blocks of 16 KiB; one request alone fits.
    let tight = ["--dtype", "bf16", "--kv-memory", "640KiB", "--max-model-len", "400"];
    let pools = ["--prefill", "1", "--decode", "1", "--disaggregation-threshold", "0"];
    let cluster = Cluster::serve(&[&tight[..], &pools].concat()).await;
    let answers = futures::stream::iter(0..N_SCHEMAS).map(|seed| choices(&cluster, seed));
    let answers: Vec<Vec<(String, bool)>> = answers.buffered(16).collect().await;
    let (mut n_choices, mut n_whole) = (0, 0);
    for (seed, answer) in (0..).zip(&answers) {
        let validator = jsonschema::validator_for(&schema(seed)).expect("a schema");
        for (text, _) in answer.iter().filter(|(_, is_whole)| *is_whole) {
            let document: Value =
                serde_json::from_str(text).unwrap_or_else(|error| panic!("schema {seed}: {error}: {text}"));
            assert!(
                validator.is_valid(&document),
                "schema {seed}: {text} of {}",
                schema(seed)
            );
            n_whole += 1;
        }
        n_choices += answer.len();
    }
    println!("{n_whole} of {n_choices} ended by themselves");
    assert_eq!(n_choices as u64, N_SCHEMAS / 2 * 5);
    assert!(
        n_whole * 20 > n_choices * 19,
        "only {n_whole} of {n_choices} ended by themselves"
    );
    cluster
        .until_counter("decode-0", "handoffs_received_total", |n| n >= N_SCHEMAS)
        .await;
    // How many of them run at a time is the machine's affair; of this one's four choices no two fit at their end.
    let long = too_long_together(&cluster).await;
    let n_preemptions = cluster.counter("decode-0", "preemptions_total").await;
    assert!(n_preemptions > 0, "nothing was preempted");
    cluster.until_idle_and_whole().await;
    drop(cluster);

    let alone = Cluster::serve(&["--dtype", "bf16", "--mixed", "1", "--max-model-len", "400"]).await;
    for seed in [0, 1, 2, 3, 50, 51, 198, 199] {
        assert_eq!(choices(&alone, seed).await, answers[seed as usize], "schema {seed}");
    }
    assert_eq!(too_long_together(&alone).await, long);
}

/// Free text up to a tag, in the tag what its schema says, and after it free text again.
#[tokio::test(flavor = "multi_thread")]
async fn structural_tags_are_kept_over_processes() {
    let cluster = Cluster::serve(&["--disaggregation-threshold", "0"]).await;
    let (begin, end) = ("[call ", " done]");
    let content = json!({"type": "json_schema", "json_schema": schema(3)});
    let tag = json!({"type": "tag", "begin": begin, "content": content, "end": end});
    let format = json!({"type": "triggered_tags", "triggers": ["[call"], "tags": [tag], "at_least_one": true});
    let body = json!({
        "prompt": "Describe a thing.", "max_tokens": 400, "temperature": 1.0, "seed": 7, "n": 4,
        "response_format": {"type": "structural_tag", "format": format},
    });
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let validator = jsonschema::validator_for(&schema(3)).expect("a schema");
    let mut n_calls = 0;
    for choice in answer["choices"].as_array().expect("choices") {
        let text = choice["text"].as_str().expect("text");
        let mut rest = text
            .strip_prefix(begin)
            .unwrap_or_else(|| panic!("no call first in {text}"));
        loop {
            let Some((document, after)) = rest.split_once(end) else {
                assert_eq!(choice["finish_reason"], "length", "a call was not ended: {text}");
                break;
            };
            let document: Value = serde_json::from_str(document).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(validator.is_valid(&document), "{text}");
            n_calls += 1;
            match after.split_once(begin) {
                Some((_, more)) => rest = more,
                None => break,
            }
        }
    }
    assert!(n_calls > 0, "no call was ended: {answer}");
    cluster.until_idle_and_whole().await;
}
