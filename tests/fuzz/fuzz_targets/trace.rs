//! Traces for the load generator: CSV and JSON lines.
#![no_main]

use std::sync::LazyLock;

use baton::bench::workload::read_trace;
use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

fuzz_target!(|data: &[u8]| {
    let file = FOLDER.path().join("trace");
    std::fs::write(&file, data).unwrap();
    if let Ok(requests) = read_trace(&file) {
        assert!(!requests.is_empty());
    }
});
