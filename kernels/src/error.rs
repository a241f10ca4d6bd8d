//! What can fail outside a kernel: files, tensors, memory and options. Misuse of a kernel is a bug and asserts.

use std::path::PathBuf;

use crate::cpu::Isa;
use crate::cuda::CudaError;
use crate::layout::{DType, KvLayout};

/// An expected failure of device memory, packed weights or device options.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The CUDA device, in its own words; so they are not its source besides.
    #[error("device cuda: {0}")]
    Cuda(CudaError),
    /// A tensor of the model folder does not have the shape that the configuration implies.
    #[error("tensor {tensor}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Source tensor, or packed weight.
        tensor: String,
        /// What the specification asks for.
        expected: Vec<usize>,
        /// What is there.
        found: Vec<usize>,
    },
    /// A source tensor's bytes do not match its shape and dtype.
    #[error("tensor {tensor}: {dtype} of shape {shape:?} needs {expected} bytes, found {found}")]
    TensorBytes {
        /// Source tensor.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes its shape needs.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The source of weights could not give a tensor.
    #[error("tensor {tensor}: {reason}")]
    Source {
        /// Source tensor.
        tensor: String,
        /// The source's own words.
        reason: String,
    },
    /// No packed weight of that name and kind.
    #[error("packed weights have no {kind} {name:?}")]
    MissingWeight {
        /// `matrix` or `vector`.
        kind: &'static str,
        /// The name asked for.
        name: String,
    },
    /// Weights are packed in another dtype than the device computes in.
    #[error("{what}: expected dtype {expected}, found {found}")]
    DTypeMismatch {
        /// Whose dtype.
        what: String,
        /// What the device needs.
        expected: DType,
        /// What it was given.
        found: DType,
    },
    /// A dtype that this place cannot use.
    #[error("{what}: dtype {dtype} is not supported, expected f32 or bf16")]
    UnsupportedDType {
        /// Where.
        what: &'static str,
        /// The dtype given.
        dtype: DType,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {error}", path.display())]
    File {
        /// What we were doing.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// Another process has held a lock for too long.
    #[error("gave up after {waited_s} s waiting for another process to {work}: {}", path.display())]
    LockTimeout {
        /// The lock file.
        path: PathBuf,
        /// What the other does under it.
        work: &'static str,
        /// How long we waited.
        waited_s: u64,
    },
    /// The name of a packed file may only hold letters, digits, `-` and `_`.
    #[error("packed weights key {key:?}: expected letters, digits, '-' or '_'")]
    Key {
        /// The key given.
        key: String,
    },
    /// Memory could not be mapped.
    #[error("cannot map {bytes} bytes of {what}: {error}")]
    OutOfMemory {
        /// For what.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// A KV layout that no kernel supports.
    #[error("KV layout {layout:?}: {reason}")]
    Layout {
        /// The layout given.
        layout: KvLayout,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A block id outside the cache.
    #[error("block {block}: the cache has {n_blocks} blocks")]
    BlockOutOfRange {
        /// The block asked for.
        block: u32,
        /// Blocks of the cache.
        n_blocks: usize,
    },
    /// A layer outside the model.
    #[error("layer {layer}: the cache has {n_layers} layers")]
    LayerOutOfRange {
        /// The layer asked for.
        layer: usize,
        /// Layers of the cache.
        n_layers: usize,
    },
    /// The block cannot be written: it is pinned by readers or already has a writer.
    #[error("block {block} cannot be written: it is {state}")]
    BlockBusy {
        /// The block.
        block: u32,
        /// `pinned` or `being written`.
        state: &'static str,
    },
    /// A part of a block with the wrong number of bytes.
    #[error("{part} of block {block}, layer {layer}: expected {expected} bytes, found {found}")]
    PartBytes {
        /// `key` or `value`.
        part: &'static str,
        /// The block.
        block: u32,
        /// The layer.
        layer: usize,
        /// Bytes of one part.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The KV memory that another process gave cannot be used.
    #[error("cannot map the KV memory of another process: {error}")]
    Foreign {
        /// The system's answer, or what is wrong with the file.
        #[source]
        error: std::io::Error,
    },
    /// A block of another process is not, or no longer, what was meant.
    #[error("block {block} of the other process has generation {found}, expected {expected}")]
    Stale {
        /// The block, in the other process.
        block: u32,
        /// The generation meant.
        expected: u32,
        /// The generation seen.
        found: u32,
    },
    /// Bytes of another process that do not lie where they are said to.
    #[error("{n_bytes} bytes in slot {slot} of the other process, which has {n_slots} of {slot_bytes} bytes")]
    NoSuchSlot {
        /// The slot named.
        slot: u32,
        /// What should lie in it.
        n_bytes: usize,
        /// How many slots there are.
        n_slots: u32,
        /// What each holds.
        slot_bytes: usize,
    },
    /// A slot of another process does not, or no longer, hold what was meant.
    #[error("slot {slot} of the other process has generation {found}, expected {expected}")]
    StaleSlot {
        /// The slot, in the other process.
        slot: u32,
        /// The generation meant.
        expected: u32,
        /// The generation seen.
        found: u32,
    },
    /// The processor lacks an instruction set that was asked for.
    #[error("instruction set {isa} is not available on this processor, the best is {best}")]
    Isa {
        /// What was asked for.
        isa: Isa,
        /// What the processor has.
        best: Isa,
    },
    /// An option outside its range.
    #[error("n_threads {n_threads}: expected 1 to {max}")]
    Threads {
        /// The value given.
        n_threads: usize,
        /// The largest accepted.
        max: usize,
    },
    /// Worker threads could not be started.
    #[error("cannot start worker thread {worker_idx}: {error}")]
    Spawn {
        /// Which.
        worker_idx: usize,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
}

impl From<CudaError> for KernelError {
    fn from(error: CudaError) -> KernelError {
        KernelError::Cuda(error)
    }
}
