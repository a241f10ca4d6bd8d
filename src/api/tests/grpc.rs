//! `baton.v1`, health and reflection over gRPC, on the port that also speaks HTTP/1.1.

use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::{self as wire, generate_request::Prompt};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use super::super::ApiKey;
use super::*;

async fn channel(server: &Server) -> Channel {
    Channel::from_shared(server.url("")).unwrap().connect().await.unwrap()
}

async fn client(server: &Server) -> BatonClient<Channel> {
    BatonClient::new(channel(server).await)
}

fn text(text: &str, sampling: wire::SamplingParams) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(Prompt::Text(text.to_owned())),
        sampling: Some(sampling),
        ..wire::GenerateRequest::default()
    }
}

async fn all(stream: tonic::Response<tonic::Streaming<wire::GenerateResponse>>) -> Vec<wire::GenerateResponse> {
    stream.into_inner().map(|message| message.unwrap()).collect().await
}

#[tokio::test]
async fn generates_from_text_with_one_token_in_a_message() {
    let server = start(null("hé")).await;
    let request = wire::GenerateRequest {
        request_id: "mine".to_owned(),
        ..text(
            "hi",
            wire::SamplingParams {
                logprobs: Some(2),
                prompt_logprobs: Some(1),
                ..Default::default()
            },
        )
    };
    let messages = all(client(&server).await.generate(request).await.unwrap()).await;
    assert!(messages.iter().all(|message| message.request_id == "mine"));
    assert_eq!(
        messages.iter().map(|message| message.text.as_str()).collect::<String>(),
        "hé"
    );
    assert_eq!(messages[0].prompt_logprobs.as_ref().unwrap().tokens.len(), 3);
    assert_eq!(
        messages[0].prompt_logprobs.as_ref().unwrap().tokens[0],
        wire::Logprobs::default()
    );
    let tokens: Vec<_> = messages.iter().flat_map(|message| &message.tokens).collect();
    assert_eq!(tokens.iter().map(|token| token.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(tokens[0].logprobs.as_ref().unwrap().top.len(), 2);
    let last = messages.last().unwrap();
    assert_eq!(last.finish(), wire::FinishReason::Stop);
    assert_eq!(
        last.usage,
        Some(wire::Usage {
            prompt_tokens: 3,
            completion_tokens: 4,
            cached_tokens: 0
        })
    );
    assert!(
        messages[..messages.len() - 1]
            .iter()
            .all(|message| message.finish == 0 && message.usage.is_none())
    );
}

#[tokio::test]
async fn ids_are_taken_as_they_are_and_defaults_are_those_of_the_contract() {
    let script = Script::of(Script::ids(2, &says("x"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let ids = wire::TokenIds { ids: vec![5, 6] };
    let request = wire::GenerateRequest {
        prompt: Some(Prompt::TokenIds(ids)),
        ..Default::default()
    };
    let response = client(&server).await.generate(request).await.unwrap();
    let label = response
        .metadata()
        .get("x-request-id")
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let messages = all(response).await;
    assert!(messages.iter().all(|message| message.request_id == label));
    let submitted = script.last();
    assert_eq!(submitted.request.prompt_ids[..], [5, 6]);
    let sampling = submitted.request.sampling;
    assert_eq!(
        (
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p
        ),
        (16, 1.0, 0, 1.0)
    );
    assert_eq!(submitted.deadline, None);
}

#[tokio::test]
async fn grpc_timeout_is_the_deadline() {
    let script = Script::of(Script::ids(2, &says("x"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let mut request = tonic::Request::new(text("a", Default::default()));
    request.set_timeout(Duration::from_secs(7));
    all(client(&server).await.generate(request).await.unwrap()).await;
    let deadline = script.last().deadline.unwrap();
    assert!(
        deadline <= Duration::from_secs(7) && deadline > Duration::from_secs(1),
        "{deadline:?}"
    );
    let mut request = tonic::Request::new(text("a", Default::default()));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let status = client(&server).await.generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    let (_, server) = start_endless().await;
    let mut request = tonic::Request::new(text("a", long()));
    request.metadata_mut().insert("grpc-timeout", "30m".parse().unwrap());
    let status = match client(&server).await.generate(request).await {
        // On a machine that is busy enough it is over before it begins.
        Err(status) => status,
        Ok(response) => {
            let mut stream = response.into_inner();
            loop {
                match stream.next().await.expect("the stream does not end well") {
                    Ok(_) => {}
                    Err(status) => break status,
                }
            }
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn wrong_requests_name_the_field() {
    let server = start(null("a")).await;
    let mut client = client(&server).await;
    let sampled = |sampling| text("a", sampling);
    let default = wire::SamplingParams::default;
    let wrong = [
        (wire::GenerateRequest::default(), "prompt", Code::InvalidArgument),
        (
            sampled(wire::SamplingParams {
                max_tokens: Some(0),
                ..default()
            }),
            "max_tokens",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                max_tokens: Some(999),
                ..default()
            }),
            "max_tokens",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                temperature: Some(-1.0),
                ..default()
            }),
            "temperature",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                temperature: Some(f32::NAN),
                ..default()
            }),
            "temperature",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                top_p: Some(0.0),
                ..default()
            }),
            "top_p",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                logprobs: Some(21),
                ..default()
            }),
            "logprobs",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                stop: vec![String::new()],
                ..default()
            }),
            "stop",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                stop: vec!["x".into(); 17],
                ..default()
            }),
            "stop",
            Code::InvalidArgument,
        ),
        (
            sampled(wire::SamplingParams {
                stop_token_ids: vec![260],
                ..default()
            }),
            "stop_token_ids",
            Code::InvalidArgument,
        ),
        (
            wire::GenerateRequest {
                model: "other".into(),
                ..text("a", default())
            },
            "model",
            Code::NotFound,
        ),
        (
            wire::GenerateRequest {
                request_id: "a\nb".into(),
                ..text("a", default())
            },
            "request_id",
            Code::InvalidArgument,
        ),
        (
            wire::GenerateRequest {
                prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![260] })),
                ..Default::default()
            },
            "prompt",
            Code::InvalidArgument,
        ),
    ];
    for (request, field, code) in wrong {
        let status = client.generate(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), code, "{request:?}");
        assert!(status.message().contains(field), "{status:?}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert!(violations[0].field.contains(field), "{violations:?}");
    }
}

#[tokio::test]
async fn over_capacity_has_a_retry_delay() {
    let retry_after = Duration::from_millis(250);
    let rejection = Some(Rejection::OverCapacity {
        n_queued: 1,
        limit: 1,
        retry_after,
    });
    let server = start(Arc::new(Script {
        rejection,
        ..Script::default()
    }))
    .await;
    let status = client(&server)
        .await
        .generate(text("a", Default::default()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "250");
}

fn long() -> wire::SamplingParams {
    wire::SamplingParams {
        max_tokens: Some(900),
        ..Default::default()
    }
}

#[tokio::test]
async fn dropping_the_stream_cancels() {
    let (generator, server) = start_endless().await;
    let mut stream = client(&server)
        .await
        .generate(text("a", long()))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    until(&generator, |counts| counts.n_cancelled == 1).await;
}

#[tokio::test]
async fn abort_ends_streams_of_both_protocols_by_name() {
    let (generator, server) = start_endless().await;
    let mut client = client(&server).await;
    let request = wire::GenerateRequest {
        request_id: "mine".to_owned(),
        ..text("a", long())
    };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    let mut body = ask("hi");
    body["stream"] = json!(true);
    let http = server
        .client
        .post(server.url(CHAT))
        .header("x-request-id", "theirs")
        .json(&body)
        .send()
        .await
        .unwrap();
    let ids = ["mine", "theirs", "nobody"].map(str::to_owned).to_vec();
    let answer = client
        .abort(wire::AbortRequest {
            request_ids: ids.clone(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.n_aborted, 2);
    let mut last = None;
    while let Some(message) = stream.next().await {
        last = Some(message.unwrap());
    }
    assert_eq!(last.unwrap().finish(), wire::FinishReason::Abort);
    let text = http.text().await.unwrap();
    assert!(
        text.contains(r#""finish_reason":"abort""#) && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    until(&generator, |counts| counts.n_cancelled == 2).await;
    let again = client
        .abort(wire::AbortRequest { request_ids: ids })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.n_aborted, 0);
}

#[tokio::test]
async fn the_model_and_its_load_are_described() {
    let server = start(null("a")).await;
    let mut client = client(&server).await;
    let info = client.model_info(wire::ModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (info.model.as_str(), info.max_model_len, info.vocab_size),
        ("bytes", 1000, 260)
    );
    assert!(info.has_tokenizer && info.has_chat_template && info.eos_token_ids == [EOS]);
    let load = client.load(wire::LoadRequest {}).await.unwrap().into_inner();
    assert_eq!(load.instances.len(), 1);
    assert_eq!(load.instances[0].role, "mixed");
}

#[tokio::test]
async fn health_follows_readiness() {
    let script = Script::of(Vec::new());
    let server = start(script.clone()).await;
    let mut client = HealthClient::new(channel(&server).await);
    let request = |service: &str| HealthCheckRequest {
        service: service.to_owned(),
    };
    let mut watch = client.watch(request("baton.v1.Baton")).await.unwrap().into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    for service in ["", "baton.v1.Baton"] {
        assert_eq!(
            client.check(request(service)).await.unwrap().into_inner().status(),
            ServingStatus::Serving
        );
    }
    assert_eq!(client.check(request("other")).await.unwrap_err().code(), Code::NotFound);
    *script.not_ready.lock() = Some("no decode instance".to_owned());
    let readiness = client.check(request("baton.v1.Baton")).await.unwrap().into_inner();
    assert_eq!(readiness.status(), ServingStatus::NotServing);
    assert_eq!(
        client.check(request("")).await.unwrap().into_inner().status(),
        ServingStatus::Serving,
        "it lives"
    );
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    let server = start(null("a")).await;
    let channel = channel(&server).await;
    let request = v1::ServerReflectionRequest {
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
        ..Default::default()
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.next().await.unwrap().unwrap();
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) = answer.message_response
    else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(
        names.contains(&"baton.v1.Baton") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol("baton.v1.Baton".to_owned()),
        ),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.next().await.unwrap().unwrap();
    assert!(
        matches!(
            answer.message_response,
            Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))
        ),
        "{answer:?}"
    );
}

#[tokio::test]
async fn the_api_key_is_asked_for_on_both_protocols() {
    let options = ApiOptions {
        api_key: Some(ApiKey::new("secret")),
        ..ApiOptions::default()
    };
    let server = start_with(null("a"), byte_model(), options, ServeOptions::default()).await;
    assert_eq!(server.post(CHAT, &ask("hi")).await.status(), 401);
    assert_eq!(server.get("/v1/models").await.status(), 401);
    assert_eq!(server.get("/health").await.status(), 200);
    for (key, status) in [("secret", 200), ("Secret", 401), ("", 401), ("secretsecret", 401)] {
        let request = server.client.post(server.url(CHAT)).bearer_auth(key).json(&ask("hi"));
        assert_eq!(request.send().await.unwrap().status(), status, "{key}");
    }
    let status = client(&server)
        .await
        .generate(text("a", Default::default()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let mut request = tonic::Request::new(text("a", Default::default()));
    request
        .metadata_mut()
        .insert("authorization", "Bearer secret".parse().unwrap());
    assert!(client(&server).await.generate(request).await.is_ok());
    let health = HealthClient::new(channel(&server).await)
        .check(HealthCheckRequest::default())
        .await;
    assert!(health.is_ok(), "probes have no key");
}

#[tokio::test]
async fn an_unknown_service_is_unimplemented() {
    let server = start(null("a")).await;
    let request = server.client.post(server.url("/baton.v9.Baton/Generate"));
    let response = request.header("content-type", "application/grpc").send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(
        response.headers()["grpc-status"],
        (Code::Unimplemented as i32).to_string()
    );
}
