//! `baton doctor`: flags of the measurements that tell what a machine can do.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::{ByteSize, Device, Environment, Folders, Layers, Switch, flag};
use crate::doctor::transfer::TransferConfig;
use crate::engine_config::{CudaConfig, CudaFlagValues, DeviceConfig};

const TRANSFER_EXAMPLES: &str = "\
Examples:
  Between two processes of this machine:
    baton doctor transfer
  From another machine, reachable as node-3; first there, then here:
    baton doctor transfer --listen node-3:7777
    baton doctor transfer --peer node-3:7777
  From the memory of a card to the memory of the same card, in another process:
    baton doctor transfer --device cuda

GB/s are medians of interleaved rounds; the ratios are medians of each round's ratio. A listening doctor sends made-up
bytes to whoever asks, so do not leave one open to a network that you do not trust.";

/// Flags of `baton doctor`.
#[derive(Args, Debug)]
pub struct DoctorFlags {
    #[command(subcommand)]
    command: DoctorCommand,
}

#[derive(Subcommand, Debug)]
enum DoctorCommand {
    /// Measure how fast KV moves between processes, by each transport
    Transfer(TransferFlags),
    /// Say whether there is a card to compute on, where its kernels come from, and how fast it is
    Cuda(CudaFlags),
}

#[derive(Args, Debug)]
struct CudaFolders {
    /// Folders with the libraries of CUDA, with ':' between them, looked through before the system's own
    #[arg(long, value_name = "FOLDERS", value_parser = flag::<Folders>)]
    cuda_libraries: Option<Folders>,
    /// Folder of compiled CUDA kernels [default: cuda-kernels beside the program, if it is there]
    #[arg(long, value_name = "FOLDER", value_parser = flag::<PathBuf>)]
    cuda_kernels: Option<PathBuf>,
}

impl CudaFolders {
    fn config(self, deterministic: Option<Switch>) -> anyhow::Result<CudaConfig> {
        let layers = Layers::open(Environment::from_process()?, None)?;
        let values = CudaFlagValues {
            deterministic,
            libraries: self.cuda_libraries,
            kernels: self.cuda_kernels,
            ..CudaFlagValues::default()
        };
        Ok(CudaConfig::resolve(&layers, values)?)
    }
}

#[derive(Args, Debug)]
struct CudaFlags {
    #[command(flatten)]
    folders: CudaFolders,
    /// Look at what deterministic mode needs
    #[arg(long, value_enum)]
    deterministic: Option<Switch>,
}

#[derive(Args, Debug)]
#[command(after_long_help = TRANSFER_EXAMPLES)]
struct TransferFlags {
    /// Pulls of each path to measure
    #[arg(long, value_name = "N", default_value = "7", value_parser = flag::<NonZeroUsize>)]
    rounds: NonZeroUsize,
    /// KV moved by each pull [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = flag::<ByteSize>)]
    size: Option<ByteSize>,
    /// Receive from a listening doctor there, not from a process of this machine
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "listen")]
    peer: Option<String>,
    /// Be the sending end, until standard input ends
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where this machine's ends have their KV
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    #[command(flatten)]
    folders: CudaFolders,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl DoctorFlags {
    /// Runs what was asked for.
    pub fn run(self) -> anyhow::Result<()> {
        let flags = match self.command {
            DoctorCommand::Transfer(flags) => flags,
            DoctorCommand::Cuda(flags) => return crate::doctor::cuda::run(&flags.folders.config(flags.deterministic)?),
        };
        let n_bytes = flags.size.map_or(256 << 20, |size| size.0);
        let card = match crate::device::choose(flags.device, flags.folders.config(None)?)? {
            DeviceConfig::Cpu => None,
            DeviceConfig::Cuda(card) => Some(card),
        };
        match flags.listen {
            Some(address) => crate::doctor::transfer::listen(&address, n_bytes, card.as_ref()),
            None => crate::doctor::transfer::run(&TransferConfig {
                n_rounds: flags.rounds.get(),
                n_bytes,
                peer: flags.peer,
                json: flags.json,
                card,
            }),
        }
    }
}
