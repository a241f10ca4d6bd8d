//! The CUDA sampler, run on the CPU through the kernels' shim, against the engine's own: the same token, bit for bit, for the
//! same logits; and the same log-probabilities.

#[path = "../../kernels/tests/cuda_shim/library.rs"]
#[allow(
    unsafe_code,
    dead_code,
    reason = "shared with the kernels' tests, which use all of it"
)]
mod library;

use baton_engine::sampler::Sampler;
use baton_kernels::cuda::launch;
use baton_kernels::cuda::sampling::{MAX_BAND, MAX_CANDIDATES, RowStatus, Sampling};
use baton_scheduler::request::SamplingParams;
use library::Order;
use proptest::prelude::*;

/// Each row's token and status.
fn sample(logits: &[Vec<f32>], params: &[Sampling], order: Order) -> (Vec<u32>, Vec<RowStatus>) {
    let vocab = logits[0].len() as u32;
    let rows = logits.concat();
    let (mut ids, mut status) = (vec![7777_u32; logits.len()], vec![7777_u32; logits.len()]);
    let params = params.to_vec();
    let grid = launch::sample(logits.len() as u32, vocab);
    let args = [
        (&mut ids).into(),
        (&mut status).into(),
        (&rows).into(),
        (&params).into(),
        vocab.into(),
    ];
    library::launch("sample", grid, order, &args);
    (
        ids,
        status
            .into_iter()
            .map(|status| RowStatus::from_device(status).unwrap())
            .collect(),
    )
}

fn on_host(params: Sampling) -> SamplingParams {
    SamplingParams {
        seed: params.seed,
        temperature: params.temperature,
        min_p: params.min_p,
        top_p: params.top_p,
        top_k: params.top_k,
        ..SamplingParams::default()
    }
}

/// Logits as models have them: most far below a few, some equal, some ruled out.
fn logits(vocab: usize) -> impl Strategy<Value = Vec<f32>> {
    let steepness = prop::sample::select(vec![0.0_f32, 0.5, 4.0, 30.0]);
    (any::<u32>(), steepness, 0..4_u32).prop_map(move |(seed, steepness, kind)| {
        let mut state = u64::from(seed) | 1 << 40;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let mut logits: Vec<f32> = (0..vocab).map(|_| -steepness * next().max(1e-9).ln() * 0.3).collect();
        match kind {
            // Coarse, so that many are equal.
            1 => logits.iter_mut().for_each(|x| *x = x.round()),
            2 => logits
                .iter_mut()
                .skip(1)
                .for_each(|x| *x = if next() < 0.9 { f32::NEG_INFINITY } else { *x }),
            _ => {}
        }
        logits
    })
}

fn params() -> impl Strategy<Value = Sampling> {
    (
        any::<u64>(),
        0_u32..2000,
        0_u32..4,
        prop::sample::select(vec![0.0_f32, 0.3, 1.0, 1.7]),
        prop::sample::select(vec![0.0_f32, 0.0, 0.02, 0.4]),
        prop::sample::select(vec![1.0_f32, 1.0, 0.95, 0.5, 0.01]),
        prop::sample::select(vec![0_u32, 0, 1, 7, 50, 256, 257, 100_000]),
    )
        .prop_map(|(seed, index, choice, temperature, min_p, top_p, top_k)| Sampling {
            seed,
            index,
            choice,
            temperature,
            min_p,
            top_p,
            top_k,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_device_chooses_what_the_host_chooses(
        (rows, params) in prop::sample::select(vec![1_usize, 5, 255, 256, 257, 1031, 5000])
            .prop_flat_map(|vocab| (prop::collection::vec(logits(vocab), 4), prop::collection::vec(params(), 4)))
    ) {
        if !library::has_compiler() {
            return Ok(());
        }
        let (ids, status) = sample(&rows, &params, Order::Forward);
        prop_assert_eq!(&(ids.clone(), status.clone()), &sample(&rows, &params, Order::Reversed));
        let mut sampler = Sampler::new();
        for (row_idx, (logits, params)) in rows.iter().zip(&params).enumerate() {
            let host = sampler.sample(logits, &on_host(*params), params.choice, params.index).unwrap().id;
            match status[row_idx] {
                RowStatus::Chosen => prop_assert_eq!(ids[row_idx], host, "row {} of {}: {:?}", row_idx, logits.len(), params),
                RowStatus::LeftToHost => {
                    let has_large_top_k = params.top_k > MAX_CANDIDATES && (params.top_k as usize) < logits.len();
                    let may_have_wide_band = params.top_p < 1.0 && logits.len() > MAX_BAND as usize;
                    prop_assert!(params.temperature > 0.0 && (has_large_top_k || may_have_wide_band), "{:?}", params);
                }
                other => prop_assert!(false, "{:?} for {:?}", other, params),
            }
        }
    }

    #[test]
    fn log_probabilities_are_the_hosts(
        (rows, picks, n_top) in prop::sample::select(vec![1_usize, 31, 257, 2003])
            .prop_flat_map(|vocab| (prop::collection::vec(logits(vocab), 3), prop::collection::vec(0..vocab as u32, 3), 0_usize..21))
    ) {
        if !library::has_compiler() {
            return Ok(());
        }
        let vocab = rows[0].len();
        let all = rows.concat();
        let (mut logprob, mut rank) = (vec![f32::NAN; 3], vec![0_u32; 3]);
        let (mut top_ids, mut top) = (vec![u32::MAX; 3 * n_top], vec![f32::NAN; 3 * n_top]);
        let args = [
            (&mut logprob).into(), (&mut rank).into(), (&mut top_ids).into(), (&mut top).into(),
            (&all).into(), (&picks).into(), (vocab as u32).into(), (n_top as u32).into(),
        ];
        library::launch("logprobs", launch::sample(3, vocab as u32), Order::Forward, &args);
        let mut sampler = Sampler::new();
        for (row_idx, logits) in rows.iter().enumerate() {
            let host = sampler.logprobs(logits, picks[row_idx], n_top).unwrap();
            prop_assert_eq!(logprob[row_idx].to_bits(), host.logprob.to_bits());
            prop_assert_eq!(rank[row_idx], host.rank);
            for (i, (id, logprob)) in host.top.iter().enumerate() {
                prop_assert_eq!(top_ids[row_idx * n_top + i], *id);
                prop_assert_eq!(top[row_idx * n_top + i].to_bits(), logprob.to_bits());
            }
        }
    }
}

/// A nucleus of thousands of tokens is drawn from on the device, and as on the host.
#[test]
fn wide_nuclei_stay_on_the_device() {
    if !library::has_compiler() {
        return;
    }
    let vocab = 5000_usize;
    let row: Vec<f32> = (0..vocab)
        .map(|id| 4.0 * ((id * 7919 % vocab) as f32 / vocab as f32))
        .collect();
    let params: Vec<Sampling> = (0..24)
        .map(|index| Sampling {
            seed: 99,
            index,
            choice: 0,
            temperature: 1.0,
            min_p: if index % 3 == 0 { 0.1 } else { 0.0 },
            top_p: 0.9,
            top_k: 0,
        })
        .collect();
    let rows = vec![row; params.len()];
    let (ids, status) = sample(&rows, &params, Order::Forward);
    assert!(status.iter().all(|status| *status == RowStatus::Chosen), "{status:?}");
    let mut sampler = Sampler::new();
    let of_host = |params: &Sampling| sampler.sample(&rows[0], &on_host(*params), 0, params.index).unwrap().id;
    assert_eq!(ids, params.iter().map(of_host).collect::<Vec<u32>>());
}

/// Broken rows say so, and do not disturb their neighbours.
#[test]
fn broken_rows_have_a_status() {
    if !library::has_compiler() {
        return;
    }
    let vocab = 700;
    let mut rows = vec![vec![0.5_f32; vocab]; 4];
    rows[0][699] = f32::NAN;
    rows[1][3] = f32::INFINITY;
    rows[2].fill(f32::NEG_INFINITY);
    rows[3][12] = 3.0;
    let greedy = Sampling {
        seed: 1,
        index: 0,
        choice: 0,
        temperature: 0.0,
        min_p: 0.0,
        top_p: 1.0,
        top_k: 0,
    };
    let warm = Sampling {
        temperature: 0.01,
        ..greedy
    };
    for params in [greedy, warm] {
        let (ids, status) = sample(&rows, &[params; 4], Order::Forward);
        use RowStatus::{Chosen, NoCandidate, NotFinite};
        assert_eq!(status, [NotFinite, NotFinite, NoCandidate, Chosen]);
        assert_eq!(ids, [u32::MAX, u32::MAX, u32::MAX, 12]);
    }
}

/// A row that gave no token is nobody's, but what follows it must not read past the table.
#[test]
fn a_steps_ids_are_given_or_just_sampled() {
    if !library::has_compiler() {
        return;
    }
    const NONE: u32 = u32::MAX;
    let vocab = 700_u32;
    let n_rows = 523;
    let sampled = vec![5_u32, 699, NONE, 0];
    let ids: Vec<u32> = (0..n_rows).map(|row| row % vocab).collect();
    let sources: Vec<u32> = (0..n_rows)
        .map(|row| if row % 3 == 0 { row % 4 } else { NONE })
        .collect();
    let mut out = vec![7777_u32; n_rows as usize];
    let args = [
        (&mut out).into(),
        (&ids).into(),
        (&sources).into(),
        (&sampled).into(),
        n_rows.into(),
        vocab.into(),
    ];
    library::launch("token_ids", launch::token_ids(n_rows), Order::Forward, &args);
    let expected = |row: u32| match row % 3 {
        0 => [5, 699, 0, 0][(row % 4) as usize],
        _ => row % vocab,
    };
    assert_eq!(out, (0..n_rows).map(expected).collect::<Vec<u32>>());
}
