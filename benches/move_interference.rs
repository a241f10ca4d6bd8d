//! What a move costs the requests that do not move: their time between tokens while one of their neighbours moves, over the
//! same just before.
//!
//! `cargo bench --bench move_interference -- [--transports grpc,shared-memory] [--length 4096] [--moves N]
//! [--rates default,1TiB] [--output FILE]`. Two mixed instances of a thin model with the KV of Llama-3.2-1B, prefix caches off,
//! four short requests on each, and one with a long context that is moved to and fro. It decodes at its source until it has
//! moved, so before and during a move each instance computes the same batch, and what differs is the move.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

mod serving;
use serving::{Cluster, TokenStream, intervals, median, percentile, prompt, write_report, write_thin_model};

/// Requests on each instance besides the one that moves.
const N_OTHERS: usize = 4;
/// Looked at before each move.
const BEFORE: Duration = Duration::from_millis(1500);

struct Options {
    transports: Vec<String>,
    rates: Vec<String>,
    length: u32,
    n_moves: usize,
    output: Option<PathBuf>,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        transports: ["grpc", "shared-memory"].map(str::to_owned).to_vec(),
        rates: ["default", "1TiB"].map(str::to_owned).to_vec(),
        length: 4096,
        n_moves: 20,
        output: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            "--transports" => options.transports = value()?.split(',').map(str::to_owned).collect(),
            "--rates" => options.rates = value()?.split(',').map(str::to_owned).collect(),
            "--length" => options.length = value()?.parse().context("--length")?,
            "--moves" => options.n_moves = value()?.parse().context("--moves")?,
            "--output" => options.output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --transports, --rates, --length, --moves or --output"),
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
        for rate in &options.rates {
            let mut arguments = vec!["--mixed", "2", "--policy", "round-robin", "--rebalance", "off"];
            arguments.extend([
                "--prefix-caching",
                "off",
                "--kv-memory",
                "1200MiB",
                "--max-model-len",
                "32768",
            ]);
            arguments.extend(["--kv-transport", transport]);
            if rate != "default" {
                arguments.extend(["--move-rate", rate]);
            }
            let cluster = Cluster::start(folder.path(), &arguments)?;
            let measured = measure(&cluster, &options).await?;
            let row = json!({ "transport": transport, "move_rate": rate, "measured": measured });
            println!("{row}");
            rows.push(row);
        }
    }
    if let Some(path) = options.output {
        write_report(&path, "move_interference", &rows)?;
    }
    Ok(())
}

/// A request that stays, and where.
struct Other {
    tokens: TokenStream,
    instance: String,
}

async fn measure(cluster: &Cluster, options: &Options) -> anyhow::Result<Value> {
    let mover = cluster.complete("mover", &prompt(options.length, 1), 20_000).await?;
    mover.has_tokens(1).await?;
    let mut others = Vec::new();
    for i in 0..2 * N_OTHERS {
        let tokens = cluster
            .complete(&format!("other-{i}"), &prompt(64, 2 + i as u32), 8000)
            .await?;
        tokens.has_tokens(1).await?;
        let requests = cluster.requests().await?;
        let mine = requests.iter().find(|request| request.label == format!("other-{i}"));
        let instance = mine.context("an open request is listed")?.decode_instance.clone();
        others.push(Other { tokens, instance });
    }
    let mut ratios = [Vec::new(), Vec::new()];
    let (mut longest, mut steps, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.n_moves {
        tokio::time::sleep(BEFORE + Duration::from_millis(300)).await;
        let ordered_at = Instant::now();
        let moved = cluster.move_one("mover").await?;
        let settled_at = Instant::now();
        seconds.push((settled_at - ordered_at).as_secs_f64());
        for (end, ratios) in [&moved.from, &moved.to].into_iter().zip(&mut ratios) {
            let at_end = || others.iter().filter(|other| other.instance == *end);
            ensure!(at_end().count() > 0, "nothing else runs on {end}");
            let within = |from: Instant, to: Instant| -> Vec<f64> {
                let each = at_end().flat_map(|other| {
                    let mut arrivals = other.tokens.arrivals();
                    arrivals.retain(|&at| from <= at && at <= to);
                    intervals(&arrivals)
                });
                each.collect()
            };
            let (before, during) = (within(ordered_at - BEFORE, ordered_at), within(ordered_at, settled_at));
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            ratios.push(mean(&during) / mean(&before));
            longest.push(percentile(&during, 1.0) - median(&before));
            steps.push(median(&before));
        }
    }
    Ok(json!({
        "context_tokens": options.length, "n_moves": options.n_moves, "n_others_each": N_OTHERS,
        "itl_ratio_at_source_p50": median(&ratios[0]), "itl_ratio_at_destination_p50": median(&ratios[1]),
        "longest_extra_ms_p50": median(&longest), "itl_before_ms_p50": median(&steps),
        "move_seconds_p50": median(&seconds), "itl_ratios_at_source": ratios[0], "itl_ratios_at_destination": ratios[1],
    }))
}
