//! Clients that we did not write, against the demo model on a prefill and a decode process.

use std::path::PathBuf;
use std::process::Command;

use super::cluster::{Cluster, repository};

/// A Python that has the clients: `BATON_TEST_PYTHON`, else `python3`. Without one, tests are skipped unless required.
fn python() -> Option<String> {
    let python = std::env::var("BATON_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let imports = "import openai, grpc, grpc_health.v1, grpc_reflection.v1alpha, tritonclient.grpc, smg_grpc_proto, \
                   schemathesis";
    let has_clients = Command::new(&python)
        .args(["-c", imports])
        .output()
        .is_ok_and(|output| output.status.success());
    if has_clients {
        return Some(python);
    }
    assert!(
        std::env::var("REQUIRE_CLIENTS").as_deref() != Ok("1"),
        "REQUIRE_CLIENTS=1, but {python} lacks the packages of tests/clients/requirements.txt"
    );
    println!("SKIPPED: {python} lacks the packages of tests/clients/requirements.txt");
    None
}

async fn run(script: &'static str) {
    run_with(script, &[]).await;
}

async fn run_with(script: &'static str, flags: &[&str]) {
    let Some(python) = python() else { return };
    let cluster = Cluster::serve(&[&["--disaggregation-threshold", "0"], flags].concat()).await;
    let url = cluster.door_url.clone();
    let output = tokio::task::spawn_blocking(move || {
        Command::new(python)
            .arg(repository("tests/clients").join(script))
            .arg(url)
            .output()
            .expect("the script runs")
    })
    .await
    .expect("waited for");
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        output.status.success(),
        "{script}:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    if !["health_probe.py", "openapi_fuzz.py", "openai_embeddings.py"].contains(&script) {
        cluster
            .until_counter("decode-0", "kv_bytes_received_total", |n| n > 0)
            .await;
    }
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_package() {
    run("openai_chat.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_package_with_embeddings() {
    run("openai_embeddings.py").await;
}

/// The demo model with a template that shows tools; which parsers its answers go through is told by that.
#[tokio::test(flavor = "multi_thread")]
async fn openai_package_with_tools() {
    let folder = tempfile::tempdir().expect("a folder");
    let demo = repository("models/demo");
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
    ] {
        std::fs::copy(demo.join(file), folder.path().join(file)).expect("the demo model's files");
    }
    let read = |path: PathBuf| std::fs::read_to_string(path).expect("a file of the repository");
    let config = read(demo.join("tokenizer_config.json"));
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["chat_template"] = read(repository("tests/clients/tool_template.jinja")).into();
    let path = folder.path().join("tokenizer_config.json");
    std::fs::write(path, config.to_string()).expect("a file");
    let folder = folder.path().to_str().expect("a path in UTF-8");
    run_with("openai_tools.py", &["--model", folder]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpcio_with_reflection() {
    run("grpc_reflect.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient() {
    run("triton_infer.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stubs_of_the_smg_gateway() {
    run("smg_engine.py").await;
}

/// Whatever is asked by the OpenAPI description, and against it, no answer is a server error.
#[tokio::test(flavor = "multi_thread")]
async fn requests_made_from_the_openapi_description() {
    run("openapi_fuzz.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_probe() {
    run("health_probe.py").await;
}

/// At least 98 % of the demo model's 200 held-out sums are right.
#[tokio::test(flavor = "multi_thread")]
async fn held_out_sums() {
    run("heldout_sums.py").await;
}
