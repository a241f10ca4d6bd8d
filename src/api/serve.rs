//! The port: HTTP/1.1, HTTP/2 without TLS and gRPC on one listener, with bounds on connections and a bounded drain.
//! What is answered is the router's business.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use super::ApiState;

/// Bounds of the port.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Connections open at once; further ones wait in the listener's backlog.
    pub max_connections: usize,
    /// Streams open at once on one HTTP/2 connection.
    pub max_concurrent_streams: u32,
    /// How long a client may take for a request's headers.
    pub header_timeout: Duration,
    /// An HTTP/2 connection is pinged when it was silent this long.
    pub keepalive_interval: Duration,
    /// An HTTP/2 connection whose ping is not answered in this time is closed, which cancels its requests.
    pub keepalive_timeout: Duration,
    /// How long open requests may go on once the server stops.
    pub drain_timeout: Duration,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            max_connections: 4096,
            max_concurrent_streams: 1024,
            header_timeout: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// Serves `router` until the token that `state` was made with is cancelled; then takes no more connections, lets open
/// requests end within the drain timeout, and cuts those that do not.
pub async fn serve(listener: TcpListener, router: Router, state: &ApiState, options: ServeOptions) -> io::Result<()> {
    let stopping = state.inner.stopping.clone();
    let connections = std::sync::Arc::new(Semaphore::new(options.max_connections));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopping.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            accepted = accept(&listener, &connections) => accepted,
        };
        let (stream, permit) = accepted;
        let open = OpenConnection::count(state);
        let connection = connection(stream, router.clone(), options, stopping.clone());
        tasks.spawn(async move {
            connection.await;
            drop((permit, open));
        });
    }
    drop(listener);
    let drained = tokio::time::timeout(options.drain_timeout, async {
        while tasks.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        tracing::warn!(
            n_connections = tasks.len(),
            "open requests were cut at the drain timeout"
        );
        tasks.shutdown().await;
    }
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    connections: &std::sync::Arc<Semaphore>,
) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    // Such errors are of one connection, or of a process out of file descriptors: waiting lets others close.
    const PAUSE: Duration = Duration::from_millis(50);
    let permit = connections
        .clone()
        .acquire_owned()
        .await
        .expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router, options: ServeOptions, stopping: CancellationToken) {
    // Each token is a small write that must not wait for the acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let service = service_fn(move |request: http::Request<Incoming>| {
        let mut router = router.clone();
        async move { Ok::<Response, Infallible>(infallible(router.call(request.map(Body::new)).await)) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .max_concurrent_streams(options.max_concurrent_streams);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "connection ended");
    }
}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

/// Counts a connection while it lives.
struct OpenConnection {
    state: ApiState,
}

impl OpenConnection {
    fn count(state: &ApiState) -> OpenConnection {
        state.metrics().connections.inc();
        OpenConnection { state: state.clone() }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.state.metrics().connections.dec();
    }
}
