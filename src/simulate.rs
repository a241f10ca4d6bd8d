//! Runs the deterministic simulation over many seeds on all cores, and prints the first failing one with its trace.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use baton_scheduler::simulation::{
    Coverage, FaultKind, RunReport, Transition, every_transition, never, rare, run as run_seed,
};
use indicatif::{ProgressBar, ProgressStyle};

/// Which seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimulateConfig {
    /// The first.
    pub start: u64,
    /// How many.
    pub n_seeds: u64,
    /// Threads.
    pub n_threads: usize,
    /// Print how often each transition was met, alone and together with each kind of fault.
    pub coverage: bool,
    /// Print what happens, event by event.
    pub trace: bool,
}

/// Totals of the seeds that passed.
#[derive(Default)]
struct Totals {
    n_seeds: u64,
    n_requests: u64,
    n_finished: u64,
    n_failed: u64,
    n_faults: u64,
    n_events: u64,
    n_moves: u64,
    coverage: Coverage,
}

impl Totals {
    fn add(&mut self, report: &RunReport) {
        self.n_seeds += 1;
        self.n_requests += report.n_requests;
        self.n_finished += report.n_finished;
        self.n_failed += report.n_failed;
        self.n_faults += report.n_faults;
        self.n_events += report.n_events;
        self.n_moves += report.n_moves;
        self.coverage.add(&report.coverage);
    }
}

/// Runs them.
///
/// # Errors
/// When a seed fails; it is named, with the command that shows its trace.
pub fn run(config: SimulateConfig) -> anyhow::Result<()> {
    if config.trace {
        return trace(config.start);
    }
    let bar = ProgressBar::new(config.n_seeds);
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left",
    )?);
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (totals, failed) = (Mutex::new(Totals::default()), Mutex::new(None::<(u64, String)>));
    let began = Instant::now();
    // A failing seed is told once, at the end.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..config.n_threads {
            scope.spawn(|| {
                let mut own = Totals::default();
                while !stop.load(Relaxed) {
                    let i = next.fetch_add(1, Relaxed);
                    if i >= config.n_seeds {
                        break;
                    }
                    let seed = config.start + i;
                    match catch_unwind(|| run_seed(seed, None)) {
                        Ok(report) => own.add(&report),
                        Err(panic) => {
                            stop.store(true, Relaxed);
                            let words = words(panic.as_ref());
                            let mut failed = failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                            if failed.as_ref().is_none_or(|(other, _)| seed < *other) {
                                *failed = Some((seed, words));
                            }
                        }
                    }
                    bar.inc(1);
                }
                let mut totals = totals.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                totals.n_seeds += own.n_seeds;
                totals.n_requests += own.n_requests;
                totals.n_finished += own.n_finished;
                totals.n_failed += own.n_failed;
                totals.n_faults += own.n_faults;
                totals.n_events += own.n_events;
                totals.n_moves += own.n_moves;
                totals.coverage.add(&own.coverage);
            });
        }
    });
    std::panic::set_hook(hook);
    bar.finish_and_clear();
    let failed = failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((seed, words)) = failed {
        eprintln!("seed {seed}: {words}");
        trace(seed)?;
    }
    let totals = totals.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{} seeds passed in {seconds:.1} s ({:.1} ms each on {} threads): {} requests, {} finished, {} ended badly by \
         right, {} faults, {} moves, {} events",
        totals.n_seeds,
        seconds * 1e3 * config.n_threads as f64 / totals.n_seeds.max(1) as f64,
        config.n_threads,
        totals.n_requests,
        totals.n_finished,
        totals.n_failed,
        totals.n_faults,
        totals.n_moves,
        totals.n_events,
    );
    if config.coverage {
        print_coverage(&totals.coverage);
    }
    let surprises = totals.coverage.surprises();
    anyhow::ensure!(surprises.is_empty(), "what cannot be has been: {surprises:?}");
    Ok(())
}

/// A line for each transition: how often, and with which faults, or why never. Then those with less than a hundred.
fn print_coverage(coverage: &Coverage) {
    for transition in every_transition() {
        if let Some(reason) = never(transition) {
            println!("{transition}: never ({reason})");
        }
    }
    for (transition, n) in &coverage.transitions {
        let with = coverage.pairs.get(transition).into_iter().flatten().zip(FaultKind::ALL);
        let with: Vec<String> = with.map(|(n, fault)| format!("{fault:?} {n}")).collect();
        println!("{transition}: {n} ({})", with.join(", "));
    }
    let under = |&(_, _, n): &(Transition, FaultKind, u64)| n < 100;
    for (transition, fault, n) in coverage.reachable_pairs().filter(under) {
        let reason = rare(transition).map_or(String::new(), |reason| format!(" ({reason})"));
        println!("seldom: {transition} / {}: {n}{reason}", fault.as_str());
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}

/// Runs one seed, printing what happens.
fn trace(seed: u64) -> anyhow::Result<()> {
    let mut print = |at: baton_scheduler::ids::Nanos, line: String| println!("{:.6} {line}", at.as_secs_f64());
    match catch_unwind(AssertUnwindSafe(|| run_seed(seed, Some(&mut print)))) {
        Ok(_) => Ok(()),
        Err(panic) => anyhow::bail!(
            "seed {seed} failed: {}; again: baton simulate --start {seed} --trace",
            words(panic.as_ref())
        ),
    }
}
