//! Bodies of the generating and tokenizing endpoints, through the whole router to a generator without a model: whatever
//! comes, the status is none of 5xx.
#![no_main]

use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::http::Request;
use baton::api::{ApiOptions, ApiState, DefaultSampling, MetricsRegistry, OutputParsers, ServedModel, router};
use baton::null_generator::{NullGenerator, NullOptions};
use baton_engine::text::{ChatTemplate, Tokenizer};
use http_body_util::BodyExt as _;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

const PATHS: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/v2/models/m/generate",
    "/v1/embeddings",
];

static SERVER: LazyLock<(Runtime, axum::Router)> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tokenizer = Tokenizer::from_bytes(include_bytes!("../../data/tokenizers/llama3/tokenizer.json")).unwrap();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% for t in tools or [] %}{{ t }}{% endfor %}";
    let model = ServedModel {
        names: vec!["m".to_owned()],
        root: "m".to_owned(),
        folder: None,
        vocab_size: tokenizer.n_ids() as u32,
        hidden_size: 4,
        tokenizer: Some(tokenizer),
        chat_template: ChatTemplate::new(&[("default".to_owned(), template.to_owned())], None, None).ok(),
        eos_token_ids: vec![2],
        default_sampling: DefaultSampling::default(),
        max_model_len: 256,
        dtype: "none".to_owned(),
        parsers: OutputParsers::default(),
    };
    let generator = Arc::new(NullGenerator::new(NullOptions { token_ids: vec![7, 90, 300], ..NullOptions::default() }));
    let options = ApiOptions::default();
    let router = runtime.block_on(async {
        let state = ApiState::new(generator, model, options, MetricsRegistry::default(), CancellationToken::new());
        router(state, axum::Router::new())
    });
    (runtime, router)
});

fuzz_target!(|data: &[u8]| {
    let Some((&first, body)) = data.split_first() else { return };
    let (runtime, router) = &*SERVER;
    let request = Request::post(PATHS[first as usize % PATHS.len()])
        .header("content-type", "application/json")
        .body(Body::from(body.to_vec()))
        .unwrap();
    runtime.block_on(async {
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let _ = response.into_body().collect().await;
        assert!(!status.is_server_error(), "{status}");
    });
});
