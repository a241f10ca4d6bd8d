//! What the front door costs by itself: streams of a null model that says its tokens at once, over loopback HTTP.
//! No instance and no model computes anything here, so the rate is the ceiling of one front door process.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use baton::api::metrics::MetricsRegistry;
use baton::api::{ApiOptions, ApiState, DefaultSampling, OutputParsers, ServeOptions, ServedModel, router, serve};
use baton::null_generator::{NullGenerator, NullOptions};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const N_TOKENS: u32 = 256;
const VOCAB_SIZE: u32 = 1000;

fn start(runtime: &Runtime) -> SocketAddr {
    let model = ServedModel {
        names: vec!["null".to_owned()],
        root: "null".to_owned(),
        folder: None,
        tokenizer: None,
        chat_template: None,
        eos_token_ids: Vec::new(),
        default_sampling: DefaultSampling::default(),
        max_model_len: 4096,
        vocab_size: VOCAB_SIZE,
        hidden_size: 4,
        dtype: "none".to_owned(),
        parsers: OutputParsers::default(),
    };
    let generator = Arc::new(NullGenerator::new(NullOptions {
        token_ids: vec![7],
        ..NullOptions::default()
    }));
    let (options, registry) = (ApiOptions::default(), MetricsRegistry::new());
    let state = ApiState::new(generator, model, options, registry, CancellationToken::new());
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let served = state.clone();
        let serving = async move {
            serve(
                listener,
                router(served.clone(), axum::Router::new()),
                &served,
                ServeOptions::default(),
            )
            .await
        };
        tokio::spawn(serving);
        address
    })
}

/// Reads one stream to its end; returns its bytes.
async fn stream(connection: &mut TcpStream, logprobs: &str) -> usize {
    let body = format!(r#"{{"prompt":[1,2,3],"stream":true,"max_tokens":{N_TOKENS},"logprobs":{logprobs}}}"#);
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection
        .write_all((head + &body).as_bytes())
        .await
        .expect("the server reads");
    let mut buffer = vec![0; 64 << 10];
    let (mut n_bytes, mut tail) = (0, Vec::new());
    // The last chunk of a chunked body is empty.
    while !tail.ends_with(b"\r\n0\r\n\r\n") {
        let n = connection.read(&mut buffer).await.expect("the server writes");
        assert_ne!(n, 0, "the server closed the connection");
        n_bytes += n;
        tail.extend_from_slice(&buffer[..n]);
        tail.drain(..tail.len().saturating_sub(7));
    }
    n_bytes
}

fn front_door(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let address = start(&runtime);
    let mut group = criterion.benchmark_group("front_door_stream");
    for (name, logprobs) in [("plain", "null"), ("logprobs_5", "5")] {
        for n_streams in [1_u32, 32] {
            group.throughput(Throughput::Elements(u64::from(n_streams * N_TOKENS)));
            let mut connections: Vec<TcpStream> = runtime.block_on(async {
                let connect = (0..n_streams).map(|_| TcpStream::connect(address));
                futures::future::try_join_all(connect)
                    .await
                    .expect("the server accepts")
            });
            group.bench_function(BenchmarkId::new(name, n_streams), |bencher| {
                bencher.iter(|| {
                    let streams = connections.iter_mut().map(|connection| stream(connection, logprobs));
                    black_box(runtime.block_on(futures::future::join_all(streams)))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, front_door);
criterion_main!(benches);
