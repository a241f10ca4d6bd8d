//! The JSON object of a request, field by field: each known field is taken out with its type and range checked, so that
//! what is left can be judged by name. `null` means absent. No defaults, no meaning.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A request body on its way to being understood.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a body. Refuses what is not one JSON object; nesting is bounded by the parser (128 levels).
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        // The parser's message has a position and a category, never a piece of the text.
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| ApiError::field("body", format!("the body is not valid JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Fields { map }),
            other => Err(ApiError::expected("body", kind_of(&other), "a JSON object")),
        }
    }

    /// The fields of an object that was put together here.
    pub fn new(map: Map<String, Value>) -> Fields {
        Fields { map }
    }

    /// Takes a field of any type; `None` when absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        tests::note(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a boolean.
    pub fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::expected(name, shown(&other), "a boolean")),
        }
    }

    /// Takes an integer within `range`; a float without a fraction counts as one.
    pub fn integer(&mut self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match as_integer(&value).filter(|integer| range.contains(integer)) {
            Some(integer) => Ok(Some(integer)),
            None => Err(ApiError::expected(name, shown(&value), integers(&range))),
        }
    }

    /// Takes a number that `accept` accepts, as f32; `expected` says what that is.
    pub fn number(
        &mut self,
        name: &'static str,
        accept: impl Fn(f32) -> bool,
        expected: &str,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // A number beyond f32 becomes infinite here, and `is_finite` refuses it.
        match value
            .as_f64()
            .map(|number| number as f32)
            .filter(|number| number.is_finite() && accept(*number))
        {
            Some(number) => Ok(Some(number)),
            None => Err(ApiError::expected(name, shown(&value), expected)),
        }
    }

    /// Takes a string.
    pub fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::expected(name, shown(&other), "a string")),
        }
    }

    /// Takes an object.
    pub fn object(&mut self, name: &'static str) -> Result<Option<Fields>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map })),
            Some(other) => Err(ApiError::expected(name, shown(&other), "an object")),
        }
    }

    /// Takes an array.
    pub fn array(&mut self, name: &'static str, expected: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(ApiError::expected(name, shown(&other), expected)),
        }
    }

    /// Takes a list of token ids.
    pub fn token_ids(&mut self, name: &'static str) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(values) = self.array(name, "an array of token ids")? else {
            return Ok(None);
        };
        values
            .iter()
            .enumerate()
            .map(|(idx, value)| token_id(name, idx, value))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// Names and values of what has not been taken.
    pub fn rest(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// What has not been taken.
    pub fn into_inner(self) -> Map<String, Value> {
        self.map
    }
}

/// A token id in element `idx` of `name`; a float without a fraction counts as one, as in every integer.
pub fn token_id(name: &'static str, idx: usize, value: &Value) -> Result<u32, ApiError> {
    as_integer(value).and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
        ApiError::field(
            name,
            format!(
                "{name}[{idx}] is {}, expected a token id (0 to {})",
                shown(value),
                u32::MAX
            ),
        )
    })
}

fn as_integer(value: &Value) -> Option<i64> {
    // 2^63 itself is not an i64, so the upper bound is open.
    const TWO_POW_63: f64 = 9_223_372_036_854_775_808.0;
    value.as_i64().or_else(|| {
        let float = value.as_f64()?;
        (value.is_f64() && float.fract() == 0.0 && (-TWO_POW_63..TWO_POW_63).contains(&float)).then_some(float as i64)
    })
}

fn integers(range: &RangeInclusive<i64>) -> String {
    match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => "a 64-bit integer".to_owned(),
        (start, i64::MAX) => format!("an integer, at least {start}"),
        (start, end) => format!("an integer from {start} to {end}"),
    }
}

/// The JSON type of a value.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for an error message: scalars as they are (cut at 64 characters), others by their type.
pub fn shown(value: &Value) -> String {
    const LONGEST: usize = 64;
    match value {
        Value::Bool(_) | Value::Number(_) | Value::Null => value.to_string(),
        Value::String(text) if text.chars().nth(LONGEST).is_none() => value.to_string(),
        Value::String(text) => format!("a string of {} characters", text.chars().count()),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use super::*;

    thread_local! {
        static ASKED_FOR: RefCell<BTreeSet<String>> = RefCell::default();
    }

    pub(super) fn note(name: &str) {
        ASKED_FOR.with_borrow_mut(|names| names.insert(name.to_owned()));
    }

    /// The fields, of any object, that `parse` looks for on this thread.
    pub(in super::super) fn asked_for(parse: impl FnOnce()) -> BTreeSet<String> {
        ASKED_FOR.take();
        parse();
        ASKED_FOR.take()
    }

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn wrong_types_name_field_value_and_expected() {
        let mut fields = fields(r#"{"a": "x", "b": 1, "c": true, "d": 0.5, "e": -1, "f": [1, -2]}"#);
        let said = |error: ApiError| (error.param.unwrap().into_owned(), error.message);
        assert_eq!(
            said(fields.boolean("a").unwrap_err()).1,
            r#"a is "x", expected a boolean"#
        );
        assert_eq!(said(fields.string("b").unwrap_err()).1, "b is 1, expected a string");
        assert_eq!(
            said(fields.integer("c", 0..=5).unwrap_err()).1,
            "c is true, expected an integer from 0 to 5"
        );
        assert_eq!(
            said(fields.integer("d", 0..=5).unwrap_err()).1,
            "d is 0.5, expected an integer from 0 to 5"
        );
        assert_eq!(
            said(fields.integer("e", 1..=i64::MAX).unwrap_err()).1,
            "e is -1, expected an integer, at least 1"
        );
        let (param, message) = said(fields.token_ids("f").unwrap_err());
        assert_eq!(
            (param.as_str(), message.as_str()),
            ("f", "f[1] is -2, expected a token id (0 to 4294967295)")
        );
    }

    #[test]
    fn null_is_absent_and_whole_floats_are_integers() {
        let mut fields = fields(r#"{"a": null, "b": 16.0, "c": 1e300, "d": [1.0, 2]}"#);
        assert_eq!(fields.token_ids("d").unwrap(), Some(vec![1, 2]));
        assert_eq!(fields.boolean("a").unwrap(), None);
        assert_eq!(fields.integer("b", 1..=20).unwrap(), Some(16));
        assert!(fields.integer("c", i64::MIN..=i64::MAX).is_err());
        assert_eq!(fields.rest().count(), 0);
    }

    #[test]
    fn numbers_beyond_f32_are_refused() {
        let mut fields = fields(r#"{"a": 1e39, "b": 0.25}"#);
        assert!(fields.number("a", |_| true, "finite").is_err());
        assert_eq!(fields.number("b", |n| n >= 0.0, "at least 0").unwrap(), Some(0.25));
        assert!(Fields::parse(br#"{"a": 1e400}"#).is_err());
        assert!(Fields::parse(br#"{"a": NaN}"#).is_err());
    }

    #[test]
    fn deep_or_broken_bodies_are_refused_not_followed() {
        let deep = format!("{}{}", r#"{"a":"#.repeat(100_000), "1");
        for body in [
            deep.as_str(),
            &"[".repeat(1_000_000),
            "",
            "[]",
            "3",
            "{",
            "\"x\"",
            "{\"a\":1}}",
            "\u{feff}{}",
        ] {
            assert!(Fields::parse(body.as_bytes()).is_err());
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").is_err());
    }
}
