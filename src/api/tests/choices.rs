//! Several choices of one prompt, and penalties, over both protocols. Choice `c` of the null model begins with its `c`-th id.

use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::{self as wire, generate_request::Prompt};
use tokio_stream::StreamExt as _;

use super::*;

/// What the stream said of choice `index`: its own `choices[0]`, in order.
fn of_choice(events: &[Value], index: u64) -> Vec<&Value> {
    let choices = events.iter().map(|event| &event["choices"][0]);
    choices.filter(|choice| choice["index"] == index).collect()
}

fn joined(parts: &[&Value], text: impl Fn(&Value) -> Option<&str>) -> String {
    parts.iter().filter_map(|part| text(part)).collect()
}

#[tokio::test]
async fn chat_answers_have_their_index_and_one_usage() {
    let server = start(null("abc")).await;
    let mut body = ask("hi");
    body["n"] = json!(3);
    body["logprobs"] = json!(true);
    body["return_token_ids"] = json!(true);
    let answer = server.ask(CHAT, body.clone()).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for (index, (choice, (text, ids))) in choices
        .iter()
        .zip([
            ("abc", json!([97, 98, 99, 256])),
            ("bc", json!([98, 99, 256])),
            ("c", json!([99, 256])),
        ])
        .enumerate()
    {
        assert_eq!(choice["index"], index);
        assert_eq!(
            (&choice["message"]["content"], &choice["token_ids"]),
            (&json!(text), &ids)
        );
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), text.len() + 1);
        assert_eq!(choice["logprobs"]["content"][0]["token"], text[..1]);
    }
    let n_prompt = 1 + "<user>hi<assistant>".len() as u64;
    assert_eq!(answer["usage"]["prompt_tokens"], n_prompt, "one prompt");
    assert_eq!(answer["usage"]["completion_tokens"], 4 + 3 + 2);

    let counted = server
        .metric(r#"baton_requests_total{endpoint="chat",outcome="stop"}"#)
        .await;
    assert_eq!(counted, Some(1.0), "one request");
    assert_eq!(server.metric("baton_prompt_tokens_total").await, Some(n_prompt as f64));
    assert_eq!(server.metric("baton_generation_tokens_total").await, Some(9.0));
    assert_eq!(
        server.metric("baton_inter_token_latency_seconds_count").await,
        Some(6.0),
        "within each choice"
    );
}

#[tokio::test]
async fn a_chat_stream_mixes_choices_and_ends_each_once() {
    let server = start(null("abc")).await;
    let mut body = ask("hi");
    body["n"] = json!(3);
    body["logprobs"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = server.stream(CHAT, body).await;
    let (usage, events) = events.split_last().unwrap();
    for (index, text) in (0..).zip(["abc", "bc", "c"]) {
        let own = of_choice(events, index);
        assert_eq!(joined(&own, |choice| choice["delta"]["content"].as_str()), text);
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert!(own[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
        let (last, before) = own.split_last().unwrap();
        assert_eq!((&last["finish_reason"], before.len()), (&json!("stop"), text.len() + 1));
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
        assert!(
            before
                .iter()
                .all(|choice| choice["logprobs"]["content"].as_array().unwrap().len() == 1)
        );
    }
    let order: Vec<u64> = events
        .iter()
        .map(|event| event["choices"][0]["index"].as_u64().unwrap())
        .collect();
    assert_eq!(order[..3], [0, 1, 2], "none waits for another's end");
    assert_eq!(
        (&usage["choices"], &usage["usage"]["completion_tokens"]),
        (&json!([]), &json!(9))
    );
}

#[tokio::test]
async fn choices_of_several_prompts_are_numbered_prompt_by_prompt() {
    let server = start(null("ab")).await;
    let body = json!({"prompt": [[1, 2], [3]], "n": 2, "logprobs": 1, "return_token_ids": true});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    let shown: Vec<(u64, &str, &Value)> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| {
            let (index, text) = (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap());
            (index, text, &choice["prompt_token_ids"])
        })
        .collect();
    let (first, second) = (json!([1, 2]), json!([3]));
    assert_eq!(
        shown,
        [
            (0, "ab", &first),
            (1, "b", &first),
            (2, "ab", &second),
            (3, "b", &second)
        ]
    );
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 2 * (3 + 2));

    let mut streamed = body;
    streamed["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = server.stream(COMPLETIONS, streamed).await;
    let (usage, events) = events.split_last().unwrap();
    assert_eq!(events.len(), 10, "one event for each token");
    for (index, text) in (0..).zip(["ab", "b", "ab", "b"]) {
        let own = of_choice(events, index);
        assert_eq!(joined(&own, |choice| choice["text"].as_str()), text);
        assert_eq!(
            own.iter().filter(|choice| !choice["finish_reason"].is_null()).count(),
            1
        );
        assert_eq!(
            own[1]["logprobs"]["text_offset"],
            json!([1]),
            "offsets are of the choice's own text"
        );
    }
    assert_eq!(usage["usage"]["completion_tokens"], 10);
    let of_first = events
        .iter()
        .filter(|event| event["choices"][0]["index"].as_u64().unwrap() < 2);
    let most = of_first
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .max();
    assert_eq!(most, Some(5), "counts so far are of the prompt's choices");
}

#[tokio::test]
async fn every_choice_echoes_its_prompt() {
    let server = start(null("xy")).await;
    let body = json!({"prompt": "h", "n": 2, "echo": true, "logprobs": 0, "prompt_logprobs": 0});
    let answer = server.ask(COMPLETIONS, body).await;
    for (choice, text) in answer["choices"].as_array().unwrap().iter().zip(["hxy", "hy"]) {
        assert_eq!(choice["text"], text);
        assert_eq!(choice["logprobs"]["token_logprobs"][0], Value::Null);
        assert_eq!(choice["prompt_logprobs"].as_array().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_stop_text_ends_its_choice_only() {
    // Choice 0 says "ab..", choice 1 "b.." and never the stop text, so only the length ends it.
    let generator = Arc::new(NullGenerator::new(NullOptions {
        token_ids: "aab".bytes().map(TokenId::from).collect(),
        ..NullOptions::default()
    }));
    let server = start(generator.clone()).await;
    let body = json!({"prompt": [1], "n": 2, "stop": "aab", "max_tokens": 4});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    // Choice 1 says a b a a.
    let choices = &answer["choices"];
    assert_eq!(
        (&choices[0]["text"], &choices[0]["stop_reason"]),
        (&json!(""), &json!("aab"))
    );
    assert_eq!(
        (&choices[1]["text"], &choices[1]["finish_reason"]),
        (&json!("abaa"), &json!("length"))
    );
    assert_eq!(
        answer["usage"]["completion_tokens"],
        3 + 4,
        "what came after the cut is not the client's"
    );
    let outcome = server
        .metric(r#"baton_requests_total{endpoint="completions",outcome="length"}"#)
        .await;
    assert_eq!(outcome, Some(1.0));

    let events = server.stream(COMPLETIONS, body).await;
    assert_eq!(of_choice(&events, 0).len(), 3, "nothing of it after its end");
    assert_eq!(of_choice(&events, 1).len(), 4);
}

#[tokio::test]
async fn once_every_choice_is_cut_the_request_is_cancelled() {
    let (generator, server) = start_endless().await;
    let body = json!({"prompt": [1], "n": 3, "stop": "aaa", "max_tokens": 1_000_000});
    let answer = server.ask(COMPLETIONS, body).await;
    assert!(
        answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .all(|choice| choice["stop_reason"] == "aaa")
    );
    assert_eq!(answer["usage"]["completion_tokens"], 9);
    until(&generator, |counts| counts.n_cancelled == 1).await;
}

#[tokio::test]
async fn an_abort_ends_every_choice() {
    let (generator, server) = start_endless().await;
    let body = json!({"prompt": [1], "n": 2, "stream": true, "max_tokens": 1_000_000, "request_id": "mine"});
    let mut response = server.post(COMPLETIONS, &body).await;
    let first = response.chunk().await.unwrap().unwrap();
    assert!(first.starts_with(b"data: "));
    assert!(server.state.running().abort("mine"));
    let rest = response.text().await.unwrap();
    assert_eq!(rest.matches(r#""finish_reason":"abort""#).count(), 2, "{rest}");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    until(&generator, |counts| counts.n_cancelled == 1).await;
}

#[tokio::test]
async fn what_was_asked_reaches_the_cluster() {
    let script = Script::of(Script::ids(1, &says("x"), Finish::Stop(EOS)));
    let model = ServedModel {
        default_sampling: DefaultSampling {
            repetition_penalty: Some(1.25),
            ..DefaultSampling::default()
        },
        ..byte_model()
    };
    let server = start_with(script.clone(), model, ApiOptions::default(), ServeOptions::default()).await;
    let asked = |script: &Script| {
        let sampling = script.last().request.sampling;
        (
            sampling.n,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
        )
    };
    server.ask(COMPLETIONS, json!({"prompt": [1]})).await;
    assert_eq!(asked(&script), (1, 0.0, 0.0, 1.25), "the model's own penalty");
    let body = json!({"prompt": [1], "presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1});
    server.ask(COMPLETIONS, body).await;
    assert_eq!(asked(&script), (1, 0.5, -0.25, 1.0));
    assert_eq!(script.last().priority, 0);
    for (path, prompt) in [
        (COMPLETIONS, json!({"prompt": [1]})),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}]})),
    ] {
        let mut body = prompt;
        body["priority"] = json!(-3);
        server.ask(path, body).await;
        assert_eq!(script.last().priority, -3, "{path}");
    }
}

#[tokio::test]
async fn equal_prompts_differ_unless_a_seed_is_named() {
    let script = Script::of(Script::ids(1, &says("x"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let seeds = |script: &Script| {
        let mut submissions = script.submissions.lock();
        let seeds = submissions
            .iter()
            .map(|submission| submission.request.sampling.seed)
            .collect::<Vec<_>>();
        submissions.clear();
        seeds
    };
    server.ask(COMPLETIONS, json!({"prompt": [[1], [1]]})).await;
    let free = seeds(&script);
    assert_ne!(free[0], free[1]);
    server.ask(COMPLETIONS, json!({"prompt": [[1], [1]], "seed": 7})).await;
    assert_eq!(seeds(&script), [7, 7]);
}

#[tokio::test]
async fn grpc_messages_name_their_choice() {
    let server = start(null("abc")).await;
    let mut client = BatonClient::connect(server.url("")).await.unwrap();
    let sampling = wire::SamplingParams {
        n: Some(2),
        frequency_penalty: Some(0.5),
        ..Default::default()
    };
    let request = wire::GenerateRequest {
        prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![1] })),
        sampling: Some(sampling),
        ..Default::default()
    };
    let stream = client.generate(request).await.unwrap().into_inner();
    let messages: Vec<wire::GenerateResponse> = stream.map(|message| message.unwrap()).collect().await;
    for (choice, text) in [(0, "abc"), (1, "bc")] {
        let own: Vec<_> = messages.iter().filter(|message| message.choice == choice).collect();
        assert_eq!(
            own.iter().map(|message| message.text.as_str()).collect::<String>(),
            text
        );
        let indexes: Vec<u32> = own
            .iter()
            .flat_map(|message| &message.tokens)
            .map(|token| token.index)
            .collect();
        assert_eq!(indexes, (0..=text.len() as u32).collect::<Vec<_>>());
        assert!(
            own.iter()
                .flat_map(|message| &message.tokens)
                .all(|token| token.choice == choice)
        );
        let ends: Vec<_> = own.iter().filter(|message| message.choice_finish != 0).collect();
        assert_eq!(ends.len(), 1);
        assert_eq!(ends[0].choice_finish(), wire::FinishReason::Stop);
    }
    let (last, before) = messages.split_last().unwrap();
    assert_eq!((last.choice, last.finish()), (0, wire::FinishReason::Stop));
    let usage = last.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1, 7));
    assert!(
        before
            .iter()
            .all(|message| message.finish == 0 && message.usage.is_none())
    );
}

#[tokio::test]
async fn grpc_refuses_what_is_out_of_range_by_field() {
    let server = start(null("abc")).await;
    let mut client = BatonClient::connect(server.url("")).await.unwrap();
    let off = wire::SamplingParams::default;
    let wrong = [
        ("sampling.n", wire::SamplingParams { n: Some(0), ..off() }),
        ("sampling.n", wire::SamplingParams { n: Some(129), ..off() }),
        (
            "sampling.presence_penalty",
            wire::SamplingParams {
                presence_penalty: Some(f32::NAN),
                ..off()
            },
        ),
        (
            "sampling.frequency_penalty",
            wire::SamplingParams {
                frequency_penalty: Some(-2.5),
                ..off()
            },
        ),
        (
            "sampling.repetition_penalty",
            wire::SamplingParams {
                repetition_penalty: Some(0.0),
                ..off()
            },
        ),
    ];
    for (field, sampling) in wrong {
        let request = wire::GenerateRequest {
            prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![1] })),
            sampling: Some(sampling),
            ..Default::default()
        };
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}");
        assert!(status.message().starts_with(field), "{status:?}");
    }
}
