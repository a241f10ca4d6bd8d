//! Configuration: flag, then `BATON_*` variable, then `--config FILE`, then default; parsed and validated once, before
//! anything starts. What a process is told is in the `*_process` files; here is how values are found and read.

mod address;
mod choice;
mod environment;
mod error;
mod file;
mod folders;
mod keys;
mod layers;
mod machine;
mod model_source;
mod quantity;
mod secret;
mod setting;

pub use address::{Address, Addresses, UNIX_PATH_LIMIT};
pub use choice::{
    ComputeDtype, Device, InstructionSet, KvTransportKind, LoadFormat, LogFormat, MetricsAliases, PolicyKind,
    ReasoningParserKind, RebalanceMode, Roles, Switch, ToolCallParserKind,
};
pub use environment::{Environment, HubEnvironment, setting_variables};
pub use error::ConfigError;
pub use file::ConfigFile;
pub use folders::Folders;
pub use keys::{KEYS, Key};
pub use layers::Layers;
pub use machine::{KV_SHARE_DIVISOR, Machine};
pub use model_source::{DEMO_MODEL_NAME, ModelSource};
pub use quantity::{ByteSize, KvMemory, Percent, Span};
pub use secret::Secret;
pub use setting::{BadValue, Setting, flag};
