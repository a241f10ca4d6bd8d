//! The most that a step of one model asks of the device, and the bytes that this makes of what operators need between their
//! kernels. Arithmetic only; allocates nothing.

use super::plan::{Kernels, PlanSize, Shape, Splits};
use super::upload::ALIGNMENT;

/// Partial rows of attention in deterministic mode beyond which a step runs in waves: of heads of 128, 64 MiB.
const FIXED_PARTIAL_ROWS: u32 = 1 << 17;

/// Bytes of a row's request and answer of the sampling kernels, for a step that samples.
const SAMPLING_BYTES_PER_ROW: usize = 128;

/// The most that a step of one model asks of the device: what its operators need is set aside for that once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// New tokens, over all sequences.
    pub n_rows: usize,
    /// Sequences.
    pub n_sequences: usize,
    /// Sequences of the largest decode step that is recorded; 0 records none.
    pub n_recorded_sequences: usize,
    /// Tokens of a sequence.
    pub n_context: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Query heads.
    pub n_heads: usize,
    /// KV heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How far back the layers see, of each group of layers that shares block tables.
    pub windows: Vec<Option<usize>>,
    /// Elements that the host is given at once, logits aside.
    pub n_fetched: usize,
    /// Of a mixture of experts.
    pub experts: Option<ExpertLimits>,
}

/// A layer's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertLimits {
    /// Experts.
    pub n_experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Columns of what goes in and comes out.
    pub hidden: usize,
    /// Columns within an expert.
    pub ffn: usize,
}

impl StepLimits {
    /// A layer group's attention, as plans know it.
    pub(super) fn shape(&self, window: Option<usize>, kernels: Kernels) -> Shape {
        Shape::new([self.n_heads, self.n_kv_heads], self.head_dim, window, kernels)
    }

    /// Blocks of a sequence in one table, with one to grow into.
    pub(super) fn n_table_blocks(&self) -> usize {
        self.n_context.div_ceil(self.block_size) + 1
    }

    /// The plan of any step; windows only make it smaller.
    pub(super) fn plan_size(&self, kernels: Kernels, splits: Splits) -> PlanSize {
        PlanSize::of_step(
            self.shape(None, kernels),
            splits,
            self.n_sequences as u32,
            self.n_rows as u32,
            self.n_context as u32,
            FIXED_PARTIAL_ROWS,
        )
    }

    /// Bytes that a step uploads, of `plan` for each layer group.
    pub(super) fn upload_bytes(&self, plan: PlanSize) -> usize {
        // Positions, variants and slots; a table of each sequence; and what the plan has.
        let of_group =
            self.n_rows * 16 + self.n_sequences.min(self.n_rows) * self.n_table_blocks() * 4 + plan.n_bytes();
        // Ids, and rows that are wanted, which two tensors are gathered by.
        let of_rows = self.n_rows * (3 * 4 + SAMPLING_BYTES_PER_ROW);
        // Each array begins on a boundary; of wanted rows there may be as many arrays as rows.
        let n_arrays = 16 + 8 * self.windows.len() + 2 * self.n_rows;
        self.windows.len() * of_group + of_rows + n_arrays * ALIGNMENT
    }
}
