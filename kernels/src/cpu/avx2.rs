//! AVX2 with FMA: sixteen lanes are two registers.

use std::arch::x86_64::*;

use super::simd::{LANES, Simd, round_bf16};

/// Exists only where AVX2 and FMA were detected.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has AVX2 and FMA.
    pub(crate) unsafe fn new() -> Avx2 {
        Avx2(())
    }
}

#[derive(Clone, Copy)]
pub(crate) struct V(__m256, __m256);

macro_rules! both {
    ($intrinsic:ident, $a:expr, $b:expr) => {{
        // SAFETY: the token proves AVX2 and FMA, and the intrinsic has no other precondition.
        unsafe { V($intrinsic($a.0, $b.0), $intrinsic($a.1, $b.1)) }
    }};
}

impl Simd for Avx2 {
    type V = V;
    type Pairs = (V, V);
    type PairSplat = (V, V);

    const TILE: (usize, usize) = (4, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: the token proves AVX2.
        unsafe { V(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the token proves AVX2; 16 f32 are readable by the caller's promise.
        unsafe { V(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the token proves AVX2; 16 f32 are writable by the caller's promise.
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        // SAFETY: the token proves AVX2; 16 bf16 are readable by the caller's promise.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            V(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: V) {
        let rounded = self.to_array(v).map(round_bf16);
        // SAFETY: 16 bf16 are writable by the caller's promise.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(rounded) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        // SAFETY: the token proves FMA.
        unsafe { V(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn pow2(self, n: V) -> V {
        // SAFETY: the token proves AVX2.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias));
            V(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }
    #[inline(always)]
    fn zero_below(self, x: V, limit: f32, y: V) -> V {
        // SAFETY: the token proves AVX2.
        unsafe {
            let limit = _mm256_set1_ps(limit);
            V(
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), y.0),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), y.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const u32) -> (V, V) {
        // SAFETY: the token proves AVX2; 16 words are readable by the caller's promise.
        unsafe {
            let a = _mm256_loadu_si256(p.cast());
            let b = _mm256_loadu_si256(p.add(8).cast());
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            (
                V(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ),
                V(
                    _mm256_castsi256_ps(_mm256_and_si256(a, high)),
                    _mm256_castsi256_ps(_mm256_and_si256(b, high)),
                ),
            )
        }
    }
    #[inline(always)]
    fn splat_pair(self, word: u32) -> (V, V) {
        (
            self.splat(f32::from_bits(word << 16)),
            self.splat(f32::from_bits(word & 0xffff_0000)),
        )
    }
    #[inline(always)]
    fn dot_pairs(self, acc: V, a: (V, V), b: (V, V)) -> V {
        self.mul_add(a.1, b.1, self.mul_add(a.0, b.0, acc))
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: prefetching never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
