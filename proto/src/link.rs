//! How processes of a cluster connect: addresses, keepalive, frame sizes, the shared secret. Opens no stream itself.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Status};

/// HTTP/2 frames as large as ours with its header: at gRPC's default of 16 KiB the receiver spends about twice the CPU per byte of KV.
/// The setting is the receiver's, so both ends make it.
const MAX_FRAME_BYTES: u32 = KV_FRAME_BYTES as u32 + (4 << 10);
/// Room for two KV frames and their headers on the way, per stream and per connection.
const WINDOW_BYTES: u32 = 8 << 20;
/// Largest message: a KV frame (about 1 MiB, or one block of one layer), or the state of the longest request.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Aimed size of a KV frame.
pub const KV_FRAME_BYTES: usize = 1 << 20;

const SECRET_KEY: &str = "x-baton-secret";

/// An address or secret that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Neither `host:port` nor `unix:/path`.
    #[error("address {address:?} is neither host:port nor unix:/path: {reason}")]
    Address {
        /// What was given.
        address: String,
        /// Why it does not parse.
        reason: String,
    },
    /// Not printable ASCII.
    #[error("the cluster secret must be printable ASCII")]
    Secret,
}

/// The secret that processes of one cluster share; never printed.
#[derive(Clone)]
pub struct ClusterSecret(Arc<MetadataValue<Ascii>>);

impl ClusterSecret {
    /// A secret of printable ASCII.
    pub fn new(secret: &str) -> Result<ClusterSecret, LinkError> {
        let mut value: MetadataValue<Ascii> = secret.parse().map_err(|_| LinkError::Secret)?;
        value.set_sensitive(true);
        Ok(ClusterSecret(Arc::new(value)))
    }

    /// The secret itself, to derive keys from. Not to be sent anywhere.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

/// What every connection between processes shares.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// A silent cut is noticed within this time.
    pub keepalive: Duration,
    /// Bound on opening a connection.
    pub connect_timeout: Duration,
    /// Shared by the processes of the cluster, if set.
    pub secret: Option<ClusterSecret>,
}

impl Default for LinkOptions {
    fn default() -> Self {
        LinkOptions {
            keepalive: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            secret: None,
        }
    }
}

impl LinkOptions {
    /// A ping goes out after half the keepalive time and must be answered within the other half.
    fn half_keepalive(&self) -> Duration {
        self.keepalive / 2
    }

    /// A connection to `host:port`, `http://host:port` or `unix:/path`, opened with its first request.
    pub fn channel(&self, address: &str) -> Result<Channel, LinkError> {
        let uri = if address.starts_with("unix:") || address.contains("://") {
            address.to_owned()
        } else {
            format!("http://{address}")
        };
        let endpoint = Endpoint::from_shared(uri).map_err(|error| LinkError::Address {
            address: address.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(endpoint
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(self.half_keepalive())
            .keep_alive_timeout(self.half_keepalive())
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(2 * WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
            .connect_lazy())
    }

    /// A server with the same settings.
    pub fn server(&self) -> Server {
        Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(self.half_keepalive()))
            .http2_keepalive_timeout(Some(self.half_keepalive()))
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(2 * WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
    }

    /// Adds the secret to every call of a client.
    pub fn present_secret(&self) -> PresentSecret {
        PresentSecret(self.secret.clone())
    }

    /// Refuses calls to a service that lack the secret.
    pub fn require_secret(&self) -> RequireSecret {
        RequireSecret(self.secret.clone())
    }
}

/// Client side of the shared secret.
#[derive(Clone, Debug)]
pub struct PresentSecret(Option<ClusterSecret>);

impl Interceptor for PresentSecret {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secret) = &self.0 {
            request.metadata_mut().insert(SECRET_KEY, (*secret.0).clone());
        }
        Ok(request)
    }
}

/// Server side of the shared secret.
#[derive(Clone, Debug)]
pub struct RequireSecret(Option<ClusterSecret>);

impl Interceptor for RequireSecret {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(secret) = &self.0 else { return Ok(request) };
        let presented = request.metadata().get(SECRET_KEY).map(|value| value.as_bytes());
        if presented.is_some_and(|bytes| bool::from(bytes.ct_eq(secret.0.as_bytes()))) {
            Ok(request)
        } else {
            Err(Status::unauthenticated("the cluster secret is missing or wrong"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_required_compared_and_never_shown() {
        let options = |secret: Option<&str>| LinkOptions {
            secret: secret.map(|s| ClusterSecret::new(s).unwrap()),
            ..Default::default()
        };
        let present = |secret| options(secret).present_secret().call(Request::new(())).unwrap();
        let mut require = options(Some("hunter2")).require_secret();
        assert!(require.call(present(Some("hunter2"))).is_ok());
        assert!(require.call(present(Some("hunter3"))).is_err());
        assert!(require.call(present(None)).is_err());
        assert!(options(None).require_secret().call(present(None)).is_ok());
        assert!(!format!("{:?}", options(Some("hunter2"))).contains("hunter2"));
        assert!(ClusterSecret::new("line\nbreak").is_err());
    }

    #[tokio::test]
    async fn addresses_are_checked() {
        let options = LinkOptions::default();
        for good in ["127.0.0.1:80", "unix:/tmp/socket", "http://localhost:8000", "[::1]:80"] {
            assert!(options.channel(good).is_ok(), "{good}");
        }
        assert!(
            options
                .channel("not an address")
                .unwrap_err()
                .to_string()
                .contains("not an address")
        );
    }
}
