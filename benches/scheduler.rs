//! What scheduling costs: the decisions of one step, of one placement, of one transferred frame. No tensors, no I/O.

use std::hint::black_box;
use std::sync::Arc;

use baton_scheduler::batch::{BatchConfig, BatchScheduler, Samples, SequenceKind};
use baton_scheduler::block_pool::BlockPool;
use baton_scheduler::ids::{Epoch, Fingerprint, Incarnation, InstanceId, Nanos, RequestId, Role, SequenceId, TokenId};
use baton_scheduler::placement::{
    ClusterView, Disaggregation, InstanceInfo, PlacementRequest, Policy as _, PrefixAware, RequestObjectives, ViewEvent,
};
use baton_scheduler::prefix_cache::{Offered, PrefixCache, PrefixEvent, PrefixHasher};
use baton_scheduler::request::{PortableState, Request, SamplingParams};
use baton_scheduler::transfer::{
    Destination, DestinationFact, EndsBy, KvRange, Source, SourceFact, TransferId, TransferPlan,
};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const BLOCK_SIZE: usize = 16;
const FINGERPRINT: Fingerprint = Fingerprint([7; 32]);

fn request(id: u128, prompt: Vec<TokenId>, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt_ids: Arc::from(prompt),
        sampling: SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
        cache_salt: 0,
    }
}

fn blocks(criterion: &mut Criterion) {
    let mut pool = BlockPool::new(65_536);
    let mut group = criterion.benchmark_group("block_pool");
    group.throughput(Throughput::Elements(128));
    group.bench_function("allocate_and_release_128", |bencher| {
        bencher.iter(|| {
            let held: Vec<_> = (0..128).map(|_| pool.allocate().expect("a free block")).collect();
            held.into_iter().rev().for_each(|block| pool.release(block, &|_| false));
        });
    });
    group.finish();
}

/// 64 prefixes of 128 blocks are cached; one of them is asked for.
fn prefixes(criterion: &mut Criterion) {
    let hasher = PrefixHasher::new(FINGERPRINT, BLOCK_SIZE);
    let (mut pool, mut cache) = (BlockPool::new(16_384), PrefixCache::new(16_384, 1));
    let prompt = |i: u32| Vec::from_iter((0..128 * BLOCK_SIZE as u32).map(|pos| i * 4096 + pos));
    for i in 0..64 {
        let tokens = prompt(i);
        let keys = hasher.keys(0, &tokens);
        for (block_idx, tokens) in tokens.chunks_exact(BLOCK_SIZE).enumerate() {
            let block = cache.allocate(&mut pool, &|_| false).expect("a free block");
            let offered = Offered {
                key: keys[block_idx],
                parent: block_idx.checked_sub(1).map(|idx| keys[idx]),
                block_idx,
                salt: 0,
                tokens,
            };
            cache.register(&mut pool, offered, 0, &block);
            pool.release(block, &|_| false);
        }
    }
    let tokens = prompt(17);
    let keys = hasher.keys(0, &tokens);
    assert_eq!(cache.lookup(&keys, &tokens, BLOCK_SIZE, |_, _| 0), 128);
    let mut group = criterion.benchmark_group("prefix_cache");
    group.throughput(Throughput::Elements(128));
    group.bench_function("hash_128_blocks", |bencher| {
        bencher.iter(|| hasher.keys(0, black_box(&tokens)));
    });
    group.bench_function("lookup_128_blocks", |bencher| {
        bencher.iter(|| cache.lookup(black_box(&keys), &tokens, BLOCK_SIZE, |_, _| 0));
    });
    group.finish();
}

const N_RUNNING: usize = 128;

/// 128 sequences that decode, each in its own context of 256 tokens.
fn decoding() -> BatchScheduler {
    let mut scheduler = BatchScheduler::new(BatchConfig {
        max_num_seqs: N_RUNNING,
        max_batch_tokens: N_RUNNING * 256,
        ..BatchConfig::new(65_536, BLOCK_SIZE, FINGERPRINT)
    })
    .expect("a valid configuration");
    for i in 0..N_RUNNING as u32 {
        let prompt = Vec::from_iter((0..256).map(|pos| i * 1000 + pos));
        let state = PortableState::fresh(request(u128::from(i), prompt, 4096), Epoch(1));
        scheduler.submit(&state, SequenceKind::Local).expect("there is room");
    }
    assert_eq!(step(&mut scheduler), N_RUNNING);
    scheduler
}

/// One step without a model; returns how many sequences it had.
fn step(scheduler: &mut BatchScheduler) -> usize {
    let batch = scheduler.schedule(Nanos::ZERO, &|_| false);
    let sampled: Vec<Vec<TokenId>> = batch
        .items
        .iter()
        .map(|item| match item.samples {
            Samples::Token | Samples::FirstTokens(_) => vec![5],
            Samples::Nothing => Vec::new(),
        })
        .collect();
    black_box(scheduler.commit(&batch, &sampled, &|_| false));
    batch.items.len()
}

fn batches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("batch");
    group.throughput(Throughput::Elements(N_RUNNING as u64));
    group.bench_function("decode_step_of_128", |bencher| {
        bencher.iter_batched_ref(
            decoding,
            |scheduler| {
                // Sixteen steps, so that each sequence fills a block and takes another.
                for _ in 0..BLOCK_SIZE {
                    black_box(step(scheduler));
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("cancel_one_of_128", |bencher| {
        bencher.iter_batched_ref(
            decoding,
            |scheduler| scheduler.remove(SequenceId(64), &|_| false),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn cluster(n_instances: usize) -> ClusterView {
    let mut view = ClusterView::new();
    let hasher = PrefixHasher::new(FINGERPRINT, BLOCK_SIZE);
    for i in 0..n_instances {
        let info = InstanceInfo {
            id: InstanceId::new(&format!("instance-{i}")),
            incarnation: Incarnation(1),
            protocol_version: 2,
            role: if i % 2 == 0 { Role::Prefill } else { Role::Decode },
            fingerprint: FINGERPRINT,
            numerics_class: "bench".into(),
            block_size: BLOCK_SIZE as u32,
            n_blocks_total: 16_384,
            max_num_seqs: 256,
            max_model_len: 131_072,
            short_context: None,
            kv_bytes_per_token: 32_768,
            most_blocks: vec![None],
        };
        let (id, incarnation) = (info.id.clone(), info.incarnation);
        view.apply(ViewEvent::Joined(info));
        // Each holds some of the prefix asked for, and another of 2,048 tokens.
        let own = Vec::from_iter((0..2048).map(|pos| 1_000_000 * (i as u32 + 1) + pos));
        let shared = Vec::from_iter(0..64 * i as u32);
        let stored = [hasher.keys(0, &own), hasher.keys(0, &shared)].concat();
        let events = stored.into_iter().map(PrefixEvent::Stored).collect();
        view.apply(ViewEvent::Prefix(id, incarnation, events));
    }
    view
}

fn placement(criterion: &mut Criterion) {
    let view = cluster(16);
    let request = request(1, (0..2048).collect(), 128);
    let prefix_keys = PrefixHasher::new(FINGERPRINT, BLOCK_SIZE).keys(0, &request.prompt_ids);
    let mut policy = PrefixAware::new(Disaggregation::Auto);
    criterion.bench_function("placement/prefix_aware_of_16", |bencher| {
        bencher.iter(|| {
            let request = PlacementRequest {
                request: &request,
                prefix_keys: &prefix_keys,
                n_tokens: 2048,
                avoided: &[],
                needs_version: 1,
                may_hand_over: true,
                objectives: RequestObjectives::default(),
            };
            policy
                .place(Nanos::ZERO, black_box(request), &view)
                .expect("an idle cluster")
        });
    });
}

/// A whole handoff of 2,048 tokens and 16 layers at 4 blocks a frame, both ends, without its bytes.
fn transfer(criterion: &mut Criterion) {
    const N_BLOCKS: u32 = 128;
    const N_LAYERS: u32 = 16;
    let plan = TransferPlan::handoff(vec![0; N_LAYERS as usize], vec![0], N_BLOCKS);
    let n_frames = u64::from(N_LAYERS * N_BLOCKS / 4);
    let mut group = criterion.benchmark_group("transfer");
    group.throughput(Throughput::Elements(n_frames));
    group.bench_function("handoff_of_512_frames", |bencher| {
        bencher.iter(|| {
            let (now, deadline) = (Nanos::ZERO, Nanos::from_secs(10));
            let mut source = Source::new(plan.clone(), 2, 4, EndsBy::Source, deadline);
            let mut destination = Destination::handoff(TransferId(1), plan.clone(), deadline, now);
            destination.apply(
                now,
                DestinationFact::Accepted {
                    ends_by: EndsBy::Source,
                },
            );
            for layer in 0..N_LAYERS {
                let whole = KvRange {
                    choice: 0,
                    layer,
                    first_block: 0,
                    n_blocks: N_BLOCKS,
                };
                source.apply(now, SourceFact::Ready(whole));
                for first_block in (0..N_BLOCKS).step_by(4) {
                    black_box(source.apply(now, SourceFact::Sent));
                    let range = KvRange {
                        choice: 0,
                        layer,
                        first_block,
                        n_blocks: 4,
                    };
                    let transfer = TransferId(1);
                    black_box(destination.apply(now, DestinationFact::Kv { transfer, range }));
                }
            }
            black_box(destination.apply(now, DestinationFact::Token { ends: false }))
        });
    });
    group.finish();
}

criterion_group!(benches, blocks, prefixes, batches, placement, transfer);
criterion_main!(benches);
