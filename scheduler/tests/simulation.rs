//! A fixed set of seeds of the simulation, on all cores. `BATON_SIMULATION_SEEDS` sets their number, and
//! `BATON_SIMULATION_START` the first; `baton simulate` runs more of them and shows the trace of one that fails.

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use baton_scheduler::simulation::{Coverage, run};

/// About two minutes on two cores.
const SEEDS: u64 = 20_000;

/// Over so many seeds every transition that can be is met a hundred times together with every fault that can be felt then.
const SEEDS_FOR_A_HUNDRED: u64 = 100_000;
/// Over the fixed set, a fifth of those.
const AT_LEAST_IN_FIXED_SET: u64 = 10;

fn setting(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {value:?}, expected a number"))
    })
}

#[test]
fn every_seed_of_the_fixed_set_passes() {
    let (start, n_seeds) = (
        setting("BATON_SIMULATION_START", 1_000_000),
        setting("BATON_SIMULATION_SEEDS", SEEDS),
    );
    let (next, began) = (AtomicU64::new(start), Instant::now());
    let total = Mutex::new((Coverage::default(), 0, 0));
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                let (mut coverage, mut n_requests, mut n_faults) = (Coverage::default(), 0, 0);
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= start + n_seeds {
                        break;
                    }
                    let Ok(report) = catch_unwind(|| run(seed, None)) else {
                        next.store(start + n_seeds, Relaxed);
                        panic!("seed {seed} failed; see it by: baton simulate --start {seed} --trace");
                    };
                    assert!(
                        report.n_requests >= 100 && report.n_faults >= 5,
                        "seed {seed}: {report:?}"
                    );
                    coverage.add(&report.coverage);
                    n_requests += report.n_requests;
                    n_faults += report.n_faults;
                }
                let mut total = total.lock().expect("the other seeds have passed");
                total.0.add(&coverage);
                (total.1, total.2) = (total.1 + n_requests, total.2 + n_faults);
            });
        }
    });
    let (coverage, n_requests, n_faults) = total.into_inner().expect("all seeds have passed");
    println!(
        "{n_seeds} seeds, {n_requests} requests, {n_faults} faults, {} pairs of a transition and a fault, {:.1} s",
        coverage.n_pairs(),
        began.elapsed().as_secs_f64()
    );
    let surprises = coverage.surprises();
    assert!(surprises.is_empty(), "what cannot be has been: {surprises:?}");
    if n_seeds >= SEEDS {
        let at_least = if n_seeds >= SEEDS_FOR_A_HUNDRED {
            100
        } else {
            AT_LEAST_IN_FIXED_SET
        };
        let shortfalls = coverage.shortfalls(at_least);
        let lines = shortfalls
            .iter()
            .map(|(transition, fault, n)| format!("{transition} / {}: {n}", fault.as_str()));
        let lines: Vec<String> = lines.collect();
        assert!(
            lines.is_empty(),
            "met less than {at_least} times:\n{}",
            lines.join("\n")
        );
    }
}
