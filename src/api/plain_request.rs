//! One prompt with options by name: how every protocol but OpenAI's and `baton.v1` asks for text. The names are those of
//! `/v1/completions`, so an option that is learnt there is known here. How the answer is written is not known here.

use baton_scheduler::ids::{Nanos, TokenId};
use tokio::time::Instant;

use super::ApiState;
use super::adjustments::check_min_tokens;
use super::constraints::{Asked, constrain};
use super::encode::{SpecialTokens, encode};
use super::error::ApiError;
use super::fields::Fields;
use super::metrics::Endpoint;
use super::model_limits::{check_prompt_ids, resolve_max_tokens};
use super::neutral::refuse_unsupported;
use super::options::{CommonOptions, MAX_LOGPROBS};
use super::output::{Job, timeline_from};
use super::request_label::RequestLabel;

/// The prompt, and what the protocol calls it.
#[derive(Clone, Debug)]
pub enum PlainPrompt {
    /// Tokenized with the model's special tokens, unless `add_special_tokens` says otherwise.
    Text(&'static str, String),
    /// Taken as they are.
    Ids(&'static str, Vec<TokenId>),
}

/// What was asked.
#[derive(Debug)]
pub struct PlainRequest {
    /// Where.
    pub endpoint: Endpoint,
    /// The prompt.
    pub prompt: PlainPrompt,
    /// Options, named as in `/v1/completions`.
    pub fields: Fields,
    /// The request's name, if the protocol has a place for it; else the field `request_id` or a fresh one.
    pub label: Option<RequestLabel>,
    /// When it came.
    pub received: Nanos,
    /// When the client gives up.
    pub deadline: Option<Instant>,
    /// Completion length when the client names none; `None` is what the model's length leaves.
    pub default_max_tokens: Option<u32>,
}

/// What was understood.
#[derive(Debug)]
pub struct PlainJob {
    /// Ready to run.
    pub job: Job,
    /// The client wants tokens as they come.
    pub is_streamed: bool,
}

impl PlainRequest {
    /// Checks everything and resolves every default. Not for a thread that others wait for where a constraint is asked for.
    pub fn understand(self, state: &ApiState) -> Result<PlainJob, ApiError> {
        let PlainRequest {
            endpoint,
            prompt,
            mut fields,
            label,
            received,
            deadline,
            default_max_tokens,
        } = self;
        let model = state.model();
        let mut common = CommonOptions::take(&mut fields, model)?;
        if let Some(Asked { field, constraint }) = common.constraint.take() {
            constrain(state, &mut common.sampling, field, constraint)?;
        }
        let n_top = fields.integer("logprobs", 0..=i64::from(MAX_LOGPROBS))?;
        refuse_unsupported(&fields)?;
        let reports = [
            ("return_token_ids", common.return_token_ids),
            ("return_tokens_as_token_ids", common.tokens_as_ids),
            ("timeline", common.timeline),
        ];
        if let Some((name, _)) = reports.into_iter().find(|(_, asked)| *asked) {
            let message = format!("{name} is true, which only /v1/completions and /v1/chat/completions report");
            return Err(ApiError::field(name, message));
        }
        if common.max_tokens == Some(0) {
            return Err(ApiError::expected("max_tokens", 0, "at least 1"));
        }
        let special_tokens = SpecialTokens::asked(common.add_special_tokens, SpecialTokens::Added);
        let cut = common.cut(common.max_tokens, default_max_tokens, model)?;
        let (name, mut prompt_ids) = match prompt {
            PlainPrompt::Text(name, text) => (name, encode(model, name, &text, special_tokens, cut)?),
            PlainPrompt::Ids(name, ids) => (name, ids),
        };
        if let Some(cut) = cut {
            cut.apply(&mut prompt_ids);
        }
        check_prompt_ids(name, &prompt_ids, model)?;
        let mut sampling = common.sampling;
        sampling.max_tokens = resolve_max_tokens(common.max_tokens, default_max_tokens, prompt_ids.len(), model)?;
        check_min_tokens("min_tokens", &sampling)?;
        sampling.logprobs = n_top.map(|n| n as u8);
        sampling.prompt_logprobs = common.prompt_logprobs;
        let job = Job {
            endpoint,
            label: label.or(common.label).unwrap_or_else(RequestLabel::fresh),
            prompt_ids: prompt_ids.into(),
            sampling,
            text: common.text,
            cache_salt: common.cache_salt,
            priority: common.priority,
            objectives: common.objectives,
            deadline,
            timeline: timeline_from(state, received),
        };
        Ok(PlainJob {
            job,
            is_streamed: common.stream.is_some(),
        })
    }
}
