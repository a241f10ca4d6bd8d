//! The timeline of a request, when it is asked for.

use super::*;

/// Checks that the spans follow each other and sum to the whole within 1 %.
fn check(timeline: &Value) -> f64 {
    let e2e = timeline["e2e_seconds"].as_f64().unwrap();
    let mut end = 0.0;
    for span in timeline["spans"].as_array().unwrap() {
        let start = span["start_seconds"].as_f64().unwrap();
        assert!((start - end).abs() < 1e-6, "{timeline}");
        end = start + span["seconds"].as_f64().unwrap();
    }
    assert!((end - e2e).abs() <= 0.01 * e2e, "{end} of {e2e}: {timeline}");
    e2e
}

fn names(timeline: &Value) -> Vec<&str> {
    let spans = timeline["spans"].as_array().unwrap().iter();
    spans.map(|span| span["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn it_comes_when_asked_for_and_is_the_time_the_client_waited() {
    let generator = Arc::new(NullGenerator::new(NullOptions {
        first_token_after: Duration::from_millis(200),
        token_every: Duration::from_millis(100),
        token_ids: says("abc"),
        ..NullOptions::default()
    }));
    let server = start(generator).await;
    let mut chat = ask("hi");
    chat["timeline"] = json!(true);
    let bodies = [(CHAT, chat), (COMPLETIONS, json!({"prompt": "hi", "timeline": true}))];
    for (path, body) in bodies {
        let started = std::time::Instant::now();
        let answer = server.ask(path, body.clone()).await;
        let waited = started.elapsed().as_secs_f64();
        let timeline = &answer["timeline"];
        let e2e = check(timeline);
        assert_eq!(names(timeline), ["tokenize", "queue", "first_token", "decode"]);
        assert!((0.5..=waited).contains(&e2e), "{e2e} of {waited}: {timeline}");
        let ttft = timeline["ttft_seconds"].as_f64().unwrap();
        assert!((0.2..e2e).contains(&ttft), "{timeline}");
        let decode = timeline["spans"][3]["seconds"].as_f64().unwrap();
        assert!((decode - (e2e - ttft)).abs() < 1e-6, "{timeline}");

        let events = server.stream(path, body).await;
        let (last, before) = events.split_last().unwrap();
        check(&last["timeline"]);
        assert_eq!((&last["choices"], last.get("usage")), (&json!([]), None));
        assert!(before.iter().all(|event| event.get("timeline").is_none()));
    }
}

#[tokio::test]
async fn with_the_usage_it_is_in_the_same_event() {
    let server = start(null("abc")).await;
    let body = json!({"prompt": "hi", "timeline": true, "stream_options": {"include_usage": true}});
    let events = server.stream(COMPLETIONS, body).await;
    let last = events.last().unwrap();
    check(&last["timeline"]);
    assert_eq!(last["usage"]["completion_tokens"], 4);
    assert_eq!(events.len(), 5, "four tokens and one more event");
}

#[tokio::test]
async fn without_being_asked_for_there_is_none_and_of_many_prompts_neither() {
    let server = start(null("abc")).await;
    assert!(server.ask(CHAT, ask("hi")).await.get("timeline").is_none());
    let error = server
        .refused(COMPLETIONS, &json!({"prompt": ["a", "b"], "timeline": true}), 400)
        .await;
    assert_eq!(error["param"], "timeline");
}

#[tokio::test]
async fn a_request_cut_by_a_stop_text_has_one_too() {
    let server = start(null("abcdef")).await;
    let mut body = ask("hi");
    body["timeline"] = json!(true);
    body["stop"] = json!("cd");
    let answer = server.ask(CHAT, body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "ab");
    check(&answer["timeline"]);
}
