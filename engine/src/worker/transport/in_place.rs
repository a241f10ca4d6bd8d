//! Between processes of one host: a frame names the source's blocks, and the destination copies them out of the source's
//! memory, the host's or a card's, which it has mapped. The source keeps them pinned meanwhile; their generations prove that
//! it did.

use std::sync::Arc;

use baton_kernels::{ForeignKv, KvLayout, KvRead, KvWrite};
use baton_proto::cluster::KvFrame;
use baton_scheduler::transfer::{KvRange, TransferId};

use super::counters::TransportCounters;
use super::grpc::bare_frame;
use super::mappings::ForeignMemory;
use super::{KvReceiver, KvSender, Packed, TransportError, TransportKind, beside_others};

pub(super) struct InPlaceSender {
    /// By which of the two memories.
    pub(super) kind: TransportKind,
    pub(super) transfer: TransferId,
    pub(super) layout: KvLayout,
    pub(super) counters: Arc<TransportCounters>,
}

impl KvSender for InPlaceSender {
    fn kind(&self) -> TransportKind {
        self.kind
    }

    fn pack(&mut self, range: KvRange, reads: Vec<KvRead>) -> Result<Packed, TransportError> {
        // No event of ours orders the reader's card behind what we have queued, so what we name is there.
        let waits = reads.iter().any(KvRead::is_on_device);
        beside_others(waits, || KvRead::await_written(&reads));
        let frame = KvFrame {
            source_blocks: reads.iter().map(KvRead::block).collect(),
            generations: reads.iter().map(KvRead::generation).collect(),
            ..bare_frame(self.transfer, range, &reads)
        };
        let n_bytes = (reads.len() * self.layout.layer_block_bytes()) as u64;
        self.counters.sent(self.kind(), n_bytes);
        Ok(Packed {
            frame,
            pins: reads,
            n_bytes,
        })
    }
}

pub(super) struct InPlaceReceiver {
    /// By which of the two memories.
    pub(super) kind: TransportKind,
    pub(super) source: Arc<ForeignMemory>,
    pub(super) counters: Arc<TransportCounters>,
}

impl KvReceiver for InPlaceReceiver {
    fn kind(&self) -> TransportKind {
        self.kind
    }

    fn land(&mut self, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
        let waits = writers.iter().any(KvWrite::is_on_device);
        let source = self.source.in_place().expect("offered with its mapping");
        let landed = beside_others(waits, || land(source, frame, slot, writers));
        self.counters.landed(self.kind(), landed)
    }
}

fn land(source: &ForeignKv, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
    if frame.source_blocks.len() != writers.len() || frame.generations.len() != writers.len() {
        return Err(TransportError::Malformed {
            layer: frame.layer,
            reason: "expected one source block and one generation for each block",
        });
    }
    let blocks: Vec<(u32, u32)> = frame
        .source_blocks
        .iter()
        .copied()
        .zip(frame.generations.iter().copied())
        .collect();
    let copied = source.copy(slot, &blocks, writers);
    copied.map_err(|error| TransportError::of_copy(frame.layer, error))?;
    Ok((writers.len() * source.layout().layer_block_bytes()) as u64)
}
