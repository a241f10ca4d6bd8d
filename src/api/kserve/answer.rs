//! Outputs of a request in the words of the Open Inference Protocol: whole, or piece by piece.

use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::{InferParameter, ModelInferResponse};

use super::super::ApiState;
use super::super::error::{ApiError, ErrorKind};
use super::super::logprobs::{RankedLogprobs, TokenWriter, ranked};
use super::super::output::{FinishReason, Job, Output, OutputStream, OutputToken};
use super::outputs::OutputKind;
use super::query::{Shape, VERSION};
use super::tensors::{self, Elements};

/// The parameter that marks the last response of a request, as Triton's clients expect it.
const FINAL_RESPONSE: &str = "triton_final_response";

/// Part of an answer, or all of it: one entry for each choice.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub(super) choices: Vec<ChoicePiece>,
    /// Tokens of the prompt.
    n_input_tokens: u32,
}

/// What is new of a choice, and how it stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ChoicePiece {
    pub(super) text: String,
    /// `None` while the choice goes on.
    pub(super) reason: Option<FinishReason>,
    n_tokens: u32,
    logprobs: Vec<RankedLogprobs>,
    /// Of all its tokens so far.
    cumulative_logprob: f32,
}

impl ChoicePiece {
    /// What is new since the last time.
    fn take(&mut self) -> ChoicePiece {
        ChoicePiece {
            text: std::mem::take(&mut self.text),
            n_tokens: std::mem::take(&mut self.n_tokens),
            logprobs: std::mem::take(&mut self.logprobs),
            ..*self
        }
    }
}

impl Piece {
    pub(super) fn is_last(&self) -> bool {
        self.choices.iter().all(|choice| choice.reason.is_some())
    }

    /// The outputs that are wanted, in the order of the names.
    fn outputs(mut self, shape: &Shape) -> Vec<(&'static str, Elements)> {
        let choices = &mut self.choices;
        let elements = |output: &OutputKind| match output {
            OutputKind::Text => Elements::Texts(
                choices
                    .iter_mut()
                    .map(|choice| std::mem::take(&mut choice.text))
                    .collect(),
            ),
            // Empty while a choice goes on.
            OutputKind::FinishReason => {
                let text = |choice: &ChoicePiece| choice.reason.map_or("", FinishReason::as_str).to_owned();
                Elements::Texts(choices.iter().map(text).collect())
            }
            OutputKind::CumulativeLogprob => {
                Elements::Floats(choices.iter().map(|choice| choice.cumulative_logprob).collect())
            }
            OutputKind::Logprobs => {
                let text = |choice: &ChoicePiece| serde_json::to_string(&choice.logprobs).expect("numbers and text");
                Elements::Texts(choices.iter().map(text).collect())
            }
            OutputKind::NumInputTokens => Elements::Counts(vec![self.n_input_tokens]),
            OutputKind::NumOutputTokens => Elements::Counts(choices.iter().map(|choice| choice.n_tokens).collect()),
        };
        let names = shape.outputs.iter().map(|output| output.name());
        names
            .zip(shape.outputs.iter().map(elements).collect::<Vec<_>>())
            .collect()
    }

    /// As a gRPC response.
    pub(super) fn into_response(self, shape: &Shape) -> ModelInferResponse {
        let is_last = ParameterChoice::BoolParam(self.is_last());
        let parameter = InferParameter {
            parameter_choice: Some(is_last),
        };
        let outputs = self.outputs(shape).into_iter();
        let mut outputs: Vec<_> = outputs.map(|(name, elements)| elements.into_output(name)).collect();
        let raw_output_contents = match shape.is_raw {
            true => tensors::to_raw(&mut outputs),
            false => Vec::new(),
        };
        ModelInferResponse {
            model_name: shape.model_name.to_string(),
            model_version: VERSION.to_owned(),
            id: shape.id.clone(),
            parameters: [(FINAL_RESPONSE.to_owned(), parameter)].into(),
            outputs,
            raw_output_contents,
        }
    }

    /// As the body of `generate`.
    pub(super) fn into_json(self, shape: &Shape) -> serde_json::Value {
        let mut body = serde_json::Map::new();
        if !shape.id.is_empty() {
            body.insert("id".to_owned(), shape.id.as_str().into());
        }
        body.insert("model_name".to_owned(), (*shape.model_name).into());
        body.insert("model_version".to_owned(), VERSION.into());
        let outputs = self.outputs(shape).into_iter();
        body.extend(outputs.map(|(name, elements)| (name.to_owned(), elements.into_json())));
        body.into()
    }
}

/// The pieces of one running request. Dropping it cancels the request.
#[derive(Debug)]
pub(super) struct Pieces {
    state: ApiState,
    output: OutputStream,
    is_streamed: bool,
    /// Alternatives of each token in `logprobs`.
    n_top: u8,
    /// What has not been given out: everything of a whole answer, of a stream the last token of each choice.
    kept: Piece,
}

impl Pieces {
    pub(super) async fn start(state: &ApiState, job: Job, shape: &Shape) -> Result<Pieces, ApiError> {
        let choice = ChoicePiece {
            text: shape.prefix.clone(),
            ..ChoicePiece::default()
        };
        let kept = Piece {
            choices: vec![choice; job.sampling.n as usize],
            n_input_tokens: job.prompt_ids.len() as u32,
        };
        Ok(Pieces {
            state: state.clone(),
            n_top: job.sampling.logprobs.unwrap_or(0),
            output: OutputStream::start(state, job).await?,
            is_streamed: shape.is_streamed,
            kept,
        })
    }

    /// The next piece; `None` after the last or an error. In a stream there is one for each token of any choice.
    pub(super) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        loop {
            match self.output.next().await? {
                Ok(Output::PromptLogprobs(_)) => {}
                Ok(Output::Token { choice, token }) => {
                    self.token(choice, &token);
                    // The last token waits for the reason of the end, so that there is one response for each token.
                    if self.is_streamed && !token.is_last {
                        return Some(Ok(self.take()));
                    }
                }
                Ok(Output::ChoiceEnded { choice, end }) => {
                    let kept = &mut self.kept.choices[choice as usize];
                    kept.text.push_str(&end.text);
                    kept.reason = Some(end.reason);
                    // The last end of all comes with the end of the request.
                    if self.is_streamed && !self.kept.is_last() {
                        return Some(Ok(self.take()));
                    }
                }
                Ok(Output::Finished(_)) => return Some(Ok(self.take())),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    fn token(&mut self, choice: u32, OutputToken { token, text, .. }: &OutputToken) {
        let kept = &mut self.kept.choices[choice as usize];
        kept.text.push_str(text);
        kept.n_tokens += 1;
        if let Some(logprobs) = &token.logprobs {
            let writer = TokenWriter::new(&self.state, false);
            kept.cumulative_logprob += logprobs.logprob;
            kept.logprobs.push(ranked(writer, token.id, logprobs, self.n_top));
        }
    }

    fn take(&mut self) -> Piece {
        Piece {
            choices: self.kept.choices.iter_mut().map(ChoicePiece::take).collect(),
            n_input_tokens: self.kept.n_input_tokens,
        }
    }

    /// All of it, for requests that are not streamed.
    pub(super) async fn whole(mut self) -> Result<Piece, ApiError> {
        assert!(!self.is_streamed, "a stream has many pieces");
        let whole = self.next().await;
        whole.unwrap_or_else(|| {
            Err(ApiError::new(
                ErrorKind::Internal,
                "the request ended without an answer",
            ))
        })
    }
}
