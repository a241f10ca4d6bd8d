//! Whether there is a card that we can compute on, and which. Never panics and changes nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute};

use super::error::{CudaError, During as _, words};
use super::libraries;

/// CUDA 13.0, which came with driver 580: the version of the interface that is called.
pub(super) const MIN_DRIVER_CUDA: i32 = 13_000;

/// Ampere: the first with bf16 products and asynchronous copies to shared memory.
pub(super) const MIN_CAPABILITY: u32 = 80;

/// What the driver says of a card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaCard {
    /// The driver's number of it.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability: 90 is 9.0.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub n_multiprocessors: u32,
    /// Bytes of its memory.
    pub total_bytes: usize,
    /// The CUDA version of the driver: 13000 is 13.0.
    pub driver_cuda: i32,
}

impl CudaCard {
    /// The architecture that kernels are compiled for: features of Hopper and Blackwell are in the `a` variants, which run
    /// on that architecture alone.
    pub fn architecture(&self) -> String {
        match self.capability {
            90 | 100 | 103 | 120 | 121 => format!("{}a", self.capability),
            other => other.to_string(),
        }
    }
}

/// Looks for card `ordinal`, with libraries from `folders` before the system's.
///
/// # Errors
/// One line for each thing that can be missing.
pub fn probe(ordinal: usize, folders: &[PathBuf]) -> Result<CudaCard, CudaError> {
    libraries::preload(folders)?;
    // cudarc panics where a library or one of its functions is missing; a broken installation must not end the process.
    catch_unwind(AssertUnwindSafe(|| look(ordinal))).unwrap_or_else(|panic| {
        let reason = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .and_then(|words| words.lines().next())
            .unwrap_or("it lacks a function");
        Err(CudaError::BrokenDriver {
            reason: reason.to_owned(),
        })
    })
}

fn look(ordinal: usize) -> Result<CudaCard, CudaError> {
    // SAFETY: loads the library by its usual names, which runs nothing but its initialisers.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let no_device = DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE);
    match result::init() {
        Ok(()) => {}
        Err(error) if error == no_device => return Err(CudaError::NoDevice),
        Err(error) => return Err(CudaError::BrokenDriver { reason: words(error) }),
    }
    let mut driver_cuda = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut driver_cuda) }
        .result()
        .during(|| "ask for the driver's version".to_owned())?;
    if driver_cuda < MIN_DRIVER_CUDA {
        return Err(CudaError::OldDriver { found: driver_cuda });
    }
    let n_devices = result::device::get_count().during(|| "count devices".to_owned())?;
    let n_devices = usize::try_from(n_devices).unwrap_or(0);
    if n_devices == 0 {
        return Err(CudaError::NoDevice);
    }
    if ordinal >= n_devices {
        return Err(CudaError::Ordinal { ordinal, n_devices });
    }
    let asking = || format!("ask about device {ordinal}");
    let device = result::device::get(ordinal as i32).during(asking)?;
    let attribute = |attribute: CUdevice_attribute| {
        // SAFETY: a device that `get` gave.
        let value = unsafe { result::device::get_attribute(device, attribute) }.during(asking)?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let name = result::device::get_name(device).during(asking)?;
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let capability = 10 * major + minor;
    if capability < MIN_CAPABILITY {
        return Err(CudaError::OldCard { name, capability });
    }
    Ok(CudaCard {
        ordinal,
        name,
        capability,
        n_multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: as above.
        total_bytes: unsafe { result::device::total_mem(device) }.during(asking)?,
        driver_cuda,
    })
}
