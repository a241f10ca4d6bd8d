//! The Open Inference Protocol (KServe v2): text generation as tensors over gRPC, with Triton's streams, and Triton's
//! `generate` over HTTP. Options are those of `/v1/completions` by the same names.

mod answer;
mod describe;
mod outputs;
mod query;
pub(super) mod rest;
mod service;
mod tensors;

pub(super) use self::outputs::REPORTS;
pub(super) use self::query::VERSION;
pub(super) use self::service::InferenceService;
