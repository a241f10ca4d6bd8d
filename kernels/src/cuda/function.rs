//! Kernels as they lie in a loaded image: looked up once, launched with checked numbers of parameters. No shapes.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUfunction_attribute};
use cudarc::driver::{CudaStream, result};

use super::device::Device;
use super::error::{CudaError, During as _, words};
use super::images::ImageOrigin;
use super::launch::Launch;

/// A CTA has as much shared memory without asking, on every card.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// A loaded image; its kernels keep it.
pub(super) struct Module {
    device: Arc<Device>,
    raw: sys::CUmodule,
    name: String,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// # Errors
    /// Bytes that are no image for this card.
    pub(super) fn load(
        device: &Arc<Device>,
        name: &str,
        image: &[u8],
        origin: &ImageOrigin,
    ) -> Result<Arc<Module>, CudaError> {
        let loading = || format!("load kernels {name} ({origin})");
        device.context.bind_to_thread().during(loading)?;
        // SAFETY: a whole image: the compiler gave it, or its hash was compared. It says its own length.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast()) }.during(loading)?;
        Ok(Arc::new(Module {
            device: Arc::clone(device),
            raw,
            name: name.to_owned(),
        }))
    }

    /// The kernel of that name with `n_params` parameters.
    ///
    /// # Errors
    /// There is none, or it has another number of parameters.
    pub(super) fn function(self: &Arc<Module>, name: &str, n_params: usize) -> Result<Function, CudaError> {
        let fail = |reason: String| CudaError::Kernel {
            kernel: name.to_owned(),
            origin: self.name.clone(),
            reason,
        };
        let symbol = CString::new(name).expect("kernels have plain names");
        // SAFETY: a loaded module.
        let raw = unsafe { result::module::get_function(self.raw, symbol) }.map_err(|error| fail(words(error)))?;
        let has_param = |param_idx: usize| {
            let (mut offset, mut n_bytes) = (0, 0);
            // SAFETY: a function of a loaded module; writes two integers.
            let status = unsafe { sys::cuFuncGetParamInfo(raw, param_idx, &raw mut offset, &raw mut n_bytes) };
            status == sys::CUresult::CUDA_SUCCESS
        };
        let found = (0..).take_while(|&param_idx| has_param(param_idx)).count();
        if found != n_params {
            return Err(fail(format!("it has {found} parameters, the host passes {n_params}")));
        }
        Ok(Function {
            module: Arc::clone(self),
            raw,
            name: name.to_owned(),
            n_params,
            max_shared_bytes: SHARED_WITHOUT_ASKING,
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // The driver does not promise to wait for kernels that are still queued.
        let _ = self.device.context.synchronize();
        // SAFETY: loaded once, unloaded once, when no function is left.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

/// A kernel.
pub(super) struct Function {
    module: Arc<Module>,
    raw: sys::CUfunction,
    name: String,
    n_params: usize,
    max_shared_bytes: u32,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Lets CTAs have up to `n_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// More than the card has.
    pub(super) fn with_shared(mut self, n_bytes: u32) -> Result<Function, CudaError> {
        if n_bytes > SHARED_WITHOUT_ASKING {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe { result::function::set_function_attribute(self.raw, attribute, n_bytes as i32) }
                .during(|| format!("give kernel {} {n_bytes} bytes of shared memory", self.name))?;
            self.max_shared_bytes = n_bytes;
        }
        Ok(self)
    }

    /// Queues the kernel; nothing where the grid is empty.
    ///
    /// # Safety
    /// Addresses among the arguments point to what the kernel's contract (`kernels/cuda/README.md`) says for these sizes,
    /// and stay until the work is done.
    pub(super) unsafe fn launch(&self, stream: &CudaStream, launch: Launch, args: &Args) {
        assert!(
            args.n == self.n_params && launch.shared_bytes <= self.max_shared_bytes,
            "{}: {} arguments for {} parameters, {} bytes of shared memory of {}",
            self.name,
            args.n,
            self.n_params,
            launch.shared_bytes,
            self.max_shared_bytes
        );
        if launch.grid.contains(&0) {
            return;
        }
        let device = &self.module.device;
        device.context.bind_to_thread().or_stop("use the context");
        let mut params: [*mut std::ffi::c_void; Args::MAX] =
            std::array::from_fn(|idx| (&raw const args.values[idx]).cast_mut().cast());
        let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x, y, z));
        // SAFETY: as many parameters as the function has, each in a slot of eight bytes whose first bytes are its value;
        // the driver copies them. What they point to is the caller's promise.
        let launched = unsafe {
            result::launch_kernel(
                self.raw,
                grid,
                block,
                launch.shared_bytes,
                stream.cu_stream(),
                &mut params[..self.n_params],
            )
        };
        if let Err(error) = launched {
            let failure = format!("cannot launch {} by {launch:?}: {}", self.name, words(error));
            device.stop(stream, failure);
        }
    }
}

/// Arguments of a launch, in order; each takes eight bytes, of which a narrower one uses the first.
pub(super) struct Args {
    values: [u64; Args::MAX],
    n: usize,
}

impl Args {
    const MAX: usize = 32;

    pub(super) fn new() -> Args {
        Args {
            values: [0; Args::MAX],
            n: 0,
        }
    }

    pub(super) fn address(self, address: CUdeviceptr) -> Args {
        self.u64(address)
    }

    pub(super) fn u32(self, value: u32) -> Args {
        self.u64(u64::from(value))
    }

    pub(super) fn f32(self, value: f32) -> Args {
        self.u32(value.to_bits())
    }

    pub(super) fn u64(mut self, value: u64) -> Args {
        self.values[self.n] = value;
        self.n += 1;
        self
    }
}
