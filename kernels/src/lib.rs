//! Device memory and fused operators over a paged KV cache, and the home of all unsafe code.
//! Knows buffers and operators: no requests, no models, no scheduling, no I/O but the packed weight file.

#![allow(unsafe_code)]
#![deny(missing_docs)]

mod aligned;
mod allocator;
pub mod backend;
pub mod cpu;
pub mod cuda;
mod error;
mod file_lock;
pub mod kv;
pub mod layout;
pub mod machine;
mod mapped_file;
pub mod packed;
pub mod reference;
mod sealed_memory;

pub use allocator::keep_freed_memory;
pub use backend::{
    Activation, AttentionParams, Backend, ExpertNames, MoeParams, QkNorm, RaggedBatch, RaggedSequence, RecordingRun,
    RopeAppendParams, RopeParams, RowLogprobs, RowSampler, RowSampling, SampledIds, SampledRow, WINDOW_GRAIN,
};
pub use cpu::{Cpu, CpuOptions, Isa};
pub use error::KernelError;
pub use kv::{
    ForeignKv, ForeignStaging, KvBytes, KvCache, KvPrefault, KvRead, KvShare, KvStaging, KvWrite, StagedPlace,
    StagingGeometry,
};
pub use layout::{DType, KvLayout};
pub use mapped_file::MappedFile;
pub use packed::{PackedWeights, Packing, SourceTensor, WeightKind, WeightSource, WeightSpec};
