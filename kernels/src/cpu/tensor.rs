//! Activations, packed matrices, vectors and rope tables as the CPU device holds them. No arithmetic.

use std::sync::Arc;

use crate::aligned::AlignedBuf;
use crate::packed::{PANEL, Storage};

/// An activation, `[rows, cols]` f32, row major and contiguous.
pub struct CpuTensor {
    data: AlignedBuf<f32>,
    rows: usize,
    cols: usize,
    max_rows: usize,
}

impl CpuTensor {
    pub(crate) fn new(max_rows: usize, cols: usize) -> CpuTensor {
        let len = max_rows.checked_mul(cols).expect("tensor size fits in usize");
        CpuTensor {
            data: AlignedBuf::zeroed(len),
            rows: 0,
            cols,
            max_rows,
        }
    }

    /// Rows in use.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows in use, `[rows, cols]`.
    pub fn as_slice(&self) -> &[f32] {
        &self.data[..self.rows * self.cols]
    }

    /// Sets the number of rows and copies `values`, `[rows, cols]`. For tests and for models fed from the host.
    pub fn set(&mut self, values: &[f32]) {
        assert!(
            self.cols > 0 && values.len().is_multiple_of(self.cols),
            "{} values in rows of {}",
            values.len(),
            self.cols
        );
        self.resize("set", values.len() / self.cols, self.cols)
            .copy_from_slice(values);
    }

    /// Sets the shape `op` is about to write and returns its elements, of unspecified value.
    pub(crate) fn resize(&mut self, op: &str, rows: usize, cols: usize) -> &mut [f32] {
        assert!(
            cols == self.cols && rows <= self.max_rows,
            "{op}: output [{rows}, {cols}] does not fit a tensor of [{} at most, {}]",
            self.max_rows,
            self.cols
        );
        self.rows = rows;
        &mut self.data[..rows * cols]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.cols]
    }
}

/// A packed weight matrix `[n_out, n_in]`, in place in the packed file.
#[derive(Clone)]
pub struct CpuMatrix {
    pub(crate) storage: Arc<Storage>,
    /// Where its words start, in words.
    pub(crate) offset: usize,
    pub(crate) n_out: usize,
    pub(crate) n_in: usize,
    /// Words of one column: `n_in` f32, or pairs of bf16.
    pub(crate) n_words: usize,
}

impl CpuMatrix {
    pub(crate) fn n_panels(&self) -> usize {
        self.n_out.div_ceil(PANEL)
    }

    /// Words `[n_panels, n_words, PANEL]`.
    pub(crate) fn words(&self) -> &[u32] {
        &self.storage.words()[self.offset..][..self.n_panels() * self.n_words * PANEL]
    }
}

/// A parameter vector, f32.
#[derive(Clone)]
pub struct CpuVector {
    pub(crate) data: Arc<[f32]>,
}

/// Cosines and sines by position, each `[variants, max_positions, rotary_dim / 2]`.
#[derive(Clone)]
pub struct CpuRope {
    pub(crate) cos: Arc<[f32]>,
    pub(crate) sin: Arc<[f32]>,
    pub(crate) half_dim: usize,
    pub(crate) max_positions: usize,
    pub(crate) n_variants: usize,
}

/// A pointer whose elements are split between the threads of one job.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: only used inside one job, whose items write disjoint elements, each at its use site.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> SharedMut<T> {
        SharedMut(slice.as_mut_ptr())
    }

    pub(crate) fn from_ptr(ptr: *mut T) -> SharedMut<T> {
        SharedMut(ptr)
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}
