//! The files from which a gateway builds the model's tokenizer and chat template, as one zip archive.

use std::io::{Cursor, Write as _};

use baton_engine::model::ModelFolder;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::super::error::{ApiError, ErrorKind};

/// Files of a Hugging Face model folder that have to do with text, and the configurations.
const FILES: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
];

/// What a message carries.
pub(super) const CHUNK_BYTES: usize = 64 << 10;

/// The archive and the hexadecimal SHA-256 of it. Equal files give equal bytes.
pub(super) fn archive(folder: &ModelFolder) -> Result<(Bytes, String), ApiError> {
    let failed =
        |error: &dyn std::fmt::Display| ApiError::new(ErrorKind::Internal, format!("tokenizer files: {error}"));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .last_modified_time(DateTime::default());
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for name in FILES {
        if let Some(bytes) = folder.file(name).map_err(|error| failed(&error))? {
            zip.start_file(name, options).map_err(|error| failed(&error))?;
            zip.write_all(&bytes).map_err(|error| failed(&error))?;
        }
    }
    let bytes = zip.finish().map_err(|error| failed(&error))?.into_inner();
    let sha256: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok((bytes.into(), sha256))
}
