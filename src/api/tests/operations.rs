//! What operators see: models, health, metrics, and how the server stops.

use super::*;

#[tokio::test]
async fn models_version_and_health() {
    let script = Script::of(Vec::new());
    let model = ServedModel {
        names: vec!["org/name".to_owned(), "alias".to_owned()],
        ..byte_model()
    };
    let server = start_with(script.clone(), model, ApiOptions::default(), ServeOptions::default()).await;
    let models: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "org/name");
    assert_eq!(models["data"][0]["root"], "/models/bytes");
    assert_eq!(models["data"][0]["max_model_len"], 1000);
    assert_eq!(models["data"].as_array().unwrap().len(), 2);
    let one: Value = server.get("/v1/models/org/name").await.json().await.unwrap();
    assert_eq!(one["id"], "org/name");
    assert_eq!(server.get("/v1/models/other").await.status(), 404);
    let version: Value = server.get("/version").await.json().await.unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let health = server.get("/health").await;
    assert_eq!(health.status(), 200);
    assert_eq!(health.text().await.unwrap(), "");
    *script.not_ready.lock() = Some("no decode instance".to_owned());
    let health = server.get("/health").await;
    assert_eq!(health.status(), 503);
    assert_eq!(
        health.json::<Value>().await.unwrap()["error"]["message"],
        "no decode instance"
    );
    assert_eq!(server.metric("baton_ready").await, Some(0.0));
}

#[tokio::test]
async fn latencies_asked_for_reach_placement_and_are_counted() {
    use baton_scheduler::placement::RequestObjectives;

    let script = Script::of(Script::ids(5, &says("abc"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let mut body = ask("hi");
    body["slo"] = json!({"ttft_ms": 50_000, "tpot_ms": 40_000});
    let request = server
        .client
        .post(server.url(CHAT))
        .header("x-slo-tpot-ms", "30000")
        .json(&body);
    assert_eq!(request.send().await.unwrap().status(), 200);
    let expected = RequestObjectives {
        ttft: Some(Nanos::from_secs(50)),
        tpot: Some(Nanos::from_secs(30)),
    };
    assert_eq!(script.last().objectives, expected);
    // A request without objectives is not counted, one that fails misses its own.
    server.ask(COMPLETIONS, json!({"prompt": [1]})).await;
    let failing = Script::of(vec![DoorEvent::Failed(Failure::InstanceLost("gone".to_owned()))]);
    let failed = start(failing).await;
    failed
        .post(COMPLETIONS, &json!({"prompt": [1], "slo": {"ttft_ms": 1}}))
        .await;
    let counted = |outcome| format!("baton_slo_requests_total{{outcome=\"{outcome}\"}}");
    let objective = |name, outcome| format!("baton_slo_objectives_total{{objective=\"{name}\",outcome=\"{outcome}\"}}");
    for sample in [counted("met"), objective("ttft", "met"), objective("tpot", "met")] {
        assert_eq!(server.metric(&sample).await, Some(1.0), "{sample}");
        assert_eq!(failed.metric(&sample).await, None, "{sample}");
    }
    for sample in [counted("missed"), objective("ttft", "missed")] {
        assert_eq!(failed.metric(&sample).await, Some(1.0), "{sample}");
        assert_eq!(server.metric(&sample).await, None, "{sample}");
    }
    assert_eq!(failed.metric(&objective("tpot", "missed")).await, None);
    let request = server
        .client
        .post(server.url(CHAT))
        .header("x-slo-ttft-ms", "soon")
        .json(&body);
    let answer: Value = request.send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["error"]["param"], "x-slo-ttft-ms");
}

#[tokio::test]
async fn requests_and_tokens_are_counted_once() {
    let server = start(null("abc")).await;
    server.ask(CHAT, ask("hi")).await;
    server.stream(COMPLETIONS, json!({"prompt": [1, 2]})).await;
    let n_prompt = 2 + 1 + "<user>hi<assistant>".len();
    assert_eq!(server.metric("baton_prompt_tokens_total").await, Some(n_prompt as f64));
    assert_eq!(server.metric("baton_generation_tokens_total").await, Some(8.0));
    assert_eq!(
        server
            .metric(r#"baton_requests_total{endpoint="chat",outcome="stop"}"#)
            .await,
        Some(1.0)
    );
    assert_eq!(
        server
            .metric(r#"baton_requests_total{endpoint="completions",outcome="stop"}"#)
            .await,
        Some(1.0)
    );
    assert_eq!(
        server.metric("baton_time_to_first_token_seconds_count").await,
        Some(2.0)
    );
    assert_eq!(
        server.metric("baton_inter_token_latency_seconds_count").await,
        Some(6.0)
    );
    assert_eq!(
        server.metric("baton_e2e_request_latency_seconds_count").await,
        Some(2.0)
    );
    assert_eq!(
        server
            .metric(r#"baton_request_phase_seconds_count{phase="queue"}"#)
            .await,
        Some(2.0)
    );
    assert_eq!(
        server
            .metric(r#"baton_instance_ready{instance="null-0",role="mixed"}"#)
            .await,
        Some(1.0)
    );
    assert_eq!(server.metric("baton_num_requests_running").await, Some(0.0));
    assert!(server.metric("baton_connections").await.unwrap() >= 1.0);
    let text = server.get("/metrics").await.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# TYPE baton_requests counter"));
}

#[tokio::test]
async fn other_parts_register_into_the_same_exposition() {
    let server = start(null("a")).await;
    let counter = prometheus_client::metrics::counter::Counter::<u64>::default();
    counter.inc_by(3);
    server
        .state
        .inner
        .registry
        .register("baton_test", "A test's own", counter);
    assert_eq!(server.metric("baton_test_total").await, Some(3.0));
}

fn gated() -> (Arc<Script>, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let events = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    (
        Arc::new(Script {
            events,
            gate: Some(gate.clone()),
            n_free: 1,
            ..Script::default()
        }),
        gate,
    )
}

#[tokio::test]
async fn open_streams_end_before_the_server_does() {
    let (script, gate) = gated();
    let server = start(script).await;
    let mut body = ask("hi");
    body["stream"] = json!(true);
    let response = server.post(CHAT, &body).await;
    server.stopping.cancel();
    // The listener closes at some moment after that; connections made before it are refused by name.
    loop {
        match server.client.post(server.url(CHAT)).json(&body).send().await {
            Err(_) => break,
            Ok(refused) => assert_eq!(refused.status(), 503),
        }
    }
    assert!(!server.task.is_finished(), "a stream is open");
    gate.add_permits(100);
    let text = response.text().await.unwrap();
    assert!(
        text.contains(r#""finish_reason":"stop""#) && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_that_does_not_end_is_cut_at_the_drain_timeout() {
    let generator = endless();
    let options = ServeOptions {
        drain_timeout: Duration::from_millis(20),
        ..ServeOptions::default()
    };
    let model = ServedModel {
        max_model_len: 1 << 30,
        ..byte_model()
    };
    let server = start_with(generator.clone(), model, ApiOptions::default(), options).await;
    let mut body = ask("hi");
    body["stream"] = json!(true);
    let response = server.post(CHAT, &body).await;
    server.stopping.cancel();
    server.task.await.unwrap().unwrap();
    until(&generator, |counts| counts.n_cancelled == 1).await;
    assert!(response.text().await.is_err(), "a cut stream is no success");
}

/// The buckets of a histogram in an exposition, without the last, infinite one.
fn buckets(text: &str, name: &str) -> Vec<f64> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix("_bucket{"));
    let bounds = lines.map(|line| line.split("le=\"").nth(1).unwrap().split('"').next().unwrap());
    bounds
        .filter(|bound| *bound != "+Inf")
        .map(|bound| bound.parse().unwrap())
        .collect()
}

#[tokio::test]
async fn aliases_have_the_names_types_labels_and_buckets_of_vllm() {
    let options = ApiOptions {
        metrics_aliases: crate::config::MetricsAliases::Vllm,
        ..ApiOptions::default()
    };
    let server = start_with(null("abc"), byte_model(), options, ServeOptions::default()).await;
    server.ask(CHAT, ask("hi")).await;
    server
        .stream(COMPLETIONS, json!({"prompt": [1, 2], "n": 2, "max_tokens": 3}))
        .await;
    let text = server.get("/metrics").await.text().await.unwrap();
    for (kind, names) in [
        (
            "gauge",
            &[
                "num_requests_running",
                "num_requests_waiting",
                "kv_cache_usage_perc",
                "gpu_cache_usage_perc",
                "cache_config_info",
            ][..],
        ),
        (
            "counter",
            &[
                "prompt_tokens",
                "generation_tokens",
                "request_success",
                "prefix_cache_queries",
                "prefix_cache_hits",
            ],
        ),
        (
            "histogram",
            &[
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "time_per_output_token_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
                "request_inference_time_seconds",
                "request_prompt_tokens",
                "request_generation_tokens",
                "request_max_num_generation_tokens",
                "request_params_n",
                "request_params_max_tokens",
            ],
        ),
    ] {
        for name in names {
            assert!(
                text.contains(&format!("# TYPE vllm:{name} {kind}\n")),
                "{name} is a {kind}"
            );
        }
    }
    let mut samples = text.lines().filter(|line| line.starts_with("vllm:"));
    assert!(samples.all(|line| line.contains(r#"model_name="bytes""#) && line.contains(r#"engine="0""#)));
    let ttft = [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
        160.0, 640.0, 2560.0,
    ];
    assert_eq!(buckets(&text, "vllm:time_to_first_token_seconds"), ttft);
    let requests = [
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
        1920.0, 7680.0,
    ];
    for name in [
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
        "request_inference_time",
    ] {
        assert_eq!(buckets(&text, &format!("vllm:{name}_seconds")), requests, "{name}");
    }
    assert_eq!(buckets(&text, "vllm:request_params_n"), [1.0, 2.0, 5.0, 10.0, 20.0]);
    let lengths = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];
    assert_eq!(
        buckets(&text, "vllm:request_prompt_tokens"),
        lengths,
        "up to the model's length"
    );

    // The same observations as under our own names.
    let labels = r#"{model_name="bytes",engine="0"}"#;
    for (theirs, ours) in [
        ("prompt_tokens_total", "prompt_tokens_total"),
        ("generation_tokens_total", "generation_tokens_total"),
        ("prefix_cache_hits_total", "cached_prompt_tokens_total"),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
        ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("inter_token_latency_seconds_count", "inter_token_latency_seconds_count"),
        (
            "time_per_output_token_seconds_count",
            "inter_token_latency_seconds_count",
        ),
        ("e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_sum"),
        ("request_generation_tokens_sum", "request_generation_tokens_sum"),
    ] {
        let theirs = server.metric(&format!("vllm:{theirs}{labels}")).await;
        assert!(theirs.is_some(), "{ours}");
        assert_eq!(theirs, server.metric(&format!("baton_{ours}")).await, "{ours}");
    }
    assert_eq!(
        server.metric("baton_generation_tokens_total").await,
        Some(4.0 + 3.0 + 3.0)
    );
    let success = |reason: &str| {
        format!(r#"vllm:request_success_total{{model_name="bytes",engine="0",finished_reason="{reason}"}}"#)
    };
    assert_eq!(server.metric(&success("stop")).await, Some(1.0));
    assert_eq!(server.metric(&success("length")).await, Some(1.0));
    assert_eq!(
        server.metric(&format!("vllm:request_params_n_sum{labels}")).await,
        Some(3.0)
    );
}

#[tokio::test]
async fn without_the_flag_there_are_no_aliases() {
    let server = start(null("abc")).await;
    server.ask(CHAT, ask("hi")).await;
    let text = server.get("/metrics").await.text().await.unwrap();
    assert!(!text.contains("vllm:"), "{text}");
}
