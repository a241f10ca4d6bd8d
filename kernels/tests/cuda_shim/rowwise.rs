//! Embedding, norms, and what treats each element alone.

use baton_kernels::cuda::launch;
use baton_kernels::{Activation, DType, reference};

use crate::args;
use crate::harness::*;

/// 1, primes, one past what a thread, a warp and a CTA take at once, and whole vectors.
const COLS: [usize; 9] = [1, 7, 64, 129, 257, 1031, 2048, 2049, 2056];

#[test]
fn embed_and_gather_rows_copy_rows() {
    if !has_compiler() {
        return;
    }
    for dtype in DTYPES {
        for cols in COLS {
            let table = values(1, dtype, 11 * cols);
            let ids = vec![3_u32, 0, 10, 3, 7];
            let rows = |scale: f32| -> Vec<f32> {
                let row = |id: &u32| table[*id as usize * cols..][..cols].iter().map(move |x| scale * x);
                reference::round(dtype, &ids.iter().flat_map(row).collect::<Vec<f32>>())
            };
            let device_table = Matrix::new(dtype, &table);
            let mut out = Matrix::unwritten(dtype, ids.len() * cols);
            let grid = launch::rows(ids.len() as u32);
            let embed = format!("embed_{dtype}");
            launch(
                &embed,
                grid,
                Order::Forward,
                args![&mut out, &device_table, &ids, 1.7_f32, cols as u32],
            );
            assert_eq!(out.values(), rows(1.7), "{embed} of {cols}");
            let mut out = Matrix::unwritten(dtype, ids.len() * cols);
            let gather = format!("gather_rows_{dtype}");
            launch(
                &gather,
                grid,
                Order::Forward,
                args![&mut out, &device_table, &ids, cols as u32],
            );
            assert_eq!(out.values(), rows(1.0), "{gather} of {cols}");
        }
    }
}

#[test]
fn norms_are_the_references() {
    if !has_compiler() {
        return;
    }
    let n_rows = 3;
    for dtype in DTYPES {
        for cols in COLS {
            let x = values(2, dtype, n_rows * cols);
            let residual = values(3, dtype, n_rows * cols);
            let weight = values(4, DType::F32, cols);
            let device_x = Matrix::new(dtype, &x);
            let grid = launch::rows(n_rows as u32);

            let name = format!("rms_norm_{dtype}");
            let found = in_both_orders(&name, |order| {
                let mut out = Matrix::unwritten(dtype, n_rows * cols);
                launch(
                    &name,
                    grid,
                    order,
                    args![&mut out, &device_x, &weight, 1e-5_f32, cols as u32],
                );
                out
            });
            let what = format!("{name} of {cols}");
            assert_close(&what, dtype, &found.values(), &reference::rms_norm(&x, &weight, 1e-5));

            let name = format!("add_rms_norm_{dtype}");
            let (out, sum) = in_both_orders(&name, |order| {
                let mut out = Matrix::unwritten(dtype, n_rows * cols);
                let mut sum = Matrix::new(dtype, &residual);
                launch(
                    &name,
                    grid,
                    order,
                    args![&mut out, &mut sum, &device_x, &weight, 1e-5_f32, cols as u32],
                );
                (out, sum)
            });
            let expected: Vec<f32> = residual.iter().zip(&x).map(|(a, b)| a + b).collect();
            let expected = reference::round(dtype, &expected);
            assert_eq!(sum.values(), expected, "{name} of {cols}");
            let what = format!("{name} of {cols}");
            assert_close(
                &what,
                dtype,
                &out.values(),
                &reference::rms_norm(&expected, &weight, 1e-5),
            );
        }
    }
}

/// A row's norm does not depend on which rows stand beside it.
#[test]
fn a_norm_knows_its_row_alone() {
    if !has_compiler() {
        return;
    }
    let cols = 1031;
    let x = values(5, DType::Bf16, 4 * cols);
    let weight = values(6, DType::F32, cols);
    let norm = |rows: &[f32]| {
        let mut out = Matrix::unwritten(DType::Bf16, rows.len());
        let grid = launch::rows((rows.len() / cols) as u32);
        let x = Matrix::new(DType::Bf16, rows);
        launch(
            "rms_norm_bf16",
            grid,
            Order::Forward,
            args![&mut out, &x, &weight, 1e-6_f32, cols as u32],
        );
        out.values()
    };
    let all = norm(&x);
    for (row, expected) in x.chunks_exact(cols).zip(all.chunks_exact(cols)) {
        assert_eq!(norm(row), expected);
    }
}

#[test]
fn elementwise_operators_are_the_references() {
    if !has_compiler() {
        return;
    }
    for dtype in DTYPES {
        for (n_rows, cols) in [(1, 1), (1, 7), (3, 8), (5, 129), (3, 1031), (2, 2056)] {
            let n = n_rows * cols;
            let (x, y) = (values(7, dtype, n), values(8, dtype, n));
            let bias = values(9, DType::F32, cols);
            let grid = launch::elements(n as u64);
            let check = |name: &str, expected: Vec<f32>, args: &dyn Fn(&mut Matrix) -> Vec<Arg>| {
                let entry = format!("{name}_{dtype}");
                let mut out = Matrix::new(dtype, &x);
                let args = args(&mut out);
                launch(&entry, grid, Order::Forward, &args);
                assert_close(
                    &format!("{entry} of {n_rows} x {cols}"),
                    dtype,
                    &out.values(),
                    &expected,
                );
            };
            let device_y = Matrix::new(dtype, &y);
            let sums = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            check("add", sums, &|out| args![out, &device_y, n as u64].to_vec());
            let sums = x.iter().enumerate().map(|(i, x)| x + bias[i % cols]).collect();
            check("add_bias", sums, &|out| {
                args![out, &bias, n as u64, cols as u32].to_vec()
            });
            let capped = x.iter().map(|x| 0.4 * (x / 0.4).tanh()).collect();
            check("soft_cap", capped, &|out| args![out, n as u64, 0.4_f32].to_vec());
        }
    }
}

#[test]
fn gated_activations_are_the_references() {
    if !has_compiler() {
        return;
    }
    let (alpha, limit) = (1.702, 3.0);
    let activations = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::ClampedSwish { alpha, limit },
    ];
    for dtype in DTYPES {
        for (n_rows, ffn) in [(1, 1), (3, 7), (2, 8), (3, 129), (2, 1031), (1, 2056)] {
            // Far enough out that the sigmoid saturates and the clamp acts.
            let gate_up: Vec<f32> = values(10, dtype, n_rows * 2 * ffn).iter().map(|x| 16.0 * x).collect();
            let gate_up = reference::round(dtype, &gate_up);
            let device = Matrix::new(dtype, &gate_up);
            for (number, activation) in activations.into_iter().enumerate() {
                let n = n_rows * ffn;
                let mut out = Matrix::unwritten(dtype, n);
                let args = args![&mut out, &device, n as u64, ffn as u32, number as u32, alpha, limit];
                launch(
                    &format!("gated_{dtype}"),
                    launch::elements(n as u64),
                    Order::Forward,
                    args,
                );
                let what = format!("{activation:?} in {dtype} of {n_rows} x {ffn}");
                assert_close(
                    &what,
                    dtype,
                    &out.values(),
                    &reference::gated(&gate_up, ffn, activation),
                );
            }
        }
    }
}

/// Every f16 and bf16 to f32 and back, and f32 at and beside the values where rounding turns.
#[test]
fn conversions_round_to_nearest_even() {
    if !has_compiler() {
        return;
    }
    let run = |entry: &str, to: DType, x: &Matrix, n: usize| {
        let mut out = Matrix::unwritten(to, n);
        launch(
            entry,
            launch::elements(n as u64),
            Order::Forward,
            args![&mut out, x, n as u64],
        );
        out.values()
    };
    for dtype in [DType::F16, DType::Bf16] {
        let all: Vec<f32> = (0..=u16::MAX)
            .map(|bits| match dtype {
                DType::F16 => half::f16::from_bits(bits).to_f32(),
                DType::F32 | DType::Bf16 => half::bf16::from_bits(bits).to_f32(),
            })
            .filter(|x| !x.is_nan())
            .collect();
        let narrow = Matrix::new(dtype, &all);
        assert_eq!(
            run(&format!("convert_{dtype}_f32"), DType::F32, &narrow, all.len()),
            all
        );
        let between: Vec<f32> = all
            .iter()
            .filter(|x| x.is_finite())
            .flat_map(|x| {
                let half_way = match dtype {
                    DType::F16 => 1 << 12,
                    DType::F32 | DType::Bf16 => 1 << 15,
                };
                [-1_i32, 0, 1].map(|offset| f32::from_bits(x.to_bits().wrapping_add_signed(half_way + offset)))
            })
            .chain([0.0, -0.0, 1e-30, -1e-30, 65519.9, 65520.0, f32::MAX, f32::INFINITY])
            .filter(|x| !x.is_nan())
            .collect();
        let wide = Matrix::new(DType::F32, &between);
        let found = run(&format!("convert_f32_{dtype}"), dtype, &wide, between.len());
        assert_eq!(found, reference::round(dtype, &between));
    }
}
