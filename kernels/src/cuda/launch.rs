//! Grid, block and shared memory of each kernel as functions of its shapes: the numbers that host and kernels must agree on.
//! Pure; launches nothing.

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// CTAs.
    pub grid: [u32; 3],
    /// Threads of a CTA.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
}

const fn ctas(n_ctas: u32, n_threads: u32) -> Launch {
    Launch {
        grid: [n_ctas, 1, 1],
        block: [n_threads, 1, 1],
        shared_bytes: 0,
    }
}

/// Threads of a CTA of the kernels over rows and elements.
const ROW_THREADS: u32 = 256;

/// Elements that a CTA of `elementwise.cu` takes.
const ELEMENTS_PER_CTA: u64 = 2048;

/// `embed`, `gather_rows`, `rms_norm`, `add_rms_norm`, `rope_append`, `moe_combine`: a CTA a row.
pub const fn rows(n_rows: u32) -> Launch {
    ctas(n_rows, ROW_THREADS)
}

/// `add`, `add_bias`, `soft_cap`, `gated`, `convert`.
pub const fn elements(n_elements: u64) -> Launch {
    ctas(n_elements.div_ceil(ELEMENTS_PER_CTA) as u32, ROW_THREADS)
}
