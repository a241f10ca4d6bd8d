//! The command line: one file per subcommand, and the way from arguments to a running process and its exit code.

mod bench;
mod ctl;
mod doctor;
mod groups;
mod kernels;
mod null;
mod scheduler;
mod serve;
mod simulate;
mod top;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, Environment, Layers, Machine};
use crate::logging;
use crate::supervisor::lifeline;

/// The exit code of wrong usage or configuration, clap's own included.
pub const EXIT_CONFIG: u8 = 2;
/// The exit code of a failure while running.
pub const EXIT_RUN: u8 = 1;

const ABOUT: &str = "\
Serves large language models from separate pools of prefill and decode instances.

Start with `baton serve`: it needs no arguments, and prints a URL when it is ready.";

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "baton", version, about = ABOUT, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a model on this machine: front door, prefill and decode processes
    Serve(Box<serve::ServeFlags>),
    /// Run the front door and registry of a cluster whose workers run elsewhere
    Scheduler(Box<scheduler::SchedulerFlags>),
    /// Run one instance of a cluster
    Worker(Box<worker::WorkerFlags>),
    /// Ask a running cluster, and change it
    Ctl(Box<ctl::CtlFlags>),
    /// Watch a running cluster
    Top(Box<top::TopFlags>),
    /// Measure a running server
    Bench(Box<bench::BenchFlags>),
    /// Find out what this machine can do
    Doctor(doctor::DoctorFlags),
    /// Compile the CUDA kernels beforehand, for machines with a card and no compiler
    Kernels(kernels::KernelsFlags),
    /// Try the cluster's decisions under faults, in virtual time
    Simulate(simulate::SimulateFlags),
    /// Run a front door over a generator without a model
    #[command(hide = true)]
    Null(Box<null::NullFlags>),
}

/// Runs the command that the process's arguments name, and says how it ended.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Wrong configuration is 2 wherever it was noticed; all else is 1.
fn exit_code(error: &anyhow::Error) -> u8 {
    let is_configuration = error.chain().any(|cause| cause.downcast_ref::<ConfigError>().is_some());
    if is_configuration { EXIT_CONFIG } else { EXIT_RUN }
}

fn run(command: Command) -> anyhow::Result<()> {
    let environment = Environment::from_process()?;
    match command {
        Command::Serve(flags) => {
            let layers = Layers::open(environment, flags.process.config.as_deref())?;
            let config = flags.resolve(&layers, &Machine::detect())?;
            logging::start(&config.log)?;
            until_signal(|shutdown| crate::supervisor::run_serve(config, shutdown))
        }
        Command::Scheduler(flags) => {
            let layers = Layers::open(environment, flags.process.config.as_deref())?;
            let (config, log) = flags.resolve(&layers)?;
            logging::start(&log)?;
            until_signal(|shutdown| crate::scheduler_process::run_scheduler(config, shutdown))
        }
        Command::Worker(flags) => {
            if flags.supervised {
                lifeline::hold()?;
            }
            let layers = Layers::open(environment, flags.process.config.as_deref())?;
            let (config, log) = flags.resolve(&layers, &Machine::detect())?;
            logging::start(&log)?;
            until_signal(|shutdown| crate::worker_process::run_worker(config, shutdown))
        }
        Command::Ctl(flags) => {
            let (config, order) = flags.resolve(&Layers::open(environment, None)?)?;
            runtime()?.block_on(crate::ctl::run(&config, order))
        }
        Command::Top(flags) => {
            let config = flags.resolve(&Layers::open(environment, None)?)?;
            runtime()?.block_on(crate::top::run(config))
        }
        Command::Bench(flags) => {
            let config = flags.resolve(&Layers::open(environment, None)?)?;
            runtime()?.block_on(crate::bench::run(config))
        }
        Command::Doctor(flags) => flags.run(),
        Command::Kernels(flags) => flags.run(),
        Command::Simulate(flags) => flags.run(),
        Command::Null(flags) => {
            let layers = Layers::open(environment, flags.process.config.as_deref())?;
            let (config, log) = flags.resolve(&layers)?;
            logging::start(&log)?;
            until_signal(|shutdown| crate::null_process::run_null(config, shutdown))
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Runs `process` with a token that SIGINT or SIGTERM cancels. A second signal ends the process at once.
fn until_signal<P, F>(process: P) -> anyhow::Result<()>
where
    P: FnOnce(CancellationToken) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let cancel = shutdown.clone();
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = interrupt.recv() => "SIGINT",
                    _ = terminate.recv() => "SIGTERM",
                }
            };
            let name = next().await;
            tracing::info!("{name}: stopping; a second signal stops at once");
            cancel.cancel();
            let name = next().await;
            tracing::warn!("{name} again: stopping at once");
            std::process::exit(i32::from(EXIT_RUN));
        });
        process(shutdown).await
    });
    // Whatever is still blocked by then is not worth waiting for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

#[cfg(test)]
mod tests;
