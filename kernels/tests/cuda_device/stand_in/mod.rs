//! A stand-in for the driver, NVRTC and cuBLASLt over host memory, built by g++: so that the host side of the CUDA device,
//! cudarc included, runs where there is no card. With REQUIRE_GPU=1 the same tests run on the card.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const SOURCES: [(&str, &str, &str); 3] = [
    ("libcuda.so", "driver.cpp", include_str!("driver.cpp")),
    ("libnvrtc.so", "nvrtc.cpp", include_str!("nvrtc.cpp")),
    ("libcublasLt.so", "cublaslt.cpp", include_str!("cublaslt.cpp")),
];

/// What tests compute on.
pub enum Driver {
    /// The machine's own.
    Card,
    /// The stand-in's libraries in this folder.
    StandIn(PathBuf),
}

impl Driver {
    /// Folders for the options of a device.
    pub fn libraries(&self) -> Vec<PathBuf> {
        match self {
            Driver::Card => Vec::new(),
            Driver::StandIn(folder) => vec![folder.clone()],
        }
    }
}

/// The driver to test on; `None`, with a word, where there is neither a card that was asked for nor a compiler.
pub fn driver() -> Option<Driver> {
    if std::env::var_os("REQUIRE_GPU").is_some_and(|value| value == "1") {
        return Some(Driver::Card);
    }
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| has_compiler().then(build));
    folder.clone().map(Driver::StandIn)
}

/// Where compiled kernels are kept between runs of the tests: with the stand-in that compiled them, or of the card.
pub fn image_cache() -> PathBuf {
    match driver() {
        Some(Driver::StandIn(folder)) => folder.join("images"),
        Some(Driver::Card) | None => std::env::temp_dir().join("baton-cuda-images"),
    }
}

fn has_compiler() -> bool {
    let found = Command::new("g++")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        let required = std::env::var_os("REQUIRE_CXX").is_some_and(|value| value == "1");
        assert!(!required, "REQUIRE_CXX=1 and no g++");
        eprintln!("SKIPPED: no g++");
    }
    found
}

/// Builds the libraries into a folder named after what they are built from.
fn build() -> PathBuf {
    let shim = SHIM_FOLDERS
        .iter()
        .find_map(|folder| Path::new(folder).canonicalize().ok());
    let shim = shim.expect("the shim is in the repository");
    let flags = [
        "-std=c++17",
        "-O2",
        "-g1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
    ];
    let texts = SOURCES.iter().map(|(_, _, text)| *text).chain([SHIM]);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in texts.chain(flags).chain(shim.to_str()).flat_map(str::bytes) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let parent = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = parent.join(format!("cuda_stand_in_{hash:016x}"));
    if folder.exists() {
        return folder;
    }
    // Built aside and renamed, as several test binaries may start at once.
    let aside = parent.join(format!("cuda_stand_in_{hash:016x}.{}", std::process::id()));
    std::fs::create_dir_all(&aside).unwrap();
    for (library, source, text) in SOURCES {
        let path = aside.join(source);
        std::fs::write(&path, text).unwrap();
        let built = Command::new("g++")
            .args(flags)
            .arg(format!("-DSTAND_IN_SHIM_DIR=\"{}\"", shim.display()))
            // Found by this name before any library of the system is looked for.
            .arg(format!("-Wl,-soname,{library}"))
            .arg(&path)
            .arg("-o")
            .arg(aside.join(library))
            .output()
            .unwrap();
        assert!(
            built.status.success(),
            "{source}: {}",
            String::from_utf8_lossy(&built.stderr)
        );
    }
    if std::fs::rename(&aside, &folder).is_err() {
        std::fs::remove_dir_all(&aside).unwrap();
    }
    folder
}

/// What kernels are compiled with besides their own headers.
const SHIM: &str = include_str!("../../../cuda/shim.h");

/// From the packages that include this file: a member's, and the workspace's own.
const SHIM_FOLDERS: [&str; 2] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/cuda"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/cuda"),
];
