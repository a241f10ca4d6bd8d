//! What a step and a transfer are expected to take: a linear model, its profile file, and its fit to measured steps.
//!
//! The form is DistServe's (prefill linear in tokens and in attended context, decode linear in batch and context), in one
//! formula for mixed batches: `step = base + a * prefill tokens + b * decode tokens + c * attended context`.

use serde::{Deserialize, Serialize};

use crate::ids::Nanos;

/// Version of the profile file's format.
pub const PROFILE_VERSION: u32 = 1;

/// Expected times of one instance, in nanoseconds. Serialised (JSON or TOML) it is the profile file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostModel {
    /// [`PROFILE_VERSION`] of the writer.
    pub version: u32,
    /// Any step, whatever is in it (for a decode, mostly the read of the weights).
    pub step_base_ns: f64,
    /// Each prompt token computed.
    pub prefill_ns_per_token: f64,
    /// Each sequence that decodes.
    pub decode_ns_per_token: f64,
    /// Each cached token a new token attends to.
    pub attention_ns_per_context_token: f64,
    /// A transfer, whatever its size.
    pub transfer_base_ns: f64,
    /// Each byte of KV that travels.
    pub transfer_ns_per_byte: f64,
}

impl Default for CostModel {
    /// A slow CPU instance of a model of about a billion parameters; replaced by the first fit.
    fn default() -> Self {
        CostModel {
            version: PROFILE_VERSION,
            step_base_ns: 5e7,
            prefill_ns_per_token: 5e6,
            decode_ns_per_token: 5e6,
            attention_ns_per_context_token: 1e3,
            transfer_base_ns: 1e6,
            transfer_ns_per_byte: 1.0,
        }
    }
}

/// What one step did and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepSample {
    /// Prompt tokens computed.
    pub n_prefill_tokens: u32,
    /// Sequences that decoded.
    pub n_decode_tokens: u32,
    /// Sum over new tokens of the tokens each attended to.
    pub n_context_tokens: u64,
    /// Duration.
    pub duration: Nanos,
}

impl CostModel {
    /// Expected time of one step.
    pub fn step(&self, n_prefill_tokens: u64, n_decode_tokens: u64, n_context_tokens: u64) -> Nanos {
        let ns = self.step_base_ns
            + self.prefill_ns_per_token * n_prefill_tokens as f64
            + self.decode_ns_per_token * n_decode_tokens as f64
            + self.attention_ns_per_context_token * n_context_tokens as f64;
        Nanos(ns.max(0.0) as u64)
    }

    /// Expected time to compute `n_tokens` of a prompt after `n_cached` tokens that are already in the cache.
    pub fn prefill(&self, n_tokens: u64, n_cached: u64) -> Nanos {
        self.step(n_tokens, 0, n_tokens * n_cached + n_tokens * (n_tokens + 1) / 2)
    }

    /// Expected time of a transfer of `n_bytes`.
    pub fn transfer(&self, n_bytes: u64) -> Nanos {
        Nanos((self.transfer_base_ns + self.transfer_ns_per_byte * n_bytes as f64) as u64)
    }
}

/// Fits a [`CostModel`]'s step terms to measured steps by least squares, forgetting old ones geometrically.
#[derive(Clone, Debug)]
pub struct CostFit {
    /// Normal equations over (1, prefill, decode, context), scaled; lower triangle filled too.
    gram: [[f64; 4]; 4],
    moment: [f64; 4],
    n_samples: u64,
}

/// Units in which the columns have like magnitudes, so that the equations are well conditioned.
const COLUMN_SCALE: [f64; 4] = [1.0, 1e2, 1e1, 1e4];
/// A step weighs half after about 350 newer ones.
const FORGET: f64 = 0.998;
/// Steps before a fit is believed.
const MIN_SAMPLES: u64 = 32;

impl Default for CostFit {
    fn default() -> Self {
        CostFit {
            gram: [[0.0; 4]; 4],
            moment: [0.0; 4],
            n_samples: 0,
        }
    }
}

impl CostFit {
    /// Takes one measured step.
    pub fn add(&mut self, sample: &StepSample) {
        let raw = [
            1.0,
            f64::from(sample.n_prefill_tokens),
            f64::from(sample.n_decode_tokens),
            sample.n_context_tokens as f64,
        ];
        let row: [f64; 4] = std::array::from_fn(|i| raw[i] / COLUMN_SCALE[i]);
        for i in 0..4 {
            for j in 0..4 {
                self.gram[i][j] = self.gram[i][j] * FORGET + row[i] * row[j];
            }
            self.moment[i] = self.moment[i] * FORGET + row[i] * sample.duration.0 as f64;
        }
        self.n_samples += 1;
    }

    /// The fitted model with the transfer terms of `prior`, or `None` while there are too few steps. Terms the steps say
    /// nothing about stay near those of `prior`; none is negative.
    pub fn model(&self, prior: &CostModel) -> Option<CostModel> {
        if self.n_samples < MIN_SAMPLES {
            return None;
        }
        let prior_terms = [
            prior.step_base_ns,
            prior.prefill_ns_per_token,
            prior.decode_ns_per_token,
            prior.attention_ns_per_context_token,
        ];
        let mut matrix = self.gram;
        let mut rhs = self.moment;
        let ridge = 1e-4 * (0..4).map(|i| matrix[i][i]).sum::<f64>().max(1e-9);
        for i in 0..4 {
            matrix[i][i] += ridge;
            rhs[i] += ridge * prior_terms[i] * COLUMN_SCALE[i];
        }
        let solved = solve(matrix, rhs)?;
        let terms: [f64; 4] = std::array::from_fn(|i| (solved[i] / COLUMN_SCALE[i]).max(0.0));
        Some(CostModel {
            step_base_ns: terms[0],
            prefill_ns_per_token: terms[1],
            decode_ns_per_token: terms[2],
            attention_ns_per_context_token: terms[3],
            ..prior.clone()
        })
    }
}

/// Gaussian elimination with partial pivoting.
fn solve(mut matrix: [[f64; 4]; 4], mut rhs: [f64; 4]) -> Option<[f64; 4]> {
    for column in 0..4 {
        let pivot = (column..4).max_by(|&a, &b| matrix[a][column].abs().total_cmp(&matrix[b][column].abs()))?;
        if matrix[pivot][column].abs() < 1e-12 {
            return None;
        }
        matrix.swap(column, pivot);
        rhs.swap(column, pivot);
        for row in column + 1..4 {
            let factor = matrix[row][column] / matrix[column][column];
            let pivot_row = matrix[column];
            for (entry, pivot_entry) in matrix[row].iter_mut().zip(pivot_row).skip(column) {
                *entry -= factor * pivot_entry;
            }
            rhs[row] -= factor * rhs[column];
        }
    }
    let mut solution = [0.0; 4];
    for row in (0..4).rev() {
        let known: f64 = (row + 1..4).map(|k| matrix[row][k] * solution[k]).sum();
        solution[row] = (rhs[row] - known) / matrix[row][row];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_the_terms_it_was_fed() {
        let truth = CostModel {
            step_base_ns: 8e7,
            prefill_ns_per_token: 6.5e6,
            decode_ns_per_token: 9e5,
            attention_ns_per_context_token: 250.0,
            ..CostModel::default()
        };
        let mut fit = CostFit::default();
        assert!(fit.model(&CostModel::default()).is_none());
        for i in 0..2000u64 {
            let (prefill, decode) = if i % 3 == 0 {
                (i * 37 % 512, 0)
            } else {
                (0, i * 11 % 64)
            };
            let context = (prefill + decode) * (i * 97 % 3000);
            fit.add(&StepSample {
                n_prefill_tokens: prefill as u32,
                n_decode_tokens: decode as u32,
                n_context_tokens: context,
                duration: truth.step(prefill, decode, context),
            });
        }
        let model = fit.model(&CostModel::default()).unwrap();
        for (prefill, decode, context) in [(512, 0, 131_328), (0, 1, 1000), (0, 64, 64_000), (256, 16, 50_000)] {
            let (expected, found) = (
                truth.step(prefill, decode, context).0,
                model.step(prefill, decode, context).0,
            );
            let ratio = found as f64 / expected as f64;
            assert!((0.97..1.03).contains(&ratio), "{prefill}/{decode}/{context}: {ratio}");
        }
    }

    #[test]
    fn what_was_never_seen_stays_with_the_prior() {
        let prior = CostModel {
            prefill_ns_per_token: 123.0,
            ..CostModel::default()
        };
        let mut fit = CostFit::default();
        for i in 0..100u32 {
            fit.add(&StepSample {
                n_prefill_tokens: 0,
                n_decode_tokens: 1 + i % 8,
                n_context_tokens: 100,
                duration: Nanos(1_000_000),
            });
        }
        let model = fit.model(&prior).unwrap();
        assert!((model.prefill_ns_per_token - 123.0).abs() < 1.0, "{model:?}");
    }

    #[test]
    fn the_profile_file_round_trips_and_refuses_unknown_keys() {
        let text = toml::to_string(&CostModel::default()).unwrap();
        assert_eq!(toml::from_str::<CostModel>(&text).unwrap(), CostModel::default());
        assert!(toml::from_str::<CostModel>(&format!("{text}prefil_ns = 1.0\n")).is_err());
    }
}
