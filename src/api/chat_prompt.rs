//! The messages of a chat request: their shape, and the prompt text that the model's template makes of them.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, kind_of, shown};
use super::served_model::ServedModel;

/// What a chat request says about its prompt.
#[derive(Clone, Debug)]
pub struct ChatPrompt {
    /// Messages with text contents, as the template gets them.
    messages: Value,
    add_generation_prompt: bool,
    template_variables: Map<String, Value>,
}

impl ChatPrompt {
    /// Takes the fields that make the prompt.
    pub fn take(fields: &mut Fields) -> Result<ChatPrompt, ApiError> {
        let messages = fields.array("messages", "an array of messages")?;
        let messages = messages.ok_or_else(|| ApiError::expected("messages", "missing", "an array of messages"))?;
        if messages.is_empty() {
            return Err(ApiError::expected("messages", "an empty array", "at least one message"));
        }
        let messages = messages.into_iter().enumerate().map(|(idx, value)| message(idx, value));
        let template_variables = fields
            .object("chat_template_kwargs")?
            .map(Fields::into_inner)
            .unwrap_or_default();
        if let Some(name) = ["messages", "tools"]
            .into_iter()
            .find(|name| template_variables.contains_key(*name))
        {
            let message = format!("chat_template_kwargs.{name} is set, expected it in {name}");
            return Err(ApiError::field("chat_template_kwargs", message));
        }
        Ok(ChatPrompt {
            messages: Value::Array(messages.collect::<Result<_, _>>()?),
            add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
            template_variables,
        })
    }

    /// The prompt text; what a template refuses is the client's to mend.
    pub fn render(&self, model: &ServedModel) -> Result<String, ApiError> {
        let Some(template) = &model.chat_template else {
            return Err(ApiError::field(
                "messages",
                "this model has no chat template; use /v1/completions",
            ));
        };
        template
            .render(
                &self.messages,
                None,
                self.add_generation_prompt,
                &self.template_variables,
            )
            .map_err(|error| ApiError::field("messages", error.to_string()))
    }
}

fn message(idx: usize, value: Value) -> Result<Value, ApiError> {
    let wrong = |path: &str, found: &str, expected: &str| {
        ApiError::field(
            "messages",
            format!("messages[{idx}]{path} is {found}, expected {expected}"),
        )
    };
    let Value::Object(mut message) = value else {
        return Err(wrong("", kind_of(&value), "an object"));
    };
    match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => return Err(wrong(".role", &shown(other), "a string")),
        None => return Err(wrong(".role", "missing", "a string")),
    }
    for name in ["tool_calls", "function_call", "audio"] {
        let is_empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if let Some(value) = message.get(name).filter(|value| !is_empty(value)) {
            return Err(wrong(
                &format!(".{name}"),
                kind_of(value),
                "nothing: it is not supported here",
            ));
        }
        message.shift_remove(name);
    }
    let content = match message.get_mut("content").map(Value::take) {
        Some(Value::String(text)) => text,
        // An assistant's turn may come back without content.
        None | Some(Value::Null) => String::new(),
        Some(Value::Array(parts)) => joined(parts, wrong)?,
        Some(other) => return Err(wrong(".content", kind_of(&other), "a string or an array of parts")),
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok(Value::Object(message))
}

/// The text of content parts, one after the other.
fn joined(parts: Vec<Value>, wrong: impl Fn(&str, &str, &str) -> ApiError) -> Result<String, ApiError> {
    let mut text = String::new();
    for (idx, part) in parts.iter().enumerate() {
        let path = format!(".content[{idx}]");
        match part {
            // vLLM's clients may write a part as a bare string.
            Value::String(piece) => text.push_str(piece),
            Value::Object(part) => match (part.get("type").and_then(Value::as_str), part.get("text")) {
                (Some("text"), Some(Value::String(piece))) => text.push_str(piece),
                (Some("text"), other) => {
                    let found = other.map_or("missing", kind_of);
                    return Err(wrong(&format!("{path}.text"), found, "a string"));
                }
                (Some(other), _) => {
                    let other: String = other.chars().take(64).collect();
                    return Err(wrong(&format!("{path}.type"), &format!("\"{other}\""), "\"text\""));
                }
                (None, _) => return Err(wrong(&format!("{path}.type"), "missing", "\"text\"")),
            },
            other => return Err(wrong(&path, kind_of(other), "an object")),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(json: &str) -> Result<ChatPrompt, ApiError> {
        ChatPrompt::take(&mut Fields::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn contents_become_text() {
        let prompt = take(
            r#"{"messages": [{"role": "system", "content": "a", "name": "x"},
                             {"role": "user", "content": [{"type": "text", "text": "b "}, {"type": "text", "text": "c"}]},
                             {"role": "assistant", "content": null, "tool_calls": []},
                             {"role": "user"}]}"#,
        )
        .unwrap();
        let expected = serde_json::json!([
            {"role": "system", "content": "a", "name": "x"},
            {"role": "user", "content": "b c"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": ""},
        ]);
        assert_eq!(prompt.messages, expected);
        assert!(prompt.add_generation_prompt);
    }

    #[test]
    fn wrong_messages_are_refused_by_their_place() {
        let cases = [
            (r#"{}"#, "messages is missing"),
            (r#"{"messages": []}"#, "messages is an empty array"),
            (r#"{"messages": "hi"}"#, r#"messages is "hi", expected an array"#),
            (r#"{"messages": [1]}"#, "messages[0] is a number"),
            (r#"{"messages": [{"content": "x"}]}"#, "messages[0].role is missing"),
            (r#"{"messages": [{"role": 1}]}"#, "messages[0].role is 1"),
            (
                r#"{"messages": [{"role": "user", "content": {}}]}"#,
                "messages[0].content is an object",
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
                r#"[0].type is "image_url""#,
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#,
                ".content[0].text is missing",
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"text": "x"}]}]}"#,
                ".content[0].type is missing",
            ),
            (
                r#"{"messages": [{"role": "assistant", "tool_calls": [{}]}]}"#,
                "messages[0].tool_calls is an array",
            ),
            (
                r#"{"messages": [{"role": "user"}], "chat_template_kwargs": {"messages": []}}"#,
                "kwargs.messages",
            ),
            (
                r#"{"messages": [{"role": "user"}], "chat_template_kwargs": 1}"#,
                "chat_template_kwargs is 1",
            ),
        ];
        for (json, expected) in cases {
            let error = take(json).expect_err(json);
            assert!(error.message.contains(expected), "{json}: {error}");
            assert!(error.param.is_some());
        }
    }
}
