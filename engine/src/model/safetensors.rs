//! The tensors of one or many safetensors files, mapped: name -> dtype, shape, bytes. No conversion and no packing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use baton_kernels::{DType, MappedFile};
use safetensors::{Dtype, SafeTensors};

use super::error::ModelError;

/// A file's bytes, mapped from disk or part of the binary.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped(MappedFile),
    Static(&'static [u8]),
}

impl FileBytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            FileBytes::Mapped(file) => file.as_slice(),
            FileBytes::Static(bytes) => bytes,
        }
    }
}

/// All tensors of a model.
#[derive(Debug, Default)]
pub struct TensorTable {
    files: Vec<(PathBuf, FileBytes)>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// One tensor, row major, little endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorBytes<'a> {
    /// The file that holds it.
    pub file: &'a Path,
    /// Element type as the file says it; may be one we do not compute from.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The elements.
    pub data: &'a [u8],
}

impl TensorTable {
    /// Reads a file's header and adds its tensors. Every offset is checked against the file's length here.
    pub(crate) fn add_file(&mut self, path: &Path, bytes: FileBytes) -> Result<(), ModelError> {
        let slice = bytes.as_slice();
        let (header_len, metadata) = SafeTensors::read_metadata(slice)
            .map_err(|error| ModelError::malformed(path, format_args!("not a whole safetensors file: {error}")))?;
        let data_start = 8 + header_len;
        let file_idx = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
            let n_elements = info
                .shape
                .iter()
                .try_fold(1usize, |product, &size| product.checked_mul(size));
            let n_bytes = n_elements
                .and_then(|n| n.checked_mul(info.dtype.bitsize()))
                .map(|bits| bits / 8);
            if start > end || end > slice.len() || n_bytes != Some(end - start) {
                return Err(ModelError::Tensor {
                    file: path.to_owned(),
                    tensor: name,
                    expected: format!(
                        "the bytes of {:?} {:?} within the file's {}",
                        info.dtype,
                        info.shape,
                        slice.len()
                    ),
                    found: format!("bytes {start}..{end}"),
                });
            }
            let entry = Entry {
                file_idx,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start,
                end,
            };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                return Err(ModelError::Tensor {
                    file: path.to_owned(),
                    tensor: name,
                    expected: "each tensor once".to_owned(),
                    found: format!("also in {}", self.files[other.file_idx].0.display()),
                });
            }
        }
        self.files.push((path.to_owned(), bytes));
        Ok(())
    }

    /// A tensor by its name.
    pub fn get(&self, name: &str) -> Option<TensorBytes<'_>> {
        let entry = self.tensors.get(name)?;
        let (file, bytes) = &self.files[entry.file_idx];
        Some(TensorBytes {
            file,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: &bytes.as_slice()[entry.start..entry.end],
        })
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The file to name when a tensor is absent: the only one, or the folder of the shards.
    pub(crate) fn location(&self) -> PathBuf {
        match &*self.files {
            [] => PathBuf::new(),
            [(path, _)] => path.clone(),
            [(path, _), ..] => path.parent().unwrap_or(path).to_owned(),
        }
    }
}

/// Our dtype for a file's, if weights may be stored in it.
pub(crate) fn weight_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::Bf16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, n_data: usize) -> &'static [u8] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend((0..n_data).map(|i| i as u8));
        bytes.leak()
    }

    fn load(bytes: &'static [u8]) -> Result<TensorTable, ModelError> {
        let mut table = TensorTable::default();
        table.add_file(Path::new("model.safetensors"), FileBytes::Static(bytes))?;
        Ok(table)
    }

    const TWO: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}"#;

    #[test]
    fn tensors_are_found_with_their_bytes() {
        let table = load(file(TWO, 14)).unwrap();
        let b = table.get("b").unwrap();
        assert_eq!(
            (b.dtype, b.shape, b.data),
            (Dtype::BF16, &[1, 3][..], &[8u8, 9, 10, 11, 12, 13][..])
        );
        assert!(table.get("c").is_none());
        assert_eq!(table.names().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn broken_files_are_refused() {
        for bytes in [
            file(TWO, 13),
            file(TWO, 15),
            file("", 0),
            file("{", 0),
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            file(
                r#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,8]}}"#,
                8,
            ),
            file(r#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}}"#, 8),
            b"",
            b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
            b"\x00\x00\x00\x10\x00\x00\x00\x00{}",
        ] {
            let message = load(bytes).unwrap_err().to_string();
            assert!(
                message.starts_with("model.safetensors: ") && !message.contains('\n'),
                "{message}"
            );
        }
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let mut table = load(file(TWO, 14)).unwrap();
        let again = table.add_file(Path::new("other.safetensors"), FileBytes::Static(file(TWO, 14)));
        assert!(again.unwrap_err().to_string().contains("model.safetensors"));
    }

    proptest! {
        /// Any damage to a file either leaves tensors inside it or is refused; it never panics.
        #[test]
        fn damage_never_panics(at in 0usize..140, byte in any::<u8>(), cut in 0usize..160) {
            let mut bytes = file(TWO, 14).to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len().saturating_sub(cut % 8 * (cut % 3)));
            if let Ok(table) = load(bytes.leak()) {
                for name in table.names() {
                    let tensor = table.get(name).unwrap();
                    let n_elements: usize = tensor.shape.iter().product();
                    prop_assert_eq!(n_elements * tensor.dtype.bitsize() / 8, tensor.data.len());
                }
            }
        }
    }
}
