//! Bodies of the device tests, written once over `Backend`, with the plain reference as oracle. Each device's own tests say on
//! which of its devices and sizes they run; tolerances follow from what a device computes in and stores.

pub mod attention;
pub mod moe;
pub mod products;
pub mod rows;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use baton_kernels::{
    Backend, DType, KvCache, KvLayout, PackedWeights, Packing, SourceTensor, WeightKind, WeightSource, WeightSpec,
};

/// What the bodies need of a device beyond its operators.
pub trait TestDevice: Backend {
    /// How its weights are packed.
    const PACKING: Packing;

    /// What activations are rounded to when they are stored.
    fn stored(&self) -> DType;

    /// An activation of the host's rows.
    fn filled(&self, cols: usize, values: &[f32]) -> Self::Tensor;

    /// KV memory that it can use.
    fn cache(&self, layout: KvLayout, n_blocks: usize) -> KvCache;
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

    pub fn pack_for<B: TestDevice>(&self, device: &B) -> Arc<PackedWeights> {
        PackedWeights::in_memory(B::PACKING, device.compute_dtype(), &self.specs, self).unwrap()
    }

    /// In rows, for devices of whatever dtype.
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

/// `[n_out, n_in]` in the device's memory.
pub fn matrix<B: TestDevice>(device: &B, n_out: usize, n_in: usize, values: &[f32]) -> B::Matrix {
    let weights = Weights::default().matrix("w", n_out, n_in, values);
    device.matrix(&weights.pack_for(device), "w").unwrap()
}

/// A parameter vector in the device's memory.
pub fn vector<B: TestDevice>(device: &B, values: &[f32]) -> B::Vector {
    let weights = Weights::default().vector("v", values);
    device.vector(&weights.pack_for(device), "v").unwrap()
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
pub fn assert_close<B: Backend>(device: &B, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{}: element {i} is {found}, expected {expected}",
            device.numerics_class()
        );
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
