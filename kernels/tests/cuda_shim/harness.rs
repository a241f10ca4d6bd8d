//! Operands in a device's element types, made-up values, and comparison with the reference.

use baton_kernels::{DType, reference};

pub use crate::library::{Arg, NULL, Order, has_compiler, launch, launch_for_head_dim};

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// A matrix as the device has it. Exactly as large as its elements, so that a sanitizer sees what runs over.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub dtype: DType,
    bytes: Vec<u8>,
}

impl Matrix {
    pub fn new(dtype: DType, values: &[f32]) -> Matrix {
        let bytes = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values
                .iter()
                .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
                .collect(),
            DType::Bf16 => values
                .iter()
                .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                .collect(),
        };
        Matrix { dtype, bytes }
    }

    /// `n` elements that no kernel has written: NaN.
    pub fn unwritten(dtype: DType, n: usize) -> Matrix {
        Matrix {
            dtype,
            bytes: vec![0xff; n * dtype.size()],
        }
    }

    pub fn values(&self) -> Vec<f32> {
        let pairs = || self.bytes.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
        match self.dtype {
            DType::F32 => self
                .bytes
                .chunks_exact(4)
                .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
                .collect(),
            DType::F16 => pairs().map(|x| half::f16::from_le_bytes(x).to_f32()).collect(),
            DType::Bf16 => pairs().map(|x| half::bf16::from_le_bytes(x).to_f32()).collect(),
        }
    }

    /// Where its elements lie.
    pub fn address(&self) -> u64 {
        self.bytes.as_ptr() as u64
    }
}

impl From<&Matrix> for Arg {
    fn from(matrix: &Matrix) -> Arg {
        Arg::from(&matrix.bytes)
    }
}

impl From<&mut Matrix> for Arg {
    fn from(matrix: &mut Matrix) -> Arg {
        Arg::from(&mut matrix.bytes)
    }
}

/// Made-up values in -1..1, the same for the same seed, and as the type can hold them.
pub fn values(seed: u64, dtype: DType, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..8).for_each(|_| {
        next();
    });
    reference::round(dtype, &(0..n).map(|_| next()).collect::<Vec<_>>())
}

/// Arguments of a launch.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::harness::Arg::from($arg)),*] };
}

/// The outcome of `run`, the same in both orders of a CTA's threads.
pub fn in_both_orders<T: PartialEq>(what: &str, run: impl Fn(Order) -> T) -> T {
    let outcome = run(Order::Forward);
    assert!(
        outcome == run(Order::Reversed),
        "{what}: depends on the order of threads: a barrier is missing"
    );
    outcome
}

/// Relative tolerance of a result rounded once to a type.
pub fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 2e-3,
        DType::Bf16 => 1.2e-2,
    }
}

/// Fails where `found` is further from `expected` than the type's tolerance, `n_roundings` times over.
#[track_caller]
pub fn assert_close_after(what: &str, dtype: DType, n_roundings: f32, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    // Where large terms cancel, the error is theirs.
    let scale = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs())).max(1e-3);
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = n_roundings * tolerance(dtype) * (expected.abs() + 0.1 * scale);
        assert!(
            (found - expected).abs() <= bound,
            "{what}: element {i} is {found}, expected {expected} within {bound}"
        );
    }
}

/// Fails where `found` is further from `expected` than the type's tolerance.
#[track_caller]
pub fn assert_close(what: &str, dtype: DType, found: &[f32], expected: &[f32]) {
    assert_close_after(what, dtype, 1.0, found, expected);
}
