//! What must be known of a server before load can be sent: the model's name and its vocabulary.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use baton_proto::api::baton_client::BatonClient;
use baton_proto::api::{ModelInfoRequest, ModelInfoResponse};
use serde::Deserialize;
use tonic::transport::Endpoint;

use super::BenchConfig;
use super::endpoint::{Asking, EndpointKind, LoadClient, TextOfAnswers};
use crate::config::Address;

/// How long a server may take to say what it serves.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A server to be measured.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it is.
    pub address: Address,
    /// The name of the model there.
    pub model: String,
    /// Token ids to make prompts of; empty if they are made of words.
    pub vocabulary: Arc<[u32]>,
    /// Sends requests to it.
    pub client: LoadClient,
}

impl Target {
    /// Asks `address` what `config` does not say.
    ///
    /// # Errors
    /// A server that does not answer; the message says which flag would make the question needless.
    pub async fn open(config: &BenchConfig, address: &Address) -> anyhow::Result<Target> {
        let model = match (&config.model, config.endpoint) {
            (Some(model), _) => model.clone(),
            (None, EndpointKind::BatonV1) => model_info(config, address).await?.model,
            (None, EndpointKind::Completions | EndpointKind::Chat | EndpointKind::KServe) => {
                first_model(config, address)
                    .await
                    .with_context(|| format!("server {address}: /v1/models"))?
            }
        };
        let vocabulary = match (config.endpoint.needs_vocabulary(), config.vocab_size) {
            (false, _) => Vec::new(),
            (true, Some(vocab_size)) => (0..vocab_size).collect(),
            (true, None) => vocabulary(&model_info(config, address).await?),
        };
        anyhow::ensure!(
            !config.endpoint.needs_vocabulary() || !vocabulary.is_empty(),
            "server {address}: the vocabulary is empty"
        );
        let asking = Asking {
            model: model.clone(),
            ignore_eos: config.ignore_eos,
            temperature: config.temperature,
            text: match config.details {
                true => TextOfAnswers::Kept,
                false => TextOfAnswers::Dropped,
            },
        };
        let key = config.api_key.as_ref();
        Ok(Target {
            address: address.clone(),
            model,
            vocabulary: vocabulary.into(),
            client: LoadClient::new(address, config.endpoint, asking, key, config.timeout)?,
        })
    }
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

async fn first_model(config: &BenchConfig, address: &Address) -> anyhow::Result<String> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(QUESTION_TIMEOUT)
        .build()?;
    let mut request = client.get(format!("http://{address}/v1/models"));
    if let Some(key) = &config.api_key {
        request = request.bearer_auth(key.expose());
    }
    let models: Models = request.send().await?.error_for_status()?.json().await?;
    Ok(models.data.into_iter().next().context("no model is served")?.id)
}

async fn model_info(config: &BenchConfig, address: &Address) -> anyhow::Result<ModelInfoResponse> {
    let asking = async {
        let endpoint = Endpoint::from_shared(address.to_uri())?;
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
    let answer = tokio::time::timeout(QUESTION_TIMEOUT, asking).await;
    let answer = answer.context("no answer in time").and_then(|answer| answer);
    answer.with_context(|| {
        format!("server {address}: baton.v1 ModelInfo; for another kind of server give --model and --vocab-size")
    })
}

/// Every id that does not end a sequence.
fn vocabulary(info: &ModelInfoResponse) -> Vec<u32> {
    (0..info.vocab_size)
        .filter(|id| !info.eos_token_ids.contains(id))
        .collect()
}
