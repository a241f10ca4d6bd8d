//! Many requests at once through tiny pools: generated here, handed over, cancelled at any point. Whatever is heard to
//! its end is as if alone, and every ledger is whole at the end.

use std::collections::BTreeMap;

use baton_kernels::KvWrite;
use baton_scheduler::batch::Numerics;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::handoff::{hand_over, pull};
use super::*;

#[derive(Clone, Debug)]
enum Route {
    Here,
    HandedOver,
    /// Cancelled after so many events.
    Cancelled(usize),
    /// The job, the reservation or the generation is dropped, after so many events.
    HandoffCancelled(usize),
}

#[derive(Clone, Debug)]
struct Arrival {
    family: u32,
    n_prompt: usize,
    max_tokens: u32,
    seed: u64,
    has_prompt_logprobs: bool,
    route: Route,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let route = prop_oneof![
        3 => Just(Route::Here),
        3 => Just(Route::HandedOver),
        1 => (0..12usize).prop_map(Route::Cancelled),
        1 => (0..20usize).prop_map(Route::HandoffCancelled),
    ];
    (
        0..4u32,
        1..40usize,
        1..30u32,
        any::<u64>(),
        prop::bool::weighted(0.1),
        route,
    )
        .prop_map(
            |(family, n_prompt, max_tokens, seed, has_prompt_logprobs, route)| Arrival {
                family,
                n_prompt,
                max_tokens,
                seed,
                has_prompt_logprobs,
                route,
            },
        )
}

/// Retries what was refused for lack of room, as a front door would; each attempt waits a round of the step loop.
macro_rules! until_not_busy {
    ($engine:expr, $attempt:expr) => {{
        let mut n_attempts = 0;
        loop {
            match $attempt {
                Err(Failure::Busy(_)) if n_attempts < 100_000 => n_attempts += 1,
                other => break other,
            }
            $engine.take_prefix_events().await.unwrap();
        }
    }};
}

async fn serve(prefill: &EngineHandle, decode: &EngineHandle, arrival: &Arrival) {
    let mut state = warm(
        &prompt(arrival.family, arrival.n_prompt),
        arrival.max_tokens,
        arrival.seed,
    );
    if arrival.has_prompt_logprobs {
        state.request.sampling.prompt_logprobs = Some(1);
    }
    let said = match arrival.route {
        Route::Here => listen(until_not_busy!(decode, decode.generate(state.clone())).unwrap()).await,
        Route::HandedOver => {
            until_not_busy!(decode, hand_over(prefill, decode, &state).await)
                .unwrap()
                .said
        }
        Route::Cancelled(n_events) => {
            let mut generation = until_not_busy!(decode, decode.generate(state.clone())).unwrap();
            for _ in 0..n_events {
                generation.next().await;
            }
            return;
        }
        Route::HandoffCancelled(n_events) => return cancel_handoff(prefill, decode, &state, n_events).await,
    };
    assert_as_alone(decode, &state, &said);
    let logprobs = arrival
        .has_prompt_logprobs
        .then(|| hash_model::prompt_logprobs_alone(&state.request.prompt_ids, 1));
    assert_eq!(said.prompt_logprobs, logprobs);
}

async fn cancel_handoff(prefill: &EngineHandle, decode: &EngineHandle, state: &PortableState, n_events: usize) {
    let mut reservation = until_not_busy!(decode, decode.reserve(state.clone()).await).unwrap();
    let context = &mut reservation.choices[0];
    let first_block = context.layer_groups[0].n_blocks_held;
    let places = first_block..context.n_blocks_total;
    let writers = std::mem::take(&mut context.layer_groups[0].writers);
    let mut writers: BTreeMap<usize, KvWrite> = places.zip(writers).collect();
    let mut job = until_not_busy!(prefill, prefill.prefill(state.clone(), &[first_block])).unwrap();
    if n_events < 6 {
        for _ in 0..n_events {
            job.next().await;
        }
        // The reservation goes first, under its writers.
        drop(reservation);
        return;
    }
    let (first, _, _) = pull(&mut job, &mut writers, &mut Vec::new()).await.unwrap();
    drop((job, writers));
    let mut generation = reservation.join(vec![first], Numerics::Same).unwrap();
    for _ in 6..n_events {
        generation.next().await;
    }
}

fn tiny(n_blocks: usize) -> EngineHandle {
    let batch = BatchConfig {
        max_num_seqs: 6,
        max_batch_tokens: 16,
        max_model_len: 64,
        ..batch_config(n_blocks)
    };
    start(model(n_blocks), EngineConfig::new(batch)).unwrap()
}

async fn serve_all(arrivals: &[Arrival], n_blocks: usize, n_at_once: usize) -> (EngineHandle, EngineHandle) {
    use futures::StreamExt;
    let (prefill, decode) = (tiny(n_blocks + 8), tiny(n_blocks));
    let served = futures::stream::iter(arrivals).map(|arrival| serve(&prefill, &decode, arrival));
    served.buffer_unordered(n_at_once).collect::<Vec<()>>().await;
    settle(&prefill).await;
    settle(&decode).await;
    (prefill, decode)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

#[test]
fn two_thousand_requests_leave_whole_ledgers() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[42; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let arrivals = prop::collection::vec(arrival(), 2000)
        .new_tree(&mut runner)
        .unwrap()
        .current();
    let (prefill, decode) = block_on(serve_all(&arrivals, 20, 24));
    let (at_prefill, at_decode) = (prefill.load(), decode.load());
    assert!(at_decode.scheduler.n_preemptions > 0, "{at_decode:?}");
    assert!(at_decode.scheduler.n_prefix_hit_tokens > 0 && at_prefill.scheduler.n_prefix_hit_tokens > 0);
    assert!(at_decode.scheduler.n_deferrals > 0 && at_prefill.engine.n_layer_blocks_ready > 0);
    assert!(
        at_decode.engine.n_cancelled > 100 && at_decode.engine.n_joined > 500,
        "{at_decode:?}"
    );
    assert_eq!((at_prefill.engine.n_failed, at_decode.batch.n_running), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_arrivals_are_as_alone(
        arrivals in prop::collection::vec(arrival(), 1..40),
        n_blocks in 16..40usize,
        n_at_once in 1..20usize,
    ) {
        block_on(serve_all(&arrivals, n_blocks, n_at_once));
    }
}
