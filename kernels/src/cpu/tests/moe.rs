//! Mixtures of experts: close to the reference, row by row, whoever shares a batch.

use super::*;
use crate::cpu::moe::{Chosen, route};
use crate::reference::Expert;

const HIDDEN: usize = 37;
const FFN: usize = 21;
const EXPERTS: usize = 7;

struct Model {
    gate_up: Vec<f32>,
    gate_up_bias: Vec<f32>,
    down: Vec<f32>,
    down_bias: Vec<f32>,
}

impl Model {
    /// As the device stores it: biases stay as they are.
    fn rounded(&self, dtype: DType) -> Model {
        Model {
            gate_up: reference::round(dtype, &self.gate_up),
            gate_up_bias: self.gate_up_bias.clone(),
            down: reference::round(dtype, &self.down),
            down_bias: self.down_bias.clone(),
        }
    }
}

fn models(seed: u64) -> Vec<Model> {
    let mut values = Values(seed);
    (0..EXPERTS)
        .map(|_| Model {
            gate_up: values.vec(2 * FFN * HIDDEN),
            gate_up_bias: values.vec(2 * FFN),
            down: values.vec(HIDDEN * FFN),
            down_bias: values.vec(HIDDEN),
        })
        .collect()
}

struct Experts<'a>(&'a [Model]);

impl WeightSource for Experts<'_> {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let (kind, idx) = name.split_once('.').ok_or("no such tensor")?;
        let model = &self.0[idx.parse::<usize>().map_err(|error| error.to_string())?];
        let (shape, values) = match kind {
            "gate_up" => (vec![2 * FFN, HIDDEN], &model.gate_up),
            "gate_up_bias" => (vec![2 * FFN], &model.gate_up_bias),
            "down" => (vec![HIDDEN, FFN], &model.down),
            _ => (vec![HIDDEN], &model.down_bias),
        };
        Ok(SourceTensor {
            dtype: DType::F32,
            shape,
            data: Cow::Borrowed(bytemuck::cast_slice(values)),
        })
    }
}

fn pack(dtype: DType, models: &[Model]) -> (std::sync::Arc<PackedWeights>, Vec<ExpertNames>) {
    let name = |kind: &str, idx: usize| format!("{kind}.{idx}");
    let mut specs = Vec::new();
    let mut names = Vec::new();
    for idx in 0..models.len() {
        for (kind, shape) in [
            (
                "gate_up",
                WeightKind::Matrix {
                    n_out: 2 * FFN,
                    n_in: HIDDEN,
                },
            ),
            ("gate_up_bias", WeightKind::Vector { len: 2 * FFN }),
            (
                "down",
                WeightKind::Matrix {
                    n_out: HIDDEN,
                    n_in: FFN,
                },
            ),
            ("down_bias", WeightKind::Vector { len: HIDDEN }),
        ] {
            specs.push(WeightSpec {
                name: name(kind, idx),
                kind: shape,
                parts: vec![name(kind, idx)],
            });
        }
        names.push(ExpertNames {
            gate_up: name("gate_up", idx),
            gate_up_bias: Some(name("gate_up_bias", idx)),
            down: name("down", idx),
            down_bias: Some(name("down_bias", idx)),
        });
    }
    (
        PackedWeights::in_memory(Packing::Panels, dtype, &specs, &Experts(models)).unwrap(),
        names,
    )
}

fn run(cpu: &Cpu, experts: &CpuExperts, x: &[f32], logits: &[f32], params: MoeParams) -> Vec<f32> {
    let x = tensor(cpu, HIDDEN, x);
    let mut out = cpu.tensor(x.rows(), HIDDEN).unwrap();
    cpu.moe(&mut out, &x, &tensor(cpu, EXPERTS, logits), experts, params);
    out.as_slice().to_vec()
}

#[test]
fn experts_are_close_to_the_reference_and_rows_independent() {
    let models = models(11);
    let rows = 43;
    let mut values = Values(12);
    let x = values.vec(rows * HIDDEN);
    let logits: Vec<f32> = values.vec(rows * EXPERTS).iter().map(|x| 3.0 * x).collect();
    for renormalize in [false, true] {
        let params = MoeParams {
            top_k: 3,
            renormalize,
            activation: Activation::Silu,
        };
        for dtype in DTYPES {
            // In bf16 what is between the two products rounds too: that is the tolerance.
            let models: Vec<Model> = models.iter().map(|model| model.rounded(dtype)).collect();
            let x = reference::round(dtype, &x);
            let reference: Vec<Expert<'_>> = models
                .iter()
                .map(|model| Expert {
                    gate_up: &model.gate_up,
                    gate_up_bias: &model.gate_up_bias,
                    down: &model.down,
                    down_bias: &model.down_bias,
                })
                .collect();
            let expected: Vec<f32> = x
                .chunks_exact(HIDDEN)
                .zip(logits.chunks_exact(EXPERTS))
                .flat_map(|(x, logits)| reference::moe_row(x, logits, &reference, params))
                .collect();
            let (packed, names) = pack(dtype, &models);
            for n_threads in [1, 2] {
                for cpu in devices(dtype, n_threads) {
                    let experts = cpu.experts(&packed, &names).unwrap();
                    let found = run(&cpu, &experts, &x, &logits, params);
                    let tolerance = if dtype == DType::F32 { 1e-5 } else { 6e-2 };
                    assert_close(&cpu, &found, &expected, tolerance);
                    for row in [0, 1, 17, 42] {
                        let one = run(
                            &cpu,
                            &experts,
                            &x[row * HIDDEN..][..HIDDEN],
                            &logits[row * EXPERTS..][..EXPERTS],
                            params,
                        );
                        assert_eq!(bits(&one), bits(&found[row * HIDDEN..][..HIDDEN]), "row {row}");
                    }
                }
            }
        }
    }
}

#[test]
fn equal_logits_choose_the_smaller_number_and_weights_are_of_the_softmax() {
    let params = |renormalize| MoeParams {
        top_k: 2,
        renormalize,
        activation: Activation::Silu,
    };
    let (mut chosen, mut order) = (Vec::new(), Vec::new());
    route(&mut chosen, &mut order, &[0.0, 1.0, 1.0, 1.0], 4, params(true));
    let half = |expert| Chosen {
        expert,
        row: 0,
        weight: 0.5,
    };
    assert_eq!(chosen, [half(1), half(2)]);
    route(&mut chosen, &mut order, &[0.0, 0.0, 0.0, 0.0], 4, params(false));
    assert_eq!(
        chosen.iter().map(|chosen| chosen.weight).collect::<Vec<_>>(),
        [0.25, 0.25]
    );
    assert_eq!(chosen.iter().map(|chosen| chosen.expert).collect::<Vec<_>>(), [0, 1]);
}
