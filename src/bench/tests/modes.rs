//! Conversations, traces, goodput, comparisons, sweeps and pages, and all endpoints against a front door of known times.

use std::collections::BTreeSet;

use super::*;
use crate::config::{Environment, LoadFormat, ModelSource};
use crate::engine_config::ModelSelection;
use crate::null_generator::NullOptions;
use crate::null_process::{NullConfig, serve_null};

#[tokio::test]
async fn a_turn_is_sent_when_the_one_before_has_ended_and_begins_with_it() {
    let (fake, server) = start(Fake {
        first_token: Duration::from_millis(20),
        meeting: Some(tokio::sync::Barrier::new(3)),
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
    assert!(
        details
            .latencies
            .iter()
            .zip(&details.ttfts)
            .all(|(latency, ttft)| latency >= ttft && *ttft >= 0.02)
    );
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
    let distinct: BTreeSet<Vec<u64>> = fake_a.prompts.lock().iter().cloned().collect();
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
    let environment = Environment::default();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let null = NullConfig {
        listen,
        model: ModelSelection {
            source: ModelSource::Demo,
            served_name: "null".into(),
            load_format: LoadFormat::Auto,
            packed_dir: environment.packed_dir(),
            hub: environment.hub,
        },
        max_model_len: None,
        options: NullOptions {
            first_token_after: Duration::from_millis(40),
            token_every: Duration::from_millis(10),
            ..NullOptions::default()
        },
    };
    let serving = tokio::spawn(serve_null(listener, null, shutdown.clone()));
    for endpoint in [
        EndpointKind::Completions,
        EndpointKind::Chat,
        EndpointKind::BatonV1,
        EndpointKind::KServe,
    ] {
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
        match endpoint.needs_vocabulary() {
            true => assert_eq!(report.total_input_tokens, 120),
            false => assert!(report.total_input_tokens >= 120, "words and the template"),
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
