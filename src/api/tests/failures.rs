//! What clients get when something is wrong: with their request, with the cluster, or with the connection.

use baton_scheduler::request::Failure;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

#[tokio::test]
async fn wrong_requests_are_refused_by_field() {
    let server = start(null("a")).await;
    let wrong = [
        (CHAT, json!({"messages": []}), "messages"),
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"max_tokens": 0}), "max_tokens"),
        (CHAT, json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (CHAT, json!({"max_tokens": 1001}), "max_tokens"),
        (CHAT, json!({"temperature": -1}), "temperature"),
        (CHAT, json!({"top_p": 1.5}), "top_p"),
        (CHAT, json!({"logprobs": 5}), "logprobs"),
        (CHAT, json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (CHAT, json!({"top_logprobs": 3}), "top_logprobs"),
        (CHAT, json!({"logit_bias": {"260": 1}}), "logit_bias"),
        (CHAT, json!({"n": 0}), "n"),
        (CHAT, json!({"n": 129}), "n"),
        (CHAT, json!({"presence_penalty": -2.5}), "presence_penalty"),
        (CHAT, json!({"frequency_penalty": 3}), "frequency_penalty"),
        (CHAT, json!({"repetition_penalty": 0}), "repetition_penalty"),
        (CHAT, json!({"echo": true}), "echo"),
        (CHAT, json!({"tools": [{"type": "function"}]}), "tools"),
        (CHAT, json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (CHAT, json!({"stop": ["a", ""]}), "stop"),
        (COMPLETIONS, json!({"prompt": []}), "prompt"),
        (COMPLETIONS, json!({"prompt": ""}), ""),
        (COMPLETIONS, json!({"prompt": [260]}), "prompt"),
        (COMPLETIONS, json!({"prompt": [0, 4_000_000_000_u32]}), "prompt"),
        (COMPLETIONS, json!({"prompt": "a".repeat(2000)}), "prompt"),
        (COMPLETIONS, json!({"prompt": "a", "logprobs": true}), "logprobs"),
        (COMPLETIONS, json!({"prompt": "a", "logprobs": 21}), "logprobs"),
        (COMPLETIONS, json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (
            COMPLETIONS,
            json!({"prompt": "a", "best_of": 2, "stream": true}),
            "best_of",
        ),
        (COMPLETIONS, json!({"prompt": "a", "messages": []}), "messages"),
    ];
    for (path, body, param) in wrong {
        let mut body = body;
        if path == CHAT && body.get("messages").is_none() && body != json!({}) {
            body["messages"] = json!([{"role": "user", "content": "hi"}]);
        }
        if param.is_empty() {
            // An empty text has the begin token, so it is a prompt.
            server.ask(path, body).await;
            continue;
        }
        let error = server.refused(path, &body, 400).await;
        assert_eq!(error["param"], param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(param), "{error}");
    }
    let body = json!({"prompt": "", "add_special_tokens": false});
    assert_eq!(server.refused(COMPLETIONS, &body, 400).await["param"], "prompt");
    let error = server
        .refused(CHAT, &json!({"model": "no-such-model", "messages": []}), 404)
        .await;
    assert!(error["message"].as_str().unwrap().contains("no-such-model"));
    assert!(
        server
            .metric(r#"baton_requests_total{endpoint="chat",outcome="invalid"}"#)
            .await
            .unwrap()
            >= 16.0
    );
}

#[tokio::test]
async fn too_long_is_said_with_both_numbers() {
    let server = start(null("a")).await;
    let error = server
        .refused(COMPLETIONS, &json!({"prompt": [1, 2, 3], "max_tokens": 998}), 400)
        .await;
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("1000 tokens") && message.contains("1001 tokens"),
        "{message}"
    );
    server.refused(CHAT, &ask(&"baton ".repeat(100_000)), 400).await;
}

#[tokio::test]
async fn neutral_and_unknown_fields_pass() {
    let server = start(null("a")).await;
    let mut body = ask("hi");
    for (name, value) in [
        ("repetition_penalty", json!(1.0)),
        ("logit_bias", json!(null)),
        ("presence_penalty", json!(0)),
        ("n", json!(1)),
        ("response_format", json!({"type": "text"})),
        ("tool_choice", json!("auto")),
        ("user", json!("somebody")),
        ("a_field_of_tomorrow", json!({"x": [1]})),
    ] {
        body[name] = value;
    }
    server.ask(CHAT, body).await;
}

#[tokio::test]
async fn broken_bodies_and_routes_get_json_errors() {
    let options = ApiOptions {
        max_body_bytes: 10_000,
        ..ApiOptions::default()
    };
    let server = start_with(null("a"), byte_model(), options, ServeOptions::default()).await;
    let post = |body: String| server.client.post(server.url(CHAT)).body(body).send();
    for body in ["", "{", "[]", "\u{0}", &"[".repeat(9_000), &r#"{"a":"#.repeat(1_500)] {
        let response = post(body.to_owned()).await.unwrap();
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["type"], "BadRequestError");
    }
    assert_eq!(post(" ".repeat(20_000)).await.unwrap().status(), 413);
    let missing = server.get("/v1/nothing").await;
    assert_eq!(missing.status(), 404);
    assert_eq!(missing.json::<Value>().await.unwrap()["error"]["code"], 404);
    let wrong_method = server.get(CHAT).await;
    assert_eq!(wrong_method.status(), 405);
    assert_eq!(wrong_method.json::<Value>().await.unwrap()["error"]["code"], 405);
    let bad_label = server
        .client
        .post(server.url(CHAT))
        .header("x-request-id", "x".repeat(129))
        .json(&ask("hi"));
    assert_eq!(bad_label.send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_a_hint() {
    let retry_after = Duration::from_millis(2500);
    let rejection = Some(Rejection::OverCapacity {
        n_queued: 9,
        limit: 8,
        retry_after,
    });
    let server = start(Arc::new(Script {
        rejection,
        ..Script::default()
    }))
    .await;
    for stream in [false, true] {
        let mut body = ask("hi");
        body["stream"] = json!(stream);
        let response = server.post(CHAT, &body).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "3");
        assert!(response.headers().contains_key("x-request-id"));
        let error: Value = response.json().await.unwrap();
        assert_eq!(
            error["error"]["message"],
            "over capacity: 9 requests are waiting, the limit is 8"
        );
    }
}

#[tokio::test]
async fn a_failure_is_a_status_before_the_first_token_and_an_event_after_it() {
    let lost = DoorEvent::Failed(Failure::InstanceLost("decode-0 is gone".to_owned()));
    let early = start(Script::of(vec![lost.clone()])).await;
    for (path, mut body) in [(CHAT, ask("hi")), (COMPLETIONS, json!({"prompt": "hi"}))] {
        assert_eq!(
            early.refused(path, &body, 503).await["message"],
            "instance lost: decode-0 is gone"
        );
        body["stream"] = json!(true);
        early.refused(path, &body, 503).await;
    }
    let mut events = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    events.truncate(3);
    events.push(lost);
    let late = start(Script::of(events)).await;
    for (path, body) in [(CHAT, ask("hi")), (COMPLETIONS, json!({"prompt": "hi"}))] {
        late.refused(path, &body, 503).await;
        let events = late.stream(path, body).await;
        assert_eq!(events.len(), 4, "three tokens and the error: {events:?}");
        assert_eq!(events[3]["error"]["code"], 503);
        assert!(
            events[..3]
                .iter()
                .all(|event| event["choices"][0]["finish_reason"].is_null())
        );
    }
    assert_eq!(
        late.metric(r#"baton_requests_total{endpoint="chat",outcome="unavailable"}"#)
            .await,
        Some(2.0)
    );
}

#[tokio::test]
async fn a_stream_that_ends_in_doubt_is_no_success() {
    let mut no_end = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    no_end.pop();
    let mut gap = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    gap.remove(1);
    let mut miscounted = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    miscounted.remove(2);
    let mut unfinished = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    unfinished.remove(3);
    let mut finished_twice = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    finished_twice.insert(3, finished_twice[3].clone());
    let mut after_its_end = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    after_its_end.insert(4, Script::token(0, 3, 97));
    let mut of_nobody = Script::ids(5, &says("ab"), Finish::Stop(EOS));
    of_nobody.insert(1, Script::token(1, 0, 97));
    for events in [
        no_end,
        gap,
        miscounted,
        unfinished,
        finished_twice,
        after_its_end,
        of_nobody,
    ] {
        let server = start(Script::of(events)).await;
        server.refused(CHAT, &ask("hi"), 500).await;
        let streamed = server.stream(CHAT, ask("hi")).await;
        assert_eq!(streamed.last().unwrap()["error"]["code"], 500);
    }
}

#[tokio::test]
async fn pings_come_only_while_nothing_has_come() {
    let gate = Arc::new(Semaphore::new(0));
    let script = Script {
        events: Script::ids(5, &says("ab"), Finish::Stop(EOS)),
        gate: Some(gate.clone()),
        ..Script::default()
    };
    let options = ApiOptions {
        ping_interval: Duration::from_millis(5),
        ..ApiOptions::default()
    };
    let server = start_with(Arc::new(script), byte_model(), options, ServeOptions::default()).await;
    let mut body = ask("hi");
    body["stream"] = json!(true);
    let mut response = server.post(CHAT, &body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.chunk().await.unwrap().unwrap(), ": ping\n\n");
    assert_eq!(response.chunk().await.unwrap().unwrap(), ": ping\n\n");
    gate.add_permits(1);
    let mut text = String::new();
    while !text.contains("data: ") {
        text = String::from_utf8(response.chunk().await.unwrap().unwrap().to_vec()).unwrap();
    }
    assert!(text.contains("assistant"), "{text}");
    gate.add_permits(100);
    let rest = response.text().await.unwrap();
    assert!(!rest.contains("ping") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

/// Writes a request by hand and reads until `marker` has come.
async fn open(server: &Server, body: &Value, marker: &str) -> TcpStream {
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains(marker) {
        let mut buffer = [0; 4096];
        let n = socket.read(&mut buffer).await.unwrap();
        assert_ne!(n, 0, "the server closed: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    socket
}

#[tokio::test]
async fn a_client_that_goes_away_is_cancelled() {
    let (generator, server) = start_endless().await;
    let mut body = ask("hi");
    body["stream"] = json!(true);
    let streaming = open(&server, &body, "data: ").await;
    drop(streaming);
    until(&generator, |counts| counts.n_cancelled == 1).await;

    body["stream"] = json!(false);
    let waiting = open(&server, &body, "").await;
    until(&generator, |counts| counts.n_started == 2).await;
    drop(waiting);
    until(&generator, |counts| counts.n_cancelled == 2).await;
    assert_eq!(
        server
            .metric(r#"baton_requests_total{endpoint="chat",outcome="cancelled"}"#)
            .await,
        Some(2.0)
    );
    assert_eq!(server.state.running().n_labels(), 0);
}
