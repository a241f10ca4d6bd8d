//! Weights packed for a device's products: one read-only file that all processes of a host map. No arithmetic here.
//!
//! File: a header (magic, version, dtype, packing, the table of weights), zeros up to 2 MiB, then each weight on a 4 KiB
//! boundary, little endian; vectors are f32. Padding is zero.
//! For the CPU, matrices are panels of 64 outputs, `[n_out / 64][n_words][64]`, where a word is one f32 or two neighbouring
//! bf16 of the input; the same for every instruction set. For CUDA they are rows, `[n_out][n_in]`.

mod build;
mod file;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::aligned::AlignedBuf;
use crate::cpu::{CpuMatrix, CpuVector};
use crate::error::KernelError;
use crate::layout::DType;

/// Outputs of one panel.
pub(crate) const PANEL: usize = 64;

/// How matrices lie in a packed file: what the device's products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Panels of 64 outputs, for the CPU; f32 or bf16.
    Panels,
    /// Row major without padding, for CUDA.
    Rows,
}

/// What a weight is once packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// `[n_out, n_in]`, stored in the file's dtype.
    Matrix {
        /// Rows of the source, outputs of the product.
        n_out: usize,
        /// Columns of the source, inputs of the product.
        n_in: usize,
    },
    /// `[len]`, always stored as f32.
    Vector {
        /// Elements.
        len: usize,
    },
}

/// One packed weight and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Its name in the packed file.
    pub name: String,
    /// Its kind and shape.
    pub kind: WeightKind,
    /// Source tensors, concatenated along `n_out` (a vector's along its length).
    pub parts: Vec<String>,
}

/// A tensor as a model folder holds it, row major, little endian.
#[derive(Clone, Debug)]
pub struct SourceTensor<'a> {
    /// Element type of `data`.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Cow<'a, [u8]>,
}

/// Where packing takes tensors from: a model folder, or a generator.
pub trait WeightSource {
    /// The tensor, or one line that says why not, naming the file.
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String>;
}

/// Weights ready for the products, read only and shared.
pub struct PackedWeights {
    storage: Arc<Storage>,
    packing: Packing,
    dtype: DType,
    entries: HashMap<String, Entry>,
    /// What the file is named after.
    key: Option<String>,
}

/// The packed words, wherever they are; matrices keep it alive.
pub(crate) enum Storage {
    File(Mmap),
    Memory(AlignedBuf<u32>),
}

/// Where a weight lies: offsets and lengths in words from the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: WeightKind,
    pub(crate) offset: usize,
}

impl PackedWeights {
    /// Maps `<dir>/<key>.<dtype>` (of rows, `<key>.rows.<dtype>`), packing it first if it is not there or not ours.
    ///
    /// Of several processes that start at once, one packs and the others wait for it. `progress` hears of packed bytes,
    /// done and in total; it is not called when the file was already there. `key` names the weights: same key, same bytes.
    ///
    /// # Errors
    /// f16 in panels, a key that is no plain file name, missing or misshapen tensors, file problems, or a
    /// lock held by another process for more than 30 minutes.
    pub fn open_or_build(
        dir: &Path,
        key: &str,
        packing: Packing,
        dtype: DType,
        specs: &[WeightSpec],
        source: &dyn WeightSource,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Arc<PackedWeights>, KernelError> {
        let plan = build::Plan::new(packing, dtype, specs)?;
        let map = file::open_or_build(dir, key, &plan, source, progress)?;
        Ok(Arc::new(PackedWeights {
            storage: Arc::new(Storage::File(map)),
            packing,
            dtype,
            entries: plan.entries(),
            key: Some(format!("{key}.{}", plan.extension())),
        }))
    }

    /// The same in private memory, for tests and tools.
    ///
    /// # Errors
    /// As [`PackedWeights::open_or_build`], without the file's.
    pub fn in_memory(
        packing: Packing,
        dtype: DType,
        specs: &[WeightSpec],
        source: &dyn WeightSource,
    ) -> Result<Arc<PackedWeights>, KernelError> {
        let plan = build::Plan::new(packing, dtype, specs)?;
        let mut words = AlignedBuf::zeroed(plan.total_words());
        let start = std::sync::Mutex::new(&mut words[..]);
        plan.pack_all(
            source,
            &|offset, packed| {
                let mut words = start
                    .lock()
                    .expect("packing threads do not panic while they hold the lock");
                words[offset..][..packed.len()].copy_from_slice(packed);
                Ok(())
            },
            &mut |_, _| {},
        )?;
        Ok(Arc::new(PackedWeights {
            storage: Arc::new(Storage::Memory(words)),
            packing,
            dtype,
            entries: plan.entries(),
            key: None,
        }))
    }

    /// Names the weights, this packing of them and their dtype: same key, same bytes. `None` of private memory.
    pub(crate) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Element type of the matrices.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes mapped: what every process of the host shares.
    pub fn bytes(&self) -> u64 {
        size_of_val(self.storage.words()) as u64
    }

    pub(crate) fn matrix(&self, name: &str) -> Result<CpuMatrix, KernelError> {
        assert_eq!(self.packing, Packing::Panels, "the CPU reads panels");
        match self.entries.get(name) {
            Some(&Entry {
                kind: WeightKind::Matrix { n_out, n_in },
                offset,
            }) => {
                let n_words = build::column_words(n_in, self.dtype);
                Ok(CpuMatrix {
                    storage: Arc::clone(&self.storage),
                    offset,
                    n_out,
                    n_in,
                    n_words,
                })
            }
            _ => Err(KernelError::MissingWeight {
                kind: "matrix",
                name: name.to_owned(),
            }),
        }
    }

    /// The bytes of a matrix in rows, `[n_out, n_in]`, and its shape.
    pub(crate) fn rows(&self, name: &str) -> Result<(&[u8], [usize; 2]), KernelError> {
        assert_eq!(self.packing, Packing::Rows, "only rows are read as they lie");
        match self.entries.get(name) {
            Some(&Entry {
                kind: WeightKind::Matrix { n_out, n_in },
                offset,
            }) => {
                let bytes: &[u8] = bytemuck::cast_slice(&self.storage.words()[offset..]);
                Ok((&bytes[..n_out * n_in * self.dtype.size()], [n_out, n_in]))
            }
            _ => Err(KernelError::MissingWeight {
                kind: "matrix",
                name: name.to_owned(),
            }),
        }
    }

    pub(crate) fn vector(&self, name: &str) -> Result<CpuVector, KernelError> {
        match self.entries.get(name) {
            Some(&Entry {
                kind: WeightKind::Vector { len },
                offset,
            }) => {
                let data = self.storage.words()[offset..][..len]
                    .iter()
                    .map(|word| f32::from_bits(*word))
                    .collect();
                Ok(CpuVector { data })
            }
            _ => Err(KernelError::MissingWeight {
                kind: "vector",
                name: name.to_owned(),
            }),
        }
    }
}

impl Storage {
    pub(crate) fn words(&self) -> &[u32] {
        match self {
            // A map starts on a page, and the file's length was checked to be whole words.
            Storage::File(map) => bytemuck::cast_slice(map),
            Storage::Memory(words) => words,
        }
    }
}

#[cfg(test)]
mod tests;
