//! What the text of an output must be: `response_format`, `structured_outputs` and the older `guided_*` fields, resolved to
//! one [`Constraint`] and compiled once here, so that a wrong one is refused by the field it came in. Instances compile the
//! same bytes again; nothing is matched here.

use baton_scheduler::request::{Constraint, SamplingParams};
use serde_json::{Map, Value, json};

use super::ApiState;
use super::error::ApiError;
use super::fields::{Fields, kind_of, shown};
use super::served_model::ServedModel;
use super::structural_tags;

/// Most texts of a choice.
pub const MAX_CHOICE_TEXTS: usize = 1024;

/// Whitespace of a JSON text wherever JSON has it optional: none, a space, or up to two line ends and an indentation. It is
/// bounded so that no model can go on with it for ever; the bounds are those of llama.cpp's JSON grammars.
const JSON_WHITESPACE: &str = r"(?:\x20|\n{1,2}[ \t]{0,20})";

/// A constraint and the field it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// For errors.
    pub field: &'static str,
    /// What was asked for.
    pub constraint: Constraint,
}

/// Sets a constraint, after compiling it as an instance will. A constrained text ends where it is complete, whatever the
/// request says of ends of sequence.
///
/// # Errors
/// What is wrong with the constraint, naming `field`.
pub fn constrain(
    state: &ApiState,
    sampling: &mut SamplingParams,
    field: &'static str,
    constraint: Constraint,
) -> Result<(), ApiError> {
    let compiled = state.constraints().compile(&constraint);
    compiled.map_err(|error| ApiError::field(field, format!("{field}: {error}")))?;
    sampling.stop_token_ids.extend(&state.model().eos_token_ids);
    sampling.stop_token_ids.sort_unstable();
    sampling.stop_token_ids.dedup();
    sampling.constraint = Some(constraint);
    Ok(())
}

/// JSON documents that are valid against `schema`, with bounded whitespace unless `schema` says otherwise (`x-guidance`).
///
/// # Errors
/// A schema that is no object.
pub fn json_schema(field: &'static str, schema: Value) -> Result<Constraint, ApiError> {
    let style = JsonStyle {
        whitespace: Whitespace::Bounded,
        other_properties: OtherProperties::Allowed,
    };
    json_schema_with(field, schema, style)
}

/// Whitespace between the tokens of JSON.
#[derive(Clone, Debug, PartialEq)]
enum Whitespace {
    Bounded,
    None,
    Pattern(String),
}

/// Whether objects whose schema does not say so may have properties that it does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OtherProperties {
    Allowed,
    Forbidden,
}

/// How JSON is to be written.
#[derive(Clone, Debug, PartialEq)]
struct JsonStyle {
    whitespace: Whitespace,
    other_properties: OtherProperties,
}

/// Forbids other properties wherever `schema` names some and says nothing of others.
fn forbid_other_properties(schema: &mut Value) {
    const MAPS: [&str; 6] = [
        "properties",
        "patternProperties",
        "$defs",
        "definitions",
        "dependentSchemas",
        "dependencies",
    ];
    const SCHEMAS: [&str; 16] = [
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "contains",
        "additionalItems",
        "unevaluatedItems",
        "not",
        "if",
        "then",
        "else",
        "contentSchema",
        "items",
        "prefixItems",
        "allOf",
        "anyOf",
        "oneOf",
    ];
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(forbid_other_properties),
        Value::Object(schema) => {
            for (name, inner) in schema.iter_mut() {
                match inner {
                    Value::Object(named) if MAPS.contains(&name.as_str()) => {
                        named.values_mut().for_each(forbid_other_properties);
                    }
                    inner if SCHEMAS.contains(&name.as_str()) => forbid_other_properties(inner),
                    _ => {}
                }
            }
            if ["properties", "patternProperties"]
                .iter()
                .any(|name| schema.get(*name).is_some_and(Value::is_object))
            {
                schema.entry("additionalProperties").or_insert(Value::Bool(false));
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn json_schema_with(field: &'static str, mut schema: Value, style: JsonStyle) -> Result<Constraint, ApiError> {
    let JsonStyle {
        whitespace,
        other_properties,
    } = style;
    match other_properties {
        OtherProperties::Allowed => {}
        OtherProperties::Forbidden => forbid_other_properties(&mut schema),
    }
    let Value::Object(mut schema) = schema else {
        let found = kind_of(&schema);
        return Err(ApiError::expected(field, found, "a JSON Schema, which is an object"));
    };
    let options = match whitespace {
        Whitespace::Bounded => json!({ "whitespace_pattern": JSON_WHITESPACE }),
        Whitespace::None => json!({ "whitespace_flexible": false }),
        Whitespace::Pattern(pattern) => json!({ "whitespace_pattern": pattern }),
    };
    // The library's own options, where the client set some.
    let own = schema.entry("x-guidance").or_insert_with(|| json!({}));
    let Value::Object(own) = own else {
        return Err(ApiError::expected(field, kind_of(own), "x-guidance to be an object"));
    };
    let is_set = ["whitespace_pattern", "whitespace_flexible"]
        .iter()
        .any(|name| own.contains_key(*name));
    if let (Value::Object(options), false) = (options, is_set) {
        own.extend(options);
    }
    Ok(Constraint::JsonSchema(Value::Object(schema).to_string().into()))
}

/// One of `texts`.
///
/// # Errors
/// No texts, too many, or an empty one.
pub fn choice(field: &'static str, texts: &[String]) -> Result<Constraint, ApiError> {
    if texts.is_empty() || texts.len() > MAX_CHOICE_TEXTS {
        let found = format!("an array of {}", texts.len());
        return Err(ApiError::expected(
            field,
            found,
            format!("1 to {MAX_CHOICE_TEXTS} strings"),
        ));
    }
    if texts.iter().any(String::is_empty) {
        return Err(ApiError::expected(
            field,
            "an empty string",
            "strings that are not empty",
        ));
    }
    let mut regex = String::new();
    for text in texts {
        if !regex.is_empty() {
            regex.push('|');
        }
        for character in text.chars() {
            if r"\.+*?()|[]{}^$#&-~".contains(character) {
                regex.push('\\');
            }
            regex.push(character);
        }
    }
    Ok(Constraint::Regex(regex.into()))
}

/// Takes the fields out of a JSON request; `None` when none asks for anything.
///
/// # Errors
/// A wrong value, or two constraints.
pub fn take(fields: &mut Fields, model: &ServedModel) -> Result<Option<Asked>, ApiError> {
    let mut asked: Vec<Asked> = Vec::new();
    asked.extend(response_format(fields, model)?);
    asked.extend(structured_outputs(fields, model)?);
    let pattern = fields.string("guided_whitespace_pattern")?;
    let style = JsonStyle {
        whitespace: pattern.map_or(Whitespace::Bounded, Whitespace::Pattern),
        other_properties: OtherProperties::Allowed,
    };
    asked.extend(guided(fields, &GUIDED, style)?);
    if let [first, second, ..] = asked.as_slice() {
        let (first, second) = (first.field, second.field);
        let message = format!("{second} and {first} are both set, expected one constraint");
        return Err(ApiError::field(second, message));
    }
    Ok(asked.pop())
}

fn response_format(fields: &mut Fields, model: &ServedModel) -> Result<Option<Asked>, ApiError> {
    const FIELD: &str = "response_format";
    let Some(mut format) = fields.object(FIELD)? else {
        return Ok(None);
    };
    let kind = format.string("type")?;
    let constraint = match kind.as_deref() {
        Some("text") => return Ok(None),
        Some("json_object") => json_schema(FIELD, json!({ "type": "object" }))?,
        Some("json_schema") => {
            let named = format.object("json_schema")?;
            let schema = named.and_then(|mut named| named.take("schema"));
            let schema = schema.ok_or_else(|| {
                ApiError::expected(FIELD, "without json_schema.schema", "a schema for type json_schema")
            })?;
            json_schema(FIELD, schema)?
        }
        Some("structural_tag") => {
            let tag = Value::Object(format.into_inner());
            structural_tags::constraint(FIELD, &tag, model.tokenizer.as_ref())?
        }
        other => {
            let found = other.map_or("without type".to_owned(), |kind| {
                format!("of type {}", shown(&Value::from(kind)))
            });
            let expected = "type text, json_object, json_schema or structural_tag";
            return Err(ApiError::expected(FIELD, found, expected));
        }
    };
    Ok(Some(Asked {
        field: FIELD,
        constraint,
    }))
}

/// How a family of fields names its constraints.
struct Names {
    json: &'static str,
    json_object: &'static str,
    regex: &'static str,
    choice: &'static str,
    grammar: &'static str,
}

const GUIDED: Names = Names {
    json: "guided_json",
    json_object: "guided_json_object",
    regex: "guided_regex",
    choice: "guided_choice",
    grammar: "guided_grammar",
};

const STRUCTURED: Names = Names {
    json: "json",
    json_object: "json_object",
    regex: "regex",
    choice: "choice",
    grammar: "grammar",
};

fn structured_outputs(fields: &mut Fields, model: &ServedModel) -> Result<Option<Asked>, ApiError> {
    const FIELD: &str = "structured_outputs";
    let Some(mut inner) = fields.object(FIELD)? else {
        return Ok(None);
    };
    let within = |error: ApiError| ApiError {
        message: format!("{FIELD}.{}", error.message),
        param: Some(FIELD.into()),
        ..error
    };
    let compact = inner
        .boolean("disable_any_whitespace")
        .map_err(within)?
        .unwrap_or(false);
    let pattern = inner.string("whitespace_pattern").map_err(within)?;
    let whitespace = match (pattern, compact) {
        (Some(pattern), _) => Whitespace::Pattern(pattern),
        (None, true) => Whitespace::None,
        (None, false) => Whitespace::Bounded,
    };
    let other_properties = match inner.boolean("disable_additional_properties").map_err(within)? {
        Some(true) => OtherProperties::Forbidden,
        Some(false) | None => OtherProperties::Allowed,
    };
    let style = JsonStyle {
        whitespace,
        other_properties,
    };
    let mut asked = guided(&mut inner, &STRUCTURED, style).map_err(within)?;
    if let Some(tag) = inner.take(STRUCTURAL_TAG) {
        let constraint = structural_tag(tag, model).map_err(within)?;
        let field = STRUCTURAL_TAG;
        asked.push(Asked { field, constraint });
    }
    let mut asked = asked.into_iter();
    let first = asked.next();
    if let (Some(first), Some(second)) = (&first, asked.next()) {
        let message = format!(
            "{FIELD}.{} and {FIELD}.{} are both set, expected one",
            second.field, first.field
        );
        return Err(ApiError::field(FIELD, message));
    }
    let is_off = |value: &Value| value.is_null() || *value == Value::Bool(false);
    if let Some((name, _)) = inner.rest().find(|(_, value)| !is_off(value)) {
        let message = format!("{FIELD}.{name} is not supported here; leave it out");
        return Err(ApiError::field(FIELD, message));
    }
    Ok(first.map(|asked| Asked { field: FIELD, ..asked }))
}

const STRUCTURAL_TAG: &str = "structural_tag";

/// vLLM has the object as text.
fn structural_tag(tag: Value, model: &ServedModel) -> Result<Constraint, ApiError> {
    let tag = match tag {
        Value::String(text) => serde_json::from_str(&text).map_err(|error| {
            let message = format!("{STRUCTURAL_TAG} is not valid JSON: {error}");
            ApiError::field(STRUCTURAL_TAG, message)
        })?,
        tag => tag,
    };
    structural_tags::constraint(STRUCTURAL_TAG, &tag, model.tokenizer.as_ref())
}

/// The constraints that a family of fields asks for.
fn guided(fields: &mut Fields, names: &Names, style: JsonStyle) -> Result<Vec<Asked>, ApiError> {
    let mut asked = Vec::new();
    let mut ask = |field, constraint| asked.push(Asked { field, constraint });
    match fields.take(names.json) {
        None => {}
        // vLLM takes the schema as text too.
        Some(Value::String(text)) => {
            let schema = serde_json::from_str(&text).map_err(|error| {
                let message = format!("{} is not valid JSON: {error}", names.json);
                ApiError::field(names.json, message)
            })?;
            ask(names.json, json_schema_with(names.json, schema, style.clone())?);
        }
        Some(schema) => ask(names.json, json_schema_with(names.json, schema, style.clone())?),
    }
    if fields.boolean(names.json_object)?.unwrap_or(false) {
        let any_object = Value::Object(Map::from_iter([("type".to_owned(), json!("object"))]));
        ask(
            names.json_object,
            json_schema_with(names.json_object, any_object, style)?,
        );
    }
    if let Some(regex) = fields.string(names.regex)? {
        ask(names.regex, Constraint::Regex(regex.into()));
    }
    if let Some(values) = fields.array(names.choice, "an array of strings")? {
        let texts = values.into_iter().map(|value| match value {
            Value::String(text) => Ok(text),
            other => Err(ApiError::expected(names.choice, shown(&other), "an array of strings")),
        });
        ask(
            names.choice,
            choice(names.choice, &texts.collect::<Result<Vec<_>, _>>()?)?,
        );
    }
    if let Some(grammar) = fields.string(names.grammar)? {
        ask(names.grammar, Constraint::Grammar(grammar.into()));
    }
    Ok(asked)
}
