//! The CUDA device: whether there is one, its memory and streams, its kernels and where they come from, and the operators
//! over them. Nothing of CUDA is needed to build or to start; all of it is loaded when a card is asked for.
//!
//! What the kernels are, and how they divide their work, is in `kernels/cuda/` and docs/kernels.md.

mod attention;
mod backend;
mod batch;
mod buffer;
mod compile;
mod decode_tables;
mod device;
mod error;
mod function;
mod gemm;
mod graphs;
mod green;
mod images;
mod ipc;
mod kernels;
mod kv;
pub mod launch;
mod launch_times;
mod libraries;
mod limits;
mod measure;
mod moe;
mod opened;
mod place;
pub mod plan;
mod probe;
mod rope;
mod sampler;
pub mod sampling;
mod scratch;
mod shared_pinned;
pub mod sources;
mod staging;
mod tensor;
mod upload;
mod weights;

pub use error::CudaError;
pub use images::{ImageFolders, ImageOrigin, package};
pub use ipc::{CardUuid, CudaMemoryHandle};
pub(crate) use kv::{DeviceKv, Fence, ForeignPlanes, Gathered};
pub use launch_times::LaunchTimes;
pub use limits::{ExpertLimits, StepLimits};
pub use measure::{CudaLimits, CudaMeasure, CudaTimer, HostBytes};
pub use opened::{Cuda, CudaMode, CudaOptions};
pub use place::{CudaKvArena, CudaPlace, CudaTurn};
pub use probe::{CudaCard, probe};
pub use sampler::CudaSampler;
pub(crate) use staging::Lent;
pub use tensor::{CudaExperts, CudaMatrix, CudaRope, CudaTensor, CudaVector};
