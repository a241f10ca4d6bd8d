//! A link of a chosen speed: a TCP port whose answers from a Unix socket pass at so many bytes a second.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::time::Instant;

/// What passes at once; small, so that a slow link is slow evenly.
const CHUNK_BYTES: usize = 4 << 10;

/// The port of the link. It passes bytes until dropped.
pub struct Throttle {
    pub address: String,
    bytes_per_second: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Throttle {
    /// A link to `upstream`, which may not be there yet, at full speed.
    pub async fn to(upstream: PathBuf) -> Throttle {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let bytes_per_second = Arc::new(AtomicU64::new(u64::MAX));
        let speed = Arc::clone(&bytes_per_second);
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = UnixStream::connect(&upstream).await else {
                    continue;
                };
                let (mut near_read, mut near_write) = near.into_split();
                let (mut far_read, mut far_write) = far.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
                let speed = Arc::clone(&speed);
                tokio::spawn(async move {
                    let mut buffer = vec![0; CHUNK_BYTES];
                    let mut free_at = Instant::now();
                    while let Ok(n) = far_read.read(&mut buffer).await {
                        if n == 0 || near_write.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                        let seconds = n as f64 / speed.load(Ordering::Relaxed) as f64;
                        // A timer's resolution is a millisecond: what it oversleeps is not lost, what was idle is.
                        let slack = Duration::from_millis(2);
                        free_at = free_at.max(Instant::now() - slack) + Duration::from_secs_f64(seconds);
                        tokio::time::sleep_until(free_at).await;
                    }
                });
            }
        });
        Throttle {
            address,
            bytes_per_second,
            task,
        }
    }

    pub fn set_speed(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.task.abort();
    }
}
