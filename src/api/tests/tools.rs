//! Tools and reasoning of `/v1/chat/completions` as its clients see them: what reaches the prompt, and what a model's text
//! becomes.

use baton_engine::text::ChatTemplate;

use super::*;
use crate::config::{ReasoningParserKind, ToolCallParserKind};

/// Shows tools, earlier calls and their results; opens the reasoning when asked to.
const TEMPLATE: &str = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for message in messages %}\
    <{{ message.role }}>{{ message.content }}\
    {% for call in message.tool_calls %}[{{ call.id }} {{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}\
    {% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>\n{% endif %}{% endif %}";

fn model(tool_calls: ToolCallParserKind, reasoning: ReasoningParserKind) -> ServedModel {
    let templates = [("default".to_owned(), TEMPLATE.to_owned())];
    let plain = byte_model();
    let template = ChatTemplate::new(&templates, None, None).unwrap();
    ServedModel {
        parsers: OutputParsers::resolve(tool_calls, reasoning, Some(&template), plain.tokenizer.as_ref()),
        chat_template: Some(template),
        ..plain
    }
}

async fn start_model(
    generator: Arc<dyn Generator>,
    tool_calls: ToolCallParserKind,
    reasoning: ReasoningParserKind,
) -> Server {
    let model = model(tool_calls, reasoning);
    start_with(generator, model, ApiOptions::default(), ServeOptions::default()).await
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}})
}

fn ask_with_tools(content: &str) -> Value {
    let mut body = ask(content);
    body["tools"] = json!([weather()]);
    body
}

/// The prompt text of what was submitted last.
fn prompt(script: &Script) -> String {
    let ids = &script.last().request.prompt_ids;
    ids.iter().map(|&id| char::from(u8::try_from(id).unwrap())).collect()
}

/// The message that a client makes of a choice's deltas, and its finish reasons.
fn added_up(events: &[Value], choice: u64) -> (Value, Vec<String>) {
    let mut message = json!({"role": null, "content": null});
    let mut calls: Vec<Value> = Vec::new();
    let mut reasons = Vec::new();
    let append = |to: &mut Value, text: &Value| {
        if let Some(text) = text.as_str() {
            *to = json!(to.as_str().unwrap_or_default().to_owned() + text);
        }
    };
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    for own in choices.filter(|own| own["index"] == choice) {
        let delta = &own["delta"];
        for field in ["role", "content", "reasoning", "reasoning_content"] {
            if delta.get(field).is_some() {
                append(&mut message[field], &delta[field]);
            }
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(call["id"].is_string() && call["function"]["name"].is_string(), "{call}");
                calls.push(json!({"id": call["id"], "type": call["type"], "function": call["function"]}));
            } else {
                assert!(
                    call.get("id").is_none() && call["function"].get("name").is_none(),
                    "{call}"
                );
                append(
                    &mut calls[index]["function"]["arguments"],
                    &call["function"]["arguments"],
                );
            }
        }
        reasons.extend(own["finish_reason"].as_str().map(str::to_owned));
    }
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
    }
    (message, reasons)
}

/// Without what is random or may be null or empty.
fn plain(mut message: Value) -> Value {
    for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
        let id = call["id"].take();
        assert!(id.as_str().is_some_and(|id| id.len() >= 9), "{id}");
    }
    if message["tool_calls"].is_null() {
        message.as_object_mut().unwrap().remove("tool_calls");
    }
    if message["content"] == "" {
        message["content"] = Value::Null;
    }
    message
}

fn call(name: &str, arguments: &str) -> Value {
    json!({"id": null, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// Asks whole and as a stream; both must say the same, and that is given back.
async fn both(server: &Server, body: &Value) -> (Value, String) {
    let answer = server.ask(CHAT, body.clone()).await;
    let choice = &answer["choices"][0];
    let (whole, reason) = (
        plain(choice["message"].clone()),
        choice["finish_reason"].as_str().unwrap(),
    );
    let events = server.stream(CHAT, body.clone()).await;
    let (streamed, reasons) = added_up(&events, 0);
    assert_eq!(plain(streamed), whole);
    assert_eq!(reasons, [reason]);
    let n_tokens = answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    assert_eq!(events.len(), n_tokens + 1, "an event for each token, and the reason");
    (whole, reason.to_owned())
}

#[tokio::test]
async fn each_format_becomes_calls_whole_and_streamed() {
    let cases = [
        (
            ToolCallParserKind::Hermes,
            "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>",
            Some("I look."),
        ),
        (
            ToolCallParserKind::Llama3,
            "{\"name\": \"weather\", \"parameters\": {\"city\": \"Köln\"}}",
            None,
        ),
        (
            ToolCallParserKind::Mistral,
            "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}]",
            None,
        ),
        (
            ToolCallParserKind::Mistral,
            "I look. [TOOL_CALLS]weather[ARGS]{\"city\": \"Köln\"}",
            Some("I look."),
        ),
    ];
    for (parser, text, content) in cases {
        let server = start_model(null(text), parser, ReasoningParserKind::Auto).await;
        let (message, reason) = both(&server, &ask_with_tools("Weather?")).await;
        let expected = json!({"role": "assistant", "content": content,
                              "tool_calls": [call("weather", "{\"city\": \"Köln\"}")]});
        assert_eq!((message, reason.as_str()), (expected, "tool_calls"), "{text}");
        // Without tools, or when none is to be called, the same text is content.
        let mut body = ask_with_tools("Weather?");
        body["tool_choice"] = json!("none");
        for body in [ask("Weather?"), body] {
            let (message, reason) = both(&server, &body).await;
            assert_eq!((&message["content"], reason.as_str()), (&json!(text), "stop"));
        }
    }
}

#[tokio::test]
async fn malformed_and_cut_calls_lose_nothing() {
    let malformed = "<tool_call>{\"name\": weather}</tool_call>";
    let server = start_model(null(malformed), ToolCallParserKind::Hermes, ReasoningParserKind::Auto).await;
    let (message, reason) = both(&server, &ask_with_tools("?")).await;
    assert_eq!(message, json!({"role": "assistant", "content": malformed}));
    assert_eq!(reason, "stop");

    let cut = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Ro";
    let server = start_model(
        null(&format!("{cut}me\"}}}}")),
        ToolCallParserKind::Hermes,
        ReasoningParserKind::Auto,
    )
    .await;
    let mut body = ask_with_tools("?");
    body["max_tokens"] = json!(cut.len());
    let (message, reason) = both(&server, &body).await;
    assert_eq!(message["tool_calls"], json!([call("weather", "{\"city\": \"Ro")]));
    assert_eq!(reason, "length");
}

#[tokio::test]
async fn several_calls_in_several_choices_or_only_the_first() {
    let one = |city: &str| {
        format!("<tool_call>{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{city}\"}}}}</tool_call>")
    };
    // The second choice of a null model begins with its second byte.
    let text = format!(" {}\n{}", one("Rom"), one("Oslo"));
    let server = start_model(null(&text), ToolCallParserKind::Hermes, ReasoningParserKind::Auto).await;
    let calls = [
        call("weather", "{\"city\": \"Rom\"}"),
        call("weather", "{\"city\": \"Oslo\"}"),
    ];
    let mut body = ask_with_tools("?");
    body["n"] = json!(2);
    let answer = server.ask(CHAT, body.clone()).await;
    let events = server.stream(CHAT, body.clone()).await;
    for choice in 0..2 {
        let whole = plain(answer["choices"][choice]["message"].clone());
        assert_eq!(whole["tool_calls"], json!(calls));
        let (streamed, reasons) = added_up(&events, choice as u64);
        assert_eq!((plain(streamed), reasons), (whole, vec!["tool_calls".to_owned()]));
    }
    body["n"] = json!(1);
    body["parallel_tool_calls"] = json!(false);
    let (message, _) = both(&server, &body).await;
    assert_eq!(message["tool_calls"], json!(calls[..1]));
}

#[tokio::test]
async fn tools_and_earlier_calls_reach_the_prompt() {
    let script = Script::of(Script::ids(5, &says("x"), Finish::Stop(EOS)));
    let server = start_model(script.clone(), ToolCallParserKind::Hermes, ReasoningParserKind::Auto).await;
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rom\"}"}}]},
        {"role": "tool", "tool_call_id": "call_7", "content": [{"type": "text", "text": "sun"}]},
    ]);
    let body = json!({"messages": messages, "tools": [weather()]});
    server.ask(CHAT, body.clone()).await;
    let tools =
        r#"<tools>[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]</tools>"#;
    let turns = "<user>Weather?<assistant>[call_7 weather Rom]<tool>sun(call_7)<assistant>";
    assert_eq!(prompt(&script), format!("{tools}{turns}"));
    let tokenized = server.ask("/tokenize", body).await;
    assert_eq!(tokenized["tokens"].as_array().unwrap().len(), tools.len() + turns.len());
    // A model that is not to call any is not told of them.
    server
        .ask(
            CHAT,
            json!({"messages": messages, "tools": [weather()], "tool_choice": "none"}),
        )
        .await;
    assert_eq!(prompt(&script), turns);
}

#[tokio::test]
async fn a_message_may_be_gone_on_with() {
    let script = Script::of(Script::ids(5, &says("x"), Finish::Stop(EOS)));
    let server = start_model(script.clone(), ToolCallParserKind::Auto, ReasoningParserKind::Auto).await;
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}],
                          "continue_final_message": true});
    server.ask(CHAT, body.clone()).await;
    assert_eq!(prompt(&script), "<user>Hi<assistant>Well, ");
    body["messages"][1]["content"] = json!(" ");
    let error = server.refused(CHAT, &body, 400).await;
    assert_eq!(error["param"], "continue_final_message");
}

#[tokio::test]
async fn tools_are_refused_by_name_where_they_cannot_work() {
    let server = start(null("x")).await;
    let error = server.refused(CHAT, &ask_with_tools("?"), 400).await;
    assert_eq!(error["param"], "tools");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("chat template does not use tools"),
        "{error}"
    );
    server.refused("/tokenize", &ask_with_tools("?"), 400).await;

    let server = start_model(null("x"), ToolCallParserKind::Auto, ReasoningParserKind::Auto).await;
    let error = server.refused(CHAT, &ask_with_tools("?"), 400).await;
    assert!(
        error["message"].as_str().unwrap().contains("--tool-call-parser"),
        "{error}"
    );
    let mut body = ask("?");
    body["functions"] = json!([{"name": "f"}]);
    assert_eq!(server.refused(CHAT, &body, 400).await["param"], "functions");
    let body = json!({"prompt": "x", "tools": [weather()]});
    assert_eq!(server.refused(COMPLETIONS, &body, 400).await["param"], "tools");
    // An operator who wants the text as it is gets it.
    let text = "<tool_call>{\"name\": \"weather\"}</tool_call>";
    let server = start_model(null(text), ToolCallParserKind::None, ReasoningParserKind::Auto).await;
    assert_eq!(both(&server, &ask_with_tools("?")).await.0["content"], text);
}

#[tokio::test]
async fn a_call_that_must_be_made_constrains_the_text() {
    use baton_scheduler::request::Constraint;

    let script = Script::of(Script::ids(5, &says("x"), Finish::Stop(EOS)));
    let mut named = ask_with_tools("?");
    named["tool_choice"] = json!({"type": "function", "function": {"name": "weather"}});
    named["chat_template_kwargs"] = json!({"enable_thinking": false});
    let mut required = named.clone();
    required["tool_choice"] = json!("required");
    for parser in [
        ToolCallParserKind::Hermes,
        ToolCallParserKind::Llama3,
        ToolCallParserKind::Mistral,
    ] {
        let server = start_model(script.clone(), parser, ReasoningParserKind::Think).await;
        for body in [&named, &required] {
            // An instance compiles the same grammar; it has been compiled here once.
            server.ask(CHAT, body.clone()).await;
            let constraint = script.last().request.sampling.constraint.expect("it is constrained");
            let Constraint::Grammar(grammar) = constraint else {
                panic!("{constraint:?}")
            };
            assert!(grammar.contains(r#""const":"weather""#), "{grammar}");
        }
        let mut open = required.clone();
        open["chat_template_kwargs"] = json!({"enable_thinking": true});
        let mut doubled = required.clone();
        doubled["response_format"] = json!({"type": "json_object"});
        let mut wrong = required.clone();
        wrong["tools"][0]["function"]["parameters"] = json!({"type": "strange"});
        for body in [open, doubled, wrong] {
            assert_eq!(server.refused(CHAT, &body, 400).await["param"], "tool_choice");
        }
        // Without a choice the text is free.
        server.ask(CHAT, ask_with_tools("?")).await;
        assert_eq!(script.last().request.sampling.constraint, None);
    }
    let server = start_model(script, ToolCallParserKind::None, ReasoningParserKind::None).await;
    assert_eq!(server.refused(CHAT, &required, 400).await["param"], "tool_choice");
}

#[tokio::test]
async fn reasoning_is_a_field_of_its_own() {
    let text = "<think>\nHm.\n</think>\n\nYes.";
    let server = start_model(null(text), ToolCallParserKind::Auto, ReasoningParserKind::Think).await;
    let expected = json!({"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "reasoning": "Hm."});
    assert_eq!(both(&server, &ask("?")).await, (expected.clone(), "stop".to_owned()));
    let mut body = ask("?");
    body["include_reasoning"] = json!(false);
    assert_eq!(
        both(&server, &body).await.0,
        json!({"role": "assistant", "content": "Yes."})
    );

    // The template has opened it already.
    let script = Script::of(Script::ids(9, &says("Hm.\n</think>\n\nYes."), Finish::Stop(EOS)));
    let server = start_model(script.clone(), ToolCallParserKind::Auto, ReasoningParserKind::Think).await;
    let mut body = ask("?");
    body["chat_template_kwargs"] = json!({"enable_thinking": true});
    assert_eq!(both(&server, &body).await.0, expected);
    assert!(prompt(&script).ends_with("<assistant><think>\n"));
    // Without a parser it stays where it is.
    let server = start_model(null(text), ToolCallParserKind::Auto, ReasoningParserKind::None).await;
    assert_eq!(both(&server, &ask("?")).await.0["content"], text);
}

#[tokio::test]
async fn calls_after_reasoning() {
    let text = "<think>Look up {\"name\": 1}.</think>\n{\"name\": \"weather\", \"parameters\": {}}";
    let server = start_model(null(text), ToolCallParserKind::Llama3, ReasoningParserKind::Think).await;
    let (message, reason) = both(&server, &ask_with_tools("?")).await;
    assert_eq!(message["reasoning"], "Look up {\"name\": 1}.");
    assert_eq!(message["tool_calls"], json!([call("weather", "{}")]));
    assert_eq!((&message["content"], reason.as_str()), (&Value::Null, "tool_calls"));
}

#[tokio::test]
async fn marks_that_are_special_tokens_are_seen_and_other_special_tokens_are_not() {
    // A tokenizer whose begin token is the mark of a call.
    let mut model = model(ToolCallParserKind::Hermes, ReasoningParserKind::None);
    model.parsers.tool_markers = [BOS].into();
    let mut ids = vec![97, BOS];
    ids.extend(says("b"));
    let script = Script::of(Script::ids(5, &ids, Finish::Stop(EOS)));
    let server = start_with(script, model, ApiOptions::default(), ServeOptions::default()).await;
    assert_eq!(both(&server, &ask_with_tools("?")).await.0["content"], "a<|begin|>b");
    assert_eq!(both(&server, &ask("?")).await.0["content"], "ab");
}

/// The official client reads what a null model says, where a Python has it.
#[tokio::test(flavor = "multi_thread")]
async fn the_openai_package_reads_calls_and_reasoning() {
    use std::process::Command;

    let python = std::env::var("BATON_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_client = Command::new(&python).args(["-c", "import openai"]).output();
    if !has_client.is_ok_and(|output| output.status.success()) {
        assert!(
            std::env::var("REQUIRE_CLIENTS").as_deref() != Ok("1"),
            "{python} lacks the openai package"
        );
        println!("SKIPPED: {python} lacks the openai package");
        return;
    }
    let clients = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let template = std::fs::read_to_string(clients.join("tool_template.jinja")).unwrap();
    let templates = [("default".to_owned(), template)];
    let template = ChatTemplate::new(&templates, Some("<|begin|>"), None).unwrap();
    let plain = byte_model();
    let (auto, think) = (ToolCallParserKind::Auto, ReasoningParserKind::Auto);
    let model = ServedModel {
        parsers: OutputParsers::resolve(auto, think, Some(&template), plain.tokenizer.as_ref()),
        chat_template: Some(template),
        max_model_len: 4096,
        ..plain
    };
    assert_eq!(model.parsers.describe(), ("hermes", "think"));
    let text = "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";
    let server = start_with(null(text), model, ApiOptions::default(), ServeOptions::default()).await;
    let mut script = Command::new(python);
    script
        .arg(clients.join("openai_tools.py"))
        .arg(server.url(""))
        .arg("calls");
    let output = tokio::task::spawn_blocking(move || script.output().unwrap())
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
