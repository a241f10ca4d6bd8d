//! The language of an answer that has to call a tool: `tool_choice` as `required` or by name, in the words of the format that
//! the answer is parsed for. Instances hold the model to it.

use baton_scheduler::request::{Constraint, SamplingParams};
use serde_json::{Value, json};

use super::ApiState;
use super::constraints::{constrain, json_schema};
use super::error::ApiError;
use super::parsers::ToolCalls;
use super::tool_calls::ToolCallFormat;
use super::tools::{OfferedTools, ToolChoice};

const FIELD: &str = "tool_choice";

/// Most calls of one answer that must have some: no model goes on for ever.
const MAX_CALLS: u32 = 16;

/// Constrains `sampling` where `tools` must be called. `is_in_reasoning` when the prompt has opened the model's reasoning.
///
/// # Errors
/// Where calls cannot be forced, and what is wrong with a tool's schema.
pub fn apply(
    state: &ApiState,
    sampling: &mut SamplingParams,
    tools: &OfferedTools,
    is_in_reasoning: bool,
) -> Result<(), ApiError> {
    let found = match &tools.choice {
        ToolChoice::Auto => return Ok(()),
        ToolChoice::Required => "\"required\"",
        ToolChoice::Named(_) => "a function",
    };
    let refuse = |expected: &str| Err(ApiError::expected(FIELD, found, expected));
    let ToolCalls::Parsed(format) = state.model().parsers.tool_calls else {
        return refuse("\"none\" or \"auto\": no parser of this model's calls was chosen");
    };
    if is_in_reasoning {
        return refuse(
            "\"none\" or \"auto\": the prompt has opened the model's reasoning, where no call can be forced",
        );
    }
    if sampling.constraint.is_some() {
        return refuse("\"none\" or \"auto\" beside another constraint of the answer");
    }
    let mark = |mark: &str| {
        let tokenizer = state.model().tokenizer.as_ref();
        let id = tokenizer.and_then(|tokenizer| tokenizer.token_to_id(mark).filter(|id| tokenizer.is_special(*id)));
        match id {
            Some(id) => format!("<[{id}]>"),
            None => json!(mark).to_string(),
        }
    };
    constrain(state, sampling, FIELD, grammar(format, tools, mark)?)
}

/// A grammar in llguidance's variant of Lark; `mark` writes a marker, which may be a special token.
fn grammar(
    format: ToolCallFormat,
    tools: &OfferedTools,
    mark: impl Fn(&str) -> String,
) -> Result<Constraint, ApiError> {
    let definitions = tools.definitions.as_array().into_iter().flatten();
    let callable: Vec<&Value> = definitions
        .map(|tool| &tool["function"])
        .filter(|function| match &tools.choice {
            ToolChoice::Named(name) => function["name"] == name.as_str(),
            ToolChoice::Auto | ToolChoice::Required => true,
        })
        .collect();
    let n_more = match (&tools.choice, tools.may_be_parallel) {
        (ToolChoice::Auto | ToolChoice::Required, true) => MAX_CALLS - 1,
        (ToolChoice::Named(_), _) | (_, false) => 0,
    };
    let calls = |separator: &str| match n_more {
        0 => "call".to_owned(),
        n => format!("call (\"{separator}\" call){{0,{n}}}"),
    };
    let (key, start) = match format {
        ToolCallFormat::Hermes => ("arguments", calls("\\n")),
        ToolCallFormat::Llama3 => ("parameters", calls("; ")),
        ToolCallFormat::Mistral => (
            "arguments",
            format!("{} \" [\" {} \"]\"", mark("[TOOL_CALLS]"), calls(", ")),
        ),
    };
    let names: Vec<String> = (0..callable.len()).map(|idx| format!("tool_{idx}")).collect();
    let any = names.join(" | ");
    let call = match format {
        ToolCallFormat::Hermes => {
            let (open, close) = (mark("<tool_call>"), mark("</tool_call>"));
            format!("{open} \"\\n\" ({any}) \"\\n\" {close}")
        }
        ToolCallFormat::Llama3 | ToolCallFormat::Mistral => any,
    };
    let mut grammar = format!("start: {start}\ncall: {call}\n");
    for (name, function) in names.iter().zip(callable) {
        let object = json_schema(FIELD, object(function, key))?;
        grammar.push_str(&format!("{name}: %json {}\n", object.text()));
    }
    Ok(Constraint::Grammar(grammar.into()))
}

/// The schema of a call's object. Definitions that the parameters refer to stay at its root.
fn object(function: &Value, key: &str) -> Value {
    let mut parameters = function["parameters"].clone();
    if parameters.is_null() {
        parameters = json!({"type": "object"});
    }
    let mut schema = json!({
        "type": "object",
        "properties": {"name": {"const": function["name"]}},
        "required": ["name", key],
        "additionalProperties": false,
    });
    for definitions in ["$defs", "definitions"] {
        if let Some(moved) = parameters.as_object_mut().and_then(|map| map.shift_remove(definitions)) {
            schema[definitions] = moved;
        }
    }
    schema["properties"][key] = parameters;
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: ToolChoice, may_be_parallel: bool) -> OfferedTools {
        let function = |name| json!({"type": "function", "function": {"name": name}});
        OfferedTools {
            definitions: json!([function("f"), function("g")]),
            names: ["f".to_owned(), "g".to_owned()].into(),
            may_be_parallel,
            choice,
        }
    }

    fn lines(format: ToolCallFormat, tools: &OfferedTools) -> Vec<String> {
        let grammar = grammar(format, tools, |mark| json!(mark).to_string()).unwrap();
        grammar.text().lines().map(str::to_owned).collect()
    }

    #[test]
    fn grammars_are_those_of_the_formats() {
        let all = lines(ToolCallFormat::Llama3, &tools(ToolChoice::Required, true));
        assert_eq!(all[..2], ["start: call (\"; \" call){0,15}", "call: tool_0 | tool_1"]);
        assert_eq!(all.len(), 4);
        let one = lines(ToolCallFormat::Hermes, &tools(ToolChoice::Required, false));
        let call = r#"call: "<tool_call>" "\n" (tool_0 | tool_1) "\n" "</tool_call>""#;
        assert_eq!(one[..2], ["start: call", call]);
        let named = lines(ToolCallFormat::Mistral, &tools(ToolChoice::Named("g".to_owned()), true));
        assert_eq!(named[..2], [r#"start: "[TOOL_CALLS]" " [" call "]""#, "call: tool_0"]);
        assert!(named.len() == 3 && named[2].contains(r#""const":"g""#), "{named:?}");
    }

    #[test]
    fn definitions_stay_at_the_root() {
        let parameters =
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}});
        let object = object(&json!({"name": "f", "parameters": parameters}), "arguments");
        assert_eq!(object["$defs"], json!({"A": {"type": "string"}}));
        assert_eq!(
            object["properties"]["arguments"],
            json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}})
        );
    }
}
