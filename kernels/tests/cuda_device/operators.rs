//! Operators over rows and products: close to the reference on odd sizes.

use baton_kernels::cuda::{CudaMeasure, CudaMode};
use baton_kernels::{Activation, Backend, DType, reference};

use crate::support::{DTYPES, MODES, Values, Weights, assert_close, bits, device, tensor, unit};

#[test]
fn products_are_close_to_the_reference_on_odd_sizes() {
    let mut values = Values(1);
    for (rows, n_in, n_out) in [
        (1, 1, 1),
        (1, 2, 3),
        (3, 7, 65),
        (2, 64, 64),
        (5, 129, 63),
        (17, 300, 67),
    ] {
        let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
        for (dtype, mode) in DTYPES.into_iter().flat_map(|dtype| MODES.map(|mode| (dtype, mode))) {
            let Some(cuda) = device(dtype, mode, 64) else { return };
            let expected = reference::linear(&reference::round(dtype, &x), &reference::round(dtype, &w), n_in);
            let packed = Weights::default().matrix("w", n_out, n_in, &w).pack(dtype);
            let w = cuda.matrix(&packed, "w").unwrap();
            let x = tensor(&cuda, n_in, &x);
            let sums = 3e-7 * n_in as f32;
            let mut out = cuda.tensor(rows, n_out).unwrap();
            cuda.linear(&mut out, &x, &w);
            assert_close(&cuda, &cuda.to_host(&out), &expected, sums + unit(dtype));
            // Logits keep what the sums have.
            let mut logits = cuda.logits(rows, n_out).unwrap();
            cuda.linear(&mut logits, &x, &w);
            assert_close(&cuda, &cuda.to_host(&logits), &expected, sums);
        }
    }
}

#[test]
fn row_operators_are_close_to_the_reference() {
    let mut values = Values(3);
    for (rows, cols) in [(1, 1), (3, 17), (5, 64), (33, 523), (2, 2048)] {
        for dtype in DTYPES {
            let round = |values: Vec<f32>| reference::round(dtype, &values);
            let (x, y) = (round(values.vec(rows * cols)), round(values.vec(rows * cols)));
            let weight = values.vec(cols);
            let gate_up = round(values.vec(rows * 2 * cols).iter().map(|x| 12.0 * x).collect());
            let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let Some(cuda) = device(dtype, CudaMode::Fast, 64) else {
                return;
            };
            let tolerance = 2e-5_f32.max(unit(dtype));
            let vector = cuda
                .vector(&Weights::default().vector("v", &weight).pack(dtype), "v")
                .unwrap();

            let mut out = cuda.tensor(rows, cols).unwrap();
            cuda.rms_norm(&mut out, &tensor(&cuda, cols, &x), &vector, 1e-5);
            let expected = reference::rms_norm(&x, &weight, 1e-5);
            assert_close(&cuda, &cuda.to_host(&out), &expected, tolerance);

            let mut residual = tensor(&cuda, cols, &x);
            cuda.add_rms_norm(&mut out, &mut residual, &tensor(&cuda, cols, &y), &vector, 1e-5);
            let rounded = round(sums.clone());
            assert_eq!(bits(&cuda.to_host(&residual)), bits(&rounded));
            let expected = reference::rms_norm(&rounded, &weight, 1e-5);
            assert_close(&cuda, &cuda.to_host(&out), &expected, tolerance);

            for activation in [
                Activation::Silu,
                Activation::GeluTanh,
                Activation::ClampedSwish {
                    alpha: 1.702,
                    limit: 7.0,
                },
            ] {
                cuda.gated(&mut out, &tensor(&cuda, 2 * cols, &gate_up), activation);
                let expected = reference::gated(&gate_up, cols, activation);
                assert_close(&cuda, &cuda.to_host(&out), &expected, tolerance);
            }

            let mut capped = tensor(&cuda, 2 * cols, &gate_up);
            cuda.soft_cap(&mut capped, 8.0);
            let expected: Vec<f32> = gate_up
                .iter()
                .map(|x| (8.0 * (f64::from(*x) / 8.0).tanh()) as f32)
                .collect();
            assert_close(&cuda, &cuda.to_host(&capped), &expected, tolerance);

            let mut sum = tensor(&cuda, cols, &x);
            cuda.add(&mut sum, &tensor(&cuda, cols, &y));
            assert_eq!(bits(&cuda.to_host(&sum)), bits(&rounded));
            // What was fetched is not what stands there after the next operator.
            cuda.add_bias(&mut sum, &vector);
            let biased: Vec<f32> = rounded.iter().zip(weight.iter().cycle()).map(|(x, b)| x + b).collect();
            assert_eq!(bits(&cuda.to_host(&sum)), bits(&round(biased)));
        }
    }
}

#[test]
fn embed_and_gather_return_the_rows_asked_for() {
    let mut values = Values(4);
    let (vocab, hidden) = (131, 37);
    let table = values.vec(vocab * hidden);
    let ids = [0, 130, 64, 63, 64, 7];
    for dtype in DTYPES {
        let Some(cuda) = device(dtype, CudaMode::Fast, 64) else {
            return;
        };
        let packed = Weights::default().matrix("w", vocab, hidden, &table).pack(dtype);
        let rounded = reference::round(dtype, &table);
        let matrix = cuda.matrix(&packed, "w").unwrap();
        let row = |id: usize| rounded[id * hidden..][..hidden].to_vec();
        let expected: Vec<f32> = ids.iter().flat_map(|id| row(*id as usize)).collect();
        let mut out = cuda.tensor(6, hidden).unwrap();
        cuda.embed(&mut out, &matrix, &ids, 1.0);
        let mut twice = cuda.tensor(6, hidden).unwrap();
        // Two steps later the ids' memory is used again; the first steps must be through with it.
        for scale in [3.0, 5.0, 2.0] {
            cuda.begin_step();
            cuda.embed(&mut twice, &matrix, &ids, scale);
        }
        let mut some = cuda.tensor(3, hidden).unwrap();
        cuda.gather_rows(&mut some, &out, &[5, 0]);
        assert_eq!(cuda.to_host(&out)[..], expected);
        let doubled: Vec<f32> = expected.iter().map(|x| 2.0 * x).collect();
        assert_eq!(cuda.to_host(&twice)[..], doubled);
        assert_eq!(some.rows(), 2);
        assert_eq!(cuda.to_host(&some)[..], [row(7), row(0)].concat());
        let mut none = cuda.tensor(3, hidden).unwrap();
        cuda.gather_rows(&mut none, &out, &[]);
        assert!(cuda.to_host(&none).is_empty());
    }
}

#[test]
fn weights_of_another_dtype_are_refused() {
    let Some(cuda) = device(DType::Bf16, CudaMode::Fast, 64) else {
        return;
    };
    let packed = Weights::default().matrix("w", 1, 1, &[1.0]).pack(DType::F16);
    let error = cuda.matrix(&packed, "w").err().unwrap().to_string();
    assert_eq!(error, "packed weights: expected dtype bf16, found f16");
}

/// On the stand-in the numbers mean nothing; that there are some shows that what is measured runs.
#[test]
fn a_card_is_measured() {
    for (mode, has_product) in [(CudaMode::Fast, true), (CudaMode::Deterministic, false)] {
        let Some(cuda) = device(DType::Bf16, mode, 64) else {
            return;
        };
        let sizes = CudaMeasure {
            n_bytes: 1 << 20,
            matrix_dim: 64,
        };
        let limits = cuda.measure(sizes).unwrap();
        let launches = cuda.launch_times().unwrap();
        assert!(launches.one_by_one_us > 0.0 && launches.graph_us > 0.0, "{launches:?}");
        let rates = [
            limits.read_gb_per_s,
            limits.copy_gb_per_s,
            limits.to_host_gb_per_s,
            limits.from_host_gb_per_s,
        ];
        assert!(rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()), "{limits:?}");
        assert_eq!(
            limits.product_tflop_per_s.map(|peak| peak > 0.0),
            has_product.then_some(true)
        );
    }
}
