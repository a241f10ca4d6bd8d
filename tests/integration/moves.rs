//! Running requests that move between processes: the client gets the tokens of an undisturbed run, the KV travels once, and
//! whatever dies meanwhile costs only time.

use baton_proto::cluster::{DrainRequest, ListRequestsRequest, MoveOneRequest, RequestStatus, SetRoleRequest};
use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cluster::{Cluster, dummy_model, merge, prompt, signal};

/// Ids and log-probabilities of every choice, as the server wrote them.
pub async fn ask(cluster: &Cluster, ids: &[u32], options: &Value) -> Vec<(Value, Value)> {
    let mut body = json!({ "prompt": ids, "logprobs": 1, "return_token_ids": true, "ignore_eos": true });
    merge(&mut body, options);
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let choices = answer["choices"].as_array().expect("choices").iter();
    let mut choices: Vec<&Value> = choices.collect();
    choices.sort_by_key(|choice| choice["index"].as_u64());
    choices
        .into_iter()
        .map(|choice| {
            (
                choice["token_ids"].clone(),
                choice["logprobs"]["token_logprobs"].clone(),
            )
        })
        .collect()
}

/// The one request that decodes, once it has `n_tokens` tokens.
pub async fn running(cluster: &Cluster, n_tokens: u32) -> RequestStatus {
    loop {
        let requests = cluster.operator().list_requests(ListRequestsRequest {}).await;
        let requests = requests.expect("a list").into_inner().requests;
        let found = requests
            .into_iter()
            .find(|request| request.stage == "decode" && request.n_output_tokens >= n_tokens);
        match found {
            Some(request) => return request,
            None => tokio::task::yield_now().await,
        }
    }
}

pub async fn move_one(cluster: &Cluster, request_id: &str, to: &str) -> Result<(String, String), tonic::Status> {
    let request = MoveOneRequest {
        request_id: request_id.to_owned(),
        to: to.to_owned(),
    };
    let moved = cluster.operator().move_one(request).await?.into_inner();
    Ok((moved.from, moved.to))
}

/// A model slow enough to be caught in the act.
async fn cluster(pools: &[&str]) -> Cluster {
    let model = dummy_model("moves", 8, 512);
    let base = [
        "--model",
        model.to_str().expect("UTF-8"),
        "--load-format",
        "dummy",
        "--disaggregation-threshold",
        "0",
    ];
    Cluster::serve(&[&base[..], pools].concat()).await
}

fn options(n: u32, max_tokens: u32, salt: &str) -> Value {
    json!({
        "n": n, "max_tokens": max_tokens, "temperature": 0.9, "seed": 77, "cache_salt": salt,
        "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_moves_to_and_fro_and_its_tokens_do_not_notice() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2"]).await;
    for n in [1, 3] {
        let ids = prompt(20 + n, 333);
        let undisturbed = ask(&cluster, &ids, &options(n, 200, "undisturbed")).await;
        let options = options(n, 200, "moved");
        let asked = ask(&cluster, &ids, &options);
        let moves = async {
            let mut at = String::new();
            for step in 0..6 {
                let request = running(&cluster, n * (5 + 20 * step)).await;
                let (from, to) = move_one(&cluster, &request.request_id, "").await.expect("it moves");
                assert_ne!(from, to);
                assert!(at.is_empty() || at == from, "it was at {at} and moved from {from}");
                at = to;
            }
        };
        let (moved, ()) = tokio::join!(asked, moves);
        assert_eq!(moved, undisturbed, "n = {n}");
    }
    let (mut moved_in, mut moved_out) = (0, 0);
    for name in ["decode-0", "decode-1"] {
        cluster.until_counter(name, "moves_in_total", |n| n > 0).await;
        moved_in += cluster.counter(name, "moves_in_total").await;
        moved_out += cluster.counter(name, "moves_out_total").await;
        assert_eq!(cluster.counter(name, "moves_failed_total").await, 0);
    }
    assert_eq!((moved_in, moved_out), (12, 12));
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_cannot_be_is_refused_with_its_reason() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2"]).await;
    let refused = move_one(&cluster, "no-such-request", "").await.expect_err("unknown");
    assert_eq!(refused.code(), tonic::Code::NotFound, "{refused}");
    let ids = prompt(31, 100);
    let options = options(1, 150, "a");
    let asked = ask(&cluster, &ids, &options);
    let moves = async {
        let request = running(&cluster, 5).await;
        let refused = move_one(&cluster, &request.request_id, "decode-7")
            .await
            .expect_err("unknown");
        assert_eq!(refused.code(), tonic::Code::NotFound, "{refused}");
        let refused = move_one(&cluster, &request.request_id, &request.decode_instance).await;
        let refused = refused.expect_err("it is there already");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        let refused = move_one(&cluster, &request.request_id, "prefill-0")
            .await
            .expect_err("a prefill instance");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    };
    tokio::join!(asked, moves);
}

#[tokio::test(flavor = "multi_thread")]
async fn death_of_either_end_of_a_move_costs_only_time() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2", "--keepalive", "1s"]).await;
    for (victim_is_source, seed) in [(true, 41), (false, 42), (true, 43), (false, 44)] {
        let ids = prompt(seed, 2000);
        let undisturbed = ask(&cluster, &ids, &options(2, 80, "undisturbed")).await;
        let options = options(2, 80, "killed");
        let asked = ask(&cluster, &ids, &options);
        let killed = async {
            let request = running(&cluster, 8).await;
            let source = request.decode_instance.clone();
            let destination = if source == "decode-0" { "decode-1" } else { "decode-0" };
            let victim = if victim_is_source { source.as_str() } else { destination };
            let pid = cluster.pid(victim).await;
            // The answer is whatever the race brings; the client's tokens are not.
            let (_, ()) = tokio::join!(move_one(&cluster, &request.request_id, destination), async {
                signal(pid, Signal::KILL);
            });
        };
        let (disturbed, ()) = tokio::join!(asked, killed);
        assert_eq!(
            disturbed, undisturbed,
            "the source dies: {victim_is_source}, seed {seed}"
        );
        cluster.until("both are back", |instances| instances.len() == 3).await;
    }
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_instance_is_empty_and_its_requests_went_on() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2"]).await;
    let requests: Vec<(Vec<u32>, Value)> = (0..6)
        .map(|i| (prompt(60 + i, 120), options(1 + i % 2, 150, "d")))
        .collect();
    let mut undisturbed = Vec::new();
    for (ids, options) in &requests {
        let mut options = options.clone();
        options["cache_salt"] = json!("undisturbed");
        undisturbed.push(ask(&cluster, ids, &options).await);
    }
    let asked = join_all(requests.iter().map(|(ids, options)| ask(&cluster, ids, options)));
    let drained = async {
        let instance_id = running(&cluster, 3).await.decode_instance;
        let drain = |undo| DrainRequest {
            instance_id: instance_id.clone(),
            undo,
        };
        let mut progress = cluster
            .operator()
            .drain(drain(false))
            .await
            .expect("it may be drained")
            .into_inner();
        let mut last = None;
        while let Some(message) = progress.message().await.expect("progress") {
            last = Some(message);
        }
        let last = last.expect("a last word");
        assert!(last.done && last.n_open == 0 && last.n_moved > 0, "{last:?}");
        cluster
            .until("it is empty", |instances| {
                instances.iter().any(|status| {
                    let (Some(join), Some(load)) = (&status.join, &status.load) else {
                        return false;
                    };
                    join.instance_id == instance_id && status.draining && load.n_open == 0
                })
            })
            .await;
        cluster.operator().drain(drain(true)).await.expect("it is taken back");
        instance_id
    };
    let (answers, drained) = tokio::join!(asked, drained);
    assert_eq!(answers, undisturbed);
    cluster.until_counter(&drained, "moves_out_total", |n| n > 0).await;
    cluster
        .until("it is in use again", |instances| {
            instances.iter().all(|status| !status.draining)
        })
        .await;
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_told_to_end_hands_its_requests_over_first() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2"]).await;
    let ids = prompt(71, 400);
    let undisturbed = ask(&cluster, &ids, &options(2, 150, "undisturbed")).await;
    let options = options(2, 150, "moved");
    let asked = ask(&cluster, &ids, &options);
    let ended = async {
        let at = running(&cluster, 6).await.decode_instance;
        let other = if at == "decode-0" { "decode-1" } else { "decode-0" };
        let pid = cluster.pid(&at).await;
        signal(pid, Signal::TERM);
        cluster.until_counter(other, "moves_in_total", |n| n == 1).await;
        (at, pid)
    };
    let (moved, (at, pid)) = tokio::join!(asked, ended);
    assert_eq!(moved, undisturbed);
    cluster
        .until("it was started again", |instances| {
            let mut joins = instances.iter().filter_map(|status| status.join.as_ref());
            joins.any(|join| join.instance_id == at && join.pid != pid)
        })
        .await;
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_change_without_reloading_or_losing_anything() {
    let cluster = cluster(&["--prefill", "1", "--decode", "2"]).await;
    let pids: Vec<u32> = join_all(["prefill-0", "decode-0", "decode-1"].map(|name| cluster.pid(name))).await;
    let ids = prompt(81, 400);
    let undisturbed = ask(&cluster, &ids, &options(1, 150, "undisturbed")).await;
    let moved_options = options(1, 150, "moved");
    let asked = ask(&cluster, &ids, &moved_options);
    let role = |name: &str, role: &str| {
        let request = SetRoleRequest {
            instance_id: name.to_owned(),
            role: role.to_owned(),
        };
        let mut operator = cluster.operator();
        async move {
            operator
                .set_role(request)
                .await
                .expect("the role changes")
                .into_inner()
                .previous
        }
    };
    let flipped = async {
        let at = running(&cluster, 5).await.decode_instance;
        assert_eq!(role(&at, "prefill").await, "decode");
        cluster.until_counter(&at, "moves_out_total", |n| n == 1).await;
        at
    };
    let (moved, at) = tokio::join!(asked, flipped);
    assert_eq!(moved, undisturbed);
    // The old prefill instance decodes now, and the flipped one prefills for it.
    let other = if at == "decode-0" { "decode-1" } else { "decode-0" };
    assert_eq!(role("prefill-0", "decode").await, "prefill");
    assert_eq!(role(other, "prefill").await, "decode");
    assert_eq!(ask(&cluster, &ids, &options(1, 150, "after")).await, undisturbed);
    cluster
        .until_counter("prefill-0", "handoffs_received_total", |n| n == 1)
        .await;
    let after: Vec<u32> = join_all(["prefill-0", "decode-0", "decode-1"].map(|name| cluster.pid(name))).await;
    assert_eq!(after, pids, "nobody was started again");
    let refused = cluster
        .operator()
        .set_role(SetRoleRequest {
            instance_id: "prefill-0".into(),
            role: "prefill".into(),
        })
        .await
        .expect_err("nobody would be left to decode");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    cluster.until_idle_and_whole().await;
}
