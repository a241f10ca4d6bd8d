//! KV of a card's cache on its way through memory of the host that the other end has mapped: what arrives, that a slot comes
//! back once it was fetched, and what happens while none is free. On a card (REQUIRE_GPU=1) or on the stand-in for its driver.
//! Both ends are of this process here; that they may be of two, and what the driver makes of it, is for the kernels' tests.

#[path = "../../kernels/tests/cuda_device/stand_in/mod.rs"]
mod stand_in;

use std::time::{Duration, Instant};

use baton_engine::worker::{Identity, KvReceiver, KvSender, KvTransports, TransportChoice, TransportKind};
use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, ImageFolders};
use baton_kernels::{DType, KvCache, KvLayout, KvRead};
use baton_proto::cluster::{self, KvFrame};
use baton_proto::link::LinkOptions;
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId};
use baton_scheduler::request::Failure;
use baton_scheduler::transfer::{KvRange, TransferId};

const LAYOUT: KvLayout = KvLayout {
    n_layers: 2,
    n_kv_heads: 2,
    block_size: 4,
    head_dim: 8,
    dtype: DType::F32,
};
const N_BLOCKS: usize = 8;
/// More than there are slots.
const N_FRAMES: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

fn cuda() -> Option<Cuda> {
    let options = CudaOptions {
        ordinal: 0,
        dtype: LAYOUT.dtype,
        head_dim: LAYOUT.head_dim,
        mode: CudaMode::Fast,
        libraries: stand_in::driver()?.libraries(),
        images: ImageFolders {
            packaged: None,
            cache: Some(stand_in::image_cache()),
        },
    };
    Some(Cuda::new(options).unwrap())
}

struct End {
    identity: Identity,
    kv: KvCache,
    transports: KvTransports,
}

impl End {
    fn new(name: &str, kv: KvCache) -> End {
        let mut life = [0; 8];
        rustix::rand::getrandom(&mut life, rustix::rand::GetRandomFlags::empty()).unwrap();
        let identity = Identity {
            instance: InstanceId::new(name),
            incarnation: Incarnation(u64::from_le_bytes(life)),
            fingerprint: Fingerprint([7; 32]),
            numerics_class: "test".to_owned(),
        };
        let choice = TransportChoice::Only(TransportKind::SharedMemory);
        let transports = KvTransports::new(&identity, LAYOUT, choice, &LinkOptions::default(), kv.share()).unwrap();
        End {
            identity,
            kv,
            transports,
        }
    }

    /// Each part of each block with bytes of its own.
    fn fill(&mut self) {
        for block in 0..N_BLOCKS as u32 {
            let mut writer = self.kv.write_handle(block).unwrap();
            for layer in 0..LAYOUT.n_layers {
                let [key, value] = [0, 1].map(|part| bytes(layer, block, part));
                writer.write(layer, &key, &value).unwrap();
            }
        }
    }

    fn holds(&mut self, layer: usize, block: u32, as_of: u32) -> bool {
        let read = self.kv.pin(layer, block);
        read.key() == bytes(layer, as_of, 0) && read.value() == bytes(layer, as_of, 1)
    }

    fn bytes_sent(&self) -> [u64; TransportKind::ALL.len()] {
        self.transports.totals().bytes_sent
    }
}

fn bytes(layer: usize, block: u32, part: usize) -> Vec<u8> {
    let seed = (block as usize * LAYOUT.n_layers + layer) * 2 + part + 1;
    (0..LAYOUT.part_bytes()).map(|i| (seed * 37 + i) as u8).collect()
}

async fn halves(source: &End, destination: &End) -> (Box<dyn KvSender>, Box<dyn KvReceiver>) {
    let peer = cluster::Peer {
        instance_id: source.identity.instance.to_string(),
        incarnation: source.identity.incarnation.0,
        address: "127.0.0.1:1".to_owned(),
        ..cluster::Peer::default()
    };
    let offer = destination.transports.offer(&peer).await.unwrap();
    assert_eq!(offer.kinds(), [TransportKind::SharedMemory]);
    let sender = source
        .transports
        .sender(TransferId(5), Some(&offer.to_wire()), "destination")
        .unwrap();
    let accepted = cluster::Accepted {
        transport: sender.kind().to_string(),
        ..cluster::Accepted::default()
    };
    let receiver = destination.transports.receiver(&offer, &accepted).unwrap();
    (sender, receiver)
}

/// A frame with these blocks of a layer; nothing stays pinned for it.
fn pack(source: &mut End, sender: &mut dyn KvSender, layer: usize, blocks: &[u32]) -> KvFrame {
    let range = KvRange {
        choice: 0,
        layer: layer as u32,
        first_block: 0,
        n_blocks: blocks.len() as u32,
    };
    let reads: Vec<KvRead> = blocks.iter().map(|&block| source.kv.pin(layer, block)).collect();
    let packed = sender.pack(range, reads).unwrap();
    assert!(packed.pins.is_empty() && blocks.iter().all(|&block| !source.kv.is_pinned(block)));
    assert_eq!(packed.n_bytes, (blocks.len() * LAYOUT.layer_block_bytes()) as u64);
    assert_ne!(packed.frame.staged.is_some(), !packed.frame.data.is_empty());
    packed.frame
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_sends_through_memory_of_the_host() {
    let Some(cuda) = cuda() else { return };
    let on_card = || cuda.kv_cache(LAYOUT, N_BLOCKS).unwrap();
    for to in [on_card(), KvCache::shared(LAYOUT, N_BLOCKS).unwrap()] {
        let (mut source, mut destination) = (End::new("source", on_card()), End::new("destination", to));
        source.fill();
        let (mut sender, mut receiver) = halves(&source, &destination).await;
        let (mut n_frames, mut n_staged) = (0, 0);
        let began = Instant::now();
        // Frames that find no slot go all the same, until the words that others were fetched have come.
        while n_staged < N_FRAMES {
            assert!(
                began.elapsed() < PATIENCE,
                "{n_staged} of {n_frames} frames found a slot"
            );
            let idx = n_frames as u32;
            let (layer, from, to) = (n_frames % 2, [idx % 8, (idx + 3) % 8], [(idx + 1) % 8, (idx + 6) % 8]);
            let frame = pack(&mut source, &mut *sender, layer, &from);
            n_staged += usize::from(frame.staged.is_some());
            n_frames += 1;
            let mut writers = destination.kv.reserve_write(&to).unwrap();
            receiver.land(&frame, layer, &mut writers).unwrap();
            drop(writers);
            for (from, to) in from.into_iter().zip(to) {
                assert!(destination.holds(layer, to, from), "frame {idx}");
            }
            tokio::task::yield_now().await;
        }
        let sent = source.bytes_sent();
        assert_eq!(sent, destination.transports.totals().bytes_received);
        let bytes_of = |n_frames: usize| (n_frames * 2 * LAYOUT.layer_block_bytes()) as u64;
        assert_eq!(sent[TransportKind::SharedMemory as usize], bytes_of(n_staged));
        assert_eq!(sent[TransportKind::Grpc as usize], bytes_of(n_frames - n_staged));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_all_slots_wait_to_be_fetched_frames_carry_their_bytes() {
    let Some(cuda) = cuda() else { return };
    let on_card = || cuda.kv_cache(LAYOUT, N_BLOCKS).unwrap();
    let (mut source, mut destination) = (End::new("source", on_card()), End::new("destination", on_card()));
    source.fill();
    let (mut sender, mut receiver) = halves(&source, &destination).await;
    let block = |idx: usize| (idx % N_BLOCKS) as u32;
    let pack_all = |source: &mut End, sender: &mut dyn KvSender| -> Vec<KvFrame> {
        (0..N_FRAMES)
            .map(|idx| pack(source, sender, 1, &[block(idx)]))
            .collect()
    };
    let frames = pack_all(&mut source, &mut *sender);
    let n_staged = frames.iter().take_while(|frame| frame.staged.is_some()).count();
    assert!((1..N_FRAMES).contains(&n_staged));
    assert!(frames[n_staged..].iter().all(|frame| frame.staged.is_none()));
    for (idx, frame) in frames.iter().enumerate() {
        let mut writers = destination.kv.reserve_write(&[7]).unwrap();
        receiver.land(frame, 1, &mut writers).unwrap();
        drop(writers);
        assert!(destination.holds(1, 7, block(idx)), "frame {idx}");
    }
    // What was fetched makes room again.
    let has_room = async {
        while pack(&mut source, &mut *sender, 1, &[0]).staged.is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, has_room)
        .await
        .expect("fetched slots come back");
    // A transfer that ends gives back what nobody has fetched, and what it left there is not what was meant once another
    // has the slots.
    sender.release();
    let frames = pack_all(&mut source, &mut *sender);
    assert_eq!(frames.iter().filter(|frame| frame.staged.is_some()).count(), n_staged);
    drop(sender);
    let (mut sender, _) = halves(&source, &destination).await;
    let _others = pack_all(&mut source, &mut *sender);
    let mut writers = destination.kv.reserve_write(&[7]).unwrap();
    let refusal = receiver.land(&frames[0], 1, &mut writers).unwrap_err();
    assert!(matches!(refusal.failure(), Failure::InstanceLost(_)), "{refusal}");
    assert_eq!(destination.transports.totals().n_stale, 1);
}
