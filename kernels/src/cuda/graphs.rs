//! Decode steps recorded as CUDA graphs, one for each number of rows that steps are padded to, and launched whole: what differs
//! from step to step is in tables at fixed addresses, which one copy refreshes. Nothing is known here of what is computed.

use std::sync::Arc;

use cudarc::driver::CudaGraph;

use super::attention::{DevicePlan, PlanAddresses};
use super::batch::DeviceBatch;
use super::buffer::DeviceBuffer;
use super::decode_tables::{DecodeTables, padded_rows};
use super::device::Device;
use super::error::{CudaError, During as _};
use super::limits::StepLimits;
use super::opened::Cuda;
use super::plan::{Kernels, Plan, PlanSize, Splits};
use super::tensor::{CudaRope, CudaTensor};
use crate::backend::{RaggedBatch, RecordingRun, SampledIds};
use crate::kv::KvCache;

/// The steps that can be recorded, and those that have been.
pub(super) struct DecodeGraphs {
    /// Of the step that runs.
    tables: DeviceBuffer,
    /// By number of rows, ascending.
    steps: Vec<RecordableStep>,
}

struct RecordableStep {
    tables: DecodeTables,
    recorded: Option<RecordedStep>,
}

struct RecordedStep {
    graph: Graph,
    /// Address of the tensor where the step leaves its result.
    out: u64,
    rope: RopeLimits,
}

/// What every rope table that a step uses has.
#[derive(Clone, Copy, Debug)]
struct RopeLimits {
    n_positions: usize,
    n_variants: usize,
}

/// A recording under way: operators take their tables from here.
pub(super) struct Recording {
    step_idx: usize,
    n_rows: usize,
    pub(super) ids: u64,
    pub(super) wanted_rows: u64,
    /// Which rows are tokens: those that have a slot.
    slots: u64,
    rope: RopeLimits,
}

struct Graph {
    graph: CudaGraph,
    device: Arc<Device>,
}

// SAFETY: handles of the driver, which may be used from any thread, one at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // It may run still; a device that has failed says so again, to nobody.
        let _ = self.device.compute.synchronize();
    }
}

impl DecodeGraphs {
    /// Sets the tables aside; records nothing yet.
    pub(super) fn new(
        device: &Device,
        limits: &StepLimits,
        kernels: Kernels,
        splits: Splits,
        plan: PlanSize,
    ) -> Result<DecodeGraphs, CudaError> {
        let steps = padded_rows(limits.n_recorded_sequences)
            .into_iter()
            .map(|n_rows| RecordableStep {
                tables: DecodeTables::new(n_rows, limits, kernels, splits, plan.n_partial_rows),
                recorded: None,
            });
        let mut graphs = DecodeGraphs {
            steps: steps.collect(),
            tables: DeviceBuffer::new(device, "recorded steps' tables", 0)?,
        };
        graphs.tables = DeviceBuffer::new(device, "recorded steps' tables", graphs.table_bytes())?;
        Ok(graphs)
    }

    /// Of the largest step.
    pub(super) fn table_bytes(&self) -> usize {
        self.steps.iter().map(|step| step.tables.n_bytes).max().unwrap_or(0)
    }

    pub(super) fn n_rows(&self) -> Vec<usize> {
        self.steps.iter().map(|step| step.tables.n_rows).collect()
    }
}

impl Recording {
    /// Says that the step rotates by this table.
    pub(super) fn note_rope(&mut self, rope: &CudaRope) {
        self.rope.n_positions = self.rope.n_positions.min(rope.max_positions);
        self.rope.n_variants = self.rope.n_variants.min(rope.n_variants);
    }

    /// Panics unless an operator is given as many rows as are recorded.
    pub(super) fn assert_rows(&self, op: &str, n_rows: usize) {
        assert!(
            n_rows == self.n_rows,
            "{op}: {n_rows} rows in a recording of {}",
            self.n_rows
        );
    }
}

impl Cuda {
    /// Operators queue a step of `batches` from now on: of one padding token for each sequence, with its tables where a replay
    /// will have its own.
    pub(super) fn start_recording(&self, batches: &[RaggedBatch<'_>], run: RecordingRun) -> Result<(), CudaError> {
        let mut graphs = self.graphs.borrow_mut();
        let graphs = graphs.as_mut().expect("memory was set aside for it");
        let n_rows = batches.first().map_or(0, RaggedBatch::n_rows);
        let step_idx = graphs.steps.iter().position(|step| step.tables.n_rows == n_rows);
        let step_idx = step_idx.unwrap_or_else(|| panic!("{n_rows} rows are not recordable"));
        let tables = &graphs.steps[step_idx].tables;
        let base = graphs.tables.address();
        let at = |offset: usize| base + offset as u64;

        self.uploads.borrow_mut().begin_step();
        let mut plan = std::mem::take(&mut self.scratch.borrow_mut().plan);
        let nobody = vec![RaggedBatch { sequences: &[] }; batches.len()];
        let filled = self.uploads.borrow_mut().fill(base, tables.n_bytes, |bytes| {
            tables.fill(bytes, &mut plan, &[], &nobody)
        });
        assert!(filled, "a step of nobody fits");
        let mut known = self.batches.borrow_mut();
        known.clear();
        for (batch, group) in batches.iter().zip(&tables.groups) {
            plan.refresh(group.shape, self.splits(), &[]);
            plan.pad_to(group.size);
            let addresses = PlanAddresses {
                decode: at(group.decode),
                prefill: at(group.prefill),
                merges: at(group.merges),
            };
            let on_device = DevicePlan::new(&plan, group.shape, addresses, group.size.n_partial_rows);
            known.push(DeviceBatch::at_fixed_addresses(
                *batch,
                tables.block_size(),
                [
                    at(tables.positions),
                    at(group.slots),
                    at(tables.rope_variants),
                    at(tables.block_tables),
                ],
                on_device,
            ));
        }
        self.scratch.borrow_mut().plan = plan;
        *self.recording.borrow_mut() = Some(Recording {
            step_idx,
            n_rows,
            ids: at(tables.ids),
            wanted_rows: at(tables.wanted_rows),
            slots: at(tables.groups[0].slots),
            rope: RopeLimits {
                n_positions: usize::MAX,
                n_variants: usize::MAX,
            },
        });
        if run == RecordingRun::Capture {
            let begun = self.device.begin_capture();
            if begun.is_err() {
                *self.recording.borrow_mut() = None;
            }
            begun?;
        }
        Ok(())
    }

    /// Of a recorded step the rows' slots, by which rows that are no tokens are known. Null of any other, which has none such.
    pub(super) fn recorded_slots(&self, op: &str, n_rows: usize) -> u64 {
        self.recording.borrow().as_ref().map_or(0, |recording| {
            recording.assert_rows(op, n_rows);
            recording.slots
        })
    }

    /// The step has been queued, and leaves its result in `out`.
    pub(super) fn stop_recording(&self, out: &CudaTensor, run: RecordingRun) -> Result<(), CudaError> {
        let recording = self.recording.borrow_mut().take().expect("a recording is under way");
        self.batches.borrow_mut().clear();
        match run {
            RecordingRun::WarmUp => return Ok(()),
            RecordingRun::Capture => {}
        }
        let graph = self.device.end_capture()?;
        let recorded = RecordedStep {
            graph: Graph {
                graph,
                device: Arc::clone(&self.device),
            },
            out: out.address(),
            rope: recording.rope,
        };
        let mut graphs = self.graphs.borrow_mut();
        let graphs = graphs.as_mut().expect("it was there when the recording began");
        graphs.steps[recording.step_idx].recorded = Some(recorded);
        Ok(())
    }

    /// Queues a recorded step of one new token for each sequence, if there is one; its result is then in `out`.
    pub(super) fn replay_step(
        &self,
        out: &mut CudaTensor,
        ids: &[u32],
        sampled: Option<SampledIds<'_, Cuda>>,
        batches: &[RaggedBatch<'_>],
        kv: &mut KvCache,
    ) -> bool {
        let graphs = self.graphs.borrow();
        let Some(graphs) = graphs.as_ref() else { return false };
        let step = graphs.steps.iter().find(|step| step.tables.n_rows >= ids.len());
        let Some((tables, recorded)) = step.and_then(|step| Some((&step.tables, step.recorded.as_ref()?))) else {
            return false;
        };
        let mut plan: Plan = std::mem::take(&mut self.scratch.borrow_mut().plan);
        let filled = self
            .uploads
            .borrow_mut()
            .fill(graphs.tables.address(), tables.n_bytes, |bytes| {
                tables.fill(bytes, &mut plan, ids, batches)
            });
        self.scratch.borrow_mut().plan = plan;
        if !filled {
            return false;
        }
        let to = out.resize("replay", ids.len(), out.cols());
        assert!(to == recorded.out, "replay: the step leaves its result elsewhere");
        self.claim_blocks(batches, tables, recorded.rope, kv);
        kv.queue_work();
        if let Some(SampledIds { sampler, sources }) = sampled {
            let ids_at = graphs.tables.address() + tables.ids as u64;
            sampler.fill_in(self, ids_at, ids_at, ids.len(), sources);
        }
        recorded.graph.graph.launch().or_stop("launch a recorded step");
        true
    }

    /// What operators check of a step's sequences and blocks before they queue it.
    fn claim_blocks(&self, batches: &[RaggedBatch<'_>], tables: &DecodeTables, rope: RopeLimits, kv: &mut KvCache) {
        let layout = kv.layout();
        assert!(
            layout.block_size == tables.block_size(),
            "replay: blocks of {}, recorded for {}",
            layout.block_size,
            tables.block_size()
        );
        for (batch, group) in batches.iter().zip(&tables.groups) {
            kv.begin_append();
            for sequence in batch.sequences {
                let (position, variant, n_blocks) =
                    (sequence.start_pos, sequence.rope_variant, sequence.block_table.len());
                assert!(
                    position < rope.n_positions
                        && variant < rope.n_variants
                        && n_blocks >= layout.blocks_for(position + 1),
                    "replay: position {position} of variant {variant} in {n_blocks} blocks of {}, recorded with {rope:?}",
                    layout.block_size
                );
                kv.claim_append_in_all_layers(sequence.block_table[position / layout.block_size]);
            }
            super::attention::assert_readable(*batch, layout, group.shape, 0, kv);
        }
    }
}
