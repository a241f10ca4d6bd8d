//! goldens.json of a model in tests/data, as far as the tests use it.

#[path = "../../../tests/integration/golden_models.rs"]
mod folders;

use std::path::PathBuf;

use serde::Deserialize;

#[derive(Deserialize)]
pub struct Golden {
    pub prompts: Vec<Prompt>,
    pub tolerances: Tolerances,
}

#[derive(Deserialize)]
pub struct Prompt {
    pub name: String,
    pub input_ids: Vec<u32>,
    pub last_logits: LastLogits,
    pub positions: Positions,
    pub greedy: Greedy,
    pub forced: Forced,
}

#[derive(Deserialize)]
pub struct LastLogits {
    pub top_ids: Vec<u32>,
    pub top_logits: Vec<f32>,
    pub mean: f32,
}

#[derive(Deserialize)]
pub struct Positions {
    pub top1_ids: Vec<u32>,
    pub top1_logprobs: Vec<f32>,
    pub next_token_logprobs: Vec<f32>,
}

#[derive(Deserialize)]
pub struct Greedy {
    pub ids: Vec<u32>,
    pub gaps: Vec<f32>,
    pub logprobs: Vec<f32>,
}

#[derive(Deserialize)]
pub struct Forced {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
}

#[derive(Deserialize)]
pub struct Tolerances {
    pub f32_max_abs_logit: f32,
    pub f32_min_gap_for_equal_token: f32,
    /// None for mixtures of experts: a choice of experts that flips moves single positions by several logits.
    pub bf16_min_gap_for_equal_token: Option<f32>,
    pub bf16_max_abs_logit: Option<f32>,
    pub bf16_min_top1_agreement: f32,
}

impl Golden {
    pub fn load(model: &str) -> Golden {
        let path = models_folder().join(model).join("goldens.json");
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// Names of the models of tests/data.
pub fn models() -> Vec<String> {
    let name = |folder: PathBuf| {
        folder
            .file_name()
            .and_then(|name| name.to_str())
            .expect("UTF-8")
            .to_owned()
    };
    folders::golden_models(&models_folder()).into_iter().map(name).collect()
}

/// Where they lie; where the repository is not at hand, in the folder that BATON_TEST_DATA names.
pub fn models_folder() -> PathBuf {
    std::env::var_os("BATON_TEST_DATA")
        .map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data"),
            PathBuf::from,
        )
        .join("models")
}
