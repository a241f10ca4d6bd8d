//! Operators over rows: close to the reference, each row by itself, and rows found again where they were put.

use baton_kernels::{Activation, reference};

use super::{TestDevice, Values, assert_close, bits, matrix, unit, vector};

/// `[rows, cols]`
pub const ODD_SIZES: [(usize, usize); 5] = [(1, 1), (3, 17), (5, 64), (33, 523), (2, 2048)];

const ACTIVATIONS: [Activation; 3] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::ClampedSwish {
        alpha: 1.702,
        limit: 7.0,
    },
];

pub fn are_close<B: TestDevice>(device: &B, (rows, cols): (usize, usize)) {
    let round = |values: Vec<f32>| reference::round(device.stored(), &values);
    let mut values = Values(3);
    let (x, y) = (round(values.vec(rows * cols)), round(values.vec(rows * cols)));
    let weight = values.vec(cols);
    let gate_up = round(values.vec(rows * 2 * cols).iter().map(|x| 12.0 * x).collect());
    let sums = round(x.iter().zip(&y).map(|(x, y)| x + y).collect());
    // Roots and exponentials of f32 may be some units off.
    let tolerance = 2e-5_f32.max(unit(device.stored()));
    let weight_on_device = vector(device, &weight);

    let mut out = device.tensor(rows, cols).unwrap();
    device.rms_norm(&mut out, &device.filled(cols, &x), &weight_on_device, 1e-5);
    let expected = reference::rms_norm(&x, &weight, 1e-5);
    assert_close(device, &device.to_host(&out), &expected, tolerance);

    let mut residual = device.filled(cols, &x);
    device.add_rms_norm(
        &mut out,
        &mut residual,
        &device.filled(cols, &y),
        &weight_on_device,
        1e-5,
    );
    assert_eq!(bits(&device.to_host(&residual)), bits(&sums));
    let batch = device.to_host(&out).to_vec();
    assert_close(device, &batch, &reference::rms_norm(&sums, &weight, 1e-5), tolerance);
    for (row, expected) in sums.chunks_exact(cols).zip(batch.chunks_exact(cols)) {
        let mut one = device.tensor(1, cols).unwrap();
        device.rms_norm(&mut one, &device.filled(cols, row), &weight_on_device, 1e-5);
        assert_eq!(
            bits(&device.to_host(&one)),
            bits(expected),
            "a norm knows its row alone"
        );
    }

    for activation in ACTIVATIONS {
        device.gated(&mut out, &device.filled(2 * cols, &gate_up), activation);
        let expected = reference::gated(&gate_up, cols, activation);
        assert_close(device, &device.to_host(&out), &expected, tolerance);
    }

    let mut capped = device.filled(2 * cols, &gate_up);
    device.soft_cap(&mut capped, 8.0);
    let expected: Vec<f32> = gate_up
        .iter()
        .map(|x| (8.0 * (f64::from(*x) / 8.0).tanh()) as f32)
        .collect();
    assert_close(device, &device.to_host(&capped), &expected, tolerance);

    let mut sum = device.filled(cols, &x);
    device.add(&mut sum, &device.filled(cols, &y));
    assert_eq!(bits(&device.to_host(&sum)), bits(&sums));
    // What was fetched is not what stands there after the next operator.
    device.add_bias(&mut sum, &weight_on_device);
    let biased = sums.iter().zip(weight.iter().cycle()).map(|(x, bias)| x + bias);
    assert_eq!(bits(&device.to_host(&sum)), bits(&round(biased.collect())));
}

pub fn are_found_again<B: TestDevice>(device: &B) {
    let (vocab, hidden) = (131, 37);
    let table = Values(4).vec(vocab * hidden);
    let ids = [0, 130, 64, 63, 64, 7];
    let rounded = reference::round(device.compute_dtype(), &table);
    let table = matrix(device, vocab, hidden, &table);
    let row = |id: usize| rounded[id * hidden..][..hidden].to_vec();
    let expected: Vec<f32> = ids.iter().flat_map(|id| row(*id as usize)).collect();
    device.begin_step();
    let mut out = device.tensor(6, hidden).unwrap();
    device.embed(&mut out, &table, &ids, 1.0);
    let mut twice = device.tensor(6, hidden).unwrap();
    // Two steps later the ids' memory is used again; the first steps must be through with it.
    for scale in [3.0, 5.0, 2.0] {
        device.begin_step();
        device.embed(&mut twice, &table, &ids, scale);
    }
    assert_eq!(device.to_host(&out)[..], expected);
    let doubled: Vec<f32> = expected.iter().map(|x| 2.0 * x).collect();
    assert_eq!(device.to_host(&twice)[..], doubled);
    let mut some = device.tensor(3, hidden).unwrap();
    device.gather_rows(&mut some, &out, &[5, 0]);
    assert_eq!(device.to_host(&some)[..], [row(7), row(0)].concat());
    device.gather_rows(&mut some, &out, &[]);
    assert!(device.to_host(&some).is_empty());
}
