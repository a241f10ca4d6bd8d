//! What must be known of the server before load can be sent: the model's name and its vocabulary.

use std::time::Duration;

use anyhow::Context as _;
use baton_proto::api::ModelInfoRequest;
use baton_proto::api::baton_client::BatonClient;
use serde::Deserialize;
use tonic::transport::Endpoint;

use super::BenchConfig;
use super::workload::{EndpointKind, Workload};

/// How long a server may take to say what it serves.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The workload of `config`, completed by what the server says.
pub async fn workload(config: &BenchConfig) -> anyhow::Result<Workload> {
    let model = match &config.model {
        Some(model) => model.clone(),
        None => first_model(config)
            .await
            .with_context(|| format!("server {}: /v1/models", config.server))?,
    };
    let vocabulary = match (config.endpoint, config.vocab_size) {
        (EndpointKind::Chat, _) => Vec::new(),
        (EndpointKind::Completions, Some(vocab_size)) => (0..vocab_size).collect(),
        (EndpointKind::Completions, None) => vocabulary(config).await.with_context(|| {
            format!(
                "server {}: baton.v1 ModelInfo; for another kind of server give --vocab-size",
                config.server
            )
        })?,
    };
    anyhow::ensure!(
        config.endpoint == EndpointKind::Chat || !vocabulary.is_empty(),
        "the vocabulary is empty"
    );
    Ok(Workload {
        endpoint: config.endpoint,
        model,
        input_len: config.input_len,
        prefix_len: config.prefix_len,
        output_len: config.output_len,
        ignore_eos: config.ignore_eos,
        temperature: config.temperature,
        vocabulary,
        seed: config.seed,
    })
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

async fn first_model(config: &BenchConfig) -> anyhow::Result<String> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(QUESTION_TIMEOUT)
        .build()?;
    let mut request = client.get(format!("http://{}/v1/models", config.server));
    if let Some(key) = &config.api_key {
        request = request.bearer_auth(key.expose());
    }
    let models: Models = request.send().await?.error_for_status()?.json().await?;
    Ok(models.data.into_iter().next().context("no model is served")?.id)
}

/// Every id that does not end a sequence.
async fn vocabulary(config: &BenchConfig) -> anyhow::Result<Vec<u32>> {
    let endpoint = Endpoint::from_shared(config.server.to_uri())?;
    let asking = async {
        let channel = endpoint.connect_timeout(QUESTION_TIMEOUT).connect().await?;
        let mut request = tonic::Request::new(ModelInfoRequest {});
        if let Some(key) = &config.api_key {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {}", key.expose()).parse()?);
        }
        let answer = BatonClient::new(channel).model_info(request).await;
        anyhow::Ok(
            answer
                .map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))?
                .into_inner(),
        )
    };
    let info = tokio::time::timeout(QUESTION_TIMEOUT, asking)
        .await
        .context("no answer in time")??;
    Ok((0..info.vocab_size)
        .filter(|id| !info.eos_token_ids.contains(id))
        .collect())
}
