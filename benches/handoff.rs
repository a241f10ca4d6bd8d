//! The part of the time to the first token that is the handoff's: last chunk of the prompt computed to last KV frame arrived,
//! as the front door's metrics have it.
//!
//! `cargo bench --bench handoff -- [--transports grpc,shared-memory] [--lengths 1024,4096] [--rounds N] [--output FILE]`. One
//! prefill and one decode instance of a thin model with the KV of Llama-3.2-1B, prefix caches off, one request at a time,
//! every one of which is handed over.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::json;

mod serving;
use serving::{Cluster, KV_BYTES_PER_TOKEN, median, ms, percentile, prompt, write_report, write_thin_model};

const EXPOSED_SUM: &str = "baton_request_phase_seconds_sum{phase=\"transfer_exposed\"}";
const EXPOSED_COUNT: &str = "baton_request_phase_seconds_count{phase=\"transfer_exposed\"}";

struct Options {
    transports: Vec<String>,
    lengths: Vec<u32>,
    n_rounds: u32,
    output: Option<PathBuf>,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        transports: ["grpc", "shared-memory"].map(str::to_owned).to_vec(),
        lengths: vec![256, 1024, 4096, 8192],
        n_rounds: 7,
        output: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            "--transports" => options.transports = value()?.split(',').map(str::to_owned).collect(),
            "--lengths" => {
                let lengths = value()?.split(',').map(str::parse).collect::<Result<_, _>>();
                options.lengths = lengths.context("--lengths")?;
            }
            "--rounds" => options.n_rounds = value()?.parse().context("--rounds")?,
            "--output" => options.output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --transports, --lengths, --rounds or --output"),
        }
    }
    Ok(options)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = options()?;
    let folder = tempfile::tempdir()?;
    write_thin_model(folder.path())?;
    let mut rows = Vec::new();
    for transport in &options.transports {
        let mut arguments = vec!["--prefill", "1", "--decode", "1", "--disaggregation-threshold", "0"];
        arguments.extend([
            "--prefix-caching",
            "off",
            "--kv-memory",
            "1200MiB",
            "--max-model-len",
            "32768",
        ]);
        arguments.extend(["--kv-transport", transport]);
        let cluster = Cluster::start(folder.path(), &arguments)?;
        measure(&cluster, 64, 0).await?;
        for &length in &options.lengths {
            let mut samples = Vec::new();
            for round in 0..options.n_rounds {
                samples.push(measure(&cluster, length, 1 + round).await?);
            }
            let exposed: Vec<f64> = samples.iter().map(|(_, exposed)| *exposed).collect();
            let shares: Vec<f64> = samples.iter().map(|(ttft, exposed)| exposed / ttft).collect();
            let row = json!({
                "transport": transport, "prompt_tokens": length, "kv_bytes": u64::from(length) * KV_BYTES_PER_TOKEN,
                "ttft_ms_p50": median(&samples.iter().map(|(ttft, _)| *ttft).collect::<Vec<_>>()),
                "exposed_ms_p50": median(&exposed), "exposed_share_of_ttft_p50": median(&shares),
                "exposed_share_of_ttft_max": percentile(&shares, 1.0), "samples_ttft_exposed_ms": samples,
            });
            println!("{row}");
            rows.push(row);
        }
    }
    if let Some(path) = options.output {
        write_report(&path, "handoff", &rows)?;
    }
    Ok(())
}

/// Time to the first token, and what of it was exposed handoff; both in milliseconds.
async fn measure(cluster: &Cluster, length: u32, seed: u32) -> anyhow::Result<(f64, f64)> {
    let (exposed, count) = (cluster.metric(EXPOSED_SUM).await?, cluster.metric(EXPOSED_COUNT).await?);
    let mut tokens = cluster.complete("handed-over", &prompt(length, seed), 2).await?;
    tokens.ended().await?;
    let ttft = tokens.time_to_first_token().context("it has tokens")?;
    // What a request took is counted right after its last event is sent.
    for _ in 0..200 {
        if cluster.metric(EXPOSED_COUNT).await? > count {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    ensure!(
        cluster.metric(EXPOSED_COUNT).await? == count + 1.0,
        "the request was not handed over"
    );
    Ok((ms(ttft), (cluster.metric(EXPOSED_SUM).await? - exposed) * 1e3))
}
