//! Which device an instance computes on: what was asked for, against what the machine has. Loads no model.

use std::path::PathBuf;

use baton_engine::cuda;

use crate::config::{ConfigError, Device};
use crate::engine_config::{CudaConfig, DeviceConfig};

/// The driver's number of the card that is used; which card that is, CUDA_VISIBLE_DEVICES says.
pub const CARD_ORDINAL: usize = 0;

/// The device for what was asked, a card with the settings of `cuda`.
///
/// # Errors
/// A card was asked for by name, and there is none that serves.
pub fn choose(asked: Device, cuda: CudaConfig) -> Result<DeviceConfig, ConfigError> {
    let find = || cuda::probe(CARD_ORDINAL, &cuda.libraries.0);
    match asked {
        Device::Cpu => Ok(DeviceConfig::Cpu),
        Device::Auto if find().is_ok() => Ok(DeviceConfig::Cuda(cuda)),
        Device::Auto => Ok(DeviceConfig::Cpu),
        Device::Cuda => match find() {
            Ok(_) => Ok(DeviceConfig::Cuda(cuda)),
            Err(error) => Err(ConfigError::Impossible(format!("device: cuda: {error}"))),
        },
    }
}

/// The folder of compiled kernels beside this program, if the installation has one.
pub fn packaged_kernels() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.join("cuda-kernels");
    folder.is_dir().then_some(folder)
}
