//! Embeddings of a served model: computed where prompts are, the same bits however they are computed, and in spite of deaths.

use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cluster::{Cluster, dummy_model, merge, prompt, signal};

const PATH: &str = "/v1/embeddings";

/// The raw embedding of each input, exactly as the server wrote it.
async fn embed(cluster: &Cluster, input: &Value, options: &Value) -> Vec<Vec<f64>> {
    let mut body = json!({ "input": input, "normalize": false });
    merge(&mut body, options);
    let (status, answer) = cluster.post(PATH, &body).await;
    assert_eq!(status, 200, "{answer}");
    let data = answer["data"].as_array().expect("data");
    let values = |one: &Value| {
        one["embedding"]
            .as_array()
            .expect("numbers")
            .iter()
            .map(|n| n.as_f64().expect("a number"))
            .collect()
    };
    data.iter().map(values).collect()
}

fn serve_arguments(model: &str) -> Vec<&str> {
    vec![
        "--model",
        model,
        "--load-format",
        "dummy",
        "--disaggregation-threshold",
        "0",
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_instances_embed_the_same_bits_whole_chunked_cached_and_together() {
    let model = dummy_model("embeddings", 4, 256);
    let model = model.to_str().expect("UTF-8");
    let inputs: Vec<Vec<u32>> = [1, 16, 33, 64, 500, 17, 301, 15]
        .into_iter()
        .zip(0..)
        .map(|(n, i)| prompt(i, n))
        .collect();
    let whole = Cluster::serve(&[&serve_arguments(model)[..], &["--prefill", "1", "--decode", "1"]].concat()).await;
    let mut alone = Vec::new();
    for ids in &inputs {
        alone.extend(embed(&whole, &json!(ids), &json!({})).await);
    }
    assert!(alone.iter().all(|embedding| embedding.len() == 256));
    // Beside a generation with the same prompts, whose blocks are cached by now, and all inputs in one request.
    let generate = json!({ "max_tokens": 20, "temperature": 0 });
    let generations = join_all(inputs.iter().map(|ids| whole.complete(ids, &generate)));
    let (all, plain) = (json!(inputs), json!({}));
    let (together, _) = tokio::join!(embed(&whole, &all, &plain), generations);
    assert_eq!(together, alone);
    let salted = embed(&whole, &json!(inputs), &json!({ "cache_salt": "s" })).await;
    assert_eq!(salted, alone);
    let n_tokens: u64 = inputs.iter().map(|ids| ids.len() as u64).sum();
    whole
        .until_counter("prefill-0", "prefill_tokens_total", |n| n >= 3 * n_tokens)
        .await;
    whole.until_idle_and_whole().await;

    let in_chunks = [
        &serve_arguments(model)[..],
        &["--mixed", "1", "--max-batch-tokens", "64"],
    ]
    .concat();
    let chunked = Cluster::serve(&in_chunks).await;
    assert_eq!(embed(&chunked, &json!(inputs), &json!({})).await, alone);
    let (status, refused) = chunked.post(PATH, &json!({ "input": vec![7; 9000] })).await;
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("input")),
        "{refused}"
    );
    chunked.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_dies_in_the_middle_of_an_embedding_costs_only_time() {
    let model = dummy_model("faults", 8, 512);
    let model = model.to_str().expect("UTF-8");
    let pools = ["--prefill", "2", "--decode", "1", "--max-batch-tokens", "128"];
    let cluster = Cluster::serve(&[&serve_arguments(model)[..], &pools].concat()).await;
    let ids = json!(prompt(11, 3000));
    let undisturbed = embed(&cluster, &ids, &json!({})).await;
    let options = json!({ "cache_salt": "again" });
    let asked = embed(&cluster, &ids, &options);
    let killed = async {
        let mut busy = None;
        cluster
            .until("an instance is in the middle of it", |instances| {
                busy = instances.iter().find_map(|status| {
                    let (join, load) = (status.join.as_ref()?, status.load.as_ref()?);
                    (load.n_running == 1).then(|| (join.role.clone(), join.pid))
                });
                busy.is_some()
            })
            .await;
        let (role, victim) = busy.expect("the wait ended with one");
        signal(victim, Signal::KILL);
        role
    };
    let (disturbed, role) = tokio::join!(asked, killed);
    assert_eq!(role, "prefill");
    assert_eq!(disturbed, undisturbed);
    cluster.until("all are back", |instances| instances.len() == 3).await;
    cluster.until_idle_and_whole().await;
    let metrics = cluster
        .http
        .get(cluster.url("/metrics"))
        .send()
        .await
        .expect("an answer");
    let metrics = metrics.text().await.expect("text");
    let counted = "baton_requests_total{endpoint=\"embeddings\",outcome=\"stop\"} 2\n";
    assert!(metrics.contains(counted), "counted once each: {metrics}");
}
