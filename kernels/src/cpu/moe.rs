//! Mixtures of experts: routing, and the products of each expert over the rows that chose it.
//!
//! Split of work: experts one after the other in ascending order, each as one product over its rows, so an expert's weights
//! are read once. Bits: a row's experts are added in ascending order from 0, and a product's rows are independent, so a row
//! does not depend on who else chose its experts. Bound: read bandwidth of the chosen experts, until many rows share one.

use super::isa::Isa;
use super::linear::linear;
use super::pool::Pool;
use super::rowwise::{add_bias, gated_rows};
use super::simd::Dot;
use super::tensor::{CpuMatrix, CpuVector};
use crate::aligned::AlignedBuf;
use crate::backend::MoeParams;

/// One expert's weights.
pub(crate) struct Expert {
    /// `[2 * ffn, hidden]`
    pub(crate) gate_up: CpuMatrix,
    pub(crate) gate_up_bias: Option<CpuVector>,
    /// `[hidden, ffn]`
    pub(crate) down: CpuMatrix,
    pub(crate) down_bias: Option<CpuVector>,
}

/// A row that an expert was chosen for, and the expert's weight in its sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) expert: usize,
    pub(crate) row: usize,
    pub(crate) weight: f32,
}

/// Memory for one expert's rows, kept between steps.
#[derive(Default)]
pub(crate) struct Scratch {
    chosen: Vec<Chosen>,
    order: Vec<usize>,
    x: AlignedBuf<f32>,
    gate_up: AlignedBuf<f32>,
    ffn: AlignedBuf<f32>,
    y: AlignedBuf<f32>,
}

/// The experts of every row, by ascending expert, then row. `logits: [rows, n_experts]`; `order` is scratch.
pub(crate) fn route(
    chosen: &mut Vec<Chosen>,
    order: &mut Vec<usize>,
    logits: &[f32],
    n_experts: usize,
    params: MoeParams,
) {
    chosen.clear();
    for (row, logits) in logits.chunks_exact(n_experts).enumerate() {
        order.clear();
        order.extend(0..n_experts);
        // A stable sort: of equal logits, the smaller number first.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let max = logits[order[0]];
        let exponential = |expert: usize| (logits[expert] - max).exp();
        let sum: f32 = if params.renormalize {
            order[..params.top_k].iter().map(|expert| exponential(*expert)).sum()
        } else {
            (0..n_experts).map(exponential).sum()
        };
        chosen.extend(order[..params.top_k].iter().map(|&expert| Chosen {
            expert,
            row,
            weight: exponential(expert) / sum,
        }));
    }
    chosen.sort_by_key(|chosen| (chosen.expert, chosen.row));
}

/// `x, out: [rows, hidden]`, `logits: [rows, experts.len()]`; `packed` is the products' scratch.
#[expect(
    clippy::too_many_arguments,
    reason = "the operator's operands and the device's scratch"
)]
pub(crate) fn moe<D: Dot>(
    isa: Isa,
    pool: &mut Pool,
    packed: &mut AlignedBuf<u32>,
    scratch: &mut Scratch,
    out: &mut [f32],
    x: &[f32],
    logits: &[f32],
    experts: &[Expert],
    params: MoeParams,
) {
    let Scratch {
        chosen,
        order,
        x: gathered,
        gate_up,
        ffn,
        y,
    } = scratch;
    route(chosen, order, logits, experts.len(), params);
    out.fill(0.0);
    for chosen in chosen.chunk_by(|a, b| a.expert == b.expert) {
        let expert = &experts[chosen[0].expert];
        let (rows, hidden, width) = (chosen.len(), expert.gate_up.n_in, expert.down.n_in);
        let gathered = gathered.at_least(rows * hidden);
        for (to, chosen) in gathered.chunks_exact_mut(hidden).zip(chosen) {
            to.copy_from_slice(&x[chosen.row * hidden..][..hidden]);
        }
        let gate_up = gate_up.at_least(rows * 2 * width);
        linear::<D>(isa, pool, packed, gate_up, gathered, rows, &expert.gate_up);
        if let Some(bias) = &expert.gate_up_bias {
            add_bias(gate_up, &bias.data);
        }
        let ffn = ffn.at_least(rows * width);
        gated_rows(isa, pool, ffn, gate_up, width, params.activation);
        let y = y.at_least(rows * hidden);
        linear::<D>(isa, pool, packed, y, ffn, rows, &expert.down);
        if let Some(bias) = &expert.down_bias {
            add_bias(y, &bias.data);
        }
        for (y, chosen) in y.chunks_exact(hidden).zip(chosen) {
            for (sum, y) in out[chosen.row * hidden..][..hidden].iter_mut().zip(y) {
                *sum += chosen.weight * y;
            }
        }
    }
}
