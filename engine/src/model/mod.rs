//! From a Hugging Face model folder to a forward pass: files, configuration, weights, decoder. No text, no scheduling.

mod architecture;
mod config;
mod decoder;
mod dummy;
mod error;
mod fields;
mod fingerprint;
mod folder;
mod generation;
pub mod hub;
mod load;
mod safetensors;
mod weights;

pub use architecture::{ARCHITECTURES, Architecture, TensorNames, supported_names};
pub use config::{ModelConfig, RopeConfig, RopeScaling};
pub use decoder::{Decoder, DecoderLimits};
pub use error::ModelError;
pub use fingerprint::{ModelFingerprint, default_packed_dir};
pub use folder::ModelFolder;
pub use generation::GenerationConfig;
pub use load::{CpuLoadOptions, load_cpu};
pub use safetensors::{TensorBytes, TensorTable};
pub use weights::LoadFormat;
