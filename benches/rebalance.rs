//! What the rebalancer is worth under a skewed load: the same requests, with it off and on.
//!
//! `cargo bench --bench rebalance -- [--rounds N] [--seconds N] [--rate LONG_PER_SECOND] [--kv-memory SIZE] [--output FILE]`. Two
//! mixed instances with room for six long requests each, requests dealt out in turn, every other one long: all long ones begin
//! on one instance, and only moves spread them. Both
//! clusters run through all rounds and take turns; a round's arrivals are the same for both.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

mod serving;
use serving::{Cluster, intervals, median, ms, percentile, prompt, write_report, write_thin_model};

const LONG_TOKENS: u32 = 384;
const SHORT_TOKENS: u32 = 8;
/// Short, so that what is seen of the time between tokens is not the computing of other prompts.
const PROMPT_TOKENS: u32 = 32;

struct Options {
    n_rounds: u64,
    seconds: f64,
    rate: f64,
    kv_memory: String,
    output: Option<PathBuf>,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        n_rounds: 4,
        seconds: 40.0,
        rate: 0.5,
        kv_memory: "96MiB".to_owned(),
        output: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            "--rounds" => options.n_rounds = value()?.parse().context("--rounds")?,
            "--seconds" => options.seconds = value()?.parse().context("--seconds")?,
            "--rate" => options.rate = value()?.parse().context("--rate")?,
            "--kv-memory" => options.kv_memory = value()?,
            "--output" => options.output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --rounds, --seconds, --rate, --kv-memory or --output"),
        }
    }
    Ok(options)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = options()?;
    let folder = tempfile::tempdir()?;
    write_thin_model(folder.path())?;
    let start = |rebalance| {
        let mut arguments = vec!["--mixed", "2", "--policy", "round-robin", "--rebalance", rebalance];
        arguments.extend(["--kv-memory", &options.kv_memory, "--max-model-len", "1024"]);
        Cluster::start(folder.path(), &arguments)
    };
    let clusters = [("off", start("off")?), ("act", start("act")?)];
    let mut rows = Vec::new();
    // The first round warms up.
    for round in 0..=options.n_rounds {
        for (name, cluster) in &clusters {
            let measured = measure(cluster, &options, round).await?;
            if round > 0 {
                let row = json!({ "round": round, "rebalance": name, "measured": measured });
                println!("{row}");
                rows.push(row);
            }
        }
    }
    let of = |name: &str, key: &str| -> Vec<f64> {
        let mine = rows.iter().filter(|row| row["rebalance"] == name);
        mine.filter_map(|row| row["measured"][key].as_f64()).collect()
    };
    for key in [
        "ttft_ms_p50",
        "ttft_ms_p99",
        "itl_ms_p50",
        "itl_ms_p99",
        "imbalance_p50",
    ] {
        let ratios: Vec<f64> = of("act", key)
            .iter()
            .zip(of("off", key))
            .map(|(act, off)| act / off)
            .collect();
        println!("{key}: act over off, median of rounds: {:.2}", median(&ratios));
    }
    if let Some(path) = options.output {
        write_report(&path, "rebalance", &rows)?;
    }
    Ok(())
}

/// Arrival times in seconds: exponential times between them.
fn poisson(rate: f64, seconds: f64, seed: u64) -> Vec<f64> {
    let (mut state, mut at) = (seed, 0.0);
    let next = || {
        // SplitMix64 (Steele et al., OOPSLA '14).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64;
        at -= (1.0 - uniform).ln() / rate;
        (at < seconds).then_some(at)
    };
    std::iter::from_fn(next).collect()
}

struct Sample {
    ttft_ms: f64,
    intervals_ms: Vec<f64>,
}

async fn measure(cluster: &Cluster, options: &Options, round: u64) -> anyhow::Result<Value> {
    let preemptions_before = cluster.counter("preemptions_total").await?;
    let moves_before = cluster.counter("moves_in_total").await?;
    let began = Instant::now();
    let arrivals = poisson(options.rate, options.seconds, round);
    let last = Duration::from_secs_f64(arrivals.last().copied().unwrap_or(0.0));
    let requests = arrivals.iter().enumerate().flat_map(|(i, &at)| {
        let seed = (round as u32 * 1000 + i as u32) * 2;
        // A short one right behind each long one.
        [(at, LONG_TOKENS, seed), (at + 0.05, SHORT_TOKENS, seed + 1)]
    });
    let each = requests.map(|(at, n_tokens, seed)| async move {
        tokio::time::sleep(Duration::from_secs_f64(at)).await;
        let mut tokens = cluster
            .complete(&format!("skewed-{seed}"), &prompt(PROMPT_TOKENS, seed), n_tokens)
            .await?;
        tokens.ended().await?;
        ensure!(
            tokens.n_tokens() >= n_tokens as usize,
            "{} tokens of {n_tokens}",
            tokens.n_tokens()
        );
        anyhow::Ok(Sample {
            ttft_ms: ms(tokens.time_to_first_token().context("it has tokens")?),
            intervals_ms: intervals(&tokens.arrivals()),
        })
    });
    let watching = async {
        let mut imbalances = Vec::new();
        while began.elapsed() < last {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let requests = cluster.requests().await?;
            let on = |name: &str| {
                requests
                    .iter()
                    .filter(|request| request.decode_instance == name)
                    .count() as f64
            };
            imbalances.push((on("mixed-0") - on("mixed-1")).abs());
        }
        anyhow::Ok(imbalances)
    };
    let (samples, imbalances) = tokio::join!(futures::future::try_join_all(each), watching);
    let (samples, imbalances) = (samples?, imbalances?);
    // Instances report their counters every tenth of a second, the front door's view of them every second.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let ttft: Vec<f64> = samples.iter().map(|sample| sample.ttft_ms).collect();
    let itl: Vec<f64> = samples.iter().flat_map(|sample| sample.intervals_ms.clone()).collect();
    Ok(json!({
        "n_requests": samples.len(), "seconds": began.elapsed().as_secs_f64(),
        "ttft_ms_p50": median(&ttft), "ttft_ms_p99": percentile(&ttft, 0.99),
        "itl_ms_p50": median(&itl), "itl_ms_p99": percentile(&itl, 0.99),
        "imbalance_p50": median(&imbalances), "imbalance_max": percentile(&imbalances, 1.0),
        "n_preemptions": cluster.counter("preemptions_total").await? - preemptions_before,
        "n_moves": cluster.counter("moves_in_total").await? - moves_before,
    }))
}
