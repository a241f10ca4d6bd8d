//! Outputs of a request in the words of the Open Inference Protocol: whole, or piece by piece.

use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::{InferParameter, ModelInferResponse};

use super::super::error::{ApiError, ErrorKind};
use super::super::output::{FinishReason, Output, OutputStream};
use super::query::{FINISH_REASON, Shape, TEXT_OUTPUT, VERSION};
use super::tensors;

/// The parameter that marks the last response of a request, as Triton's clients expect it.
const FINAL_RESPONSE: &str = "triton_final_response";

/// Part of an answer, or all of it: one entry for each choice.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) texts: Vec<String>,
    /// `None` while the choice goes on.
    pub(super) reasons: Vec<Option<FinishReason>>,
}

impl Piece {
    fn one(text: String, reason: Option<FinishReason>) -> Piece {
        Piece {
            texts: vec![text],
            reasons: vec![reason],
        }
    }

    pub(super) fn is_last(&self) -> bool {
        self.reasons.iter().all(Option::is_some)
    }

    /// The reasons as text; empty while a choice goes on.
    fn reason_texts(&self) -> Vec<String> {
        let text = |reason: &Option<FinishReason>| reason.map_or("", FinishReason::as_str).to_owned();
        self.reasons.iter().map(text).collect()
    }

    /// As a gRPC response.
    pub(super) fn into_response(self, shape: &Shape) -> ModelInferResponse {
        let is_last = ParameterChoice::BoolParam(self.is_last());
        let parameter = InferParameter {
            parameter_choice: Some(is_last),
        };
        let reasons = self.reason_texts();
        let mut lists = [(TEXT_OUTPUT, self.texts), (FINISH_REASON, reasons)];
        let wanted = lists.iter_mut().filter(|(name, _)| shape.outputs.contains(name));
        let mut outputs: Vec<_> = wanted
            .map(|(name, texts)| tensors::texts_output(name, std::mem::take(texts)))
            .collect();
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

    /// As the body of `generate`: a text, or a list of them where there are several choices.
    pub(super) fn into_json(self, shape: &Shape) -> serde_json::Value {
        fn one_or_all(mut texts: Vec<String>) -> serde_json::Value {
            match texts.len() {
                1 => texts.remove(0).into(),
                _ => texts.into(),
            }
        }
        let mut body = serde_json::Map::new();
        if !shape.id.is_empty() {
            body.insert("id".to_owned(), shape.id.as_str().into());
        }
        body.insert("model_name".to_owned(), (*shape.model_name).into());
        body.insert("model_version".to_owned(), VERSION.into());
        let reasons = self.reason_texts();
        for (name, texts) in [(TEXT_OUTPUT, self.texts), (FINISH_REASON, reasons)] {
            if shape.outputs.contains(&name) {
                body.insert(name.to_owned(), one_or_all(texts));
            }
        }
        body.into()
    }
}

/// The pieces of one running request. Dropping it cancels the request.
#[derive(Debug)]
pub(super) struct Pieces {
    output: OutputStream,
    n: usize,
    is_streamed: bool,
    /// What has not been given out: everything of a whole answer, the last token of a stream.
    kept: Piece,
}

impl Pieces {
    pub(super) fn new(output: OutputStream, n: u32, shape: &Shape) -> Pieces {
        let n = n as usize;
        let kept = Piece {
            texts: vec![shape.prefix.clone(); n],
            reasons: vec![None; n],
        };
        Pieces {
            output,
            n,
            is_streamed: shape.is_streamed,
            kept,
        }
    }

    /// The next piece; `None` after the last or an error.
    pub(super) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        loop {
            match self.output.next().await? {
                Ok(Output::PromptLogprobs(_)) => {}
                Ok(Output::Token { choice, token }) => {
                    let kept = &mut self.kept.texts[choice as usize];
                    kept.push_str(&token.text);
                    // The last token waits for the reason of the end, so that there is one response for each token.
                    if self.is_streamed && !token.is_last {
                        let text = std::mem::take(kept);
                        return Some(Ok(Piece::one(text, None)));
                    }
                }
                Ok(Output::ChoiceEnded { choice, end }) => {
                    self.kept.texts[choice as usize].push_str(&end.text);
                    self.kept.reasons[choice as usize] = Some(end.reason);
                }
                Ok(Output::Finished(_)) => return Some(Ok(std::mem::take(&mut self.kept))),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// All of it, for requests that are not streamed.
    pub(super) async fn whole(mut self) -> Result<Piece, ApiError> {
        assert!(!self.is_streamed || self.n == 1, "streams have one choice");
        let mut whole: Option<Piece> = None;
        while let Some(piece) = self.next().await {
            let piece = piece?;
            match &mut whole {
                None => whole = Some(piece),
                Some(whole) => {
                    whole.texts[0].push_str(&piece.texts[0]);
                    whole.reasons = piece.reasons;
                }
            }
        }
        whole.ok_or_else(|| ApiError::new(ErrorKind::Internal, "the request ended without an answer"))
    }
}
