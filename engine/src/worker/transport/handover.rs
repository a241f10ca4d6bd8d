//! How an instance hands its KV memory to the other processes of its host: over a Unix socket that bears its incarnation
//! in its name, to whoever proves to know the cluster's secret (or, without one, runs as the same user). The connection
//! then stays open, so that its end tells the reader that the incarnation has gone.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use baton_kernels::cuda::{CardUuid, CudaMemoryHandle};
use baton_kernels::{DType, ForeignKv, ForeignStaging, KernelError, KvLayout, KvShare, StagingGeometry};
use baton_proto::link::ClusterSecret;
use baton_scheduler::ids::Incarnation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::beside_others;
use super::mappings::ForeignMemory;
use super::staged::StagedFrames;

/// Raised when the words of the handover change; instances that differ in it use gRPC.
const VERSION: u32 = 1;
/// Both ends of a handover are on one host.
const DEADLINE: Duration = Duration::from_secs(1);
/// Processes that may read at once.
const MAX_READERS: usize = 256;
const MAX_MESSAGE_BYTES: usize = 4096;

/// Why another process's memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandoverError {
    /// On another host, in another network namespace, or without shared memory.
    #[error("it offers no shared memory on this host")]
    NotHere,
    #[error("the socket for its memory: {0}")]
    Socket(#[from] io::Error),
    #[error("no answer within {} s", DEADLINE.as_secs())]
    TimedOut,
    #[error("its words are unknown: {0}")]
    Words(#[from] serde_json::Error),
    #[error("it refuses: {0}")]
    Refused(String),
    #[error("it does not know the cluster secret")]
    Secret,
    #[error("it runs as user {found}, expected {expected} since there is no cluster secret")]
    User { found: u32, expected: u32 },
    #[error("its KV layout is {found:?}, expected {expected:?}")]
    Layout { found: Box<Memory>, expected: KvLayout },
    #[error("its KV is in a card's memory, and ours is not or cannot be shared so")]
    NoCard,
    #[error("its KV is in a card's memory that no other process can map")]
    NoName,
    #[error(transparent)]
    Map(#[from] KernelError),
}

/// Shape of the memory, as said on the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    n_layers: usize,
    n_kv_heads: usize,
    block_size: usize,
    head_dim: usize,
    dtype: String,
    n_blocks: usize,
    numerics_class: String,
    /// Where the blocks are, unless they are in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    card: Option<Card>,
    /// Through which a card's blocks leave: the second file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    staging: Option<Staging>,
}

/// A card's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Card {
    uuid: [u8; 16],
    /// The driver's 64 bytes.
    handle: Vec<u8>,
    offset: u64,
}

impl Card {
    fn handle(&self) -> Result<CudaMemoryHandle, HandoverError> {
        let n_bytes = self.handle.len();
        let bytes = self.handle.as_slice().try_into();
        let refused = |_| HandoverError::Refused(format!("its handle has {n_bytes} bytes, expected 64"));
        Ok(CudaMemoryHandle {
            card: CardUuid(self.uuid),
            bytes: bytes.map_err(refused)?,
            offset: self.offset,
        })
    }
}

/// Slots of the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Staging {
    n_slots: u32,
    slot_bytes: usize,
}

impl Staging {
    fn geometry(self) -> Result<StagingGeometry, HandoverError> {
        let refused = || HandoverError::Refused(format!("no memory has {self:?}"));
        StagingGeometry::new(self.n_slots, self.slot_bytes).ok_or_else(refused)
    }
}

impl Memory {
    fn of(share: &KvShare, numerics_class: &str) -> Memory {
        let layout = share.layout();
        Memory {
            n_layers: layout.n_layers,
            n_kv_heads: layout.n_kv_heads,
            block_size: layout.block_size,
            head_dim: layout.head_dim,
            dtype: layout.dtype.to_string(),
            n_blocks: share.n_blocks(),
            numerics_class: numerics_class.to_owned(),
            card: share.card().map(|handle| Card {
                uuid: handle.card.0,
                handle: handle.bytes.to_vec(),
                offset: handle.offset,
            }),
            staging: share.staging().map(|staging| Staging {
                n_slots: staging.geometry.n_slots(),
                slot_bytes: staging.geometry.slot_bytes(),
            }),
        }
    }

    fn has_layout(&self, layout: KvLayout) -> bool {
        self.n_layers == layout.n_layers
            && self.n_kv_heads == layout.n_kv_heads
            && self.block_size == layout.block_size
            && self.head_dim == layout.head_dim
            && self.dtype.parse::<DType>() == Ok(layout.dtype)
    }
}

/// What the reader says first.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: u32,
    /// Whom it means.
    incarnation: u64,
    nonce: [u8; 16],
}

#[derive(Serialize, Deserialize)]
struct Challenge {
    nonce: [u8; 16],
    proof: [u8; 32],
}

#[derive(Serialize, Deserialize)]
struct Response {
    proof: [u8; 32],
}

/// Followed by one byte that carries the files: that of the KV memory, and that of the staging if there is one.
#[derive(Serialize, Deserialize)]
struct Granted {
    incarnation: u64,
    memory: Memory,
}

/// The owner's words: what was asked for, or why not.
type Answer<T> = Result<T, String>;

/// Knowledge of the cluster's secret, which itself never crosses the socket.
#[derive(Clone)]
pub(super) struct Credentials {
    key: Option<[u8; 32]>,
}

#[derive(Clone, Copy)]
enum Side {
    Owner,
    Reader,
}

impl Credentials {
    pub(super) fn new(secret: Option<&ClusterSecret>) -> Credentials {
        let derive = |secret: &ClusterSecret| blake3::derive_key("baton KV memory handover v1", secret.as_bytes());
        Credentials {
            key: secret.map(derive),
        }
    }

    fn proof(&self, side: Side, hello: &Hello, nonce: &[u8; 16]) -> [u8; 32] {
        let Some(key) = &self.key else { return [0; 32] };
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(match side {
            Side::Owner => b"owner ",
            Side::Reader => b"reader",
        });
        hasher.update(&hello.incarnation.to_le_bytes());
        hasher.update(&hello.nonce);
        hasher.update(nonce);
        *hasher.finalize().as_bytes()
    }

    /// Without a secret, only the same user is trusted.
    fn check_user(&self, stream: &UnixStream) -> Result<(), HandoverError> {
        let (found, expected) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
        if self.key.is_none() && found != expected {
            return Err(HandoverError::User { found, expected });
        }
        Ok(())
    }
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    // In constant time.
    blake3::Hash::from_bytes(*a) == blake3::Hash::from_bytes(*b)
}

fn nonce() -> io::Result<[u8; 16]> {
    let mut nonce = [0; 16];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    Ok(nonce)
}

/// An abstract name: it goes with its process, and needs no folder that both processes see.
#[cfg(target_os = "linux")]
fn socket_address(incarnation: u64) -> io::Result<std::os::unix::net::SocketAddr> {
    use std::os::linux::net::SocketAddrExt as _;
    std::os::unix::net::SocketAddr::from_abstract_name(format!("baton-kv-{incarnation:016x}"))
}

#[cfg(not(target_os = "linux"))]
fn socket_address(_: u64) -> io::Result<std::os::unix::net::SocketAddr> {
    Err(io::ErrorKind::Unsupported.into())
}

async fn say<T: Serialize>(stream: &mut UnixStream, words: &T) -> Result<(), HandoverError> {
    let words = serde_json::to_vec(words)?;
    let mut message = Vec::from((words.len() as u32).to_le_bytes());
    message.extend(words);
    Ok(stream.write_all(&message).await?)
}

async fn hear<T: DeserializeOwned>(stream: &mut UnixStream) -> Result<T, HandoverError> {
    let n_bytes = stream.read_u32_le().await? as usize;
    if n_bytes > MAX_MESSAGE_BYTES {
        let message = format!("{n_bytes} bytes of words, expected at most {MAX_MESSAGE_BYTES}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message).into());
    }
    let mut words = vec![0; n_bytes];
    stream.read_exact(&mut words).await?;
    Ok(serde_json::from_slice(&words)?)
}

/// Hands an instance's memory to whoever may read it, until dropped: then its readers are told by the connection's end.
pub(super) struct Owner {
    task: JoinHandle<()>,
}

struct Owned {
    incarnation: Incarnation,
    share: KvShare,
    memory: Memory,
    credentials: Credentials,
    /// Readers say what they have fetched of it.
    frames: Arc<StagedFrames>,
}

impl Owner {
    /// Starts listening; within a runtime.
    pub(super) fn start(
        incarnation: Incarnation,
        share: KvShare,
        numerics_class: &str,
        credentials: Credentials,
        frames: Arc<StagedFrames>,
    ) -> io::Result<Owner> {
        let listener = std::os::unix::net::UnixListener::bind_addr(&socket_address(incarnation.0)?)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let owned = Arc::new(Owned {
            incarnation,
            memory: Memory::of(&share, numerics_class),
            share,
            credentials,
            frames,
        });
        Ok(Owner {
            task: tokio::spawn(serve(listener, owned)),
        })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: UnixListener, owned: Arc<Owned>) {
    let places = Arc::new(Semaphore::new(MAX_READERS));
    // Ends every reader's connection with this task.
    let mut readers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = readers.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, most likely.
            tokio::time::sleep(DEADLINE).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(
                n = MAX_READERS,
                "too many processes read this KV memory; one more is refused"
            );
            continue;
        };
        let owned = Arc::clone(&owned);
        readers.spawn(async move {
            let _place = place;
            match timeout(DEADLINE, grant(stream, &owned)).await {
                // Until the reader closes.
                Ok(Ok(stream)) => owned.frames.hear_fetched(stream).await,
                Ok(Err(error)) => tracing::warn!(%error, "the KV memory was not handed over"),
                Err(_) => tracing::warn!("a process asked for the KV memory and then said nothing"),
            }
        });
    }
}

async fn grant(mut stream: UnixStream, owned: &Owned) -> Result<UnixStream, HandoverError> {
    let refuse = async |stream: &mut UnixStream, error: HandoverError| {
        // It may have gone; then the reason that we log is all there is.
        let _ = say(stream, &Answer::<Challenge>::Err(error.to_string())).await;
        Err(error)
    };
    if let Err(error) = owned.credentials.check_user(&stream) {
        return refuse(&mut stream, error).await;
    }
    let hello: Hello = hear(&mut stream).await?;
    if hello.version != VERSION || hello.incarnation != owned.incarnation.0 {
        let message = format!(
            "version {} of incarnation {} is asked for, this is {VERSION} of {}",
            hello.version,
            Incarnation(hello.incarnation),
            owned.incarnation
        );
        return refuse(&mut stream, HandoverError::Refused(message)).await;
    }
    let nonce = nonce()?;
    let proof = owned.credentials.proof(Side::Owner, &hello, &nonce);
    say(&mut stream, &Answer::Ok(Challenge { nonce, proof })).await?;
    let response: Response = hear(&mut stream).await?;
    if !same(&response.proof, &owned.credentials.proof(Side::Reader, &hello, &nonce)) {
        return refuse(&mut stream, HandoverError::Secret).await;
    }
    let granted = Granted {
        incarnation: owned.incarnation.0,
        memory: owned.memory.clone(),
    };
    say(&mut stream, &Answer::Ok(granted)).await?;
    send_files(&stream, &owned.share).await?;
    Ok(stream)
}

/// As many as come with an answer.
const MAX_FILES: usize = 2;

async fn send_files(stream: &UnixStream, share: &KvShare) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let staging = share.staging().map(|staging| staging.file);
    let files: Vec<BorrowedFd<'_>> = std::iter::once(share.as_fd()).chain(staging).collect();
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&files)),
            "there is room for {MAX_FILES} files"
        );
        let n = rustix::net::sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(n)
    };
    stream.async_io(Interest::WRITABLE, send).await?;
    Ok(())
}

/// The first is always there.
async fn receive_files(stream: &UnixStream) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let files = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next().map(|first| (first, files.next())),
            _ => None,
        });
        files.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no file came"))
    };
    stream.async_io(Interest::READABLE, receive).await
}

/// Another process's memory, and the connection that lives as long as it does.
pub(super) struct Received {
    pub(super) memory: ForeignMemory,
    pub(super) connection: OwnedReadHalf,
}

/// Asks for the memory of `incarnation`; of a card's, for copies into `near`.
pub(super) async fn request(
    incarnation: u64,
    layout: KvLayout,
    credentials: &Credentials,
    near: Option<&KvShare>,
) -> Result<Received, HandoverError> {
    let connect = || -> io::Result<UnixStream> {
        // Connecting to a Unix socket does not wait, unless its queue is full.
        let stream = std::os::unix::net::UnixStream::connect_addr(&socket_address(incarnation)?)?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    };
    let stream = connect().map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound | io::ErrorKind::Unsupported => {
            HandoverError::NotHere
        }
        _ => HandoverError::Socket(error),
    })?;
    let received = timeout(DEADLINE, receive(stream, incarnation, layout, credentials, near)).await;
    received.unwrap_or(Err(HandoverError::TimedOut))
}

async fn receive(
    mut stream: UnixStream,
    incarnation: u64,
    layout: KvLayout,
    credentials: &Credentials,
    near: Option<&KvShare>,
) -> Result<Received, HandoverError> {
    credentials.check_user(&stream)?;
    let hello = Hello {
        version: VERSION,
        incarnation,
        nonce: nonce()?,
    };
    say(&mut stream, &hello).await?;
    let challenge = hear::<Answer<Challenge>>(&mut stream).await?;
    let challenge = challenge.map_err(HandoverError::Refused)?;
    if !same(
        &challenge.proof,
        &credentials.proof(Side::Owner, &hello, &challenge.nonce),
    ) {
        return Err(HandoverError::Secret);
    }
    let proof = credentials.proof(Side::Reader, &hello, &challenge.nonce);
    say(&mut stream, &Response { proof }).await?;
    let granted = hear::<Answer<Granted>>(&mut stream).await?;
    let Granted {
        incarnation: found,
        memory,
    } = granted.map_err(HandoverError::Refused)?;
    if found != incarnation {
        return Err(HandoverError::Refused(format!(
            "it is incarnation {}",
            Incarnation(found)
        )));
    }
    let (file, staging_file) = receive_files(&stream).await?;
    if !memory.has_layout(layout) {
        return Err(HandoverError::Layout {
            found: Box::new(memory),
            expected: layout,
        });
    }
    let staging = match (memory.staging, staging_file) {
        (Some(staging), Some(file)) => Some(ForeignStaging::map(&file, layout, staging.geometry()?)?),
        _ => None,
    };
    let in_place = match &memory.card {
        None if staging.is_some() => Err(HandoverError::NoName),
        None => ForeignKv::map(&file, layout, memory.n_blocks).map_err(HandoverError::from),
        Some(card) => on_card(card, &file, layout, memory.n_blocks, near),
    };
    let (connection, owner) = stream.into_split();
    Ok(Received {
        memory: ForeignMemory::new(in_place, staging, owner)?,
        connection,
    })
}

fn on_card(
    card: &Card,
    file: &OwnedFd,
    layout: KvLayout,
    n_blocks: usize,
    near: Option<&KvShare>,
) -> Result<ForeignKv, HandoverError> {
    let near = near.filter(|near| near.is_on_card()).ok_or(HandoverError::NoCard)?;
    let handle = card.handle()?;
    // The driver takes its time.
    let mapped = beside_others(true, || ForeignKv::map_on_card(file, layout, n_blocks, &handle, near));
    Ok(mapped?)
}
