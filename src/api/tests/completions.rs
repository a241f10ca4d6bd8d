//! `/v1/completions` as its clients see it.

use super::*;

#[tokio::test]
async fn nothing_is_added_to_ids_and_a_text_begins_as_the_tokenizer_says() {
    let script = Script::of(Script::ids(2, &says("ok"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let answer = server.ask(COMPLETIONS, json!({"prompt": [104, 105]})).await;
    assert_eq!(answer["choices"][0]["text"], "ok");
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(script.last().request.prompt_ids[..], [104, 105]);
    assert_eq!(script.last().request.sampling.max_tokens, 16);
    server.ask(COMPLETIONS, json!({"prompt": "hi"})).await;
    assert_eq!(script.last().request.prompt_ids[..], [BOS, 104, 105]);
    server
        .ask(COMPLETIONS, json!({"prompt": "hi", "add_special_tokens": false}))
        .await;
    assert_eq!(script.last().request.prompt_ids[..], [104, 105]);
}

#[tokio::test]
async fn a_stream_has_exactly_one_event_for_each_token() {
    let server = start(null("héllo")).await;
    let body = json!({"prompt": "hi", "stream_options": {"include_usage": true}});
    let events = server.stream(COMPLETIONS, body.clone()).await;
    let (usage, tokens) = events.split_last().unwrap();
    assert_eq!(
        tokens.len() as u64,
        usage["usage"]["completion_tokens"].as_u64().unwrap()
    );
    assert_eq!(tokens.len(), 7);
    let text: String = tokens
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, "héllo");
    let reasons: Vec<&Value> = tokens
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(reasons.iter().filter(|reason| !reason.is_null()).count(), 1);
    assert_eq!(*reasons[6], "stop");
    let cut = server
        .stream(COMPLETIONS, json!({"prompt": "hi", "max_tokens": 3}))
        .await;
    assert_eq!(cut.len(), 3);
    assert_eq!(
        cut[2]["choices"][0],
        json!({"index": 0, "text": "é", "logprobs": null, "finish_reason": "length"})
    );
}

#[tokio::test]
async fn echo_repeats_the_prompt_with_its_logprobs() {
    let server = start(null("xyz")).await;
    let body = json!({"prompt": "hé", "echo": true, "logprobs": 1, "max_tokens": 2});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "héxy");
    let logprobs = &choice["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["<|begin|>", "h", "\u{fffd}", "\u{fffd}", "x", "y"])
    );
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 9, 10, 11, 12, 13]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"h": -0.5}));
    assert_eq!(answer["usage"]["completion_tokens"], 2);

    let events = server.stream(COMPLETIONS, body).await;
    assert_eq!(events.len(), 2, "the prompt comes with the first token");
    assert_eq!(events[0]["choices"][0]["text"], "héx");
    assert_eq!(
        events[0]["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(),
        5
    );
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([13]));
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_new_tokens() {
    let server = start(null("xyz")).await;
    let body = json!({"prompt": [104, 105], "echo": true, "logprobs": 0, "max_tokens": 0});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    assert_eq!(answer["choices"][0]["text"], "hi");
    assert_eq!(answer["choices"][0]["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let events = server.stream(COMPLETIONS, body).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["choices"][0]["text"], "hi");
    let error = server
        .refused(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 0}), 400)
        .await;
    assert_eq!(error["param"], "max_tokens");
}

#[tokio::test]
async fn several_prompts_are_several_choices() {
    let generator = null("ab");
    let server = start(generator.clone()).await;
    let body = json!({"prompt": [[1], "two", [1, 2, 3]], "return_token_ids": true});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(
        choices
            .iter()
            .map(|choice| choice["index"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert!(
        choices
            .iter()
            .all(|choice| choice["text"] == "ab" && choice["token_ids"] == json!([97, 98, 256]))
    );
    assert_eq!(choices[2]["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(answer["usage"]["prompt_tokens"], 1 + 4 + 3);
    assert_eq!(answer["usage"]["completion_tokens"], 9);

    let mut body = body;
    body["stream_options"] = json!({"include_usage": true});
    let events = server.stream(COMPLETIONS, body).await;
    for index in 0..3 {
        let own = events.iter().filter(|event| event["choices"][0]["index"] == index);
        let own: Vec<&Value> = own.map(|event| &event["choices"][0]).collect();
        assert_eq!(own.len(), 3);
        assert_eq!(
            own.iter()
                .map(|choice| choice["text"].as_str().unwrap())
                .collect::<String>(),
            "ab"
        );
        assert_eq!(own[2]["finish_reason"], "stop");
    }
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 9);
    until(&generator, |counts| counts.n_ended == 6).await;
}

#[tokio::test]
async fn many_prompts_are_served_by_few_places() {
    // More prompts than run or wait at once would be over capacity; as many as wait are served one after the other.
    let options = NullOptions {
        token_ids: says("ab"),
        max_running: 1,
        max_queued: 7,
        ..NullOptions::default()
    };
    let server = start(Arc::new(NullGenerator::new(options))).await;
    let prompts: Vec<Vec<u32>> = (0..8).map(|idx| vec![idx]).collect();
    let answer = server.ask(COMPLETIONS, json!({"prompt": prompts})).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 8);
    let prompts: Vec<Vec<u32>> = (0..12).map(|idx| vec![idx]).collect();
    server.refused(COMPLETIONS, &json!({"prompt": prompts}), 429).await;
}

#[tokio::test]
async fn a_model_without_a_tokenizer_serves_ids_only() {
    let model = ServedModel {
        tokenizer: None,
        chat_template: None,
        ..byte_model()
    };
    let server = start_with(null("ab"), model, ApiOptions::default(), ServeOptions::default()).await;
    let body = json!({"prompt": [1], "return_token_ids": true, "logprobs": 1});
    let answer = server.ask(COMPLETIONS, body).await;
    assert_eq!(answer["choices"][0]["text"], "");
    assert_eq!(answer["choices"][0]["token_ids"], json!([97, 98, 256]));
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"][0], "token_id:97");
    assert_eq!(
        server.refused(COMPLETIONS, &json!({"prompt": "a"}), 400).await["param"],
        "prompt"
    );
    assert_eq!(
        server
            .refused(COMPLETIONS, &json!({"prompt": [1], "stop": "x"}), 400)
            .await["param"],
        "stop"
    );
    assert_eq!(server.refused(CHAT, &ask("a"), 400).await["param"], "messages");
}

#[tokio::test]
async fn texts_and_ids_can_be_turned_into_each_other() {
    let server = start(null("a")).await;
    let answer = server
        .ask("/tokenize", json!({"prompt": "hi", "add_special_tokens": false}))
        .await;
    assert_eq!(answer, json!({"count": 2, "max_model_len": 1000, "tokens": [104, 105]}));
    let chat = server.ask("/tokenize", ask("hi")).await;
    assert_eq!(chat["count"], 1 + "<user>hi<assistant>".len());
    assert_eq!(
        server.ask("/detokenize", json!({"tokens": [104, 105]})).await,
        json!({"prompt": "hi"})
    );
    assert_eq!(
        server.refused("/detokenize", &json!({"tokens": ["x"]}), 400).await["param"],
        "tokens"
    );
}
