//! A card to measure on, and random numbers in its memory.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use baton_kernels::cuda::{Cuda, CudaMatrix, CudaMode, CudaOptions, CudaTensor, CudaVector, ImageFolders};
use baton_kernels::{Backend, DType, PackedWeights, Packing, SourceTensor, WeightKind, WeightSource, WeightSpec};

use crate::stand_in::{self, Driver};

pub const DTYPE: DType = DType::Bf16;

/// Where the driver and the kernels come from.
#[derive(Clone, Default)]
pub struct Source {
    pub libraries: Vec<PathBuf>,
    pub images: ImageFolders,
}

impl Source {
    /// Whether there is something to run on.
    pub fn use_stand_in(&mut self) -> bool {
        let driver = stand_in::driver();
        if let Some(Driver::StandIn(folder)) = &driver {
            self.libraries = vec![folder.clone()];
            self.images.cache.get_or_insert_with(stand_in::image_cache);
        }
        driver.is_some()
    }

    pub fn open(&self, head_dim: usize, mode: CudaMode) -> Cuda {
        crate::or_fail(Cuda::new(CudaOptions {
            ordinal: 0,
            dtype: DTYPE,
            head_dim,
            mode,
            libraries: self.libraries.clone(),
            images: self.images.clone(),
        }))
    }
}

/// Small numbers, different in each element: zeros cost a card less power, so it computes faster on them.
struct Random {
    shape: Vec<usize>,
}

impl WeightSource for Random {
    fn tensor(&self, _name: &str) -> Result<SourceTensor<'_>, String> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        // bf16 from 2^-7 to 2, either sign.
        let data = (0..self.shape.iter().product())
            .flat_map(|_| ((next() >> 40) as u16 & 0x83ff | 0x3c00).to_le_bytes())
            .collect();
        Ok(SourceTensor {
            dtype: DType::Bf16,
            shape: self.shape.clone(),
            data: Cow::Owned(data),
        })
    }
}

fn pack(kind: WeightKind, shape: Vec<usize>) -> Arc<PackedWeights> {
    let spec = WeightSpec {
        name: "w".to_owned(),
        kind,
        parts: vec!["w".to_owned()],
    };
    PackedWeights::in_memory(Packing::Rows, DTYPE, &[spec], &Random { shape }).expect("numbers of the shape asked for")
}

pub fn matrix(cuda: &Cuda, n_out: usize, n_in: usize) -> CudaMatrix {
    let packed = pack(WeightKind::Matrix { n_out, n_in }, vec![n_out, n_in]);
    cuda.matrix(&packed, "w").expect("room for a matrix")
}

pub fn vector(cuda: &Cuda, len: usize) -> CudaVector {
    cuda.vector(&pack(WeightKind::Vector { len }, vec![len]), "w")
        .expect("room for a vector")
}

/// `[rows, cols]`, drawn from the rows of a table.
pub fn tensor(cuda: &Cuda, rows: usize, cols: usize) -> CudaTensor {
    let n_different = rows.min(1021);
    let table = matrix(cuda, n_different, cols);
    let ids: Vec<u32> = (0..rows).map(|row| (row % n_different) as u32).collect();
    let mut tensor = cuda.tensor(rows, cols).expect("room for activations");
    cuda.begin_step();
    cuda.embed(&mut tensor, &table, &ids, 1.0);
    // The table goes; what reads it must be through.
    cuda.to_host(&tensor);
    tensor
}
