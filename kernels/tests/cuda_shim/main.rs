//! Every CUDA kernel on the CPU, through `kernels/cuda/shim.h`, against the plain reference: odd sizes, every head size, and
//! both orders in which a CTA's threads may run.

#![allow(unsafe_code)]

mod attention;
mod harness;
mod kv_copy;
mod library;
mod linear;
mod rope;
mod rowwise;

use baton_kernels::cuda::sources::{HEAD_DIMS, SOURCES};

/// Each entry that the host may ask for is in the library of its source.
#[test]
fn every_entry_is_there() {
    if !library::has_compiler() {
        return;
    }
    for source in SOURCES {
        let head_dims: Vec<Option<u32>> = match source.by_head_dim {
            true => HEAD_DIMS.iter().copied().map(Some).collect(),
            false => vec![None],
        };
        for head_dim in head_dims {
            let library = library::library(source, head_dim);
            for entry in source.entries {
                let entry = head_dim.map_or((*entry).to_owned(), |head_dim| format!("{entry}_d{head_dim}"));
                assert!(library.has(&entry), "{}: {entry}", source.name);
            }
        }
    }
}
