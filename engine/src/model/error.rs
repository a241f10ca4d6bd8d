//! Why a model cannot be loaded: one line naming the file, the field or tensor, what was expected and what was found.

use std::path::{Path, PathBuf};

use baton_kernels::KernelError;

/// A model folder, hub id or configuration that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be opened, read or mapped.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Something the folder must have is absent.
    #[error("{}: expected {expected}, found none", file.display())]
    Missing {
        /// The file or folder searched.
        file: PathBuf,
        /// What should be there.
        expected: String,
    },
    /// A file is there and its bytes are not what they should be.
    #[error("{}: {what}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong, in one line.
        what: String,
    },
    /// A field of a JSON file has a value that is wrong or not supported.
    #[error("{}: field `{field}`: expected {expected}, found {found}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, dotted where nested.
        field: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor is absent, or of a wrong shape or dtype.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", file.display())]
    Tensor {
        /// The file that holds it, or should.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The hub refused or could not be reached.
    #[error("hub model {id}: {what}")]
    Hub {
        /// `ORG/NAME`.
        id: String,
        /// What went wrong, in one line.
        what: String,
    },
    /// Packing or device memory failed.
    #[error("model {model}: {source}")]
    Kernel {
        /// The model's folder or name.
        model: String,
        /// The device's error.
        source: KernelError,
    },
}

impl ModelError {
    pub(crate) fn malformed(file: &Path, what: impl std::fmt::Display) -> ModelError {
        // Parsers' messages may hold line breaks; the promise is one line.
        let what = what.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        ModelError::Malformed {
            file: file.to_owned(),
            what,
        }
    }
}
