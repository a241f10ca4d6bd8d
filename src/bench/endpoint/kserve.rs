//! KServe's Open Inference Protocol over gRPC with Triton's `ModelStreamInfer`: a text in, a response for each token out. All
//! requests on one connection, each a stream of its own. The protocol counts no tokens: prompts count as the words that were
//! asked for, outputs as their responses.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use baton_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::model_infer_request::InferInputTensor;
use baton_proto::inference::{InferTensorContents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use serde_json::json;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use super::{Asking, Completion, RequestFailure, TextOfAnswers, status_failure};
use crate::bench::workload::{PromptMaker, Turn};
use crate::config::{Address, Secret};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The parameter by which Triton marks the last response of a request.
const FINAL_RESPONSE: &str = "triton_final_response";
const TEXT_OUTPUT: &str = "text_output";

/// A request, and the length of its prompt in words.
#[derive(Clone, Debug)]
pub struct KServeRequest {
    message: ModelInferRequest,
    n_words: u64,
}

/// Sends requests.
#[derive(Clone, Debug)]
pub struct KServeClient {
    client: GrpcInferenceServiceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

impl KServeClient {
    /// A client of `server`, which connects with its first request.
    ///
    /// # Errors
    /// An address that is no URI, a key that no metadata can hold.
    pub fn new(server: &Address, api_key: Option<&Secret>) -> anyhow::Result<KServeClient> {
        let endpoint = Endpoint::from_shared(server.to_uri()).with_context(|| format!("server {server}"))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .connect_lazy();
        Ok(KServeClient {
            client: GrpcInferenceServiceClient::new(channel),
            authorization: api_key.map(super::bearer).transpose()?,
        })
    }

    /// The message that asks for `turn`, with the inputs of Triton's backend for vLLM.
    pub fn message(&self, turn: &Turn, maker: &PromptMaker, asking: &Asking) -> KServeRequest {
        let texts: Vec<String> = turn.messages.iter().map(|message| maker.text(message)).collect();
        let mut sampling = json!({"max_tokens": turn.output_len, "ignore_eos": asking.ignore_eos});
        if let Some(temperature) = asking.temperature {
            sampling["temperature"] = json!(temperature);
        }
        let message = ModelInferRequest {
            model_name: asking.model.clone(),
            inputs: vec![
                text_input("text_input", texts.join(" ")),
                flag_input("stream"),
                flag_input("exclude_input_in_output"),
                text_input("sampling_parameters", sampling.to_string()),
            ],
            ..ModelInferRequest::default()
        };
        KServeRequest {
            message,
            n_words: turn.input_len(),
        }
    }

    /// Sends `request` and reads the stream to its end.
    pub async fn send(
        &self,
        request: KServeRequest,
        started: Instant,
        text: TextOfAnswers,
    ) -> Result<Completion, RequestFailure> {
        let mut asked = Request::new(tokio_stream::once(request.message));
        if let Some(value) = &self.authorization {
            asked.metadata_mut().insert("authorization", value.clone());
        }
        let mut client = self.client.clone();
        let stream = client.model_stream_infer(asked).await.map_err(status_failure)?;
        let mut stream = stream.into_inner();
        let mut answer = Answer::new(text);
        while let Some(response) = stream.message().await.map_err(status_failure)? {
            answer.response(response, started.elapsed())?;
        }
        answer.end(request.n_words)
    }
}

fn text_input(name: &str, text: String) -> InferInputTensor {
    input(
        name,
        "BYTES",
        InferTensorContents {
            bytes_contents: vec![text.into_bytes()],
            ..InferTensorContents::default()
        },
    )
}

/// An input that is true.
fn flag_input(name: &str) -> InferInputTensor {
    input(
        name,
        "BOOL",
        InferTensorContents {
            bool_contents: vec![true],
            ..InferTensorContents::default()
        },
    )
}

fn input(name: &str, datatype: &str, contents: InferTensorContents) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: vec![1],
        contents: Some(contents),
        ..InferInputTensor::default()
    }
}

/// What has come of a stream so far.
struct Answer {
    token_times: Vec<Duration>,
    keeping: TextOfAnswers,
    text: String,
    is_final: bool,
}

impl Answer {
    fn new(keeping: TextOfAnswers) -> Answer {
        Answer {
            token_times: Vec::new(),
            keeping,
            text: String::new(),
            is_final: false,
        }
    }

    fn response(&mut self, response: ModelStreamInferResponse, arrived: Duration) -> Result<(), RequestFailure> {
        if !response.error_message.is_empty() {
            return Err(RequestFailure::InStream(response.error_message));
        }
        let Some(response) = response.infer_response else {
            return Err(RequestFailure::NotUnderstood(
                "a response without infer_response".into(),
            ));
        };
        self.is_final |= is_final(&response);
        // Triton may mark the end in a response of its own, which has no outputs.
        let text = response.outputs.iter().position(|output| output.name == TEXT_OUTPUT);
        if let Some(idx) = text {
            self.token_times.push(arrived);
            self.keeping.add(&mut self.text, &text_of(&response, idx));
        }
        Ok(())
    }

    /// Not every server marks the end, so a stream that was closed well has ended well.
    fn end(self, n_words: u64) -> Result<Completion, RequestFailure> {
        if self.token_times.is_empty() {
            let what = if self.is_final {
                "no token"
            } else {
                "no token and no final response"
            };
            return Err(RequestFailure::Incomplete(what));
        }
        Ok(Completion {
            n_input_tokens: n_words,
            n_output_tokens: self.token_times.len() as u64,
            n_cached_tokens: 0,
            token_times: self.token_times,
            text: self.text,
        })
    }
}

/// The first element of an output of texts, in whichever form it came.
fn text_of(response: &ModelInferResponse, idx: usize) -> String {
    let typed = response.outputs[idx].contents.as_ref();
    let typed = typed.and_then(|contents| contents.bytes_contents.first());
    // Four bytes say how long an element is.
    let raw = || response.raw_output_contents.get(idx).and_then(|raw| raw.get(4..));
    let bytes = typed.map(Vec::as_slice).or_else(raw).unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

fn is_final(response: &ModelInferResponse) -> bool {
    let parameter = response.parameters.get(FINAL_RESPONSE);
    matches!(
        parameter.and_then(|parameter| parameter.parameter_choice.as_ref()),
        Some(ParameterChoice::BoolParam(true))
    )
}

#[cfg(test)]
mod tests {
    use baton_proto::inference::InferParameter;
    use baton_proto::inference::model_infer_response::InferOutputTensor;

    use super::*;

    fn response(has_text: bool, is_final: bool) -> ModelStreamInferResponse {
        let text = InferOutputTensor {
            name: TEXT_OUTPUT.into(),
            ..InferOutputTensor::default()
        };
        let parameter = InferParameter {
            parameter_choice: Some(ParameterChoice::BoolParam(is_final)),
        };
        ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(ModelInferResponse {
                outputs: if has_text { vec![text] } else { Vec::new() },
                parameters: [(FINAL_RESPONSE.to_owned(), parameter)].into(),
                ..ModelInferResponse::default()
            }),
        }
    }

    fn answer(responses: &[ModelStreamInferResponse]) -> Result<Completion, RequestFailure> {
        let mut answer = Answer::new(TextOfAnswers::Kept);
        for (index, response) in responses.iter().enumerate() {
            answer.response(response.clone(), Duration::from_millis(index as u64))?;
        }
        answer.end(7)
    }

    #[test]
    fn responses_with_text_are_tokens_and_a_bare_end_is_none() {
        for last in [response(true, true), response(false, true)] {
            let completion = answer(&[response(true, false), response(true, false), last.clone()]).expect("complete");
            let n_tokens = 2 + last.infer_response.expect("set above").outputs.len();
            assert_eq!((completion.n_input_tokens, completion.token_times.len()), (7, n_tokens));
        }
    }

    #[test]
    fn errors_and_empty_streams_are_failures() {
        let error = ModelStreamInferResponse {
            error_message: "model not found".into(),
            infer_response: None,
        };
        let expected = RequestFailure::InStream("model not found".into());
        assert_eq!(answer(&[response(true, false), error]), Err(expected));
        assert_eq!(
            answer(&[response(false, true)]),
            Err(RequestFailure::Incomplete("no token"))
        );
        let nothing = ModelStreamInferResponse::default();
        assert_eq!(answer(&[nothing]).expect_err("nothing").kind(), "not_understood");
    }
}
