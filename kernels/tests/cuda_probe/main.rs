//! What is said of drivers and cards that do not serve, and where kernels come from. One test, as the stand-in's answers are
//! those of a whole process.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "shared with tests that ask for more")]
#[path = "../cuda_device/controls.rs"]
mod controls;
#[allow(dead_code, reason = "shared with tests that ask for more")]
#[path = "../cuda_device/stand_in/mod.rs"]
mod stand_in;

use std::path::PathBuf;

use baton_kernels::DType;
use baton_kernels::cuda::{Cuda, CudaMode, CudaOptions, ImageFolders, ImageOrigin, package, probe};

use stand_in::Driver;

#[test]
fn each_obstacle_is_one_line_and_kernels_are_compiled_once() {
    let Some(Driver::StandIn(libraries)) = stand_in::driver() else {
        return;
    };
    if let Err(error) = probe(0, &[]) {
        assert_eq!(error.to_string(), "no NVIDIA driver: libcuda.so.1 cannot be loaded");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "no library").unwrap();
    let message = probe(0, &[folder.path().to_owned()]).unwrap_err().to_string();
    assert!(
        message.starts_with("cannot load ") && !message.contains('\n'),
        "{message}"
    );

    let card = probe(0, std::slice::from_ref(&libraries)).unwrap();
    assert_eq!((card.architecture().as_str(), card.driver_cuda), ("90a", 13_000));
    let obstacle = |name, bad, good| {
        controls::set(name, bad);
        let message = probe(0, &[]).unwrap_err().to_string();
        controls::set(name, good);
        message
    };
    for (name, bad, good, expected) in [
        (
            c"driver_version",
            12_040,
            13_000,
            "the NVIDIA driver supports CUDA 12.4, expected 13.0 or newer (driver 580)",
        ),
        (c"n_devices", 0, 1, "the NVIDIA driver sees no device"),
        (
            c"capability",
            75,
            90,
            "CUDA stand-in has compute capability 7.5, expected 8.0 or newer",
        ),
        (
            c"init_result",
            999,
            0,
            "the NVIDIA driver does not start: CUDA_ERROR_OF_THE_STAND_IN (an error of the stand-in)",
        ),
    ] {
        assert_eq!(obstacle(name, bad, good), expected);
    }
    let message = probe(1, &[]).unwrap_err().to_string();
    assert_eq!(message, "CUDA device 1: the driver sees 1");
    assert_eq!(probe(0, &[]).unwrap(), card, "and then it serves again");

    kernels_are_compiled_once(&libraries);
    a_package_has_every_kernel(&libraries);
}

fn kernels_are_compiled_once(libraries: &std::path::Path) {
    let folder = tempfile::tempdir().unwrap();
    let open = |packaged: Option<PathBuf>, cache: Option<PathBuf>| {
        let cuda = Cuda::new(CudaOptions {
            ordinal: 0,
            dtype: DType::F32,
            head_dim: 8,
            mode: CudaMode::Fast,
            libraries: vec![libraries.to_owned()],
            images: ImageFolders { packaged, cache },
        })
        .unwrap();
        cuda.kernel_origins()
    };
    let cache = folder.path().join("cache");
    let first = std::thread::scope(|scope| {
        let starts = [0, 1].map(|_| scope.spawn(|| open(None, Some(cache.clone()))));
        starts.map(|start| start.join().unwrap())
    });
    let was_compiled = |origin: &ImageOrigin| matches!(origin, ImageOrigin::Compiled(_));
    let n_units = first[0].len();
    assert!(n_units >= 6, "{first:?}");
    // Of two that start at once, one compiles each unit and the other takes it.
    let n_compiled = first
        .iter()
        .flatten()
        .filter(|(_, origin)| was_compiled(origin))
        .count();
    assert_eq!(n_compiled, n_units, "{first:?}");

    // A damaged image is none.
    let mut images: Vec<PathBuf> = std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cubin"))
        .collect();
    images.sort();
    assert_eq!(images.len(), n_units);
    let mut bytes = std::fs::read(&images[0]).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&images[0], bytes).unwrap();
    let again = open(None, Some(cache.clone()));
    let compiled: Vec<_> = again.iter().filter(|(_, origin)| was_compiled(origin)).collect();
    let damaged = images[0].file_name().unwrap().to_str().unwrap();
    assert!(compiled.len() == 1 && damaged.starts_with(&compiled[0].0), "{again:?}");

    // A copy of a warm cache is a package.
    let packaged = open(Some(cache.clone()), None);
    assert!(
        packaged.iter().all(|(_, origin)| *origin == ImageOrigin::Packaged),
        "{packaged:?}"
    );

    // One for another architecture, or of other sources, is passed over.
    for (part, other) in [(1, "sm_80"), (2, "0123456789abcdef")] {
        let package = tempfile::tempdir().unwrap();
        for image in &images {
            let name = image.file_name().unwrap().to_str().unwrap();
            let mut parts: Vec<&str> = name.split('.').collect();
            parts[part] = other;
            std::fs::copy(image, package.path().join(parts.join("."))).unwrap();
        }
        let origins = open(Some(package.path().to_owned()), Some(cache.clone()));
        assert!(
            origins.iter().all(|(_, origin)| *origin == ImageOrigin::Cached),
            "{other}: {origins:?}"
        );
    }
}

/// What is compiled beforehand for a card like this one is all that it needs.
fn a_package_has_every_kernel(libraries: &std::path::Path) {
    // What other tests have compiled is not compiled again.
    let folder = stand_in::image_cache();
    let architectures = ["90a".to_owned()];
    let n_images = package(&[libraries.to_owned()], &architectures, &folder).unwrap();
    let names: std::collections::BTreeSet<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".sm_90a.") && name.ends_with(".cubin"))
        .collect();
    assert!(names.len() >= n_images, "{n_images} of {names:?}");
    for (dtype, head_dim) in [(DType::F32, 8), (DType::Bf16, 128), (DType::F16, 80)] {
        for mode in [CudaMode::Fast, CudaMode::Deterministic] {
            let cuda = Cuda::new(CudaOptions {
                ordinal: 0,
                dtype,
                head_dim,
                mode,
                libraries: vec![libraries.to_owned()],
                images: ImageFolders {
                    packaged: Some(folder.clone()),
                    cache: None,
                },
            })
            .unwrap();
            let origins = cuda.kernel_origins();
            assert!(
                origins.iter().all(|(_, origin)| *origin == ImageOrigin::Packaged),
                "{origins:?}"
            );
        }
    }
}
