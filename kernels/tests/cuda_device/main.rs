//! The CUDA device as a whole: driver, kernels, products and KV memory through cudarc, on a card (REQUIRE_GPU=1) or on the
//! stand-in for its driver, against the plain reference.

#![allow(unsafe_code)]

mod attention;
#[path = "../bodies/mod.rs"]
mod bodies;
#[allow(dead_code, reason = "shared with tests that ask for more")]
mod controls;
mod ipc;
mod kv;
mod moe;
mod operators;
mod place;
mod stand_in;
mod steps;
mod support;
