//! `GET /openapi.json`: what can be asked over HTTP, as OpenAPI 3.1. Fields come from the table that the other protocols use
//! too; what is checked where they are parsed is not repeated here.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use super::ApiState;
use super::error::ErrorKind;
use super::field_table::{FieldRow, On};
use super::kserve;
use super::request_label::REQUEST_ID_HEADER;

/// `GET /openapi.json`.
pub(super) async fn handle(State(state): State<ApiState>) -> Response {
    let has_key = state.options().api_key.is_some();
    Json(document(&state.model().names, has_key)).into_response()
}

/// The document, for a model of these names; `has_key` says whether calls need the API key.
fn document(names: &[String], has_key: bool) -> Value {
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths(),
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    });
    if has_key {
        document["security"] = json!([{"key": []}]);
    }
    document["components"]["schemas"]["Model"]["enum"] = json!(names);
    document
}

fn paths() -> Value {
    const GENERATE_ERRORS: &[ErrorKind] = &[
        ErrorKind::Invalid,
        ErrorKind::Unauthorized,
        ErrorKind::NotFound,
        ErrorKind::TooLarge,
        ErrorKind::OverCapacity,
        ErrorKind::Cancelled,
        ErrorKind::Unavailable,
        ErrorKind::Deadline,
        ErrorKind::Internal,
    ];
    const TEXT_ERRORS: &[ErrorKind] = &[
        ErrorKind::Invalid,
        ErrorKind::Unauthorized,
        ErrorKind::NotFound,
        ErrorKind::TooLarge,
        ErrorKind::Internal,
    ];
    const READ_ERRORS: &[ErrorKind] = &[ErrorKind::Unauthorized, ErrorKind::Internal];
    let post = |summary: &str, schema: &str, answer: &[&str], error: &str, errors: &[ErrorKind]| {
        json!({"post": {
            "summary": summary,
            "parameters": [request_id_header()],
            "requestBody": {"required": true, "content": {"application/json": {"schema": schema_named(schema)}}},
            "responses": responses(answer, error, errors),
        }})
    };
    let get = |summary: &str, answer: &[&str], errors: &[ErrorKind]| json!({"get": {"summary": summary, "responses": responses(answer, "Error", errors)}});
    let both = &["application/json", "text/event-stream"];
    let of_model = |mut path: Value, names: &[&str]| {
        let schema = |name: &str| match name {
            "model" => schema_named("Model"),
            _ => json!({"const": kserve::VERSION}),
        };
        let parameter = |name: &&str| json!({"name": name, "in": "path", "required": true, "schema": schema(name)});
        path["parameters"] = names.iter().map(parameter).collect();
        path
    };
    let generate = || {
        post(
            "Text generation, whole",
            "GenerateRequest",
            &["application/json"],
            "GenerateError",
            GENERATE_ERRORS,
        )
    };
    let generate_stream = || {
        post(
            "Text generation in events",
            "GenerateRequest",
            &["text/event-stream"],
            "GenerateError",
            GENERATE_ERRORS,
        )
    };
    let model = get(
        "One name of the served model",
        &["application/json"],
        &[ErrorKind::Unauthorized, ErrorKind::NotFound],
    );
    json!({
        "/v1/chat/completions": post("Answers to a conversation", "ChatRequest", both, "Error", GENERATE_ERRORS),
        "/v1/completions": post("Continuations of prompts", "CompletionRequest", both, "Error", GENERATE_ERRORS),
        "/v1/embeddings": post("Embeddings of inputs", "EmbeddingRequest", &["application/json"], "Error", GENERATE_ERRORS),
        "/v2/models/{model}/generate": of_model(generate(), &["model"]),
        "/v2/models/{model}/versions/{version}/generate": of_model(generate(), &["model", "version"]),
        "/v2/models/{model}/generate_stream": of_model(generate_stream(), &["model"]),
        "/v2/models/{model}/versions/{version}/generate_stream": of_model(generate_stream(), &["model", "version"]),
        "/tokenize": post("Text, or a conversation, to token ids", "TokenizeRequest", &["application/json"], "Error", TEXT_ERRORS),
        "/detokenize": post("Token ids to text", "DetokenizeRequest", &["application/json"], "Error", TEXT_ERRORS),
        "/v1/models": get("Names of the served model", &["application/json"], READ_ERRORS),
        "/v1/models/{model}": of_model(model, &["model"]),
        "/health": get("Whether a request could be served now", &[], &[ErrorKind::Unavailable]),
        "/metrics": get("Metrics in the OpenMetrics text format", &["application/openmetrics-text"], READ_ERRORS),
        "/version": get("The server's version", &["application/json"], READ_ERRORS),
        "/openapi.json": get("This document", &["application/json"], READ_ERRORS),
    })
}

fn request_id_header() -> Value {
    let row = FieldRow::of(On::Both)
        .find(|row| row.name == "request_id")
        .expect("it is in the table");
    let mut schema = row.schema();
    schema["type"] = json!("string");
    json!({"name": REQUEST_ID_HEADER.as_str(), "in": "header", "schema": schema})
}

fn schema_named(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// 200 with any of these media types, and the errors.
fn responses(answer: &[&str], error: &str, errors: &[ErrorKind]) -> Value {
    let mut ok = json!({"description": "OK"});
    for media in answer {
        let schema = match *media {
            "application/json" => json!({"type": "object"}),
            _ => json!({"type": "string"}),
        };
        ok["content"][media] = json!({ "schema": schema });
    }
    let mut responses = Map::from_iter([("200".to_owned(), ok)]);
    for kind in errors {
        let codes = kind.codes();
        let content = json!({"application/json": {"schema": schema_named(error)}});
        responses.insert(
            codes.http.to_string(),
            json!({"description": codes.kind, "content": content}),
        );
    }
    responses.into()
}

fn schemas() -> Value {
    json!({
        "ChatRequest": request(On::Chat, &["messages"]),
        "CompletionRequest": request(On::Completions, &["prompt"]),
        "EmbeddingRequest": request(On::Embeddings, &["input"]),
        "TokenizeRequest": tokenize(),
        "DetokenizeRequest": {
            "type": "object",
            "required": ["tokens"],
            "properties": {
                "model": property(On::Chat, "model"),
                "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            },
        },
        "GenerateRequest": generate(),
        "Message": {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"type": "string", "minLength": 1},
                "content": {"anyOf": [
                    {"type": ["string", "null"]},
                    {"type": "array", "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    }},
                ]},
                "tool_calls": {"type": ["array", "null"], "items": {
                    "type": "object",
                    "required": ["function"],
                    "properties": {
                        "id": {"type": "string"},
                        "type": {"const": "function"},
                        "function": {"type": "object", "required": ["name"], "properties": {
                            "name": {"type": "string", "minLength": 1},
                            "arguments": {"type": "string"},
                        }},
                    },
                }},
                "tool_call_id": {"type": ["string", "null"]},
            },
        },
        "Model": {"type": "string", "description": "A name of the served model."},
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "integer"},
                },
            }},
        },
        "GenerateError": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "string"}},
        },
    })
}

fn property(on: On, name: &str) -> Value {
    let mut rows = FieldRow::of(on);
    rows.find(|row| row.name == name)
        .expect("the name is in the table")
        .schema()
}

/// Unknown fields pass, as clients send many.
fn request(on: On, required: &[&str]) -> Value {
    let mut properties: Map<String, Value> = FieldRow::of(on)
        .map(|row| (row.name.to_owned(), row.schema()))
        .collect();
    for name in required {
        not_null(&mut properties[*name]);
    }
    json!({"type": "object", "required": required, "properties": properties})
}

fn not_null(schema: &mut Value) {
    if let Some(Value::Array(kinds)) = schema.get_mut("type") {
        kinds.retain(|kind| kind != "null");
    }
    if let Some(Value::Array(forms)) = schema.get_mut("anyOf") {
        forms.retain(|form| form["type"] != "null");
    }
}

fn tokenize() -> Value {
    let mut messages = property(On::Chat, "messages");
    not_null(&mut messages);
    json!({
        "type": "object",
        "properties": {
            "model": property(On::Chat, "model"),
            "prompt": {"type": "string"},
            "messages": messages,
            "add_special_tokens": property(On::Chat, "add_special_tokens"),
            "add_generation_prompt": property(On::Chat, "add_generation_prompt"),
            "continue_final_message": property(On::Chat, "continue_final_message"),
            "chat_template": property(On::Chat, "chat_template"),
            "chat_template_kwargs": property(On::Chat, "chat_template_kwargs"),
            "reasoning_effort": property(On::Chat, "reasoning_effort"),
            "documents": property(On::Chat, "documents"),
            "tools": property(On::Chat, "tools"),
            "return_token_strs": {"type": ["boolean", "null"]},
        },
        "anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    })
}

fn generate() -> Value {
    // Options may stand beside the text or in `parameters`.
    let options: Map<String, Value> = FieldRow::of(On::Completions)
        .filter(|row| !["prompt", "model", "stream", "echo", "prompt_logprobs", "timeline"].contains(&row.name))
        .filter(|row| !row.name.starts_with("return_token"))
        .map(|row| (row.name.to_owned(), row.schema()))
        .collect();
    let mut properties = Map::from_iter([
        ("id".to_owned(), json!({"type": ["string", "null"], "maxLength": 128})),
        ("text_input".to_owned(), json!({"type": "string"})),
        (
            "exclude_input_in_output".to_owned(),
            json!({"type": ["boolean", "null"]}),
        ),
        (
            "parameters".to_owned(),
            json!({"type": ["object", "null"], "properties": options}),
        ),
    ]);
    let reports = kserve::REPORTS
        .iter()
        .map(|name| ((*name).to_owned(), json!({"type": ["boolean", "null"]})));
    properties.extend(reports);
    properties.extend(options);
    json!({"type": "object", "required": ["text_input"], "properties": properties})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::fields::tests::asked_for;
    use super::super::{chat, completions, embeddings, tests};
    use super::*;

    fn properties(schema: &str) -> BTreeSet<String> {
        let document = document(&["bytes".to_owned()], false);
        let properties = document["components"]["schemas"][schema]["properties"].as_object();
        properties.unwrap().keys().cloned().collect()
    }

    /// Members of objects inside a field; they are described with it.
    fn without_inner(mut names: BTreeSet<String>) -> BTreeSet<String> {
        for inner in ["include_usage", "continuous_usage_stats"] {
            assert!(names.remove(inner), "{inner} was looked for");
        }
        names
    }

    #[tokio::test]
    async fn each_field_that_a_parser_takes_is_described_and_no_other() {
        let server = tests::start(tests::null("a")).await;
        let body = |prompt: &str| format!(r#"{{{prompt}, "stream": true, "stream_options": {{}}}}"#);
        let asked = asked_for(|| {
            let body = body(r#""messages": [{"role": "user", "content": "a"}]"#);
            assert!(chat::parses(&server.state, body.as_bytes()));
        });
        assert_eq!(without_inner(asked), properties("ChatRequest"));
        let asked = asked_for(|| assert!(completions::parses(&server.state, body(r#""prompt": "a""#).as_bytes())));
        assert_eq!(without_inner(asked), properties("CompletionRequest"));
        let asked = asked_for(|| assert!(embeddings::parses(&server.state, br#"{"input": "a"}"#)));
        assert_eq!(asked, properties("EmbeddingRequest"));
    }

    #[test]
    fn each_path_and_field_is_in_the_documentation() {
        let written = include_str!("../../docs/api.md");
        let rows = FieldRow::of(On::Chat).chain(FieldRow::of(On::Completions));
        for row in rows.chain(FieldRow::of(On::Embeddings)) {
            assert!(written.contains(&format!("`{}`", row.name)), "{}", row.name);
        }
        let document = document(&["a".to_owned()], false);
        for path in document["paths"].as_object().unwrap().keys() {
            let last = path.rsplit('/').next().unwrap();
            assert!(written.contains(&format!("{last}`")), "{path}");
        }
    }

    #[tokio::test]
    async fn every_described_path_is_served() {
        let server = tests::start(tests::null("a")).await;
        let served = server.get("/openapi.json").await.text().await.unwrap();
        let document = document(&["bytes".to_owned()], false);
        let expected = document.to_string();
        assert!(served == expected, "{served}");
        for (path, item) in document["paths"].as_object().unwrap() {
            let path = path.replace("{model}", "bytes").replace("{version}", "1");
            let response = match item.get("post") {
                Some(_) => server.post(&path, &json!({})).await,
                None => server.get(&path).await,
            };
            let expected = if item.get("post").is_some() { 400 } else { 200 };
            assert_eq!(response.status(), expected, "{path}");
        }
    }

    #[test]
    fn references_lead_somewhere() {
        fn check(value: &Value, document: &Value) {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
            }
            match value {
                Value::Object(map) => map.values().for_each(|value| check(value, document)),
                Value::Array(list) => list.iter().for_each(|value| check(value, document)),
                _ => {}
            }
        }
        let document = document(&["a".to_owned()], true);
        check(&document, &document);
        assert_eq!(document["security"], json!([{"key": []}]));
    }
}
