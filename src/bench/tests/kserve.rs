//! KServe's streams against a server of that protocol that paces its tokens, on a real socket.

use baton_proto::inference as wire;
use baton_proto::inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::model_infer_response::InferOutputTensor;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;

/// Answers as Triton does: a response for each token, the end in one of its own.
struct Paced;

type Answered<T> = Result<Response<T>, Status>;

fn paced(request: wire::ModelInferRequest) -> BoxStream<'static, Result<wire::ModelStreamInferResponse, Status>> {
    let input = |name: &str| {
        let input = request.inputs.iter().find(|input| input.name == name);
        let contents = input.and_then(|input| input.contents.clone()).expect(name);
        String::from_utf8(contents.bytes_contents.first().expect(name).clone()).expect("UTF-8")
    };
    if request.model_name != "m" {
        let refused = wire::ModelStreamInferResponse {
            error_message: format!("model {} is not served", request.model_name),
            infer_response: None,
        };
        return futures::stream::iter([Ok(refused)]).boxed();
    }
    assert_eq!(input("text_input").split(' ').count(), 10, "words of the prompt");
    let sampling: Value = serde_json::from_str(&input("sampling_parameters")).expect("JSON");
    assert_eq!(sampling["ignore_eos"], true);
    let n_tokens = sampling["max_tokens"].as_u64().expect("a number");
    let responses = (0..=n_tokens).map(move |index| {
        let is_final = ParameterChoice::BoolParam(index == n_tokens);
        let parameter = wire::InferParameter {
            parameter_choice: Some(is_final),
        };
        let text = InferOutputTensor {
            name: "text_output".into(),
            ..InferOutputTensor::default()
        };
        wire::ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(wire::ModelInferResponse {
                outputs: if index < n_tokens { vec![text] } else { Vec::new() },
                parameters: [("triton_final_response".to_owned(), parameter)].into(),
                ..wire::ModelInferResponse::default()
            }),
        }
    });
    // What is measured is this server's pace: nothing waits for anything else by it.
    let paced = futures::StreamExt::then(futures::stream::iter(responses), async |response| {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Ok(response)
    });
    paced.boxed()
}

#[tonic::async_trait]
impl GrpcInferenceService for Paced {
    type ModelStreamInferStream = BoxStream<'static, Result<wire::ModelStreamInferResponse, Status>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<wire::ModelInferRequest>>,
    ) -> Answered<Self::ModelStreamInferStream> {
        let requests = request.into_inner();
        let answers = requests.flat_map(|request| match request {
            Ok(request) => paced(request),
            Err(status) => futures::stream::iter([Err(status)]).boxed(),
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn server_live(&self, _: Request<wire::ServerLiveRequest>) -> Answered<wire::ServerLiveResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn server_ready(&self, _: Request<wire::ServerReadyRequest>) -> Answered<wire::ServerReadyResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn model_ready(&self, _: Request<wire::ModelReadyRequest>) -> Answered<wire::ModelReadyResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn server_metadata(&self, _: Request<wire::ServerMetadataRequest>) -> Answered<wire::ServerMetadataResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn model_metadata(&self, _: Request<wire::ModelMetadataRequest>) -> Answered<wire::ModelMetadataResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn model_infer(&self, _: Request<wire::ModelInferRequest>) -> Answered<wire::ModelInferResponse> {
        Err(Status::unimplemented("not asked"))
    }

    async fn model_config(&self, _: Request<wire::ModelConfigRequest>) -> Answered<wire::ModelConfigResponse> {
        Err(Status::unimplemented("not asked"))
    }
}

#[tokio::test]
async fn responses_of_a_kserve_stream_are_timed_and_its_errors_counted() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    // Without it a response waits for the acknowledgement of the one before.
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = GrpcInferenceServiceServer::new(Paced);
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    let address = Address::parse(&address.to_string()).expect("an address");
    let mut config = config(address, Arrivals::Closed { concurrency: 4 });
    config.endpoint = EndpointKind::KServe;
    config.vocab_size = None;
    config.model = Some("m".into());
    let report = measure(&config).await.expect("measured");
    assert_eq!((report.completed, report.failed, report.wrong_length), (12, 0, 0));
    assert_eq!((report.total_input_tokens, report.total_output_tokens), (120, 60));
    assert!(
        report.ttft.mean_ttft_ms >= 10.0 && report.e2el.p50_e2el_ms >= 50.0,
        "{report:?}"
    );
    assert!(
        report.itl.mean_itl_ms > 5.0,
        "tokens are not taken together: {:?}",
        report.itl
    );
    config.model = Some("other".into());
    let report = measure(&config).await.expect("measured");
    assert_eq!((report.completed, report.error_counts.get("in_stream")), (0, Some(&12)));
}
