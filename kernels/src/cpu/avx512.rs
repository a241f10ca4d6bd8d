//! AVX-512: sixteen lanes are one register. Two sets: with bf16 dot products, and without.

use std::arch::x86_64::*;

use super::simd::{LANES, Simd};

/// Exists only where AVX-512 F, BW, DQ and VL were detected.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Exists only where AVX-512 with BF16 was detected.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL.
    pub(crate) unsafe fn new() -> Avx512 {
        Avx512(())
    }
}

impl Avx512Bf16 {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ, VL and BF16.
    pub(crate) unsafe fn new() -> Avx512Bf16 {
        Avx512Bf16(())
    }
}

macro_rules! common {
    () => {
        type V = __m512;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> __m512 {
            // SAFETY: the token proves AVX-512; 16 f32 are readable by the caller's promise.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: __m512) {
            // SAFETY: the token proves AVX-512; 16 f32 are writable by the caller's promise.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn load_partial(self, p: *const f32, n: usize, fill: f32) -> __m512 {
            // SAFETY: the token proves AVX-512; masked lanes are not read.
            unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p) }
        }
        #[inline(always)]
        unsafe fn store_partial(self, p: *mut f32, n: usize, v: __m512) {
            // SAFETY: the token proves AVX-512; masked lanes are not written.
            unsafe { _mm512_mask_storeu_ps(p, first_lanes(n), v) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, p: *const u16) -> __m512 {
            // SAFETY: the token proves AVX-512; 16 bf16 are readable by the caller's promise.
            unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
            }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn pow2(self, n: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        fn zero_below(self, x: __m512, limit: f32, y: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(limit)), y) }
        }
        #[inline(always)]
        unsafe fn transpose(self, rows: &[*const u32; LANES], dst: *mut u32) {
            // SAFETY: the token proves AVX-512; the caller promises the rows and dst.
            unsafe { transpose(rows, dst) }
        }
        #[inline(always)]
        fn prefetch<T>(self, p: *const T) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    };
}

#[inline(always)]
fn first_lanes(n: usize) -> __mmask16 {
    debug_assert!(n <= LANES);
    ((1_u32 << n) - 1) as __mmask16
}

/// # Safety
/// AVX-512 F; 16 rows of 16 readable words, 256 writable words at `dst`.
#[inline(always)]
unsafe fn transpose(rows: &[*const u32; LANES], dst: *mut u32) {
    // SAFETY: AVX-512 by the caller's promise; each row is read for 16 words, and dst written for 16 * 16.
    unsafe {
        let load = |row_idx: usize| _mm512_loadu_ps(rows[row_idx].cast());
        // Within 128-bit lanes: 4 x 4 blocks of words are transposed, lane by lane.
        let mut quads = [_mm512_setzero_ps(); LANES];
        for group in 0..4 {
            let (a, b) = (load(4 * group), load(4 * group + 1));
            let (c, d) = (load(4 * group + 2), load(4 * group + 3));
            let ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
            let ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
            let cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
            let cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
            quads[4 * group] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
            quads[4 * group + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
            quads[4 * group + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
            quads[4 * group + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
        }
        // Then the 4 x 4 grid of 128-bit lanes: quads[4 * group + i] holds rows 4 * group.. of words i, 4 + i, 8 + i, 12 + i.
        for word in 0..4 {
            let (a, b) = (quads[word], quads[4 + word]);
            let (c, d) = (quads[8 + word], quads[12 + word]);
            let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
            let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
            let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
            let store = |word_idx: usize, v: __m512| _mm512_storeu_ps(dst.add(word_idx * LANES).cast(), v);
            store(word, _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even));
            store(8 + word, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even));
            store(4 + word, _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd));
            store(12 + word, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd));
        }
    }
}

impl Simd for Avx512Bf16 {
    type Pairs = __m512bh;
    type PairSplat = __m512bh;

    const TILE: (usize, usize) = (6, 4);

    common!();

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: __m512) {
        // SAFETY: the token proves AVX-512 BF16; 16 bf16 are writable by the caller's promise; both are 256 bits.
        unsafe {
            _mm256_storeu_si256(
                p.cast(),
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const u32) -> __m512bh {
        // SAFETY: the token proves AVX-512; 16 words are readable by the caller's promise; both are 512 bits.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    fn splat_pair(self, word: u32) -> __m512bh {
        // SAFETY: the token proves AVX-512; both types are 512 bits of plain data.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(word as i32)) }
    }
    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: the token proves AVX-512 BF16.
        unsafe { _mm512_dpbf16_ps(acc, a, b) }
    }
}

impl Simd for Avx512 {
    type Pairs = (__m512, __m512);
    type PairSplat = (__m512, __m512);

    const TILE: (usize, usize) = (6, 2);

    common!();

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: __m512) {
        // SAFETY: the token proves AVX-512; 16 bf16 are writable by the caller's promise.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let words = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(words));
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const u32) -> (__m512, __m512) {
        // SAFETY: the token proves AVX-512; 16 words are readable by the caller's promise.
        unsafe {
            let words = _mm512_loadu_si512(p.cast());
            let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
                _mm512_castsi512_ps(high),
            )
        }
    }
    #[inline(always)]
    fn splat_pair(self, word: u32) -> (__m512, __m512) {
        (
            self.splat(f32::from_bits(word << 16)),
            self.splat(f32::from_bits(word & 0xffff_0000)),
        )
    }
    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: (__m512, __m512), b: (__m512, __m512)) -> __m512 {
        self.mul_add(a.1, b.1, self.mul_add(a.0, b.0, acc))
    }
}
