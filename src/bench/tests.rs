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
    /// A request's first token waits until so many requests wait for theirs.
    meeting: Option<tokio::sync::Barrier>,
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
    if let Some(meeting) = &fake.meeting {
        meeting.wait().await;
    }
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
    // What is measured is this server's pace: nothing waits for anything else by it.
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
        meeting: Some(tokio::sync::Barrier::new(3)),
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
        meeting: Some(tokio::sync::Barrier::new(12)),
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
    assert_eq!(report.completed, 12, "{report:?}");
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
    assert_eq!(
        (&*details.generated_texts[0], &*details.generated_texts[3]),
        ("xxxxx", "")
    );
    assert_eq!(details.queue_times.len(), 12);
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

mod kserve;
mod modes;
