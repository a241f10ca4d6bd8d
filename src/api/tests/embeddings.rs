//! Embeddings over HTTP and gRPC: every field, both encodings, and what is refused.

use std::sync::Arc;

use baton_proto::api::{self as wire, baton_client::BatonClient, embed_request::Prompt};
use baton_proto::vllm::grpc::engine as vllm;
use baton_proto::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use baton_scheduler::request::Failure;
use serde_json::{Value, json};
use tonic::Code;

use super::*;

const EMBEDDINGS: &str = "/v1/embeddings";

async fn embed(server: &Server, body: Value) -> Value {
    let response = server.post(EMBEDDINGS, &body).await;
    assert_eq!(response.status(), 200, "{body}");
    response.json().await.unwrap()
}

async fn scripted() -> (Arc<Script>, Server) {
    let script = Arc::new(Script::default());
    let server = start(script.clone()).await;
    (script, server)
}

fn values(answer: &Value, index: usize) -> Vec<f64> {
    let embedding = answer["data"][index]["embedding"].as_array().unwrap();
    embedding.iter().map(|value| value.as_f64().unwrap()).collect()
}

#[tokio::test]
async fn one_input_gives_one_vector_of_length_1_and_the_usage() {
    let (script, server) = scripted().await;
    let answer = embed(&server, json!({"model": "bytes", "input": "ab", "user": "me"})).await;
    // The script's [begin, 0, -3, 1/3] of three tokens: the tokenizer adds its own.
    let expected = [257.0, 0.0, -3.0, 1.0 / 3.0];
    let length = expected.iter().map(|value| value * value).sum::<f64>().sqrt();
    for (got, want) in values(&answer, 0).iter().zip(expected) {
        assert!((got - want / length).abs() < 1e-6, "{answer}");
    }
    assert_eq!(answer["object"], "list");
    assert_eq!(answer["model"], "bytes");
    assert_eq!(answer["data"][0]["object"], "embedding");
    assert_eq!(answer["data"][0]["index"], 0);
    assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
    let request = script.last().request;
    assert_eq!(request.sampling.max_tokens, 0, "nothing is generated");
    assert_eq!((&*request.prompt_ids, request.cache_salt), (&[BOS, 97, 98][..], 0));
}

#[tokio::test]
async fn inputs_of_every_form_come_back_in_order() {
    let (script, server) = scripted().await;
    let many: Vec<Value> = (1..100).map(|n| json!([n, n])).collect();
    for (input, firsts) in [
        (json!(["a", "b"]), vec![f64::from(BOS); 2]),
        (json!([5, 6, 7]), vec![5.0]),
        (json!([[5, 6], [7], "a"]), vec![5.0, 7.0, f64::from(BOS)]),
        (Value::from(many), (1..100).map(f64::from).collect()),
    ] {
        let answer = embed(&server, json!({"input": input, "normalize": false})).await;
        let n_inputs = answer["data"].as_array().unwrap().len();
        let got: Vec<f64> = (0..n_inputs).map(|index| values(&answer, index)[0]).collect();
        assert_eq!(got, firsts);
        assert!((0..n_inputs).all(|index| answer["data"][index]["index"] == index));
    }
    assert_eq!(script.submissions.lock().len(), 2 + 1 + 3 + 99);
    let counted = server
        .metric("baton_requests_total{endpoint=\"embeddings\",outcome=\"stop\"}")
        .await;
    assert_eq!(counted, Some(105.0));
    let tokens = server.metric("baton_prompt_tokens_total").await;
    assert_eq!(tokens, Some((2 * 2 + 3 + 2 + 1 + 2 + 99 * 2) as f64));
    assert_eq!(server.metric("baton_generation_tokens_total").await, Some(0.0));
}

#[tokio::test]
async fn base64_is_the_same_numbers_in_little_endian() {
    let (_script, server) = scripted().await;
    let as_numbers = embed(&server, json!({"input": [5, 6], "encoding_format": "float"})).await;
    let as_base64 = embed(&server, json!({"input": [5, 6], "encoding_format": "base64"})).await;
    let bytes = base64::Engine::decode(
        &base64::prelude::BASE64_STANDARD,
        as_base64["data"][0]["embedding"].as_str().unwrap(),
    )
    .unwrap();
    let decoded: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    let numbers: Vec<f32> = values(&as_numbers, 0).into_iter().map(|value| value as f32).collect();
    assert_eq!(decoded, numbers);
}

#[tokio::test]
async fn each_option_reaches_the_request() {
    let (script, server) = scripted().await;
    let plain = json!({"input": "abcd", "add_special_tokens": false, "truncate_prompt_tokens": 3, "dimensions": 4,
                       "cache_salt": "s", "priority": -2, "request_id": "mine", "encoding_format": null});
    let answer = embed(&server, plain).await;
    assert_eq!(answer["id"], "embd-mine");
    let submission = script.last();
    assert_eq!(*submission.request.prompt_ids, [98, 99, 100], "the last three");
    assert_ne!(submission.request.cache_salt, 0);
    assert_eq!((submission.priority, &*submission.label), (-2, "mine"));
    embed(
        &server,
        json!({"input": [1, 2, 3], "truncate_prompt_tokens": 2, "truncation_side": "right"}),
    )
    .await;
    assert_eq!(*script.last().request.prompt_ids, [1, 2], "the first two");
    let long: Vec<u32> = vec![7; 1200];
    embed(&server, json!({"input": long, "truncate_prompt_tokens": -1})).await;
    assert_eq!(script.last().request.prompt_ids.len(), 1000, "the model's length");
    embed(&server, json!({"input": vec![7; 1000]})).await;
}

#[tokio::test]
async fn wrong_fields_are_refused_by_name() {
    let (script, server) = scripted().await;
    let too_many: Vec<Value> = vec![json!("a"); 2049];
    for (body, param, words) in [
        (json!({}), "input", "input is missing"),
        (json!({"input": ""}), "", ""),
        (json!({"input": []}), "input", "an empty array"),
        (json!({"input": [[]]}), "input", "input is empty"),
        (json!({"input": [["a"]]}), "input", "in input[0]: input[0] is \"a\""),
        (json!({"input": [300]}), "input", "token id 300"),
        (
            json!({"input": too_many}),
            "input",
            "an array of 2049 inputs, expected at most 2048",
        ),
        (
            json!({"input": vec![7; 1001]}),
            "input",
            "1001 tokens, expected at most 1000",
        ),
        (
            json!({"input": "a", "dimensions": 3}),
            "dimensions",
            "dimensions is 3, expected 4, the model's hidden size",
        ),
        (json!({"input": "a", "dimensions": 0}), "dimensions", "dimensions is 0"),
        (
            json!({"input": "a", "encoding_format": "bytes"}),
            "encoding_format",
            "expected \"float\" or \"base64\"",
        ),
        (
            json!({"input": "a", "encoding_format": 4}),
            "encoding_format",
            "encoding_format is 4",
        ),
        (json!({"input": "a", "normalize": "no"}), "normalize", "normalize is"),
        (
            json!({"input": "a", "truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
            "-1 or at least 1",
        ),
        (
            json!({"input": "a", "truncate_prompt_tokens": -2}),
            "truncate_prompt_tokens",
            "-2",
        ),
        (
            json!({"input": "a", "truncation_side": "middle"}),
            "truncation_side",
            "expected \"left\" or \"right\"",
        ),
        (
            json!({"input": "a", "add_special_tokens": 1}),
            "add_special_tokens",
            "add_special_tokens is 1",
        ),
        (json!({"input": "a", "user": 5}), "user", "user is 5"),
        (json!({"input": "a", "cache_salt": ""}), "cache_salt", "an empty string"),
        (json!({"input": "a", "priority": 1.5}), "priority", "priority is 1.5"),
        (json!({"input": "a", "request_id": ""}), "request_id", "request_id is"),
        (json!({"input": "a", "messages": []}), "messages", "messages is"),
    ] {
        // A text may be empty where the tokenizer adds something.
        if param.is_empty() {
            embed(&server, body).await;
            continue;
        }
        let error = server.refused(EMBEDDINGS, &body, 400).await;
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
    server
        .refused(EMBEDDINGS, &json!({"input": "a", "model": "other"}), 404)
        .await;
    assert_eq!(script.submissions.lock().len(), 1);
    let refused = server
        .metric("baton_requests_total{endpoint=\"embeddings\",outcome=\"invalid\"}")
        .await;
    assert_eq!(refused, Some(21.0));
}

#[tokio::test]
async fn failures_have_their_codes_and_one_failure_ends_the_request() {
    let lost = Arc::new(Script {
        events: vec![DoorEvent::Failed(Failure::InstanceLost("gone".into()))],
        ..Script::default()
    });
    let server = start(lost).await;
    let error = server.refused(EMBEDDINGS, &json!({"input": [[1], [2]]}), 503).await;
    assert!(error["message"].as_str().unwrap().contains("gone"));
    let full = Arc::new(Script {
        rejection: Some(Rejection::OverCapacity {
            n_queued: 3,
            limit: 3,
            retry_after: Duration::from_secs(2),
        }),
        ..Script::default()
    });
    let server = start(full).await;
    let response = server.post(EMBEDDINGS, &json!({"input": "a"})).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &"2".parse().unwrap())
    );
}

/// A null model that never answers in the time of a test.
async fn silent() -> (Arc<NullGenerator>, Server) {
    let generator = Arc::new(NullGenerator::new(NullOptions {
        first_token_after: Duration::from_secs(1000),
        ..NullOptions::default()
    }));
    let server = start(generator.clone()).await;
    (generator, server)
}

#[tokio::test]
async fn one_that_its_client_leaves_or_aborts_is_cancelled() {
    let (generator, server) = silent().await;
    let url = format!("http://{}{EMBEDDINGS}", server.address);
    let asked = server.client.post(url).json(&json!({"input": ["a", "b"]})).send();
    let leaving = tokio::spawn(asked);
    until(&generator, |counts| counts.n_started == 2).await;
    leaving.abort();
    until(&generator, |counts| counts.n_cancelled == 2).await;

    let body = json!({"input": "a", "request_id": "mine"});
    let asked = server.refused(EMBEDDINGS, &body, 499);
    let aborted = async {
        until(&generator, |counts| counts.n_started == 3).await;
        assert!(server.state.running().abort("mine"));
    };
    tokio::join!(asked, aborted);
    until(&generator, |counts| counts.n_cancelled == 3).await;
}

#[tokio::test]
async fn over_grpc_by_both_services() {
    let (script, server) = scripted().await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", server.address))
        .unwrap()
        .connect_lazy();
    let mut baton = BatonClient::new(channel.clone());
    let text = wire::EmbedRequest {
        request_id: "r".to_owned(),
        prompt: Some(Prompt::Text("ab".to_owned())),
        normalize: Some(false),
        ..wire::EmbedRequest::default()
    };
    let answer = baton.embed(text.clone()).await.unwrap().into_inner();
    assert_eq!(answer.request_id, "r");
    assert_eq!(answer.embedding, [BOS as f32, 0.0, -3.0, 1.0 / 3.0]);
    assert_eq!(answer.usage.unwrap().prompt_tokens, 3);
    let ids = wire::EmbedRequest {
        prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![4, 5] })),
        normalize: None,
        ..text.clone()
    };
    let scaled = baton.embed(ids).await.unwrap().into_inner().embedding;
    let length: f32 = scaled.iter().map(|value| value * value).sum();
    assert!((length - 1.0).abs() < 1e-6, "{scaled:?}");
    for (request, code) in [
        (
            wire::EmbedRequest {
                prompt: None,
                ..text.clone()
            },
            Code::InvalidArgument,
        ),
        (
            wire::EmbedRequest {
                model: "other".to_owned(),
                ..text.clone()
            },
            Code::NotFound,
        ),
    ] {
        assert_eq!(baton.embed(request).await.unwrap_err().code(), code);
    }
    let mut late = tonic::Request::new(text);
    late.set_timeout(Duration::from_secs(7));
    baton.embed(late).await.unwrap();
    let deadline = script.last().deadline.unwrap();
    assert!(
        deadline <= Duration::from_secs(7) && deadline > Duration::from_secs(1),
        "{deadline:?}"
    );

    let mut engine = VllmEngineClient::new(channel);
    let request = |input_ids: Vec<u32>| vllm::EmbedRequest {
        request_id: "v".to_owned(),
        tokenized: Some(vllm::TokenizedInput {
            input_ids,
            ..vllm::TokenizedInput::default()
        }),
    };
    let answer = engine.embed(request(vec![4, 5])).await.unwrap().into_inner();
    assert_eq!(
        (answer.embedding, answer.embedding_dim, answer.prompt_tokens),
        (scaled, 4, 2)
    );
    assert_eq!(&*script.last().label, "v");
    for wrong in [request(vec![]), request(vec![300]), vllm::EmbedRequest::default()] {
        assert_eq!(engine.embed(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let counted = server
        .metric("baton_requests_total{endpoint=\"vllm_embed\",outcome=\"stop\"}")
        .await;
    assert_eq!(counted, Some(1.0));
}
