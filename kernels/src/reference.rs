//! Plain scalar versions of every operator, summing in f64: the oracle for all devices. Never used to serve.
//!
//! Shapes are those of [`crate::Backend`]; everything is a row major slice. Rounding to bf16, where a device rounds, is the
//! caller's: round the inputs with [`round`] and compare with a tolerance.

use crate::backend::{AttentionParams, RopeParams};
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

/// `silu(gate) * up` of rows `[gate, up]` of `ffn` each.
pub fn silu_mul(gate_up: &[f32], ffn: usize) -> Vec<f32> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let row = |row: &[f32]| {
        let (gate, up) = row.split_at(ffn);
        gate.iter()
            .zip(up)
            .map(|(gate, up)| (silu(f64::from(*gate)) * f64::from(*up)) as f32)
            .collect::<Vec<f32>>()
    };
    gate_up.chunks_exact(2 * ffn).flat_map(row).collect()
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

/// One query row over its context: `q: [n_heads, head_dim]`, `key` and `value: [n_tokens, n_kv_heads, head_dim]`.
pub fn attention_row(q: &[f32], key: &[f32], value: &[f32], n_kv_heads: usize, params: AttentionParams) -> Vec<f32> {
    let head_dim = q.len() / params.n_heads;
    let group = params.n_heads / n_kv_heads;
    let mut out = Vec::with_capacity(q.len());
    for (head_idx, q) in q.chunks_exact(head_dim).enumerate() {
        let of_head = |part: &[f32]| -> Vec<Vec<f64>> {
            let start = head_idx / group * head_dim;
            let head = |token: &[f32]| token[start..][..head_dim].iter().map(|x| f64::from(*x)).collect();
            part.chunks_exact(n_kv_heads * head_dim).map(head).collect()
        };
        let scores: Vec<f64> = of_head(key)
            .iter()
            .map(|key| q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * f64::from(params.scale))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
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
