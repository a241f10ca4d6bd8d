//! The Open Inference Protocol over gRPC, and Triton's `generate` over HTTP.

use std::collections::HashMap;

use baton_proto::inference as wire;
use baton_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use baton_scheduler::request::{Constraint, TokenLogprobs};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;

use super::*;

type Client = GrpcInferenceServiceClient<Channel>;

async fn client(server: &Server) -> Client {
    Client::connect(server.url("")).await.unwrap()
}

fn tensor(name: &str, datatype: &str, contents: wire::InferTensorContents) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: vec![1],
        contents: Some(contents),
        ..InferInputTensor::default()
    }
}

fn text(name: &str, text: &str) -> InferInputTensor {
    let contents = wire::InferTensorContents {
        bytes_contents: vec![text.as_bytes().to_vec()],
        ..Default::default()
    };
    tensor(name, "BYTES", contents)
}

fn flag(name: &str, value: bool) -> InferInputTensor {
    let contents = wire::InferTensorContents {
        bool_contents: vec![value],
        ..Default::default()
    };
    tensor(name, "BOOL", contents)
}

fn request(id: &str, inputs: Vec<InferInputTensor>) -> wire::ModelInferRequest {
    wire::ModelInferRequest {
        model_name: "bytes".to_owned(),
        id: id.to_owned(),
        inputs,
        ..wire::ModelInferRequest::default()
    }
}

fn parameters<const N: usize>(list: [(&str, ParameterChoice); N]) -> HashMap<String, wire::InferParameter> {
    let parameter = |choice| wire::InferParameter {
        parameter_choice: Some(choice),
    };
    list.into_iter()
        .map(|(name, choice)| (name.to_owned(), parameter(choice)))
        .collect()
}

/// The elements of a BYTES output, in whichever form it came.
fn output(response: &wire::ModelInferResponse, name: &str) -> Option<Vec<String>> {
    let idx = response.outputs.iter().position(|output| output.name == name)?;
    let output = &response.outputs[idx];
    let elements: Vec<Vec<u8>> = match response.raw_output_contents.get(idx) {
        None => output.contents.clone().unwrap().bytes_contents,
        Some(mut rest) => {
            assert_eq!(output.contents, None, "one form, not both");
            let mut owned;
            let mut elements = Vec::new();
            while !rest.is_empty() {
                let length = u32::from_le_bytes(*rest.first_chunk().unwrap()) as usize;
                elements.push(rest[4..4 + length].to_vec());
                owned = rest[4 + length..].to_vec();
                rest = &owned;
            }
            elements
        }
    };
    assert_eq!(output.shape, [elements.len() as i64]);
    assert_eq!(output.datatype, "BYTES");
    Some(
        elements
            .into_iter()
            .map(|bytes| String::from_utf8(bytes).unwrap())
            .collect(),
    )
}

fn is_final(response: &wire::ModelInferResponse) -> bool {
    let parameter = response.parameters["triton_final_response"].parameter_choice.clone();
    parameter == Some(ParameterChoice::BoolParam(true))
}

async fn ask_stream(
    client: &mut Client,
    requests: Vec<wire::ModelInferRequest>,
) -> Vec<wire::ModelStreamInferResponse> {
    let stream = client.model_stream_infer(tokio_stream::iter(requests)).await.unwrap();
    stream.into_inner().map(|message| message.unwrap()).collect().await
}

#[tokio::test]
async fn one_request_has_one_response() {
    let script = Script::of(Script::ids(3, &says("hé"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let asked = wire::ModelInferRequest {
        parameters: parameters([
            ("temperature", ParameterChoice::DoubleParam(0.5)),
            ("priority", ParameterChoice::Uint64Param(3)),
            ("timeout", ParameterChoice::Int64Param(7_000_000)),
        ]),
        ..request(
            "mine",
            vec![
                text("text_input", "hi"),
                text(
                    "sampling_parameters",
                    r#"{"max_tokens": "9", "ignore_eos": "False", "top_p": 0.25}"#,
                ),
                text("stop_words", "zz"),
            ],
        )
    };
    let response = client(&server).await.model_infer(asked).await.unwrap().into_inner();
    assert_eq!((response.id.as_str(), response.model_name.as_str()), ("mine", "bytes"));
    assert_eq!(output(&response, "text_output").unwrap(), ["hé"]);
    assert_eq!(output(&response, "finish_reason").unwrap(), ["stop"]);
    assert!(is_final(&response));
    let submitted = script.last();
    let sampling = &submitted.request.sampling;
    assert_eq!(
        (sampling.max_tokens, sampling.temperature, sampling.top_p),
        (9, 0.5, 0.25)
    );
    assert_eq!(submitted.request.prompt_ids[..], [BOS, 104, 105]);
    assert_eq!(submitted.priority, 3);
    assert_eq!(&*submitted.label, "mine");
    let deadline = submitted.deadline.expect("timeout is a deadline");
    assert!(
        deadline <= Duration::from_secs(7) && deadline > Duration::from_secs(1),
        "{deadline:?}"
    );
    assert_eq!(
        server
            .metric(r#"baton_requests_total{endpoint="infer",outcome="stop"}"#)
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn raw_contents_are_answered_raw_and_only_wanted_outputs_come() {
    let server = start(null("hé")).await;
    let mut asked = request("", vec![text("text_input", ""), flag("exclude_input_in_output", false)]);
    for input in &mut asked.inputs {
        input.contents = None;
    }
    asked.raw_input_contents = vec![b"\x02\0\0\0hi".to_vec(), vec![0]];
    let mut client = client(&server).await;
    let response = client.model_infer(asked.clone()).await.unwrap().into_inner();
    assert_eq!(response.raw_output_contents.len(), 2);
    assert_eq!(
        output(&response, "text_output").unwrap(),
        ["hihé"],
        "the input comes first"
    );
    asked.outputs = vec![InferRequestedOutputTensor {
        name: "text_output".to_owned(),
        ..Default::default()
    }];
    let response = client.model_infer(asked).await.unwrap().into_inner();
    assert_eq!(output(&response, "finish_reason"), None);
    assert_eq!(response.raw_output_contents.len(), 1);
}

#[tokio::test]
async fn several_choices_are_several_elements() {
    let server = start(null("ab")).await;
    let asked = wire::ModelInferRequest {
        parameters: parameters([
            ("n", ParameterChoice::Int64Param(2)),
            ("max_tokens", ParameterChoice::Int64Param(2)),
        ]),
        ..request("", vec![text("text_input", "hi")])
    };
    let response = client(&server).await.model_infer(asked).await.unwrap().into_inner();
    // The null model's second choice begins with its second token.
    assert_eq!(output(&response, "text_output").unwrap(), ["ab", "b"]);
    assert_eq!(output(&response, "finish_reason").unwrap(), ["length", "stop"]);
}

#[tokio::test]
async fn a_stream_has_a_response_for_each_token_and_marks_the_last() {
    let server = start(null("abc")).await;
    let mut client = client(&server).await;
    for name in ["stream", "streaming"] {
        let asked = request("mine", vec![text("text_input", "hi"), flag(name, true)]);
        let messages = ask_stream(&mut client, vec![asked]).await;
        assert!(messages.iter().all(|message| message.error_message.is_empty()));
        let responses: Vec<_> = messages
            .into_iter()
            .map(|message| message.infer_response.unwrap())
            .collect();
        assert_eq!(responses.len(), 4, "a response for each token");
        assert!(responses.iter().all(|response| response.id == "mine"));
        let texts: String = responses
            .iter()
            .map(|response| output(response, "text_output").unwrap().concat())
            .collect();
        assert_eq!(texts, "abc");
        let finals: Vec<_> = responses.iter().map(is_final).collect();
        assert_eq!(finals, [false, false, false, true]);
        assert_eq!(output(&responses[0], "finish_reason").unwrap(), [""]);
        assert_eq!(output(&responses[3], "finish_reason").unwrap(), ["stop"]);
    }
}

#[tokio::test]
async fn a_stream_of_several_choices_has_an_element_for_each() {
    let server = start(null("abc")).await;
    let options = parameters([
        ("n", ParameterChoice::Int64Param(3)),
        ("max_tokens", ParameterChoice::Int64Param(3)),
    ]);
    let asked = wire::ModelInferRequest {
        parameters: options,
        ..request("", vec![text("text_input", "hi"), flag("stream", true)])
    };
    let messages = ask_stream(&mut client(&server).await, vec![asked]).await;
    let responses: Vec<_> = messages
        .into_iter()
        .map(|message| message.infer_response.unwrap())
        .collect();
    // The null model's choices begin with different tokens of its text; the end is a token too.
    let mut texts = vec![String::new(); 3];
    let mut reasons = vec![String::new(); 3];
    for (idx, response) in responses.iter().enumerate() {
        let new = output(response, "text_output").unwrap();
        assert_eq!((new.len(), is_final(response)), (3, idx + 1 == responses.len()));
        assert!(new.iter().filter(|text| !text.is_empty()).count() <= 1, "{new:?}");
        for (choice, new) in new.iter().enumerate() {
            assert!(new.is_empty() || reasons[choice].is_empty(), "text after the end");
            texts[choice].push_str(new);
        }
        let now = output(response, "finish_reason").unwrap();
        for (before, now) in reasons.iter().zip(&now) {
            assert!(before.is_empty() || before == now, "an end stays");
        }
        reasons = now;
    }
    assert_eq!(texts, ["abc", "bc", "c"]);
    assert_eq!(reasons, ["length", "stop", "stop"]);
    assert_eq!(responses.len(), 3 + 3 + 2, "a response for each token");
}

/// Numbers of an FP32 or UINT32 output with typed contents.
fn numbers(response: &wire::ModelInferResponse, name: &str) -> Vec<f32> {
    let output = response.outputs.iter().find(|output| output.name == name).expect(name);
    let contents = output.contents.as_ref().unwrap();
    let counts = contents.uint_contents.iter().map(|&count| count as f32);
    let numbers: Vec<f32> = contents.fp32_contents.iter().copied().chain(counts).collect();
    assert_eq!(output.shape, [numbers.len() as i64]);
    numbers
}

#[tokio::test]
async fn reports_are_outputs_where_they_are_asked_for() {
    let token = |index: u32, id, logprob| DoorEvent::Token {
        choice: 0,
        token: Token {
            index,
            id,
            logprobs: Some(TokenLogprobs {
                logprob,
                rank: 2,
                top: vec![(99, -0.25)],
            }),
        },
    };
    let plain = Script::ids(4, &[97, 98], Finish::Length);
    let events = [vec![token(0, 97, -0.5), token(1, 98, -1.0)], plain[2..].to_vec()].concat();
    let script = Script::of(events);
    let server = start(script.clone()).await;
    let mut client = client(&server).await;
    let reports = [
        "logprobs",
        "cumulative_logprob",
        "num_input_tokens",
        "num_output_tokens",
    ];
    let inputs = |is_streamed: bool| {
        let flags = reports.iter().map(|name| flag(&format!("return_{name}"), true));
        let mut inputs = vec![
            text("text_input", "hey"),
            flag("stream", is_streamed),
            text("logprobs", "1"),
            text("max_tokens", "2"),
        ];
        inputs.extend(flags);
        inputs
    };
    let entry = |id: &str, logprob: f32, rank: u32, text: &str| json!({id: {"logprob": logprob, "rank": rank, "decoded_token": text}});
    let position = |own: Value| {
        let mut position = entry("99", -0.25, 1, "c");
        position
            .as_object_mut()
            .unwrap()
            .extend(own.as_object().unwrap().clone());
        position
    };
    let [first, second] = [entry("97", -0.5, 2, "a"), entry("98", -1.0, 2, "b")].map(position);
    let logprobs = |response: &wire::ModelInferResponse| -> Value {
        serde_json::from_str(&output(response, "logprobs").unwrap()[0]).unwrap()
    };

    let whole = client
        .model_infer(request("", inputs(false)))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(script.last().request.sampling.logprobs, Some(1));
    assert_eq!(logprobs(&whole), json!([first, second]));
    assert_eq!(numbers(&whole, "cumulative_logprob"), [-1.5]);
    // A begin-of-text token and three bytes.
    assert_eq!(numbers(&whole, "num_input_tokens"), [4.0]);
    assert_eq!(numbers(&whole, "num_output_tokens"), [2.0]);

    let messages = ask_stream(&mut client, vec![request("", inputs(true))]).await;
    let [a, b] = &messages[..] else { panic!("{messages:?}") };
    let (a, b) = (a.infer_response.as_ref().unwrap(), b.infer_response.as_ref().unwrap());
    assert_eq!((logprobs(a), logprobs(b)), (json!([first]), json!([second])));
    let sums = [a, b].map(|response| numbers(response, "cumulative_logprob")[0]);
    assert_eq!(sums, [-0.5, -1.5]);
    let counts = [a, b].map(|response| numbers(response, "num_output_tokens")[0]);
    assert_eq!(counts, [1.0, 1.0]);

    let body = json!({"text_input": "hey", "return_logprobs": true, "return_num_input_tokens": true});
    let answer = server.ask("/v2/models/bytes/generate", body).await;
    assert_eq!(answer["num_input_tokens"], 4);
    let reported: Value = serde_json::from_str(answer["logprobs"].as_str().unwrap()).unwrap();
    let own: Vec<Value> = [("97", -0.5, "a"), ("98", -1.0, "b")]
        .map(|(id, logprob, text)| entry(id, logprob, 2, text))
        .into();
    assert_eq!(reported, json!(own), "no alternatives unless the option asks for them");
    assert!(answer.get("cumulative_logprob").is_none());
}

#[tokio::test]
async fn constraints_reach_the_instances() {
    let script = Script::of(Script::ids(1, &[97, EOS], Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let asked = wire::ModelInferRequest {
        parameters: parameters([("guided_regex", ParameterChoice::StringParam("a+".to_owned()))]),
        ..request("", vec![text("text_input", "hi")])
    };
    client(&server).await.model_infer(asked).await.unwrap();
    let expected = Some(Constraint::Regex("a+".into()));
    assert_eq!(script.last().request.sampling.constraint, expected);
    let parameters = json!({"response_format": {"type": "json_object"}});
    let body = json!({"text_input": "hi", "parameters": parameters});
    server.ask("/v2/models/bytes/generate", body).await;
    assert!(matches!(
        script.last().request.sampling.constraint,
        Some(Constraint::JsonSchema(_))
    ));
}

#[tokio::test]
async fn requests_of_one_stream_run_side_by_side_and_fail_alone() {
    let server = start(null("abc")).await;
    let mut client = client(&server).await;
    let asked = vec![
        request("whole", vec![text("text_input", "hi")]),
        request("wrong", vec![text("text_input", "hi"), text("temperature", "hot")]),
        request("pieces", vec![text("text_input", "hi"), flag("stream", true)]),
    ];
    let messages = ask_stream(&mut client, asked).await;
    let of = |id: &str| -> Vec<_> {
        let of_id = |message: &&wire::ModelStreamInferResponse| message.infer_response.as_ref().unwrap().id == id;
        messages.iter().filter(of_id).collect()
    };
    assert_eq!(messages.len(), 6);
    assert_eq!(of("whole").len(), 1);
    assert_eq!(
        output(of("whole")[0].infer_response.as_ref().unwrap(), "text_output").unwrap(),
        ["abc"]
    );
    assert_eq!(of("pieces").len(), 4);
    assert_eq!(of("wrong").len(), 1);
    assert!(of("wrong")[0].error_message.contains("temperature"), "{messages:?}");
}

#[tokio::test]
async fn a_client_that_goes_cancels_all_its_requests() {
    let (generator, server) = start_endless().await;
    let mut client = client(&server).await;
    let long = |id: &str| wire::ModelInferRequest {
        parameters: parameters([("max_tokens", ParameterChoice::Int64Param(900_000_000))]),
        ..request(id, vec![text("text_input", "hi"), flag("stream", true)])
    };
    let (requests, receiver) = mpsc::channel(2);
    for id in ["a", "b"] {
        requests.try_send(long(id)).unwrap();
    }
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut stream = client.model_stream_infer(receiver).await.unwrap().into_inner();
    let mut seen = std::collections::HashSet::new();
    while seen.len() < 2 {
        let message = stream.next().await.unwrap().unwrap();
        seen.insert(message.infer_response.unwrap().id);
    }
    // This client resets a stream once both halves of it are gone.
    drop((requests, stream));
    until(&generator, |counts| counts.n_cancelled == 2).await;

    let whole = wire::ModelInferRequest {
        parameters: parameters([("max_tokens", ParameterChoice::Int64Param(900_000_000))]),
        ..request("c", vec![text("text_input", "hi")])
    };
    let mut infer = Box::pin(client.model_infer(whole));
    tokio::select! {
        _ = &mut infer => panic!("it is endless"),
        () = until(&generator, |counts| counts.n_started == 3) => {}
    }
    drop(infer);
    until(&generator, |counts| counts.n_cancelled == 3).await;
}

#[tokio::test]
async fn wrong_requests_are_statuses_that_name_the_input() {
    let server = start(null("a")).await;
    let mut client = client(&server).await;
    let ok = || vec![text("text_input", "a")];
    let with = |input| ok().into_iter().chain([input]).collect();
    let and = |name, choice| wire::ModelInferRequest {
        parameters: parameters([(name, choice)]),
        ..request("", ok())
    };
    let cases = [
        (request("", Vec::new()), "text_input"),
        (request("", with(text("text_input", "b"))), "text_input"),
        (request("", with(text("other", "b"))), "other"),
        (request("", with(flag("stream", true))), "stream"),
        (request("", with(text("return_logprobs", "perhaps"))), "return_logprobs"),
        (
            and("prompt_logprobs", ParameterChoice::Int64Param(3)),
            "prompt_logprobs",
        ),
        (and("min_tokens", ParameterChoice::Int64Param(17)), "min_tokens"),
        (
            and("guided_regex", ParameterChoice::StringParam("(".to_owned())),
            "guided_regex",
        ),
        (
            request("", with(text("sampling_parameters", "[1]"))),
            "sampling_parameters",
        ),
        (request("", with(text("max_tokens", "many"))), "max_tokens"),
        (request("a\nb", ok()), "id"),
        (and("logprobs", ParameterChoice::Int64Param(3)), "logprobs"),
        (and("sequence_id", ParameterChoice::Int64Param(3)), "sequence_id"),
        (and("best_of", ParameterChoice::Int64Param(3)), "best_of"),
        (
            and("return_token_ids", ParameterChoice::BoolParam(true)),
            "return_token_ids",
        ),
        (
            wire::ModelInferRequest {
                raw_input_contents: vec![Vec::new(), Vec::new()],
                ..request("", ok())
            },
            "raw_input_contents",
        ),
        (
            wire::ModelInferRequest {
                outputs: vec![InferRequestedOutputTensor {
                    name: "logits".to_owned(),
                    ..Default::default()
                }],
                ..request("", ok())
            },
            "outputs",
        ),
    ];
    for (asked, field) in cases {
        let status = client.model_infer(asked).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(field), "{field}: {status:?}");
    }
    let other = |model: &str, version: &str| wire::ModelInferRequest {
        model_name: model.to_owned(),
        model_version: version.to_owned(),
        ..request("", ok())
    };
    for asked in [other("other", ""), other("bytes", "2")] {
        assert_eq!(client.model_infer(asked).await.unwrap_err().code(), Code::NotFound);
    }
    assert!(client.model_infer(other("bytes", "1")).await.is_ok());
}

#[tokio::test]
async fn server_and_model_are_described() {
    let script = Script::of(Vec::new());
    let server = start(script.clone()).await;
    let mut client = client(&server).await;
    let ready = |name: &str| wire::ModelReadyRequest {
        name: name.to_owned(),
        ..Default::default()
    };
    assert!(
        client
            .server_live(wire::ServerLiveRequest {})
            .await
            .unwrap()
            .into_inner()
            .live
    );
    assert!(
        client
            .server_ready(wire::ServerReadyRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    assert!(client.model_ready(ready("bytes")).await.unwrap().into_inner().ready);
    assert!(!client.model_ready(ready("other")).await.unwrap().into_inner().ready);
    *script.not_ready.lock() = Some("no decode instance".to_owned());
    assert!(
        client
            .server_live(wire::ServerLiveRequest {})
            .await
            .unwrap()
            .into_inner()
            .live
    );
    assert!(
        !client
            .server_ready(wire::ServerReadyRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    assert!(!client.model_ready(ready("bytes")).await.unwrap().into_inner().ready);
    let about = client
        .server_metadata(wire::ServerMetadataRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (about.name.as_str(), about.version.as_str()),
        ("baton", env!("CARGO_PKG_VERSION"))
    );
    let asked = wire::ModelMetadataRequest {
        name: "bytes".to_owned(),
        version: "1".to_owned(),
    };
    let about = client.model_metadata(asked).await.unwrap().into_inner();
    let names: Vec<_> = about.outputs.iter().map(|output| output.name.as_str()).collect();
    let reports = [
        "cumulative_logprob",
        "logprobs",
        "num_input_tokens",
        "num_output_tokens",
    ];
    assert_eq!(names[..2], ["text_output", "finish_reason"]);
    assert_eq!(names[2..], reports);
    assert_eq!(
        (about.inputs[0].name.as_str(), about.inputs[0].datatype.as_str()),
        ("text_input", "BYTES")
    );
    assert_eq!(about.properties["max_model_len"], "1000");
    let asked = wire::ModelConfigRequest {
        name: "bytes".to_owned(),
        ..Default::default()
    };
    let config = client.model_config(asked).await.unwrap().into_inner().config.unwrap();
    assert!(config.model_transaction_policy.unwrap().decoupled);
    assert_eq!(config.input.len(), about.inputs.len());
    let asked = wire::ModelConfigRequest {
        name: "other".to_owned(),
        ..Default::default()
    };
    assert_eq!(client.model_config(asked).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn generate_answers_json_and_generate_stream_events() {
    let server = start(null("abc")).await;
    let path = "/v2/models/bytes/generate";
    let body = json!({"id": "mine", "text_input": "hi", "parameters": {"max_tokens": 2, "stream": false}});
    let answer = server.ask(path, body.clone()).await;
    assert_eq!(
        answer,
        json!({"id": "mine", "model_name": "bytes", "model_version": "1", "text_output": "ab", "finish_reason": "length"})
    );
    let response = server.post("/v2/models/bytes/versions/1/generate_stream", &body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-request-id"], "mine");
    let text = response.text().await.unwrap();
    let events: Vec<Value> = text
        .split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect();
    let texts: Vec<_> = events
        .iter()
        .map(|event| event["text_output"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["a", "b"]);
    assert_eq!(
        (&events[0]["finish_reason"], &events[1]["finish_reason"]),
        (&json!(""), &json!("length"))
    );
    for (path, body, status, said) in [
        (path, json!({"parameters": {}}), 400, "text_input"),
        (path, json!({"text_input": "a", "temperature": -1}), 400, "temperature"),
        (
            path,
            json!({"text_input": "a", "top_k": 1, "parameters": {"top_k": 1}}),
            400,
            "top_k",
        ),
        ("/v2/models/other/generate", json!({"text_input": "a"}), 404, "other"),
        (
            "/v2/models/bytes/versions/2/generate",
            json!({"text_input": "a"}),
            404,
            "version 2",
        ),
    ] {
        let response = server.post(path, &body).await;
        assert_eq!(response.status(), status, "{body}");
        let answer: Value = response.json().await.unwrap();
        assert!(answer["error"].as_str().unwrap().contains(said), "{answer}");
    }
}
