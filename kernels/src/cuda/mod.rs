//! The CUDA device: its kernels' sources, how they are launched, and how attention is cut into work.

pub mod launch;
pub mod plan;
pub mod sources;
