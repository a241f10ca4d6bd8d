//! A device to test on, values to test with, and comparison.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, CudaPlace, CudaTensor, ImageFolders};
use baton_kernels::{
    Backend, DType, KernelError, PackedWeights, Packing, SourceTensor, WeightKind, WeightSource, WeightSpec,
};

use cudarc::driver::CudaContext;

use crate::stand_in::{self, Driver};

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
pub const MODES: [CudaMode; 2] = [CudaMode::Fast, CudaMode::Deterministic];

/// A device for models with heads of `head_dim`; `None` where there is nothing to test on.
pub fn device(dtype: DType, mode: CudaMode, head_dim: usize) -> Option<Cuda> {
    device_at(dtype, mode, head_dim, CudaPlace::default())
}

/// The same with a place among others.
pub fn device_at(dtype: DType, mode: CudaMode, head_dim: usize, place: CudaPlace) -> Option<Cuda> {
    Some(try_device_at(dtype, mode, head_dim, place)?.unwrap())
}

/// The same where there may be a reason against it.
pub fn try_device_at(
    dtype: DType,
    mode: CudaMode,
    head_dim: usize,
    place: CudaPlace,
) -> Option<Result<Cuda, KernelError>> {
    let driver = stand_in::driver()?;
    if let Driver::Card = driver {
        // A card's context goes with its last user, and to make it again takes longer than most of these tests.
        static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();
        CONTEXT.get_or_init(|| CudaContext::new(0).unwrap());
    }
    let options = CudaOptions {
        ordinal: 0,
        dtype,
        head_dim,
        mode,
        libraries: driver.libraries(),
        images: ImageFolders {
            packaged: None,
            cache: Some(stand_in::image_cache()),
        },
    };
    Some(Cuda::at(options, place))
}

/// A small generator of our own: the tests need values, not quality.
pub struct Values(pub u64);

impl Values {
    pub fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1_u64 << 23) as f32) - 1.0
    }

    pub fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// Named matrices and vectors, from the host's values.
#[derive(Default)]
pub struct Weights {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    specs: Vec<WeightSpec>,
}

impl Weights {
    pub fn matrix(mut self, name: &str, n_out: usize, n_in: usize, values: &[f32]) -> Weights {
        self.add(name, WeightKind::Matrix { n_out, n_in }, vec![n_out, n_in], values);
        self
    }

    pub fn vector(mut self, name: &str, values: &[f32]) -> Weights {
        let len = values.len();
        self.add(name, WeightKind::Vector { len }, vec![len], values);
        self
    }

    fn add(&mut self, name: &str, kind: WeightKind, shape: Vec<usize>, values: &[f32]) {
        self.tensors.insert(name.to_owned(), (shape, values.to_vec()));
        self.specs.push(WeightSpec {
            name: name.to_owned(),
            kind,
            parts: vec![name.to_owned()],
        });
    }

    pub fn pack(&self, dtype: DType) -> Arc<PackedWeights> {
        PackedWeights::in_memory(Packing::Rows, dtype, &self.specs, self).unwrap()
    }

    /// As a model's are, in a file of this folder.
    pub fn pack_into(&self, folder: &std::path::Path, key: &str, dtype: DType) -> Arc<PackedWeights> {
        PackedWeights::open_or_build(folder, key, Packing::Rows, dtype, &self.specs, self, &mut |_, _| {}).unwrap()
    }
}

impl WeightSource for Weights {
    fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, String> {
        let (shape, values) = self.tensors.get(name).ok_or("no such tensor")?;
        Ok(SourceTensor {
            dtype: DType::F32,
            shape: shape.clone(),
            data: Cow::Borrowed(bytemuck::cast_slice(values)),
        })
    }
}

pub fn tensor(cuda: &Cuda, cols: usize, values: &[f32]) -> CudaTensor {
    let mut tensor = cuda.tensor(values.len() / cols, cols).unwrap();
    cuda.set(&mut tensor, values);
    tensor
}

/// How far one rounding to the type may be from what was rounded.
pub fn unit(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 6e-8,
        DType::F16 => 4.9e-4,
        DType::Bf16 => 3.91e-3,
    }
}

#[track_caller]
pub fn assert_close(cuda: &Cuda, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{}: element {i} is {found}, expected {expected}",
            cuda.numerics_class()
        );
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Whether a test that asks the stand-in for counts runs in a process of its own; else it is run there.
pub fn is_alone(test: &str) -> bool {
    if !matches!(stand_in::driver(), Some(Driver::StandIn(_))) {
        return false;
    }
    const ALONE: &str = "BATON_STAND_IN_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let itself = std::env::current_exe().unwrap();
    let output = std::process::Command::new(itself)
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    false
}
