//! Several instances in one process: the same tokens as in processes of their own, KV that never leaves the process, and
//! leaving together.

use baton_proto::cluster::{InstanceStatus, ListRequestsRequest, MoveOneRequest};
use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cluster::{Answer, Cluster, dummy_model, prompt, run, signal};

const MODEL: &[&str] = &["--load-format", "dummy", "--kv-memory", "128MiB"];

fn model() -> String {
    let folder = dummy_model("colocate", 8, 512);
    folder.to_str().expect("UTF-8").to_owned()
}

async fn serve(arguments: &[&str]) -> Cluster {
    let model = model();
    let base = ["--model", &model, "--disaggregation-threshold", "0"];
    Cluster::serve(&[&base[..], MODEL, arguments].concat()).await
}

fn options(max_tokens: u32, salt: &str) -> Value {
    json!({ "max_tokens": max_tokens, "temperature": 0.9, "seed": 77, "cache_salt": salt })
}

/// KV bytes that came to an instance: in all, and within its process.
async fn received(cluster: &Cluster, instance: &str) -> (u64, u64) {
    cluster
        .until_counter(instance, "kv_bytes_received_total", |n| n > 0)
        .await;
    (
        cluster.counter(instance, "kv_bytes_received_total").await,
        cluster.counter(instance, "kv_bytes_received_by_in_process_total").await,
    )
}

/// Moves the one request that runs, once it has `n_tokens` tokens; answers where it was and where it is.
async fn move_the_running(cluster: &Cluster, n_tokens: u32) -> (String, String) {
    let mut operator = cluster.operator();
    loop {
        let requests = operator.list_requests(ListRequestsRequest {}).await.expect("a list");
        let mut requests = requests.into_inner().requests.into_iter();
        let Some(request) = requests.find(|request| request.stage == "decode" && request.n_output_tokens >= n_tokens)
        else {
            tokio::task::yield_now().await;
            continue;
        };
        let to = String::new();
        let request_id = request.request_id;
        match operator.move_one(MoveOneRequest { request_id, to }).await {
            Ok(moved) => {
                let moved = moved.into_inner();
                return (moved.from, moved.to);
            }
            // On a busy machine a request may outgrow what was reserved for it; it goes on where it is.
            Err(status) => assert_eq!(status.code(), tonic::Code::Aborted, "{status}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_colocated_pair_answers_as_two_processes_do() {
    let prompts = [(1, 33), (2, 333), (3, 700)];
    let answers = async |cluster: &Cluster| -> Vec<Answer> {
        let asked = prompts.map(|(seed, length)| {
            let ids = prompt(seed, length);
            async move { cluster.complete(&ids, &options(24, "a")).await }
        });
        join_all(asked).await
    };
    let apart = serve(&["--prefill", "1", "--decode", "1"]).await;
    let expected = answers(&apart).await;
    assert_ne!(apart.pid("prefill-0").await, apart.pid("decode-0").await);
    let (total, in_process) = received(&apart, "decode-0").await;
    assert!(total > 0 && in_process == 0, "{in_process} of {total}");
    drop(apart);

    let together = serve(&["--prefill", "1", "--decode", "1", "--colocate"]).await;
    assert_eq!(answers(&together).await, expected);
    assert_eq!(together.pid("prefill-0").await, together.pid("decode-0").await);
    let (total, in_process) = received(&together, "decode-0").await;
    assert!(total > 0 && in_process == total, "{in_process} of {total}");
    together.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_moves_within_its_process() {
    let cluster = serve(&["--mixed", "2", "--colocate"]).await;
    let ids = prompt(11, 400);
    let undisturbed = cluster.complete(&ids, &options(600, "undisturbed")).await;
    let options = options(600, "moved");
    let asked = cluster.complete(&ids, &options);
    let (moved, (from, to)) = tokio::join!(asked, move_the_running(&cluster, 5));
    assert_eq!(moved, undisturbed);
    assert_ne!(from, to);
    let (total, in_process) = received(&cluster, &to).await;
    assert!(total > 0 && in_process == total, "{in_process} of {total}");
    assert_eq!(cluster.counter(&to, "moves_in_total").await, 1);
    cluster.until_idle_and_whole().await;
}

/// Neither of the two takes what the other hands over: everything goes to the other process.
#[tokio::test(flavor = "multi_thread")]
async fn instances_of_a_process_leave_together_and_lose_nothing() {
    let cluster = serve(&["--mixed", "3", "--colocate", "--policy", "round-robin"]).await;
    let pid = cluster.pid("mixed-0").await;
    assert_eq!(cluster.pid("mixed-1").await, pid);
    assert_ne!(cluster.pid("mixed-2").await, pid);
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| prompt(40 + seed, 200)).collect();
    let all = async |salt: &str| {
        let asked = prompts.iter().map(|ids| {
            // Long enough that none has ended before all have been handed over, however busy the machine is.
            let options = options(800, salt);
            let cluster = &cluster;
            async move { cluster.complete(ids, &options).await }
        });
        join_all(asked).await
    };
    let undisturbed = all("undisturbed").await;
    let left = async {
        let n_running = |status: &InstanceStatus| status.load.as_ref().map_or(0, |load| load.n_running);
        cluster
            .until("two requests run on each", |instances| {
                instances.iter().all(|status| n_running(status) == 2)
            })
            .await;
        signal(pid, Signal::TERM);
        // Both hand over what they had, and mixed-2 takes all of it.
        cluster.until_counter("mixed-2", "moves_in_total", |n| n == 4).await;
        for name in ["mixed-0", "mixed-1"] {
            assert_eq!(cluster.counter(name, "moves_in_total").await, 0, "{name}");
        }
    };
    let (moved, ()) = tokio::join!(all("moved"), left);
    assert_eq!(moved, undisturbed);
    cluster
        .until("both were started again", |instances| {
            let joins = instances.iter().filter_map(|status| status.join.as_ref());
            let anew = joins.filter(|join| join.instance_id != "mixed-2" && join.pid != pid);
            anew.count() == 2
        })
        .await;
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_fixed_port_for_several_instances_is_refused() {
    let arguments = [
        "worker",
        "--role",
        "prefill,decode",
        "--scheduler",
        "127.0.0.1:1",
        "--listen",
        "127.0.0.1:7000",
    ];
    let (code, _, stderr) = run(&arguments).await;
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("expected an address for each of 2 roles"), "{stderr}");
}
