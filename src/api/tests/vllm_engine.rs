//! The engine service of the SMG gateway.

use std::io::Read as _;

use baton_engine::model::ModelFolder;
use baton_proto::smg::grpc::common;
use baton_proto::vllm::grpc::engine as wire;
use baton_proto::vllm::grpc::engine::generate_complete::MatchedStop;
use baton_proto::vllm::grpc::engine::generate_request::Input;
use baton_proto::vllm::grpc::engine::generate_response::Response;
use baton_proto::vllm::grpc::engine::sampling_params::Constraint;
use baton_proto::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use baton_scheduler::block_events::StoredBlock;
use baton_scheduler::prefix_cache::PrefixKey;
use sha2::{Digest as _, Sha256};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;

use super::*;

type Client = VllmEngineClient<Channel>;

async fn client(server: &Server) -> Client {
    Client::connect(server.url("")).await.unwrap()
}

fn ids(request_id: &str, input_ids: &[u32], params: wire::SamplingParams) -> wire::GenerateRequest {
    let tokenized = wire::TokenizedInput {
        original_text: "not read".to_owned(),
        input_ids: input_ids.to_vec(),
    };
    wire::GenerateRequest {
        request_id: request_id.to_owned(),
        input: Some(Input::Tokenized(tokenized)),
        sampling_params: Some(params),
        ..wire::GenerateRequest::default()
    }
}

/// Chunks and completes of an answer.
async fn all(
    client: &mut Client,
    request: wire::GenerateRequest,
) -> (Vec<wire::GenerateStreamChunk>, Vec<wire::GenerateComplete>) {
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let (mut chunks, mut completes) = (Vec::new(), Vec::new());
    while let Some(message) = stream.next().await {
        match message.unwrap().response.unwrap() {
            Response::Chunk(chunk) => {
                assert!(completes.is_empty(), "chunks come before completes");
                chunks.push(chunk);
            }
            Response::Complete(complete) => completes.push(complete),
        }
    }
    (chunks, completes)
}

#[tokio::test]
async fn ids_in_ids_out_with_defaults_where_fields_are_zero() {
    let script = Script::of(Script::ids(4, &says("x"), Finish::Stop(EOS)));
    let server = start(script.clone()).await;
    let request = ids("mine", &[1, 2, 3, 4], wire::SamplingParams::default());
    let (chunks, completes) = all(&mut client(&server).await, request).await;
    assert_eq!((chunks.len(), completes.len()), (0, 1), "no stream was asked for");
    let complete = &completes[0];
    assert_eq!(complete.output_ids, says("x"));
    assert_eq!(complete.finish_reason, "stop");
    assert_eq!(complete.matched_stop, None, "the model's own end");
    assert_eq!(
        (
            complete.prompt_tokens,
            complete.completion_tokens,
            complete.cached_tokens
        ),
        (4, 2, 2)
    );
    let submitted = script.last();
    assert_eq!(submitted.request.prompt_ids[..], [1, 2, 3, 4]);
    assert_eq!(&*submitted.label, "mine");
    let sampling = submitted.request.sampling;
    assert_eq!(
        (
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k
        ),
        (996, 1.0, 1.0, 0),
        "without max_tokens, what the model's length leaves"
    );
    assert_eq!((sampling.n, sampling.repetition_penalty), (1, 1.0));
}

#[tokio::test]
async fn every_supported_parameter_arrives() {
    let script = Script::of(Script::ids(2, &[97], Finish::Stop(97)));
    let server = start(script.clone()).await;
    let params = wire::SamplingParams {
        temperature: Some(0.1),
        top_p: 0.9,
        top_k: 7,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        repetition_penalty: 1.1,
        max_tokens: Some(9),
        stop_token_ids: vec![97],
        ignore_eos: true,
        seed: Some(-3),
        truncate_prompt_tokens: Some(1),
        constraint: Some(Constraint::Regex("a+".to_owned())),
        ..wire::SamplingParams::default()
    };
    let (_, completes) = all(&mut client(&server).await, ids("", &[1, 2], params)).await;
    assert_eq!(completes[0].matched_stop, Some(MatchedStop::MatchedTokenId(97)));
    let submitted = script.last().request;
    assert_eq!(submitted.prompt_ids[..], [2], "the last token stays");
    let sampling = submitted.sampling;
    let expected = baton_scheduler::request::Constraint::Regex("a+".into());
    assert_eq!(sampling.constraint, Some(expected));
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.max_tokens
        ),
        (0.1, 0.9, 7, 9)
    );
    assert_eq!(
        (
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty
        ),
        (0.5, -0.5, 1.1)
    );
    assert_eq!((sampling.stop_token_ids, sampling.seed), (vec![97, EOS], -3_i64 as u64));
}

#[tokio::test]
async fn a_stream_has_chunks_and_then_a_complete_for_each_choice() {
    let server = start(null("ab")).await;
    let params = wire::SamplingParams {
        n: 2,
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..wire::SamplingParams::default()
    };
    let request = wire::GenerateRequest {
        input: Some(Input::Text("hi".to_owned())),
        stream: true,
        ..ids("", &[], params)
    };
    let (chunks, completes) = all(&mut client(&server).await, request).await;
    assert_eq!(
        completes.iter().map(|complete| complete.index).collect::<Vec<_>>(),
        [0, 1]
    );
    for complete in &completes {
        let own: Vec<_> = chunks.iter().filter(|chunk| chunk.index == complete.index).collect();
        let together: Vec<u32> = own.iter().flat_map(|chunk| chunk.token_ids.clone()).collect();
        assert_eq!(together, complete.output_ids);
        let counts: Vec<_> = own.iter().map(|chunk| chunk.completion_tokens as usize).collect();
        assert_eq!(counts, (1..=complete.output_ids.len()).collect::<Vec<_>>());
        let logprobs = complete.output_logprobs.as_ref().unwrap();
        assert_eq!(logprobs.token_ids, complete.output_ids);
        assert!(logprobs.top_logprobs.iter().all(|top| top.token_ids.len() == 2));
        assert_eq!(own[0].output_logprobs.as_ref().unwrap().token_logprobs.len(), 1);
        let input = own[0].input_logprobs.as_ref().unwrap();
        assert_eq!(input.token_ids, [BOS, 104, 105]);
        assert_eq!((input.token_logprobs[0].value, input.token_logprobs.len()), (None, 3));
        assert!(own[1..].iter().all(|chunk| chunk.input_logprobs.is_none()));
    }
    assert_eq!(completes[0].output_ids, says("ab"));
}

#[tokio::test]
async fn a_stop_text_ends_a_choice_and_is_named() {
    let server = start(null("abcdef")).await;
    let params = wire::SamplingParams {
        stop: vec!["cd".to_owned()],
        ..wire::SamplingParams::default()
    };
    let (_, completes) = all(&mut client(&server).await, ids("", &[1], params)).await;
    assert_eq!(
        completes[0].matched_stop,
        Some(MatchedStop::MatchedStopStr("cd".to_owned()))
    );
    assert_eq!(completes[0].output_ids, [97, 98, 99, 100]);
}

#[tokio::test]
async fn what_is_not_done_here_is_refused_by_name() {
    let server = start(null("a")).await;
    let mut client = client(&server).await;
    let default = wire::SamplingParams::default;
    let params = |params| ids("", &[1], params);
    let cases = [
        (wire::GenerateRequest::default(), "input"),
        (ids("", &[], default()), "input_ids"),
        (ids("", &[260], default()), "input_ids"),
        (ids("a\nb", &[1], default()), "request_id"),
        (
            params(wire::SamplingParams {
                logprobs: Some(-1),
                ..default()
            }),
            "logprobs",
        ),
        (
            params(wire::SamplingParams {
                temperature: Some(f32::NAN),
                ..default()
            }),
            "temperature",
        ),
        (
            params(wire::SamplingParams {
                top_p: 1.5,
                ..default()
            }),
            "top_p",
        ),
        (
            params(wire::SamplingParams {
                max_tokens: Some(0),
                ..default()
            }),
            "max_tokens",
        ),
        (
            params(wire::SamplingParams {
                truncate_prompt_tokens: Some(0),
                ..default()
            }),
            "truncate_prompt_tokens",
        ),
        (
            params(wire::SamplingParams {
                constraint: Some(Constraint::StructuralTag("{}".to_owned())),
                ..default()
            }),
            "structured_outputs",
        ),
        (
            wire::GenerateRequest {
                kv_transfer_params_json: Some("{}".to_owned()),
                ..ids("", &[1], default())
            },
            "kv_transfer_params",
        ),
        (
            wire::GenerateRequest {
                mm_inputs: Some(wire::MultimodalInputs::default()),
                ..ids("", &[1], default())
            },
            "mm_inputs",
        ),
        (
            wire::GenerateRequest {
                data_parallel_rank: Some(1),
                ..ids("", &[1], default())
            },
            "data_parallel_rank",
        ),
    ];
    for (request, field) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(field), "{field}: {status:?}");
    }
}

#[tokio::test]
async fn abort_and_leaving_end_a_request() {
    let (generator, server) = start_endless().await;
    let mut client = client(&server).await;
    let long = |id: &str| wire::GenerateRequest {
        stream: true,
        ..ids(id, &[1], wire::SamplingParams::default())
    };
    let mut aborted = client.generate(long("mine")).await.unwrap().into_inner();
    aborted.next().await.unwrap().unwrap();
    let request_ids = ["mine", "nobody"].map(str::to_owned).to_vec();
    client.abort(wire::AbortRequest { request_ids }).await.unwrap();
    let mut last = None;
    while let Some(message) = aborted.next().await {
        last = message.unwrap().response;
    }
    let Some(Response::Complete(complete)) = last else {
        panic!("the last message is a complete: {last:?}");
    };
    assert_eq!(complete.finish_reason, "abort");
    let mut left = client.generate(long("theirs")).await.unwrap().into_inner();
    left.next().await.unwrap().unwrap();
    drop(left);
    until(&generator, |counts| counts.n_cancelled == 2).await;
}

#[tokio::test]
async fn model_server_and_load_are_described() {
    let script = Script::of(Vec::new());
    let model = ServedModel {
        folder: Some(ModelFolder::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo")).unwrap()),
        default_sampling: DefaultSampling {
            temperature: Some(0.6),
            top_k: Some(20),
            ..DefaultSampling::default()
        },
        ..byte_model()
    };
    let server = start_with(script.clone(), model, ApiOptions::default(), ServeOptions::default()).await;
    let mut client = client(&server).await;
    let info = client
        .get_model_info(wire::GetModelInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (info.served_model_name.as_str(), info.max_context_length),
        ("bytes", 1000)
    );
    assert!(info.is_generation && !info.supports_vision && info.vocab_size == 260);
    assert_eq!(info.eos_token_ids, [EOS as i32]);
    assert!(!info.model_type.is_empty() && info.architectures.len() == 1, "{info:?}");
    assert_eq!(info.default_sampling_params_json, r#"{"temperature":0.6,"top_k":20}"#);
    let about = client
        .get_server_info(wire::GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((about.data_parallel_size, about.active_requests), (1, 0));
    assert_eq!((about.kv_connector.as_str(), about.kv_role.as_str()), ("", ""));
    let loads = client
        .get_loads(wire::GetLoadsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((loads.dp_rank_count, loads.loads.len()), (1, 1));
    assert!(loads.timestamp.ends_with('Z'), "{}", loads.timestamp);
    assert!(
        client
            .health_check(wire::HealthCheckRequest {})
            .await
            .unwrap()
            .into_inner()
            .healthy
    );
    *script.not_ready.lock() = Some("no decode instance".to_owned());
    let health = client
        .health_check(wire::HealthCheckRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((health.healthy, health.message.as_str()), (false, "no decode instance"));

    let mut stream = client
        .get_tokenizer(common::GetTokenizerRequest {})
        .await
        .unwrap()
        .into_inner();
    let (mut archive, mut fingerprints) = (Vec::new(), Vec::new());
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.unwrap();
        archive.extend_from_slice(&chunk.data);
        fingerprints.push(chunk.sha256);
    }
    let last = fingerprints.pop().unwrap();
    assert!(fingerprints.iter().all(String::is_empty), "only the last chunk has it");
    let sha256: String = Sha256::digest(&archive)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(last, sha256);
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(archive)).unwrap();
    let mut tokenizer = Vec::new();
    zip.by_name("tokenizer.json")
        .unwrap()
        .read_to_end(&mut tokenizer)
        .unwrap();
    let original = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/tokenizer.json")).unwrap();
    assert!(tokenizer == original, "the file as it is");
    assert!(zip.by_name("model.safetensors").is_err(), "no weights");
}

#[tokio::test]
async fn a_model_without_files_has_no_tokenizer_to_give() {
    let server = start(null("a")).await;
    let asked = client(&server)
        .await
        .get_tokenizer(common::GetTokenizerRequest {})
        .await;
    assert_eq!(asked.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn events_of_cached_blocks_begin_with_all_of_them_and_end_with_the_server() {
    use baton_proto::smg::grpc::common::kv_cache_event::Data;
    let stored = |key: u128, parent: Option<u128>| {
        BlockEvent::Stored(StoredBlock {
            key: PrefixKey(key),
            parent: parent.map(PrefixKey),
            tokens: Arc::from([7; 16]),
        })
    };
    let script = Arc::new(Script {
        blocks: Some(vec![
            vec![BlockEvent::Cleared, stored(1, None), stored(2, Some(1))],
            vec![BlockEvent::Removed(PrefixKey(2))],
        ]),
        ..Script::default()
    });
    let server = start(script).await;
    let mut client = client(&server).await;
    let ask = |start_sequence_number| common::SubscribeKvEventsRequest { start_sequence_number };
    let status = client.subscribe_kv_events(ask(3)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert!(
        status.message().contains("start_sequence_number is 3, expected 0"),
        "{status:?}"
    );

    let mut batches = client.subscribe_kv_events(ask(0)).await.unwrap().into_inner();
    let first = batches.message().await.unwrap().unwrap();
    assert!(first.sequence_number == 1 && first.timestamp > 1e9, "{first:?}");
    assert!(matches!(first.events[0].data, Some(Data::Cleared(_))));
    let Some(Data::Stored(chain)) = &first.events[1].data else {
        panic!("{first:?}")
    };
    let hashes: Vec<i64> = chain.blocks.iter().map(|block| block.block_hash).collect();
    assert_eq!((hashes, chain.parent_block_hash), (vec![1, 2], None));
    assert_eq!(
        (chain.blocks[0].block_size, &*chain.blocks[0].token_ids),
        (16, &[7; 16][..])
    );
    let second = batches.message().await.unwrap().unwrap();
    let Some(Data::Removed(removed)) = &second.events[0].data else {
        panic!("{second:?}")
    };
    assert_eq!((&*removed.block_hashes, second.sequence_number), (&[2][..], 2));
    server.stopping.cancel();
    let end = batches.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");

    let nobody = start(Arc::new(Script::default())).await;
    let status = Client::connect(nobody.url(""))
        .await
        .unwrap()
        .subscribe_kv_events(ask(0))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
}
