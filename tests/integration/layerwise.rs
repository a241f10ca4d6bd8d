//! KV leaves layer by layer while later layers are computed, so a transfer as long as the prefill costs little.

use serde_json::json;

use super::cluster::{Cluster, Process, dummy_model, prompt};
use super::throttle::Throttle;

/// Sum of a phase over all requests so far, seconds.
async fn phase_seconds(cluster: &Cluster, phase: &str) -> f64 {
    let text = cluster
        .http
        .get(cluster.url("/metrics"))
        .send()
        .await
        .expect("an answer")
        .text()
        .await
        .expect("text");
    let name = format!("baton_request_phase_seconds_sum{{phase=\"{phase}\"}}");
    let line = text
        .lines()
        .find(|line| line.starts_with(&name))
        .unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().expect("a value").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn transfer_hides_behind_the_prefill() {
    let model = dummy_model("layerwise", 8, 512);
    let model = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("prefill.sock");
    let link = Throttle::to(socket.clone()).await;

    let scheduler = [
        "scheduler",
        "--port",
        "0",
        "--disaggregation-threshold",
        "0",
        "--max-model-len",
        "4096",
    ];
    // Its ready line comes once a decode instance has joined, so its port is chosen here, by asking for a free one first.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a free port")
        .local_addr()
        .expect("bound")
        .port()
        .to_string();
    let mut door_arguments = scheduler.to_vec();
    door_arguments[2] = &port;
    door_arguments.extend(model);
    let address = format!("127.0.0.1:{port}");
    let listen = format!("unix:{}", socket.display());
    let worker = [
        "worker",
        "--scheduler",
        &address,
        "--threads",
        "1",
        "--max-batch-tokens",
        "128",
    ];
    let prefill = [
        &worker[..],
        &[
            "--role",
            "prefill",
            "--id",
            "p",
            "--listen",
            &listen,
            "--advertise",
            &link.address,
        ],
        &model,
    ]
    .concat();
    let decode = [&worker[..], &["--role", "decode", "--id", "d"], &model].concat();
    let (door, _prefill, _decode) = tokio::join!(
        Process::start(&door_arguments),
        Process::start(&prefill),
        Process::start(&decode)
    );
    let cluster = Cluster::of(door.url.clone());

    let n_tokens = 2048;
    let ids = prompt(3, n_tokens);
    let options = |salt: &str| json!({ "max_tokens": 2, "temperature": 0, "cache_salt": salt });
    // Once to warm up, once to learn how long the prefill takes and how much it sends.
    cluster.complete(&ids, &options("warm")).await;
    cluster.until_counter("d", "handoffs_received_total", |n| n == 1).await;
    let full_bytes = cluster.counter("d", "kv_bytes_received_total").await;
    let prefill_before = phase_seconds(&cluster, "prefill").await;
    cluster.complete(&ids, &options("measure")).await;
    let alone_s = phase_seconds(&cluster, "prefill").await - prefill_before;

    let bytes_per_second = full_bytes as f64 / alone_s;
    link.set_speed(bytes_per_second as u64);
    cluster.until_counter("p", "handoffs_sent_total", |n| n == 2).await;
    let early_before = cluster.counter("p", "kv_frames_early_total").await;
    let before = (
        phase_seconds(&cluster, "prefill").await,
        phase_seconds(&cluster, "transfer_exposed").await,
    );
    cluster.complete(&ids, &options("throttled")).await;
    let prefill_s = phase_seconds(&cluster, "prefill").await - before.0;
    let exposed_s = phase_seconds(&cluster, "transfer_exposed").await - before.1;
    let transfer_s = full_bytes as f64 / bytes_per_second;
    let joined_s = prefill_s + exposed_s;
    let longer_s = prefill_s.max(transfer_s);
    println!(
        "prefill {prefill_s:.3} s, transfer {transfer_s:.3} s ({full_bytes} bytes), joined after {joined_s:.3} s = {:.2} x the longer",
        joined_s / longer_s
    );
    assert!(
        joined_s <= 1.3 * longer_s,
        "joined after {joined_s} s, the longer of both took {longer_s} s"
    );
    cluster.until_counter("p", "handoffs_sent_total", |n| n == 3).await;
    let early = cluster.counter("p", "kv_frames_early_total").await - early_before;
    assert!(early > 0, "the first frame left before the last layer was computed");
}
