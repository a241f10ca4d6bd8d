//! Prefill and decode of a model in the exact shape of Llama-3.2-1B with random weights, in bf16, each step beside the limits
//! of the machine measured right before and after it. The forward pass alone: no scheduling, no sampling, no network.
//!
//! `cargo bench --bench model_steps -- [--threads N] [--rounds N] [--output FILE] [--keep]`. The packed weights (2.5 GB) lie in
//! the target folder and are deleted at the end, unless `--keep`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use baton_engine::forward::{ForwardPass, LogitsWanted, NewTokens, StepSequence};
use baton_engine::model::{
    CpuLoadOptions, Decoder, DecoderLimits, LoadFormat, LoadOptions, ModelConfig, ModelFolder, load_cpu,
};
use baton_kernels::machine::{measure_peak, measure_read_bandwidth};
use baton_kernels::{Cpu, DType};
use serde_json::{Value, json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/models/llama-3.2-1b");
const PACKED: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/packed-llama-3.2-1b");
const BLOCK_SIZE: usize = 16;
/// The product's default step: longer prompts are computed in chunks of it.
const CHUNK_TOKENS: usize = 512;
const MAX_BATCH: usize = 32;
const MAX_CONTEXT: usize = 2048;
/// Blocks for the largest case: 32 sequences of 512 tokens and one block to grow into.
const N_BLOCKS: usize = MAX_BATCH * (512 / BLOCK_SIZE + 1);

/// One measured piece of work.
#[derive(Clone, Copy)]
enum Case {
    /// A prompt of `n_tokens`, in chunks.
    Prefill { n_tokens: usize },
    /// `n_steps` steps of one token for each of `batch` sequences that hold `context` tokens.
    Decode {
        batch: usize,
        context: usize,
        n_steps: usize,
    },
}

const CASES: [Case; 8] = [
    Case::Prefill { n_tokens: 512 },
    Case::Prefill { n_tokens: 2048 },
    decode(1, 128, 8),
    decode(1, 511, 8),
    decode(8, 128, 4),
    decode(8, 511, 4),
    decode(32, 128, 2),
    decode(32, 511, 2),
];

const fn decode(batch: usize, context: usize, n_steps: usize) -> Case {
    Case::Decode {
        batch,
        context,
        n_steps,
    }
}

/// What must be read and computed at least, whatever the implementation.
struct Work {
    /// Tokens that come out of it.
    n_tokens: usize,
    /// Weights once per step, and the KV of every sequence.
    bytes: f64,
    /// A multiply-add is two; only what the result depends on.
    flops: f64,
}

struct Limits {
    read_gb_s: f64,
    peak_gflop_s: f64,
}

struct Sample {
    seconds: f64,
    limits: Limits,
    load_average: f64,
}

struct Options {
    n_threads: usize,
    n_rounds: usize,
    output: Option<PathBuf>,
    keeps_weights: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let mut bench = Bench::load(options.n_threads)?;
    let mut samples: Vec<Vec<Sample>> = CASES.iter().map(|_| Vec::new()).collect();
    for case in CASES {
        bench.run(case)?;
    }
    for round in 0..options.n_rounds {
        for (case, samples) in CASES.into_iter().zip(&mut samples) {
            samples.push(bench.sample(case)?);
        }
        eprintln!("round {} of {}", round + 1, options.n_rounds);
    }
    let report = bench.report(&options, &samples);
    print_table(&report);
    if let Some(path) = &options.output {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    drop(bench);
    if !options.keeps_weights {
        std::fs::remove_dir_all(PACKED).context(PACKED)?;
    }
    Ok(())
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Options> {
        let mut options = Options {
            n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            n_rounds: 5,
            output: None,
            keeps_weights: false,
        };
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
            match name.as_str() {
                "--threads" => options.n_threads = value()?.parse().context("--threads")?,
                "--rounds" => options.n_rounds = value()?.parse().context("--rounds")?,
                "--output" => options.output = Some(value()?.into()),
                "--keep" => options.keeps_weights = true,
                // Cargo says so to every bench.
                "--bench" => {}
                other => bail!("unknown argument {other:?}, expected --threads, --rounds, --output or --keep"),
            }
        }
        Ok(options)
    }
}

struct Bench {
    model: Decoder<Cpu>,
    n_threads: usize,
    /// `[MAX_CONTEXT]`
    prompt: Vec<u32>,
}

impl Bench {
    fn load(n_threads: usize) -> anyhow::Result<Bench> {
        let folder = ModelFolder::open(MODEL)?;
        let options = CpuLoadOptions {
            model: LoadOptions {
                dtype: DType::Bf16,
                block_size: BLOCK_SIZE,
                limits: DecoderLimits {
                    max_batch_tokens: CHUNK_TOKENS,
                    max_model_len: MAX_CONTEXT,
                },
                packed_dir: Some(Path::new(PACKED).to_owned()),
                load_format: LoadFormat::Dummy { seed: 0 },
            },
            n_threads,
            isa: None,
            n_kv_blocks: N_BLOCKS,
        };
        let started = Instant::now();
        let mut model = load_cpu(&folder, &options, &mut |_, _| {})?;
        eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
        fill(&mut model)?;
        let vocab_size = model.vocab_size() as u32;
        Ok(Bench {
            model,
            n_threads,
            prompt: (0..MAX_CONTEXT as u32)
                .map(|i| i.wrapping_mul(7919) % vocab_size)
                .collect(),
        })
    }

    /// Runs a case once, and returns its seconds.
    fn run(&mut self, case: Case) -> anyhow::Result<f64> {
        let tables = block_tables();
        let started = Instant::now();
        match case {
            Case::Prefill { n_tokens } => {
                for start_pos in (0..n_tokens).step_by(CHUNK_TOKENS) {
                    let end = n_tokens.min(start_pos + CHUNK_TOKENS);
                    let chunk = StepSequence {
                        tokens: NewTokens::Known(&self.prompt[start_pos..end]),
                        start_pos,
                        block_tables: &tables.long,
                        rope_variant: 0,
                        logits: if end == n_tokens {
                            LogitsWanted::Last
                        } else {
                            LogitsWanted::None
                        },
                    };
                    self.model.step(&[chunk], &mut |_, _| {})?;
                }
            }
            Case::Decode {
                batch,
                context,
                n_steps,
            } => {
                for step in 0..n_steps {
                    let sequences: Vec<StepSequence<'_>> = (0..batch)
                        .map(|i| StepSequence {
                            tokens: NewTokens::Known(&self.prompt[i..=i]),
                            start_pos: context + step,
                            block_tables: &tables.short[i],
                            rope_variant: 0,
                            logits: LogitsWanted::Last,
                        })
                        .collect();
                    self.model.step(&sequences, &mut |_, _| {})?;
                }
            }
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// A run between two measurements of the limits; the better of the two counts, so other work on the machine shows as a
    /// limit that moved, not as a fraction that is too good.
    fn sample(&mut self, case: Case) -> anyhow::Result<Sample> {
        let before = self.limits()?;
        let seconds = self.run(case)?;
        let after = self.limits()?;
        Ok(Sample {
            seconds,
            limits: Limits {
                read_gb_s: before.read_gb_s.max(after.read_gb_s),
                peak_gflop_s: before.peak_gflop_s.max(after.peak_gflop_s),
            },
            load_average: load_average(),
        })
    }

    fn limits(&self) -> anyhow::Result<Limits> {
        Ok(Limits {
            read_gb_s: measure_read_bandwidth(self.n_threads)?,
            peak_gflop_s: measure_peak(DType::Bf16, self.n_threads)?,
        })
    }

    fn report(&self, options: &Options, samples: &[Vec<Sample>]) -> Value {
        let config = self.model.config();
        let cases: Vec<Value> = CASES
            .iter()
            .zip(samples)
            .map(|(case, samples)| case_report(*case, config, samples))
            .collect();
        json!({
            "bench": "model_steps",
            "model": MODEL.rsplit('/').next(),
            "dtype": "bf16",
            "numerics_class": self.model.numerics_class(),
            "n_threads": options.n_threads,
            "n_rounds": options.n_rounds,
            "cases": cases,
        })
    }
}

/// Blocks of the cases; scattered, as after some hours of serving (7919 is prime).
struct BlockTables {
    /// Of one layer group: the models measured have layers of one kind.
    long: [Vec<u32>; 1],
    /// One for each sequence of a batch.
    short: Vec<[Vec<u32>; 1]>,
}

fn block_tables() -> BlockTables {
    let scattered = |i: usize| (i * 7919 % N_BLOCKS) as u32;
    let per_sequence = N_BLOCKS / MAX_BATCH;
    BlockTables {
        long: [(0..MAX_CONTEXT / BLOCK_SIZE).map(scattered).collect()],
        short: (0..MAX_BATCH)
            .map(|i| [(i * per_sequence..(i + 1) * per_sequence).map(scattered).collect()])
            .collect(),
    }
}

/// Untouched memory would be read from the system's one page of zeros.
fn fill(model: &mut Decoder<Cpu>) -> anyhow::Result<()> {
    let layout = model.layout();
    // Small positive bf16 numbers, different in each element.
    let part: Vec<u8> = (0..layout.part_bytes())
        .map(|i| if i % 2 == 0 { (i * 31) as u8 } else { 0x3d })
        .collect();
    let kv = model.kv_cache();
    for block in 0..N_BLOCKS as u32 {
        let mut writer = kv.write_handle(block)?;
        for layer in 0..layout.n_layers {
            writer.write(layer, &part, &part)?;
        }
        writer.seal();
    }
    Ok(())
}

impl Case {
    fn name(self) -> String {
        match self {
            Case::Prefill { n_tokens } => format!("prefill {n_tokens}"),
            Case::Decode { batch, context, .. } => format!("decode batch {batch} at {context}"),
        }
    }

    fn work(self, config: &ModelConfig) -> Work {
        let (hidden, ffn) = (config.hidden_size, config.ffn_size);
        let query_width = config.n_heads * config.head_dim;
        let kv_width = config.n_kv_heads * config.head_dim;
        let qkv = hidden * (query_width + 2 * kv_width);
        let rest = query_width * hidden + 3 * hidden * ffn;
        let vocab = hidden * config.vocab_size;
        let element = DType::Bf16.size();
        let weight_bytes = (config.n_layers * (qkv + rest) + vocab) * element;
        let kv_bytes_per_token = config.n_layers * 2 * kv_width * element;
        // Of the last layer only K and V are needed of rows whose logits are not wanted.
        let row_flops = |wants_logits: bool| {
            let n_finished_layers = config.n_layers - usize::from(!wants_logits);
            2 * (config.n_layers * qkv + n_finished_layers * rest + usize::from(wants_logits) * vocab)
        };
        let attention_flops = |visible: usize| 4 * visible * query_width * config.n_layers;
        match self {
            Case::Prefill { n_tokens } => {
                let n_steps = n_tokens.div_ceil(CHUNK_TOKENS);
                let flops = (n_tokens - 1) * row_flops(false)
                    + row_flops(true)
                    + (1..=n_tokens).map(attention_flops).sum::<usize>();
                Work {
                    n_tokens,
                    bytes: (n_steps * weight_bytes) as f64,
                    flops: flops as f64,
                }
            }
            Case::Decode {
                batch,
                context,
                n_steps,
            } => {
                let visible: usize = (0..n_steps).map(|step| context + step + 1).sum();
                Work {
                    n_tokens: batch * n_steps,
                    bytes: (n_steps * weight_bytes + batch * visible * kv_bytes_per_token) as f64,
                    flops: (batch * (n_steps * row_flops(true) + attention_flops(visible))) as f64,
                }
            }
        }
    }
}

fn case_report(case: Case, config: &ModelConfig, samples: &[Sample]) -> Value {
    let work = case.work(config);
    let per_sample = |of: &dyn Fn(&Sample) -> f64| median(samples.iter().map(of).collect());
    let read_seconds = |s: &Sample| work.bytes / s.limits.read_gb_s / 1e9;
    let compute_seconds = |s: &Sample| work.flops / s.limits.peak_gflop_s / 1e9;
    json!({
        "case": case.name(),
        "n_tokens": work.n_tokens,
        "bytes": work.bytes,
        "flops": work.flops,
        "tokens_per_s": per_sample(&|s| work.n_tokens as f64 / s.seconds),
        "tokens_per_s_best": samples.iter().map(|s| work.n_tokens as f64 / s.seconds).fold(0.0, f64::max),
        "of_read_bandwidth": per_sample(&|s| read_seconds(s) / s.seconds),
        "of_peak": per_sample(&|s| compute_seconds(s) / s.seconds),
        "of_nearer_limit": per_sample(&|s| read_seconds(s).max(compute_seconds(s)) / s.seconds),
        "read_gb_s": per_sample(&|s| s.limits.read_gb_s),
        "peak_gflop_s": per_sample(&|s| s.limits.peak_gflop_s),
        "samples": samples.iter().map(|s| json!({
            "seconds": s.seconds,
            "read_gb_s": s.limits.read_gb_s,
            "peak_gflop_s": s.limits.peak_gflop_s,
            "load_average": s.load_average,
        })).collect::<Vec<_>>(),
    })
}

fn print_table(report: &Value) {
    println!(
        "| case | tokens/s | best | of read bandwidth | of bf16 peak | of the nearer limit | read GB/s | peak GFLOP/s |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for case in report["cases"].as_array().into_iter().flatten() {
        let number = |key: &str| case[key].as_f64().unwrap_or(f64::NAN);
        let percent = |key: &str| format!("{:.0} %", 100.0 * number(key));
        println!(
            "| {} | {:.1} | {:.1} | {} | {} | {} | {:.1} | {:.0} |",
            case["case"].as_str().unwrap_or_default(),
            number("tokens_per_s"),
            number("tokens_per_s_best"),
            percent("of_read_bandwidth"),
            percent("of_peak"),
            percent("of_nearer_limit"),
            number("read_gb_s"),
            number("peak_gflop_s"),
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// Of the last minute; NaN (null in JSON) where the system does not say.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN)
}
