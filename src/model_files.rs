//! The files of the selected model: built in, in a folder, or downloaded from the hub. Loads no weights.

use std::path::PathBuf;

use anyhow::Context as _;
use baton_engine::model::hub::{HubOptions, download};
use baton_engine::model::{ModelError, ModelFolder};

use crate::api::{DefaultSampling, OutputParsers, ServedModel};
use crate::config::{ConfigError, ModelSource};
use crate::engine_config::{ModelSelection, ParserSelection};

/// The toy chat model of `models/demo`, trained from scratch by the script beside it.
const DEMO_FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../models/demo/config.json")),
    (
        "generation_config.json",
        include_bytes!("../models/demo/generation_config.json"),
    ),
    ("tokenizer.json", include_bytes!("../models/demo/tokenizer.json")),
    (
        "tokenizer_config.json",
        include_bytes!("../models/demo/tokenizer_config.json"),
    ),
    ("model.safetensors", include_bytes!("../models/demo/model.safetensors")),
];

/// A fault in the model's files is one of configuration: starting again will not mend it.
pub fn model_error(error: ModelError) -> ConfigError {
    ConfigError::Impossible(error.to_string())
}

/// The folder of the selected model, downloading it first when it is a hub id; `None` for the demo, which is in the binary.
///
/// # Errors
/// A download that fails, in one line.
pub async fn folder(selection: &ModelSelection) -> anyhow::Result<Option<PathBuf>> {
    match &selection.source {
        ModelSource::Demo => Ok(None),
        ModelSource::Folder(path) => Ok(Some(path.clone())),
        ModelSource::Hub(id) => {
            let options = HubOptions {
                endpoint: selection.hub.endpoint.clone(),
                cache_dir: selection.hub.cache_dir.clone(),
                token: selection.hub.token.as_ref().map(|token| token.expose().to_owned()),
                revision: None,
            };
            Ok(Some(download(id, &options).await.map_err(model_error)?))
        }
    }
}

/// Opens the selected model, downloading it first when it is a hub id.
///
/// # Errors
/// Whatever is missing, misshapen or unsupported, in one line.
pub async fn open(selection: &ModelSelection) -> anyhow::Result<ModelFolder> {
    let opened = match folder(selection).await? {
        Some(path) => ModelFolder::open(path),
        None => ModelFolder::from_embedded(&DEMO_FILES),
    };
    Ok(opened.map_err(model_error)?)
}

/// What the front door serves: the text side of the model and its limits.
///
/// # Errors
/// A tokenizer or chat template that cannot be used.
pub fn served_model(
    selection: &ModelSelection,
    folder: &ModelFolder,
    max_model_len: Option<u32>,
    dtype: String,
    parsers: ParserSelection,
) -> anyhow::Result<ServedModel> {
    let tokenizer = folder.tokenizer().map_err(model_error)?;
    let chat_template = folder.chat_template().map_err(model_error)?;
    let limit = u32::try_from(folder.config.max_position_embeddings).context("max_position_embeddings")?;
    let (tool_calls, reasoning) = (parsers.tool_calls, parsers.reasoning);
    let parsers = OutputParsers::resolve(tool_calls, reasoning, chat_template.as_ref(), tokenizer.as_ref());
    let (tool_calls, reasoning) = parsers.describe();
    tracing::info!(tool_calls, reasoning, "parsers of the model's text");
    let generation = &folder.generation;
    // A model whose makers ask for greedy decoding is greedy unless the client says otherwise.
    let greedy = (generation.do_sample == Some(false)).then_some(0.0);
    Ok(ServedModel {
        names: vec![selection.served_name.clone()],
        root: selection.source.to_string(),
        folder: Some(folder.clone()),
        eos_token_ids: folder.eos_token_ids(tokenizer.as_ref()),
        tokenizer,
        chat_template,
        default_sampling: DefaultSampling {
            temperature: generation.temperature.or(greedy),
            top_k: generation.top_k,
            top_p: generation.top_p,
            repetition_penalty: generation.repetition_penalty,
        },
        max_model_len: max_model_len.unwrap_or(limit).min(limit),
        vocab_size: u32::try_from(folder.config.vocab_size).context("vocab_size")?,
        hidden_size: u32::try_from(folder.config.hidden_size).context("hidden_size")?,
        dtype,
        parsers,
    })
}
