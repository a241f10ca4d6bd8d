//! `/v1/chat/completions` as its clients see it.

use super::*;

#[tokio::test]
async fn a_whole_answer() {
    let script = Script::of(Script::ids(8, &says("Grüße"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let request = server
        .client
        .post(server.url(CHAT))
        .header("x-request-id", "req 7")
        .json(&ask("hi"));
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "req 7");
    let answer: Value = response.json().await.unwrap();
    assert_eq!(answer["id"], "chatcmpl-req 7");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "bytes");
    assert_eq!(
        answer["choices"][0]["message"],
        json!({"role": "assistant", "content": "Grüße"})
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
    let usage = json!({"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16,
                       "prompt_tokens_details": {"cached_tokens": 4}});
    assert_eq!(answer["usage"], usage);
    // The template's own begin token, and no other.
    let submitted = script.last();
    let mut expected = vec![BOS];
    expected.extend("<user>hi<assistant>".bytes().map(TokenId::from));
    assert_eq!(submitted.request.prompt_ids[..], expected);
    assert_eq!(submitted.request.sampling.max_tokens, 1000 - expected.len() as u32);
    assert_eq!(submitted.request.sampling.stop_token_ids, [EOS]);
    assert_eq!(&*submitted.label, "req 7");
}

#[tokio::test]
async fn a_stream_has_one_event_for_each_token_and_then_the_reason() {
    let server = start(null("aé")).await;
    let mut body = ask("hi");
    body["stream_options"] = json!({"include_usage": true});
    let events = server.stream(CHAT, body).await;
    // a, half of é, é, end; then reason and usage.
    assert_eq!(events.len(), 6, "{events:?}");
    assert!(
        events
            .iter()
            .all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"])
    );
    let deltas: Vec<&Value> = events[..5].iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!(*deltas[0], json!({"role": "assistant", "content": "a"}));
    assert_eq!(*deltas[1], json!({"content": ""}));
    assert_eq!(*deltas[2], json!({"content": "é"}));
    assert_eq!(*deltas[3], json!({"content": ""}));
    assert_eq!(*deltas[4], json!({}));
    assert_eq!(events[4]["choices"][0]["finish_reason"], "stop");
    assert!(
        events[..4]
            .iter()
            .all(|event| event["choices"][0]["finish_reason"].is_null())
    );
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 4);
    assert!(events[..5].iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn usage_may_come_with_every_event() {
    let server = start(null("abc")).await;
    let mut body = ask("hi");
    body["stream_options"] = json!({"continuous_usage_stats": true});
    let events = server.stream(CHAT, body).await;
    let counts: Vec<u64> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [1, 2, 3, 4, 4]);
}

#[tokio::test]
async fn a_cut_answer_owes_nothing() {
    // Two of the four bytes of a character: what is incomplete at the end comes as U+FFFD, as a full decode has it.
    let server = start(null("a😀")).await;
    let mut body = ask("hi");
    body["max_tokens"] = json!(3);
    let answer = server.ask(CHAT, body.clone()).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "a\u{fffd}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let events = server.stream(CHAT, body).await;
    assert_eq!(events.len(), 4);
    assert_eq!(events[2]["choices"][0]["delta"]["content"], "\u{fffd}");
    assert_eq!(events[3]["choices"][0]["delta"], json!({}));
}

#[tokio::test]
async fn logprobs_have_exact_bytes_even_of_parts_of_characters() {
    let server = start(null("é")).await;
    let mut body = ask("hi");
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    let answer = server.ask(CHAT, body.clone()).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[1]["bytes"], json!([0xa9]));
    assert_eq!(content[2]["token"], "<|end|>");
    assert_eq!(content[0]["logprob"], -0.5);
    let tops: Vec<&Value> = content[0]["top_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|top| &top["bytes"])
        .collect();
    assert_eq!(tops, [&json!([0xc3]), &json!([0xc4])]);
    let events = server.stream(CHAT, body).await;
    let streamed: Vec<Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(streamed, content);
}

#[tokio::test]
async fn ids_and_prompt_logprobs_on_request() {
    let server = start(null("ab")).await;
    let mut body = ask("h");
    body["return_token_ids"] = json!(true);
    body["prompt_logprobs"] = json!(1);
    body["logprobs"] = json!(true);
    body["return_tokens_as_token_ids"] = json!(true);
    let answer = server.ask(CHAT, body.clone()).await;
    let n_prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(answer["prompt_token_ids"].as_array().unwrap().len(), n_prompt);
    assert_eq!(answer["choices"][0]["token_ids"], json!([97, 98, 256]));
    let logprobs = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), n_prompt);
    assert_eq!(logprobs[0], Value::Null);
    assert_eq!(
        logprobs[1]["60"],
        json!({"logprob": -0.5, "rank": 1, "decoded_token": "token_id:60"})
    );
    assert_eq!(answer["choices"][0]["logprobs"]["content"][0]["token"], "token_id:97");
    body.as_object_mut().unwrap().remove("prompt_logprobs");
    let events = server.stream(CHAT, body).await;
    assert_eq!(events[0]["prompt_token_ids"].as_array().unwrap().len(), n_prompt);
    assert!(events[1..].iter().all(|event| event.get("prompt_token_ids").is_none()));
    let ids: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0].get("token_ids"))
        .collect();
    assert_eq!(ids, [&json!([97]), &json!([98]), &json!([256])]);
}

#[tokio::test]
async fn what_the_template_refuses_is_the_clients_to_mend() {
    let server = start(null("a")).await;
    let body = json!({"messages": [{"role": "pirate", "content": "hi"}]});
    let error = server.refused(CHAT, &body, 400).await;
    assert_eq!(
        (&error["message"], &error["param"]),
        (&json!("no such role"), &json!("messages"))
    );
}

#[tokio::test]
async fn special_tokens_are_shown_on_request() {
    let ids = [97, BOS, 98, EOS];
    let server = start(Script::of(Script::ids(5, &ids, Finish::Stop(EOS)))).await;
    let content = |answer: Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert_eq!(content(server.ask(CHAT, ask("x")).await), "ab");
    let mut body = ask("x");
    body["skip_special_tokens"] = json!(false);
    assert_eq!(content(server.ask(CHAT, body.clone()).await), "a<|begin|>b");
    body["include_stop_str_in_output"] = json!(true);
    assert_eq!(content(server.ask(CHAT, body).await), "a<|begin|>b<|end|>");
}
