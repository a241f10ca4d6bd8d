//! The front door's APIs: OpenAI HTTP and the gRPC services on one port, and everything that has to do with text.
//! How requests reach instances is [`crate::door`]'s business.

mod adjustments;
mod auth;
mod best_of;
mod call;
mod chat;
mod chat_prompt;
mod choice_output;
mod completion_choice;
mod completion_prompt;
mod completions;
pub mod constraints;
mod embed;
mod embeddings;
mod encode;
mod error;
mod fan_in;
mod field_table;
mod fields;
mod forced_calls;
pub(crate) mod grpc;
mod health;
mod kserve;
mod logprobs;
mod message;
mod metric_aliases;
pub mod metrics;
mod model_limits;
mod models;
mod neutral;
mod objectives;
mod openapi;
mod options;
mod output;
mod parsers;
mod past_calls;
mod plain_request;
mod reasoning;
mod request_label;
mod running;
mod serve;
mod served_model;
mod sse;
mod structural_tags;
mod timeline_body;
mod tokenize;
mod tool_calls;
mod tools;
mod truncation;
mod usage;
mod vllm_engine;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use baton_engine::constraint::ConstraintCompiler;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use self::auth::ApiKey;
pub use self::error::{ApiError, Codes, ErrorKind};
use self::metric_aliases::MetricAliases;
pub use self::metrics::MetricsRegistry;
use self::metrics::{ApiMetrics, LoadCollector};
pub use self::parsers::OutputParsers;
pub use self::request_label::{REQUEST_ID_HEADER, RequestLabel};
use self::running::Running;
pub use self::serve::{ServeOptions, serve};
use self::served_model::TokenTexts;
pub use self::served_model::{DefaultSampling, ServedModel};
use crate::config::{MetricsAliases, Switch};
use crate::door::Generator;

/// What an operator may set.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Required of every call but health checks, when set.
    pub api_key: Option<ApiKey>,
    /// Longest request body, bytes.
    pub max_body_bytes: usize,
    /// Most prompts of one completions request.
    pub max_prompts: usize,
    /// How long a stream waits for its first token before it says `: ping`, and then between pings.
    pub ping_interval: Duration,
    /// Whose names the metrics have besides their own.
    pub metrics_aliases: MetricsAliases,
    /// Whether requests may bring chat templates.
    pub client_chat_templates: Switch,
}

impl Default for ApiOptions {
    fn default() -> ApiOptions {
        ApiOptions {
            api_key: None,
            max_body_bytes: 16 << 20,
            max_prompts: 256,
            ping_interval: Duration::from_secs(5),
            metrics_aliases: MetricsAliases::None,
            client_chat_templates: Switch::Off,
        }
    }
}

/// What every handler needs; clones share it.
#[derive(Clone)]
pub struct ApiState {
    inner: Arc<Inner>,
}

struct Inner {
    generator: Arc<dyn Generator>,
    model: ServedModel,
    token_texts: TokenTexts,
    /// Compiles constraints as instances will.
    constraints: ConstraintCompiler,
    options: ApiOptions,
    registry: MetricsRegistry,
    metrics: ApiMetrics,
    running: Running,
    stopping: CancellationToken,
    created_s: u64,
    /// Long bodies are understood beside the runtime, this many at a time.
    long_bodies: Semaphore,
}

impl std::fmt::Debug for ApiState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiState")
            .field("model", &self.inner.model.name())
            .finish_non_exhaustive()
    }
}

impl ApiState {
    /// Serves `model` by `generator`. Once `stopping` is cancelled, readiness is withdrawn and new requests are refused.
    /// Metrics go to `registry`, where other parts may add theirs.
    pub fn new(
        generator: Arc<dyn Generator>,
        model: ServedModel,
        options: ApiOptions,
        registry: MetricsRegistry,
        stopping: CancellationToken,
    ) -> ApiState {
        assert!(!model.names.is_empty(), "a served model has a name");
        let aliases = match options.metrics_aliases {
            MetricsAliases::None => None,
            MetricsAliases::Vllm => {
                let (name, limit) = (model.name(), model.max_model_len);
                Some(MetricAliases::register(&registry, generator.clone(), name, limit))
            }
        };
        let metrics = ApiMetrics::register(&registry, aliases);
        registry.register_collector(Box::new(LoadCollector::new(generator.clone())));
        models::register_build_info(&registry, &model);
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        ApiState {
            inner: Arc::new(Inner {
                generator,
                token_texts: TokenTexts::new(model.vocab_size),
                constraints: model.constraints(),
                model,
                options,
                registry,
                metrics,
                running: Running::default(),
                stopping,
                created_s: unix_time_s(),
                long_bodies: Semaphore::new(n_cores),
            }),
        }
    }

    fn generator(&self) -> &dyn Generator {
        &*self.inner.generator
    }

    fn model(&self) -> &ServedModel {
        &self.inner.model
    }

    fn constraints(&self) -> &ConstraintCompiler {
        &self.inner.constraints
    }

    fn options(&self) -> &ApiOptions {
        &self.inner.options
    }

    fn metrics(&self) -> &ApiMetrics {
        &self.inner.metrics
    }

    fn running(&self) -> &Running {
        &self.inner.running
    }

    fn is_stopping(&self) -> bool {
        self.inner.stopping.is_cancelled()
    }

    /// Why no request could be served now; `None` when one could.
    fn not_ready(&self) -> Option<String> {
        if self.is_stopping() {
            return Some("the server is shutting down".to_owned());
        }
        self.generator().load().not_ready
    }
}

/// Seconds since 1970, for `created` fields.
fn unix_time_s() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Every route of the port: OpenAI HTTP, operations, the gRPC services, and `more` that needs the API key too.
pub fn router(state: ApiState, more: Router) -> Router {
    let http = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/v2/models/{model}/generate", post(kserve::rest::generate))
        .route(
            "/v2/models/{model}/versions/{version}/generate",
            post(kserve::rest::generate_version),
        )
        .route(
            "/v2/models/{model}/generate_stream",
            post(kserve::rest::generate_stream),
        )
        .route(
            "/v2/models/{model}/versions/{version}/generate_stream",
            post(kserve::rest::generate_stream_version),
        )
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::http))
        .route("/metrics", get(models::metrics))
        .route("/version", get(models::version))
        .route("/openapi.json", get(openapi::handle))
        .fallback(models::no_route)
        .method_not_allowed_fallback(models::no_method)
        .layer(DefaultBodyLimit::max(state.options().max_body_bytes))
        .with_state(state.clone());
    grpc::add_services(http, &state)
        .merge(more)
        .layer(axum::middleware::from_fn_with_state(state, auth::require_key))
}
