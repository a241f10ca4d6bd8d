//! `POST /tokenize` and `POST /detokenize`: text to ids and back, as a prompt would be read. Nothing is generated.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use baton_scheduler::ids::TokenId;
use serde::Serialize;

use super::ApiState;
use super::call::{beside_runtime, work_of};
use super::chat_prompt::ChatPrompt;
use super::encode::{SpecialTokens, encode};
use super::error::{ApiError, ErrorKind};
use super::fields::Fields;
use super::served_model::ServedModel;

#[derive(Serialize)]
struct TokenizeBody {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct DetokenizeBody {
    prompt: String,
}

pub(super) async fn tokenize(State(state): State<ApiState>, body: Result<Bytes, BytesRejection>) -> Response {
    let client_templates = state.options().client_chat_templates;
    respond(state, body, move |model, mut fields| {
        let asked = fields.boolean("add_special_tokens")?;
        let returns_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
        let tokens = match fields.string("prompt")? {
            Some(text) => encode(
                model,
                "prompt",
                &text,
                SpecialTokens::asked(asked, SpecialTokens::Added),
                None,
            )?,
            None => {
                let text = ChatPrompt::take(&mut fields, client_templates)?.render(model)?;
                encode(
                    model,
                    "messages",
                    &text,
                    SpecialTokens::asked(asked, SpecialTokens::AsWritten),
                    None,
                )?
            }
        };
        Ok(TokenizeBody {
            count: tokens.len(),
            max_model_len: model.max_model_len,
            token_strs: returns_texts.then(|| token_strs(model, &tokens)),
            tokens,
        })
    })
    .await
}

/// Tokens as the vocabulary writes them (`Ġthe`, `▁the`).
fn token_strs(model: &ServedModel, ids: &[TokenId]) -> Vec<String> {
    let text = |id: &TokenId| {
        model
            .tokenizer
            .as_ref()
            .and_then(|tokenizer| tokenizer.id_to_token(*id))
    };
    ids.iter().map(|id| text(id).unwrap_or_default()).collect()
}

pub(super) async fn detokenize(State(state): State<ApiState>, body: Result<Bytes, BytesRejection>) -> Response {
    respond(state, body, |model, mut fields| {
        let ids = fields.token_ids("tokens")?;
        let ids = ids.ok_or_else(|| ApiError::expected("tokens", "missing", "an array of token ids"))?;
        let Some(tokenizer) = &model.tokenizer else {
            return Err(ApiError::field("tokens", "this model has no tokenizer"));
        };
        let text = tokenizer.decode_with_special_tokens(&ids);
        let prompt =
            text.map_err(|error| ApiError::new(ErrorKind::Internal, format!("detokenization failed: {error}")))?;
        Ok(DetokenizeBody { prompt })
    })
    .await
}

async fn respond<T: Serialize + Send + 'static>(
    state: ApiState,
    body: Result<Bytes, BytesRejection>,
    work: impl FnOnce(&ServedModel, Fields) -> Result<T, ApiError> + Send + 'static,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(rejection) => return ApiError::from(rejection).into_response(),
    };
    let worker_state = state.clone();
    let answer = beside_runtime(&state, work_of(&body), move || {
        let mut fields = Fields::parse(&body)?;
        let model = worker_state.model();
        match fields
            .string("model")?
            .filter(|name| !name.is_empty() && !model.answers_to(name))
        {
            Some(name) => Err(ApiError::unknown_model(&name)),
            None => work(model, fields),
        }
    });
    match answer.await.and_then(|done| done) {
        Ok(body) => Json(body).into_response(),
        Err(error) => error.into_response(),
    }
}
