//! The engine service that the SMG gateway speaks, `vllm.grpc.engine.VllmEngine`: token ids in, token ids out. The cluster
//! behind the front door looks like one engine.

mod answer;
mod describe;
mod kv_events;
mod request;
mod service;
mod tokenizer_bundle;

pub(super) use self::service::EngineService;
