//! A share of a card's multiprocessors: a green context of the driver, and streams in it. Memory and kernels are those of the
//! card's one context; only where the streams' work runs is different.

use std::ffi::c_uint;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevResource, CUdevResourceType, CUgreenCtx, CUgreenCtxCreate_flags, CUstream};
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::error::{CudaError, words};
use super::probe::CudaCard;

/// Some of the multiprocessors.
pub(super) struct GreenContext {
    context: Arc<CudaContext>,
    raw: CUgreenCtx,
    streams: Vec<CUstream>,
    pub(super) n_multiprocessors: u32,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for GreenContext {}
// SAFETY: as above.
unsafe impl Sync for GreenContext {}

impl GreenContext {
    /// At least `percent` hundredths of the card, and as many more as the hardware's grouping makes of it.
    ///
    /// # Errors
    /// A driver that makes none of this card.
    pub(super) fn new(context: &Arc<CudaContext>, card: &CudaCard, percent: u8) -> Result<GreenContext, CudaError> {
        let refused = |error: DriverError| CudaError::NoShare {
            percent,
            driver: card.driver_cuda,
            reason: words(error),
        };
        context.bind_to_thread().map_err(refused)?;
        let wanted = (card.n_multiprocessors * u32::from(percent) / 100).max(1);
        let device = context.cu_device();
        let mut all = MaybeUninit::<CUdevResource>::zeroed();
        let mut share = MaybeUninit::<CUdevResource>::zeroed();
        let mut n_shares: c_uint = 1;
        let mut description = std::ptr::null_mut();
        let mut raw = std::ptr::null_mut();
        let flags = CUgreenCtxCreate_flags::CU_GREEN_CTX_DEFAULT_STREAM as c_uint;
        // SAFETY: a device of this context; every pointer is to a value of its own, that the calls before have filled, and a
        // resource is plain numbers, for which zeros are a value. The rest of the multiprocessors is not asked for.
        let n_multiprocessors = unsafe {
            let kind = CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
            sys::cuDeviceGetDevResource(device, all.as_mut_ptr(), kind)
                .result()
                .map_err(refused)?;
            let rest = std::ptr::null_mut();
            sys::cuDevSmResourceSplitByCount(share.as_mut_ptr(), &raw mut n_shares, all.as_ptr(), rest, 0, wanted)
                .result()
                .map_err(refused)?;
            sys::cuDevResourceGenerateDesc(&raw mut description, share.as_mut_ptr(), 1)
                .result()
                .map_err(refused)?;
            sys::cuGreenCtxCreate(&raw mut raw, description, device, flags)
                .result()
                .map_err(refused)?;
            share.assume_init().__bindgen_anon_1.sm.smCount
        };
        Ok(GreenContext {
            context: Arc::clone(context),
            raw,
            streams: Vec::new(),
            n_multiprocessors,
        })
    }

    /// A stream whose work runs there. It must not be used after this context is dropped.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn stream(&mut self, priority: i32) -> Result<Arc<CudaStream>, DriverError> {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: a green context that is alive; writes one handle.
        unsafe { sys::cuGreenCtxStreamCreate(&raw mut stream, self.raw, flags, priority) }.result()?;
        self.streams.push(stream);
        // SAFETY: a stream on the context's own device, alive until we are dropped, which nobody else uses.
        Ok(unsafe { self.context.wrap_borrowed_stream(stream) })
    }
}

impl Drop for GreenContext {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for &stream in &self.streams {
            // SAFETY: created by us, destroyed once; the device has waited for their work.
            let _ = unsafe { sys::cuStreamDestroy_v2(stream) };
        }
        // SAFETY: as above, after its streams.
        let _ = unsafe { sys::cuGreenCtxDestroy(self.raw) };
    }
}
