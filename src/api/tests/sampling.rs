//! What rules tokens out, what texts must be, and which choices are shown: over both protocols, to the submission.

use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::{self as wire, generate_request::Prompt};
use baton_scheduler::request::{Constraint, SamplingParams};

use super::*;

/// What reaches the generator of a request with these fields.
async fn resolved(path: &str, fields: Value) -> SamplingParams {
    let script = Script::of(Script::ids(1, &[97, EOS], Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let mut body = if path == CHAT {
        ask("hi")
    } else {
        json!({"prompt": "hi"})
    };
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    server.ask(path, body).await;
    script.last().request.sampling
}

#[tokio::test]
async fn rules_are_resolved_to_ids() {
    for path in [CHAT, COMPLETIONS] {
        let sampling = resolved(
            path,
            json!({
                "min_p": 0.25, "min_tokens": 3, "max_tokens": 9,
                "logit_bias": {"98": -100, "5": 1.5}, "allowed_token_ids": [98, 97, 98, 256],
                "bad_words": ["ab", "  c"],
            }),
        )
        .await;
        assert_eq!((sampling.min_p, sampling.min_tokens), (0.25, 3));
        assert_eq!(sampling.logit_bias, [(5, 1.5), (98, -100.0)]);
        assert_eq!(*sampling.allowed_token_ids, [97, 98, 256]);
        // After a space each is one token longer here, so it is not another way to write the word.
        assert_eq!(sampling.bad_words, [vec![97, 98], vec![99]]);
        let off = resolved(
            path,
            json!({"min_p": 0, "min_tokens": 0, "logit_bias": {}, "bad_words": []}),
        )
        .await;
        let plain = SamplingParams {
            seed: off.seed,
            max_tokens: off.max_tokens,
            stop_token_ids: vec![EOS],
            temperature: 1.0,
            ..SamplingParams::default()
        };
        assert_eq!(off, plain);
    }
}

#[tokio::test]
async fn min_tokens_past_max_tokens_is_refused() {
    let server = start(null("abc")).await;
    let mut body = ask("hi");
    (body["min_tokens"], body["max_tokens"]) = (json!(4), json!(3));
    assert_eq!(server.refused(CHAT, &body, 400).await["param"], "min_tokens");
    // Sixteen, when a completions client names none.
    let body = json!({"prompt": "a", "min_tokens": 17});
    assert_eq!(server.refused(COMPLETIONS, &body, 400).await["param"], "min_tokens");
    server.ask(COMPLETIONS, json!({"prompt": "a", "min_tokens": 16})).await;
}

#[tokio::test]
async fn stop_texts_end_after_min_tokens_only() {
    let server = start(null("abcabcabc")).await;
    for (min_tokens, text) in [(0, "a"), (2, "a"), (3, "abca"), (5, "abca"), (6, "abcabca")] {
        let body = json!({"prompt": "hi", "stop": ["bc"], "min_tokens": min_tokens});
        let answer = server.ask(COMPLETIONS, body.clone()).await;
        assert_eq!(answer["choices"][0]["text"], text, "min_tokens {min_tokens}");
        let events = server.stream(COMPLETIONS, body).await;
        let parts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(parts.collect::<String>(), text, "streamed, min_tokens {min_tokens}");
    }
}

fn schema_of(sampling: &SamplingParams) -> Value {
    let Some(Constraint::JsonSchema(text)) = &sampling.constraint else {
        panic!("{:?}", sampling.constraint)
    };
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn structural_tags_are_grammars() {
    let structure = json!({"begin": "<f=a>", "schema": {"type": "boolean"}, "end": "</f>"});
    let tag = json!({"type": "structural_tag", "structures": [structure], "triggers": ["<f="]});
    let ways = [
        json!({"response_format": tag}),
        json!({"structured_outputs": {"structural_tag": tag}}),
        json!({"structured_outputs": {"structural_tag": tag.to_string()}}),
    ];
    for path in [CHAT, COMPLETIONS] {
        let mut grammars = Vec::new();
        for fields in &ways {
            match resolved(path, fields.clone()).await.constraint {
                Some(Constraint::Grammar(grammar)) => grammars.push(grammar),
                other => panic!("{other:?}"),
            }
        }
        assert!(grammars.iter().all(|grammar| *grammar == grammars[0]), "{grammars:?}");
    }
    let server = start(null("a")).await;
    for (field, value) in [
        ("response_format", json!({"type": "structural_tag"})),
        ("structured_outputs", json!({"structural_tag": "{"})),
        ("structured_outputs", json!({"structural_tag": tag, "regex": "a"})),
    ] {
        let mut body = json!({"prompt": "hi"});
        body[field] = value;
        assert_eq!(server.refused(COMPLETIONS, &body, 400).await["param"], field, "{body}");
    }
}

#[tokio::test]
async fn every_way_to_ask_for_a_constraint_is_one() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let whitespace = |mut schema: Value, name: &str, value: Value| {
        schema["x-guidance"] = json!({name: value});
        schema
    };
    let bounded = json!(r"(?:\x20|\n{1,2}[ \t]{0,20})");
    let asked = |schema: &Value| json!({"name": "n", "strict": true, "schema": schema});
    for path in [CHAT, COMPLETIONS] {
        let any_object = resolved(path, json!({"response_format": {"type": "json_object"}})).await;
        let expected = whitespace(json!({"type": "object"}), "whitespace_pattern", bounded.clone());
        assert_eq!(schema_of(&any_object), expected);
        let text = resolved(
            path,
            json!({"response_format": {"type": "text"}, "structured_outputs": {}}),
        )
        .await;
        assert_eq!(text.constraint, None);
        let bounded = whitespace(schema.clone(), "whitespace_pattern", bounded.clone());
        for fields in [
            json!({"response_format": {"type": "json_schema", "json_schema": asked(&schema)}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"structured_outputs": {"json": schema.to_string(), "disable_any_whitespace": false}}),
            json!({"guided_json": schema}),
            json!({"guided_json": schema.to_string(), "guided_decoding_backend": "auto"}),
        ] {
            assert_eq!(schema_of(&resolved(path, fields.clone()).await), bounded, "{fields}");
        }
        let compact = resolved(
            path,
            json!({"structured_outputs": {"json": schema, "disable_any_whitespace": true}}),
        )
        .await;
        let expected = whitespace(schema.clone(), "whitespace_flexible", json!(false));
        assert_eq!(schema_of(&compact), expected);
        let nested = json!({"anyOf": [schema, {"properties": {"properties": schema}, "additionalProperties": true}]});
        let closed = resolved(
            path,
            json!({"structured_outputs": {"json": nested, "disable_additional_properties": true}}),
        )
        .await;
        let closed = schema_of(&closed);
        let is_closed = |at: &str| closed.pointer(&format!("{at}/additionalProperties")).cloned();
        assert_eq!(is_closed("/anyOf/0"), Some(json!(false)));
        assert_eq!(is_closed("/anyOf/1"), Some(json!(true)));
        assert_eq!(is_closed("/anyOf/1/properties/properties"), Some(json!(false)));
        assert_eq!((is_closed(""), is_closed("/anyOf/0/properties/a")), (None, None));
        let own = resolved(path, json!({"guided_json": schema, "guided_whitespace_pattern": " ?"})).await;
        assert_eq!(
            schema_of(&own),
            whitespace(schema.clone(), "whitespace_pattern", json!(" ?"))
        );
        for (fields, constraint) in [
            (
                json!({"structured_outputs": {"regex": "[0-9]+"}}),
                Constraint::Regex("[0-9]+".into()),
            ),
            (json!({"guided_regex": "a|b"}), Constraint::Regex("a|b".into())),
            (
                json!({"structured_outputs": {"choice": ["yes", "no."]}}),
                Constraint::Regex(r"yes|no\.".into()),
            ),
            (
                json!({"guided_choice": ["a<b", "c-d/e"]}),
                Constraint::Regex(r"a<b|c\-d/e".into()),
            ),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                Constraint::Grammar("start: \"a\"".into()),
            ),
            (
                json!({"guided_grammar": "start: /a/"}),
                Constraint::Grammar("start: /a/".into()),
            ),
        ] {
            assert_eq!(
                resolved(path, fields.clone()).await.constraint,
                Some(constraint),
                "{fields}"
            );
        }
        let ending = resolved(
            path,
            json!({"guided_regex": "a", "ignore_eos": true, "stop_token_ids": [9]}),
        )
        .await;
        assert_eq!(ending.stop_token_ids, [9, EOS], "a complete text ends");
    }
}

#[tokio::test]
async fn what_cannot_be_compiled_is_refused_by_its_field() {
    let server = start(null("a")).await;
    let bad_schema = json!({"type": "object", "properties": {"a": {"type": "strange"}}});
    let cases = [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": bad_schema}}}),
            "response_format",
        ),
        (
            json!({"structured_outputs": {"json": {"not": {"type": "string"}}}}),
            "structured_outputs",
        ),
        (
            json!({"guided_json": {"x-guidance": {"no_such_option": 1}}}),
            "guided_json",
        ),
        (json!({"guided_regex": "(?=a)b"}), "guided_regex"),
        (json!({"guided_grammar": "root ::= \"a\""}), "guided_grammar"),
        (json!({"guided_regex": "a".repeat(300_000)}), "guided_regex"),
    ];
    for (fields, field) in cases {
        for path in [CHAT, COMPLETIONS] {
            let mut body = if path == CHAT {
                ask("hi")
            } else {
                json!({"prompt": "hi"})
            };
            for (name, value) in fields.as_object().unwrap() {
                body[name] = value.clone();
            }
            let error = server.refused(path, &body, 400).await;
            assert_eq!(error["param"], field, "{error}");
            assert!(error["message"].as_str().unwrap().starts_with(field), "{error}");
        }
    }
    let model = ServedModel {
        tokenizer: None,
        chat_template: None,
        ..byte_model()
    };
    let ids_only = start_with(null("a"), model, ApiOptions::default(), ServeOptions::default()).await;
    let error = ids_only
        .refused(COMPLETIONS, &json!({"prompt": [1], "guided_regex": "a"}), 400)
        .await;
    assert_eq!(
        error["message"],
        "guided_regex: this model cannot be constrained: it has no tokenizer"
    );
}

#[tokio::test]
async fn the_most_likely_of_best_of_are_shown() {
    // Each token of the null model is as likely as any, and choice `c` says all but the `c` first letters.
    let server = start(null("abc")).await;
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().iter().enumerate();
        choices
            .map(|(index, choice)| {
                assert_eq!(choice["index"], index);
                assert!(choice["logprobs"].is_null(), "none were asked for");
                choice["text"].as_str().unwrap().to_owned()
            })
            .collect()
    };
    let answer = server.ask(COMPLETIONS, json!({"prompt": [1], "best_of": 3})).await;
    assert_eq!(texts(&answer), ["c"]);
    assert_eq!(
        answer["usage"]["completion_tokens"],
        4 + 3 + 2,
        "all that was generated"
    );
    let answer = server
        .ask(COMPLETIONS, json!({"prompt": [[1], [2]], "n": 2, "best_of": 3}))
        .await;
    assert_eq!(texts(&answer), ["c", "bc", "c", "bc"]);
    let answer = server
        .ask(COMPLETIONS, json!({"prompt": [1], "n": 2, "best_of": 2}))
        .await;
    assert_eq!(texts(&answer), ["abc", "bc"], "nothing to choose, so in their order");
    let body = json!({"prompt": [1], "best_of": 2, "logprobs": 1});
    let answer = server.ask(COMPLETIONS, body).await;
    let logprobs = &answer["choices"][0]["logprobs"]["token_logprobs"];
    assert_eq!(
        (&answer["choices"][0]["text"], logprobs.as_array().unwrap().len()),
        (&json!("bc"), 3)
    );

    let wrong = [
        json!({"prompt": "a", "best_of": 2, "stream": true}),
        json!({"prompt": "a", "best_of": 1, "n": 2}),
        json!({"prompt": "a", "best_of": 129}),
        json!({"prompt": "a", "best_of": 0}),
    ];
    for body in wrong {
        assert_eq!(
            server.refused(COMPLETIONS, &body, 400).await["param"],
            "best_of",
            "{body}"
        );
    }
    let streamed = server
        .stream(COMPLETIONS, json!({"prompt": [1], "n": 2, "best_of": 2}))
        .await;
    assert!(!streamed.is_empty());
    let mut chat = ask("hi");
    chat["best_of"] = json!(2);
    assert_eq!(server.refused(CHAT, &chat, 400).await["param"], "best_of");
}

fn generate(sampling: wire::SamplingParams) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![1] })),
        sampling: Some(sampling),
        ..Default::default()
    }
}

fn constrained(language: wire::constraint::Language) -> wire::SamplingParams {
    wire::SamplingParams {
        constraint: Some(wire::Constraint {
            language: Some(language),
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn grpc_says_the_same() {
    use wire::constraint::Language;
    let script = Script::of(Script::ids(1, &[97, EOS], Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let mut client = BatonClient::connect(server.url("")).await.unwrap();
    let sampling = wire::SamplingParams {
        min_p: Some(0.5),
        min_tokens: Some(2),
        logit_bias: [(98, 1.0), (5, -1.0)].into(),
        allowed_token_ids: vec![98, 97],
        bad_words: vec!["ab".to_owned()],
        ignore_eos: true,
        ..constrained(Language::Choices(wire::Choices {
            texts: vec!["a".to_owned(), "b".to_owned()],
        }))
    };
    drop(client.generate(generate(sampling)).await.unwrap());
    let sampling = script.last().request.sampling;
    assert_eq!((sampling.min_p, sampling.min_tokens), (0.5, 2));
    assert_eq!(sampling.logit_bias, [(5, -1.0), (98, 1.0)]);
    assert_eq!(
        (&*sampling.allowed_token_ids, &sampling.bad_words),
        (&[97, 98][..], &vec![vec![97, 98]])
    );
    assert_eq!(sampling.constraint, Some(Constraint::Regex("a|b".into())));
    assert_eq!(sampling.stop_token_ids, [EOS]);
    let language = Language::JsonSchema(r#"{"type": "array"}"#.to_owned());
    drop(client.generate(generate(constrained(language))).await.unwrap());
    assert_eq!(schema_of(&script.last().request.sampling)["type"], "array");

    let off = wire::SamplingParams::default;
    let wrong = [
        (
            "sampling.min_p",
            wire::SamplingParams {
                min_p: Some(f32::NAN),
                ..off()
            },
        ),
        (
            "sampling.min_tokens",
            wire::SamplingParams {
                min_tokens: Some(17),
                ..off()
            },
        ),
        (
            "sampling.logit_bias",
            wire::SamplingParams {
                logit_bias: [(1, 101.0)].into(),
                ..off()
            },
        ),
        (
            "sampling.allowed_token_ids",
            wire::SamplingParams {
                allowed_token_ids: vec![260],
                ..off()
            },
        ),
        (
            "sampling.bad_words",
            wire::SamplingParams {
                bad_words: vec![" ".to_owned()],
                ..off()
            },
        ),
        (
            "sampling.constraint",
            wire::SamplingParams {
                constraint: Some(wire::Constraint::default()),
                ..off()
            },
        ),
        ("sampling.constraint", constrained(Language::Regex("(".to_owned()))),
        (
            "sampling.constraint.json_schema",
            constrained(Language::JsonSchema("{".to_owned())),
        ),
        (
            "sampling.constraint.choices",
            constrained(Language::Choices(wire::Choices::default())),
        ),
    ];
    for (field, sampling) in wrong {
        let status = client.generate(generate(sampling)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}");
        assert!(status.message().starts_with(field), "{status:?}");
    }
}
