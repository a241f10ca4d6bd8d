//! What is told of a request that two instances served: its timeline, and its tokens, each counted once.

use std::time::Instant;

use serde_json::{Value, json};

use super::cluster::Cluster;

async fn metric(cluster: &Cluster, sample: &str) -> f64 {
    let response = cluster
        .http
        .get(cluster.url("/metrics"))
        .send()
        .await
        .expect("answered");
    let text = response.text().await.expect("read");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    let value = value.unwrap_or_else(|| panic!("no {sample} in {text}"));
    value.parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handed_over_request_is_counted_once_and_its_timeline_is_its_whole_time() {
    let cluster = Cluster::serve(&["--disaggregation-threshold", "0", "--metrics-aliases", "vllm"]).await;
    let body = json!({
        "prompt": "What is 37 + 58? ".repeat(20), "max_tokens": 200, "ignore_eos": true, "temperature": 0,
        "timeline": true,
    });
    let started = Instant::now();
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    let waited = started.elapsed().as_secs_f64();
    assert_eq!(status, 200, "{answer}");

    let timeline = &answer["timeline"];
    let spans = timeline["spans"].as_array().expect("spans");
    let names: Vec<&str> = spans.iter().filter_map(|span| span["name"].as_str()).collect();
    for name in [
        "tokenize",
        "queue",
        "reserve",
        "prefill_wait",
        "prefill",
        "transfer",
        "join",
        "decode",
    ] {
        assert!(names.contains(&name), "no {name} in {timeline}");
    }
    let sum: f64 = spans.iter().filter_map(|span| span["seconds"].as_f64()).sum();
    let e2e = timeline["e2e_seconds"].as_f64().expect("a number");
    assert!((sum - e2e).abs() <= 0.01 * e2e, "{sum} of {e2e}: {timeline}");
    assert!(e2e <= waited, "{e2e} of {waited}");

    cluster
        .until_counter("decode-0", "kv_bytes_received_total", |n| n > 0)
        .await;
    let usage = |name: &str| answer["usage"][name].as_f64().expect("a count");
    let engine = r#"{model_name="baton-demo",engine="0"}"#;
    for (name, expected) in [
        ("prompt_tokens_total", usage("prompt_tokens")),
        ("generation_tokens_total", usage("completion_tokens")),
    ] {
        assert_eq!(metric(&cluster, &format!("baton_{name}")).await, expected, "{name}");
        assert_eq!(
            metric(&cluster, &format!("vllm:{name}{engine}")).await,
            expected,
            "{name}"
        );
    }
    assert_eq!(
        metric(&cluster, &format!("vllm:num_preemptions_total{engine}")).await,
        0.0
    );
    for name in [
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
        "e2e_request_latency",
    ] {
        assert_eq!(
            metric(&cluster, &format!("vllm:{name}_seconds_count{engine}")).await,
            1.0,
            "{name}"
        );
    }

    // In a stream it comes with the last event.
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let response = cluster
        .http
        .post(cluster.url("/v1/completions"))
        .json(&streamed)
        .send()
        .await;
    let text = response.expect("answered").text().await.expect("read");
    let events = text
        .split_terminator("\n\n")
        .filter_map(|event| event.strip_prefix("data: "));
    let events: Vec<&str> = events.collect();
    let last: Value = serde_json::from_str(events[events.len() - 2]).expect("JSON before [DONE]");
    assert!(last["timeline"]["e2e_seconds"].as_f64().is_some(), "{last}");
    cluster.until_idle_and_whole().await;
}
