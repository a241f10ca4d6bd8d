//! The messages of a chat request: their shape, and the prompt text that the model's template makes of them.

use baton_engine::text::ChatTemplateError;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, kind_of, shown};
use super::past_calls;
use super::served_model::ServedModel;
use super::tools::OfferedTools;
use crate::config::Switch;

/// How much a model may think before it answers, as the OpenAI API and vLLM have it (`max` is DeepSeek's).
pub const REASONING_EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// What a chat request says about its prompt.
#[derive(Clone, Debug)]
pub struct ChatPrompt {
    /// Messages with text contents, as the template gets them.
    messages: Value,
    tools: Option<OfferedTools>,
    ending: Ending,
    template_variables: Map<String, Value>,
    /// A template of the request's own, in place of the model's.
    template: Option<String>,
}

/// What comes after the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The beginning of the next answer.
    GenerationPrompt,
    /// Nothing.
    Closed,
    /// Nothing, and the last message is not ended either: the answer goes on with it.
    Open,
}

impl ChatPrompt {
    /// Takes the fields that make the prompt; `client_templates` says whether it may bring a template.
    pub fn take(fields: &mut Fields, client_templates: Switch) -> Result<ChatPrompt, ApiError> {
        let messages = fields.array("messages", "an array of messages")?;
        let messages = messages.ok_or_else(|| ApiError::expected("messages", "missing", "an array of messages"))?;
        if messages.is_empty() {
            return Err(ApiError::expected("messages", "an empty array", "at least one message"));
        }
        let messages = messages.into_iter().enumerate().map(|(idx, value)| message(idx, value));
        let mut template_variables = fields
            .object("chat_template_kwargs")?
            .map(Fields::into_inner)
            .unwrap_or_default();
        if let Some(name) = ["messages", "tools", "documents", "chat_template"]
            .into_iter()
            .find(|name| template_variables.contains_key(*name))
        {
            let message = format!("chat_template_kwargs.{name} is set, expected it in {name}");
            return Err(ApiError::field("chat_template_kwargs", message));
        }
        let messages = messages.collect::<Result<_, _>>()?;
        if let Some(documents) = fields
            .array("documents", "an array of documents")?
            .filter(|list| !list.is_empty())
        {
            template_variables.insert("documents".to_owned(), Value::Array(documents));
        }
        if let Some(effort) = reasoning_effort(fields)? {
            let is_on = effort != "none";
            template_variables.insert("reasoning_effort".to_owned(), effort.into());
            // Some templates only know whether, not how much.
            template_variables
                .entry("enable_thinking")
                .or_insert_with(|| is_on.into());
        }
        Ok(ChatPrompt {
            messages: Value::Array(messages),
            tools: OfferedTools::take(fields)?,
            ending: ending(fields)?,
            template_variables,
            template: template(fields, client_templates)?,
        })
    }

    /// The tools that the prompt tells of.
    pub fn tools(&self) -> Option<&OfferedTools> {
        self.tools.as_ref()
    }

    /// The prompt text; what a template refuses is the client's to mend.
    pub fn render(&self, model: &ServedModel) -> Result<String, ApiError> {
        let own = match &self.template {
            Some(source) => {
                let template = model.client_chat_template(source);
                Some(template.map_err(|error| self.refused(&error))?)
            }
            None => None,
        };
        let Some(template) = own.as_ref().or(model.chat_template.as_ref()) else {
            return Err(ApiError::field(
                "messages",
                "this model has no chat template; use /v1/completions",
            ));
        };
        if self.tools.is_some() && !template.uses_tools() {
            let message = "tools is set, and this model's chat template does not use tools; leave it out";
            return Err(ApiError::field("tools", message));
        }
        let prompt = template
            .render(
                &self.messages,
                self.tools.as_ref().map(|tools| &tools.definitions),
                self.ending == Ending::GenerationPrompt,
                &self.template_variables,
            )
            .map_err(|error| self.refused(&error))?;
        match self.ending {
            Ending::GenerationPrompt | Ending::Closed => Ok(prompt),
            Ending::Open => self.cut_after_last_content(prompt),
        }
    }

    /// What a template does not do is blamed on the template where it is the client's own, else on the messages.
    fn refused(&self, error: &ChatTemplateError) -> ApiError {
        let field = match &self.template {
            Some(_) => "chat_template",
            None => "messages",
        };
        ApiError::field(field, error.to_string())
    }

    /// The prompt up to the end of the last message's content, as transformers cuts it.
    fn cut_after_last_content(&self, mut prompt: String) -> Result<String, ApiError> {
        let last = self.messages.as_array().and_then(|messages| messages.last());
        let content = last.and_then(|last| last["content"].as_str()).unwrap_or_default();
        // Templates may trim a content or not.
        let found = |content: &str| prompt.rfind(content).map(|start| start + content.len());
        let end = match content.trim() {
            "" => None,
            trimmed => found(content).or_else(|| found(trimmed)),
        };
        let message = "continue_final_message is true, and the chat template does not show the last message's content";
        prompt.truncate(end.ok_or_else(|| ApiError::field("continue_final_message", message))?);
        Ok(prompt)
    }
}

fn reasoning_effort(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    const FIELD: &str = "reasoning_effort";
    match fields.string(FIELD)? {
        Some(effort) if !REASONING_EFFORTS.contains(&effort.as_str()) => {
            let found = shown(&effort.into());
            let expected = format!("one of {}", REASONING_EFFORTS.join(", "));
            Err(ApiError::expected(FIELD, found, expected))
        }
        asked => Ok(asked),
    }
}

/// A template is a program, so it is taken only where the operator trusts clients.
fn template(fields: &mut Fields, client_templates: Switch) -> Result<Option<String>, ApiError> {
    const FIELD: &str = "chat_template";
    match (fields.string(FIELD)?, client_templates) {
        (Some(_), Switch::Off) => {
            let message =
                "chat_template is set, and this server takes none; start it with --trust-request-chat-template";
            Err(ApiError::field(FIELD, message))
        }
        (template, Switch::On | Switch::Off) => Ok(template),
    }
}

fn ending(fields: &mut Fields) -> Result<Ending, ApiError> {
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    match (
        fields.boolean("continue_final_message")?.unwrap_or(false),
        add_generation_prompt,
    ) {
        (true, Some(true)) => {
            let message = "continue_final_message and add_generation_prompt are true, expected one or the other";
            Err(ApiError::field("continue_final_message", message))
        }
        (true, _) => Ok(Ending::Open),
        (false, Some(false)) => Ok(Ending::Closed),
        (false, _) => Ok(Ending::GenerationPrompt),
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
    let calls = message.get_mut("tool_calls").map(Value::take);
    if let Some(calls) = calls.filter(|calls| !is_empty(calls)) {
        message.insert("tool_calls".to_owned(), past_calls::normalise(calls, wrong)?);
    } else {
        message.shift_remove("tool_calls");
    }
    if let Some(id) = message
        .get("tool_call_id")
        .filter(|id| !id.is_string() && !id.is_null())
    {
        return Err(wrong(".tool_call_id", &shown(id), "a string"));
    }
    // The newer name of the field; templates know the older one.
    if let (Some(Value::String(text)), None) = (message.get("reasoning"), message.get("reasoning_content")) {
        message.insert("reasoning_content".to_owned(), Value::String(text.clone()));
    }
    for name in ["function_call", "audio"] {
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

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
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
        ChatPrompt::take(&mut Fields::parse(json.as_bytes()).unwrap(), Switch::Off)
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
        assert_eq!((prompt.ending, prompt.tools), (Ending::GenerationPrompt, None));
    }

    #[test]
    fn earlier_calls_have_objects_for_arguments() {
        let call =
            |arguments: &str| format!(r#"{{"id": "call_1", "function": {{"name": "f", "arguments": {arguments}}}}}"#);
        let prompt = take(&format!(
            r#"{{"messages": [{{"role": "assistant", "tool_calls": [{}, {}, {}], "reasoning": "r"}},
                             {{"role": "tool", "tool_call_id": "call_1", "content": "12"}}]}}"#,
            call(r#""{\"x\": 1}""#),
            call(r#"{"y": 2}"#),
            call(r#""""#),
        ))
        .unwrap();
        let call = |arguments: Value| serde_json::json!({"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}});
        let calls = [
            serde_json::json!({"x": 1}),
            serde_json::json!({"y": 2}),
            serde_json::json!({}),
        ];
        let expected = serde_json::json!([
            {"role": "assistant", "content": "", "tool_calls": calls.map(call), "reasoning": "r", "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        ]);
        assert_eq!(prompt.messages, expected);
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
                "messages[0].tool_calls[0].function is missing",
            ),
            (
                r#"{"messages": [{"role": "assistant", "tool_calls": {}}]}"#,
                "messages[0].tool_calls is an object",
            ),
            (
                r#"{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}"#,
                "messages[0].tool_calls[0].function.arguments is text that is no JSON object",
            ),
            (
                r#"{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]}"#,
                "messages[0].tool_calls[0].function.name is missing",
            ),
            (
                r#"{"messages": [{"role": "tool", "tool_call_id": 5}]}"#,
                "messages[0].tool_call_id is 5",
            ),
            (
                r#"{"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}"#,
                "messages[0].function_call is an object",
            ),
            (
                r#"{"messages": [{"role": "user"}], "continue_final_message": true, "add_generation_prompt": true}"#,
                "expected one or the other",
            ),
            (
                r#"{"messages": [{"role": "user"}], "chat_template_kwargs": {"messages": []}}"#,
                "kwargs.messages",
            ),
            (
                r#"{"messages": [{"role": "user"}], "chat_template": "x"}"#,
                "start it with --trust-request-chat-template",
            ),
            (
                r#"{"messages": [{"role": "user"}], "chat_template_kwargs": {"chat_template": "x"}}"#,
                "kwargs.chat_template",
            ),
            (
                r#"{"messages": [{"role": "user"}], "reasoning_effort": "much"}"#,
                r#"reasoning_effort is "much", expected one of none, minimal"#,
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
