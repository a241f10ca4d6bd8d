//! `--model ORG/NAME`: fetches the files a model folder needs into the usual cache, with the ecosystem's own client.
//! It loads nothing, and takes no file that is not served from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClient, HFError, RepoTypeModel};
use indicatif::{ProgressBar, ProgressStyle};

use super::error::ModelError;

/// Where to fetch from. What is `None` follows the hub's own variables: `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HOME`, `HF_TOKEN`.
#[derive(Clone, Debug, Default)]
pub struct HubOptions {
    /// Base URL of the hub.
    pub endpoint: Option<String>,
    /// The cache's folder.
    pub cache_dir: Option<PathBuf>,
    /// Access token.
    pub token: Option<String>,
    /// Branch, tag or commit; the main branch if absent.
    pub revision: Option<String>,
}

/// Everything but weights; weights follow once it is known how they are split.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
];
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Whether `model` looks like `ORG/NAME` rather than a path: one slash, and only characters of hub ids.
pub fn is_hub_id(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part
                .chars()
                .all(|char| char.is_ascii_alphanumeric() || "-_.".contains(char))
    };
    model
        .split_once('/')
        .is_some_and(|(owner, name)| part(owner) && part(name))
}

/// Downloads what is not in the cache yet, with a progress bar on a terminal's stderr, and returns the snapshot's folder.
///
/// Without a connection, a snapshot that is already in the cache is used.
///
/// # Errors
/// [`ModelError::Hub`] in one line: an id that is none, a repository or revision that does not exist or needs a token,
/// a connection that fails, or a repository without config.json or safetensors.
pub async fn download(id: &str, options: &HubOptions) -> Result<PathBuf, ModelError> {
    let failed = |what: String| ModelError::Hub {
        id: id.to_owned(),
        what,
    };
    if !is_hub_id(id) {
        return Err(failed("expected a folder that exists, or an id ORG/NAME".to_owned()));
    }
    let mut builder = HFClient::builder();
    if let Some(endpoint) = &options.endpoint {
        builder = builder.endpoint(endpoint);
    }
    if let Some(cache_dir) = &options.cache_dir {
        builder = builder.cache_dir(cache_dir);
    }
    if let Some(token) = &options.token {
        builder = builder.token(token);
    }
    let client = builder.build().map_err(|error| failed(one_line(&error)))?;
    let (owner, name) = hf_hub::split_id(id);
    let repository = client.model(owner, name);
    let revision = options.revision.as_deref().unwrap_or("main");

    let small = SMALL_FILES.map(str::to_owned).to_vec();
    let snapshot = match fetch(&repository, revision, small).await {
        Ok(snapshot) => snapshot,
        Err(HFError::Request { source, .. }) if source.is_connect() || source.is_timeout() => {
            let cached = repository
                .snapshot_download()
                .revision(revision)
                .local_files_only(true)
                .send()
                .await;
            let cached =
                cached.map_err(|_| failed(format!("cannot reach {} and nothing is cached", client.endpoint())))?;
            tracing::warn!(model = id, snapshot = %cached.display(), "the hub cannot be reached, using the cached model");
            return Ok(cached);
        }
        Err(error) => return Err(failed(explain(&error))),
    };
    if !snapshot.join("config.json").exists() {
        return Err(failed("expected a repository with config.json, found none".to_owned()));
    }
    // The commit's own name from here on, so that a push in between cannot mix two versions.
    let commit = snapshot
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or(revision)
        .to_owned();
    let weights = weight_files(&snapshot).map_err(failed)?;
    fetch(&repository, &commit, weights.clone())
        .await
        .map_err(|error| failed(explain(&error)))?;
    match weights.iter().find(|file| !snapshot.join(file).exists()) {
        Some(absent) => Err(failed(format!("expected {absent} in the repository, found none"))),
        None => Ok(snapshot),
    }
}

async fn fetch(
    repository: &hf_hub::HFRepository<RepoTypeModel>,
    revision: &str,
    files: Vec<String>,
) -> Result<PathBuf, HFError> {
    repository
        .snapshot_download()
        .revision(revision)
        .allow_patterns(files)
        .progress(Bar::default())
        .send()
        .await
}

/// The shards that the index names, or the single file.
fn weight_files(snapshot: &Path) -> Result<Vec<String>, String> {
    let path = snapshot.join(INDEX);
    if !path.exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let index = std::fs::read(&path).map_err(|error| format!("{INDEX}: {error}"))?;
    let index: serde_json::Value = serde_json::from_slice(&index).map_err(|error| format!("{INDEX}: {error}"))?;
    let mut files = std::collections::BTreeSet::new();
    for shard in index["weight_map"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(_, shard)| shard)
    {
        // Names go into glob patterns, so they may not have any of their characters.
        let plain = |name: &str| {
            name.chars()
                .all(|char| char.is_ascii_alphanumeric() || "-_.".contains(char))
        };
        match shard.as_str().filter(|name| plain(name)) {
            Some(name) => files.insert(name.to_owned()),
            None => {
                return Err(format!(
                    "{INDEX}: expected plain file names in weight_map, found {shard}"
                ));
            }
        };
    }
    if files.is_empty() {
        return Err(format!(
            "{INDEX}: expected an object weight_map with shards, found none"
        ));
    }
    Ok(files.into_iter().collect())
}

fn explain(error: &HFError) -> String {
    match error {
        // The hub does not tell strangers whether a private repository exists.
        HFError::RepoNotFound { .. }
        | HFError::RevisionNotFound { .. }
        | HFError::AuthRequired { .. }
        | HFError::Forbidden { .. } => {
            format!(
                "{}; check the id, and HF_TOKEN if the model is private or gated",
                one_line(error)
            )
        }
        other => one_line(other),
    }
}

fn one_line(error: &HFError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One bar over all files of a download. indicatif draws it only on a terminal.
#[derive(Default)]
struct Bar {
    state: Mutex<BarState>,
}

#[derive(Default)]
struct BarState {
    bar: Option<ProgressBar>,
    /// Bytes of each file that comes by plain HTTP.
    per_file: HashMap<String, u64>,
    /// Bytes that come deduplicated, all files together.
    batch: u64,
}

impl ProgressHandler for Bar {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let Ok(mut state) = self.state.lock() else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } if *total_bytes > 0 => {
                let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                state.bar = Some(ProgressBar::new(*total_bytes).with_style(style));
            }
            DownloadEvent::Start { .. } => {}
            DownloadEvent::Progress { files } => {
                state
                    .per_file
                    .extend(files.iter().map(|file| (file.filename.clone(), file.bytes_completed)));
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => state.batch = *bytes_completed,
            DownloadEvent::Complete => {
                if let Some(bar) = state.bar.take() {
                    bar.finish_and_clear();
                }
            }
        }
        let position = state.batch + state.per_file.values().sum::<u64>();
        if let Some(bar) = &state.bar {
            bar.set_position(position);
        }
    }
}

#[cfg(test)]
mod tests;
