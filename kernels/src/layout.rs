//! The one layout of KV memory, in memory and on the wire, and the dtypes. No storage here.

use std::fmt;
use std::str::FromStr;

/// Element type of weights, KV cache or compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: read from model files, never computed in.
    F16,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name used on command lines and in model configurations.
    pub const fn as_str(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DType {
    type Err = String;

    /// Accepts our names and those of model configurations (`float32`, `bfloat16`, `float16`).
    fn from_str(name: &str) -> Result<DType, String> {
        match name {
            "f32" | "float32" => Ok(DType::F32),
            "f16" | "float16" | "half" => Ok(DType::F16),
            "bf16" | "bfloat16" => Ok(DType::Bf16),
            other => Err(format!("unknown dtype {other:?}, expected f32, f16 or bf16")),
        }
    }
}

/// Shape of a KV cache: per layer K then V, each `[n_blocks, n_kv_heads, block_size, head_dim]`, little endian.
///
/// Of one (layer, block) the K part is `n_kv_heads * block_size * head_dim` elements, contiguous, and so is V's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Layers of a block: those of the model, or of each group where its layers are in groups.
    pub n_layers: usize,
    /// KV heads of one layer.
    pub n_kv_heads: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Element type stored.
    pub dtype: DType,
}

impl KvLayout {
    /// Elements of the K (or of the V) part of one (layer, block).
    pub const fn elements_per_part(&self) -> usize {
        self.n_kv_heads * self.block_size * self.head_dim
    }

    /// Bytes of the K (or of the V) part of one (layer, block).
    pub const fn part_bytes(&self) -> usize {
        self.elements_per_part() * self.dtype.size()
    }

    /// Bytes of K and V of one block in one layer: the unit that travels.
    pub const fn layer_block_bytes(&self) -> usize {
        2 * self.part_bytes()
    }

    /// Bytes of one block over all its layers: the unit that is allocated.
    pub const fn block_bytes(&self) -> usize {
        self.n_layers * self.layer_block_bytes()
    }

    /// Blocks that hold `n_tokens` tokens.
    pub const fn blocks_for(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.block_size)
    }
}
