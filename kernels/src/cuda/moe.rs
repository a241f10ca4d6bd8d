//! Mixtures of experts: routing, the rows sorted by expert, one grouped product for each half, and the weighted sum of each
//! row's experts in ascending order of their numbers.

use super::device::Device;
use super::error::CudaError;
use super::function::Args;
use super::launch;
use super::limits::ExpertLimits;
use super::opened::Cuda;
use super::scratch::Growing;
use super::tensor::{CudaExperts, CudaTensor};
use crate::backend::MoeParams;
use crate::layout::DType;

/// What the routing kernel takes.
const MAX_EXPERTS: usize = 1024;
const MAX_TOP_K: usize = 32;

/// Of one layer's experts; pairs are (row, expert) as routed, slots the same sorted by expert.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[rows, top_k]` u32
    experts: Growing,
    /// `[rows, top_k]` f32
    weights: Growing,
    /// `[n_experts + 1]` u32
    offsets: Growing,
    /// `[n_pairs]` u32
    pair_of_slot: Growing,
    /// `[n_pairs]` u32
    slot_of_pair: Growing,
    /// `[max_tiles, 2]` u32
    tiles: Growing,
    /// `[n_pairs, 2 * ffn]`
    gate_up: Growing,
    /// `[n_pairs, ffn]`
    ffn: Growing,
    /// `[n_pairs, hidden]`
    y: Growing,
}

/// Bytes of each field of [`Scratch`].
struct ScratchBytes {
    pairs: usize,
    offsets: usize,
    tiles: usize,
    gate_up: usize,
    ffn: usize,
    y: usize,
}

impl ScratchBytes {
    fn new(n_rows: usize, experts: ExpertLimits, dtype: DType) -> ScratchBytes {
        let ExpertLimits {
            n_experts,
            top_k,
            hidden,
            ffn,
        } = experts;
        let n_pairs = n_rows * top_k;
        ScratchBytes {
            pairs: n_pairs * 4,
            offsets: (n_experts + 1) * 4,
            tiles: launch::moe_tiles(n_pairs as u32, n_experts as u32) as usize * 2 * 4,
            gate_up: n_pairs * 2 * ffn * dtype.size(),
            ffn: n_pairs * ffn * dtype.size(),
            y: n_pairs * hidden * dtype.size(),
        }
    }
}

impl Scratch {
    /// For up to `n_rows`.
    pub(super) fn reserve(
        &mut self,
        device: &Device,
        n_rows: usize,
        experts: ExpertLimits,
        dtype: DType,
    ) -> Result<(), CudaError> {
        let bytes = ScratchBytes::new(n_rows, experts, dtype);
        self.experts.reserve(device, bytes.pairs)?;
        self.weights.reserve(device, bytes.pairs)?;
        self.offsets.reserve(device, bytes.offsets)?;
        self.pair_of_slot.reserve(device, bytes.pairs)?;
        self.slot_of_pair.reserve(device, bytes.pairs)?;
        self.tiles.reserve(device, bytes.tiles)?;
        self.gate_up.reserve(device, bytes.gate_up)?;
        self.ffn.reserve(device, bytes.ffn)?;
        self.y.reserve(device, bytes.y)
    }
}

impl Cuda {
    /// Dtypes have been checked.
    pub(super) fn mixture(
        &self,
        out: &mut CudaTensor,
        x: &CudaTensor,
        router_logits: &CudaTensor,
        experts: &CudaExperts,
        params: MoeParams,
    ) {
        let (rows, hidden, n_experts, top_k) = (x.rows(), x.cols(), experts.experts.len(), params.top_k);
        assert!(
            (router_logits.rows(), router_logits.cols()) == (rows, n_experts)
                && (1..=n_experts.min(MAX_TOP_K)).contains(&top_k)
                && n_experts <= MAX_EXPERTS,
            "moe: {top_k} of {n_experts} experts, x [{rows}, {hidden}], router logits [{}, {}]",
            router_logits.rows(),
            router_logits.cols()
        );
        let width = experts.experts[0].down.n_in;
        for (idx, expert) in experts.experts.iter().enumerate() {
            assert!(
                expert.gate_up.n_in == hidden
                    && expert.gate_up.n_out == 2 * width
                    && (expert.down.n_out, expert.down.n_in) == (hidden, width),
                "moe: expert {idx} is [{}, {}] and [{}, {}] for x of {hidden} columns",
                expert.gate_up.n_out,
                expert.gate_up.n_in,
                expert.down.n_out,
                expert.down.n_in,
            );
        }
        let to = out.resize("moe", rows, hidden);
        if rows == 0 {
            return;
        }
        let n_pairs = rows * top_k;
        let max_tiles = launch::moe_tiles(n_pairs as u32, n_experts as u32) as usize;
        let device = &self.device;
        let stream = &device.compute;
        let limits = ExpertLimits {
            n_experts,
            top_k,
            hidden,
            ffn: width,
        };
        let bytes = ScratchBytes::new(rows, limits, self.dtype);
        let scratch = &mut self.scratch.borrow_mut().moe;
        let chosen = scratch.experts.at_least(device, bytes.pairs);
        let weights = scratch.weights.at_least(device, bytes.pairs);
        let offsets = scratch.offsets.at_least(device, bytes.offsets);
        let pair_of_slot = scratch.pair_of_slot.at_least(device, bytes.pairs);
        let slot_of_pair = scratch.slot_of_pair.at_least(device, bytes.pairs);
        let tiles = scratch.tiles.at_least(device, bytes.tiles);
        let gate_up = scratch.gate_up.at_least(device, bytes.gate_up);
        let ffn = scratch.ffn.at_least(device, bytes.ffn);
        let y = scratch.y.at_least(device, bytes.y);
        let kernels = self.kernels.moe.get().expect("loaded with the experts");

        let route = Args::new()
            .address(chosen)
            .address(weights)
            .address(router_logits.address())
            .u32(rows as u32)
            .u32(n_experts as u32)
            .u32(top_k as u32)
            .u32(u32::from(params.renormalize))
            .address(self.recorded_slots("moe", rows));
        let permute = Args::new()
            .address(offsets)
            .address(pair_of_slot)
            .address(slot_of_pair)
            .address(tiles)
            .address(chosen)
            .u32(n_pairs as u32)
            .u32(n_experts as u32)
            .u32(max_tiles as u32);
        let grouped = |out: u64, x: u64, weights: u64, biases: u64, pairs: u64, n: usize, k: usize| {
            Args::new()
                .address(out)
                .address(x)
                .address(weights)
                .address(biases)
                .address(offsets)
                .address(pairs)
                .address(tiles)
                .u32(top_k as u32)
                .u32(n as u32)
                .u32(k as u32)
        };
        let bias = |table: &Option<super::buffer::DeviceBuffer>| table.as_ref().map_or(0, |table| table.address());
        let first = grouped(
            gate_up,
            x.address(),
            experts.gate_up.address(),
            bias(&experts.gate_up_bias),
            pair_of_slot,
            2 * width,
            hidden,
        );
        let second = grouped(
            y,
            ffn,
            experts.down.address(),
            bias(&experts.down_bias),
            0,
            hidden,
            width,
        );
        let combine = Args::new()
            .address(to)
            .address(y)
            .address(slot_of_pair)
            .address(weights)
            .u32(top_k as u32)
            .u32(hidden as u32);
        // SAFETY: every buffer has the elements that its field says for these rows; experts have the shapes checked above,
        // and their tables point to them.
        unsafe {
            kernels
                .route
                .launch(stream, launch::moe_route(rows as u32, n_experts as u32), &route);
            kernels
                .permute
                .launch(stream, launch::moe_permute(n_experts as u32), &permute);
            let launch_of = |n: usize| launch::moe_linear(max_tiles as u32, n as u32);
            kernels.linear.launch(stream, launch_of(2 * width), &first);
            self.gated_at(ffn, gate_up, n_pairs, width, params.activation);
            kernels.linear.launch(stream, launch_of(hidden), &second);
            kernels.combine.launch(stream, launch::rows(rows as u32), &combine);
        }
    }
}
