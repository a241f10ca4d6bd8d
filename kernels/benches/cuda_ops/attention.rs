//! Attention over the paged cache: decode beside a kernel that only reads as many bytes, prefill beside the rate of products.
//! Heads as in Llama-3-70B, eight query heads a KV head; cases are named as the peers name theirs.

use baton_kernels::cuda::{Cuda, CudaMode};
use baton_kernels::{AttentionParams, Backend, KvCache, KvLayout, RaggedBatch, RaggedSequence};

use crate::device::{DTYPE, tensor};
use crate::point::{Limit, Limits, Peak, Point, Report};
use crate::{Options, Scale, or_fail};

const N_KV_HEADS: usize = 8;
const GROUP: usize = 8;
const HEAD_DIM: usize = 128;
const N_HEADS: usize = N_KV_HEADS * GROUP;
const LAYOUT: KvLayout = KvLayout {
    n_layers: 1,
    n_kv_heads: N_KV_HEADS,
    block_size: 16,
    head_dim: HEAD_DIM,
    dtype: DTYPE,
};

/// The largest cache; on smaller cards a quarter of what is free, as the limit reads as much elsewhere.
const MOST_KV_BYTES: usize = 16 << 30;

/// Read before each run of prefill, to cool the caches.
const LEAD_BYTES: usize = 256 << 20;

/// One call that reads so many bytes is long enough for its share of the bandwidth to be an aim.
const AIMED_BYTES: usize = 256 << 20;

pub fn decode(options: &Options, report: &mut Report) {
    let cases: &[(usize, usize)] = match options.scale {
        Scale::Full => &[
            (1, 1 << 10),
            (1, 8 << 10),
            (1, 32 << 10),
            (1, 128 << 10),
            (4, 8 << 10),
            (4, 128 << 10),
            (16, 1 << 10),
            (16, 8 << 10),
            (16, 32 << 10),
            (16, 128 << 10),
            (64, 1 << 10),
            (64, 8 << 10),
            (64, 32 << 10),
            (256, 1 << 10),
            (256, 2 << 10),
            (256, 8 << 10),
        ],
        Scale::Smoke => &[(1, 33), (3, 20)],
    };
    for (mode, op, cases) in [
        (CudaMode::Fast, "attention_decode", cases),
        (CudaMode::Deterministic, "attention_decode_deterministic", &cases[1..2]),
    ] {
        let cuda = options.source.open(HEAD_DIM, mode);
        let context = Context::new(&cuda, options.scale);
        let limits = Limits::new(&cuda, context.kv_bytes(), 0, None);
        for &(batch, n_tokens) in cases {
            let lengths: Vec<usize> = vec![n_tokens; batch];
            context.decode(report, &limits, op, format!("batch {batch} at {n_tokens}"), &lengths);
        }
        if options.scale == Scale::Full && mode == CudaMode::Fast {
            // As many tokens as 64 at 8k, from a sixteenth of that to eight times as long.
            let lengths: Vec<usize> = (0..64)
                .map(|i| [512, 1 << 10, 2 << 10, 4 << 10, 8 << 10, 8 << 10, 16 << 10, 24 << 10][i % 8])
                .collect();
            context.decode(report, &limits, op, "batch 64 at 512 to 24576".to_owned(), &lengths);
        }
    }
}

pub fn prefill(options: &Options, report: &mut Report) {
    // Tokens cached before, and new.
    let cases: &[(usize, usize)] = match options.scale {
        Scale::Full => &[(0, 2 << 10), (0, 8 << 10), (0, 32 << 10), (28 << 10, 4 << 10)],
        Scale::Smoke => &[(0, 19), (17, 3)],
    };
    let fast = options.source.open(HEAD_DIM, CudaMode::Fast);
    let peak = Peak::new(&fast, options.scale);
    let limits = Limits::new(&fast, LEAD_BYTES, 0, Some(&peak));
    for &(cached, new) in cases {
        let context = Context::of_bytes(&fast, LAYOUT.blocks_for(cached + new) * LAYOUT.block_bytes());
        context.prefill(report, &limits, "attention_prefill", cached, new);
    }
    // Products of the other mode are not the library's, so the peak stays that of the first.
    let deterministic = options.source.open(HEAD_DIM, CudaMode::Deterministic);
    let limits = Limits::new(&deterministic, LEAD_BYTES, 0, Some(&peak));
    let (cached, new) = cases[1];
    let context = Context::of_bytes(&deterministic, LAYOUT.blocks_for(cached + new) * LAYOUT.block_bytes());
    context.prefill(report, &limits, "attention_prefill_deterministic", cached, new);
}

/// A cache full of numbers.
struct Context<'a> {
    cuda: &'a Cuda,
    kv: KvCache,
}

impl<'a> Context<'a> {
    fn new(cuda: &'a Cuda, scale: Scale) -> Context<'a> {
        let n_bytes = match scale {
            Scale::Full => MOST_KV_BYTES.min(or_fail(cuda.free_bytes()) / 4),
            Scale::Smoke => 9 * LAYOUT.block_bytes(),
        };
        Context::of_bytes(cuda, n_bytes)
    }

    fn of_bytes(cuda: &'a Cuda, n_bytes: usize) -> Context<'a> {
        let n_blocks = n_bytes / LAYOUT.block_bytes();
        let mut kv = or_fail(cuda.kv_cache(LAYOUT, n_blocks));
        let n_written = n_blocks.min(61);
        for block in 0..n_written {
            let part: Vec<u8> = (0..LAYOUT.part_bytes() / 2)
                .flat_map(|i| (((i * 7919 + block * 104_729) % 65_521) as u16 & 0x83ff | 0x3c00).to_le_bytes())
                .collect();
            let mut writer = kv.write_handle(block as u32).expect("a fresh block");
            writer.write(0, &part, &part).expect("a part has the right size");
            writer.seal();
        }
        for block in n_written..n_blocks {
            kv.copy_block((block % n_written) as u32, block as u32)
                .expect("blocks that nobody uses");
        }
        Context { cuda, kv }
    }

    fn kv_bytes(&self) -> usize {
        self.kv.n_blocks() * LAYOUT.block_bytes()
    }

    /// Tables of sequences of these lengths, scattered as after some hours of serving; nothing where they do not fit.
    fn tables(&self, lengths: &[usize]) -> Option<Vec<Vec<u32>>> {
        let n_blocks = self.kv.n_blocks();
        // Prime, so that it walks through all blocks of a cache of any other size.
        let stride = [7919, 7907][usize::from(n_blocks.is_multiple_of(7919))];
        let mut next = (0..n_blocks).map(|i| (i * stride % n_blocks) as u32);
        let table = |n_tokens: &usize| {
            let table: Vec<u32> = next.by_ref().take(LAYOUT.blocks_for(*n_tokens)).collect();
            (table.len() == LAYOUT.blocks_for(*n_tokens)).then_some(table)
        };
        lengths.iter().map(table).collect()
    }

    fn decode(&self, report: &mut Report, limits: &Limits<'_>, op: &str, case: String, lengths: &[usize]) {
        let Some(tables) = self.tables(lengths) else {
            println!("{op:<28} {case:<36} not measured: more KV than the card has room for");
            return;
        };
        let n_bytes = lengths.iter().sum::<usize>() * LAYOUT.layer_block_bytes() / LAYOUT.block_size;
        let point = Point {
            op,
            case,
            limit: Limit::Read(n_bytes),
            aim: (n_bytes >= AIMED_BYTES).then_some(0.9),
        };
        let sequences: Vec<RaggedSequence<'_>> = (tables.iter().zip(lengths))
            .map(|(block_table, n_tokens)| RaggedSequence {
                start_pos: n_tokens - 1,
                n_tokens: 1,
                block_table,
                rope_variant: 0,
            })
            .collect();
        self.measure(report, limits, point, &sequences);
    }

    fn prefill(&self, report: &mut Report, limits: &Limits<'_>, op: &str, cached: usize, new: usize) {
        let tables = self.tables(&[cached + new]).expect("made for it");
        // Two products a query, head and token that it sees; the half that the causal mask hides is not counted.
        let n_visible: usize = (cached + 1..=cached + new).sum();
        let point = Point {
            op,
            case: match cached {
                0 => format!("{new} tokens"),
                _ => format!("{new} tokens after {cached}"),
            },
            limit: Limit::Product(4.0 * n_visible as f64 * (N_HEADS * HEAD_DIM) as f64),
            aim: Some(0.35),
        };
        let sequence = RaggedSequence {
            start_pos: cached,
            n_tokens: new,
            block_table: &tables[0],
            rope_variant: 0,
        };
        self.measure(report, limits, point, &[sequence]);
    }

    fn measure(&self, report: &mut Report, limits: &Limits<'_>, point: Point<'_>, sequences: &[RaggedSequence<'_>]) {
        let batch = RaggedBatch { sequences };
        let qkv = tensor(self.cuda, batch.n_rows(), (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM);
        let mut out = self.cuda.tensor(batch.n_rows(), N_HEADS * HEAD_DIM).expect("room");
        let params = AttentionParams {
            n_heads: N_HEADS,
            scale: 1.0 / (HEAD_DIM as f32).sqrt(),
            window: None,
            soft_cap: None,
            sinks: None,
        };
        // One step: the batch is planned by the first run, which does not count, as one plan serves all layers of a step.
        self.cuda.begin_step();
        report.measure(limits, point, || {
            self.cuda.attention(&mut out, &qkv, batch, &params, 0, &self.kv);
        });
    }
}
