//! Kernel sources to images of a card's machine code, by NVRTC. No cache and no files.

use std::ffi::{CStr, CString, c_char, c_int};

use cudarc::nvrtc::sys;

use super::error::CudaError;
use super::sources::{HEAD_DIMS, HEADERS, SOURCES, Source};

/// One image to be: a source with what it is compiled for.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    /// Names the image: the source's, and what is special of it.
    pub(super) name: String,
    /// The source.
    pub(super) text: &'static str,
    /// Macros, as in `-D`.
    pub(super) defines: Vec<String>,
}

impl Unit {
    /// A source, of those that have instances by head size that of `head_dim`, one of [`HEAD_DIMS`].
    pub(super) fn new(source: &Source, head_dim: Option<u32>) -> Unit {
        let plain = Unit {
            name: source.name.to_owned(),
            text: source.text,
            defines: Vec::new(),
        };
        match head_dim {
            None => plain,
            Some(head_dim) => Unit {
                name: format!("{}_d{head_dim}", source.name),
                defines: vec![format!("BATON_HEAD_DIM={head_dim}")],
                ..plain
            },
        }
    }

    /// Everything that a device may ask for.
    pub(super) fn all() -> Vec<Unit> {
        let of_source = |source: &Source| match source.by_head_dim {
            true => HEAD_DIMS.map(|head_dim| Unit::new(source, Some(head_dim))).to_vec(),
            false => vec![Unit::new(source, None)],
        };
        SOURCES.iter().flat_map(of_source).collect()
    }

    /// Without the architecture, which names the image too.
    fn options(&self) -> Vec<String> {
        let defines = self.defines.iter().map(|define| format!("-D{define}"));
        // A spill is a mistake in a kernel, and a silent one: it only costs time. With the compiler that kernels are checked
        // with it is an error (kernels/cuda/check); whoever has another serves all the same, and is told.
        let fixed = ["--std=c++17", "--ptxas-options=-warn-spills"];
        fixed.into_iter().map(str::to_owned).chain(defines).collect()
    }

    /// Names what the image is compiled from: sources and options.
    pub(super) fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(self.text);
        HEADERS.iter().for_each(|(name, text)| {
            add(name);
            add(text);
        });
        self.options().iter().for_each(|option| add(option));
        hasher.finalize().to_hex()[..16].to_owned()
    }
}

/// NVRTC, if it can be loaded.
pub(super) struct Compiler {
    pub(super) version: (i32, i32),
}

impl Compiler {
    /// NVRTC, if it is there and answers.
    pub(super) fn find() -> Option<Compiler> {
        // SAFETY: loads the library by its usual names.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        (status == sys::nvrtcResult::NVRTC_SUCCESS).then_some(Compiler {
            version: (major, minor),
        })
    }

    pub(super) fn missing() -> CudaError {
        CudaError::NoLibrary {
            library: "libnvrtc.so.13",
            needed_for: "kernels that are neither packaged nor cached must be compiled",
        }
    }

    /// The image of a unit for `sm_<architecture>`.
    ///
    /// # Errors
    /// What the compiler says first.
    pub(super) fn compile(&self, unit: &Unit, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let fail = |log: String| CudaError::Compile {
            source_name: unit.name.clone(),
            architecture: architecture.to_owned(),
            log,
        };
        let program = Program::new(unit).map_err(&fail)?;
        let mut options = unit.options();
        options.push(format!("--gpu-architecture=sm_{architecture}"));
        let options: Vec<CString> = options.into_iter().map(no_zero).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: strings that end in zero, alive during the call.
        let status = unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            let said = program.first_line_with("error").or_else(|| program.first_line_with(""));
            return Err(fail(said.unwrap_or_else(|| format!("{status:?}"))));
        }
        if let Some(warning) = program.first_line_with("spill") {
            tracing::warn!(source_name = unit.name, architecture, warning, "a kernel will be slow");
        }
        program.image().map_err(fail)
    }
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(unit: &Unit) -> Result<Program, String> {
        let [text, name] = [unit.text, &unit.name].map(|text| no_zero(text.to_owned()));
        let headers: Vec<(CString, CString)> = HEADERS
            .iter()
            .map(|(name, text)| (no_zero((*name).to_owned()), no_zero((*text).to_owned())))
            .collect();
        let names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: strings that end in zero and arrays of as many as is said; NVRTC copies them.
        let status = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        match status {
            sys::nvrtcResult::NVRTC_SUCCESS => Ok(Program(program)),
            status => Err(format!("{status:?}")),
        }
    }

    fn image(&self) -> Result<Vec<u8>, String> {
        let mut n_bytes = 0;
        // SAFETY: a compiled program; writes one integer.
        let status = unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut n_bytes) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS || n_bytes == 0 {
            return Err(format!("no image: {status:?}"));
        }
        let mut image = vec![0_u8; n_bytes];
        // SAFETY: as many bytes as it said.
        match unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) } {
            sys::nvrtcResult::NVRTC_SUCCESS => Ok(image),
            status => Err(format!("no image: {status:?}")),
        }
    }

    /// The log's first line that has this word.
    fn first_line_with(&self, word: &str) -> Option<String> {
        let mut n_bytes = 0;
        // SAFETY: a program of ours; writes one integer.
        let status = unsafe { sys::nvrtcGetProgramLogSize(self.0, &raw mut n_bytes) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS || n_bytes == 0 {
            return None;
        }
        let mut log = vec![0_u8; n_bytes];
        // SAFETY: as many bytes as it said, the last of them zero.
        unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        let log = CStr::from_bytes_until_nul(&log).ok()?.to_string_lossy().into_owned();
        let line = log.lines().find(|line| line.contains(word))?;
        Some(line.trim().to_owned())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn no_zero(text: String) -> CString {
    CString::new(text).expect("sources and options hold no zero bytes")
}
