//! Whole steps on a card: decode and prefill of a random model through the step loop, each beside the nearer of the card's
//! limits, measured in the same run; and what the host adds between steps. No front door, no transfers.
//!
//! `cuda_steps --model FOLDER [--batches 1,64,256] [--context N] [--prefill 4096] [--steps N] [--deterministic]
//! [--max-graph-seqs N] [--libraries FOLDERS] [--kernels FOLDER] [--images FOLDER] [--packed FOLDER] [--output FILE]`. Of the
//! folder config.json is enough. Each line of the output is a case.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use baton_engine::DType;
use baton_engine::cuda::{Cuda, CudaLimits, CudaMeasure, CudaMode, CudaOptions, ImageFolders};
use baton_engine::engine::{EngineConfig, EngineEvent, EngineHandle, Generation, start};
use baton_engine::forward::ForwardPass as _;
use baton_engine::model::{
    CudaKvSize, CudaLoadOptions, DecoderLimits, LoadFormat, LoadOptions, ModelConfig, ModelFolder, load_cuda,
};
use baton_scheduler::batch::{BatchConfig, PrefixCaching};
use baton_scheduler::ids::{Epoch, RequestId};
use baton_scheduler::request::{PortableState, Request, SamplingParams};
use serde_json::json;

const DTYPE: DType = DType::Bf16;
const BLOCK_SIZE: usize = 16;
/// Tokens of a step while prompts are computed; a prefill that is measured is one step.
const MAX_BATCH_TOKENS: usize = 8192;
/// At most of each sequence, for what is generated while the other prompts of a batch are computed.
const N_GROWTH_TOKENS: usize = 1024;
/// Prefills of each length, after one that does not count.
const N_PREFILLS: usize = 5;

struct Options {
    model: PathBuf,
    batches: Vec<usize>,
    context: usize,
    prefills: Vec<usize>,
    n_steps: usize,
    mode: CudaMode,
    /// Sequences of the largest decode step that is recorded; 0 records none.
    max_graph_seqs: usize,
    libraries: Vec<PathBuf>,
    images: ImageFolders,
    packed: Option<PathBuf>,
    measure: CudaMeasure,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Options> {
        let mut options = Options {
            model: PathBuf::new(),
            batches: vec![1, 64, 256],
            context: 2048,
            prefills: vec![4096],
            n_steps: 48,
            mode: CudaMode::Fast,
            max_graph_seqs: 256,
            libraries: Vec::new(),
            images: ImageFolders::default(),
            packed: None,
            measure: CudaMeasure::default(),
            output: None,
        };
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
            let number = |text: String| text.parse::<usize>().with_context(|| format!("{name}: found {text:?}"));
            match name.as_str() {
                "--model" => options.model = value()?.into(),
                "--batches" => options.batches = numbers(&name, &value()?)?,
                "--context" => options.context = number(value()?)?,
                "--prefill" => options.prefills = numbers(&name, &value()?)?,
                "--steps" => options.n_steps = number(value()?)?,
                "--deterministic" => options.mode = CudaMode::Deterministic,
                "--max-graph-seqs" => options.max_graph_seqs = number(value()?)?,
                "--libraries" => options.libraries = std::env::split_paths(&value()?).collect(),
                "--kernels" => options.images.packaged = Some(value()?.into()),
                "--images" => options.images.cache = Some(value()?.into()),
                "--packed" => options.packed = Some(value()?.into()),
                "--measure-bytes" => {
                    let n_bytes = number(value()?)?;
                    options.measure = CudaMeasure {
                        n_bytes,
                        matrix_dim: 16,
                    };
                }
                "--output" => options.output = Some(value()?.into()),
                // Cargo says so to every bench.
                "--bench" => {}
                other => bail!("unknown argument {other:?}; see the head of benches/cuda_steps.rs"),
            }
        }
        ensure!(!options.model.as_os_str().is_empty(), "--model: a folder is missing");
        Ok(options)
    }

    /// Prompt and output together, of any request here.
    fn max_model_len(&self, config: &ModelConfig) -> usize {
        let longest = self.prefills.iter().copied().max().unwrap_or(0);
        let wanted = longest.max(self.context + N_GROWTH_TOKENS) + BLOCK_SIZE;
        wanted.min(config.max_position_embeddings)
    }

    fn max_num_seqs(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(1)
    }
}

fn numbers(name: &str, text: &str) -> anyhow::Result<Vec<usize>> {
    let numbers: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
    numbers.with_context(|| format!("{name}: found {text:?}, expected numbers with commas between"))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let folder = ModelFolder::open(&options.model)?;
    let limits = measure(&options, &folder.config)?;
    let engine = load(&options, &folder)?;
    let mut report = Report {
        work: WorkOf::new(&folder.config),
        limits,
        output: options.output.as_ref().map(std::fs::File::create).transpose()?,
    };
    for (idx, &n_tokens) in options.prefills.iter().enumerate() {
        report.prefill(&engine, n_tokens, idx as u64).await?;
    }
    for &batch in &options.batches {
        report.decode(&engine, batch, options.context, options.n_steps).await?;
    }
    engine.shutdown().await;
    Ok(())
}

/// The card's limits, before the model takes its memory.
fn measure(options: &Options, config: &ModelConfig) -> anyhow::Result<CudaLimits> {
    let cuda = Cuda::new(CudaOptions {
        ordinal: 0,
        dtype: DTYPE,
        head_dim: config.head_dim,
        mode: CudaMode::Fast,
        libraries: options.libraries.clone(),
        images: options.images.clone(),
    })?;
    Ok(cuda.measure(options.measure)?)
}

fn load(options: &Options, folder: &ModelFolder) -> anyhow::Result<EngineHandle> {
    let started = Instant::now();
    let max_model_len = options.max_model_len(&folder.config);
    let max_batch_tokens = MAX_BATCH_TOKENS.max(options.max_num_seqs());
    let mut decoder = load_cuda(
        folder,
        &CudaLoadOptions {
            model: LoadOptions {
                dtype: DTYPE,
                block_size: BLOCK_SIZE,
                limits: DecoderLimits {
                    max_batch_tokens,
                    max_model_len,
                },
                packed_dir: options.packed.clone(),
                load_format: LoadFormat::Dummy { seed: 0 },
            },
            ordinal: 0,
            max_num_seqs: options.max_num_seqs(),
            mode: options.mode,
            libraries: options.libraries.clone(),
            images: options.images.clone(),
            kv: CudaKvSize::PercentOfFree(80),
            max_graph_seqs: options.max_graph_seqs,
        },
        &mut |_, _| {},
    )?;
    let n_blocks = decoder.kv_cache().n_blocks();
    eprintln!("loaded in {:.1} s, {n_blocks} blocks", started.elapsed().as_secs_f64());
    let batch = BatchConfig {
        max_num_seqs: options.max_num_seqs(),
        max_batch_tokens,
        max_model_len: decoder.limits().max_model_len,
        windows: decoder.config().sliding_windows(),
        // Prompts differ anyway, and nothing is to be looked for.
        prefix_caching: PrefixCaching::Off,
        ..BatchConfig::new(n_blocks, BLOCK_SIZE, decoder.transfer_fingerprint())
    };
    Ok(start(decoder, EngineConfig::new(batch))?)
}

/// What a model must read and compute at least, whatever the implementation; a multiply-add is two FLOPs.
struct WorkOf {
    weight_bytes: f64,
    kv_bytes_per_token: f64,
    /// Of a row, without the output matrix.
    row_flops: f64,
    logit_flops: f64,
    /// Of a row, for each token that it sees.
    attention_flops: f64,
    vocab_size: usize,
}

impl WorkOf {
    fn new(config: &ModelConfig) -> WorkOf {
        let (query_width, kv_width) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let hidden = config.hidden_size;
        let layer = hidden * (2 * query_width + 2 * kv_width) + 3 * hidden * config.ffn_size;
        let vocab = hidden * config.vocab_size;
        let element = DTYPE.size();
        WorkOf {
            weight_bytes: ((config.n_layers * layer + vocab) * element) as f64,
            kv_bytes_per_token: (config.n_layers * 2 * kv_width * element) as f64,
            row_flops: (2 * config.n_layers * layer) as f64,
            logit_flops: (2 * vocab) as f64,
            attention_flops: (4 * query_width * config.n_layers) as f64,
            vocab_size: config.vocab_size,
        }
    }

    /// Bytes and FLOPs of a step with rows that see so many tokens in all, of sequences of so many tokens in all.
    fn step(&self, n_rows: usize, n_logit_rows: usize, n_visible: f64, n_context: f64) -> (f64, f64) {
        let bytes = self.weight_bytes + n_context * self.kv_bytes_per_token;
        let flops =
            n_rows as f64 * self.row_flops + n_logit_rows as f64 * self.logit_flops + n_visible * self.attention_flops;
        (bytes, flops)
    }

    fn request(&self, id: u64, n_prompt: usize, max_tokens: usize) -> PortableState {
        let mut state = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut token = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 33) % self.vocab_size as u64) as u32
        };
        let request = Request {
            id: RequestId(u128::from(id)),
            prompt_ids: (0..n_prompt).map(|_| token()).collect(),
            sampling: SamplingParams {
                max_tokens: max_tokens as u32,
                ..SamplingParams::default()
            },
            cache_salt: 0,
        };
        PortableState::fresh(request, Epoch(1))
    }
}

struct Report {
    work: WorkOf,
    limits: CudaLimits,
    output: Option<std::fs::File>,
}

impl Report {
    /// From asking for a prompt's first token to having it: one step, the engine being idle before.
    async fn prefill(&mut self, engine: &EngineHandle, n_tokens: usize, idx: u64) -> anyhow::Result<()> {
        let mut samples = Vec::new();
        for run in 0..=N_PREFILLS as u64 {
            let state = self.work.request(1_000_000 * (idx + 1) + run, n_tokens, 1);
            let started = Instant::now();
            let mut generation = engine.generate(state)?;
            let at = next_token(&mut generation).await?;
            while generation.next().await.is_some() {}
            if run > 0 {
                samples.push(at.saturating_duration_since(started).as_secs_f64());
            }
        }
        let n_visible = (n_tokens * (n_tokens + 1) / 2) as f64;
        let (bytes, flops) = self.work.step(n_tokens, 1, n_visible, n_tokens as f64);
        let case = format!("{n_tokens} tokens");
        self.write("step_prefill", &case, &samples, (bytes, flops), n_tokens, None)
    }

    /// Steps of `batch` sequences, each with a prompt of `context` tokens, once all of them decode.
    async fn decode(
        &mut self,
        engine: &EngineHandle,
        batch: usize,
        context: usize,
        n_steps: usize,
    ) -> anyhow::Result<()> {
        let n_growth_tokens = N_GROWTH_TOKENS.min(engine.batch_config().max_model_len - context);
        // Each generation has room for all that it will say, so they can be heard one after the other.
        let mut generations = Vec::new();
        for sequence_idx in 0..batch {
            let id = 10_000_000 * batch as u64 + sequence_idx as u64;
            generations.push(engine.generate(self.work.request(id, context, n_growth_tokens))?);
        }
        let mut all_decode = Instant::now();
        for generation in &mut generations {
            all_decode = all_decode.max(next_token(generation).await?);
        }
        let before = engine.load().engine;
        let mut times = Vec::new();
        let mut n_generated = 1.0;
        while times.len() <= n_steps {
            let at = next_token(&mut generations[0]).await?;
            n_generated += 1.0;
            // What was said before is of a step that had a prompt in it.
            if at > all_decode {
                times.push(at);
            }
        }
        let after = engine.load().engine;
        let end = times[n_steps];
        for generation in &mut generations[1..] {
            n_generated += 1.0;
            while next_token(generation).await? < end {
                n_generated += 1.0;
            }
        }
        drop(generations);
        let samples: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean_context = context as f64 + n_generated / batch as f64 - n_steps as f64 / 2.0;
        let n_visible = batch as f64 * mean_context;
        let work = self.work.step(batch, batch, n_visible, n_visible);
        let n_engine_steps = (after.n_steps - before.n_steps).max(1) as f64;
        let host_gap_s = (after.overhead_ns - before.overhead_ns) as f64 / 1e9 / n_engine_steps;
        let case = format!("batch {batch} at {context}");
        self.write("step_decode", &case, &samples, work, batch, Some(host_gap_s))
    }

    fn write(
        &mut self,
        op: &str,
        case: &str,
        samples: &[f64],
        (bytes, flops): (f64, f64),
        n_tokens: usize,
        host_gap_s: Option<f64>,
    ) -> anyhow::Result<()> {
        let seconds = median(samples);
        let by_read = bytes / self.limits.read_gb_per_s / 1e9;
        let by_product = self.limits.product_tflop_per_s.map_or(0.0, |peak| flops / peak / 1e12);
        let (limit, limit_s) = if by_read > by_product {
            ("read", by_read)
        } else {
            ("product", by_product)
        };
        println!(
            "{op:<14} {case:<20} {:>9.2} ms, {:>9.0} tokens/s, {:>5.1} % of {limit}{}",
            seconds * 1e3,
            n_tokens as f64 / seconds,
            100.0 * limit_s / seconds,
            host_gap_s.map_or(String::new(), |gap| format!(", host gap {:.0} us", gap * 1e6)),
        );
        let line = json!({
            "op": op, "case": case, "peer": "baton", "seconds": seconds, "of_limit": limit_s / seconds, "limit": limit,
            "bytes": bytes, "flops": flops, "tokens_per_s": n_tokens as f64 / seconds, "host_gap_s": host_gap_s,
            "samples_s": samples, "read_gb_per_s": self.limits.read_gb_per_s,
            "product_tflop_per_s": self.limits.product_tflop_per_s,
        });
        if let Some(file) = &mut self.output {
            writeln!(file, "{line}").context("write the results")?;
        }
        Ok(())
    }
}

/// When the step loop said the next token.
async fn next_token(generation: &mut Generation) -> anyhow::Result<Instant> {
    loop {
        let timed = generation.next().await.context("the generation ended early")?;
        match timed.event {
            EngineEvent::Token { .. } => return Ok(timed.at),
            EngineEvent::Failed(failure) => bail!("{failure}"),
            EngineEvent::Preempted => bail!("preempted: the cache is too small for this batch"),
            EngineEvent::Finished(_) => bail!("finished before enough steps were seen"),
            EngineEvent::PrefillStarted { .. }
            | EngineEvent::PromptLogprobs(_)
            | EngineEvent::ChoiceFinished { .. } => {}
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}
