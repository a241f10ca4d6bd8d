//! `--model ORG/NAME`: fetched once from a hub on loopback, through the ecosystem's variables, and served.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;

use super::cluster::{Cluster, Process, repository};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    n_weights_fetched: AtomicUsize,
}

async fn info() -> Response {
    axum::Json(json!({ "id": "org/tiny", "sha": COMMIT })).into_response()
}

async fn tree(State(hub): State<Arc<Hub>>) -> Response {
    let entries = hub
        .files
        .iter()
        .map(|(path, bytes)| json!({ "type": "file", "oid": "1", "size": bytes.len(), "path": path }));
    axum::Json(serde_json::Value::from_iter(entries)).into_response()
}

async fn file(State(hub): State<Arc<Hub>>, Path(name): Path<String>, method: Method) -> Response {
    let Some(bytes) = hub.files.get(&name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if name.ends_with(".safetensors") && method == Method::GET {
        hub.n_weights_fetched.fetch_add(1, Ordering::Relaxed);
    }
    let mut headers = HeaderMap::new();
    headers.insert("x-repo-commit", HeaderValue::from_static(COMMIT));
    headers.insert("etag", HeaderValue::from_str(&format!("\"{name}\"")).expect("a header"));
    (headers, bytes.clone()).into_response()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_id_is_fetched_once_and_served() {
    let folder = repository("tests/data/models/llama3-tied-ropescaled");
    let files = std::fs::read_dir(&folder).expect("the model").map(|entry| {
        let entry = entry.expect("readable");
        let name = entry.file_name().to_string_lossy().into_owned();
        (name, std::fs::read(entry.path()).expect("readable"))
    });
    let hub = Arc::new(Hub {
        files: files.collect(),
        n_weights_fetched: AtomicUsize::new(0),
    });
    let routes = Router::new()
        .route("/api/models/org/tiny", get(info))
        .route("/api/models/org/tiny/revision/main", get(info))
        .route(&format!("/api/models/org/tiny/tree/{COMMIT}"), get(tree))
        .route(&format!("/org/tiny/resolve/{COMMIT}/{{*name}}"), get(file))
        .with_state(Arc::clone(&hub));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let serving = tokio::spawn(async move { axum::serve(listener, routes).await });

    let cache = tempfile::tempdir().expect("a folder");
    let home = cache.path().to_str().expect("UTF-8").to_owned();
    let variables = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", home.as_str())];
    let arguments = ["serve", "--port", "0", "--threads", "1", "--model", "org/tiny"];
    let door = Process::start_with(&arguments, &variables, Stdio::inherit()).await;
    let cluster = Cluster::of(door.url.clone());
    let body = json!({ "model": "org/tiny", "prompt": "The quick", "max_tokens": 4, "return_token_ids": true });
    let (status, answer) = cluster.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["model"], "org/tiny");
    assert_eq!(
        hub.n_weights_fetched.load(Ordering::Relaxed),
        1,
        "three processes, one download"
    );
    serving.abort();
}
