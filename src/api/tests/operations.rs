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
    let failing = Script::of(vec![DoorEvent::Failed(
        baton_scheduler::request::Failure::InstanceLost("gone".to_owned()),
    )]);
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
