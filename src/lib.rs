//! Baton's cluster: front door, registry, operator's tools and load generator. No tensors here.

pub mod door;
pub mod api;
pub mod metric_names;
pub mod null_generator;
pub mod registry;
