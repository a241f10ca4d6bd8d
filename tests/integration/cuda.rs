//! `--device cuda` through HTTP, with prefill and decode in two processes: on a card (REQUIRE_GPU=1), else through the
//! stand-in for its driver, where a step takes some tenths of a second, so that little is asked.

use std::path::Path;
use std::process::Stdio;

use baton_kernels::DType;
use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, ImageFolders};
use serde_json::json;

use super::cluster::{Answer, Cluster, Process, prompt, repository, run};
use super::moves::{ask, move_one, running};
use super::stand_in::{self, Driver};

const MODEL: &str = "tests/data/models/llama3-tied-ropescaled";
/// As the model's configuration says.
const HEAD_DIM: usize = 16;

/// Compiles what the servers will need, so that their start is not the compiler's.
fn warm(images: &Path, libraries: &Path, dtype: DType, mode: CudaMode) {
    let options = CudaOptions {
        ordinal: 0,
        dtype,
        head_dim: HEAD_DIM,
        mode,
        libraries: vec![libraries.to_owned()],
        images: ImageFolders {
            packaged: None,
            cache: Some(images.to_owned()),
        },
    };
    drop(Cuda::new(options).expect("a device"));
}

/// A server on the card or the stand-in.
async fn serve(flags: &[&str]) -> Option<(Process, Cluster)> {
    let driver = stand_in::driver()?;
    let model = repository(MODEL);
    let mut arguments = vec!["serve", "--port", "0", "--device", "cuda", "--kv-memory", "4MiB"];
    arguments.extend(["--model", model.to_str().expect("UTF-8")]);
    // Recorded steps are computed once each before they are recorded.
    arguments.extend(["--cuda-graph-max-seqs", "2"]);
    arguments.extend(flags);
    let mut variables = Vec::new();
    let (cache, libraries);
    if let Driver::StandIn(folder) = &driver {
        cache = folder.join("cache");
        libraries = folder.to_str().expect("UTF-8").to_owned();
        let images = cache.join("baton/cuda-kernels");
        let is_f32 = flags.contains(&"f32");
        let (dtype, mode) = match is_f32 {
            true => (DType::F32, CudaMode::Fast),
            false => (DType::Bf16, CudaMode::Deterministic),
        };
        warm(&images, folder, dtype, mode);
        arguments.extend(["--cuda-libraries", &libraries]);
        variables.push(("XDG_CACHE_HOME", cache.to_str().expect("UTF-8")));
    }
    let door = Process::start_with(&arguments, &variables, Stdio::inherit()).await;
    let cluster = Cluster::of(door.url.clone());
    Some((door, cluster))
}

async fn greedy(cluster: &Cluster, prompt: &[u32], n_tokens: usize) -> Answer {
    let body = json!({ "max_tokens": n_tokens, "temperature": 0, "ignore_eos": true });
    cluster.complete(prompt, &body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_on_one_card_give_the_goldens() {
    const N_TOKENS: usize = 4;
    let text = std::fs::read_to_string(repository(MODEL).join("goldens.json")).expect("goldens.json");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let prompts = golden["prompts"].as_array().expect("prompts");
    let case = prompts
        .iter()
        .find(|case| case["name"] == "short")
        .expect("a short one");
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        let ids = value.as_array().expect("ids").iter();
        ids.map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let Some((_door, cluster)) = serve(&["--dtype", "f32", "--disaggregation-threshold", "0"]).await else {
        return;
    };
    let found = greedy(&cluster, &ids(&case["input_ids"]), N_TOKENS).await;
    let tolerance = golden["tolerances"]["f32_max_abs_logit"].as_f64().expect("a tolerance");
    for (step, (id, logprob)) in found.iter().enumerate() {
        assert_eq!(*id, ids(&case["greedy"]["ids"])[step], "step {step}");
        let expected = case["greedy"]["logprobs"][step].as_f64().expect("a number");
        assert!(
            (logprob - expected).abs() <= tolerance,
            "step {step}: {logprob}, expected {expected}"
        );
    }
    cluster
        .until_counter("decode-0", "kv_bytes_received_by_cuda_ipc_total", |n| n > 0)
        .await;
    cluster
        .until_counter("decode-0", "steps_replayed_total", |n| n > 0)
        .await;
    cluster.until_idle_and_whole().await;
}

/// One prompt's tokens and log-probabilities in 16 bits and deterministic mode are the same bits with each one's flags. Each is
/// named with the way that its KV goes, if any does.
async fn assert_same_bits(n_tokens: usize, cases: &[(&[&str], Option<&str>)]) {
    let prompt: Vec<u32> = (0..20).map(|i| 5 + 7 * i).collect();
    let mut answers = Vec::new();
    for &(flags, way) in cases {
        let Some((_door, cluster)) = serve(&[&["--dtype", "bf16", "--deterministic", "on"], flags].concat()).await
        else {
            return;
        };
        answers.push(greedy(&cluster, &prompt, n_tokens).await);
        if let Some(way) = way {
            let counter = format!("kv_bytes_received_by_{way}_total");
            cluster.until_counter("decode-0", &counter, |n| n > 0).await;
        }
        cluster.until_idle_and_whole().await;
    }
    for (answer, (flags, _)) in answers.iter().zip(cases) {
        assert_eq!(*answer, answers[0], "{flags:?}");
    }
}

/// Where the card's memory is not mapped, KV goes through pinned memory of the host, which is mapped, or through a socket.
#[tokio::test(flavor = "multi_thread")]
async fn without_ipc_kv_goes_through_the_host() {
    let mapped = ["--disaggregation-threshold", "0", "--kv-transport", "cuda-ipc"];
    let staged = ["--disaggregation-threshold", "0", "--kv-transport", "shared-memory"];
    let copied = ["--disaggregation-threshold", "0", "--kv-transport", "grpc"];
    let cases: [(&[&str], _); 3] = [
        (&mapped, Some("cuda_ipc")),
        (&staged, Some("shared_memory")),
        (&copied, Some("grpc")),
    ];
    assert_same_bits(2, &cases).await;
}

/// A request moves while it generates, by each way between processes, and its tokens do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_request_moves_by_every_way() {
    // Enough to be caught in the act.
    let n_tokens = match stand_in::driver() {
        Some(Driver::Card) => 400,
        Some(Driver::StandIn(_)) => 32,
        None => return,
    };
    let ids = prompt(5, 20);
    let options = json!({ "max_tokens": n_tokens, "temperature": 0 });
    let pools = ["--disaggregation-threshold", "0", "--prefill", "1", "--decode", "2"];
    let mut expected = None;
    for way in ["cuda-ipc", "shared-memory", "grpc"] {
        let flags = ["--dtype", "bf16", "--deterministic", "on", "--kv-transport", way];
        let Some((_door, cluster)) = serve(&[&flags[..], &pools].concat()).await else {
            return;
        };
        let meanwhile = async {
            let request = running(&cluster, 2).await;
            move_one(&cluster, &request.request_id, "").await.expect("it moves").1
        };
        let (moved, to) = tokio::join!(ask(&cluster, &ids, &options), meanwhile);
        let counter = format!("kv_bytes_received_by_{}_total", way.replace('-', "_"));
        cluster.until_counter(&to, &counter, |n| n > 0).await;
        assert_eq!(cluster.counter(&to, "moves_in_total").await, 1);
        if expected.is_none() {
            expected = Some(ask(&cluster, &ids, &options).await);
        }
        assert_eq!(Some(moved), expected, "{way}");
        cluster.until_idle_and_whole().await;
    }
}

/// Two instances of one process: KV is handed over within the card.
#[tokio::test(flavor = "multi_thread")]
async fn instances_of_one_process_hand_over_within_the_card() {
    let one = [
        "--disaggregation-threshold",
        "0",
        "--colocate=on",
        "--prefill-sm-share=50%",
    ];
    let two = ["--disaggregation-threshold", "0", "--colocate=off"];
    assert_same_bits(2, &[(&one, Some("in_process")), (&two, Some("cuda_ipc"))]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deterministic_bits_are_the_same_handed_over_or_not() {
    let handed_over = ["--disaggregation-threshold", "0"];
    let in_chunks = ["--mixed", "1", "--max-batch-tokens", "8", "--max-num-seqs", "4"];
    assert_same_bits(3, &[(&handed_over, None), (&in_chunks, None)]).await;
}

/// Needs the compiler alone; where other tests have compiled already, little is left to do.
#[tokio::test]
async fn kernels_are_compiled_beforehand() {
    let Some(Driver::StandIn(libraries)) = stand_in::driver() else {
        return;
    };
    let images = stand_in::image_cache();
    let [libraries, images] = [&libraries, &images].map(|path| path.to_str().expect("UTF-8"));
    let kernels = ["kernels", "--output", images, "--cuda-libraries", libraries];
    let (code, stdout, stderr) = run(&[&kernels[..], &["--architectures", "90a"]].concat()).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains(&format!("kernels for 90a in {images}")), "{stdout}");
    let (code, _, stderr) = run(&[&kernels[..], &["--architectures", "90a,hopper"]].concat()).await;
    assert!(code == Some(2) && stderr.contains("hopper"), "{stderr}");

    // With these the doctor moves KV between the cards of two processes, by each way that there is.
    let transfer = [
        "doctor", "transfer", "--device", "cuda", "--json", "--size", "1MiB", "--rounds", "1",
    ];
    let folders = ["--cuda-libraries", libraries, "--cuda-kernels", images];
    let (code, stdout, stderr) = run(&[&transfer[..], &folders].concat()).await;
    assert_eq!(code, Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(
        (&report["used"], &report["card"]),
        (&json!("cuda-ipc"), &json!("CUDA stand-in"))
    );
    let paths = report["paths"].as_array().expect("paths");
    let names: Vec<&str> = paths.iter().filter_map(|path| path["path"].as_str()).collect();
    let expected = [
        "memcpy",
        "raw tcp",
        "grpc",
        "shared-memory",
        "cuda-ipc",
        "cuda-ipc, scattered blocks",
    ];
    assert_eq!(names[..expected.len()], expected);
    for path in paths {
        assert!(path["gb_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{path}");
    }
}

#[tokio::test]
async fn without_a_card_the_doctor_says_so_in_one_line() {
    if baton_kernels::cuda::probe(0, &[]).is_ok() {
        return;
    }
    let (code, _, stderr) = run(&["doctor", "cuda"]).await;
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("device cuda: ") && stderr.trim().lines().count() == 1,
        "{stderr}"
    );
    assert!(stderr.matches("libcuda.so.1").count() <= 1, "said twice: {stderr}");
}
