//! Operators over rows and products, by the bodies that every device shares; and what only a card has.

use baton_kernels::cuda::{CudaMeasure, CudaMode};
use baton_kernels::{Backend, DType};

use crate::bodies::{products, rows};
use crate::support::{DTYPES, MODES, Weights, device};

#[test]
fn products_are_close_to_the_reference_on_odd_sizes() {
    for (dtype, mode) in DTYPES.into_iter().flat_map(|dtype| MODES.map(|mode| (dtype, mode))) {
        let Some(cuda) = device(dtype, mode, 64) else { return };
        for size in products::ODD_SIZES {
            products::are_close(&cuda, size);
        }
    }
}

/// In both tilings, whole 16-byte chunks or not.
#[test]
fn deterministic_products_have_the_same_bits_in_any_batch() {
    for dtype in DTYPES {
        let Some(cuda) = device(dtype, CudaMode::Deterministic, 64) else {
            return;
        };
        for (n_in, n_out) in [(96, 70), (39, 20)] {
            products::rows_are_independent(&cuda, &cuda, (35, n_in, n_out), &[2, 16, 17, 35]);
        }
    }
}

#[test]
fn row_operators_are_close_to_the_reference_and_row_independent() {
    for dtype in DTYPES {
        let Some(cuda) = device(dtype, CudaMode::Fast, 64) else {
            return;
        };
        for size in rows::ODD_SIZES {
            rows::are_close(&cuda, size);
        }
    }
}

#[test]
fn embed_and_gather_return_the_rows_asked_for() {
    for dtype in DTYPES {
        let Some(cuda) = device(dtype, CudaMode::Fast, 64) else {
            return;
        };
        rows::are_found_again(&cuda);
    }
}

/// Instances of equal classes may give each other's blocks to their prefix caches, so whatever changes bits is in the name.
#[test]
fn a_class_names_card_dtype_and_mode() {
    let mut classes = Vec::new();
    for (dtype, mode) in DTYPES.into_iter().flat_map(|dtype| MODES.map(|mode| (dtype, mode))) {
        let Some(cuda) = device(dtype, mode, 64) else { return };
        let suffix = match mode {
            CudaMode::Fast => "",
            CudaMode::Deterministic => "-deterministic",
        };
        let capability = cuda.card().capability;
        assert_eq!(cuda.numerics_class(), format!("cuda-sm{capability}-{dtype}{suffix}"));
        classes.push(cuda.numerics_class());
    }
    classes.sort();
    classes.dedup();
    assert_eq!(classes.len(), DTYPES.len() * MODES.len());
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
