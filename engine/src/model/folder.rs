//! A model as Hugging Face publishes it: a folder on disk, or the same files compiled into the binary.
//! Configurations are read at once; tokenizer, template and weights on demand. It downloads nothing.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_kernels::MappedFile;
use serde_json::Value;

use super::config::ModelConfig;
use super::error::ModelError;
use super::fields::Fields;
use super::generation::GenerationConfig;
use super::safetensors::{FileBytes, TensorTable};
use crate::text::{ChatTemplate, ChatTemplateError, Tokenizer};

/// A model's files, with its configurations parsed.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    files: Files,
    config_bytes: Arc<[u8]>,
    /// config.json
    pub config: ModelConfig,
    /// generation_config.json; all absent where the file is.
    pub generation: GenerationConfig,
    tokenizer_config: TokenizerConfig,
}

#[derive(Clone, Debug)]
enum Files {
    Directory(PathBuf),
    Embedded(Arc<[(String, &'static [u8])]>),
}

/// What we use of tokenizer_config.json.
#[derive(Clone, Debug, Default)]
struct TokenizerConfig {
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// (name, source); a single unnamed template is called `default`.
    chat_templates: Vec<(String, String)>,
}

/// Configuration files of published models are a few KiB, tokenizers at most tens of MiB.
const MAX_JSON_BYTES: u64 = 1 << 30;

impl ModelFolder {
    /// Opens a folder and reads its configurations.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFolder, ModelError> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|source| ModelError::Io {
            file: path.to_owned(),
            source,
        })?;
        if !metadata.is_dir() {
            return Err(ModelError::Malformed {
                file: path.to_owned(),
                what: "expected a model folder, found a file".into(),
            });
        }
        ModelFolder::from_files(Files::Directory(path.to_owned()))
    }

    /// A model whose files, named as in a folder, are in memory.
    pub fn from_embedded(files: &[(&str, &'static [u8])]) -> Result<ModelFolder, ModelError> {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect();
        ModelFolder::from_files(Files::Embedded(files))
    }

    fn from_files(files: Files) -> Result<ModelFolder, ModelError> {
        let config_bytes = files.required("config.json")?;
        let config = ModelConfig::parse(&files.path("config.json"), &config_bytes)?;
        let generation = match files.read("generation_config.json")? {
            Some(bytes) => GenerationConfig::parse(&files.path("generation_config.json"), &bytes)?,
            None => GenerationConfig::default(),
        };
        let mut tokenizer_config = match files.read("tokenizer_config.json")? {
            Some(bytes) => TokenizerConfig::parse(&files.path("tokenizer_config.json"), &bytes)?,
            None => TokenizerConfig::default(),
        };
        // As in transformers, the template's own file wins over the one in tokenizer_config.json.
        if let Some(bytes) = files.read("chat_template.jinja")? {
            let source = String::from_utf8(bytes.into_owned())
                .map_err(|error| ModelError::malformed(&files.path("chat_template.jinja"), error))?;
            tokenizer_config.chat_templates.retain(|(name, _)| name != "default");
            tokenizer_config.chat_templates.push(("default".to_owned(), source));
        }
        Ok(ModelFolder {
            config_bytes: Arc::from(&*config_bytes),
            files,
            config,
            generation,
            tokenizer_config,
        })
    }

    /// Where the model is, for messages: the folder's path, or `embedded`.
    pub fn location(&self) -> PathBuf {
        match &self.files {
            Files::Directory(path) => path.clone(),
            Files::Embedded(_) => PathBuf::from("embedded"),
        }
    }

    /// One of its small files as it is, or `None` if there is none of this name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, ModelError> {
        self.files.read(name)
    }

    /// The tokenizer, or `None` for a folder without one, which serves token ids only.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, ModelError> {
        let Some(bytes) = self.files.read("tokenizer.json")? else {
            return Ok(None);
        };
        let file = self.files.path("tokenizer.json");
        Tokenizer::from_bytes(&bytes)
            .map(Some)
            .map_err(|error| ModelError::malformed(&file, error))
    }

    /// The chat template, if the folder has one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        let TokenizerConfig {
            bos_token,
            eos_token,
            chat_templates,
        } = &self.tokenizer_config;
        if chat_templates.is_empty() {
            return Ok(None);
        }
        ChatTemplate::new(chat_templates, bos_token.as_deref(), eos_token.as_deref())
            .map(Some)
            .map_err(|error| ModelError::malformed(&self.files.path("chat template"), error))
    }

    /// A chat template that a client sent, for this model.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn client_chat_template(&self, source: &str) -> Result<ChatTemplate, ChatTemplateError> {
        let TokenizerConfig {
            bos_token, eos_token, ..
        } = &self.tokenizer_config;
        ChatTemplate::of_client(source, bos_token.as_deref(), eos_token.as_deref())
    }

    /// All ids that end generation: those of generation_config.json (else config.json) and the tokenizer's `eos_token`.
    pub fn eos_token_ids(&self, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
        let mut ids = self.generation.eos_token_ids.clone();
        if ids.is_empty() {
            ids.clone_from(&self.config.eos_token_ids);
        }
        let eos_token = self.tokenizer_config.eos_token.as_deref();
        ids.extend(
            tokenizer
                .zip(eos_token)
                .and_then(|(tokenizer, token)| tokenizer.token_to_id(token)),
        );
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Maps the weights: model.safetensors, or the shards that model.safetensors.index.json names.
    pub fn open_weights(&self) -> Result<TensorTable, ModelError> {
        const SINGLE: &str = "model.safetensors";
        const INDEX: &str = "model.safetensors.index.json";
        let mut table = TensorTable::default();
        if let Some(bytes) = self.files.map(SINGLE)? {
            table.add_file(&self.files.path(SINGLE), bytes)?;
            return Ok(table);
        }
        let index_path = self.files.path(INDEX);
        let Some(index) = self.files.read(INDEX)? else {
            return Err(ModelError::Missing {
                file: self.location(),
                expected: format!("{SINGLE} or {INDEX}"),
            });
        };
        let index: Value = serde_json::from_slice(&index).map_err(|error| ModelError::malformed(&index_path, error))?;
        let fields = Fields::new(&index_path, &index)?;
        let Some(Value::Object(weight_map)) = fields.get("weight_map") else {
            return Err(fields.wrong("weight_map", "an object from tensor to file", "none"));
        };
        let mut shards = std::collections::BTreeMap::<&str, Vec<&str>>::new();
        for (tensor, shard) in weight_map {
            // A bare file name: an index cannot reach outside its folder.
            let shard = shard
                .as_str()
                .filter(|name| Path::new(name).file_name() == Some(name.as_ref()));
            let Some(shard) = shard else {
                let expected = format!("a file name for tensor `{tensor}`");
                return Err(fields.wrong("weight_map", expected, &weight_map[tensor]));
            };
            shards.entry(shard).or_default().push(tensor);
        }
        for (shard, tensors) in shards {
            let path = self.files.path(shard);
            let bytes = self.files.map(shard)?.ok_or_else(|| ModelError::Missing {
                file: path.clone(),
                expected: format!("a shard with tensor `{}`, as {INDEX} says", tensors[0]),
            })?;
            table.add_file(&path, bytes)?;
            if let Some(absent) = tensors.into_iter().find(|tensor| table.get(tensor).is_none()) {
                return Err(ModelError::Tensor {
                    file: path,
                    tensor: absent.to_owned(),
                    expected: format!("in this shard, as {INDEX} says"),
                    found: "none".to_owned(),
                });
            }
        }
        Ok(table)
    }

    /// The bytes of config.json, part of every fingerprint.
    pub(crate) fn config_bytes(&self) -> &[u8] {
        &self.config_bytes
    }
}

impl Files {
    /// A file's path, for messages and for opening.
    fn path(&self, name: &str) -> PathBuf {
        match self {
            Files::Directory(directory) => directory.join(name),
            Files::Embedded(_) => Path::new("embedded").join(name),
        }
    }

    fn embedded(files: &[(String, &'static [u8])], name: &str) -> Option<&'static [u8]> {
        files.iter().find(|(other, _)| other == name).map(|(_, bytes)| *bytes)
    }

    /// A small file's bytes, or `None` if there is no such file.
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, ModelError> {
        match self {
            Files::Embedded(files) => Ok(Files::embedded(files, name).map(Cow::Borrowed)),
            Files::Directory(_) => {
                let file = self.path(name);
                match std::fs::metadata(&file) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Ok(metadata) if metadata.len() > MAX_JSON_BYTES => {
                        let what = format!("expected at most {MAX_JSON_BYTES} bytes, found {}", metadata.len());
                        return Err(ModelError::Malformed { file, what });
                    }
                    _ => {}
                }
                match std::fs::read(&file) {
                    Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                    Err(source) => Err(ModelError::Io { file, source }),
                }
            }
        }
    }

    fn required(&self, name: &str) -> Result<Cow<'static, [u8]>, ModelError> {
        self.read(name)?.ok_or_else(|| ModelError::Missing {
            file: self.path(name),
            expected: "a file of a Hugging Face model folder".to_owned(),
        })
    }

    /// A large file, mapped rather than read.
    fn map(&self, name: &str) -> Result<Option<FileBytes>, ModelError> {
        match self {
            Files::Embedded(files) => Ok(Files::embedded(files, name).map(FileBytes::Static)),
            Files::Directory(_) => {
                let file = self.path(name);
                match MappedFile::open(&file) {
                    Ok(mapped) => Ok(Some(FileBytes::Mapped(mapped))),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(ModelError::Io { file, source }),
                }
            }
        }
    }
}

impl TokenizerConfig {
    fn parse(file: &Path, bytes: &[u8]) -> Result<TokenizerConfig, ModelError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| ModelError::malformed(file, error))?;
        let fields = Fields::new(file, &value)?;
        // A special token is its text, or an object with the text in `content`.
        let token = |field: &str| match fields.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Object(object)) if object.get("content").is_some_and(Value::is_string) => {
                Ok(object["content"].as_str().map(str::to_owned))
            }
            Some(other) => Err(fields.wrong(field, "a string or an object with `content`", other)),
        };
        let expected = "a string or a list of objects with `name` and `template`";
        let chat_templates = match fields.get("chat_template") {
            None => Vec::new(),
            Some(Value::String(source)) => vec![("default".to_owned(), source.clone())],
            Some(Value::Array(named)) => named
                .iter()
                .map(|entry| {
                    Some((
                        entry["name"].as_str()?.to_owned(),
                        entry["template"].as_str()?.to_owned(),
                    ))
                })
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| fields.wrong("chat_template", expected, "a list with other entries"))?,
            Some(other) => return Err(fields.wrong("chat_template", expected, super::fields::brief(other))),
        };
        Ok(TokenizerConfig {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            chat_templates,
        })
    }
}

#[cfg(test)]
mod tests;
