//! The CPU operators at the shapes of Llama-3.2-1B in bf16, each beside the limit that binds it, measured in this very run.
//!
//! `cargo bench -p baton-kernels --bench cpu_ops [-- FILTER]`. Small batches walk through copies of the weights that together
//! exceed the caches, as a model does. A limit is measured right before and right after each case and the better is used,
//! so other work on the machine shows as a limit that moved. Threads: all cores, or BENCH_THREADS.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_kernels::machine::{measure_peak, measure_read_bandwidth};
use baton_kernels::{
    AttentionParams, Backend, Cpu, CpuOptions, DType, KernelError, KvCache, KvLayout, PackedWeights, Packing,
    RaggedBatch, RaggedSequence, SourceTensor, WeightKind, WeightSource, WeightSpec,
};
use criterion::Criterion;

const DTYPE: DType = DType::Bf16;
const N_HEADS: usize = 32;
const LAYOUT: KvLayout = KvLayout {
    n_layers: 16,
    n_kv_heads: 8,
    block_size: 16,
    head_dim: 64,
    dtype: DTYPE,
};

/// Copies of a matrix together exceed this, beyond any last-level cache here.
const BEYOND_CACHE_BYTES: usize = 256 << 20;

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let n_threads = std::env::var("BENCH_THREADS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(cores);
    let cpu = Cpu::new(CpuOptions {
        n_threads,
        dtype: DTYPE,
        isa: None,
    })
    .expect("the best instruction set is available");
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    println!("{} on {n_threads} threads", cpu.numerics_class());
    let bench = &mut Bench {
        criterion: &mut criterion,
        cpu: &cpu,
        n_threads,
    };
    for (n_in, n_out) in [(2048, 2048), (2048, 8192), (8192, 2048), (2048, 128_256)] {
        linear(bench, n_in, n_out);
    }
    for context in [1024, 4096, 16_384] {
        decode_attention(bench, context);
    }
    for n_tokens in [512, 2048] {
        prefill_attention(bench, n_tokens);
    }
    criterion.final_summary();
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    cpu: &'a Cpu,
    n_threads: usize,
}

impl Bench<'_> {
    /// Times `run` and prints its best share of the nearer of the two limits.
    fn case(&mut self, name: &str, bytes: f64, flops: f64, mut run: impl FnMut()) {
        let limits = || {
            let read = measure_read_bandwidth(self.n_threads).expect("threads in range") * 1e9;
            let peak = measure_peak(DTYPE, self.n_threads).expect("bf16 is supported") * 1e9;
            (read, peak)
        };
        let best = Cell::new(f64::INFINITY);
        let before = Cell::new(None);
        self.criterion.bench_function(name, |bencher| {
            if before.get().is_none() {
                before.set(Some(limits()));
            }
            bencher.iter_custom(|n_iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..n_iterations {
                    let started = Instant::now();
                    run();
                    let elapsed = started.elapsed();
                    best.set(best.get().min(elapsed.as_secs_f64()));
                    total += elapsed;
                }
                total
            });
        });
        // Nothing was timed when the filter left this case out.
        let Some(before) = before.get() else { return };
        let after = limits();
        let (read, peak) = (before.0.max(after.0), before.1.max(after.1));
        let (seconds, by_read, by_peak) = (best.get(), bytes / read, flops / peak);
        let (bound, limit) = if by_read > by_peak {
            ("read", by_read)
        } else {
            ("peak", by_peak)
        };
        println!(
            "ROOFLINE {name}: best {:.3} ms, {:.1} GB/s, {:.0} GFLOP/s, {:.0} % of {bound} (read {:.1} GB/s, peak {:.0} GFLOP/s)",
            seconds * 1e3,
            bytes / seconds / 1e9,
            flops / seconds / 1e9,
            100.0 * limit / seconds,
            read / 1e9,
            peak / 1e9,
        );
    }
}

/// Small values from a fixed sequence: enough to keep the arithmetic honest.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0).collect()
}

/// Matrices of any shape, all alike.
struct Generator {
    shape: Vec<usize>,
}

impl WeightSource for Generator {
    fn tensor(&self, _name: &str) -> Result<SourceTensor<'_>, String> {
        let n = self.shape.iter().product::<usize>();
        let data = (0..n)
            .flat_map(|i| ((0x3c00 + i * 7919 % 509) as u16 | ((i & 1) << 15) as u16).to_le_bytes())
            .collect();
        Ok(SourceTensor {
            dtype: DType::Bf16,
            shape: self.shape.clone(),
            data: Cow::Owned(data),
        })
    }
}

fn weights(n_in: usize, n_out: usize) -> (Arc<PackedWeights>, usize) {
    let n_copies = BEYOND_CACHE_BYTES.div_ceil(n_in * n_out * DTYPE.size());
    let kind = WeightKind::Matrix { n_out, n_in };
    let specs: Vec<WeightSpec> = (0..n_copies)
        .map(|i| WeightSpec {
            name: i.to_string(),
            kind,
            parts: vec![i.to_string()],
        })
        .collect();
    let packed = PackedWeights::in_memory(
        Packing::Panels,
        DTYPE,
        &specs,
        &Generator {
            shape: vec![n_out, n_in],
        },
    );
    (packed.expect("generated tensors have the shape asked for"), n_copies)
}

fn linear(bench: &mut Bench<'_>, n_in: usize, n_out: usize) {
    let cpu = bench.cpu;
    let built = std::cell::OnceCell::new();
    for rows in [1, 4, 8, 32, 512] {
        let mut x = cpu.tensor(rows, n_in).unwrap();
        x.set(&values(rows * n_in));
        let mut out = cpu.tensor(rows, n_out).unwrap();
        let mut turn = 0;
        let bytes = (n_in * n_out * DTYPE.size() + 4 * rows * (n_in + n_out)) as f64;
        let flops = 2.0 * (rows * n_in * n_out) as f64;
        bench.case(&format!("linear/{n_in}x{n_out}/rows={rows}"), bytes, flops, || {
            let matrices = built.get_or_init(|| {
                let (packed, n_copies) = weights(n_in, n_out);
                (0..n_copies)
                    .map(|i| cpu.matrix(&packed, &i.to_string()).expect("just packed"))
                    .collect::<Vec<_>>()
            });
            turn = (turn + 1) % matrices.len();
            cpu.linear(&mut out, &x, &matrices[turn]);
        });
    }
}

/// How the KV cache gets its memory.
type MakeCache = fn(KvLayout, usize) -> Result<KvCache, KernelError>;

fn attention(bench: &mut Bench<'_>, name: &str, make_cache: MakeCache, start_pos: usize, n_tokens: usize) {
    let cpu = bench.cpu;
    let context = start_pos + n_tokens;
    let n_blocks = LAYOUT.blocks_for(context);
    let mut kv = make_cache(LAYOUT, n_blocks).expect("a small cache");
    let part: Vec<u8> = (0..LAYOUT.part_bytes())
        .map(|i| if i % 2 == 0 { (i * 31) as u8 } else { 0x3d })
        .collect();
    for block in 0..n_blocks as u32 {
        let mut writer = kv.write_handle(block).expect("a fresh block");
        for layer in 0..LAYOUT.n_layers {
            writer.write(layer, &part, &part).expect("a part has the right size");
        }
        writer.seal();
    }
    // Scattered, as after some hours of serving: 7919 is prime.
    let block_table: Vec<u32> = (0..n_blocks).map(|i| (i * 7919 % n_blocks) as u32).collect();
    let sequences = [RaggedSequence {
        start_pos,
        n_tokens,
        block_table: &block_table,
        rope_variant: 0,
    }];
    let batch = RaggedBatch { sequences: &sequences };
    let cols = (N_HEADS + 2 * LAYOUT.n_kv_heads) * LAYOUT.head_dim;
    let mut qkv = cpu.tensor(n_tokens, cols).unwrap();
    qkv.set(&values(n_tokens * cols));
    let mut out = cpu.tensor(n_tokens, N_HEADS * LAYOUT.head_dim).unwrap();
    let params = AttentionParams {
        n_heads: N_HEADS,
        scale: 0.125,
        window: None,
        soft_cap: None,
        sinks: None,
    };
    let bytes = (n_blocks * LAYOUT.layer_block_bytes()) as f64;
    // Two products per query, head and visible token; the causal half that is skipped does not count.
    let visible: usize = (start_pos + 1..=context).sum();
    let flops = (4 * visible * N_HEADS * LAYOUT.head_dim) as f64;
    let mut layer = 0;
    bench.case(name, bytes, flops, || {
        layer = (layer + 1) % LAYOUT.n_layers;
        cpu.attention(&mut out, &qkv, batch, &params, layer, &kv);
    });
}

fn decode_attention(bench: &mut Bench<'_>, context: usize) {
    let private = format!("attention/decode/context={context}");
    attention(bench, &private, KvCache::new, context - 1, 1);
    // What instances use, so that other processes can read it; in huge pages only where the system has them for files.
    let shared = format!("attention/decode/context={context}/shared");
    attention(bench, &shared, KvCache::shared, context - 1, 1);
}

fn prefill_attention(bench: &mut Bench<'_>, n_tokens: usize) {
    let name = format!("attention/prefill/tokens={n_tokens}");
    attention(bench, &name, KvCache::shared, 0, n_tokens);
}
