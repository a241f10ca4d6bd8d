//! `baton kernels`: compiles the CUDA kernels beforehand, for machines that have a card and no compiler.

use std::path::PathBuf;

use clap::Args;

use crate::config::{Environment, Folders, Layers, flag};

const EXAMPLES: &str = "\
Examples:
  For Hopper, beside the program, where `baton serve` looks for them:
    baton kernels --architectures 90a --output cuda-kernels
  For all that Baton knows, with NVRTC from a Python package:
    baton kernels --output cuda-kernels --cuda-libraries .venv/lib/python3.12/site-packages/nvidia/cu13/lib";

/// Compiled without being asked: Ampere, Ada, Hopper and Blackwell.
const ARCHITECTURES: [&str; 4] = ["80", "89", "90a", "100a"];

/// Flags of `baton kernels`.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct KernelsFlags {
    /// Folder to write to; what is there already is kept
    #[arg(long, value_name = "FOLDER", value_parser = flag::<PathBuf>)]
    output: PathBuf,
    /// Architectures, as in sm_90a without the sm_, with ',' between
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values = ARCHITECTURES, value_parser = architecture)]
    architectures: Vec<String>,
    /// Folders with the libraries of CUDA, with ':' between them, looked through before the system's own
    #[arg(long, value_name = "FOLDERS", value_parser = flag::<Folders>)]
    cuda_libraries: Option<Folders>,
}

fn architecture(text: &str) -> Result<String, &'static str> {
    let digits = text.strip_suffix('a').unwrap_or(text);
    let is_known_form = matches!(digits.len(), 2 | 3) && digits.bytes().all(|byte| byte.is_ascii_digit());
    if is_known_form {
        Ok(text.to_owned())
    } else {
        Err("expected an architecture such as 80, 89, 90a or 100a")
    }
}

impl KernelsFlags {
    /// Compiles them, and says how many there are.
    pub fn run(self) -> anyhow::Result<()> {
        let layers = Layers::open(Environment::from_process()?, None)?;
        let libraries = layers.pick("cuda_libraries", self.cuda_libraries)?.unwrap_or_default();
        let n_images = baton_engine::cuda::package(&libraries.0, &self.architectures, &self.output)?;
        println!(
            "{n_images} kernels for {} in {}",
            self.architectures.join(", "),
            self.output.display()
        );
        Ok(())
    }
}
