//! Products: close to the reference, and where a device promises it, a row's bits are its own.

use baton_kernels::reference;

use super::{TestDevice, Values, assert_close, bits, matrix, unit};

/// `[rows, n_in, n_out]`: one, primes, tiles and one past them.
pub const ODD_SIZES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (1, 2, 3),
    (3, 7, 65),
    (2, 64, 64),
    (5, 129, 63),
    (7, 127, 130),
    (13, 257, 192),
    (17, 300, 67),
];

fn product<B: TestDevice>(device: &B, x: &[f32], w: &B::Matrix, n_in: usize, n_out: usize) -> Vec<f32> {
    let rows = x.len() / n_in;
    let mut out = device.tensor(rows, n_out).unwrap();
    device.linear(&mut out, &device.filled(n_in, x), w);
    device.to_host(&out).to_vec()
}

pub fn are_close<B: TestDevice>(device: &B, (rows, n_in, n_out): (usize, usize, usize)) {
    let mut values = Values(1);
    let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
    let round = |values| reference::round(device.compute_dtype(), values);
    let expected = reference::linear(&round(&x), &round(&w), n_in);
    let w = matrix(device, n_out, n_in, &w);
    // Sums of n_in products below 1, added in f32 one after the other.
    let sums = 3e-7 * n_in as f32;
    let found = product(device, &x, &w, n_in, n_out);
    assert_close(device, &found, &expected, sums + unit(device.stored()));
    // Logits keep what the sums have.
    let mut logits = device.logits(rows, n_out).unwrap();
    device.linear(&mut logits, &device.filled(n_in, &x), &w);
    assert_close(device, &device.to_host(&logits), &expected, sums);
}

/// Rows one by one on `alone`, and in batches on `device`: the same bits.
pub fn rows_are_independent<B: TestDevice>(
    alone: &B,
    device: &B,
    (rows, n_in, n_out): (usize, usize, usize),
    batches: &[usize],
) {
    let mut values = Values(2);
    let (x, w) = (values.vec(rows * n_in), values.vec(n_out * n_in));
    let in_batches = |device: &B, batch: usize| -> Vec<f32> {
        let w = matrix(device, n_out, n_in, &w);
        x.chunks(batch * n_in)
            .flat_map(|x| product(device, x, &w, n_in, n_out))
            .collect()
    };
    let expected = bits(&in_batches(alone, 1));
    for &batch in batches {
        assert!(
            bits(&in_batches(device, batch)) == expected,
            "{}: {batch} rows",
            device.numerics_class()
        );
    }
}
