//! The `prompt` of a completions request, or the `input` of an embeddings request, in its four forms: a text, texts, token ids, or lists of token ids.

use baton_scheduler::ids::TokenId;
use serde_json::Value;

use super::encode::{SpecialTokens, encode, text_of};
use super::error::ApiError;
use super::fields::{Fields, kind_of, token_id};
use super::model_limits::check_prompt_ids;
use super::served_model::ServedModel;
use super::truncation::Cut;

/// One prompt. Nothing is added to ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompletionPrompt {
    /// To be tokenized.
    Text(String),
    /// As they are.
    Ids(Vec<TokenId>),
}

impl CompletionPrompt {
    /// Takes `prompt`: 1 to `max_prompts` of them.
    pub fn take(fields: &mut Fields, max_prompts: usize) -> Result<Vec<CompletionPrompt>, ApiError> {
        CompletionPrompt::take_named(fields, "prompt", max_prompts)
    }

    /// Takes what the endpoint calls `name`.
    pub fn take_named(
        fields: &mut Fields,
        name: &'static str,
        max_prompts: usize,
    ) -> Result<Vec<CompletionPrompt>, ApiError> {
        const EXPECTED: &str = "a string, an array of strings, an array of token ids, or an array of those";
        let prompts = match fields.take(name) {
            None => return Err(ApiError::expected(name, "missing", EXPECTED)),
            Some(Value::String(text)) => vec![CompletionPrompt::Text(text)],
            Some(Value::Array(values)) => match values.first() {
                None => return Err(ApiError::expected(name, "an empty array", EXPECTED)),
                Some(Value::Number(_)) => vec![CompletionPrompt::Ids(ids(name, None, &values)?)],
                Some(Value::String(_) | Value::Array(_)) => values
                    .into_iter()
                    .enumerate()
                    .map(|(idx, value)| one(name, idx, value))
                    .collect::<Result<_, _>>()?,
                Some(other) => {
                    return Err(ApiError::field(
                        name,
                        format!("{name}[0] is {}, expected {EXPECTED}", kind_of(other)),
                    ));
                }
            },
            Some(other) => return Err(ApiError::expected(name, kind_of(&other), EXPECTED)),
        };
        if prompts.len() > max_prompts {
            let found = format!("an array of {} {name}s", prompts.len());
            return Err(ApiError::expected(name, found, format!("at most {max_prompts}")));
        }
        Ok(prompts)
    }

    /// Its ids, or what `cut` leaves of them, checked against the model. The endpoint calls them `name`.
    pub fn ids(
        &self,
        name: &'static str,
        model: &ServedModel,
        special_tokens: SpecialTokens,
        cut: Option<Cut>,
    ) -> Result<Vec<TokenId>, ApiError> {
        let ids = match self {
            CompletionPrompt::Text(text) => encode(model, name, text, special_tokens, cut)?,
            CompletionPrompt::Ids(ids) => {
                let mut ids = ids.clone();
                if let Some(cut) = cut {
                    cut.apply(&mut ids);
                }
                ids
            }
        };
        check_prompt_ids(name, &ids, model)?;
        Ok(ids)
    }

    /// Its text, for `echo`: as it came, or that of `ids` where it came as ids or was cut.
    pub fn text(&self, model: &ServedModel, ids: &[TokenId], cut: Option<Cut>) -> String {
        match (self, cut) {
            (CompletionPrompt::Text(text), None) => text.clone(),
            (CompletionPrompt::Text(_), Some(_)) | (CompletionPrompt::Ids(_), _) => text_of(model, ids),
        }
    }
}

fn one(name: &'static str, idx: usize, value: Value) -> Result<CompletionPrompt, ApiError> {
    match value {
        Value::String(text) => Ok(CompletionPrompt::Text(text)),
        Value::Array(values) => ids(name, Some(idx), &values).map(CompletionPrompt::Ids),
        other => {
            let found = kind_of(&other);
            Err(ApiError::field(
                name,
                format!("{name}[{idx}] is {found}, expected a string or an array of token ids"),
            ))
        }
    }
}

fn ids(name: &'static str, prompt_idx: Option<usize>, values: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    let ids = values
        .iter()
        .enumerate()
        .map(|(idx, value)| token_id(name, idx, value))
        .collect();
    match prompt_idx {
        None => ids,
        Some(prompt_idx) => ids.map_err(|error: ApiError| {
            let message = format!("in {name}[{prompt_idx}]: {}", error.message);
            ApiError { message, ..error }
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(json: &str) -> Result<Vec<CompletionPrompt>, ApiError> {
        CompletionPrompt::take(&mut Fields::parse(json.as_bytes()).unwrap(), 3)
    }

    #[test]
    fn the_four_forms() {
        use CompletionPrompt::{Ids, Text};
        let cases = [
            (r#"{"prompt": "a"}"#, vec![Text("a".into())]),
            (r#"{"prompt": ["a", "b"]}"#, vec![Text("a".into()), Text("b".into())]),
            (r#"{"prompt": [1, 2]}"#, vec![Ids(vec![1, 2])]),
            (
                r#"{"prompt": [[1], [2, 3], "x"]}"#,
                vec![Ids(vec![1]), Ids(vec![2, 3]), Text("x".into())],
            ),
        ];
        for (json, expected) in cases {
            assert_eq!(take(json), Ok(expected), "{json}");
        }
    }

    #[test]
    fn wrong_prompts_are_refused() {
        let cases = [
            (r#"{}"#, "prompt is missing"),
            (r#"{"prompt": []}"#, "prompt is an empty array"),
            (r#"{"prompt": 5}"#, "prompt is a number"),
            (r#"{"prompt": {}}"#, "prompt is an object"),
            (r#"{"prompt": [true]}"#, "prompt[0] is a boolean"),
            (r#"{"prompt": ["a", 1]}"#, "prompt[1] is a number"),
            (r#"{"prompt": [1, "a"]}"#, "prompt[1] is \"a\""),
            (r#"{"prompt": [1, -1]}"#, "prompt[1] is -1"),
            (r#"{"prompt": [1, 0.5]}"#, "prompt[1] is 0.5"),
            (r#"{"prompt": [1, 4294967296]}"#, "prompt[1] is 4294967296"),
            (r#"{"prompt": [[1], [2, null]]}"#, "in prompt[1]: prompt[1] is null"),
            (
                r#"{"prompt": ["a", "b", "c", "d"]}"#,
                "an array of 4 prompts, expected at most 3",
            ),
        ];
        for (json, expected) in cases {
            let error = take(json).expect_err(json);
            assert!(error.message.contains(expected), "{json}: {error}");
            assert_eq!(error.param.as_deref(), Some("prompt"));
        }
    }
}
