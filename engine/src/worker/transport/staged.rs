//! Between processes of one host whose cards do not reach each other: the source's card copies a frame's blocks to memory of
//! the host, which the destination has mapped and copies them from. Once it has, it says so on the socket that gave it the
//! memory, and the slot is free for another frame.
//!
//! There are only so many slots. While all of them wait to be fetched, a frame carries its bytes, and the connection holds the
//! source back as it does by gRPC.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_kernels::{KvBytes, KvRead, KvWrite, StagedPlace};
use baton_proto::cluster::{KvFrame, StagedKv};
use baton_proto::link::KV_FRAME_BYTES;
use baton_scheduler::transfer::{KvRange, TransferId};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::counters::TransportCounters;
use super::grpc::{GrpcReceiver, bare_frame, carrying};
use super::mappings::ForeignMemory;
use super::{KvReceiver, KvSender, Packed, TransportError, TransportKind, beside_others};

/// What waits in our slots for other processes; as many entries as there are slots that may be lent.
#[derive(Default)]
pub(super) struct StagedFrames(Mutex<BTreeMap<StagedPlace, KvBytes>>);

impl StagedFrames {
    /// Hears of a reader, until it has gone, what it has fetched.
    pub(super) async fn hear_fetched(&self, mut reader: impl AsyncRead + Unpin) {
        while let Ok(word) = reader.read_u64_le().await {
            self.forget(&place_of(word));
        }
    }

    fn forget(&self, place: &StagedPlace) {
        // Its own statement, so that the table is free while the slot goes back.
        let _bytes = self.0.lock().remove(place);
    }
}

fn place_of(word: u64) -> StagedPlace {
    StagedPlace {
        slot: word as u32,
        generation: (word >> 32) as u32,
    }
}

fn word_of(place: StagedPlace) -> u64 {
    u64::from(place.generation) << 32 | u64::from(place.slot)
}

pub(super) struct StagedSender {
    transfer: TransferId,
    frames: Arc<StagedFrames>,
    /// Where ours have been put, fetched or not.
    places: Vec<StagedPlace>,
    counters: Arc<TransportCounters>,
}

impl StagedSender {
    pub(super) fn new(
        transfer: TransferId,
        frames: Arc<StagedFrames>,
        counters: Arc<TransportCounters>,
    ) -> StagedSender {
        StagedSender {
            transfer,
            frames,
            places: Vec::new(),
            counters,
        }
    }
}

impl KvSender for StagedSender {
    fn kind(&self) -> TransportKind {
        TransportKind::SharedMemory
    }

    /// What a slot holds.
    fn frame_bytes(&self) -> usize {
        KV_FRAME_BYTES
    }

    fn pack(&mut self, range: KvRange, reads: Vec<KvRead>) -> Result<Packed, TransportError> {
        let bytes = beside_others(true, || KvRead::gather(&reads));
        let bare = bare_frame(self.transfer, range, &reads);
        let n_bytes = bytes.as_ref().len() as u64;
        let (frame, kind) = match bytes.place() {
            Some(place) => {
                self.frames.0.lock().insert(place, bytes);
                self.places.push(place);
                let StagedPlace { slot, generation } = place;
                let staged = Some(StagedKv { slot, generation });
                (KvFrame { staged, ..bare }, self.kind())
            }
            None => (carrying(bytes, bare), TransportKind::Grpc),
        };
        self.counters.sent(kind, n_bytes);
        Ok(Packed {
            frame,
            pins: Vec::new(),
            n_bytes,
        })
    }

    fn release(&mut self) {
        self.places.drain(..).for_each(|place| self.frames.forget(&place));
    }
}

impl Drop for StagedSender {
    fn drop(&mut self) {
        self.release();
    }
}

pub(super) struct StagedReceiver {
    pub(super) source: Arc<ForeignMemory>,
    /// For frames that carry their bytes.
    pub(super) carried: GrpcReceiver,
}

impl KvReceiver for StagedReceiver {
    fn kind(&self) -> TransportKind {
        TransportKind::SharedMemory
    }

    fn land(&mut self, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
        let Some(StagedKv { slot: from, generation }) = frame.staged else {
            return self.carried.land(frame, slot, writers);
        };
        let place = StagedPlace { slot: from, generation };
        let staging = self.source.staging().expect("offered with its memory");
        let waits = writers.iter().any(KvWrite::is_on_device);
        let landed = match beside_others(waits, || staging.copy(place, slot, writers)) {
            Ok(()) => {
                self.source.say_fetched(word_of(place));
                Ok((writers.len() * self.carried.layout.layer_block_bytes()) as u64)
            }
            Err(error) => Err(TransportError::of_copy(frame.layer, error)),
        };
        self.carried.counters.landed(self.kind(), landed)
    }
}
