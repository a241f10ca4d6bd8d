//! Baton's cluster: front door, registry, supervisor, operator's tools and load generator. No tensors here.

pub mod announce;
pub mod api;
pub mod bench;
pub mod cli;
pub mod cluster_metrics;
pub mod config;
pub mod ctl;
pub mod device;
pub mod doctor;
pub mod door;
pub mod engine_config;
pub mod logging;
pub mod metric_names;
pub mod model_files;
pub mod model_loading;
pub mod null_generator;
pub mod null_process;
pub mod operator;
pub mod registry;
pub mod scheduler_process;
pub mod simulate;
pub mod supervisor;
pub mod top;
pub mod worker_process;
