//! `baton doctor cuda`: the card, its driver, where its kernels come from, and what it can do.

use std::io::Write as _;

use baton_engine::DType;
use baton_engine::cuda::{Cuda, CudaMeasure, CudaOptions, LaunchTimes};

use crate::device::CARD_ORDINAL;
use crate::engine_config::CudaConfig;

/// A head size that most models have; kernels of others are compiled when a model asks for them.
const HEAD_DIM: usize = 128;

/// Prints what there is and measures it. The last line is printed when everything served.
///
/// # Errors
/// What is missing, in one line.
pub fn run(config: &CudaConfig) -> anyhow::Result<()> {
    let cuda = open(config)?;
    let mut out = std::io::stdout().lock();
    let card = cuda.card();
    writeln!(
        out,
        "card       {}, compute capability {}.{}, {} multiprocessors, {:.1} GiB, {:.1} GiB free",
        card.name,
        card.capability / 10,
        card.capability % 10,
        card.n_multiprocessors,
        gib(card.total_bytes),
        gib(cuda.free_bytes()?),
    )?;
    writeln!(
        out,
        "driver     CUDA {}.{}",
        card.driver_cuda / 1000,
        card.driver_cuda % 1000 / 10
    )?;
    for (kernels, origin) in cuda.kernel_origins() {
        writeln!(out, "kernels    {kernels}: {origin}")?;
    }
    let limits = cuda.measure(CudaMeasure::default())?;
    writeln!(out, "read       {:.0} GB/s", limits.read_gb_per_s)?;
    writeln!(out, "copy       {:.0} GB/s", limits.copy_gb_per_s)?;
    writeln!(
        out,
        "host       {:.0} GB/s to it, {:.0} GB/s from it",
        limits.to_host_gb_per_s, limits.from_host_gb_per_s
    )?;
    if let Some(peak) = limits.product_tflop_per_s {
        writeln!(out, "products   {peak:.0} TFLOP/s in bf16")?;
    }
    let launches = cuda.launch_times()?;
    writeln!(
        out,
        "launches   {} kernels in {:.0} us one by one, in {:.0} us as a graph",
        LaunchTimes::N_LAUNCHES,
        launches.one_by_one_us,
        launches.graph_us
    )?;
    Ok(())
}

/// The card, with the kernels of most models.
///
/// # Errors
/// What is missing, in one line.
pub(super) fn open(config: &CudaConfig) -> anyhow::Result<Cuda> {
    Ok(Cuda::new(CudaOptions {
        ordinal: CARD_ORDINAL,
        dtype: DType::Bf16,
        head_dim: HEAD_DIM,
        mode: config.mode(),
        libraries: config.libraries.0.clone(),
        images: config.images(),
    })?)
}

fn gib(n_bytes: usize) -> f64 {
    n_bytes as f64 / f64::from(1 << 30)
}
