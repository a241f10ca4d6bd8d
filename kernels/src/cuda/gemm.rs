//! Products by cuBLASLt: `out = x w^T`, the algorithm chosen once for a shape by measuring what the library suggests.
//! Not for deterministic mode: what is chosen depends on the machine and on the number of rows.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, CUstreamCaptureStatus};

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::error::{CudaError, During as _};
use crate::layout::DType;

/// As the library's documentation recommends for Hopper; less for older cards would be enough.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Suggestions that are tried.
const N_CANDIDATES: usize = 8;
/// Runs of which the best counts, after one that does not.
const N_RUNS: usize = 3;

/// One product, `x: [rows, n_in]`, `w: [n_out, n_in]`, `out: [rows, n_out]`, all row major.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) n_in: usize,
    pub(super) n_out: usize,
    /// Of x and w.
    pub(super) dtype: DType,
    pub(super) out_dtype: DType,
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) out: u64,
}

/// Products of one choice: of as many rows once padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    max_rows: usize,
    n_in: usize,
    n_out: usize,
    dtype: DType,
    out_dtype: DType,
}

impl Shape {
    fn of(product: Product) -> Shape {
        Shape {
            max_rows: row_class(product.rows),
            n_in: product.n_in,
            n_out: product.n_out,
            dtype: product.dtype,
            out_dtype: product.out_dtype,
        }
    }
}

fn stop(product: Product, error: CublasError) -> ! {
    panic!("CUDA: cannot multiply {product:?}: {error}")
}

/// Rows to which a step's are thought padded: the finer sizes are those of recorded decode steps, which are padded indeed.
fn row_class(rows: usize) -> usize {
    match rows {
        5..=256 => rows.next_multiple_of(8),
        _ => rows.next_power_of_two(),
    }
}

/// The rows of steps beyond those that are recorded, one number of each class up to `max_rows`.
pub(super) fn rows_of_large_steps(max_rows: usize) -> impl Iterator<Item = usize> {
    let classes = std::iter::successors(Some(512), |rows: &usize| rows.checked_mul(2));
    classes
        .take_while(move |class| class / 2 < max_rows)
        .map(move |class| class.min(max_rows))
}

/// The library, its workspace and what was chosen.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    /// What is written before each timed run: twice the card's cache. The product then finds its weights in memory, as in a
    /// step, and has been queued before the device comes to it, so that the host's share is not timed. `None` where there was
    /// no memory for it. Kept, as a shape may come for the first time when there is none left.
    lead: Option<DeviceBuffer>,
    chosen: RefCell<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
    device: Arc<Device>,
}

// SAFETY: a handle of the library, used by one thread at a time, as `&Gemm` is not shared between threads.
unsafe impl Send for Gemm {}

impl Gemm {
    /// # Errors
    /// No library, or no memory for it.
    pub(super) fn new(device: &Arc<Device>) -> Result<Gemm, CudaError> {
        // SAFETY: loads the library by its usual names.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary {
                library: "libcublasLt.so.13",
                needed_for: "products are computed by it",
            });
        }
        device
            .context
            .bind_to_thread()
            .during(|| "use the context".to_owned())?;
        Ok(Gemm {
            handle: result::create_handle().during(|| "start cuBLASLt".to_owned())?,
            workspace: DeviceBuffer::new(device, "products", WORKSPACE_BYTES)?,
            lead: lead(device),
            chosen: RefCell::default(),
            device: Arc::clone(device),
        })
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The addresses point to what the product says and stay until the work is done.
    pub(super) unsafe fn run(&self, product: Product) {
        if product.rows == 0 {
            return;
        }
        let problem = self.problem(product);
        // SAFETY: the caller's promise.
        let algorithm = unsafe { self.algorithm(&problem, product) };
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { self.queue(&problem, product, &algorithm) } {
            let failure = format!("cannot multiply {product:?}: {error}");
            self.device.stop(&self.device.compute, failure);
        }
    }

    /// Has the algorithm chosen for products of as many rows, by running some of them; `false` if it was chosen before.
    ///
    /// # Safety
    /// As of [`Gemm::run`].
    pub(super) unsafe fn prepare(&self, product: Product) -> bool {
        let is_new = product.rows > 0 && !self.chosen.borrow().contains_key(&Shape::of(product));
        if is_new {
            // SAFETY: the caller's promise.
            unsafe { self.algorithm(&self.problem(product), product) };
        }
        is_new
    }

    fn problem(&self, product: Product) -> Problem {
        self.device.context.bind_to_thread().or_stop("use the context");
        Problem::new(product).unwrap_or_else(|error| stop(product, error))
    }

    /// What was chosen, or is now.
    ///
    /// # Safety
    /// As of [`Gemm::run`].
    unsafe fn algorithm(&self, problem: &Problem, product: Product) -> sys::cublasLtMatmulAlgo_t {
        let shape = Shape::of(product);
        let chosen = self.chosen.borrow().get(&shape).copied();
        if let Some(algorithm) = chosen.filter(|algorithm| problem.takes(self.handle, algorithm)) {
            return algorithm;
        }
        // SAFETY: the caller's promise; runs that are thrown away write what the last one writes again.
        let algorithm = unsafe { self.choose(problem, product) }.unwrap_or_else(|error| stop(product, error));
        self.chosen.borrow_mut().insert(shape, algorithm);
        algorithm
    }

    /// The fastest of what the library suggests; its first suggestion where nothing can be measured.
    unsafe fn choose(&self, problem: &Problem, product: Product) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let candidates = problem.suggestions(self.handle)?;
        let Some(first) = candidates.first() else {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        };
        let is_captured = self.device.compute.capture_status().or_stop("ask about a capture")
            != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if is_captured || candidates.len() == 1 {
            return Ok(*first);
        }
        let timing = "time a product";
        let timed_event = || {
            let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
            self.device.context.new_event(flags).or_stop(timing)
        };
        let (before, after) = (timed_event(), timed_event());
        let mut best = (f32::INFINITY, *first);
        for algorithm in &candidates {
            for run in 0..=N_RUNS {
                if let Some(lead) = &self.lead {
                    lead.zero_part(0, lead.n_bytes(), &self.device.compute)
                        .unwrap_or_else(|error| panic!("CUDA: {error}"));
                }
                before.record(&self.device.compute).or_stop(timing);
                // SAFETY: as the caller promises.
                if unsafe { self.queue(problem, product, algorithm) }.is_err() {
                    // Suggested and yet refused: the others are as good.
                    break;
                }
                after.record(&self.device.compute).or_stop(timing);
                let ms = before.elapsed_ms(&after).or_stop(timing);
                if run > 0 && ms < best.0 {
                    best = (ms, *algorithm);
                }
            }
        }
        Ok(best.1)
    }

    unsafe fn queue(
        &self,
        problem: &Problem,
        product: Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
    ) -> Result<(), CublasError> {
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: descriptors of this product; `w` is the left operand, as the library's matrices are column major.
        unsafe {
            result::matmul(
                self.handle,
                problem.desc,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                product.w as *const c_void,
                problem.w,
                product.x as *const c_void,
                problem.x,
                product.out as *const c_void,
                problem.out,
                product.out as *mut c_void,
                problem.out,
                algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                self.device.compute.cu_stream().cast(),
            )
        }
    }
}

/// [`Gemm::lead`].
fn lead(device: &Device) -> Option<DeviceBuffer> {
    let cache = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
    let cache_bytes = usize::try_from(device.context.attribute(cache).ok()?).ok()?;
    let lead = DeviceBuffer::new(device, "timing products", 2 * cache_bytes).ok()?;
    (lead.n_bytes() > 0).then_some(lead)
}

impl Drop for Gemm {
    fn drop(&mut self) {
        let _ = self.device.context.bind_to_thread();
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Descriptors of one product. A row-major `[a, b]` is the library's column-major `[b, a]`, so `out^T = w x^T` is asked for.
struct Problem {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Problem {
    fn new(product: Product) -> Result<Problem, CublasError> {
        let layout = |dtype, rows: usize, cols: usize| {
            result::create_matrix_layout(data_type(dtype), rows as u64, cols as u64, rows as i64)
        };
        let mut problem = Problem {
            desc: std::ptr::null_mut(),
            w: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
        };
        // f32 stays f32: no rounding to TF32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        problem.desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?;
        problem.w = layout(product.dtype, product.n_in, product.n_out)?;
        problem.x = layout(product.dtype, product.n_in, product.rows)?;
        problem.out = layout(product.out_dtype, product.n_out, product.rows)?;
        let transposed: i32 = 1;
        // SAFETY: an attribute of four bytes.
        unsafe {
            result::set_matmul_desc_attribute(
                problem.desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )?;
        }
        Ok(problem)
    }

    /// Whether an algorithm that was chosen for other rows serves these.
    fn takes(&self, handle: sys::cublasLtHandle_t, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        let mut checked = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: descriptors of ours; writes one result, which zeros are a value of.
        let (status, checked) = unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.desc,
                self.w,
                self.x,
                self.out,
                self.out,
                algorithm,
                checked.as_mut_ptr(),
            );
            (status, checked.assume_init())
        };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && checked.workspaceSize <= WORKSPACE_BYTES
    }

    fn suggestions(&self, handle: sys::cublasLtHandle_t) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE_BYTES as u64;
        let mut found = std::mem::MaybeUninit::<[sys::cublasLtMatmulHeuristicResult_t; N_CANDIDATES]>::zeroed();
        let mut n_found = 0;
        // SAFETY: an attribute of eight bytes; descriptors of ours; room for as many results as are asked for, which zeros
        // are a value of. The preference is destroyed once.
        let outcome = unsafe {
            let outcome = result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<u64>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    handle,
                    self.desc,
                    self.w,
                    self.x,
                    self.out,
                    self.out,
                    preference,
                    N_CANDIDATES as i32,
                    found.as_mut_ptr().cast(),
                    &raw mut n_found,
                )
                .result()
            });
            let _ = result::destroy_matmul_pref(preference);
            outcome
        };
        outcome?;
        // SAFETY: as above.
        let found = unsafe { found.assume_init() };
        let n_found = usize::try_from(n_found).unwrap_or(0).min(N_CANDIDATES);
        let succeeded =
            |result: &&sys::cublasLtMatmulHeuristicResult_t| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(found[..n_found]
            .iter()
            .filter(succeeded)
            .map(|result| result.algo)
            .collect())
    }
}

impl Drop for Problem {
    fn drop(&mut self) {
        // SAFETY: each was created by us, or is null and left alone; destroyed once.
        unsafe {
            for layout in [self.w, self.x, self.out] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            if !self.desc.is_null() {
                let _ = result::destroy_matmul_desc(self.desc);
            }
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

impl<T> super::error::During<T> for Result<T, CublasError> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::Call {
            action: action(),
            reason: error.to_string(),
        })
    }

    fn or_stop(self, action: &str) -> T {
        self.unwrap_or_else(|error| panic!("CUDA: cannot {action}: {error}"))
    }
}
