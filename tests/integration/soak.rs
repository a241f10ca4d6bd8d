//! Many requests, many of them abandoned: what they held is all given back.

use futures::{StreamExt, stream};
use serde_json::json;

use super::cluster::{Cluster, dummy_model, prompt};

const N_REQUESTS: u32 = 2000;
const N_AT_ONCE: usize = 48;

/// What a client does with its request.
#[derive(Clone, Copy, PartialEq)]
enum Patience {
    ToTheEnd,
    Events(u32),
    None,
}

fn patience(i: u32) -> Patience {
    match i.wrapping_mul(2_654_435_761) >> 29 {
        0 | 1 => Patience::None,
        2 | 3 => Patience::Events(i % 9),
        _ => Patience::ToTheEnd,
    }
}

async fn ask(cluster: &Cluster, i: u32) -> bool {
    let n_prompt = 1 + (i.wrapping_mul(7919) % 150) as usize;
    let shared = prompt(i % 5, 64);
    let ids = if i.is_multiple_of(2) {
        [&shared[..], &prompt(i, n_prompt)].concat()
    } else {
        prompt(i, n_prompt)
    };
    let body = json!({
        "prompt": ids, "max_tokens": 1 + i % 24, "ignore_eos": true, "stream": true, "temperature": 1.0, "seed": i
    });
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&body).send();
    if patience(i) == Patience::None {
        // Left at a moment that no one chooses: as soon as something else is to be done.
        tokio::select! {
            biased;
            _ = request => {}
            () = tokio::task::yield_now() => {}
        }
        return false;
    }
    let response = request.await.expect("an answer");
    assert_eq!(response.status(), 200);
    let mut text = Vec::new();
    let mut n_events = 0;
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        text.extend_from_slice(&chunk.expect("bytes"));
        n_events += 1;
        if patience(i) == Patience::Events(n_events) {
            return false;
        }
    }
    let text = String::from_utf8(text).expect("UTF-8");
    assert!(
        text.trim_end().ends_with("data: [DONE]") && !text.contains("\"error\""),
        "{text}"
    );
    let n_tokens = text.matches("\"finish_reason\":").count();
    assert!(
        n_tokens as u32 > i % 24,
        "{n_tokens} events for {} tokens: {text}",
        1 + i % 24
    );
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_requests_with_cancels_leave_every_ledger_whole() {
    let model = dummy_model("soak", 2, 256);
    let model = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    // Little memory, so that sequences are also preempted and blocks evicted.
    let limits = [
        "--kv-memory",
        "2MiB",
        "--max-model-len",
        "512",
        "--max-batch-tokens",
        "256",
    ];
    let pools = ["--prefill", "2", "--decode", "2"];
    let cluster = Cluster::serve(&[&model[..], &limits, &pools, &["--disaggregation-threshold", "16"]].concat()).await;
    let finished: Vec<bool> = stream::iter(0..N_REQUESTS)
        .map(|i| ask(&cluster, i))
        .buffer_unordered(N_AT_ONCE)
        .collect()
        .await;
    let n_finished = finished.iter().filter(|finished| **finished).count();
    cluster.until_idle_and_whole().await;
    let mut n_cancelled = 0;
    let mut n_received = 0;
    for i in 0..2 {
        n_cancelled += cluster
            .counter(&format!("decode-{i}"), "sequences_cancelled_total")
            .await;
        n_received += cluster.counter(&format!("decode-{i}"), "handoffs_received_total").await;
        assert_eq!(
            cluster.counter(&format!("decode-{i}"), "kv_frames_refused_total").await,
            0
        );
    }
    println!(
        "{n_finished} of {N_REQUESTS} to the end, {n_cancelled} cancelled at decode instances, {n_received} handoffs"
    );
    assert!(n_finished > 800 && n_cancelled > 50 && n_received > 500);
}
