//! Packing from every dtype, the file's life, and what is refused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[derive(Default)]
struct Source {
    tensors: HashMap<String, (DType, Vec<usize>, Vec<u8>)>,
    asked: AtomicUsize,
}

impl Source {
    fn with(mut self, name: &str, dtype: DType, shape: &[usize], values: &[f32]) -> Source {
        let data = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values
                .iter()
                .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
                .collect(),
            DType::Bf16 => values
                .iter()
                .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                .collect(),
        };
        self.tensors.insert(name.to_owned(), (dtype, shape.to_vec(), data));
        self
    }
}

impl WeightSource for Source {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (dtype, shape, data) = self.tensors.get(name).ok_or("not in model.safetensors")?;
        Ok(SourceTensor {
            dtype: *dtype,
            shape: shape.clone(),
            data: Cow::Borrowed(data),
        })
    }
}

fn matrix(name: &str, n_out: usize, n_in: usize, parts: &[&str]) -> WeightSpec {
    let parts = parts.iter().map(|part| (*part).to_owned()).collect();
    WeightSpec {
        name: name.to_owned(),
        kind: WeightKind::Matrix { n_out, n_in },
        parts,
    }
}

fn vector(name: &str, len: usize) -> WeightSpec {
    WeightSpec {
        name: name.to_owned(),
        kind: WeightKind::Vector { len },
        parts: vec![name.to_owned()],
    }
}

/// Element (row, col) of a packed matrix.
fn element(weights: &PackedWeights, name: &str, row: usize, col: usize) -> f32 {
    let matrix = weights.matrix(name).unwrap();
    let per_word = if weights.dtype() == DType::F32 { 1 } else { 2 };
    let word = matrix.words()[(row / PANEL * matrix.n_words + col / per_word) * PANEL + row % PANEL];
    match (per_word, col % 2) {
        (1, _) => f32::from_bits(word),
        (_, 0) => f32::from_bits(word << 16),
        _ => f32::from_bits(word & 0xffff_0000),
    }
}

/// q, k, v of 70, 3 and 60 rows by 5, in three dtypes: parts straddle panels, and 5 is odd. Values are exact in each.
fn source_and_specs() -> (Source, Vec<WeightSpec>) {
    let values = |base: f32, n: usize| (0..n).map(|i| base + (i % 128) as f32).collect::<Vec<f32>>();
    let source = Source::default()
        .with("q", DType::F32, &[70, 5], &values(0.0, 350))
        .with("k", DType::F16, &[3, 5], &values(128.0, 15))
        .with("v", DType::Bf16, &[60, 5], &values(-128.0, 300))
        .with("norm", DType::Bf16, &[3], &[1.0, -2.0, 0.5]);
    (source, vec![matrix("qkv", 133, 5, &["q", "k", "v"]), vector("norm", 3)])
}

fn assert_right(weights: &PackedWeights) {
    for row in 0..133 {
        for col in 0..5 {
            let expected = match row {
                0..70 => ((row * 5 + col) % 128) as f32,
                70..73 => 128.0 + ((row - 70) * 5 + col) as f32,
                _ => -128.0 + (((row - 73) * 5 + col) % 128) as f32,
            };
            assert_eq!(element(weights, "qkv", row, col), expected, "row {row}, col {col}");
        }
    }
    // Padding is zero: outputs behind the last, and in bf16 the missing sixth input.
    assert_eq!(element(weights, "qkv", 133, 0), 0.0);
    if weights.dtype() == DType::Bf16 {
        assert_eq!(element(weights, "qkv", 0, 5), 0.0);
    }
    assert_eq!(weights.vector("norm").unwrap().data[..], [1.0, -2.0, 0.5]);
}

#[test]
fn parts_of_any_dtype_pack_to_panels_in_memory_and_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (source, specs) = source_and_specs();
    for dtype in [DType::F32, DType::Bf16] {
        assert_right(&PackedWeights::in_memory(Packing::Panels, dtype, &specs, &source).unwrap());
        let mut reports = Vec::new();
        let mut progress = |done, total| reports.push((done, total));
        let weights = PackedWeights::open_or_build(
            folder.path(),
            "k1",
            Packing::Panels,
            dtype,
            &specs,
            &source,
            &mut progress,
        )
        .unwrap();
        assert_right(&weights);
        let (done, total) = *reports.last().unwrap();
        assert!(done == total && total > 0 && reports.is_sorted(), "{reports:?}");

        // A second opening maps the same file and asks for nothing.
        let asked = source.asked.load(Ordering::Relaxed);
        let mut silent = |_, _| panic!("progress without packing");
        let again = PackedWeights::open_or_build(
            folder.path(),
            "k1",
            Packing::Panels,
            dtype,
            &specs,
            &source,
            &mut silent,
        )
        .unwrap();
        assert_right(&again);
        assert_eq!(source.asked.load(Ordering::Relaxed), asked);
        assert_eq!(again.bytes(), weights.bytes());
    }
}

/// Elements of the matrix as rows hold them.
fn elements_of_rows(weights: &PackedWeights) -> Vec<f32> {
    let (bytes, shape) = weights.rows("qkv").unwrap();
    assert_eq!(shape, [133, 5]);
    let element = |bytes: &[u8]| match weights.dtype() {
        DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        DType::F16 => half::f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        DType::Bf16 => half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
    };
    bytes.chunks_exact(weights.dtype().size()).map(element).collect()
}

#[test]
fn rows_lie_as_they_came_in_a_file_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let (source, specs) = source_and_specs();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let in_memory = PackedWeights::in_memory(Packing::Rows, dtype, &specs, &source).unwrap();
        let open = |packing, dtype| {
            PackedWeights::open_or_build(folder.path(), "k", packing, dtype, &specs, &source, &mut |_, _| {})
        };
        let in_file = open(Packing::Rows, dtype).unwrap();
        let panels = (dtype != DType::F16).then(|| open(Packing::Panels, dtype).unwrap());
        for weights in [&in_memory, &in_file] {
            let expected = (0..133).flat_map(|row| (0..5).map(move |col| (row, col)));
            for ((row, col), found) in expected.zip(elements_of_rows(weights)) {
                let expected = match row {
                    0..70 => ((row * 5 + col) % 128) as f32,
                    70..73 => 128.0 + ((row - 70) * 5 + col) as f32,
                    _ => -128.0 + (((row - 73) * 5 + col) % 128) as f32,
                };
                assert_eq!(found, expected, "{dtype}: row {row}, col {col}");
            }
            assert_eq!(weights.vector("norm").unwrap().data[..], [1.0, -2.0, 0.5]);
        }
        panels.iter().for_each(|panels| assert_right(panels));
    }
    assert!(folder.path().join("k.rows.f16").exists() && folder.path().join("k.bf16").exists());
}

#[test]
fn truncated_and_foreign_files_are_rebuilt() {
    let folder = tempfile::tempdir().unwrap();
    let (source, specs) = source_and_specs();
    let open = |specs: &[WeightSpec]| {
        PackedWeights::open_or_build(
            folder.path(),
            "k",
            Packing::Panels,
            DType::Bf16,
            specs,
            &source,
            &mut |_, _| {},
        )
        .unwrap()
    };
    let first = open(&specs);
    let path = folder.path().join("k.bf16");
    let whole = std::fs::read(&path).unwrap();
    for broken in [vec![], b"not ours".to_vec(), whole[..whole.len() - 4].to_vec(), {
        let mut other = whole.clone();
        other[8] ^= 1;
        other
    }] {
        std::fs::write(folder.path().join("new"), &broken).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_right(&open(&specs));
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
    // Other weights under the same key, then these again; the first map has kept its own bytes throughout.
    let fewer = open(&specs[1..]);
    assert!(fewer.matrix("qkv").is_err());
    assert_right(&open(&specs));
    assert_right(&first);
    let names: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(names.len() == 2, "only the file and its lock remain: {names:?}");
}

#[test]
fn of_many_starters_one_packs() {
    let folder = tempfile::tempdir().unwrap();
    let (source, specs) = source_and_specs();
    let barrier = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // A source of its own, as in another process; the shared counter tells who packed.
                barrier.wait();
                let mut packed = false;
                let mut progress = |_, _| packed = true;
                let weights = PackedWeights::open_or_build(
                    folder.path(),
                    "k",
                    Packing::Panels,
                    DType::Bf16,
                    &specs,
                    &SyncSource(&source),
                    &mut progress,
                );
                assert_right(&weights.unwrap());
                if packed {
                    source.asked.fetch_add(1000, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(source.asked.into_inner(), 1004, "one builder, four tensors");
}

struct SyncSource<'a>(&'a Source);

impl WeightSource for SyncSource<'_> {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        self.0.tensor(name)
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (source, _) = source_and_specs();
    let mut source = source.with("short", DType::F32, &[4, 5], &[0.0; 19]);
    source.tensors.get_mut("short").unwrap().2.truncate(76);
    let error = |spec: WeightSpec| {
        PackedWeights::in_memory(Packing::Panels, DType::F32, &[spec], &source)
            .err()
            .unwrap()
            .to_string()
    };
    assert_eq!(
        error(matrix("a", 70, 6, &["q"])),
        "tensor q: expected shape [70, 6], found [70, 5]"
    );
    assert_eq!(
        error(matrix("a", 71, 5, &["q"])),
        "tensor q: expected shape [71, 5], found [70, 5]"
    );
    assert_eq!(
        error(matrix("a", 74, 5, &["q", "k"])),
        "tensor q + k: expected shape [74, 5], found [73, 5]"
    );
    assert_eq!(
        error(matrix("a", 3, 5, &["norm"])),
        "tensor norm: expected shape [3, 5], found [3]"
    );
    assert_eq!(error(vector("norm4", 4)), "tensor norm4: not in model.safetensors");
    assert_eq!(
        error(matrix("a", 4, 5, &["short"])),
        "tensor short: f32 of shape [4, 5] needs 80 bytes, found 76"
    );
    for key in ["", "../x", "a/b", "a.b"] {
        let found = PackedWeights::open_or_build(
            folder.path(),
            key,
            Packing::Panels,
            DType::F32,
            &[],
            &source,
            &mut |_, _| {},
        );
        assert!(matches!(found, Err(KernelError::Key { .. })), "{key:?}");
    }
    // A failed build leaves neither a file nor a temporary one.
    let specs = [matrix("a", 3, 5, &["absent"])];
    assert!(
        PackedWeights::open_or_build(
            folder.path(),
            "k",
            Packing::Panels,
            DType::F32,
            &specs,
            &source,
            &mut |_, _| {}
        )
        .is_err()
    );
    let names: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["k.f32.lock"]);
}
