//! The load generator against a server that paces its tokens, on a real socket.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use super::workload::{ArrivalProcess, LENGTH_LIMIT, Lengths};
use super::*;
use crate::config::Setting as _;

/// What the fake server does, and what it has seen.
#[derive(Default)]
struct Fake {
    first_token: Duration,
    between_tokens: Duration,
    /// Answers 429 to every request whose number is a multiple of this, from 1.
    refuse_every: usize,
    /// Holds a permit while a request is served.
    one_by_one: Option<Arc<tokio::sync::Semaphore>>,
    n_requests: AtomicUsize,
    n_running: AtomicUsize,
    max_running: AtomicUsize,
    /// The prompts, in the order in which they came.
    prompts: Mutex<Vec<Vec<u64>>>,
}

async fn completions(State(fake): State<Arc<Fake>>, Json(body): Json<Value>) -> Response {
    let number = 1 + fake.n_requests.fetch_add(1, Ordering::SeqCst);
    if fake.refuse_every > 0 && number.is_multiple_of(fake.refuse_every) {
        return (
            StatusCode::TOO_MANY_REQUESTS,
            "{\"error\":{\"message\":\"over capacity\"}}",
        )
            .into_response();
    }
    assert_eq!(body["stream_options"]["include_usage"], true);
    let prompt: Vec<u64> = body["prompt"]
        .as_array()
        .expect("token ids")
        .iter()
        .map(|id| id.as_u64().expect("an id"))
        .collect();
    let n_input = prompt.len();
    fake.prompts.lock().push(prompt);
    let n_output = body["max_tokens"].as_u64().expect("a number");
    let served = match &fake.one_by_one {
        Some(turn) => Some(turn.clone().acquire_owned().await.expect("never closed")),
        None => None,
    };
    let running = 1 + fake.n_running.fetch_add(1, Ordering::SeqCst);
    fake.max_running.fetch_max(running, Ordering::SeqCst);
    let usage =
        json!({"prompt_tokens": n_input, "completion_tokens": n_output, "prompt_tokens_details": {"cached_tokens": 4}});
    let mut events = vec![(Duration::ZERO, ": waiting\n\n".to_owned())];
    for index in 0..n_output {
        let pause = if index == 0 {
            fake.first_token
        } else {
            fake.between_tokens
        };
        let event = json!({"choices": [{"index": 0, "text": "x", "finish_reason": null}], "usage": null});
        let text = format!("data: {event}\n\n");
        // The network may cut an event anywhere; the token has arrived with its last byte.
        let (head, tail) = text.split_at(7);
        events.extend([(Duration::ZERO, head.to_owned()), (pause, tail.to_owned())]);
    }
    events.push((
        Duration::ZERO,
        format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage})),
    ));
    let stream = futures::stream::iter(events).then(async |(pause, text)| {
        tokio::time::sleep(pause).await;
        Ok::<_, Infallible>(Bytes::from(text))
    });
    let ended = futures::stream::once(async move {
        drop(served);
        fake.n_running.fetch_sub(1, Ordering::SeqCst);
        Ok(Bytes::new())
    });
    let headers = [("content-type", "text/event-stream")];
    (
        headers,
        Body::from_stream(futures::StreamExt::chain(Box::pin(stream), ended)),
    )
        .into_response()
}

async fn start(fake: Fake) -> (Arc<Fake>, Address) {
    let fake = Arc::new(fake);
    let models = async || Json(json!({"data": [{"id": "tiny", "root": "tiny"}]}));
    let router = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .with_state(fake.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = Address::parse(&listener.local_addr().expect("bound").to_string()).expect("an address");
    // Without it the tail of an event waits for the client's delayed acknowledgement of its head.
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        stream.set_nodelay(true).expect("an open socket");
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    (fake, address)
}

const POISSON: ArrivalProcess = ArrivalProcess::Poisson;

fn config(server: Address, arrivals: Arrivals) -> BenchConfig {
    BenchConfig {
        server,
        endpoint: EndpointKind::Completions,
        model: None,
        workload: WorkloadSpec {
            n_requests: 12,
            arrivals,
            input: Lengths::Fixed(10),
            output: Lengths::Fixed(5),
            max_input_len: LENGTH_LIMIT,
            max_output_len: LENGTH_LIMIT,
            prefix_len: 3,
            n_prefixes: 1,
            turns: Lengths::Fixed(1),
            turn_input: Lengths::Fixed(4),
            think_time: Duration::ZERO,
            trace: None,
            seed: 1,
        },
        trace_path: None,
        mode: Mode::Once,
        objectives: Objectives::default(),
        n_warmup: 0,
        ignore_eos: true,
        temperature: None,
        vocab_size: Some(50),
        timeout: Duration::from_secs(60),
        api_key: None,
        json: false,
        output: None,
        html: None,
        details: false,
        label: None,
        commit: Some("abc".into()),
    }
}

#[tokio::test]
async fn a_closed_loop_keeps_its_concurrency_and_counts_exactly() {
    let (fake, server) = start(Fake {
        first_token: Duration::from_millis(30),
        between_tokens: Duration::from_millis(10),
        ..Fake::default()
    })
    .await;
    let report = measure(&config(server, Arrivals::Closed { concurrency: 3 }))
        .await
        .expect("measured");
    assert_eq!((report.completed, report.failed, report.wrong_length), (12, 0, 0));
    assert_eq!(
        (
            report.total_input_tokens,
            report.total_output_tokens,
            report.total_cached_tokens
        ),
        (120, 60, 48)
    );
    assert_eq!(report.model_id, "tiny");
    assert_eq!(fake.max_running.load(Ordering::SeqCst), 3);
    assert_eq!(report.max_concurrent_requests, 3);
    // The server's pauses are lower bounds whatever the machine does.
    assert!(report.ttft.mean_ttft_ms >= 30.0, "{report:?}");
    assert!(
        report.tpot.p50_tpot_ms >= 10.0 && report.itl.p50_itl_ms >= 10.0,
        "{report:?}"
    );
    assert!(report.e2el.p50_e2el_ms >= 70.0, "{report:?}");
    assert!(report.duration >= 0.28, "four rounds of 70 ms: {report:?}");
    assert!((report.output_throughput - 60.0 / report.duration).abs() < 1e-9);
}

#[tokio::test]
async fn an_open_loop_does_not_wait_for_answers() {
    let (fake, server) = start(Fake {
        first_token: Duration::from_millis(500),
        ..Fake::default()
    })
    .await;
    let report = measure(&config(
        server,
        Arrivals::Open {
            rate: f64::INFINITY,
            process: POISSON,
        },
    ))
    .await
    .expect("measured");
    assert_eq!(report.completed, 12);
    assert_eq!(
        fake.max_running.load(Ordering::SeqCst),
        12,
        "all are sent before the first answer"
    );
    assert_eq!(report.request_rate, report::RequestRate::Unlimited("inf".into()));
}

#[tokio::test]
async fn failures_are_counted_by_kind_and_kept_out_of_the_latencies() {
    let (_, server) = start(Fake {
        refuse_every: 4,
        ..Fake::default()
    })
    .await;
    let mut config = config(server, Arrivals::Closed { concurrency: 1 });
    config.details = true;
    let report = measure(&config).await.expect("measured");
    assert_eq!((report.completed, report.failed), (9, 3));
    assert_eq!(report.error_counts.get("http_429"), Some(&3));
    let details = report.details.expect("asked for");
    assert!(details.errors[3].contains("over capacity"), "{:?}", details.errors);
    assert_eq!((details.itls[0].len(), details.itls[3].len()), (4, 0));
}

#[tokio::test]
async fn a_server_that_hangs_ends_in_a_timeout() {
    let (_, server) = start(Fake {
        first_token: Duration::from_secs(3600),
        ..Fake::default()
    })
    .await;
    let mut config = config(server, Arrivals::Closed { concurrency: 12 });
    config.timeout = Duration::from_millis(100);
    let report = measure(&config).await.expect("measured");
    assert_eq!(report.error_counts.get("timed_out"), Some(&12));
    let message = run(config).await.expect_err("nothing completed").to_string();
    assert_eq!(message, "no request was completed: 12 timed_out");
}

#[tokio::test]
async fn the_json_has_the_keys_that_other_tools_read_and_can_be_read_back() {
    let (_, server) = start(Fake::default()).await;
    let report = measure(&config(
        server,
        Arrivals::Open {
            rate: 1000.0,
            process: POISSON,
        },
    ))
    .await
    .expect("measured");
    let json = serde_json::to_value(&report).expect("serialised");
    for metric in ["ttft", "tpot", "itl", "e2el"] {
        for statistic in ["mean", "median", "std", "p50", "p90", "p95", "p99"] {
            assert!(
                json[format!("{statistic}_{metric}_ms")].is_number(),
                "{statistic} {metric}"
            );
        }
    }
    for key in [
        "completed",
        "failed",
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "duration",
    ] {
        assert!(json[key].is_number(), "{key}");
    }
    assert_eq!(
        (&json["commit"], &json["request_goodput"]),
        (&json!("abc"), &Value::Null)
    );
    assert_eq!(json["request_rate"], 1000.0);
    let back: BenchReport = serde_json::from_value(json).expect("read back");
    assert_eq!(back.machine, report.machine);
    assert_eq!(back.e2el, report.e2el);
    assert!(table::single(&back).contains("TTFT"));
}

#[tokio::test]
async fn without_a_vocabulary_the_way_out_is_named() {
    let (_, server) = start(Fake::default()).await;
    let mut config = config(server, Arrivals::Closed { concurrency: 1 });
    config.vocab_size = None;
    let message = format!("{:#}", measure(&config).await.expect_err("no ModelInfo"));
    assert!(message.contains("--vocab-size"), "{message}");
}

#[tokio::test]
async fn a_turn_is_sent_when_the_one_before_has_ended_and_begins_with_it() {
    let (fake, server) = start(Fake {
        first_token: Duration::from_millis(20),
        ..Fake::default()
    })
    .await;
    let mut config = config(
        server,
        Arrivals::Open {
            rate: f64::INFINITY,
            process: POISSON,
        },
    );
    config.workload.turns = Lengths::Fixed(4);
    config.workload.think_time = Duration::from_millis(5);
    config.details = true;
    let report = measure(&config).await.expect("measured");
    assert_eq!((report.completed, report.num_sessions), (12, 3));
    assert_eq!(
        fake.max_running.load(Ordering::SeqCst),
        3,
        "one request of each conversation at a time"
    );
    // Turns have prompts of 10, 19, 28 and 37 tokens: the answers have 5, and the user adds 4.
    assert_eq!(report.total_input_tokens, 3 * (10 + 19 + 28 + 37));
    let prompts = fake.prompts.lock();
    for long in prompts.iter().filter(|prompt| prompt.len() > 10) {
        let before = prompts.iter().filter(|prompt| prompt.len() == long.len() - 9);
        assert_eq!(
            before.filter(|prompt| long.starts_with(prompt)).count(),
            1,
            "one conversation goes on"
        );
    }
    let details = report.details.expect("asked for");
    assert_eq!(details.sessions, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
}

#[tokio::test]
async fn goodput_counts_requests_that_meet_all_objectives() {
    let (_, server) = start(Fake {
        first_token: Duration::from_millis(40),
        refuse_every: 4,
        ..Fake::default()
    })
    .await;
    let mut config = config(server, Arrivals::Closed { concurrency: 2 });
    for (objectives, n_met) in [
        ("ttft:20s,tpot:10s", 9),
        ("ttft:20s,tpot:10s,e2e:20ms", 0),
        ("ttft:40ms", 0),
    ] {
        config.objectives = Objectives::parse(objectives).expect("valid");
        let report = measure(&config).await.expect("measured");
        assert_eq!(
            report.goodput_share,
            Some(f64::from(n_met) / 12.0),
            "a failed request met none: {objectives}"
        );
        let goodput = report.request_goodput.expect("objectives are set");
        assert!(
            (goodput - f64::from(n_met) / report.duration).abs() < 1e-9,
            "{objectives}"
        );
        assert_eq!(report.goodput_objectives.as_deref(), Some(objectives));
    }
    let report = measure(&config).await.expect("measured");
    let [low, high] = report.ci95["p50_ttft_ms"];
    assert!(low <= report.ttft.p50_ttft_ms && report.ttft.p50_ttft_ms <= high && low >= 40.0);
    assert!(report.ci95.contains_key("mean_e2el_ms") && report.ci95.contains_key("p99_itl_ms"));
}

#[tokio::test]
async fn two_servers_take_turns_under_the_same_load() {
    let (fake_a, a) = start(Fake::default()).await;
    let (fake_b, b) = start(Fake {
        first_token: Duration::from_millis(60),
        between_tokens: Duration::from_millis(10),
        ..Fake::default()
    })
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = config(a, Arrivals::Closed { concurrency: 1 });
    config.workload.n_requests = 3;
    config.mode = Mode::Compare {
        other: b.clone(),
        n_rounds: 2,
    };
    config.output = Some(folder.path().join("report.json"));
    config.html = Some(folder.path().join("report.html"));
    run(config).await.expect("compared");
    assert_eq!(
        *fake_a.prompts.lock(),
        *fake_b.prompts.lock(),
        "the same prompts in the same order"
    );
    let distinct: std::collections::BTreeSet<Vec<u64>> = fake_a.prompts.lock().iter().cloned().collect();
    assert_eq!(distinct.len(), 6, "each round has its own");
    let text = std::fs::read_to_string(folder.path().join("report.json")).expect("written");
    let report: CompareReport = serde_json::from_str(&text).expect("read back");
    assert_eq!(
        (report.kind.as_str(), report.rounds.len(), report.b),
        ("compare", 2, b.to_string())
    );
    let ttft = &report.ratios["p50_ttft_ms"];
    assert_eq!(ttft.rounds.len(), 2);
    assert!(
        ttft.min > 1.0 && report.ratios["request_throughput"].max < 1.0,
        "B is the slower: {:?}",
        report.ratios
    );
    let page = std::fs::read_to_string(folder.path().join("report.html")).expect("written");
    assert!(page.contains("Round 2") && page.contains("Requests to B"));
    is_self_contained(&page);
}

#[tokio::test]
async fn a_sweep_finds_the_rate_that_a_server_holds() {
    // Serves one request after the other, 20 ms each: it holds less than 50 requests a second.
    let (_, server) = start(Fake {
        one_by_one: Some(Arc::new(tokio::sync::Semaphore::new(1))),
        first_token: Duration::from_millis(20),
        ..Fake::default()
    })
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = config(
        server,
        Arrivals::Open {
            rate: 4.0,
            process: ArrivalProcess::Uniform,
        },
    );
    config.objectives = Objectives::parse("ttft:150ms").expect("valid");
    config.workload.output = Lengths::Fixed(1);
    config.mode = Mode::Sweep(SweepOptions {
        start: 4.0,
        attainment: 0.9,
        max_points: 7,
        precision: 0.3,
        point_seconds: 1.0,
    });
    config.output = Some(folder.path().join("report.json"));
    config.html = Some(folder.path().join("report.html"));
    run(config).await.expect("swept");
    let text = std::fs::read_to_string(folder.path().join("report.json")).expect("written");
    let report: SweepReport = serde_json::from_str(&text).expect("read back");
    assert!(report.points.len() <= 7);
    for point in &report.points {
        let report::RequestRate::PerSecond(rate) = point.request_rate else {
            panic!("{:?}", point.request_rate)
        };
        let is_met = point.goodput_share.expect("objectives are set") >= 0.9;
        assert_eq!(point.num_prompts, (rate.ceil() as usize).max(12));
        assert!(
            is_met || report.goodput_rate.is_none_or(|goodput| goodput < rate),
            "{rate} was missed"
        );
        assert!(
            !is_met || report.goodput_rate.is_some_and(|goodput| goodput >= rate),
            "{rate} was met"
        );
    }
    // The server's pauses are lower bounds: 60 a second wait 1/6 of each request's time more than the one before.
    assert!(
        report.goodput_rate.is_none_or(|rate| rate < 64.0),
        "{:?}",
        report.goodput_rate
    );
    assert!(report.lowest_rate_missed.is_some());
    let page = std::fs::read_to_string(folder.path().join("report.html")).expect("written");
    assert!(page.contains("Goodput against rate") && page.contains("Share of requests within objectives"));
    is_self_contained(&page);
}

/// Well-formed as far as elements go, and nothing is loaded from elsewhere.
fn is_self_contained(page: &str) {
    for loading in ["<script", "<link", "src=", "url(", "@import"] {
        assert!(!page.contains(loading), "{loading}");
    }
    for element in ["svg", "div", "pre", "h2", "text", "html", "body"] {
        let (opened, closed) = (
            page.matches(&format!("<{element}>")).count() + page.matches(&format!("<{element} ")).count(),
            page.matches(&format!("</{element}>")).count(),
        );
        assert_eq!(opened, closed, "{element}");
    }
    assert!(
        !page.contains("NaN") && !page.contains("inf\""),
        "every coordinate is a number"
    );
}

#[tokio::test]
async fn a_page_shows_one_measurement() {
    let (_, server) = start(Fake {
        refuse_every: 5,
        ..Fake::default()
    })
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = config(
        server,
        Arrivals::Open {
            rate: 200.0,
            process: POISSON,
        },
    );
    config.html = Some(folder.path().join("report.html"));
    config.label = Some("a<b".into());
    run(config).await.expect("measured");
    let page = std::fs::read_to_string(folder.path().join("report.html")).expect("written");
    for part in [
        "Time to first token",
        "Inter-token latency",
        "End-to-end latency",
        "failed",
        "a&lt;b",
        "poisson at 200/s",
    ] {
        assert!(page.contains(part), "{part}");
    }
    is_self_contained(&page);
}

#[tokio::test]
async fn a_trace_is_played_at_its_times() {
    let (fake, server) = start(Fake::default()).await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.jsonl");
    let lines = [(0, 600, "[1, 2]"), (200, 520, "[1, 3]"), (400, 9, "[]")].map(|(at, length, ids)| {
        format!("{{\"timestamp\": {at}, \"input_length\": {length}, \"output_length\": 2, \"hash_ids\": {ids}}}")
    });
    std::fs::write(&path, lines.join("\n")).expect("written");
    let mut config = config(server, Arrivals::Recorded { scale: 0.5 });
    config.workload.trace = Some(workload::read_trace(&path).expect("valid").into());
    config.workload.n_requests = 3;
    config.details = true;
    let report = measure(&config).await.expect("measured");
    assert_eq!(
        (report.completed, report.total_input_tokens, report.total_output_tokens),
        (3, 1129, 6)
    );
    let starts = report.details.expect("asked for").start_times;
    assert!(
        starts[1] - starts[0] >= 0.09 && starts[2] >= 0.2,
        "not before they are due: {starts:?}"
    );
    assert_eq!(report.request_rate, report::RequestRate::PerSecond(10.0));
    let prompts = fake.prompts.lock();
    let by_length = |length: usize| prompts.iter().find(|prompt| prompt.len() == length).expect("sent");
    assert_eq!(by_length(600)[..512], by_length(520)[..512]);
    assert_ne!(by_length(600)[512..520], by_length(520)[512..]);
}

#[tokio::test]
async fn every_endpoint_is_counted_and_timed_against_a_front_door_of_known_times() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let listen = listener.local_addr().expect("bound");
    let environment = crate::config::Environment::default();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let null = crate::null_process::NullConfig {
        listen,
        model: crate::engine_config::ModelSelection {
            source: crate::config::ModelSource::Demo,
            served_name: "null".into(),
            load_format: crate::config::LoadFormat::Auto,
            packed_dir: environment.packed_dir(),
            hub: environment.hub,
        },
        max_model_len: None,
        options: crate::null_generator::NullOptions {
            first_token_after: Duration::from_millis(40),
            token_every: Duration::from_millis(10),
            ..crate::null_generator::NullOptions::default()
        },
    };
    let serving = tokio::spawn(crate::null_process::serve_null(listener, null, shutdown.clone()));
    for endpoint in [EndpointKind::Completions, EndpointKind::Chat, EndpointKind::BatonV1] {
        let server = Address::parse(&listen.to_string()).expect("an address");
        let mut config = config(server, Arrivals::Closed { concurrency: 4 });
        config.endpoint = endpoint;
        config.vocab_size = None;
        config.n_warmup = 1;
        let report = measure(&config).await.expect("measured");
        assert_eq!(
            (report.completed, report.failed, report.wrong_length),
            (12, 0, 0),
            "{endpoint:?}"
        );
        assert_eq!((report.total_output_tokens, report.model_id.as_str()), (60, "null"));
        match endpoint {
            EndpointKind::Chat => assert!(report.total_input_tokens >= 120, "words and the template"),
            EndpointKind::Completions | EndpointKind::BatonV1 => assert_eq!(report.total_input_tokens, 120),
        }
        assert!(report.ttft.mean_ttft_ms >= 40.0, "{endpoint:?}: {:?}", report.ttft);
        // Tokens come 10 ms apart from the first on; one that was seen late makes the gap after it shorter.
        assert!(report.e2el.p50_e2el_ms >= 80.0, "{endpoint:?}: {:?}", report.e2el);
        assert!(
            report.itl.mean_itl_ms > 5.0,
            "tokens are not taken together: {endpoint:?}: {:?}",
            report.itl
        );
    }
    shutdown.cancel();
    serving.await.expect("no panic").expect("served to the end");
}
