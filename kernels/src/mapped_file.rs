//! A read-only mapping of a whole file: model weights as published, paged in as they are read. No parsing.

use std::fs::File;
use std::io;
use std::path::Path;

/// A file in memory, shared with every other process that maps it.
///
/// The file must not be truncated while it is mapped: reading past its new end ends the process (SIGBUS). Model
/// files are written once, and downloads are renamed into place when whole.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped.
    mapping: Option<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a regular file"));
        }
        if metadata.len() == 0 {
            return Ok(MappedFile { mapping: None });
        }
        // SAFETY: the mapping is private to readers and never written through; that the file is not truncated or
        // changed meanwhile is the condition stated on the type, guaranteed by whoever publishes model files.
        let mapping = unsafe { memmap2::Mmap::map(&file)? };
        Ok(MappedFile { mapping: Some(mapping) })
    }

    /// The file's bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.mapping.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"weights").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().as_slice(), b"weights");
        std::fs::write(directory.path().join("empty"), b"").unwrap();
        assert!(
            MappedFile::open(&directory.path().join("empty"))
                .unwrap()
                .as_slice()
                .is_empty()
        );
        assert!(MappedFile::open(directory.path()).is_err());
        assert_eq!(
            MappedFile::open(&directory.path().join("none")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
