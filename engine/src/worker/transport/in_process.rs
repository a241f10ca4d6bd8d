//! Between instances of one process: pinned blocks wait under a ticket, and whoever holds the ticket copies them once.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use baton_kernels::{KvRead, KvWrite};
use baton_proto::cluster::KvFrame;
use baton_scheduler::ids::Incarnation;
use baton_scheduler::transfer::{KvRange, TransferId};
use parking_lot::Mutex;

use super::counters::TransportCounters;
use super::grpc::bare_frame;
use super::{KvReceiver, KvSender, Packed, TransportError, TransportKind, beside_others};

/// Frames that may wait to be fetched in one process: what 64 GiB of KV need.
const MAX_PARCELS: usize = 1 << 16;

/// Blocks that wait to be fetched.
struct Parcel {
    sender: u64,
    transfer: u64,
    layer: u32,
    reads: Vec<KvRead>,
}

/// By ticket.
static PARCELS: Mutex<BTreeMap<u64, Parcel>> = Mutex::new(BTreeMap::new());
static NEXT_TICKET: AtomicU64 = AtomicU64::new(0);
static NEXT_SENDER: AtomicU64 = AtomicU64::new(0);

/// Incarnations that live in this process, and how often.
static LIVE_HERE: Mutex<BTreeMap<u64, usize>> = Mutex::new(BTreeMap::new());

/// The upper half of this process's tickets, so that those of another process are not taken for them.
fn process_token() -> u64 {
    static TOKEN: OnceLock<u64> = OnceLock::new();
    *TOKEN.get_or_init(|| (RandomState::new().hash_one(std::process::id()) | 1 << 32) & !u64::from(u32::MAX))
}

/// Says that an incarnation lives in this process, as long as it is kept.
pub(super) struct LivesHere(Incarnation);

impl LivesHere {
    pub(super) fn new(incarnation: Incarnation) -> LivesHere {
        *LIVE_HERE.lock().entry(incarnation.0).or_default() += 1;
        LivesHere(incarnation)
    }
}

impl Drop for LivesHere {
    fn drop(&mut self) {
        let mut live = LIVE_HERE.lock();
        let n = live.get_mut(&self.0.0).expect("it was counted");
        *n -= 1;
        if *n == 0 {
            live.remove(&self.0.0);
        }
    }
}

/// Whether that incarnation is one of this process.
pub(super) fn lives_here(incarnation: u64) -> bool {
    LIVE_HERE.lock().contains_key(&incarnation)
}

pub(super) struct InProcessSender {
    id: u64,
    transfer: TransferId,
    counters: Arc<TransportCounters>,
}

impl InProcessSender {
    pub(super) fn new(transfer: TransferId, counters: Arc<TransportCounters>) -> InProcessSender {
        InProcessSender {
            id: NEXT_SENDER.fetch_add(1, Relaxed),
            transfer,
            counters,
        }
    }
}

impl KvSender for InProcessSender {
    fn kind(&self) -> TransportKind {
        TransportKind::InProcess
    }

    fn pack(&mut self, range: KvRange, reads: Vec<KvRead>) -> Result<Packed, TransportError> {
        let mut frame = bare_frame(self.transfer, range, &reads);
        let n_bytes = reads.iter().map(|read| read.n_bytes() as u64).sum();
        let mut parcels = PARCELS.lock();
        if parcels.len() >= MAX_PARCELS {
            return Err(TransportError::Full { n: parcels.len() });
        }
        frame.ticket = process_token() | (NEXT_TICKET.fetch_add(1, Relaxed) & u64::from(u32::MAX));
        let parcel = Parcel {
            sender: self.id,
            transfer: self.transfer.0,
            layer: range.layer,
            reads,
        };
        parcels.insert(frame.ticket, parcel);
        drop(parcels);
        self.counters.sent(self.kind(), n_bytes);
        Ok(Packed {
            frame,
            pins: Vec::new(),
            n_bytes,
        })
    }

    fn release(&mut self) {
        PARCELS.lock().retain(|_, parcel| parcel.sender != self.id);
    }
}

impl Drop for InProcessSender {
    fn drop(&mut self) {
        self.release();
    }
}

pub(super) struct InProcessReceiver {
    pub(super) counters: Arc<TransportCounters>,
}

impl KvReceiver for InProcessReceiver {
    fn kind(&self) -> TransportKind {
        TransportKind::InProcess
    }

    fn land(&mut self, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
        self.counters.landed(self.kind(), land(frame, slot, writers))
    }
}

fn land(frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
    // Its own statement, so that the table is free while we copy.
    let parcel = PARCELS.lock().remove(&frame.ticket);
    let is_meant = |parcel: &Parcel| {
        parcel.transfer == frame.transfer_id && parcel.layer == frame.layer && parcel.reads.len() == writers.len()
    };
    let parcel = parcel.filter(is_meant).ok_or(TransportError::Ticket {
        layer: frame.layer,
        ticket: frame.ticket,
    })?;
    let waits = parcel.reads.iter().any(KvRead::is_on_device) || writers.iter().any(KvWrite::is_on_device);
    beside_others(waits, || KvWrite::copy_from(writers, slot, &parcel.reads))?;
    Ok(parcel.reads.iter().map(|read| read.n_bytes() as u64).sum())
}
