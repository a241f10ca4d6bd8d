//! Turning source tensors into packed words: the table of a packed file, its offsets, and the packing of panels or rows.
//! Where the words go (file or memory) is the caller's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Entry, PANEL, Packing, SourceTensor, WeightKind, WeightSource, WeightSpec};
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
    packing: Packing,
    dtype: DType,
    specs: &'a [WeightSpec],
    /// Per spec, in words.
    offsets: Vec<usize>,
    total_words: usize,
    header: Vec<u8>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(packing: Packing, dtype: DType, specs: &'a [WeightSpec]) -> Result<Plan<'a>, KernelError> {
        if packing == Packing::Panels && dtype == DType::F16 {
            return Err(KernelError::UnsupportedDType {
                what: "packed weights",
                dtype,
            });
        }
        let mut header = Vec::new();
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        // What panels of f32 and of bf16 have always said; the others say something else.
        let shape = match (packing, dtype) {
            (Packing::Panels, _) => [dtype.size() as u8, PANEL as u8, 0, 0],
            (Packing::Rows, DType::F32 | DType::Bf16) => [dtype.size() as u8, 1, 0, 0],
            (Packing::Rows, DType::F16) => [dtype.size() as u8, 1, 1, 0],
        };
        header.extend_from_slice(&shape);
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
            end = (end + packed_words(packing, spec.kind, dtype)).next_multiple_of(PAGE_WORDS);
        }
        header.extend_from_slice(&(end as u64).to_le_bytes());
        Ok(Plan {
            packing,
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

    /// Which of a key's files this is.
    pub(super) fn extension(&self) -> String {
        match self.packing {
            Packing::Panels => self.dtype.to_string(),
            Packing::Rows => format!("rows.{}", self.dtype),
        }
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
        let words = |spec: &WeightSpec| packed_words(self.packing, spec.kind, self.dtype) as u64 * 4;
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
                    let progress = &mut |bytes| progress(done + bytes, total);
                    matrix.pack(self.packing, self.dtype, *offset, sink, progress)?;
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

fn packed_words(packing: Packing, kind: WeightKind, dtype: DType) -> usize {
    match (packing, kind) {
        (Packing::Panels, WeightKind::Matrix { n_out, n_in }) => {
            n_out.div_ceil(PANEL) * PANEL * column_words(n_in, dtype)
        }
        (Packing::Rows, WeightKind::Matrix { n_out, n_in }) => (n_out * n_in * dtype.size()).div_ceil(4),
        (_, WeightKind::Vector { len }) => len,
    }
}

/// Rows that are packed at once: an even number, so that each time whole words are.
fn rows_at_once(n_in: usize) -> usize {
    const ELEMENTS: usize = 1 << 18;
    (ELEMENTS / n_in.max(1)).next_multiple_of(2).max(2)
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
        packing: Packing,
        dtype: DType,
        offset: usize,
        sink: &Sink<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), KernelError> {
        let rows_of_item = match packing {
            Packing::Panels => PANEL,
            Packing::Rows => rows_at_once(self.n_in),
        };
        let n_items = self.n_out.div_ceil(rows_of_item);
        let item_words = match packing {
            Packing::Panels => PANEL * column_words(self.n_in, dtype),
            Packing::Rows => rows_of_item * self.n_in * dtype.size() / 4,
        };
        let n_threads = std::thread::available_parallelism()
            .map_or(1, |cores| cores.get())
            .min(n_items)
            .min(16);
        let next = AtomicUsize::new(0);
        let done = AtomicU64::new(0);
        let pack_some = |report: &mut dyn FnMut(u64)| {
            let mut words = vec![0_u32; item_words];
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= n_items {
                    return Ok(());
                }
                let words = match packing {
                    Packing::Panels => {
                        self.pack_panel(dtype, item, &mut words);
                        &words[..]
                    }
                    Packing::Rows => {
                        let first = item * rows_of_item;
                        let n_rows = rows_of_item.min(self.n_out - first);
                        let n_words = (n_rows * self.n_in * dtype.size()).div_ceil(4);
                        self.pack_rows(dtype, first, n_rows, &mut words[..n_words]);
                        &words[..n_words]
                    }
                };
                sink(offset + item * item_words, words)?;
                let bytes = words.len() as u64 * 4;
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

    /// `words`: `[n_rows, n_in]` elements from row `first` on, and zero where they end within a word.
    fn pack_rows(&self, dtype: DType, first: usize, n_rows: usize, words: &mut [u32]) {
        if let Some(last) = words.last_mut() {
            *last = 0;
        }
        let row_bytes = self.n_in * dtype.size();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
        for (row_idx, to) in bytes.chunks_exact_mut(row_bytes).take(n_rows).enumerate() {
            let (source, row) = self.row(first + row_idx).expect("the parts hold all rows");
            if source == dtype {
                to.copy_from_slice(row);
                continue;
            }
            let elements = row.chunks_exact(source.size()).map(|bytes| to_f32(source, bytes));
            match dtype {
                DType::F32 => elements
                    .zip(to.chunks_exact_mut(4))
                    .for_each(|(x, to)| to.copy_from_slice(&x.to_le_bytes())),
                DType::F16 => elements
                    .zip(to.chunks_exact_mut(2))
                    .for_each(|(x, to)| to.copy_from_slice(&half::f16::from_f32(x).to_le_bytes())),
                DType::Bf16 => elements
                    .zip(to.chunks_exact_mut(2))
                    .for_each(|(x, to)| to.copy_from_slice(&round_bf16(x).to_le_bytes())),
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
