//! Baton's cluster: front door, registry, operator's tools and load generator. No tensors here.

pub mod door;
