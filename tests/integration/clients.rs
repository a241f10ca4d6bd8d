//! Clients that we did not write, against the demo model on a prefill and a decode process.

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
    let Some(python) = python() else { return };
    let cluster = Cluster::serve(&["--disaggregation-threshold", "0"]).await;
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
    if !["health_probe.py", "openapi_fuzz.py"].contains(&script) {
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
