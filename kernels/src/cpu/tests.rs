//! What of the CPU device is not an operator of `Backend`: the vector exponential, the choice of experts, and what options are
//! refused. The operators are tested in `kernels/tests/cpu_device`, by the bodies that every device shares.

use super::moe::{Chosen, route};
use super::*;
use crate::packed::{Packing, SourceTensor, WeightKind, WeightSource, WeightSpec};

/// Runs the vector exponential on slices of any length.
struct ExpAll<'a>(&'a mut [f32]);

impl simd::Kernel for ExpAll<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: simd::Simd>(self, simd: S) {
        for chunk in self.0.chunks_mut(simd::LANES) {
            // SAFETY: chunk.len() <= 16.
            unsafe {
                let x = simd.load_partial(chunk.as_ptr(), chunk.len(), 0.0);
                simd.store_partial(chunk.as_mut_ptr(), chunk.len(), simd.exp(x));
            }
        }
    }
}

#[test]
fn exp_is_accurate_over_its_range_and_exact_at_its_ends() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let x: Vec<f32> = (0..100_003).map(|i| -87.3 + 175.6 * i as f32 / 100_003.0).collect();
        let mut y = x.clone();
        dispatch::dispatch(isa, ExpAll(&mut y));
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - exact).abs() <= 3e-7 * exact,
                "{isa}: exp({x}) = {y}, expected {exact}"
            );
        }
        let mut ends = [f32::NEG_INFINITY, -88.0, 0.0, f32::INFINITY, f32::NAN];
        dispatch::dispatch(isa, ExpAll(&mut ends));
        assert_eq!(ends[..3], [0.0, 0.0, 1.0], "{isa}");
        assert!(ends[3] > 2e38 && ends[4].is_nan(), "{isa}: {ends:?}");
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

/// One matrix of one element.
struct One;

impl WeightSource for One {
    fn tensor(&self, _name: &str) -> Result<SourceTensor<'_>, String> {
        Ok(SourceTensor {
            dtype: DType::F32,
            shape: vec![1, 1],
            data: 1.0_f32.to_le_bytes().to_vec().into(),
        })
    }
}

#[test]
fn options_that_cannot_work_are_refused() {
    let options = CpuOptions {
        n_threads: 1,
        dtype: DType::F16,
        isa: None,
    };
    assert!(matches!(
        Cpu::new(options),
        Err(KernelError::UnsupportedDType { dtype: DType::F16, .. })
    ));
    assert!(matches!(
        Cpu::new(CpuOptions {
            n_threads: 0,
            dtype: DType::F32,
            isa: None
        }),
        Err(KernelError::Threads { .. })
    ));
    let cpu = Cpu::new(CpuOptions {
        n_threads: 2,
        dtype: DType::Bf16,
        isa: Some(Isa::Portable),
    })
    .unwrap();
    assert_eq!(
        (cpu.numerics_class().as_str(), cpu.n_threads()),
        ("cpu-portable-bf16", 2)
    );
    let spec = WeightSpec {
        name: "w".to_owned(),
        kind: WeightKind::Matrix { n_out: 1, n_in: 1 },
        parts: vec!["w".to_owned()],
    };
    let packed = PackedWeights::in_memory(Packing::Panels, DType::F32, &[spec], &One).unwrap();
    assert!(matches!(
        cpu.matrix(&packed, "w"),
        Err(KernelError::DTypeMismatch { .. })
    ));
    assert!(matches!(
        cpu.vector(&packed, "w"),
        Err(KernelError::MissingWeight { kind: "vector", .. })
    ));
}
