//! The payload travels inside the frame, with its checksum.

use std::sync::Arc;

use baton_kernels::{KvBytes, KvLayout, KvRead, KvWrite};
use baton_proto::cluster::KvFrame;
use baton_scheduler::transfer::{KvRange, TransferId};
use bytes::Bytes;
use twox_hash::XxHash3_64;

use super::counters::TransportCounters;
use super::{KvReceiver, KvSender, Packed, TransportError, TransportKind, beside_others};

/// XXH3-64, seed 0: what `KvFrame.checksum` says of `KvFrame.data`.
pub(super) fn checksum(data: &[u8]) -> u64 {
    XxHash3_64::oneshot(data)
}

/// A frame of `range` that says nothing about its payload.
pub(super) fn bare_frame(transfer: TransferId, range: KvRange, reads: &[KvRead]) -> KvFrame {
    assert_eq!(reads.len(), range.n_blocks as usize, "a frame's reads are its blocks");
    KvFrame {
        transfer_id: transfer.0,
        layer: range.layer,
        first_block: range.first_block,
        n_blocks: range.n_blocks,
        choice: range.choice,
        ..KvFrame::default()
    }
}

/// The frame with what it moves inside.
pub(super) fn carrying(bytes: KvBytes, bare: KvFrame) -> KvFrame {
    let data = Bytes::from_owner(bytes);
    KvFrame {
        checksum: Some(checksum(&data)),
        data,
        ..bare
    }
}

pub(super) struct GrpcSender {
    pub(super) transfer: TransferId,
    pub(super) counters: Arc<TransportCounters>,
}

impl KvSender for GrpcSender {
    fn kind(&self) -> TransportKind {
        TransportKind::Grpc
    }

    fn pack(&mut self, range: KvRange, reads: Vec<KvRead>) -> Result<Packed, TransportError> {
        let waits = reads.iter().any(KvRead::is_on_device);
        let bytes = beside_others(waits, || KvRead::gather(&reads));
        let frame = carrying(bytes, bare_frame(self.transfer, range, &reads));
        let n_bytes = frame.data.len() as u64;
        self.counters.sent(self.kind(), n_bytes);
        Ok(Packed {
            frame,
            pins: Vec::new(),
            n_bytes,
        })
    }
}

pub(super) struct GrpcReceiver {
    pub(super) layout: KvLayout,
    pub(super) counters: Arc<TransportCounters>,
}

impl KvReceiver for GrpcReceiver {
    fn kind(&self) -> TransportKind {
        TransportKind::Grpc
    }

    fn land(&mut self, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
        let waits = writers.iter().any(KvWrite::is_on_device);
        let landed = beside_others(waits, || land(self.layout, frame, slot, writers));
        self.counters.landed(self.kind(), landed)
    }
}

fn land(layout: KvLayout, frame: &KvFrame, slot: usize, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
    let expected = writers.len() * layout.layer_block_bytes();
    if frame.data.len() != expected {
        return Err(TransportError::Size {
            layer: frame.layer,
            found: frame.data.len(),
            expected,
        });
    }
    // A peer of version 1 says none.
    if let Some(expected) = frame.checksum {
        let found = checksum(&frame.data);
        if found != expected {
            return Err(TransportError::Checksum {
                layer: frame.layer,
                found,
                expected,
            });
        }
    }
    KvWrite::scatter(writers, slot, &frame.data)?;
    Ok(expected as u64)
}
