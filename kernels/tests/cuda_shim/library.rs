//! Builds a kernel source for the CPU with g++ and loads it. Libraries are kept by the hash of all that went into them.
//! `REQUIRE_CXX=1` makes a missing g++ an error; `BATON_SHIM_SANITIZE=1` builds with address and undefined-behaviour
//! sanitizers, for a process that has libasan preloaded.

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use baton_kernels::cuda::launch::Launch;
use baton_kernels::cuda::sources::{HEAD_DIMS, Source, source_of};

/// A loaded source.
pub struct Library {
    handle: *mut c_void,
    reverse: unsafe extern "C" fn(c_int),
}

// SAFETY: a handle of dlopen may be used from any thread, and it is never closed.
unsafe impl Send for Library {}
// SAFETY: as above; dlsym is thread-safe.
unsafe impl Sync for Library {}

type Trampoline = unsafe extern "C" fn(c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *const *const c_void);

/// Whether there is a g++; without one a test says so and ends.
pub fn has_compiler() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        Command::new("g++")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    });
    assert!(
        found || std::env::var_os("REQUIRE_CXX").is_none(),
        "REQUIRE_CXX is set and there is no g++"
    );
    if !found {
        println!("SKIPPED: no g++");
    }
    found
}

fn is_sanitized() -> bool {
    std::env::var_os("BATON_SHIM_SANITIZE").is_some()
}

/// The library of a source, built at the first call; of a source by head size, the instances of one size.
pub fn library(source: &'static Source, head_dim: Option<u32>) -> Arc<Library> {
    type Built = Arc<OnceLock<Arc<Library>>>;
    type Libraries = HashMap<(&'static str, Option<u32>), Built>;
    static LIBRARIES: OnceLock<Mutex<Libraries>> = OnceLock::new();
    let built = LIBRARIES
        .get_or_init(Mutex::default)
        .lock()
        .unwrap()
        .entry((source.name, head_dim))
        .or_default()
        .clone();
    built
        .get_or_init(|| Arc::new(Library::load(&build(source, head_dim))))
        .clone()
}

/// Where a source's library lies, built if it is not there.
pub fn build(source: &Source, head_dim: Option<u32>) -> PathBuf {
    assert_eq!(
        head_dim.is_some(),
        source.by_head_dim,
        "{}: built for head size {head_dim:?}",
        source.name
    );
    assert!(head_dim.is_none_or(|head_dim| HEAD_DIMS.contains(&head_dim)));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/cuda");
    let mut options: Vec<String> =
        "-std=c++17 -ffp-contract=off -fPIC -shared -fvisibility=hidden -pthread -DBATON_SHIM -Wall -Wextra \
                                    -Werror -Wno-unknown-pragmas -Wno-unknown-warning-option"
            .split_whitespace()
            .map(str::to_owned)
            .collect();
    options.extend(head_dim.map(|head_dim| format!("-DBATON_HEAD_DIM={head_dim}")));
    if is_sanitized() {
        // Fibers have stacks of their own, which the sanitizer's own bookkeeping of the stack does not know.
        let sanitize = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all --param=asan-stack=0";
        options.extend(sanitize.split_whitespace().map(str::to_owned));
    } else {
        options.push("-O2".to_owned());
    }
    let mut hasher = DefaultHasher::new();
    options.hash(&mut hasher);
    let mut inputs: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "cuh" || extension == "h")
        })
        .collect();
    inputs.sort();
    let text = folder.join(format!("{}.cu", source.name));
    inputs.push(text.clone());
    for input in inputs {
        std::fs::read(input).unwrap().hash(&mut hasher);
    }
    let name = format!("shim-{}-{:016x}.so", source.name, hasher.finish());
    let finished = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    if !finished.exists() {
        // Renamed when whole, so that concurrent test processes never load half a file.
        let unfinished = finished.with_extension(format!("{}.tmp", std::process::id()));
        let output = Command::new("g++")
            .args(&options)
            .arg("-I")
            .arg(&folder)
            .args(["-x", "c++"])
            .arg(&text)
            .arg("-o")
            .arg(&unfinished)
            // A preloaded sanitizer is for this process, not for the compiler.
            .env_remove("LD_PRELOAD")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}: g++ failed:\n{}",
            source.name,
            String::from_utf8_lossy(&output.stderr)
        );
        std::fs::rename(&unfinished, &finished).unwrap();
    }
    finished
}

impl Library {
    fn load(path: &Path) -> Library {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the path is a library we built, whose initialisers only set up C++'s runtime.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: dlerror gives a C string after a failure.
            let error = unsafe { std::ffi::CStr::from_ptr(libc::dlerror()) };
            panic!("{}: {}", path.display(), error.to_string_lossy());
        }
        let symbol = symbol(handle, "baton_shim_reverse").expect("shim.h exports it");
        // SAFETY: shim.h defines baton_shim_reverse with this type.
        let reverse = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(symbol) };
        Library { handle, reverse }
    }

    /// Whether the library has a kernel of this name.
    pub fn has(&self, entry: &str) -> bool {
        symbol(self.handle, &format!("{entry}__launch")).is_some()
    }

    /// Runs a kernel to its end, threads from the first to the last or the other way round.
    ///
    /// # Safety
    /// `args` are the kernel's arguments, in order and of its types, and the memory they name is as large as it says.
    pub unsafe fn launch(&self, entry: &str, launch: Launch, reversed: Order, args: &[Arg]) {
        let symbol = symbol(self.handle, &format!("{entry}__launch")).unwrap_or_else(|| panic!("no kernel {entry}"));
        // SAFETY: BATON_EXPORT defines every such symbol with this type.
        let trampoline = unsafe { std::mem::transmute::<*mut c_void, Trampoline>(symbol) };
        // Little endian: the low bytes of a word are the smaller scalar.
        let words: Vec<u64> = args.iter().map(|arg| arg.0).collect();
        let pointers: Vec<*const c_void> = words.iter().map(|word| std::ptr::from_ref(word).cast()).collect();
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        // SAFETY: the caller's promise; every argument is at most 8 bytes and stands in a word of its own.
        unsafe {
            (self.reverse)(c_int::from(reversed == Order::Reversed));
            trampoline(
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                launch.shared_bytes as usize,
                pointers.as_ptr(),
            );
        }
    }
}

fn symbol(handle: *mut c_void, name: &str) -> Option<*mut c_void> {
    let name = CString::new(name).unwrap();
    // SAFETY: the handle is of a library that stays loaded.
    let address = unsafe { libc::dlsym(handle, name.as_ptr().cast::<c_char>()) };
    (!address.is_null()).then_some(address)
}

/// Runs an entry whose source has no head size.
pub fn launch(entry: &str, launch: Launch, order: Order, args: &[Arg]) {
    let source = source_of(entry).unwrap_or_else(|| panic!("no source has {entry}"));
    // SAFETY: each test passes what README.md says of the entry, in buffers of the sizes it says.
    unsafe { library(source, None).launch(entry, launch, order, args) }
}

/// Runs one head size's instance of an entry.
pub fn launch_for_head_dim(entry: &str, head_dim: u32, launch: Launch, order: Order, args: &[Arg]) {
    let source = source_of(entry).unwrap_or_else(|| panic!("no source has {entry}"));
    let entry = format!("{entry}_d{head_dim}");
    // SAFETY: as for `launch`.
    unsafe { library(source, Some(head_dim)).launch(&entry, launch, order, args) }
}

/// In which order a CTA's threads take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// First to last.
    Forward,
    /// Last to first.
    Reversed,
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub struct Arg(u64);

impl From<u32> for Arg {
    fn from(x: u32) -> Arg {
        Arg(x.into())
    }
}
impl From<u64> for Arg {
    fn from(x: u64) -> Arg {
        Arg(x)
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg(x.to_bits().into())
    }
}
impl<T> From<&[T]> for Arg {
    fn from(x: &[T]) -> Arg {
        Arg(x.as_ptr() as u64)
    }
}
impl<T> From<&Vec<T>> for Arg {
    fn from(x: &Vec<T>) -> Arg {
        Arg(x.as_ptr() as u64)
    }
}
impl<T> From<&mut Vec<T>> for Arg {
    fn from(x: &mut Vec<T>) -> Arg {
        Arg(x.as_mut_ptr() as u64)
    }
}

/// An absent operand.
pub const NULL: Arg = Arg(0);
