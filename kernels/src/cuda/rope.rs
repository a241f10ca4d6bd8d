//! Norm and rotation of q and k, and their append to the cache: one kernel a layer.

use super::function::Args;
use super::launch;
use super::opened::Cuda;
use super::tensor::CudaTensor;
use crate::backend::{RaggedBatch, RopeAppendParams};
use crate::kv::KvCache;

/// The kernel takes a token's norm weights whole, or the same for each head.
const QUERY_NORM_IS_WHOLE: u32 = 1;
const KEY_NORM_IS_WHOLE: u32 = 2;

impl Cuda {
    /// Shapes of qkv and batch have been checked.
    pub(super) fn rotate_and_append(
        &self,
        qkv: &mut CudaTensor,
        batch: RaggedBatch<'_>,
        params: RopeAppendParams<'_, Cuda>,
        layer: usize,
        kv: &mut KvCache,
    ) {
        let layout = kv.layout();
        let RopeAppendParams { n_heads, rope, qk_norm } = params;
        let mut norm_is_whole = 0;
        if let Some(norm) = qk_norm {
            for (what, weight, heads, flag) in [
                ("query", &norm.query, n_heads, QUERY_NORM_IS_WHOLE),
                ("key", &norm.key, layout.n_kv_heads, KEY_NORM_IS_WHOLE),
            ] {
                assert!(
                    [layout.head_dim, heads * layout.head_dim].contains(&weight.len),
                    "rope_append: {what} norm of {} for {heads} heads over {layout:?}",
                    weight.len
                );
                if weight.len != layout.head_dim {
                    norm_is_whole |= flag;
                }
            }
        }
        assert!(
            2 * rope.half_dim <= layout.head_dim,
            "rope_append: {} frequencies for heads of {}",
            rope.half_dim,
            layout.head_dim
        );
        match &mut *self.recording.borrow_mut() {
            // Its rows are nobody's; a replay claims what its own append to.
            Some(recording) => recording.note_rope(rope),
            None => claim(batch, layer, kv),
        }
        kv.queue_work();
        let (key, value) = kv.layer_addresses(layer).expect("the cache is on the device");
        self.with_batch(batch, layout, |batch| {
            assert!(
                batch.max_position < rope.max_positions && batch.max_rope_variant < rope.n_variants,
                "position {} of variant {} is beyond the rope table of {} variants of {}",
                batch.max_position,
                batch.max_rope_variant,
                rope.n_variants,
                rope.max_positions
            );
            let args = Args::new()
                .address(qkv.address_mut())
                .address(key)
                .address(value)
                .address(batch.positions)
                .address(batch.slots)
                .address(batch.rope_variants)
                .address(rope.cos.address())
                .address(rope.sin.address())
                .address(qk_norm.map_or(0, |norm| norm.query.buffer.address()))
                .address(qk_norm.map_or(0, |norm| norm.key.buffer.address()))
                .u32(norm_is_whole)
                .f32(qk_norm.map_or(0.0, |norm| norm.eps))
                .u32(n_heads as u32)
                .u32(layout.n_kv_heads as u32)
                .u32(layout.head_dim as u32)
                .u32(rope.half_dim as u32)
                .u32(rope.max_positions as u32)
                .u32(layout.block_size.trailing_zeros());
            // SAFETY: qkv is `[rows, (n_heads + 2 * n_kv_heads) * head_dim]`; key and value are the layer's planes, and each
            // slot is of a block that was claimed; positions and variants are within the tables; norms have one of the two
            // lengths, as the flags say.
            unsafe {
                let launch = launch::rope_append(qkv.rows() as u32, n_heads as u32, layout.n_kv_heads as u32);
                self.kernels.rope_append.launch(&self.device.compute, launch, &args);
            }
        });
    }
}

/// Says that the batch appends to the blocks of its new tokens.
fn claim(batch: RaggedBatch<'_>, layer: usize, kv: &mut KvCache) {
    let layout = kv.layout();
    kv.begin_append();
    for sequence in batch.sequences {
        let end = sequence.start_pos + sequence.n_tokens;
        let blocks = sequence.start_pos / layout.block_size..layout.blocks_for(end);
        for &block in &sequence.block_table[blocks] {
            kv.claim_append(layer, block);
        }
    }
}
