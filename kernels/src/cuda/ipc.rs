//! Memory of a card that another process of this host owns: how it is named to others, and its mapping here. Which of its
//! blocks mean anything is `kv`'s business.
//!
//! The driver maps a whole allocation, so what is shared is one that holds nothing but caches. It demands that the owner frees
//! nothing that others have mapped; so what was once named is left for the end of the process, after which a mapping stays
//! readable until it is closed.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUipcMem_flags};
use cudarc::driver::{CudaContext, result};

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::error::{CudaError, During as _};

/// The name of an allocation, for other processes of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaMemoryHandle {
    /// The card's own name, which does not depend on who looks.
    pub card: CardUuid,
    /// The driver's words for an allocation.
    pub bytes: [u8; 64],
    /// Where in it what is meant begins.
    pub offset: u64,
}

/// A card's own name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CardUuid(pub [u8; 16]);

impl std::fmt::Display for CardUuid {
    /// As `nvidia-smi -L` writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GPU")?;
        for (idx, byte) in self.0.iter().enumerate() {
            let dash = if [0, 4, 6, 8, 10].contains(&idx) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for CardUuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl CudaMemoryHandle {
    /// Names a buffer, which from then on is not freed before the process ends.
    ///
    /// # Errors
    /// A system without it (WSL, some virtual machines).
    pub(super) fn of(device: &Device, buffer: &DeviceBuffer, offset: usize) -> Result<CudaMemoryHandle, CudaError> {
        let naming = || "name device memory to other processes".to_owned();
        device.context.bind_to_thread().during(naming)?;
        let mut handle = MaybeUninit::uninit();
        // SAFETY: the address of a live allocation; writes the handle, whose bytes are all initialised on success.
        let handle = unsafe {
            let status = sys::cuIpcGetMemHandle(handle.as_mut_ptr(), buffer.address());
            status.result().during(naming)?;
            handle.assume_init()
        };
        buffer.keep();
        Ok(CudaMemoryHandle {
            card: device.uuid()?,
            bytes: handle.reserved.map(|byte| byte as u8),
            offset: offset as u64,
        })
    }
}

/// Another process's allocation, mapped for as long as this lives.
pub(super) struct ForeignBuffer {
    context: Arc<CudaContext>,
    /// Of the allocation.
    mapped: CUdeviceptr,
    offset: u64,
}

impl ForeignBuffer {
    /// Of this card, or of one whose memory this card reads over the bus or NVLink.
    ///
    /// # Errors
    /// Memory of any other card, a handle whose process has gone, or a system without it.
    pub(super) fn open(device: &Device, handle: &CudaMemoryHandle) -> Result<ForeignBuffer, CudaError> {
        device.check_reaches(handle.card)?;
        let mapping = || "map device memory of another process".to_owned();
        device.context.bind_to_thread().during(mapping)?;
        let raw = sys::CUipcMemHandle {
            reserved: handle.bytes.map(|byte| byte as std::ffi::c_char),
        };
        let mut mapped = 0;
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: writes one address. What the handle names is checked by the driver.
        unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut mapped, raw, flags) }
            .result()
            .during(mapping)?;
        let buffer = ForeignBuffer {
            context: Arc::clone(&device.context),
            mapped,
            offset: handle.offset,
        };
        Ok(buffer)
    }

    pub(super) fn address(&self) -> CUdeviceptr {
        self.mapped + self.offset
    }
}

impl Drop for ForeignBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: opened once, closed once; whoever queued work on it has waited for that.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.mapped) };
    }
}

impl Device {
    /// The card's own name.
    pub(super) fn uuid(&self) -> Result<CardUuid, CudaError> {
        uuid_of(self.context.cu_device()).during(asking)
    }

    /// Whether kernels here can read the memory of that card.
    fn check_reaches(&self, card: CardUuid) -> Result<(), CudaError> {
        let here = self.uuid()?;
        if card == here {
            return Ok(());
        }
        let refused = |reason| {
            Err(CudaError::OtherCard {
                found: card,
                expected: here,
                reason,
            })
        };
        for ordinal in 0..result::device::get_count().during(asking)? {
            let other = result::device::get(ordinal).during(asking)?;
            if uuid_of(other).during(asking)? != card {
                continue;
            }
            let mut can_access = 0;
            // SAFETY: two devices that the driver gave; writes one integer.
            unsafe { sys::cuDeviceCanAccessPeer(&raw mut can_access, self.context.cu_device(), other) }
                .result()
                .during(asking)?;
            return match can_access {
                0 => refused("the driver gives one no access to the other's memory"),
                _ => Ok(()),
            };
        }
        refused("this process does not see that card (CUDA_VISIBLE_DEVICES)")
    }
}

fn asking() -> String {
    "ask which card this is".to_owned()
}

fn uuid_of(device: sys::CUdevice) -> Result<CardUuid, result::DriverError> {
    let uuid = result::device::get_uuid(device)?;
    Ok(CardUuid(uuid.bytes.map(|byte| byte as u8)))
}
