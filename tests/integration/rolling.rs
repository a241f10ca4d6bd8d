//! A rolling restart of every worker under load, as an operator does an upgrade: each is told to end, hands its requests over,
//! and comes back, and no client notices.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cluster::{Answer, Cluster, dummy_model, merge, prompt, signal};

const N_AT_ONCE: u32 = 6;
const WORKERS: [&str; 4] = ["prefill-0", "decode-0", "prefill-1", "decode-1"];

fn options(i: u32) -> Value {
    let mut options = json!({ "max_tokens": 120 + 20 * (i % 3), "seed": i });
    let more = match i % 2 {
        0 => json!({ "temperature": 0.0 }),
        _ => json!({ "temperature": 0.9, "presence_penalty": 0.4 }),
    };
    merge(&mut options, &more);
    options
}

async fn ask(cluster: &Cluster, i: u32) -> Answer {
    cluster
        .complete(&prompt(500 + i, 40 + 30 * i as usize), &options(i))
        .await
}

/// A value of the front door's metrics; 0 while nothing was counted.
async fn metric(cluster: &Cluster, series: &str) -> u64 {
    let response = cluster
        .http
        .get(cluster.url("/metrics"))
        .send()
        .await
        .expect("an answer");
    let text = response.text().await.expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    line.map_or(0, |value| value.trim().parse().expect("a whole number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_every_worker_loses_and_repeats_nothing() {
    let model = dummy_model("rolling", 6, 384);
    let model = model.to_str().expect("UTF-8");
    let base = [
        "--model",
        model,
        "--load-format",
        "dummy",
        "--disaggregation-threshold",
        "32",
    ];
    let cluster = Cluster::serve(&[&base[..], &["--prefill", "2", "--decode", "2"]].concat()).await;
    let expected = join_all((0..N_AT_ONCE).map(|i| ask(&cluster, i))).await;

    let (is_over, n_asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let asking = (0..N_AT_ONCE).map(|i| {
        let (cluster, expected, is_over, n_asked) = (&cluster, &expected, &is_over, &n_asked);
        async move {
            while !is_over.load(Relaxed) {
                assert_eq!(ask(cluster, i).await, expected[i as usize], "request {i}");
                n_asked.fetch_add(1, Relaxed);
            }
        }
    });
    let restarting = async {
        for name in WORKERS {
            let pid = cluster.pid(name).await;
            signal(pid, Signal::TERM);
            cluster
                .until("it was started again", |instances| {
                    let mut joins = instances.iter().filter_map(|status| status.join.as_ref());
                    joins.any(|join| join.instance_id == name && join.pid != pid)
                })
                .await;
        }
        is_over.store(true, Relaxed);
    };
    tokio::join!(join_all(asking), restarting);
    cluster.until_idle_and_whole().await;

    let settled = metric(&cluster, "baton_moves_total{reason=\"drain\",outcome=\"settled\"}").await;
    let replays = metric(&cluster, "baton_replays_total").await;
    println!("{n_asked:?} requests, {settled} moves, {replays} replays");
    assert!(
        n_asked.load(Relaxed) >= u64::from(N_AT_ONCE),
        "hardly anything was asked"
    );
    assert!(settled > 0, "nothing was handed over");
    assert_eq!(replays, 0, "what was handed over is not computed again");
    assert_eq!(metric(&cluster, "baton_move_pause_seconds_count").await, settled);
    assert_eq!(metric(&cluster, "baton_move_seconds_count").await, settled);
}
