//! `baton simulate`: the cluster's decisions under faults, in virtual time.

use std::num::NonZeroU32;

use clap::Args;

use crate::config::{Machine, flag};
use crate::simulate::{SimulateConfig, run};

const EXAMPLES: &str = "\
Examples:
  A thousand seeds on all cores:     baton simulate --seeds 1000
  What happens in one of them:       baton simulate --start 17 --trace

Every seed is a cluster with requests, faults, migrations, drains and role changes, made of the code that serves. It
fails when a token is lost or comes twice, a block is left held, something waits for nobody, or a request does not end.";

/// Flags of `baton simulate`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct SimulateFlags {
    /// How many seeds
    #[arg(long, value_name = "N", default_value = "1000", value_parser = flag::<NonZeroU32>)]
    seeds: NonZeroU32,
    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    start: u64,
    /// Threads [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = flag::<NonZeroU32>)]
    threads: Option<NonZeroU32>,
    /// Print how often each transition of a machine was met, alone and with each kind of fault
    #[arg(long)]
    coverage: bool,
    /// Run the first seed alone and print its events
    #[arg(long)]
    trace: bool,
}

impl SimulateFlags {
    /// Runs what they say.
    ///
    /// # Errors
    /// When a seed fails.
    pub fn run(self) -> anyhow::Result<()> {
        let all = Machine::detect().threads_per_instance(1);
        run(SimulateConfig {
            start: self.start,
            n_seeds: u64::from(self.seeds.get()),
            n_threads: self.threads.map_or(all, |threads| threads.get() as usize),
            coverage: self.coverage,
            trace: self.trace,
        })
    }
}
