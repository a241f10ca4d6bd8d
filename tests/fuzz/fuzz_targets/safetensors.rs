//! Headers of safetensors files: each tensor that a table has lies within its file.
#![no_main]

use std::sync::LazyLock;

use baton_engine::model::ModelFolder;
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":8,"intermediate_size":8,"num_attention_heads":2,
    "num_hidden_layers":1,"vocab_size":16}"#;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    folder
});

fuzz_target!(|data: &[u8]| {
    let file = FOLDER.path().join("model.safetensors");
    std::fs::write(&file, data).unwrap();
    let folder = ModelFolder::open(FOLDER.path()).unwrap();
    if let Ok(table) = folder.open_weights() {
        for name in table.names() {
            let tensor = table.get(name).expect("a name of the table");
            assert!(tensor.data.len() <= data.len());
        }
    }
});
