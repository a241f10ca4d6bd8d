//! Turning source tensors into packed words: the table of a packed file, its offsets, and the packing of panels.
//! Where the words go (file or memory) is the caller's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Entry, PANEL, SourceTensor, WeightKind, WeightSource, WeightSpec};
use crate::cpu::simd::{round_bf16, widen_bf16};
use crate::error::KernelError;
use crate::layout::DType;

const MAGIC: &[u8; 8] = b"BATONPKD";
const VERSION: u32 = 1;

/// Weights start on a page, and the first on a huge page.
const PAGE_WORDS: usize = 4096 / 4;
const HUGE_PAGE_WORDS: usize = (2 << 20) / 4;

/// Takes packed words for a place in the file, in words from its start.
pub(super) type Sink<'a> = dyn Fn(usize, &[u32]) -> Result<(), KernelError> + Sync + 'a;

/// What a packed file of these specifications looks like.
pub(super) struct Plan<'a> {
    dtype: DType,
    specs: &'a [WeightSpec],
    /// Per spec, in words.
    offsets: Vec<usize>,
    total_words: usize,
    header: Vec<u8>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(dtype: DType, specs: &'a [WeightSpec]) -> Result<Plan<'a>, KernelError> {
        if dtype == DType::F16 {
            return Err(KernelError::UnsupportedDType {
                what: "packed weights",
                dtype,
            });
        }
        let mut header = Vec::new();
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&[dtype.size() as u8, PANEL as u8, 0, 0]);
        header.extend_from_slice(&(specs.len() as u64).to_le_bytes());
        // The table's size does not depend on the offsets in it, so it can be measured before they are known.
        let table_bytes: usize = specs.iter().map(|spec| 8 + spec.name.len() + 8 * 4).sum();
        let mut end = (header.len() + table_bytes + 8)
            .div_ceil(4)
            .next_multiple_of(HUGE_PAGE_WORDS);
        let mut offsets = Vec::with_capacity(specs.len());
        for spec in specs {
            let (tag, a, b) = match spec.kind {
                WeightKind::Matrix { n_out, n_in } => (0_u64, n_out, n_in),
                WeightKind::Vector { len } => (1, len, 1),
            };
            header.extend_from_slice(&(spec.name.len() as u64).to_le_bytes());
            header.extend_from_slice(spec.name.as_bytes());
            for field in [tag, a as u64, b as u64, end as u64] {
                header.extend_from_slice(&field.to_le_bytes());
            }
            offsets.push(end);
            end = (end + packed_words(spec.kind, dtype)).next_multiple_of(PAGE_WORDS);
        }
        header.extend_from_slice(&(end as u64).to_le_bytes());
        Ok(Plan {
            dtype,
            specs,
            offsets,
            total_words: end,
            header,
        })
    }

    /// The first bytes of a valid file, all of them: the same specifications give the same header.
    pub(super) fn header(&self) -> &[u8] {
        &self.header
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn total_words(&self) -> usize {
        self.total_words
    }

    pub(super) fn entries(&self) -> HashMap<String, Entry> {
        let entry = |(spec, offset): (&WeightSpec, &usize)| {
            (
                spec.name.clone(),
                Entry {
                    kind: spec.kind,
                    offset: *offset,
                },
            )
        };
        self.specs.iter().zip(&self.offsets).map(entry).collect()
    }

    /// Packs everything, one weight after the other, each split over the cores; holds one weight's sources at a time.
    pub(super) fn pack_all(
        &self,
        source: &dyn WeightSource,
        sink: &Sink<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), KernelError> {
        let words = |spec: &WeightSpec| packed_words(spec.kind, self.dtype) as u64 * 4;
        let total: u64 = self.specs.iter().map(words).sum();
        let mut done = 0;
        progress(0, total);
        for (spec, offset) in self.specs.iter().zip(&self.offsets) {
            let parts = fetch(spec, source)?;
            match spec.kind {
                WeightKind::Matrix { n_out, n_in } => {
                    let matrix = MatrixSource {
                        parts: &parts,
                        n_out,
                        n_in,
                    };
                    matrix.pack(self.dtype, *offset, sink, &mut |bytes| progress(done + bytes, total))?;
                }
                WeightKind::Vector { .. } => {
                    let elements = parts.iter().flat_map(|part| {
                        let size = part.dtype.size();
                        part.data
                            .chunks_exact(size)
                            .map(|bytes| to_f32(part.dtype, bytes).to_bits())
                    });
                    sink(*offset, &elements.collect::<Vec<u32>>())?;
                }
            }
            done += words(spec);
            progress(done, total);
        }
        Ok(())
    }
}

/// Words of one column of a matrix.
pub(super) fn column_words(n_in: usize, dtype: DType) -> usize {
    n_in.div_ceil(4 / dtype.size())
}

fn packed_words(kind: WeightKind, dtype: DType) -> usize {
    match kind {
        WeightKind::Matrix { n_out, n_in } => n_out.div_ceil(PANEL) * PANEL * column_words(n_in, dtype),
        WeightKind::Vector { len } => len,
    }
}

/// The parts of a weight, their shapes checked against the specification.
fn fetch<'s>(spec: &WeightSpec, source: &'s dyn WeightSource) -> Result<Vec<SourceTensor<'s>>, KernelError> {
    let mut rows = 0;
    let mut parts = Vec::with_capacity(spec.parts.len());
    for name in &spec.parts {
        let tensor = source.tensor(name).map_err(|reason| KernelError::Source {
            tensor: name.clone(),
            reason,
        })?;
        let n_in = match spec.kind {
            WeightKind::Matrix { n_in, .. } => Some(n_in),
            WeightKind::Vector { .. } => None,
        };
        let fits = match (n_in, &tensor.shape[..]) {
            (Some(n_in), [_, cols]) => *cols == n_in,
            (None, [_]) => true,
            _ => false,
        };
        if !fits || (spec.parts.len() == 1 && tensor.shape != full_shape(spec.kind)) {
            let expected = full_shape(spec.kind);
            return Err(KernelError::Shape {
                tensor: name.clone(),
                expected,
                found: tensor.shape,
            });
        }
        let expected = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
        if tensor.data.len() != expected {
            let found = tensor.data.len();
            let SourceTensor { dtype, shape, .. } = tensor;
            return Err(KernelError::TensorBytes {
                tensor: name.clone(),
                dtype,
                shape,
                expected,
                found,
            });
        }
        rows += tensor.shape[0];
        parts.push(tensor);
    }
    let expected = full_shape(spec.kind);
    if rows != expected[0] {
        let mut found = expected.clone();
        found[0] = rows;
        return Err(KernelError::Shape {
            tensor: spec.parts.join(" + "),
            expected,
            found,
        });
    }
    Ok(parts)
}

fn full_shape(kind: WeightKind) -> Vec<usize> {
    match kind {
        WeightKind::Matrix { n_out, n_in } => vec![n_out, n_in],
        WeightKind::Vector { len } => vec![len],
    }
}

struct MatrixSource<'a> {
    parts: &'a [SourceTensor<'a>],
    n_out: usize,
    n_in: usize,
}

impl MatrixSource<'_> {
    fn pack(
        &self,
        dtype: DType,
        offset: usize,
        sink: &Sink<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), KernelError> {
        let n_panels = self.n_out.div_ceil(PANEL);
        let panel_words = PANEL * column_words(self.n_in, dtype);
        let n_threads = std::thread::available_parallelism()
            .map_or(1, |cores| cores.get())
            .min(n_panels)
            .min(16);
        let next = AtomicUsize::new(0);
        let done = AtomicU64::new(0);
        let pack_some = |report: &mut dyn FnMut(u64)| {
            let mut panel = vec![0_u32; panel_words];
            loop {
                let panel_idx = next.fetch_add(1, Ordering::Relaxed);
                if panel_idx >= n_panels {
                    return Ok(());
                }
                self.pack_panel(dtype, panel_idx, &mut panel);
                sink(offset + panel_idx * panel_words, &panel)?;
                let bytes = panel_words as u64 * 4;
                report(done.fetch_add(bytes, Ordering::Relaxed) + bytes);
            }
        };
        std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..n_threads).map(|_| scope.spawn(|| pack_some(&mut |_| {}))).collect();
            let mut outcome = pack_some(progress);
            for helper in helpers {
                let helped = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome = outcome.and(helped);
            }
            outcome
        })
    }

    /// `panel: [n_words][PANEL]`, its words of two bf16 with the even input low.
    fn pack_panel(&self, dtype: DType, panel_idx: usize, panel: &mut [u32]) {
        for lane in 0..PANEL {
            let column = panel[lane..].iter_mut().step_by(PANEL);
            let Some((source, row)) = self.row(panel_idx * PANEL + lane) else {
                column.for_each(|word| *word = 0);
                continue;
            };
            match (dtype, source) {
                (DType::Bf16, DType::Bf16) => {
                    for (word, pair) in column.zip(row.chunks(4)) {
                        let mut bytes = [0; 4];
                        bytes[..pair.len()].copy_from_slice(pair);
                        *word = u32::from_le_bytes(bytes);
                    }
                }
                (DType::Bf16, _) => {
                    let size = source.size();
                    for (word, pair) in column.zip(row.chunks(2 * size)) {
                        let low = round_bf16(to_f32(source, &pair[..size]));
                        let high = pair
                            .get(size..2 * size)
                            .map_or(0, |bytes| round_bf16(to_f32(source, bytes)));
                        *word = u32::from(low) | u32::from(high) << 16;
                    }
                }
                _ => {
                    for (word, bytes) in column.zip(row.chunks_exact(source.size())) {
                        *word = to_f32(source, bytes).to_bits();
                    }
                }
            }
        }
    }

    /// The bytes of one output's row, wherever its part is.
    fn row(&self, mut row_idx: usize) -> Option<(DType, &[u8])> {
        for part in self.parts {
            if row_idx < part.shape[0] {
                let row_bytes = self.n_in * part.dtype.size();
                return Some((part.dtype, &part.data[row_idx * row_bytes..][..row_bytes]));
            }
            row_idx -= part.shape[0];
        }
        None
    }
}

fn to_f32(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        DType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::Bf16 => widen_bf16(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}
