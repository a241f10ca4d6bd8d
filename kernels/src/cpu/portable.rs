//! The portable instruction set: arrays and plain loops, which the compiler vectorises as the target allows.

use super::simd::{LANES, Simd, round_bf16, widen_bf16};

/// Always available.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|lane_idx| f(a[lane_idx], b[lane_idx]))
}

impl Simd for Portable {
    type V = V;
    type Pairs = (V, V);
    type PairSplat = (f32, f32);

    const TILE: (usize, usize) = (2, 1);

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's promise; the pointer may be unaligned.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller's promise; the pointer may be unaligned.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        // SAFETY: the caller's promise; the pointer may be unaligned.
        let stored = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        stored.map(widen_bf16)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: V) {
        // SAFETY: the caller's promise; the pointer may be unaligned.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(v.map(round_bf16)) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    // Not fused: without FMA hardware `f32::mul_add` is a library call.
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|lane_idx| a[lane_idx] * b[lane_idx] + c[lane_idx])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn pow2(self, n: V) -> V {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    fn zero_below(self, x: V, limit: f32, y: V) -> V {
        map2(x, y, |x, y| if x < limit { 0.0 } else { y })
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const u32) -> (V, V) {
        // SAFETY: the caller's promise; the pointer may be unaligned.
        let words = unsafe { p.cast::<[u32; LANES]>().read_unaligned() };
        (
            words.map(|word| f32::from_bits(word << 16)),
            words.map(|word| f32::from_bits(word & 0xffff_0000)),
        )
    }
    #[inline(always)]
    fn splat_pair(self, word: u32) -> (f32, f32) {
        (f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000))
    }
    #[inline(always)]
    fn dot_pairs(self, acc: V, a: (f32, f32), b: (V, V)) -> V {
        std::array::from_fn(|lane_idx| (acc[lane_idx] + a.0 * b.0[lane_idx]) + a.1 * b.1[lane_idx])
    }
    #[inline(always)]
    fn prefetch<T>(self, _p: *const T) {}
}
