//! One instance: model, tokenizer, KV cache, forward pass, sampler, step loop, worker service and transfers.
//! Knows nothing of the cluster; what to compute next is decided in `baton_scheduler`.

pub mod constraint;
pub mod engine;
pub mod forward;
pub mod model;
pub mod philox;
pub mod probe;
pub mod sampler;
pub mod text;
pub mod worker;

pub use baton_kernels::{Backend, Cpu, DType, Isa, KvPrefault, cuda, keep_freed_memory};
