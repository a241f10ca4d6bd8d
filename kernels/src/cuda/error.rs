//! Why the CUDA device cannot be had, or what the driver refused: one line each, for an operator. Misuse of a kernel asserts.

use cudarc::driver::result::DriverError;

use super::ipc::CardUuid;
use super::probe::{MIN_CAPABILITY, MIN_DRIVER_CUDA};

/// An expected failure of the CUDA device.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The machine has no driver, or one that cannot be loaded.
    #[error("no NVIDIA driver: libcuda.so.1 cannot be loaded")]
    NoDriver,
    /// The driver is there and does not work.
    #[error("the NVIDIA driver does not start: {reason}")]
    BrokenDriver {
        /// Its own words, or what it lacks.
        reason: String,
    },
    /// The driver is older than the CUDA version that this build speaks.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, expected {}.{} or newer (driver 580)",
        found / 1000, found % 1000 / 10, MIN_DRIVER_CUDA / 1000, MIN_DRIVER_CUDA % 1000 / 10
    )]
    OldDriver {
        /// As the driver says it: 13000 is 13.0.
        found: i32,
    },
    /// The driver sees no card.
    #[error("the NVIDIA driver sees no device")]
    NoDevice,
    /// A card that is not there.
    #[error("CUDA device {ordinal}: the driver sees {n_devices}")]
    Ordinal {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        n_devices: usize,
    },
    /// A card older than what the kernels are written for.
    #[error(
        "{name} has compute capability {}.{}, expected {}.{} or newer",
        capability / 10, capability % 10, MIN_CAPABILITY / 10, MIN_CAPABILITY % 10
    )]
    OldCard {
        /// The card.
        name: String,
        /// 75 is 7.5.
        capability: u32,
    },
    /// A library of the toolkit.
    #[error("{library} cannot be loaded: {needed_for}; put its folder into LD_LIBRARY_PATH or BATON_CUDA_LIBRARIES")]
    NoLibrary {
        /// Its file.
        library: &'static str,
        /// What for.
        needed_for: &'static str,
    },
    /// A library asked for by its folder.
    #[error("cannot load {path}: {reason}")]
    Library {
        /// The file.
        path: String,
        /// The system's own words.
        reason: String,
    },
    /// Device memory ran out.
    #[error("{what}: {n_bytes} bytes of device memory, {free_bytes} are free")]
    OutOfMemory {
        /// For what.
        what: String,
        /// How much.
        n_bytes: usize,
        /// What the driver says is left.
        free_bytes: usize,
    },
    /// Memory that another process names lies on a card that ours cannot read.
    #[error("its memory is on card {found}, ours is {expected}: {reason}")]
    OtherCard {
        /// Where it is.
        found: CardUuid,
        /// Where we compute.
        expected: CardUuid,
        /// Why one does not reach the other.
        reason: &'static str,
    },
    /// A share of the multiprocessors that the driver does not give.
    #[error(
        "{percent}% of the multiprocessors: the driver (CUDA {}.{}) makes no green context of this card, for which CUDA \
         12.4 or newer is needed: {reason}",
        driver / 1000, driver % 1000 / 10
    )]
    NoShare {
        /// What was asked for.
        percent: u8,
        /// As the driver says it: 13000 is 13.0.
        driver: i32,
        /// The driver's words.
        reason: String,
    },
    /// A kernel's source did not compile.
    #[error("kernel source {source_name} does not compile for sm_{architecture}: {log}")]
    Compile {
        /// The source.
        source_name: String,
        /// For which card.
        architecture: String,
        /// The compiler's first line.
        log: String,
    },
    /// An image without one of its kernels, or with one of other parameters.
    #[error("kernel {kernel} of {origin}: {reason}")]
    Kernel {
        /// The entry point.
        kernel: String,
        /// Where its image came from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that the kernels do not do.
    #[error("{what}: found {found}, expected {expected}")]
    Unsupported {
        /// Of the model or the options.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A call that failed although nothing expected it to.
    #[error("cannot {action}: {reason}")]
    Call {
        /// What we were doing.
        action: String,
        /// The driver's or library's words.
        reason: String,
    },
}

/// What a driver's error means to us: what we were doing, and its words.
pub(super) trait During<T> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, CudaError>;

    /// As `during`, of a call whose failure leaves nothing to go on with.
    fn or_stop(self, action: &str) -> T;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::Call {
            action: action(),
            reason: words(error),
        })
    }

    fn or_stop(self, action: &str) -> T {
        // An error of the device is for good: the context answers every later call with it. The step thread ends, its
        // sequences fail with this line, and the process is replaced.
        self.unwrap_or_else(|error| panic!("CUDA: cannot {action}: {}", words(error)))
    }
}

pub(super) fn words(error: DriverError) -> String {
    let name = error.error_name().map_or("?".into(), |name| name.to_string_lossy());
    let words = error.error_string().map_or("?".into(), |words| words.to_string_lossy());
    format!("{name} ({words})")
}
