//! What operators do and meet: restarts of the scheduler process, keys and secrets, deadlines, wrong configuration.

use std::time::Duration;

use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::generate_request::Prompt;
use baton_proto::api::{AbortRequest, GenerateRequest, SamplingParams, TokenIds};
use rustix::process::Signal;
use serde_json::json;
use tonic::Code;

use super::cluster::{Cluster, Process, dummy_model, prompt, run, signal};

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_survive_the_schedulers_restart() {
    let model = dummy_model("equality", 4, 256);
    let model = [
        "--model",
        model.to_str().expect("UTF-8"),
        "--load-format",
        "dummy",
        "--max-model-len",
        "2048",
    ];
    // Its restart must come to the same place, so the port cannot be left to the system.
    let port = free_port();
    let scheduler = [
        &["scheduler", "--port", &port, "--disaggregation-threshold", "0"],
        &model[..],
    ]
    .concat();
    let address = format!("127.0.0.1:{port}");
    let worker = ["worker", "--scheduler", &address, "--threads", "1"];
    let prefill = [&worker[..], &["--role", "prefill", "--id", "p"], &model].concat();
    let decode = [&worker[..], &["--role", "decode", "--id", "d"], &model].concat();
    let (mut door, _prefill, _decode) = tokio::join!(
        Process::start(&scheduler),
        Process::start(&prefill),
        Process::start(&decode)
    );
    let options = json!({ "max_tokens": 8, "temperature": 0 });
    let first = Cluster::of(door.url.clone());
    let before = first.complete(&prompt(21, 100), &options).await;
    let pids = (first.pid("p").await, first.pid("d").await);
    signal(door.pid(), Signal::KILL);
    door.wait().await;

    let door = Process::start(&scheduler).await;
    let second = Cluster::of(door.url.clone());
    second.until("both are back", |instances| instances.len() == 2).await;
    assert_eq!(
        (second.pid("p").await, second.pid("d").await),
        pids,
        "the same processes"
    );
    assert_eq!(second.complete(&prompt(21, 100), &options).await, before);
    second.until_counter("d", "handoffs_received_total", |n| n == 2).await;
    second.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_need_the_key_and_workers_the_secret() {
    let cluster = Cluster::serve(&["--api-key", "k3y"]).await;
    let body = json!({ "prompt": [5, 6], "max_tokens": 1 });
    let url = cluster.url("/v1/completions");
    let status =
        |request: reqwest::RequestBuilder| async { request.send().await.expect("an answer").status().as_u16() };
    assert_eq!(status(cluster.http.post(&url).json(&body)).await, 401);
    assert_eq!(
        status(cluster.http.post(&url).json(&body).bearer_auth("wrong")).await,
        401
    );
    assert_eq!(
        status(cluster.http.post(&url).json(&body).bearer_auth("k3y")).await,
        200
    );
    assert_eq!(status(cluster.http.get(cluster.url("/health"))).await, 200);
    let address = cluster.door_url.trim_start_matches("http://").to_owned();
    let (code, _, stderr) = run(&["ctl", "--server", &address, "instances"]).await;
    assert_eq!(code, Some(1), "{stderr}");
    let (code, stdout, stderr) = run(&["ctl", "--server", &address, "--api-key", "k3y", "--json", "instances"]).await;
    assert_eq!(code, Some(0), "{stderr}");
    let rows: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(rows.as_array().expect("rows").len(), 2);

    // A worker without the secret that `serve` made is not let in.
    let channel = tonic::transport::Endpoint::from_shared(cluster.door_url.clone())
        .expect("a URL")
        .connect_lazy();
    let mut registry = baton_proto::cluster::registry_client::RegistryClient::new(channel);
    let report = baton_proto::cluster::WorkerReport::default();
    let refused = registry
        .join(futures::stream::iter([report]))
        .await
        .expect_err("refused");
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_and_aborts_reach_every_process() {
    let model = dummy_model("faults", 8, 512);
    let model = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    let cluster = Cluster::serve(&[&model[..], &["--disaggregation-threshold", "0"]].concat()).await;
    let channel = tonic::transport::Endpoint::from_shared(cluster.door_url.clone())
        .expect("a URL")
        .connect_lazy();
    let mut client = BatonClient::new(channel);
    let request = |id: &str| GenerateRequest {
        request_id: id.into(),
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt(22, 300) })),
        sampling: Some(SamplingParams {
            max_tokens: Some(5000),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let mut timed = tonic::Request::new(request("late"));
    timed.set_timeout(Duration::from_millis(1500));
    let mut stream = client.generate(timed).await.expect("a stream").into_inner();
    let late = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended well after 5,000 tokens in 1.5 s"),
            Err(status) => break status,
        }
    };
    assert!(
        matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{late:?}"
    );
    cluster.until_idle_and_whole().await;

    let mut stream = client
        .generate(request("aborted"))
        .await
        .expect("a stream")
        .into_inner();
    stream.message().await.expect("a message").expect("a first token");
    let ids = AbortRequest {
        request_ids: vec!["aborted".into(), "unknown".into()],
    };
    assert_eq!(client.abort(ids).await.expect("an answer").into_inner().n_aborted, 1);
    let mut last = None;
    while let Some(message) = stream.message().await.expect("a typed end") {
        last = Some(message);
    }
    let last = last.expect("a last message");
    assert_eq!(last.finish(), baton_proto::api::FinishReason::Abort);
    cluster.until_idle_and_whole().await;
    cluster
        .until_counter("decode-0", "sequences_cancelled_total", |n| n == 2)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_answers_are_in_no_log() {
    let log = tempfile::NamedTempFile::new().expect("a file");
    let stderr = log.reopen().expect("the same file").into();
    let arguments = [
        "serve",
        "--port",
        "0",
        "--threads",
        "1",
        "--disaggregation-threshold",
        "0",
        "--log-level",
        "trace",
    ];
    let door = Process::start_with(&arguments, &[], stderr).await;
    let cluster = Cluster::of(door.url.clone());
    let message = json!([{ "role": "user", "content": "What is 37 + 58? Xylophone." }]);
    let (status, answer) = cluster
        .post(
            "/v1/chat/completions",
            &json!({ "messages": message, "max_tokens": 20 }),
        )
        .await;
    assert_eq!(status, 200, "{answer}");
    let refused = json!({ "messages": message, "max_tokens": 20, "logit_bias": { "1": 101 } });
    assert_eq!(cluster.post("/v1/chat/completions", &refused).await.0, 400);
    cluster.until_idle_and_whole().await;
    let text = std::fs::read_to_string(log.path()).expect("UTF-8");
    let id = answer["id"]
        .as_str()
        .expect("an id")
        .trim_start_matches("chatcmpl-")
        .to_owned();
    assert!(text.contains(&id), "the log knows the request by its id");
    let answered = answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("text")
        .to_owned();
    for secret in ["Xylophone", "37 + 58", answered.as_str()] {
        assert!(!text.contains(secret), "the log holds {secret:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_one_line_and_exit_code_2() {
    let empty = tempfile::tempdir().expect("a folder");
    let folder = empty.path().to_str().expect("UTF-8");
    for (arguments, needle) in [
        (&["serve", "--port", "0", "--model", folder][..], "config.json"),
        (&["serve", "--port", "0", "--kv-memory", "1KiB"], "kv_memory"),
        (&["serve", "--port", "0", "--device", "cuda"], "cuda"),
        (&["serve", "--prefill", "2", "--decode", "0"], "decode"),
    ] {
        let (code, stdout, stderr) = run(arguments).await;
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        assert!(stdout.is_empty(), "{stdout}");
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(needle),
            "{arguments:?}: {stderr}"
        );
    }
}
