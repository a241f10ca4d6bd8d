//! The kernels that one device needs, by the type it computes in: loaded once, each with where its image came from.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::compile::Unit;
use super::device::Device;
use super::error::CudaError;
use super::function::{Args, Function, Module};
use super::gemm::Product;
use super::images::{ImageFolders, ImageOrigin, Images};
use super::launch::{self, Launch};
use super::opened::CudaMode;
use super::plan;
use super::sources::{self, HEAD_DIMS};
use crate::error::KernelError;
use crate::layout::DType;

/// Kernels over activations of the compute type; of [`Kernels::f32`], over logits.
pub(super) struct Kernels {
    pub(super) embed: Function,
    pub(super) rms_norm: Function,
    pub(super) add_rms_norm: Function,
    pub(super) add: Function,
    pub(super) add_bias: Function,
    pub(super) gated: Function,
    pub(super) soft_cap: Function,
    pub(super) soft_cap_f32: Function,
    pub(super) gather_rows: Function,
    pub(super) rope_append: Function,
    pub(super) attention: AttentionKernels,
    pub(super) attention_merge: Function,
    /// To f32, where the compute type is another.
    pub(super) to_f32: Option<Function>,
    pub(super) from_f32: Option<Function>,
    /// In deterministic mode.
    pub(super) linear: Option<LinearKernels>,
    /// Of every cache of the device.
    pub(super) kv: Arc<KvKernels>,
    /// Once a model has asked for experts.
    pub(super) moe: OnceCell<MoeKernels>,
    loader: RefCell<Loader>,
}

/// Our own products.
pub(super) struct LinearKernels {
    /// Of more than [`launch::NARROW_ROWS`] rows, or f32.
    wide: Function,
    /// Of fewer; the same bits.
    narrow: Option<Function>,
    /// The same with f32 outputs, where those are not what is computed in.
    wide_f32: Option<Function>,
    narrow_f32: Option<Function>,
}

/// What experts need besides.
pub(super) struct MoeKernels {
    pub(super) route: Function,
    pub(super) permute: Function,
    pub(super) linear: Function,
    pub(super) combine: Function,
}

/// What brings blocks of a KV cache to and from a staging buffer, and out of another cache.
pub(super) struct KvKernels {
    pub(super) gather: Function,
    pub(super) scatter: Function,
    pub(super) take: Function,
}

/// What a sampler needs.
pub(super) struct SamplingKernels {
    pub(super) token_ids: Function,
    pub(super) sample: Function,
    pub(super) logprobs: Function,
}

/// What runs the items of a plan.
pub(super) enum AttentionKernels {
    /// f16 and bf16, for the head sizes that they are built for.
    TensorCore { decode: Function, prefill: Function },
    /// f32, and other head sizes.
    Scalar(Function),
}

/// Head sizes that some kernel takes.
const MAX_HEAD_DIM: usize = 256;

impl AttentionKernels {
    fn load(loader: &mut Loader, dtype: DType, head_dim: usize) -> Result<AttentionKernels, KernelError> {
        const PARAMS: usize = 16;
        if head_dim > MAX_HEAD_DIM {
            let unsupported = CudaError::Unsupported {
                what: "head_dim",
                found: head_dim.to_string(),
                expected: "at most 256",
            };
            return Err(unsupported.into());
        }
        let is_built = HEAD_DIMS.iter().any(|built| *built as usize == head_dim);
        if dtype == DType::F32 || !is_built {
            let scalar = loader.function(&format!("attention_scalar_{dtype}"), None, PARAMS)?;
            return Ok(AttentionKernels::Scalar(scalar));
        }
        let mut shared = |entry: &str, launch: Launch| {
            let function = loader.function(&format!("{entry}_{dtype}"), Some(head_dim), PARAMS)?;
            Ok::<_, KernelError>(function.with_shared(launch.shared_bytes)?)
        };
        let head_dim = head_dim as u32;
        Ok(AttentionKernels::TensorCore {
            decode: shared("attention_decode", launch::attention_decode(1, head_dim))?,
            prefill: shared("attention_prefill", launch::attention_prefill(1, head_dim))?,
        })
    }

    /// The plan's word for it.
    pub(super) fn kind(&self) -> plan::Kernels {
        match self {
            AttentionKernels::TensorCore { .. } => plan::Kernels::TensorCore,
            AttentionKernels::Scalar(_) => plan::Kernels::Scalar,
        }
    }

    /// Queues the items of sequences with one new token.
    ///
    /// # Safety
    /// As [`Function::launch`].
    pub(super) unsafe fn launch_decode(&self, stream: &CudaStream, n_items: u32, head_dim: u32, args: &Args) {
        match self {
            // SAFETY: the caller's promise.
            AttentionKernels::TensorCore { decode, .. } => unsafe {
                decode.launch(stream, launch::attention_decode(n_items, head_dim), args);
            },
            AttentionKernels::Scalar(_) => assert_eq!(n_items, 0, "one kernel takes all"),
        }
    }

    /// Queues the other items.
    ///
    /// # Safety
    /// As [`Function::launch`].
    pub(super) unsafe fn launch_prefill(&self, stream: &CudaStream, n_items: u32, head_dim: u32, args: &Args) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                AttentionKernels::TensorCore { prefill, .. } => {
                    prefill.launch(stream, launch::attention_prefill(n_items, head_dim), args);
                }
                AttentionKernels::Scalar(scalar) => scalar.launch(stream, launch::attention_scalar(n_items), args),
            }
        }
    }
}

impl LinearKernels {
    fn load(loader: &mut Loader, dtype: DType) -> Result<LinearKernels, KernelError> {
        let wide_bytes = launch::linear(1, 1).shared_bytes;
        let narrow_bytes = launch::linear_narrow(1, 1).shared_bytes;
        let mut function = |entry: String, shared_bytes| {
            let function = loader.function(&entry, None, 6)?;
            Ok::<_, KernelError>(function.with_shared(shared_bytes)?)
        };
        let wide = function(format!("linear_{dtype}"), wide_bytes)?;
        if dtype == DType::F32 {
            return Ok(LinearKernels {
                wide,
                narrow: None,
                wide_f32: None,
                narrow_f32: None,
            });
        }
        Ok(LinearKernels {
            wide,
            narrow: Some(function(format!("linear_narrow_{dtype}"), narrow_bytes)?),
            wide_f32: Some(function(format!("linear_{dtype}_f32"), wide_bytes)?),
            narrow_f32: Some(function(format!("linear_narrow_{dtype}_f32"), narrow_bytes)?),
        })
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The addresses point to what the product says and stay until the work is done.
    pub(super) unsafe fn run(&self, stream: &CudaStream, product: Product) {
        let (m, n) = (product.rows as u32, product.n_out as u32);
        let (wide, narrow) = match product.out_dtype == product.dtype {
            true => (&self.wide, &self.narrow),
            false => (self.wide_f32.as_ref().expect("f32 is not rounded"), &self.narrow_f32),
        };
        let (function, launch) = match narrow {
            Some(narrow) if m <= launch::NARROW_ROWS => (narrow, launch::linear_narrow(m, n)),
            _ => (wide, launch::linear(m, n)),
        };
        let args = Args::new()
            .address(product.out)
            .address(product.x)
            .address(product.w)
            .u32(m)
            .u32(n)
            .u32(product.n_in as u32);
        // SAFETY: the caller's promise.
        unsafe { function.launch(stream, launch, &args) };
    }
}

impl MoeKernels {
    fn load(loader: &mut Loader, dtype: DType) -> Result<MoeKernels, KernelError> {
        let linear = loader.function(&format!("moe_linear_{dtype}"), None, 10)?;
        Ok(MoeKernels {
            route: loader.function(&format!("moe_route_{dtype}"), None, 8)?,
            permute: loader.function("moe_permute", None, 8)?,
            linear: linear.with_shared(launch::moe_linear(1, 1).shared_bytes)?,
            combine: loader.function(&format!("moe_combine_{dtype}"), None, 6)?,
        })
    }
}

impl Kernels {
    /// # Errors
    /// An image that cannot be had, or a kernel that is not in it.
    pub(super) fn load(
        device: &Arc<Device>,
        dtype: DType,
        head_dim: usize,
        mode: CudaMode,
        folders: ImageFolders,
    ) -> Result<Kernels, KernelError> {
        let mut loader = Loader {
            device: Arc::clone(device),
            images: Images::new(folders, device.card.architecture()),
            modules: HashMap::new(),
            origins: Vec::new(),
        };
        let mut typed = |entry: &str, n_params| loader.function(&format!("{entry}_{dtype}"), None, n_params);
        Ok(Kernels {
            embed: typed("embed", 5)?,
            rms_norm: typed("rms_norm", 5)?,
            add_rms_norm: typed("add_rms_norm", 6)?,
            add: typed("add", 3)?,
            add_bias: typed("add_bias", 4)?,
            gated: typed("gated", 7)?,
            soft_cap: typed("soft_cap", 3)?,
            gather_rows: typed("gather_rows", 4)?,
            rope_append: typed("rope_append", 18)?,
            attention_merge: typed("attention_merge", 8)?,
            attention: AttentionKernels::load(&mut loader, dtype, head_dim)?,
            soft_cap_f32: loader.function("soft_cap_f32", None, 3)?,
            to_f32: loader.conversion(dtype, DType::F32)?,
            from_f32: loader.conversion(DType::F32, dtype)?,
            linear: match mode {
                CudaMode::Fast => None,
                CudaMode::Deterministic => Some(LinearKernels::load(&mut loader, dtype)?),
            },
            kv: Arc::new(KvKernels {
                gather: loader.function("kv_gather", None, 7)?,
                scatter: loader.function("kv_scatter", None, 7)?,
                take: loader.function("kv_move", None, 8)?,
            }),
            moe: OnceCell::new(),
            loader: RefCell::new(loader),
        })
    }

    /// Loads what experts need, if it is not there.
    pub(super) fn load_moe(&self, dtype: DType) -> Result<(), KernelError> {
        if self.moe.get().is_none() {
            let moe = MoeKernels::load(&mut self.loader.borrow_mut(), dtype)?;
            let _ = self.moe.set(moe);
        }
        Ok(())
    }

    /// Those of a sampler over a vocabulary.
    pub(super) fn sampling(&self, vocab: usize) -> Result<SamplingKernels, KernelError> {
        let mut loader = self.loader.borrow_mut();
        let shared_bytes = launch::sample(1, vocab as u32).shared_bytes;
        Ok(SamplingKernels {
            token_ids: loader.function("token_ids", None, 6)?,
            sample: loader.function("sample", None, 5)?.with_shared(shared_bytes)?,
            logprobs: loader.function("logprobs", None, 8)?.with_shared(shared_bytes)?,
        })
    }

    /// The kernel that measures read bandwidth.
    pub(super) fn read_all(&self) -> Result<Function, KernelError> {
        self.loader.borrow_mut().function("read_all", None, 4)
    }

    /// Units and where they came from, in the order of loading.
    pub(super) fn origins(&self) -> Vec<(String, ImageOrigin)> {
        self.loader.borrow().origins.clone()
    }
}

struct Loader {
    device: Arc<Device>,
    images: Images,
    modules: HashMap<String, Arc<Module>>,
    origins: Vec<(String, ImageOrigin)>,
}

impl Loader {
    /// An entry point; of sources that have one for each head size, that of `head_dim`.
    fn function(&mut self, entry: &str, head_dim: Option<usize>, n_params: usize) -> Result<Function, KernelError> {
        let source = sources::source_of(entry).unwrap_or_else(|| panic!("no source has the kernel {entry}"));
        let head_dim = source.by_head_dim.then(|| {
            let known = head_dim.and_then(|head_dim| HEAD_DIMS.into_iter().find(|known| *known as usize == head_dim));
            known.expect("asked for with a head size that there is")
        });
        let unit = Unit::new(source, head_dim);
        let entry = head_dim.map_or(entry.to_owned(), |head_dim| format!("{entry}_d{head_dim}"));
        let module = match self.modules.get(&unit.name) {
            Some(module) => Arc::clone(module),
            None => {
                let (image, origin) = self.images.get(&unit)?;
                let module = Module::load(&self.device, &unit.name, &image, &origin)?;
                self.origins.push((unit.name.clone(), origin));
                self.modules.insert(unit.name.clone(), Arc::clone(&module));
                module
            }
        };
        Ok(module.function(&entry, n_params)?)
    }

    fn conversion(&mut self, from: DType, to: DType) -> Result<Option<Function>, KernelError> {
        if from == to {
            return Ok(None);
        }
        self.function(&format!("convert_{from}_{to}"), None, 3).map(Some)
    }
}
