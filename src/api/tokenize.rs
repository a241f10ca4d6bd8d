//! `POST /tokenize` and `POST /detokenize`: text to ids and back, as a prompt would be read. Nothing is generated.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use baton_scheduler::ids::TokenId;
use serde::Serialize;

use super::ApiState;
use super::call::beside_runtime;
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
}

#[derive(Serialize)]
struct DetokenizeBody {
    prompt: String,
}

pub(super) async fn tokenize(State(state): State<ApiState>, body: Result<Bytes, BytesRejection>) -> Response {
    respond(state, body, |model, mut fields| {
        let asked = fields.boolean("add_special_tokens")?;
        let tokens = match fields.string("prompt")? {
            Some(text) => encode(
                model,
                "prompt",
                &text,
                SpecialTokens::asked(asked, SpecialTokens::Added),
            )?,
            None => {
                let text = ChatPrompt::take(&mut fields)?.render(model)?;
                encode(
                    model,
                    "messages",
                    &text,
                    SpecialTokens::asked(asked, SpecialTokens::AsWritten),
                )?
            }
        };
        Ok(TokenizeBody {
            count: tokens.len(),
            max_model_len: model.max_model_len,
            tokens,
        })
    })
    .await
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
    work: fn(&ServedModel, Fields) -> Result<T, ApiError>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(rejection) => return ApiError::from(rejection).into_response(),
    };
    let worker_state = state.clone();
    let answer = beside_runtime(&state, body.len(), move || {
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
