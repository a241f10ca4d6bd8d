//! Mixtures of experts: each row's weighted sum is the reference's, whichever experts the others chose.

use baton_kernels::cuda::CudaMode;
use baton_kernels::{Activation, Backend, DType, ExpertNames, MoeParams, reference};

use crate::support::{Values, Weights, assert_close, device, tensor};

#[test]
fn each_row_is_the_sum_of_its_experts() {
    let (hidden, ffn) = (24, 17);
    for (rows, n_experts, top_k, has_bias, renormalize) in [
        (1, 1, 1, false, true),
        (7, 5, 2, true, true),
        (70, 3, 2, false, false),
        (9, 32, 4, true, true),
    ] {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::Bf16, 4e-2)] {
            for mode in [CudaMode::Fast, CudaMode::Deterministic] {
                let Some(cuda) = device(dtype, mode, 64) else { return };
                let mut values = Values(9);
                let mut vec = |len: usize| reference::round(dtype, &values.vec(len));
                let mut weights = Weights::default();
                let mut models = Vec::new();
                let names: Vec<ExpertNames> = (0..n_experts)
                    .map(|expert| {
                        let name = |of: &str| format!("{expert}.{of}");
                        let bias = |len: usize, vec: &mut dyn FnMut(usize) -> Vec<f32>| {
                            if has_bias { vec(len) } else { vec![0.0; len] }
                        };
                        let gate_up = vec(2 * ffn * hidden);
                        let down = vec(hidden * ffn);
                        let gate_up_bias = bias(2 * ffn, &mut vec);
                        let down_bias = bias(hidden, &mut vec);
                        weights = std::mem::take(&mut weights)
                            .matrix(&name("gate_up"), 2 * ffn, hidden, &gate_up)
                            .matrix(&name("down"), hidden, ffn, &down)
                            .vector(&name("gate_up_bias"), &gate_up_bias)
                            .vector(&name("down_bias"), &down_bias);
                        models.push((gate_up, gate_up_bias, down, down_bias));
                        ExpertNames {
                            gate_up: name("gate_up"),
                            gate_up_bias: has_bias.then(|| name("gate_up_bias")),
                            down: name("down"),
                            down_bias: has_bias.then(|| name("down_bias")),
                        }
                    })
                    .collect();
                let x = vec(rows * hidden);
                // Some are equal: the smaller number is chosen first.
                let logits: Vec<f32> = vec(rows * n_experts).iter().map(|x| (4.0 * x).round()).collect();
                let params = MoeParams {
                    top_k,
                    renormalize,
                    activation: Activation::Silu,
                };
                let experts = cuda.experts(&weights.pack(dtype), &names).unwrap();
                let mut out = cuda.tensor(rows, hidden).unwrap();
                let router_logits = tensor(&cuda, n_experts, &logits);
                cuda.moe(&mut out, &tensor(&cuda, hidden, &x), &router_logits, &experts, params);
                let models: Vec<reference::Expert<'_>> = models
                    .iter()
                    .map(|(gate_up, gate_up_bias, down, down_bias)| reference::Expert {
                        gate_up,
                        gate_up_bias,
                        down,
                        down_bias,
                    })
                    .collect();
                let expected: Vec<f32> = x
                    .chunks(hidden)
                    .zip(logits.chunks(n_experts))
                    .flat_map(|(x, logits)| reference::moe_row(x, logits, &models, params))
                    .collect();
                assert_close(&cuda, &cuda.to_host(&out), &expected, tolerance);
            }
        }
    }
}
