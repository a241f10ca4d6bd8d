//! Mixtures of experts: each row's weighted sum is the reference's, whichever experts the others chose and whoever they are.

use baton_kernels::{Activation, DType, ExpertNames, MoeParams, reference};

use super::{TestDevice, Values, Weights, assert_close, bits};

/// How large a mixture is.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    pub rows: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub n_experts: usize,
    pub top_k: usize,
    pub bias: Bias,
    pub renormalize: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    With,
    Without,
}

const fn mixture(rows: usize, sizes: [usize; 4], bias: Bias, renormalize: bool) -> Mixture {
    let [hidden, ffn, n_experts, top_k] = sizes;
    Mixture {
        rows,
        hidden,
        ffn,
        n_experts,
        top_k,
        bias,
        renormalize,
    }
}

/// One expert, experts without rows, more rows than a tile, rows of odd lengths.
pub const ODD_SIZES: [Mixture; 6] = [
    mixture(1, [24, 17, 1, 1], Bias::Without, true),
    mixture(7, [24, 17, 5, 2], Bias::With, true),
    mixture(70, [24, 17, 3, 2], Bias::Without, false),
    mixture(9, [24, 17, 32, 4], Bias::With, true),
    mixture(43, [37, 21, 7, 3], Bias::With, false),
    mixture(43, [37, 21, 7, 3], Bias::With, true),
];

/// An expert's matrices, and biases that are zeros where it has none.
struct Expert {
    gate_up: Vec<f32>,
    gate_up_bias: Vec<f32>,
    down: Vec<f32>,
    down_bias: Vec<f32>,
}

pub fn rows_are_sums_of_their_experts<B: TestDevice>(device: &B, mixture: Mixture) {
    let Mixture {
        rows,
        hidden,
        ffn,
        n_experts,
        top_k,
        bias,
        renormalize,
    } = mixture;
    let dtype = device.compute_dtype();
    let mut values = Values(9);
    let mut vec = |len: usize| reference::round(dtype, &values.vec(len));
    let experts: Vec<Expert> = (0..n_experts)
        .map(|_| Expert {
            gate_up: vec(2 * ffn * hidden),
            down: vec(hidden * ffn),
            gate_up_bias: if bias == Bias::With {
                vec(2 * ffn)
            } else {
                vec![0.0; 2 * ffn]
            },
            down_bias: if bias == Bias::With {
                vec(hidden)
            } else {
                vec![0.0; hidden]
            },
        })
        .collect();
    let x = vec(rows * hidden);
    // Some are equal: the smaller number is chosen first.
    let logits: Vec<f32> = vec(rows * n_experts).iter().map(|x| (4.0 * x).round()).collect();

    let (mut weights, mut names) = (Weights::default(), Vec::new());
    for (idx, expert) in experts.iter().enumerate() {
        let name = |of: &str| format!("{idx}.{of}");
        weights = weights
            .matrix(&name("gate_up"), 2 * ffn, hidden, &expert.gate_up)
            .matrix(&name("down"), hidden, ffn, &expert.down)
            .vector(&name("gate_up_bias"), &expert.gate_up_bias)
            .vector(&name("down_bias"), &expert.down_bias);
        names.push(ExpertNames {
            gate_up: name("gate_up"),
            gate_up_bias: (bias == Bias::With).then(|| name("gate_up_bias")),
            down: name("down"),
            down_bias: (bias == Bias::With).then(|| name("down_bias")),
        });
    }
    let on_device = device.experts(&weights.pack_for(device), &names).unwrap();
    let params = MoeParams {
        top_k,
        renormalize,
        activation: Activation::Silu,
    };
    let run = |x: &[f32], logits: &[f32]| {
        device.begin_step();
        let mut out = device.tensor(x.len() / hidden, hidden).unwrap();
        let router_logits = device.filled(n_experts, logits);
        device.moe(&mut out, &device.filled(hidden, x), &router_logits, &on_device, params);
        device.to_host(&out).to_vec()
    };

    let experts: Vec<reference::Expert<'_>> = experts
        .iter()
        .map(|expert| reference::Expert {
            gate_up: &expert.gate_up,
            gate_up_bias: &expert.gate_up_bias,
            down: &expert.down,
            down_bias: &expert.down_bias,
        })
        .collect();
    let expected: Vec<f32> = (x.chunks(hidden).zip(logits.chunks(n_experts)))
        .flat_map(|(x, logits)| reference::moe_row(x, logits, &experts, params))
        .collect();
    let found = run(&x, &logits);
    // In 16 bits what is between the two products rounds too.
    let tolerance = match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 8e-3,
        DType::Bf16 => 6e-2,
    };
    assert_close(device, &found, &expected, tolerance);
    for row in [0, rows / 2, rows - 1] {
        let alone = run(&x[row * hidden..][..hidden], &logits[row * n_experts..][..n_experts]);
        let class = device.numerics_class();
        assert_eq!(
            bits(&alone),
            bits(&found[row * hidden..][..hidden]),
            "{class}: row {row} of {mixture:?}"
        );
    }
}
