//! `tools`, `tool_choice` and `parallel_tool_calls` of a chat request, checked. What the model makes of them is found in its
//! text by [`super::tool_calls`].

use std::sync::Arc;

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, kind_of, shown};

/// Longest name of a function, bytes.
const LONGEST_NAME: usize = 256;

/// What the model is to do with tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Call them or not.
    Auto,
    /// Call one at least.
    Required,
    /// Call this one.
    Named(String),
}

/// Functions that the model is told of and may call.
#[derive(Clone, Debug, PartialEq)]
pub struct OfferedTools {
    /// As the client sent them, for the template.
    pub definitions: Value,
    /// Their names.
    pub names: Arc<[String]>,
    /// More than one call may be answered.
    pub may_be_parallel: bool,
    /// Whether any must be.
    pub choice: ToolChoice,
}

impl OfferedTools {
    /// Takes the fields; `None` when there are no tools or the model is not to call any: then it is not told of them.
    pub fn take(fields: &mut Fields) -> Result<Option<OfferedTools>, ApiError> {
        let tools = fields.array("tools", "an array of tools")?.unwrap_or_default();
        let may_be_parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let asked = fields.take("tool_choice");
        let names: Vec<String> = tools
            .iter()
            .enumerate()
            .map(|(idx, tool)| name(idx, tool))
            .collect::<Result<_, _>>()?;
        let choice = choice(asked.as_ref(), &names)?.filter(|_| !names.is_empty());
        Ok(choice.map(|choice| OfferedTools {
            definitions: Value::Array(tools),
            names: names.into(),
            may_be_parallel,
            choice,
        }))
    }
}

/// The name of a well-formed tool.
fn name(idx: usize, tool: &Value) -> Result<String, ApiError> {
    let wrong = |path: &str, found: &str, expected: &str| {
        ApiError::field("tools", format!("tools[{idx}]{path} is {found}, expected {expected}"))
    };
    let Value::Object(tool) = tool else {
        return Err(wrong("", kind_of(tool), "an object"));
    };
    match tool.get("type") {
        Some(Value::String(kind)) if kind == "function" => {}
        other => {
            let found = other.map_or("missing".to_owned(), shown);
            return Err(wrong(".type", &found, "\"function\""));
        }
    }
    let Some(Value::Object(function)) = tool.get("function") else {
        let found = tool.get("function").map_or("missing", kind_of);
        return Err(wrong(".function", found, "an object"));
    };
    match function.get("parameters") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(other) => {
            return Err(wrong(
                ".function.parameters",
                kind_of(other),
                "a JSON schema, which is an object",
            ));
        }
    }
    match function.get("name") {
        Some(Value::String(name)) if !name.trim().is_empty() && name.len() <= LONGEST_NAME => Ok(name.clone()),
        other => {
            let found = other.map_or("missing".to_owned(), shown);
            let expected = format!("a string of 1 to {LONGEST_NAME} bytes");
            Err(wrong(".function.name", &found, &expected))
        }
    }
}

/// What the model is to do with the tools; `None` when it is to call none.
fn choice(choice: Option<&Value>, names: &[String]) -> Result<Option<ToolChoice>, ApiError> {
    const EXPECTED: &str = "\"none\", \"auto\", \"required\" or a function";
    let wrong = |found: &str, expected: &str| ApiError::expected("tool_choice", found, expected);
    let chosen = match choice {
        None => return Ok(Some(ToolChoice::Auto)),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => return Ok(Some(ToolChoice::Auto)),
            "none" => return Ok(None),
            "required" => ToolChoice::Required,
            _ => return Err(wrong(&shown(&Value::String(word.clone())), EXPECTED)),
        },
        Some(Value::Object(choice)) => match choice.get("function").and_then(|function| function.get("name")) {
            Some(Value::String(name)) if choice.get("type").is_none_or(|kind| kind == "function") => {
                ToolChoice::Named(name.clone())
            }
            _ => return Err(wrong("an object without a function's name", EXPECTED)),
        },
        Some(other) => return Err(wrong(kind_of(other), EXPECTED)),
    };
    if names.is_empty() {
        return Err(wrong("set", "tools to choose from"));
    }
    match &chosen {
        ToolChoice::Named(name) if !names.contains(name) => {
            let found = shown(&Value::String(name.clone()));
            Err(wrong(&found, "the name of one of the tools"))
        }
        ToolChoice::Auto | ToolChoice::Required | ToolChoice::Named(_) => Ok(Some(chosen)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(body: Value) -> Result<Option<OfferedTools>, ApiError> {
        OfferedTools::take(&mut Fields::parse(&serde_json::to_vec(&body).unwrap()).unwrap())
    }

    fn tool() -> Value {
        json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}})
    }

    #[test]
    fn tools_are_offered_unless_none_is_to_be_called() {
        let offered = take(json!({"tools": [tool()], "tool_choice": "auto"}))
            .unwrap()
            .unwrap();
        assert_eq!(
            (&*offered.names, offered.may_be_parallel),
            (&["weather".to_owned()][..], true)
        );
        assert_eq!(offered.definitions, json!([tool()]));
        assert!(
            !take(json!({"tools": [tool()], "parallel_tool_calls": false}))
                .unwrap()
                .unwrap()
                .may_be_parallel
        );
        let choice = |choice: Value| {
            let offered = take(json!({"tools": [tool()], "tool_choice": choice})).unwrap();
            offered.unwrap().choice
        };
        assert_eq!(choice(json!(null)), ToolChoice::Auto);
        assert_eq!(choice(json!("required")), ToolChoice::Required);
        let named = json!({"type": "function", "function": {"name": "weather"}});
        assert_eq!(choice(named), ToolChoice::Named("weather".to_owned()));
        for nothing in [
            json!({}),
            json!({"tools": []}),
            json!({"tools": null, "tool_choice": "auto"}),
            json!({"tools": [tool()], "tool_choice": "none"}),
        ] {
            assert_eq!(take(nothing).unwrap(), None);
        }
    }

    #[test]
    fn wrong_tools_are_refused_by_their_place() {
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        let cases = [
            (json!({"tools": {}}), "tools is an object"),
            (json!({"tools": [1]}), "tools[0] is a number"),
            (json!({"tools": [tool(), {"function": {}}]}), "tools[1].type is missing"),
            (
                json!({"tools": [{"type": "retrieval"}]}),
                r#"tools[0].type is "retrieval""#,
            ),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function is missing"),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "tools[0].function.name is missing",
            ),
            (json!({"tools": [named("")]}), "tools[0].function.name is \"\""),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
                "parameters is an array",
            ),
            (
                json!({"tools": [tool()], "parallel_tool_calls": 1}),
                "parallel_tool_calls is 1",
            ),
            (
                json!({"tools": [tool()], "tool_choice": "any"}),
                r#"tool_choice is "any""#,
            ),
            (json!({"tools": [tool()], "tool_choice": 1}), "tool_choice is a number"),
            (
                json!({"tools": [tool()], "tool_choice": {"type": "function"}}),
                "without a function's name",
            ),
            (json!({"tool_choice": "required"}), "expected tools to choose from"),
            (
                json!({"tools": [tool()], "tool_choice": named("x")}),
                r#"tool_choice is "x""#,
            ),
        ];
        for (body, expected) in cases {
            let error = take(body.clone()).expect_err(&body.to_string());
            assert!(error.message.contains(expected), "{body}: {error}");
        }
    }
}
