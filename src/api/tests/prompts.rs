//! What makes a prompt, over HTTP to the submission: truncation, templates of clients, how much a model may think.

use super::*;
use crate::config::Switch;

/// The prompt that reaches the generator.
async fn prompt_of(path: &str, body: Value) -> Vec<TokenId> {
    let script = Script::of(Script::ids(1, &[97, EOS], Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    server.ask(path, body).await;
    script.last().request.prompt_ids.to_vec()
}

fn ids(text: &str) -> Vec<TokenId> {
    text.bytes().map(TokenId::from).collect()
}

#[tokio::test]
async fn prompts_are_cut_where_asked() {
    let with_bos = |text: &str| [vec![BOS], ids(text)].concat();
    let completion = |prompt: Value, n: i64, side: &str| {
        prompt_of(
            COMPLETIONS,
            json!({"prompt": prompt, "truncate_prompt_tokens": n, "truncation_side": side}),
        )
    };
    // What the tokenizer adds stays, as transformers truncates.
    assert_eq!(completion(json!("abcdef"), 3, "left").await, with_bos("ef"));
    assert_eq!(completion(json!("abcdef"), 3, "right").await, with_bos("ab"));
    assert_eq!(completion(json!("abcdef"), 7, "left").await, with_bos("abcdef"));
    assert_eq!(completion(json!("abcdef"), 1, "left").await, [BOS]);
    assert_eq!(completion(json!([1, 2, 3, 4]), 2, "left").await, [3, 4]);
    assert_eq!(completion(json!([1, 2, 3, 4]), 2, "right").await, [1, 2]);
    // What fits beside the 16 tokens that a completion has when none are asked for; far more text than the model's length.
    let long = "x".repeat(300_000);
    assert_eq!(completion(json!(long), -1, "left").await.len(), 1000 - 16);

    let chat = |fields: Value| {
        let mut body = ask("question");
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        prompt_of(CHAT, body)
    };
    let whole = [vec![BOS], ids("<user>question<assistant>")].concat();
    assert_eq!(chat(json!({})).await, whole);
    // A rendered chat has its own special tokens, and loses them like any other.
    assert_eq!(chat(json!({"truncate_prompt_tokens": 11})).await, ids("<assistant>"));
    let right = chat(json!({"truncate_prompt_tokens": 7, "truncation_side": "right"})).await;
    assert_eq!(right, whole[..7]);
    let mut body = ask(&"x".repeat(300_000));
    (body["truncate_prompt_tokens"], body["max_tokens"]) = (json!(-1), json!(40));
    assert_eq!(prompt_of(CHAT, body).await.len(), 1000 - 40);
}

#[tokio::test]
async fn what_was_cut_is_what_is_shown_and_counted() {
    let server = start(null("!")).await;
    let body = json!({"prompt": "abcdef", "truncate_prompt_tokens": 3, "echo": true, "return_token_ids": true});
    let answer = server.ask(COMPLETIONS, body).await;
    assert_eq!(answer["choices"][0]["text"], "<|begin|>ef!");
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!([BOS, 101, 102]));
    let mut body = ask("question");
    (body["truncate_prompt_tokens"], body["return_prompt_text"]) = (json!(11), json!(true));
    assert_eq!(server.ask(CHAT, body.clone()).await["prompt_text"], "<assistant>");
    let events = server.stream(CHAT, body).await;
    assert_eq!(events[0]["prompt_text"], "<assistant>");
    assert!(events[1..].iter().all(|event| event.get("prompt_text").is_none()));

    for (path, mut body) in [(COMPLETIONS, json!({"prompt": "a"})), (CHAT, ask("a"))] {
        (body["truncate_prompt_tokens"], body["max_tokens"]) = (json!(981), json!(20));
        let error = server.refused(path, &body, 400).await;
        assert_eq!(error["param"], "truncate_prompt_tokens");
        let expected = "expected at most 980: 1000 tokens of the model less 20 of the completion";
        assert!(error["message"].as_str().unwrap().contains(expected), "{error}");
    }
}

/// A server that renders the templates of clients.
async fn trusting(generator: Arc<dyn Generator>) -> Server {
    let options = ApiOptions {
        client_chat_templates: Switch::On,
        ..ApiOptions::default()
    };
    start_with(generator, byte_model(), options, ServeOptions::default()).await
}

#[tokio::test]
async fn a_clients_template_is_rendered_where_the_server_trusts_it() {
    let mut body = ask("hi");
    body["chat_template"] = json!("{{ bos_token }}[{{ messages[0].content }}]{{ tone }}");
    body["chat_template_kwargs"] = json!({"tone": "!"});
    let careful = start(null("a")).await;
    for path in [CHAT, "/tokenize"] {
        assert_eq!(careful.refused(path, &body, 400).await["param"], "chat_template");
    }
    let script = Script::of(Script::ids(1, &[97, EOS], Finish::Stop(EOS)));
    let server = trusting(script.clone()).await;
    server.ask(CHAT, body.clone()).await;
    let expected = [vec![BOS], ids("[hi]!")].concat();
    assert_eq!(*script.last().request.prompt_ids, *expected);
    body["return_token_strs"] = json!(true);
    let answer = server.ask("/tokenize", body.clone()).await;
    assert_eq!(answer["tokens"], json!(expected));
    assert_eq!(answer["token_strs"], json!(["<|begin|>", "[", "h", "i", "]", "!"]));

    for (source, message) in [
        ("{% if %}", "does not parse"),
        ("{{ raise_exception('no such tone') }}", "no such tone"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "instructions",
        ),
    ] {
        body["chat_template"] = json!(source);
        for path in [CHAT, "/tokenize"] {
            let error = server.refused(path, &body, 400).await;
            assert_eq!(error["param"], "chat_template", "{source}");
            assert!(error["message"].as_str().unwrap().contains(message), "{error}");
        }
    }
}

#[tokio::test]
async fn reasoning_effort_reaches_the_template() {
    let server = trusting(null("a")).await;
    let rendered = async |fields: Value| {
        let mut body = ask("hi");
        body["chat_template"] = json!("{{ reasoning_effort }}/{{ enable_thinking }}");
        body["return_prompt_text"] = json!(true);
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        server.ask(CHAT, body).await["prompt_text"].clone()
    };
    assert_eq!(rendered(json!({})).await, "/");
    assert_eq!(rendered(json!({"reasoning_effort": "high"})).await, "high/True");
    assert_eq!(rendered(json!({"reasoning_effort": "none"})).await, "none/False");
    let kwargs = json!({"enable_thinking": false, "reasoning_effort": "low"});
    let both = json!({"reasoning_effort": "max", "chat_template_kwargs": kwargs});
    assert_eq!(rendered(both).await, "max/False");
    let mut body = ask("hi");
    body["reasoning_effort"] = json!("much");
    assert_eq!(server.refused(CHAT, &body, 400).await["param"], "reasoning_effort");
}
