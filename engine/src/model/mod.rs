//! From a Hugging Face model folder to a forward pass: files, configuration, weights, decoder. No text, no scheduling.

mod architecture;
mod config;
mod decoder;
mod derived;
mod dummy;
mod error;
mod fields;
mod fingerprint;
mod folder;
mod generation;
pub mod hub;
mod load;
mod rope;
mod safetensors;
mod weights;

pub use architecture::{ARCHITECTURES, Architecture, supported_names};
pub use config::{ExpertsConfig, LayerConfig, ModelConfig};
pub use decoder::{Decoder, DecoderLimits};
pub use error::ModelError;
pub use fingerprint::{ModelFingerprint, default_packed_dir};
pub use folder::ModelFolder;
pub use generation::GenerationConfig;
pub use load::{CpuLoadOptions, CudaKvSize, CudaLoadOptions, LoadOptions, load_cpu, load_cuda, load_cuda_at};
pub use rope::{RopeConfig, RopeScaling};
pub use safetensors::{TensorBytes, TensorTable};
pub use weights::LoadFormat;
