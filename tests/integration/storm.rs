//! Everything at once to real processes: sustained load, and a storm of migrations, flips, drains, stops and kills. Every
//! request gets exactly the tokens of an undisturbed run, every ledger is whole at the end, and memory stays flat.
//!
//! 45 seconds; `BATON_STORM_SECONDS=600` makes it ten minutes, `BATON_STORM_SEED` repeats the order of events.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_proto::cluster::{DrainRequest, ListRequestsRequest, MoveOneRequest, SetRoleRequest};
use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cluster::{Cluster, dummy_model, merge, prompt, repository, signal};
use super::schemas::{Dice, schema};

const N_AT_ONCE: u64 = 10;
const N_KINDS: u32 = 24;

/// A request of every kind: lengths, groups of choices, penalties, rules, constraints, greedy and drawn.
fn kind(i: u32) -> (Vec<u32>, Value) {
    let shared = prompt(1, 64);
    let mut ids = if i.is_multiple_of(3) { shared } else { Vec::new() };
    ids.extend(prompt(200 + i, [5, 40, 17, 150, 300, 33, 64, 1][(i % 8) as usize]));
    let mut options = json!({ "max_tokens": 40 + 15 * (i % 5), "seed": i, "n": 1 + i % 3 });
    let more = match i % 4 {
        0 => json!({ "temperature": 0.0 }),
        1 if i.is_multiple_of(3) => json!({ "temperature": 1.0, "response_format": {
            "type": "json_schema", "json_schema": { "name": "any", "schema": schema(u64::from(i)) }
        } }),
        1 => json!({ "temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.6, "min_p": 0.01 }),
        2 => json!({ "temperature": 1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2 }),
        3 if i.is_multiple_of(3) => {
            json!({ "temperature": 0.7, "structured_outputs": { "regex": "([a-z]{3,9} ){4,30}\\." } })
        }
        _ => {
            json!({ "temperature": 0.7, "top_k": 40, "logit_bias": { "11": 2.0, "12": -100.0 }, "bad_words": ["the"] })
        }
    };
    merge(&mut options, &more);
    (ids, options)
}

/// The ids of every choice, in the order of their numbers.
async fn choices(cluster: &Cluster, (ids, options): &(Vec<u32>, Value)) -> Result<BTreeMap<u64, Vec<u64>>, String> {
    let mut body = json!({ "prompt": ids, "return_token_ids": true, "ignore_eos": true });
    merge(&mut body, options);
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    if status != 200 {
        return Err(format!("{status}: {answer}"));
    }
    let number = |value: &Value| value.as_u64().expect("a number");
    let choices = answer["choices"].as_array().expect("choices").iter();
    Ok(choices
        .map(|choice| {
            let ids = choice["token_ids"].as_array().expect("token_ids").iter();
            (number(&choice["index"]), ids.map(number).collect())
        })
        .collect())
}

/// Resident memory of a process, KiB.
fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[derive(Default, Debug)]
struct Done {
    n_asked: AtomicU64,
    n_moved: AtomicU64,
    n_move_failures: AtomicU64,
}

/// Waits until another process has joined by this name.
async fn replaced(cluster: &Cluster, name: &str, pid: u32) {
    cluster
        .until("it is back", |instances| {
            let mut joins = instances.iter().filter_map(|status| status.join.as_ref());
            joins.any(|join| join.instance_id == name && join.pid != pid)
        })
        .await;
}

/// One disturbance. Whatever it takes from the cluster it gives back before it ends.
async fn disturb(cluster: &Cluster, dice: &mut Dice, done: &Done) -> &'static str {
    let instances = cluster.instances().await;
    let mut names: Vec<(String, String, u32)> = instances
        .iter()
        .filter_map(|status| status.join.as_ref())
        .map(|join| (join.instance_id.clone(), join.role.clone(), join.pid))
        .collect();
    names.sort();
    let Some((name, role, pid)) = dice.pick(&names).cloned() else {
        return "nobody there";
    };
    let mut operator = cluster.operator();
    match dice.roll(10) {
        0..=4 => {
            let requests = operator.list_requests(ListRequestsRequest {}).await;
            let requests = requests.expect("a list").into_inner().requests;
            let running: Vec<String> = requests
                .into_iter()
                .filter(|request| request.stage == "decode")
                .map(|request| request.request_id)
                .collect();
            let first = dice.roll(3) as usize;
            let asked = running.into_iter().skip(first).take(3).map(|request_id| {
                let mut operator = cluster.operator();
                async move {
                    let request = MoveOneRequest {
                        request_id,
                        to: String::new(),
                    };
                    operator.move_one(request).await.is_ok()
                }
            });
            for moved in join_all(asked).await {
                let counter = if moved { &done.n_moved } else { &done.n_move_failures };
                counter.fetch_add(1, Relaxed);
            }
            "migrations"
        }
        5 => {
            let flipped = if role == "decode" { "mixed" } else { "decode" };
            for role in [flipped, role.as_str()] {
                let request = SetRoleRequest {
                    instance_id: name.clone(),
                    role: role.to_owned(),
                };
                let _ = operator.set_role(request).await;
                tokio::time::sleep(Duration::from_millis(dice.roll(400))).await;
            }
            "a flip and back"
        }
        6 => {
            let drain = |undo| DrainRequest {
                instance_id: name.clone(),
                undo,
            };
            // The only instance of its kind may be refused.
            if let Ok(progress) = operator.drain(drain(false)).await {
                let mut progress = progress.into_inner();
                let emptied = async {
                    while let Ok(Some(progress)) = progress.message().await {
                        if progress.done {
                            break;
                        }
                    }
                };
                let _ = tokio::time::timeout(Duration::from_secs(3), emptied).await;
            }
            let _ = operator.drain(drain(true)).await;
            "a drain and back"
        }
        7 => {
            signal(pid, Signal::STOP);
            tokio::time::sleep(Duration::from_millis(dice.roll(2500))).await;
            signal(pid, Signal::CONT);
            "a stop"
        }
        8 => {
            signal(pid, Signal::TERM);
            replaced(cluster, &name, pid).await;
            "a restart in order"
        }
        _ => {
            signal(pid, Signal::KILL);
            replaced(cluster, &name, pid).await;
            "a kill"
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_costs_time_and_nothing_else() {
    let setting = |name: &str, default: u64| {
        let value = std::env::var(name).ok();
        value.map_or(default, |value| {
            value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}"))
        })
    };
    let (seconds, seed) = (setting("BATON_STORM_SECONDS", 45), setting("BATON_STORM_SEED", 1));
    let model = dummy_model("storm", 4, 256);
    // Constraints are of text.
    std::fs::copy(repository("models/demo/tokenizer.json"), model.join("tokenizer.json")).expect("copied");
    let model = model.to_str().expect("UTF-8");
    let base = ["--model", model, "--load-format", "dummy", "--max-num-seqs", "64"];
    let kinds: Vec<(Vec<u32>, Value)> = (0..N_KINDS).map(kind).collect();
    let alone = Cluster::serve(&[&base[..], &["--mixed", "1"]].concat()).await;
    let mut expected = Vec::new();
    for kind in &kinds {
        let answer = choices(&alone, kind).await.expect("an answer");
        assert_eq!(answer.len() as u64, kind.1["n"].as_u64().expect("a number"));
        expected.push(answer);
    }
    drop(alone);

    let pools = [
        "--prefill",
        "2",
        "--decode",
        "2",
        "--disaggregation-threshold",
        "32",
        "--keepalive",
        "1s",
    ];
    let cluster = Cluster::serve(&[&base[..], &pools].concat()).await;
    let done = Done::default();
    let began = Instant::now();
    let ends_at = began + Duration::from_secs(seconds);
    let asking = (0..N_AT_ONCE).map(|client| {
        let (cluster, kinds, expected, done) = (&cluster, &kinds, &expected, &done);
        async move {
            let mut dice = Dice(seed.wrapping_mul(1000) + client);
            while Instant::now() < ends_at {
                let i = dice.roll(kinds.len() as u64) as usize;
                let answer = choices(cluster, &kinds[i]).await;
                let answer = answer.unwrap_or_else(|error| panic!("seed {seed}, kind {i}: {error}"));
                assert_eq!(answer, expected[i], "seed {seed}, kind {i}: {:?}", kinds[i].1);
                done.n_asked.fetch_add(1, Relaxed);
            }
        }
    });
    let door_pid = cluster.door.as_ref().expect("serve runs").pid();
    let mut resident = Vec::new();
    let storm = async {
        let mut dice = Dice(seed);
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        while Instant::now() < ends_at {
            *counts.entry(disturb(&cluster, &mut dice, &done).await).or_default() += 1;
            resident.extend(resident_kib(door_pid));
            tokio::time::sleep(Duration::from_millis(50 + dice.roll(250))).await;
        }
        counts
    };
    let (_, counts) = tokio::join!(join_all(asking), storm);
    println!("seed {seed}, {seconds} s: {done:?}; {counts:?}");
    assert!(done.n_asked.load(Relaxed) > 2 * N_AT_ONCE, "hardly anything was asked");
    assert!(done.n_moved.load(Relaxed) > 0, "no migration settled");
    cluster.until("all are there", |instances| instances.len() == 4).await;
    cluster.until_idle_and_whole().await;

    // The front door lived through all of it. Its memory after the first third is its memory at the end.
    let third = resident.len() / 3;
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    let (middle, end) = (most(&resident[third..2 * third]), most(&resident[2 * third..]));
    println!("front door: {middle} KiB in the second third, {end} KiB in the last");
    assert!(end < middle + middle / 5 + 16 * 1024, "memory grew: {resident:?}");
}
