//! A device to test on, as the shared bodies want it.

use std::sync::{Arc, OnceLock};

use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, CudaPlace, CudaTensor, ImageFolders};
use baton_kernels::{Backend, DType, KernelError, KvCache, KvLayout, Packing};
use cudarc::driver::CudaContext;

use crate::bodies::TestDevice;
pub use crate::bodies::{Values, Weights, bits};
use crate::stand_in::{self, Driver};

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
pub const MODES: [CudaMode; 2] = [CudaMode::Fast, CudaMode::Deterministic];
/// Of the caches that are written, copied and mapped.
pub const LAYOUT: KvLayout = KvLayout {
    n_layers: 2,
    n_kv_heads: 2,
    block_size: 4,
    head_dim: 8,
    dtype: DType::F32,
};

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
    Some(Cuda::at(options(0, dtype, mode, head_dim)?, place))
}

/// What to ask card `ordinal` for.
pub fn options(ordinal: usize, dtype: DType, mode: CudaMode, head_dim: usize) -> Option<CudaOptions> {
    let driver = stand_in::driver()?;
    if let Driver::Card = driver {
        // A card's context goes with its last user, and to make it again takes longer than most of these tests.
        static CONTEXT: OnceLock<Arc<CudaContext>> = OnceLock::new();
        CONTEXT.get_or_init(|| CudaContext::new(0).unwrap());
    }
    Some(CudaOptions {
        ordinal,
        dtype,
        head_dim,
        mode,
        libraries: driver.libraries(),
        images: ImageFolders {
            packaged: None,
            cache: Some(stand_in::image_cache()),
        },
    })
}

pub fn tensor(cuda: &Cuda, cols: usize, values: &[f32]) -> CudaTensor {
    let mut tensor = cuda.tensor(values.len() / cols, cols).unwrap();
    cuda.set(&mut tensor, values);
    tensor
}

impl TestDevice for Cuda {
    const PACKING: Packing = Packing::Rows;

    fn stored(&self) -> DType {
        self.compute_dtype()
    }

    fn filled(&self, cols: usize, values: &[f32]) -> CudaTensor {
        tensor(self, cols, values)
    }

    fn cache(&self, layout: KvLayout, n_blocks: usize) -> KvCache {
        self.kv_cache(layout, n_blocks).unwrap()
    }
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
