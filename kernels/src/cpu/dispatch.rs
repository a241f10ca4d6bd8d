//! The entry points that compile a kernel for each instruction set and pick one at run time.

use super::isa::Isa;
use super::portable::Portable;
use super::simd::Kernel;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512, avx512::Avx512Bf16};

/// Runs `kernel` with the instructions of `isa`, which must be available ([`Isa::is_available`]).
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: `Cpu` holds an Isa only after detecting it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { run_avx2(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => unreachable!("{isa} was never detected here"),
        Isa::Portable => kernel.run(Portable),
    }
}

/// # Safety
/// The processor has the features named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the features are enabled here, so the processor has them.
    kernel.run(unsafe { Avx512Bf16::new() })
}

/// # Safety
/// The processor has the features named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the features are enabled here, so the processor has them.
    kernel.run(unsafe { Avx512::new() })
}

/// # Safety
/// The processor has the features named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the features are enabled here, so the processor has them.
    kernel.run(unsafe { Avx2::new() })
}
