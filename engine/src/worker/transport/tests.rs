//! What each transport moves, what it refuses, and who may use it. Peers of other processes are played in this one: their
//! memory is mapped a second time, as it would be there.

use std::sync::Arc;
use std::time::Duration;

use baton_kernels::{DType, ForeignKv, KvCache, KvLayout, KvWrite};
use baton_proto::cluster;
use baton_proto::link::{ClusterSecret, LinkOptions};
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId};
use baton_scheduler::transfer::TransferId;

use super::handover::{Credentials, HandoverError, Owner, request};
use super::mappings::{ForeignMemory, Mappings};
use super::*;
use crate::worker::Identity;

const LAYOUT: KvLayout = KvLayout {
    n_layers: 2,
    n_kv_heads: 2,
    block_size: 4,
    head_dim: 6,
    dtype: DType::Bf16,
};
const N_BLOCKS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(10);

/// Each is another life, so that no two tests share a socket's name.
fn incarnation() -> Incarnation {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    Incarnation(u64::from_le_bytes(bytes))
}

struct End {
    identity: Identity,
    kv: KvCache,
    transports: KvTransports,
}

impl End {
    fn new(name: &str, choice: TransportChoice) -> End {
        End::with(
            name,
            choice,
            &LinkOptions::default(),
            KvCache::shared(LAYOUT, N_BLOCKS).unwrap(),
        )
    }

    fn with(name: &str, choice: TransportChoice, link: &LinkOptions, kv: KvCache) -> End {
        let identity = Identity {
            instance: InstanceId::new(name),
            incarnation: incarnation(),
            fingerprint: Fingerprint([7; 32]),
            numerics_class: "test".to_owned(),
        };
        let transports = KvTransports::new(&identity, LAYOUT, choice, link, kv.share()).unwrap();
        End {
            identity,
            kv,
            transports,
        }
    }

    fn peer(&self) -> cluster::Peer {
        cluster::Peer {
            instance_id: self.identity.instance.to_string(),
            incarnation: self.identity.incarnation.0,
            address: "127.0.0.1:1".to_owned(),
            ..cluster::Peer::default()
        }
    }

    fn fill(&mut self, blocks: &[u32]) {
        for &block in blocks {
            self.kv.set_generation(block, 100 + block);
            let mut writer = self.kv.write_handle(block).unwrap();
            for layer in 0..LAYOUT.n_layers {
                writer
                    .write(layer, &part(block, layer, 0), &part(block, layer, 1))
                    .unwrap();
            }
        }
    }

    fn reads(&mut self, layer: usize, blocks: &[u32]) -> Vec<KvRead> {
        blocks.iter().map(|&block| self.kv.pin(layer, block)).collect()
    }

    fn writers(&mut self, blocks: &[u32]) -> Vec<KvWrite> {
        self.kv.reserve_write(blocks).unwrap()
    }

    fn holds(&mut self, block: u32, as_of: u32) -> bool {
        (0..LAYOUT.n_layers).all(|layer| {
            let read = self.kv.pin(layer, block);
            read.key() == part(as_of, layer, 0) && read.value() == part(as_of, layer, 1)
        })
    }

    fn is_untouched(&mut self, block: u32) -> bool {
        (0..LAYOUT.n_layers).all(|layer| {
            let read = self.kv.pin(layer, block);
            read.key().iter().chain(read.value()).all(|&byte| byte == 0)
        })
    }
}

fn part(block: u32, layer: usize, part: usize) -> Vec<u8> {
    let seed = (block as usize * LAYOUT.n_layers + layer) * 2 + part + 1;
    (0..LAYOUT.part_bytes()).map(|i| (seed * 37 + i) as u8).collect()
}

fn range(layer: usize, n_blocks: usize) -> KvRange {
    KvRange {
        choice: 0,
        layer: layer as u32,
        first_block: 3,
        n_blocks: n_blocks as u32,
    }
}

fn accepted(sender: &dyn KvSender) -> cluster::Accepted {
    cluster::Accepted {
        transport: sender.kind().to_string(),
        ..cluster::Accepted::default()
    }
}

async fn halves(source: &End, destination: &End) -> (Box<dyn KvSender>, Box<dyn KvReceiver>) {
    let offer = destination.transports.offer(&source.peer()).await.unwrap();
    let sender = source
        .transports
        .sender(TransferId(5), Some(&offer.to_wire()), "destination");
    let sender = sender.unwrap();
    let receiver = destination.transports.receiver(&offer, &accepted(&*sender)).unwrap();
    (sender, receiver)
}

/// Moves blocks 1, 2 and 5 to 4, 0 and 7 and checks every byte and every total.
async fn moves_by(choice: TransportChoice, expected: TransportKind) {
    let (mut source, mut destination) = (End::new("source", choice), End::new("destination", choice));
    let (from, to) = ([1, 2, 5], [4, 0, 7]);
    source.fill(&from);
    let (mut sender, mut receiver) = halves(&source, &destination).await;
    assert_eq!((sender.kind(), receiver.kind()), (expected, expected));
    let mut writers = destination.writers(&to);
    let mut held = Vec::new();
    // A layer of the model need not have its own number in the blocks.
    for slot in 0..LAYOUT.n_layers {
        let reads = source.reads(slot, &from);
        let packed = sender.pack(range(slot + 5, 3), reads).unwrap();
        assert_eq!(packed.frame.transfer_id, 5);
        assert_eq!(packed.frame.data.is_empty(), expected != TransportKind::Grpc);
        held.extend(packed.pins);
        if expected != TransportKind::Grpc {
            assert!(
                from.iter().all(|&block| source.kv.is_pinned(block)),
                "nothing read in place is unpinned"
            );
        }
        let n_bytes = receiver.land(&packed.frame, slot, &mut writers).unwrap();
        assert_eq!(n_bytes, packed.n_bytes);
        assert_eq!(n_bytes, 3 * LAYOUT.layer_block_bytes() as u64);
    }
    drop((writers, held, sender));
    assert!(from.iter().all(|&block| !source.kv.is_pinned(block)));
    for (from, to) in from.into_iter().zip(to) {
        assert!(destination.holds(to, from), "block {from} did not arrive in {to}");
    }
    let n_bytes = 3 * LAYOUT.block_bytes() as u64;
    assert_eq!(source.transports.totals().bytes_sent[expected as usize], n_bytes);
    assert_eq!(
        destination.transports.totals().bytes_received[expected as usize],
        n_bytes
    );
}

#[tokio::test]
async fn each_transport_moves_blocks() {
    // Two instances of one process: the best is in process.
    moves_by(TransportChoice::Auto, TransportKind::InProcess).await;
    for kind in TransportKind::ALL.into_iter().filter(|kind| !kind.needs_card()) {
        moves_by(TransportChoice::Only(kind), kind).await;
    }
}

#[test]
fn choices_are_read_as_they_are_written() {
    for text in ["auto", "grpc", "shared-memory", "cuda-ipc", "in-process"] {
        assert_eq!(text.parse::<TransportChoice>().unwrap().to_string(), text);
    }
    let error = "rdma".parse::<TransportChoice>().unwrap_err();
    assert!(error.contains("\"rdma\"") && error.contains("shared-memory"), "{error}");
}

#[tokio::test]
async fn changed_data_is_refused_before_a_byte_is_written() {
    let grpc = TransportChoice::Only(TransportKind::Grpc);
    let (mut source, mut destination) = (End::new("source", grpc), End::new("destination", grpc));
    source.fill(&[1]);
    let (mut sender, mut receiver) = halves(&source, &destination).await;
    let mut pack = || {
        let reads = source.reads(0, &[1]);
        sender.pack(range(0, 1), reads).unwrap().frame
    };
    let (whole, mut flipped, mut unsigned) = (pack(), pack(), pack());
    let mut data = flipped.data.to_vec();
    *data.last_mut().unwrap() ^= 1;
    flipped.data = data.into();
    let mut writers = destination.writers(&[6]);
    let refusal = receiver.land(&flipped, 0, &mut writers);
    assert!(matches!(refusal, Err(TransportError::Checksum { layer: 0, .. })));
    let short = KvFrame {
        data: whole.data.slice(1..),
        ..whole.clone()
    };
    assert!(matches!(
        receiver.land(&short, 0, &mut writers),
        Err(TransportError::Size { .. })
    ));
    drop(writers);
    assert!(destination.is_untouched(6));
    assert_eq!(destination.transports.totals().n_bad_checksums, 1);
    // A peer of version 1 says no checksum, and is believed.
    unsigned.checksum = None;
    let mut writers = destination.writers(&[6]);
    receiver.land(&unsigned, 0, &mut writers).unwrap();
    receiver.land(&whole, 0, &mut writers).unwrap();
}

#[test]
fn the_checksum_is_the_one_of_the_specification() {
    // From the reference implementation's sanity tests: the empty input, seed 0.
    assert_eq!(grpc::checksum(b""), 0x2d06_8005_38d3_94c2);
}

#[tokio::test]
async fn a_block_given_to_another_between_pack_and_land_is_refused() {
    let shared = TransportChoice::Only(TransportKind::SharedMemory);
    let (mut source, mut destination) = (End::new("source", shared), End::new("destination", shared));
    source.fill(&[1, 2]);
    let (mut sender, mut receiver) = halves(&source, &destination).await;
    let reads = source.reads(0, &[1, 2]);
    let packed = sender.pack(range(0, 2), reads).unwrap();
    // The source forgets what it owes and uses the block again.
    drop(packed.pins);
    source.kv.set_generation(2, 900);
    source
        .kv
        .write_handle(2)
        .unwrap()
        .write(0, &part(9, 0, 0), &part(9, 0, 1))
        .unwrap();
    let mut writers = destination.writers(&[3, 4]);
    let refusal = receiver.land(&packed.frame, 0, &mut writers).unwrap_err();
    assert!(matches!(&refusal, TransportError::Stale { layer: 0, .. }), "{refusal}");
    assert!(matches!(refusal.failure(), Failure::InstanceLost(_)));
    assert_eq!(destination.transports.totals().n_stale, 1);
    assert_eq!(
        destination.transports.totals().bytes_received,
        [0; TransportKind::ALL.len()]
    );
    // Frames that do not fit are refused as well.
    let frame = KvFrame {
        generations: vec![101],
        ..packed.frame
    };
    assert!(matches!(
        receiver.land(&frame, 0, &mut writers),
        Err(TransportError::Malformed { .. })
    ));
}

#[tokio::test]
async fn a_ticket_is_good_once_and_for_its_own_transfer() {
    let choice = TransportChoice::Only(TransportKind::InProcess);
    let (mut source, mut destination) = (End::new("source", choice), End::new("destination", choice));
    source.fill(&[1]);
    let (mut sender, mut receiver) = halves(&source, &destination).await;
    let mut pack = |source: &mut End| {
        let reads = source.reads(0, &[1]);
        sender.pack(range(0, 1), reads).unwrap().frame
    };
    let mut writers = destination.writers(&[3]);
    let is_refused = |receiver: &mut dyn KvReceiver, frame: &KvFrame, writers: &mut [KvWrite]| {
        matches!(receiver.land(frame, 0, writers), Err(TransportError::Ticket { .. }))
    };
    let frame = pack(&mut source);
    receiver.land(&frame, 0, &mut writers).unwrap();
    assert!(is_refused(&mut *receiver, &frame, &mut writers), "fetched twice");
    // The upper half is the process's token: another process's tickets are never ours.
    let frame = pack(&mut source);
    assert!(frame.ticket >> 32 != 0);
    let foreign = KvFrame {
        ticket: frame.ticket ^ 1 << 40,
        ..frame.clone()
    };
    assert!(is_refused(&mut *receiver, &foreign, &mut writers));
    let of_another = KvFrame {
        transfer_id: 6,
        ..frame
    };
    assert!(is_refused(&mut *receiver, &of_another, &mut writers));
    // What is not fetched is taken back, and unpinned, when the sender goes.
    let frame = pack(&mut source);
    assert!(source.kv.is_pinned(1));
    drop(sender);
    assert!(!source.kv.is_pinned(1));
    assert!(is_refused(&mut *receiver, &frame, &mut writers));
}

/// A link with this secret.
fn link(secret: &str) -> LinkOptions {
    LinkOptions {
        secret: Some(ClusterSecret::new(secret).unwrap()),
        ..LinkOptions::default()
    }
}

fn own(life: Incarnation, kv: &KvCache, credentials: Credentials) -> Owner {
    Owner::start(life, kv.share().unwrap(), "test", credentials, Arc::default()).unwrap()
}

fn layout_of(memory: &ForeignMemory) -> Option<KvLayout> {
    memory.in_place().map(ForeignKv::layout)
}

#[tokio::test]
async fn memory_is_handed_only_to_who_knows_the_secret_and_means_this_incarnation() {
    let kv = KvCache::shared(LAYOUT, N_BLOCKS).unwrap();
    let with = |secret: &str| Credentials::new(link(secret).secret.as_ref());
    let open = Credentials::new(None);
    let life = incarnation();
    let _owner = own(life, &kv, with("right"));
    assert_eq!(
        layout_of(&request(life.0, LAYOUT, &with("right"), None).await.unwrap().memory),
        Some(LAYOUT)
    );
    for wrong in [with("wrong"), open.clone()] {
        let refusal = request(life.0, LAYOUT, &wrong, None).await.err().expect("refused");
        assert!(matches!(refusal, HandoverError::Secret), "{refusal}");
    }
    let other = incarnation();
    let refusal = request(other.0, LAYOUT, &with("right"), None)
        .await
        .err()
        .expect("refused");
    assert!(matches!(refusal, HandoverError::NotHere), "{refusal}");
    let wide = KvLayout { head_dim: 8, ..LAYOUT };
    let refusal = request(life.0, wide, &with("right"), None)
        .await
        .err()
        .expect("refused");
    assert!(matches!(refusal, HandoverError::Layout { .. }), "{refusal}");
    // A reader that does not ask the owner to prove itself could be fooled; one that is not asked could take anything.
    let open_life = incarnation();
    let _open_owner = own(open_life, &kv, open.clone());
    let refusal = request(open_life.0, LAYOUT, &with("right"), None)
        .await
        .err()
        .expect("refused");
    assert!(matches!(refusal, HandoverError::Secret), "{refusal}");
    assert!(request(open_life.0, LAYOUT, &open, None).await.is_ok());
}

#[tokio::test]
async fn a_socket_asked_for_another_incarnation_refuses() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let kv = KvCache::shared(LAYOUT, N_BLOCKS).unwrap();
    let life = incarnation();
    let _owner = own(life, &kv, Credentials::new(None));
    let ask = async |words: &str| {
        use std::os::linux::net::SocketAddrExt as _;
        let name = format!("baton-kv-{:016x}", life.0);
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        let stream = std::os::unix::net::UnixStream::connect_addr(&address).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut stream = tokio::net::UnixStream::from_std(stream).unwrap();
        stream.write_u32_le(words.len() as u32).await.unwrap();
        stream.write_all(words.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A refusal may close before it has read everything.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let nonce = [0; 16];
    let other = format!(r#"{{"version":1,"incarnation":{},"nonce":{nonce:?}}}"#, life.0 ^ 1);
    assert!(ask(&other).await.contains("is asked for"));
    let newer = format!(r#"{{"version":2,"incarnation":{},"nonce":{nonce:?}}}"#, life.0);
    assert!(ask(&newer).await.contains("version 2"));
    assert_eq!(ask("hello").await, "");
}

#[tokio::test]
async fn a_mapping_goes_with_its_incarnation() {
    let kv = KvCache::shared(LAYOUT, N_BLOCKS).unwrap();
    let credentials = Credentials::new(None);
    let mappings = Mappings::new(LAYOUT, credentials.clone(), None);
    let life = incarnation();
    let owner = own(life, &kv, credentials);
    let mapped = mappings.get(life.0).await.unwrap();
    let again = mappings.get(life.0).await.unwrap();
    assert!(Arc::ptr_eq(&mapped, &again), "a memory is mapped once");
    assert_eq!(mappings.n_held(), 1);
    let memory = Arc::downgrade(&mapped);
    drop((owner, again, mapped));
    tokio::time::timeout(PATIENCE, async {
        while mappings.n_held() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the owner's end is noticed");
    assert!(memory.upgrade().is_none(), "the memory of a dead peer is still mapped");
    assert!(matches!(mappings.get(life.0).await, Err(HandoverError::NotHere)));
}

#[tokio::test]
async fn the_mappings_are_bounded() {
    let kv = KvCache::shared(LAYOUT, N_BLOCKS).unwrap();
    let credentials = Credentials::new(None);
    let mappings = Mappings::new(LAYOUT, credentials.clone(), None);
    let lives: Vec<Incarnation> = (0..66).map(|_| incarnation()).collect();
    let start = |&life: &Incarnation| own(life, &kv, credentials.clone());
    let _owners: Vec<Owner> = lives.iter().map(start).collect();
    for life in &lives {
        mappings.get(life.0).await.unwrap();
    }
    assert_eq!(mappings.n_held(), 64);
}

#[tokio::test]
async fn what_is_asked_for_by_name_is_had_or_refused() {
    let anonymous = || KvCache::new(LAYOUT, N_BLOCKS).unwrap();
    let auto = End::with("auto", TransportChoice::Auto, &LinkOptions::default(), anonymous());
    let only = |kind| End::new("only", TransportChoice::Only(kind));
    let wire = |kinds: &[&str]| cluster::TransportOffer {
        transports: kinds.iter().map(|&kind| kind.to_owned()).collect(),
    };
    let is_incompatible = |error: TransportError| matches!(error.failure(), Failure::Incompatible(_));

    // A destination: the source shares nothing, or is somewhere else.
    let shared = only(TransportKind::SharedMemory);
    let error = shared.transports.offer(&auto.peer()).await.err().expect("refused");
    assert!(error.to_string().contains("shared-memory"), "{error}");
    assert!(is_incompatible(error));
    let in_process = only(TransportKind::InProcess);
    let elsewhere = cluster::Peer {
        incarnation: incarnation().0,
        ..auto.peer()
    };
    let error = in_process.transports.offer(&elsewhere).await.err().expect("refused");
    assert!(error.to_string().contains("another process"), "{error}");
    // What it could have is said when gRPC is what remains on one host, and not of a peer that is elsewhere.
    let offer = auto.transports.offer(&elsewhere).await.unwrap();
    assert_eq!(offer.kinds(), [TransportKind::Grpc]);
    assert!(offer.missing().is_some());
    let remote = cluster::Peer {
        address: "node-3:7000".to_owned(),
        ..elsewhere
    };
    assert!(auto.transports.offer(&remote).await.unwrap().missing().is_none());

    // A source: a peer of version 1 offers nothing, which is gRPC.
    let sender = auto.transports.sender(TransferId(1), None, "old").unwrap();
    assert_eq!(sender.kind(), TransportKind::Grpc);
    let error = shared
        .transports
        .sender(TransferId(1), None, "old")
        .err()
        .expect("refused");
    assert!(is_incompatible(error));
    // It cannot send from memory that is not shared, whatever is offered; unknown names are left alone.
    let sender = auto
        .transports
        .sender(TransferId(1), Some(&wire(&["rdma", "shared-memory", "grpc"])), "new");
    assert_eq!(sender.unwrap().kind(), TransportKind::Grpc);
    let error = auto
        .transports
        .sender(TransferId(1), Some(&wire(&["shared-memory"])), "new")
        .err();
    assert!(error.unwrap().to_string().contains("it takes shared-memory"));

    // The destination again: the source says what was not offered.
    let offer = auto.transports.offer(&elsewhere_of(&auto)).await.unwrap();
    for name in ["shared-memory", "rdma"] {
        let accepted = cluster::Accepted {
            transport: name.to_owned(),
            ..cluster::Accepted::default()
        };
        assert!(auto.transports.receiver(&offer, &accepted).is_err());
    }
    assert!(auto.transports.receiver(&offer, &cluster::Accepted::default()).is_ok());

    // And an instance that must share and cannot does not start.
    let identity = auto.identity.clone();
    let must = TransportChoice::Only(TransportKind::SharedMemory);
    assert!(KvTransports::new(&identity, LAYOUT, must, &LinkOptions::default(), None).is_err());
}

fn elsewhere_of(end: &End) -> cluster::Peer {
    cluster::Peer {
        incarnation: incarnation().0,
        ..end.peer()
    }
}
