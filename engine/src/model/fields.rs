//! Typed access to the fields of a JSON object, with errors that name file, field, expected and found. No model knowledge.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::ModelError;

/// A JSON object of a file, or one nested in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a> {
    file: &'a Path,
    prefix: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: &'a Path, value: &'a Value) -> Result<Fields<'a>, ModelError> {
        let object = value.as_object().ok_or_else(|| {
            ModelError::malformed(file, format_args!("expected a JSON object, found {}", brief(value)))
        })?;
        Ok(Fields {
            file,
            prefix: "",
            object,
        })
    }

    /// The value, unless absent or null: the two mean the same in every configuration read here.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// The first of several spellings that is present.
    pub(crate) fn spelling(&self, fields: &[&'static str]) -> Option<&'static str> {
        fields.iter().copied().find(|field| self.get(field).is_some())
    }

    pub(crate) fn object(&self, field: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields {
                file: self.file,
                prefix: field,
                object,
            })),
            Some(other) => Err(self.wrong(field, "an object", brief(other))),
        }
    }

    pub(crate) fn size(&self, field: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=max).contains(&size) => Ok(Some(size)),
            _ => Err(self.wrong(field, format_args!("an integer from 1 to {max}"), brief(value))),
        }
    }

    pub(crate) fn required_size(&self, field: &str, max: usize) -> Result<usize, ModelError> {
        self.size(field, max)?
            .ok_or_else(|| self.wrong(field, format_args!("an integer from 1 to {max}"), "nothing"))
    }

    pub(crate) fn float(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|float| float.is_finite()) {
            Some(float) => Ok(Some(float)),
            None => Err(self.wrong(field, "a finite number", brief(value))),
        }
    }

    pub(crate) fn positive_float(&self, field: &str) -> Result<Option<f64>, ModelError> {
        match self.float(field)? {
            Some(float) if float <= 0.0 => Err(self.wrong(field, "a number above 0", float)),
            other => Ok(other),
        }
    }

    pub(crate) fn required_positive_float(&self, field: &str) -> Result<f64, ModelError> {
        self.positive_float(field)?
            .ok_or_else(|| self.wrong(field, "a number above 0", "nothing"))
    }

    /// A list of numbers above 0.
    pub(crate) fn positive_floats(&self, field: &str) -> Result<Vec<f64>, ModelError> {
        let wrong = |found: String| Err(self.wrong(field, "a list of numbers above 0", found));
        let Some(value) = self.get(field) else {
            return wrong("nothing".to_owned());
        };
        let floats: Option<Vec<f64>> = value
            .as_array()
            .and_then(|values| values.iter().map(Value::as_f64).collect());
        match floats.filter(|floats| floats.iter().all(|float| float.is_finite() && *float > 0.0)) {
            Some(floats) => Ok(floats),
            None => wrong(brief(value)),
        }
    }

    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(boolean)) => Ok(Some(*boolean)),
            Some(other) => Err(self.wrong(field, "true or false", brief(other))),
        }
    }

    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(string)) => Ok(Some(string)),
            Some(other) => Err(self.wrong(field, "a string", brief(other))),
        }
    }

    /// One id or a list of ids.
    pub(crate) fn ids(&self, field: &str) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(values) => values.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        };
        ids.map(Some)
            .ok_or_else(|| self.wrong(field, "a token id or a list of them", brief(value)))
    }

    pub(crate) fn wrong(
        &self,
        field: &str,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> ModelError {
        let field = if self.prefix.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.prefix)
        };
        ModelError::Field {
            file: PathBuf::from(self.file),
            field,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// A value on one line, cut where long.
pub(crate) fn brief(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}
