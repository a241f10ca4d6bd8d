//! Weights e^x of a vocabulary, their sums and where a mark falls among them: the same bits on every machine.

/// How many leading weights reach `target`, at least one, and their sum.
pub(super) fn nucleus(weights: &[f32], target: f64) -> (usize, f64) {
    let mut mass = 0.0;
    for (n_before, &weight) in weights.iter().enumerate() {
        if mass >= target && n_before > 0 {
            return (n_before, mass);
        }
        mass += f64::from(weight);
    }
    (weights.len(), mass)
}

/// The first position whose running sum exceeds `mark`; the last positive one if rounding leaves none.
pub(super) fn position_at(weights: &[f32], mark: f64) -> usize {
    // Chunk sums first: most of a vocabulary is skipped without a dependent addition per token.
    let mut before = 0.0;
    for (chunk_idx, chunk) in weights.chunks(CHUNK).enumerate() {
        let mass = chunk_sum(chunk);
        if before + mass > mark {
            for (offset, &weight) in chunk.iter().enumerate() {
                before += f64::from(weight);
                if before > mark {
                    return chunk_idx * CHUNK + offset;
                }
            }
            // The chunk's sum was rounded up past the mark: its last token with any weight.
            if let Some(offset) = chunk.iter().rposition(|&weight| weight > 0.0) {
                return chunk_idx * CHUNK + offset;
            }
        } else {
            before += mass;
        }
    }
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
}

const CHUNK: usize = 256;

fn chunk_sum(chunk: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let (whole, tail) = chunk.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            lanes[lane] += f64::from(values[lane]);
        }
    }
    for (lane, &value) in tail.iter().enumerate() {
        lanes[lane] += f64::from(value);
    }
    lanes.iter().sum()
}

pub(super) fn sum(values: &[f32]) -> f64 {
    values.chunks(CHUNK).map(chunk_sum).sum()
}

/// Sum of `exp((logit - max) * inverse_temperature)`.
pub(super) fn sum_of_exps(logits: &[f32], max: f32, inverse_temperature: f32) -> f64 {
    let mut weights = [0.0f32; CHUNK];
    let mut total = 0.0;
    for chunk in logits.chunks(CHUNK) {
        for (weight, &logit) in weights.iter_mut().zip(chunk) {
            *weight = exp((logit - max) * inverse_temperature);
        }
        total += chunk_sum(&weights[..chunk.len()]);
    }
    total
}

/// e^x for x <= 0 within 2 units in the last place, 0 below -87; the same bits on every machine, and free of calls so that it vectorises.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts after Cody and Waite), then a Taylor polynomial of degree 7 in r.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut polynomial = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        polynomial = polynomial * r + coefficient;
    }
    // The low bits of `shifted` are n as an integer.
    let scale = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > -87.0 { polynomial * scale } else { 0.0 }
}
