//! Token counts as the OpenAI API writes them.

use serde::Serialize;

use crate::door::Usage;

/// `usage` of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> UsageBody {
        UsageBody {
            prompt_tokens: usage.n_prompt_tokens,
            completion_tokens: usage.n_completion_tokens,
            total_tokens: usage.n_prompt_tokens + usage.n_completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: usage.n_cached_tokens,
            },
        }
    }
}

/// The counts of several sequences together.
pub fn total(usages: impl IntoIterator<Item = Usage>) -> Usage {
    usages.into_iter().fold(Usage::default(), |sum, usage| Usage {
        n_prompt_tokens: sum.n_prompt_tokens + usage.n_prompt_tokens,
        n_completion_tokens: sum.n_completion_tokens + usage.n_completion_tokens,
        n_cached_tokens: sum.n_cached_tokens + usage.n_cached_tokens,
    })
}
