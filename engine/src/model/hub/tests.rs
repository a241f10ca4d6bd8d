//! The hub client against a local server that speaks the hub's API: model info, tree, resolve.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository `org/model`, on a free port of the loopback interface.
struct LocalHub {
    endpoint: String,
    /// `METHOD path` of each request, and whether it carried the token `secret`.
    requests: Arc<Mutex<Vec<(String, bool)>>>,
}

impl LocalHub {
    fn start(files: &[(&str, Vec<u8>)]) -> LocalHub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let files: Arc<BTreeMap<String, Vec<u8>>> = Arc::new(
            files
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), bytes.clone()))
                .collect(),
        );
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, seen) = (files.clone(), seen.clone());
                std::thread::spawn(move || stream.map(|stream| answer(stream, &files, &seen)));
            }
        });
        LocalHub { endpoint, requests }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some(cache.to_owned()),
            token: Some("secret".to_owned()),
            revision: None,
        }
    }

    fn downloaded(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        let prefix = format!("GET /org/model/resolve/{COMMIT}/");
        let mut files: Vec<String> = requests
            .iter()
            .filter_map(|(request, _)| Some(request.strip_prefix(&prefix)?.to_owned()))
            .collect();
        files.sort();
        files
    }
}

/// Answers one request and closes.
fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, seen: &Mutex<Vec<(String, bool)>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request_line)) = lines.next() else { return };
    let headers: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .map(|line| line.to_lowercase())
        .collect();
    let mut words = request_line.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let has_token = headers.iter().any(|header| header == "authorization: bearer secret");
    seen.lock().unwrap().push((format!("{method} {target}"), has_token));

    let path = target.split('?').next().unwrap();
    let tree = || {
        let entries = files
            .iter()
            .map(|(path, bytes)| serde_json::json!({"type": "file", "oid": "1", "size": bytes.len(), "path": path}));
        serde_json::Value::from_iter(entries).to_string().into_bytes()
    };
    let file = path.strip_prefix(&format!("/org/model/resolve/{COMMIT}/"));
    let body = match (path, file) {
        ("/api/models/org/model/revision/main" | "/api/models/org/model", _) => Some(
            serde_json::json!({"id": "org/model", "sha": COMMIT})
                .to_string()
                .into_bytes(),
        ),
        (path, _) if path == format!("/api/models/org/model/tree/{COMMIT}") => Some(tree()),
        (_, Some(name)) => files.get(name).cloned(),
        _ => None,
    };
    let (status, body) = match body {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found\r\nX-Error-Code: RepoNotFound", b"no such thing".to_vec()),
    };
    let etag = blake3::hash(path.as_bytes()).to_hex();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes());
    if method != "HEAD" {
        let _ = stream.write_all(&body);
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

#[test]
fn fetches_what_is_served_from_and_nothing_else() {
    let hub = LocalHub::start(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", vec![7; 100_000]),
        ("consolidated.safetensors", vec![8; 10]),
        ("original/params.json", b"{}".to_vec()),
        ("README.md", b"hello".to_vec()),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let folder = run(download("org/model", &hub.options(cache.path()))).unwrap();
    assert_eq!(hub.downloaded(), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        vec![7; 100_000]
    );
    assert!(hub.requests.lock().unwrap().iter().all(|(_, has_token)| *has_token));
    // The usual cache layout, which other tools share.
    assert_eq!(folder, cache.path().join("models--org--model/snapshots").join(COMMIT));

    let again = run(download("org/model", &hub.options(cache.path()))).unwrap();
    assert_eq!(again, folder);
    assert_eq!(hub.downloaded().len(), 3, "cached files are not fetched again");
}

#[test]
fn fetches_the_shards_of_the_index() {
    let index =
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let hub = LocalHub::start(&[
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("model-00001-of-00002.safetensors", vec![1]),
        ("model-00002-of-00002.safetensors", vec![2]),
        ("model.safetensors", vec![3]),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let folder = run(download("org/model", &hub.options(cache.path()))).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(),
        [2]
    );
    assert!(!folder.join("model.safetensors").exists());
}

#[test]
fn refusals_name_the_model_and_the_reason() {
    let cache = tempfile::tempdir().unwrap();
    let message = |hub: &LocalHub, id: &str| {
        let message = run(download(id, &hub.options(cache.path()))).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("hub model {id}: ")) && !message.contains('\n'),
            "{message}"
        );
        message
    };
    let empty = LocalHub::start(&[("README.md", vec![1])]);
    assert!(message(&empty, "org/model").contains("config.json"));
    assert!(message(&empty, "org/other").contains("HF_TOKEN"));
    assert!(message(&empty, "../etc").contains("ORG/NAME"));
    let without_weights = LocalHub::start(&[("config.json", vec![b'{', b'}'])]);
    assert!(message(&without_weights, "org/model").contains("model.safetensors"));
}

#[test]
fn ids_and_paths_are_told_apart() {
    for id in ["meta-llama/Llama-3.2-1B", "a/b", "org/model_2.5"] {
        assert!(is_hub_id(id), "{id}");
    }
    for path in [
        "model",
        "./model",
        "/srv/model",
        "a/b/c",
        "../model",
        "a/",
        "/b",
        "a/..",
        "org/mo*el",
        "",
    ] {
        assert!(!is_hub_id(path), "{path}");
    }
}
