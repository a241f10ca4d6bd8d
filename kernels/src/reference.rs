//! Plain scalar versions of every operator, summing in f64: the oracle for all devices. Never used to serve.
//!
//! Shapes are those of [`crate::Backend`]; everything is a row major slice. Rounding to bf16, where a device rounds, is the
//! caller's: round the inputs with [`round`] and compare with a tolerance.

use crate::backend::{Activation, AttentionParams, MoeParams, RopeParams};
use crate::layout::DType;

/// The values as `dtype` can hold them, nearest even.
pub fn round(dtype: DType, values: &[f32]) -> Vec<f32> {
    match dtype {
        DType::F32 => values.to_vec(),
        DType::F16 => values.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
        DType::Bf16 => values.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
    }
}

/// `x w^T` of `x: [rows, n_in]` and `w: [n_out, n_in]`; `[rows, n_out]`.
pub fn linear(x: &[f32], w: &[f32], n_in: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
    x.chunks_exact(n_in)
        .flat_map(|x| w.chunks_exact(n_in).map(move |w| dot(x, w)))
        .collect()
}

/// `x / sqrt(mean(x^2) + eps) * weight` of each row of `weight.len()`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let norm_row = |x: &[f32]| {
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter()
            .zip(weight)
            .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
            .collect::<Vec<f32>>()
    };
    x.chunks_exact(weight.len()).flat_map(norm_row).collect()
}

/// `act(gate) * up` of rows `[gate, up]` of `ffn` each.
pub fn gated(gate_up: &[f32], ffn: usize, activation: Activation) -> Vec<f32> {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let one = |gate: f64, up: f64| match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + inner.tanh()) * up
        }
        Activation::ClampedSwish { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let gate = gate.min(limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
        }
    };
    let row = |row: &[f32]| {
        let (gate, up) = row.split_at(ffn);
        gate.iter()
            .zip(up)
            .map(|(gate, up)| one(f64::from(*gate), f64::from(*up)) as f32)
            .collect::<Vec<f32>>()
    };
    gate_up.chunks_exact(2 * ffn).flat_map(row).collect()
}

/// One expert of [`moe_row`]: `gate_up: [2 * ffn, hidden]`, `down: [hidden, ffn]` and their biases.
pub struct Expert<'a> {
    /// `[2 * ffn, hidden]`, gate first.
    pub gate_up: &'a [f32],
    /// `[2 * ffn]`
    pub gate_up_bias: &'a [f32],
    /// `[hidden, ffn]`
    pub down: &'a [f32],
    /// `[hidden]`
    pub down_bias: &'a [f32],
}

/// The weighted sum of one row's experts, `x: [hidden]`, `logits: [experts.len()]`.
pub fn moe_row(x: &[f32], logits: &[f32], experts: &[Expert<'_>], params: MoeParams) -> Vec<f32> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let chosen = &order[..params.top_k];
    let weight = |expert: usize| f64::from(logits[expert]).exp();
    let sum: f64 = if params.renormalize {
        chosen.iter().map(|expert| weight(*expert)).sum()
    } else {
        (0..logits.len()).map(weight).sum()
    };
    let plus = |y: Vec<f32>, bias: &[f32]| y.iter().zip(bias).map(|(y, bias)| y + bias).collect::<Vec<f32>>();
    let mut out = vec![0.0_f64; x.len()];
    for idx in chosen {
        let expert = &experts[*idx];
        let ffn = expert.gate_up_bias.len() / 2;
        let gate_up = plus(linear(x, expert.gate_up, x.len()), expert.gate_up_bias);
        let y = plus(
            linear(&gated(&gate_up, ffn, params.activation), expert.down, ffn),
            expert.down_bias,
        );
        for (out, y) in out.iter_mut().zip(y) {
            *out += weight(*idx) / sum * f64::from(y);
        }
    }
    out.into_iter().map(|x| x as f32).collect()
}

/// Rotates one head at one position in place: pairs are (i, i + half) of the first `2 * half` elements.
pub fn rope(head: &mut [f32], params: &RopeParams, position: usize) {
    let half = params.inv_freq.len();
    for (i, inv_freq) in params.inv_freq.iter().enumerate() {
        let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
        let factor = f64::from(params.attention_factor);
        let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
        head[i] = ((a * cos - b * sin) * factor) as f32;
        head[i + half] = ((b * cos + a * sin) * factor) as f32;
    }
}

/// One query row, the last token of its context: `q: [n_heads, head_dim]`, `key` and `value: [n_tokens, n_kv_heads, head_dim]`.
pub fn attention_row(
    q: &[f32],
    key: &[f32],
    value: &[f32],
    n_kv_heads: usize,
    params: &AttentionParams<Vec<f32>>,
) -> Vec<f32> {
    let head_dim = q.len() / params.n_heads;
    let group = params.n_heads / n_kv_heads;
    let n_tokens = key.len() / (n_kv_heads * head_dim);
    let first = params.window.map_or(0, |window| n_tokens.saturating_sub(window));
    let mut out = Vec::with_capacity(q.len());
    for (head_idx, q) in q.chunks_exact(head_dim).enumerate() {
        let of_head = |part: &[f32]| -> Vec<Vec<f64>> {
            let start = head_idx / group * head_dim;
            let head = |token: &[f32]| token[start..][..head_dim].iter().map(|x| f64::from(*x)).collect();
            part.chunks_exact(n_kv_heads * head_dim).skip(first).map(head).collect()
        };
        let score = |key: &Vec<f64>| {
            let dot = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * f64::from(params.scale);
            match params.soft_cap.map(f64::from) {
                Some(cap) => cap * (dot / cap).tanh(),
                None => dot,
            }
        };
        let scores: Vec<f64> = of_head(key).iter().map(score).collect();
        let sink = params.sinks.as_ref().map(|sinks| f64::from(sinks[head_idx]));
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
        let value = of_head(value);
        for dim in 0..head_dim {
            let weighted: f64 = weights
                .iter()
                .zip(&value)
                .map(|(weight, value)| weight * value[dim])
                .sum();
            out.push((weighted / sum) as f32);
        }
    }
    out
}
