//! Attention over the paged cache: the step's work is planned once for each kind of layer, and the plan's kernels are queued
//! for every layer of that kind.

use std::ops::Range;

use super::batch::DeviceBatch;
use super::function::Args;
use super::launch::Launch;
use super::opened::{Cuda, CudaMode};
use super::plan::{Item, Merge, Plan, Sequence, Shape, Splits};
use super::tensor::{CudaTensor, CudaVector};
use crate::backend::{AttentionParams, RaggedBatch, WINDOW_GRAIN};
use crate::kv::KvCache;
use crate::layout::KvLayout;

/// Tokens between cuts in deterministic mode: as on the CPU, whose splits are of this size too.
const FIXED_SPLIT_TOKENS: u32 = 256;

/// CTAs of attention that a multiprocessor runs at once, with the shared memory that they take.
const CTAS_PER_MULTIPROCESSOR: u32 = 2;

/// A plan on the device.
pub(super) struct DevicePlan {
    shape: Shape,
    decode: Work,
    waves: Vec<DeviceWave>,
    n_partial_rows: usize,
}

/// What runs together; see [`super::plan::Wave`].
#[derive(Clone, Copy)]
struct DeviceWave {
    prefill: Work,
    merge: Work,
    merge_launch: Launch,
}

#[derive(Clone, Copy)]
struct Work {
    at: u64,
    /// Items or merges.
    n: u32,
}

/// Where a plan's lists are on the device.
#[derive(Clone, Copy)]
pub(super) struct PlanAddresses {
    pub(super) decode: u64,
    pub(super) prefill: u64,
    pub(super) merges: u64,
}

impl DevicePlan {
    /// `n_partial_rows` are at least those of the plan.
    pub(super) fn new(plan: &Plan, shape: Shape, at: PlanAddresses, n_partial_rows: u32) -> DevicePlan {
        let work = |at: u64, range: &Range<usize>, size: usize| Work {
            at: at + (range.start * size) as u64,
            n: range.len() as u32,
        };
        let waves = plan.waves.iter().map(|wave| DeviceWave {
            prefill: work(at.prefill, &wave.prefill, size_of::<Item>()),
            merge: work(at.merges, &wave.merges, size_of::<Merge>()),
            merge_launch: plan.merge_launch(shape, wave.merges.len()),
        });
        DevicePlan {
            shape,
            decode: work(at.decode, &(0..plan.decode.len()), size_of::<Item>()),
            waves: waves.collect(),
            n_partial_rows: n_partial_rows as usize,
        }
    }
}

/// What does not change within a layer kind, as kernels take it.
struct Operands {
    out: u64,
    qkv: u64,
    key: u64,
    value: u64,
    block_tables: u64,
    partial_out: u64,
    partial_stats: u64,
    sinks: u64,
    scale: f32,
    soft_cap: f32,
    block_shift: u32,
}

impl Cuda {
    /// Shapes of qkv, batch and sinks have been checked.
    pub(super) fn attend(
        &self,
        out: &mut CudaTensor,
        qkv: &CudaTensor,
        batch: RaggedBatch<'_>,
        params: &AttentionParams<CudaVector>,
        layer: usize,
        kv: &KvCache,
    ) {
        let layout = kv.layout();
        assert!(
            layout.head_dim == self.head_dim,
            "attention: heads of {}, the device was opened for {}",
            layout.head_dim,
            self.head_dim
        );
        let to = out.resize("attention", qkv.rows(), params.n_heads * layout.head_dim);
        let heads = [params.n_heads, layout.n_kv_heads];
        let shape = Shape::new(heads, layout.head_dim, params.window, self.kernels.attention.kind());
        let (key, value) = kv.layer_addresses(layer).expect("the cache is on the device");
        kv.queue_work();
        self.with_plan(batch, layout, shape, layer, kv, |on_device, plan| {
            let mut scratch = self.scratch.borrow_mut();
            let n_rows = plan.n_partial_rows;
            let partial_out = scratch
                .partial_out
                .at_least(&self.device, n_rows * layout.head_dim * size_of::<f32>());
            let partial_stats = scratch
                .partial_stats
                .at_least(&self.device, n_rows * 2 * size_of::<f32>());
            let operands = Operands {
                out: to,
                qkv: qkv.address(),
                key,
                value,
                block_tables: on_device.block_tables,
                partial_out,
                partial_stats,
                sinks: params.sinks.as_ref().map_or(0, |sinks| sinks.buffer.address()),
                scale: params.scale,
                soft_cap: params.soft_cap.unwrap_or(0.0),
                block_shift: layout.block_size.trailing_zeros(),
            };
            // SAFETY: qkv and out have the batch's rows; key and value are the layer's planes; the plan's items are of this
            // batch's sequences, whose blocks are readable from the first that a window shows; partial states have as many
            // rows as the plan uses.
            unsafe { self.queue_attention(plan, &operands) };
        });
    }

    unsafe fn queue_attention(&self, plan: &DevicePlan, operands: &Operands) {
        let shape = plan.shape;
        let stream = &self.device.compute;
        let kernels = &self.kernels.attention;
        let args = |work: Work| {
            Args::new()
                .address(operands.out)
                .address(operands.qkv)
                .address(operands.key)
                .address(operands.value)
                .address(operands.block_tables)
                .address(work.at)
                .address(operands.partial_out)
                .address(operands.partial_stats)
                .address(operands.sinks)
                .u32(shape.n_heads)
                .u32(shape.n_kv_heads)
                .u32(shape.head_dim)
                .u32(operands.block_shift)
                .f32(operands.scale)
                .f32(operands.soft_cap)
                .u32(shape.window.unwrap_or(0))
        };
        // SAFETY: the caller's promise.
        unsafe {
            kernels.launch_decode(stream, plan.decode.n, shape.head_dim, &args(plan.decode));
            for wave in &plan.waves {
                kernels.launch_prefill(stream, wave.prefill.n, shape.head_dim, &args(wave.prefill));
                let args = Args::new()
                    .address(operands.out)
                    .address(operands.partial_out)
                    .address(operands.partial_stats)
                    .address(wave.merge.at)
                    .address(operands.sinks)
                    .u32(shape.n_heads)
                    .u32(shape.n_kv_heads)
                    .u32(shape.head_dim);
                self.kernels.attention_merge.launch(stream, wave.merge_launch, &args);
            }
        }
    }

    /// The batch on the device, uploaded if this is the step's first use of it.
    pub(super) fn with_batch<R>(
        &self,
        batch: RaggedBatch<'_>,
        layout: KvLayout,
        use_it: impl FnOnce(&mut DeviceBatch) -> R,
    ) -> R {
        let mut batches = self.batches.borrow_mut();
        let idx = match batches.iter().position(|known| known.is_of(batch, layout)) {
            Some(idx) => idx,
            None => {
                assert!(
                    self.recording.borrow().is_none(),
                    "a recorded step has a batch that it did not begin with"
                );
                batches.push(DeviceBatch::upload(&mut self.uploads.borrow_mut(), batch, layout));
                batches.len() - 1
            }
        };
        use_it(&mut batches[idx])
    }

    /// The batch's plan for a kind of layer, made if this is the step's first layer of that kind.
    fn with_plan(
        &self,
        batch: RaggedBatch<'_>,
        layout: KvLayout,
        shape: Shape,
        layer: usize,
        kv: &KvCache,
        use_it: impl FnOnce(&DeviceBatch, &DevicePlan),
    ) {
        self.with_batch(batch, layout, |on_device| {
            let idx = match on_device.plans.iter().position(|plan| plan.shape == shape) {
                Some(idx) => idx,
                None => {
                    assert!(
                        self.recording.borrow().is_none(),
                        "a recorded step has attention of {shape:?}, which no layer group was said to have"
                    );
                    assert_readable(batch, layout, shape, layer, kv);
                    on_device.plans.push(self.plan(batch, shape));
                    on_device.plans.len() - 1
                }
            };
            use_it(on_device, &on_device.plans[idx]);
        });
    }

    fn plan(&self, batch: RaggedBatch<'_>, shape: Shape) -> DevicePlan {
        let (mut first_row, mut first_block) = (0, 0);
        let sequences: Vec<Sequence> = batch
            .sequences
            .iter()
            .map(|sequence| {
                let planned = Sequence {
                    first_row,
                    start_pos: sequence.start_pos as u32,
                    n_tokens: sequence.n_tokens as u32,
                    first_block,
                };
                first_row += sequence.n_tokens as u32;
                first_block += sequence.block_table.len() as u32;
                planned
            })
            .collect();
        let scratch = &mut *self.scratch.borrow_mut();
        let plan: &mut Plan = &mut scratch.plan;
        plan.refresh(shape, self.splits(), &sequences);
        let mut uploads = self.uploads.borrow_mut();
        let at = PlanAddresses {
            decode: uploads.put(&plan.decode),
            prefill: uploads.put(&plan.prefill),
            merges: uploads.put(&plan.merges),
        };
        DevicePlan::new(plan, shape, at, plan.n_partial_rows)
    }

    /// Where contexts are cut.
    pub(super) fn splits(&self) -> Splits {
        match self.mode {
            CudaMode::Fast => Splits::Balanced {
                n_ctas: self.device.n_multiprocessors * CTAS_PER_MULTIPROCESSOR,
            },
            CudaMode::Deterministic => Splits::Fixed {
                tokens: FIXED_SPLIT_TOKENS,
            },
        }
    }
}

/// Nobody writes the blocks that the layer's queries see.
pub(super) fn assert_readable(batch: RaggedBatch<'_>, layout: KvLayout, shape: Shape, layer: usize, kv: &KvCache) {
    for sequence in batch.sequences {
        let end = layout.blocks_for(sequence.start_pos + sequence.n_tokens);
        let first_seen = shape
            .window
            .map_or(0, |window| (sequence.start_pos + 1).saturating_sub(window as usize));
        let first = first_seen / WINDOW_GRAIN * WINDOW_GRAIN / layout.block_size;
        kv.assert_readable(layer, &sequence.block_table[first..end]);
    }
}
