//! The product as its users run it: real processes, real sockets. One binary, one file a story.

mod clients;
mod cluster;
mod colocate;
mod constraints;
mod cuda;
mod embeddings;
mod equality;
mod faults;
mod golden_models;
mod goldens;
mod hub;
mod kv_events;
mod layerwise;
mod moves;
mod observed;
mod operations;
mod purity;
mod rolling;
mod schemas;
mod soak;
#[allow(dead_code, reason = "shared with tests that ask for more")]
#[path = "../../kernels/tests/cuda_device/stand_in/mod.rs"]
mod stand_in;
mod storm;
mod throttle;
mod windows;
