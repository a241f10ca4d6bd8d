//! Calls of tools in the earlier turns of a chat, brought into the shape that templates expect: arguments are objects there,
//! while the API has them as text.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{kind_of, shown};

/// Checks `tool_calls` of an assistant's message and makes objects of the arguments. `wrong(path, found, expected)` says
/// where in the message an error is.
pub fn normalise(calls: Value, wrong: impl Fn(&str, &str, &str) -> ApiError) -> Result<Value, ApiError> {
    let Value::Array(calls) = calls else {
        return Err(wrong(".tool_calls", kind_of(&calls), "an array"));
    };
    let calls = calls.into_iter().enumerate().map(|(idx, call)| {
        let at = |path: &str, found: &str, expected: &str| wrong(&format!(".tool_calls[{idx}]{path}"), found, expected);
        normalise_one(call, at)
    });
    Ok(Value::Array(calls.collect::<Result<_, _>>()?))
}

fn normalise_one(call: Value, wrong: impl Fn(&str, &str, &str) -> ApiError) -> Result<Value, ApiError> {
    let Value::Object(mut call) = call else {
        return Err(wrong("", kind_of(&call), "an object"));
    };
    if let Some(other) = call.get("id").filter(|id| !id.is_string() && !id.is_null()) {
        return Err(wrong(".id", &shown(other), "a string"));
    }
    match call.entry("type").or_insert_with(|| "function".into()) {
        Value::String(kind) if kind == "function" => {}
        other => return Err(wrong(".type", &shown(other), "\"function\"")),
    }
    let function = match call.get_mut("function") {
        Some(Value::Object(function)) => function,
        other => {
            return Err(wrong(
                ".function",
                other.map_or("missing", |other| kind_of(other)),
                "an object",
            ));
        }
    };
    match function.get("name") {
        Some(Value::String(name)) if !name.is_empty() => {}
        other => {
            let found = other.map_or("missing".to_owned(), shown);
            return Err(wrong(".function.name", &found, "a string that is not empty"));
        }
    }
    let arguments = match function.get_mut("arguments").map(Value::take) {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|_| {
            wrong(
                ".function.arguments",
                "text that is no JSON object",
                "a JSON object as text",
            )
        })?,
        Some(other) => return Err(wrong(".function.arguments", kind_of(&other), "a JSON object as text")),
    };
    function.insert("arguments".to_owned(), Value::Object(arguments));
    Ok(Value::Object(call))
}
