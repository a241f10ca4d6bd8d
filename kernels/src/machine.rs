//! What this machine can do: read and copy bandwidth, peak of the products. For rooflines; takes a fraction of a second each.

use std::time::Instant;

use crate::aligned::AlignedBuf;
use crate::cpu::Isa;
use crate::cpu::dispatch::dispatch;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{Bf16Words, Dot, F32Words, Kernel, LANES, Simd};
use crate::error::KernelError;
use crate::layout::DType;

/// Far above any last-level cache we tune for.
const BUFFER_WORDS: usize = (256 << 20) / 4;

/// Read in one pass; coming back to a window takes 256 MiB of others.
const PASS_WORDS: usize = BUFFER_WORDS / 8;

/// A pass is short and passes are many, so that the best one fell between two of the system's time slices.
const PASSES: usize = 40;

/// Read bandwidth of memory in GB/s (1e9 bytes): the best of many short passes that walk through 256 MiB.
///
/// # Errors
/// A number of threads out of range.
pub fn measure_read_bandwidth(n_threads: usize) -> Result<f64, KernelError> {
    let mut pool = Pool::new(n_threads)?;
    let mut buffer = AlignedBuf::<u32>::zeroed(BUFFER_WORDS);
    buffer.fill(1);
    let isa = Isa::best();
    let n_items = 16 * n_threads;
    let per_item = PASS_WORDS / n_items / 64 * 64;
    let mut windows = (0..BUFFER_WORDS / PASS_WORDS).cycle();
    let seconds = best_of(|| {
        let window = &buffer[windows.next().unwrap_or(0) * PASS_WORDS..][..PASS_WORDS];
        pool.for_each(n_items, &|item| {
            let words = &window[item * per_item..][..per_item];
            std::hint::black_box(dispatch(isa, ReadAll { words }));
        });
    });
    Ok((n_items * per_item * 4) as f64 / seconds / 1e9)
}

/// Copy bandwidth of memory in GB/s of bytes copied (each is read once and written once).
///
/// # Errors
/// A number of threads out of range.
pub fn measure_copy_bandwidth(n_threads: usize) -> Result<f64, KernelError> {
    let mut pool = Pool::new(n_threads)?;
    let half = BUFFER_WORDS / 2;
    let mut source = AlignedBuf::<u32>::zeroed(half);
    source.fill(1);
    let n_items = 16 * n_threads;
    let per_item = half / n_items;
    let mut target = vec![0_u32; n_items * per_item];
    let chunks: Vec<std::sync::Mutex<&mut [u32]>> =
        target.chunks_exact_mut(per_item).map(std::sync::Mutex::new).collect();
    let seconds = best_of(|| {
        pool.for_each(n_items, &|item| {
            let mut chunk = chunks[item].lock().expect("copying does not panic");
            chunk.copy_from_slice(&source[item * per_item..][..per_item]);
        });
    });
    Ok((n_items * per_item * 4) as f64 / seconds / 1e9)
}

/// Peak of the inner product that `linear` uses, in GFLOP/s (a multiply-add is two), from registers alone.
///
/// # Errors
/// f16, or a number of threads out of range.
pub fn measure_peak(dtype: DType, n_threads: usize) -> Result<f64, KernelError> {
    if dtype == DType::F16 {
        return Err(KernelError::UnsupportedDType { what: "peak", dtype });
    }
    let mut pool = Pool::new(n_threads)?;
    let isa = Isa::best();
    let n_items = 8 * n_threads;
    let seconds = best_of(|| {
        pool.for_each(n_items, &|_| match dtype {
            DType::Bf16 => dispatch(isa, Peak::<Bf16Words>(std::marker::PhantomData)),
            DType::F32 | DType::F16 => dispatch(isa, Peak::<F32Words>(std::marker::PhantomData)),
        });
    });
    let per_word = 4 / dtype.size();
    Ok((n_items * PEAK_STEPS * CHAINS * LANES * per_word * 2) as f64 / seconds / 1e9)
}

fn best_of(mut pass: impl FnMut()) -> f64 {
    pass();
    let mut seconds = f64::INFINITY;
    for _ in 0..PASSES {
        let started = Instant::now();
        pass();
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    seconds
}

/// Reads words at full speed, with the same prefetch distance as the products.
struct ReadAll<'a> {
    words: &'a [u32],
}

impl Kernel for ReadAll<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); 8];
        for chunk in self.words.chunks_exact(8 * LANES) {
            for (lane_idx, sum) in sums.iter_mut().enumerate() {
                let p = chunk.as_ptr().wrapping_add(lane_idx * LANES);
                simd.prefetch(p.wrapping_add(4096));
                // SAFETY: within the chunk of 8 * 16 words.
                *sum = simd.add(*sum, unsafe { simd.load(p.cast()) });
            }
        }
        sums.into_iter().map(|sum| simd.reduce_add(sum)).sum()
    }
}

/// Independent chains, enough to hide the latency and few enough for the registers.
const CHAINS: usize = 12;
const PEAK_STEPS: usize = 1 << 14;

struct Peak<D>(std::marker::PhantomData<D>);

impl<D: Dot> Kernel for Peak<D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let words = std::hint::black_box([0x3f80_3f80_u32; LANES]);
        let a = D::splat(simd, words[0]);
        // SAFETY: 16 words.
        let b = unsafe { D::load(simd, words.as_ptr()) };
        let mut sums = [simd.splat(0.0); CHAINS];
        for _ in 0..PEAK_STEPS {
            for sum in &mut sums {
                *sum = D::dot(simd, *sum, a, b);
            }
        }
        std::hint::black_box(sums.map(|sum| simd.reduce_add(sum)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_f16_is_refused() {
        assert!(measure_peak(DType::Bf16, 1).unwrap() > 0.1);
        assert!(measure_read_bandwidth(1).unwrap() > 0.1);
        assert!(measure_peak(DType::F16, 1).is_err());
    }
}
