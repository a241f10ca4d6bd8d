//! What fits a model: the length of prompt and completion together, and the ids of a prompt. Knows no other field.

use baton_scheduler::ids::TokenId;

use super::error::ApiError;
use super::served_model::ServedModel;

/// `max_tokens` of a request whose prompt has `n_prompt` tokens, or why it cannot fit. `default` is what the endpoint
/// gives when the client names none; it yields to the model's length.
pub fn resolve_max_tokens(
    asked: Option<u32>,
    default: Option<u32>,
    n_prompt: usize,
    model: &ServedModel,
) -> Result<u32, ApiError> {
    let limit = model.max_model_len;
    let too_long = |n_completion: u32| {
        let total = n_prompt as u64 + u64::from(n_completion);
        ApiError::field(
            if asked.is_some() { "max_tokens" } else { "prompt" },
            format!(
                "{}: this model's maximum context length is {limit} tokens. However, you requested {total} tokens \
                 ({n_prompt} in the prompt, {n_completion} in the completion).",
                asked.map_or("prompt is too long".to_owned(), |asked| format!(
                    "max_tokens is {asked}"
                )),
            ),
        )
    };
    let left = u64::from(limit).saturating_sub(n_prompt as u64);
    match asked {
        Some(asked) if u64::from(asked) > left => Err(too_long(asked)),
        Some(asked) => Ok(asked),
        None if left == 0 => Err(too_long(1)),
        None => Ok(default.unwrap_or(u32::MAX).min(left as u32)),
    }
}

/// Refuses ids the model has no embedding for, and empty prompts.
pub fn check_prompt_ids(field: &'static str, ids: &[TokenId], model: &ServedModel) -> Result<(), ApiError> {
    if ids.is_empty() {
        return Err(ApiError::expected(field, "empty", "at least one token"));
    }
    match ids.iter().position(|id| *id >= model.vocab_size) {
        None => Ok(()),
        Some(idx) => {
            let message = format!(
                "{field} has token id {} at position {idx}, expected ids below the vocabulary size {}",
                ids[idx], model.vocab_size
            );
            Err(ApiError::field(field, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ServedModel {
        ServedModel {
            names: vec!["m".into()],
            root: "/models/m".into(),
            folder: None,
            tokenizer: None,
            chat_template: None,
            eos_token_ids: vec![2],
            default_sampling: super::super::DefaultSampling::default(),
            max_model_len: 100,
            vocab_size: 64,
            hidden_size: 4,
            dtype: "f32".into(),
            parsers: super::super::OutputParsers::default(),
        }
    }

    #[test]
    fn the_context_length_is_kept() {
        let model = model();
        let resolve = |asked, default, n| resolve_max_tokens(asked, default, n, &model);
        assert_eq!(resolve(Some(90), None, 10), Ok(90));
        assert_eq!(resolve(None, None, 10), Ok(90));
        assert_eq!(resolve(None, Some(16), 10), Ok(16));
        assert_eq!(resolve(None, Some(16), 95), Ok(5));
        let error = resolve(Some(91), None, 10).unwrap_err();
        assert!(
            error.message.contains("100 tokens") && error.message.contains("101 tokens"),
            "{error}"
        );
        assert!(resolve(None, Some(16), 100).is_err());
        assert!(resolve(Some(u32::MAX), None, usize::MAX / 2).is_err());
    }

    #[test]
    fn prompts_are_not_empty_and_inside_the_vocabulary() {
        assert!(check_prompt_ids("prompt", &[], &model()).is_err());
        assert!(check_prompt_ids("prompt", &[0, 63], &model()).is_ok());
        let error = check_prompt_ids("prompt", &[0, 64], &model()).unwrap_err();
        assert_eq!(
            error.message,
            "prompt has token id 64 at position 1, expected ids below the vocabulary size 64"
        );
    }
}
