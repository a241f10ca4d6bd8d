//! Deaths, hangs and departures: each costs the client time at most, and nothing is left behind.

use std::time::{Duration, Instant};

use futures::StreamExt;
use rustix::process::Signal;
use serde_json::json;

use super::cluster::{Cluster, dummy_model, prompt, signal};

/// A model slow enough that a long prompt can be interrupted.
fn slow_model() -> String {
    dummy_model("faults", 8, 512).to_str().expect("UTF-8").to_owned()
}

async fn slow_cluster(pools: &[&str]) -> Cluster {
    let model = slow_model();
    let base = [
        "--model",
        &model,
        "--load-format",
        "dummy",
        "--disaggregation-threshold",
        "0",
        "--max-batch-tokens",
        "128",
    ];
    Cluster::serve(&[&base[..], pools].concat()).await
}

/// Waits until an instance of `role` is in the middle of a request; answers its name and process id.
async fn busy_instance(cluster: &Cluster, role: &str) -> (String, u32) {
    let mut found = None;
    cluster
        .until(&format!("a {role} instance is in the middle of it"), |instances| {
            found = instances.iter().find_map(|status| {
                let (join, load) = (status.join.as_ref()?, status.load.as_ref()?);
                let is_busy = join.role == role && load.n_running == 1;
                is_busy.then(|| (join.instance_id.clone(), join.pid))
            });
            found.is_some()
        })
        .await;
    found.expect("the wait ended with one")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_instance_that_dies_in_the_middle_costs_only_time() {
    let cluster = slow_cluster(&["--prefill", "2", "--decode", "1"]).await;
    let ids = prompt(11, 3000);
    let options = |salt: &str| json!({ "max_tokens": 16, "temperature": 0.8, "seed": 5, "cache_salt": salt });
    let undisturbed = cluster.complete(&ids, &options("a")).await;
    cluster
        .until_counter("decode-0", "handoffs_received_total", |n| n == 1)
        .await;
    let full_bytes = cluster.counter("decode-0", "kv_bytes_received_total").await;

    let options = options("b");
    let asked = cluster.complete(&ids, &options);
    let killed = async {
        let (name, victim) = busy_instance(&cluster, "prefill").await;
        cluster
            .until_counter("decode-0", "kv_bytes_received_total", |n| n > full_bytes)
            .await;
        signal(victim, Signal::KILL);
        let killed_at = Instant::now();
        cluster
            .until_counter("decode-0", "handoffs_failed_total", |n| n == 1)
            .await;
        (name, victim, killed_at.elapsed())
    };
    let (disturbed, (name, victim, noticed_after)) = tokio::join!(asked, killed);
    assert_eq!(disturbed, undisturbed);
    println!("a killed instance was noticed after {noticed_after:?}");
    assert!(
        noticed_after < Duration::from_secs(1),
        "noticed after {noticed_after:?}"
    );

    // The kill lay between the first and the last frame: some bytes came, the handoff failed, and all came again.
    cluster
        .until_counter("decode-0", "handoffs_received_total", |n| n == 2)
        .await;
    assert_eq!(cluster.counter("decode-0", "handoffs_failed_total").await, 1);
    let received = cluster.counter("decode-0", "kv_bytes_received_total").await;
    assert!(
        received > 2 * full_bytes && received < 3 * full_bytes,
        "{received} of {full_bytes} bytes a transfer"
    );
    cluster.until("all are back", |instances| instances.len() == 3).await;
    assert_ne!(
        cluster.pid(&name).await,
        victim,
        "serve started it again, as a new incarnation"
    );
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_instance_that_dies_costs_only_time() {
    let cluster = slow_cluster(&["--prefill", "1", "--decode", "2"]).await;
    let ids = prompt(12, 200);
    let options = |salt: &str| json!({ "max_tokens": 300, "temperature": 0.8, "seed": 6, "cache_salt": salt });
    let undisturbed = cluster.complete(&ids, &options("a")).await;
    let options = options("b");
    let asked = cluster.complete(&ids, &options);
    let killed = async {
        let (_, victim) = busy_instance(&cluster, "decode").await;
        signal(victim, Signal::KILL);
    };
    let (disturbed, ()) = tokio::join!(asked, killed);
    assert_eq!(disturbed, undisturbed);
    cluster.until("both are back", |instances| instances.len() == 3).await;
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_instance_is_given_up_after_the_keepalive() {
    let cluster = slow_cluster(&[
        "--prefill",
        "2",
        "--decode",
        "1",
        "--keepalive",
        "1s",
        "--policy",
        "round-robin",
    ])
    .await;
    let ids = prompt(13, 3000);
    let options = |salt: &str| json!({ "max_tokens": 4, "temperature": 0, "cache_salt": salt });
    let undisturbed = cluster.complete(&ids, &options("a")).await;
    let options = options("b");
    let full_bytes = cluster.counter("decode-0", "kv_bytes_received_total").await;
    let asked = cluster.complete(&ids, &options);
    let stopped = async {
        let (_, victim) = busy_instance(&cluster, "prefill").await;
        cluster
            .until_counter("decode-0", "kv_bytes_received_total", |n| n > full_bytes)
            .await;
        signal(victim, Signal::STOP);
        let stopped_at = Instant::now();
        cluster
            .until_counter("decode-0", "handoffs_failed_total", |n| n == 1)
            .await;
        (victim, stopped_at.elapsed())
    };
    let (disturbed, (victim, noticed_after)) = tokio::join!(asked, stopped);
    assert_eq!(disturbed, undisturbed);
    println!("a stopped instance was noticed after {noticed_after:?} with a keepalive of 1 s");
    assert!(
        noticed_after < Duration::from_secs(4),
        "noticed after {noticed_after:?}"
    );
    signal(victim, Signal::CONT);
    cluster.until("both are back", |instances| instances.len() == 3).await;
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_cancelled_everywhere() {
    let cluster = slow_cluster(&["--prefill", "1", "--decode", "1"]).await;
    // In the decode phase: after three tokens.
    let body = json!({ "prompt": prompt(14, 50), "max_tokens": 4000, "ignore_eos": true, "stream": true });
    let response = cluster
        .http
        .post(cluster.url("/v1/completions"))
        .json(&body)
        .send()
        .await
        .expect("an answer");
    let mut events = response.bytes_stream();
    for _ in 0..3 {
        events.next().await.expect("an event").expect("bytes");
    }
    drop(events);
    cluster
        .until_counter("decode-0", "sequences_cancelled_total", |n| n == 1)
        .await;
    // In the prefill phase: before any token.
    let body = json!({ "prompt": prompt(15, 4000), "max_tokens": 4, "stream": true });
    let asked = cluster.http.post(cluster.url("/v1/completions")).json(&body).send();
    let left = async {
        cluster
            .until("the prompt is being computed", |instances| {
                instances.iter().any(|status| {
                    status.join.as_ref().is_some_and(|join| join.role == "prefill")
                        && status.load.as_ref().is_some_and(|load| load.n_running == 1)
                })
            })
            .await;
    };
    tokio::select! {
        () = left => {}
        response = asked => {
            // The headers are here, the tokens are not.
            let response = response.expect("an answer");
            cluster.until("the prompt is being computed", |instances| {
                instances.iter().any(|status| status.load.as_ref().is_some_and(|load| load.n_running >= 1))
            })
            .await;
            drop(response);
        }
    }
    cluster.until_idle_and_whole().await;
    let prefilled = cluster.counter("prefill-0", "prefill_tokens_total").await;
    assert!(
        prefilled < 50 + 4000,
        "{prefilled} tokens: the prompt of a client that left was computed to its end"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn children_die_with_a_killed_parent() {
    let cluster = slow_cluster(&["--prefill", "1", "--decode", "1"]).await;
    let children = [cluster.pid("prefill-0").await, cluster.pid("decode-0").await];
    let mut door = cluster.door.expect("the cluster's own process");
    signal(door.pid(), Signal::KILL);
    door.wait().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    for pid in children {
        let alive = || {
            // A zombie that init has not collected has an empty command line.
            std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        while alive() {
            assert!(Instant::now() < deadline, "child {pid} outlives its parent");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_capacity_is_said_at_once_with_a_hint() {
    let cluster = slow_cluster(&["--mixed", "1", "--max-num-seqs", "1", "--max-queue", "1"]).await;
    let body = json!({ "prompt": prompt(16, 2000), "max_tokens": 1, "ignore_eos": true });
    let ask = || async {
        let response = cluster
            .http
            .post(cluster.url("/v1/completions"))
            .json(&body)
            .send()
            .await
            .expect("an answer");
        let retry_after = response
            .headers()
            .get("retry-after")
            .map(|value| value.to_str().expect("text").to_owned());
        (response.status().as_u16(), retry_after)
    };
    let answers = futures::future::join_all((0..8).map(|_| ask())).await;
    let refused: Vec<_> = answers.iter().filter(|(status, _)| *status == 429).collect();
    let served = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(served + refused.len(), 8, "{answers:?}");
    assert!(served >= 1 && !refused.is_empty(), "{answers:?}");
    for (_, retry_after) in refused {
        let seconds: u64 = retry_after.as_ref().expect("a Retry-After").parse().expect("seconds");
        assert!(seconds >= 1);
    }
    cluster.until_idle_and_whole().await;
}
