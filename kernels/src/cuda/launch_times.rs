//! What launches cost: kernels that do next to nothing, one by one and as a captured graph. For operators who want to know
//! whether graphs work on their card, and what they gain.

use std::time::Instant;

use super::buffer::DeviceBuffer;
use super::error::{CudaError, During as _};
use super::function::Args;
use super::launch;
use super::opened::Cuda;
use crate::error::KernelError;

/// Runs of which the best counts, after one that does not.
const N_RUNS: usize = 5;

/// Microseconds from the first launch to the end of the last kernel, of [`LaunchTimes::N_LAUNCHES`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchTimes {
    /// Each launched by itself.
    pub one_by_one_us: f64,
    /// All in one graph.
    pub graph_us: f64,
}

impl LaunchTimes {
    /// About the kernels of a decode step of 32 layers.
    pub const N_LAUNCHES: usize = 256;
}

impl Cuda {
    /// Measures launches.
    ///
    /// # Errors
    /// No kernel to launch, or a device that captures nothing.
    pub fn launch_times(&self) -> Result<LaunchTimes, KernelError> {
        let stream = &self.device.compute;
        let read = self.kernels.read_all()?;
        let buffer = DeviceBuffer::new(&self.device, "a measurement", 32)?;
        let args = Args::new()
            .address(buffer.address())
            .address(buffer.address() + 16)
            .u64(1)
            .u32(1);
        let launch_all = || {
            for _ in 0..LaunchTimes::N_LAUNCHES {
                // SAFETY: 16 bytes are read, and 4 others may be written.
                unsafe { read.launch(stream, launch::read_all(1), &args) };
            }
        };
        self.device.begin_capture()?;
        launch_all();
        let graph = self.device.end_capture()?;
        let best_us = |run: &dyn Fn()| {
            let mut best = f64::INFINITY;
            for run_idx in 0..=N_RUNS {
                let began = Instant::now();
                run();
                stream.synchronize().during(|| "wait for launches".to_owned())?;
                if run_idx > 0 {
                    best = best.min(began.elapsed().as_secs_f64() * 1e6);
                }
            }
            Ok::<f64, CudaError>(best)
        };
        Ok(LaunchTimes {
            one_by_one_us: best_us(&launch_all)?,
            graph_us: best_us(&|| graph.launch().or_stop("launch a graph"))?,
        })
    }
}
