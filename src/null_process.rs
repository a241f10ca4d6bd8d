//! A front door over a generator without a model, as a process: what a load generator is checked against, because its times are
//! known. For development; no part of a cluster.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::{self, ApiOptions, ApiState, MetricsRegistry, ServeOptions};
use crate::engine_config::{ModelSelection, ParserSelection};
use crate::null_generator::{NullGenerator, NullOptions};
use crate::{announce, model_files};

/// What it is told.
#[derive(Clone, Debug)]
pub struct NullConfig {
    /// Where clients connect. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Whose tokenizer and limits it has.
    pub model: ModelSelection,
    /// Longest prompt plus output; the model's own limit when absent.
    pub max_model_len: Option<u32>,
    /// How it speaks.
    pub options: NullOptions,
}

/// What it says, over and over.
const SPOKEN: &str = "the runner hands over";

/// Serves until `shutdown`. Prints the ready line.
///
/// # Errors
/// A model that cannot be used, an address that cannot be listened on.
pub async fn run_null(config: NullConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {}", config.listen))?;
    announce::print(&announce::ready_line(listener.local_addr()?));
    serve_null(listener, config, shutdown).await
}

/// Serves on `listener` until `shutdown`; connections wait in its backlog while the model is opened.
///
/// # Errors
/// A model that cannot be used.
pub async fn serve_null(listener: TcpListener, config: NullConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let folder = model_files::open(&config.model).await?;
    let model = model_files::served_model(
        &config.model,
        &folder,
        config.max_model_len,
        "none".to_owned(),
        ParserSelection::AUTO,
    )?;
    let mut options = config.options;
    options.embedding_size = model.hidden_size as usize;
    if let Some(tokenizer) = &model.tokenizer {
        options.token_ids = tokenizer.encode(SPOKEN)?;
    }
    let generator = Arc::new(NullGenerator::new(options));
    let state = ApiState::new(
        generator,
        model,
        ApiOptions::default(),
        MetricsRegistry::default(),
        shutdown,
    );
    api::serve(
        listener,
        api::router(state.clone(), axum::Router::new()),
        &state,
        ServeOptions::default(),
    )
    .await?;
    Ok(())
}
