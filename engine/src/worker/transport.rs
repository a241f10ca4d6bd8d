//! How bytes of KV get from one instance's blocks into another's. Control is always gRPC; this is only the payload.

use baton_kernels::{KernelError, KvLayout, KvRead, KvWrite};
use baton_proto::cluster::KvFrame;
use baton_scheduler::transfer::{KvRange, TransferId};
use bytes::{Bytes, BytesMut};

/// A payload that does not fit where it should land.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The payload has another size than its range.
    #[error("KV frame of layer {layer} has {found} bytes, expected {expected}")]
    Size {
        /// The frame's layer.
        layer: u32,
        /// Its bytes.
        found: usize,
        /// Bytes of its range.
        expected: usize,
    },
    /// The reserved block refused the write.
    #[error("writing received KV: {0}")]
    Write(#[from] KernelError),
}

/// Carries KV between two instances.
pub trait KvTransport: Send + Sync + 'static {
    /// Its name in logs and metrics.
    fn name(&self) -> &'static str;

    /// At the source: the frame that makes these blocks arrive. `reads` are the range's blocks in order; once this returns
    /// they are no longer needed.
    fn pack(&self, transfer: TransferId, range: KvRange, reads: Vec<KvRead>) -> KvFrame;

    /// At the destination: makes them land in `writers`, the range's reserved blocks in order. Returns the bytes moved.
    ///
    /// # Errors
    /// A payload of another size, or a block that refuses the write.
    fn land(&self, frame: &KvFrame, writers: &mut [KvWrite]) -> Result<u64, TransportError>;
}

/// The payload travels inside the frame.
#[derive(Clone, Copy, Debug)]
pub struct GrpcTransport {
    layout: KvLayout,
}

impl GrpcTransport {
    /// For KV of `layout`.
    pub fn new(layout: KvLayout) -> GrpcTransport {
        GrpcTransport { layout }
    }
}

impl KvTransport for GrpcTransport {
    fn name(&self) -> &'static str {
        "grpc"
    }

    fn pack(&self, transfer: TransferId, range: KvRange, reads: Vec<KvRead>) -> KvFrame {
        assert_eq!(reads.len(), range.n_blocks as usize, "a frame's reads are its blocks");
        let mut data = BytesMut::with_capacity(reads.len() * self.layout.layer_block_bytes());
        reads.iter().for_each(|read| data.extend_from_slice(read.key()));
        reads.iter().for_each(|read| data.extend_from_slice(read.value()));
        KvFrame {
            transfer_id: transfer.0,
            layer: range.layer,
            first_block: range.first_block,
            n_blocks: range.n_blocks,
            data: Bytes::from(data),
            ..KvFrame::default()
        }
    }

    fn land(&self, frame: &KvFrame, writers: &mut [KvWrite]) -> Result<u64, TransportError> {
        let part = self.layout.part_bytes();
        let expected = writers.len() * 2 * part;
        if frame.data.len() != expected {
            return Err(TransportError::Size {
                layer: frame.layer,
                found: frame.data.len(),
                expected,
            });
        }
        let (keys, values) = frame.data.split_at(writers.len() * part);
        for ((writer, key), value) in writers
            .iter_mut()
            .zip(keys.chunks_exact(part))
            .zip(values.chunks_exact(part))
        {
            writer.write(frame.layer as usize, key, value)?;
        }
        Ok(expected as u64)
    }
}
