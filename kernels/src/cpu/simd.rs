//! Sixteen f32 lanes, whatever the processor has: the vocabulary the operators are written in, once.
//! Lanes never mix except in `reduce_*`, whose order is fixed, so an element's bits do not depend on its lane.

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// A token that proves its instruction set is available; its methods compile to that set once inlined into the
/// entry points of `dispatch`. Memory methods are unsafe for their pointers only.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen words of two bf16 each, ready to multiply.
    type Pairs: Copy;
    /// One word of two bf16 in every lane, ready to multiply.
    type PairSplat: Copy;

    /// Rows and vectors of columns of the product's register tile.
    const TILE: (usize, usize);

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `p` is readable for 16 f32.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` is writable for 16 f32.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Lanes from `n` on are `fill`.
    /// # Safety
    /// `p` is readable for `n <= 16` f32.
    unsafe fn load_partial(self, p: *const f32, n: usize, fill: f32) -> Self::V {
        let mut lanes = [fill; LANES];
        // SAFETY: n <= 16 elements are readable by the caller's promise and fit the array.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }
    /// # Safety
    /// `p` is writable for `n <= 16` f32.
    unsafe fn store_partial(self, p: *mut f32, n: usize, v: Self::V) {
        let lanes = self.to_array(v);
        // SAFETY: n <= 16 elements are writable by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n) }
    }
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array holds 16 f32.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes
    }

    /// # Safety
    /// `p` is readable for 16 bf16.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// Rounds to nearest even.
    /// # Safety
    /// `p` is writable for 16 bf16.
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`: fused where the instruction set fuses.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `b` where a lane of either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `b` where a lane of either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `2^n` for integral lanes of -126 to 127.
    fn pow2(self, n: Self::V) -> Self::V;
    /// `y` where not `x < limit`, else 0.
    fn zero_below(self, x: Self::V, limit: f32, y: Self::V) -> Self::V;

    /// # Safety
    /// `p` is readable for 16 words.
    unsafe fn load_pairs(self, p: *const u32) -> Self::Pairs;
    fn splat_pair(self, word: u32) -> Self::PairSplat;
    /// `acc + a.low * b.low + a.high * b.high`, in one order per instruction set.
    fn dot_pairs(self, acc: Self::V, a: Self::PairSplat, b: Self::Pairs) -> Self::V;

    /// `dst[word][row] = rows[row][word]` for 16 rows of 16 words.
    /// # Safety
    /// Each row is readable for 16 words, `dst` writable for 256.
    unsafe fn transpose(self, rows: &[*const u32; LANES], dst: *mut u32) {
        for (row_idx, row) in rows.iter().enumerate() {
            for word_idx in 0..LANES {
                // SAFETY: within the 16 words of the row and the 256 of dst.
                unsafe { *dst.add(word_idx * LANES + row_idx) = row.add(word_idx).read_unaligned() };
            }
        }
    }

    /// Hints that the line at `p` will be read soon; any address is fine.
    fn prefetch<T>(self, p: *const T);

    /// The lanes' sum, as a balanced tree.
    #[inline(always)]
    fn reduce_add(self, v: Self::V) -> f32 {
        let mut lanes = self.to_array(v);
        for half in [8, 4, 2, 1] {
            for lane_idx in 0..half {
                lanes[lane_idx] += lanes[lane_idx + half];
            }
        }
        lanes[0]
    }

    /// The lanes' maximum; NaN if any lane is.
    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        let lanes = self.to_array(v);
        lanes.into_iter().fold(
            f32::NEG_INFINITY,
            |max, lane| if lane > max || lane.is_nan() { lane } else { max },
        )
    }

    /// `cap * tanh(x / cap)`, to 3e-7 of the cap.
    #[inline(always)]
    fn soft_cap(self, x: Self::V, cap: f32) -> Self::V {
        // tanh y = 1 - 2 / (e^2y + 1)
        let e = self.exp(self.mul(x, self.splat(2.0 / cap)));
        let fraction = self.div(self.splat(2.0 * cap), self.add(e, self.splat(1.0)));
        self.sub(self.splat(cap), fraction)
    }

    /// `x / (1 + e^-y)`: x times the sigmoid of y.
    #[inline(always)]
    fn mul_sigmoid(self, x: Self::V, y: Self::V) -> Self::V {
        let e = self.exp(self.sub(self.splat(0.0), y));
        self.div(x, self.add(self.splat(1.0), e))
    }

    /// `e^x` to 2 units in the last place; 0 below -87.3, 2.4e38 above 88.3.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        // x = n ln 2 + r with |r| <= ln(2) / 2, where the Taylor series to r^7 is exact to 5e-9.
        const LOWEST: f32 = -87.33;
        const LN2_HIGH: f32 = 0.693_145_75;
        const LN2_LOW: f32 = 1.428_606_8e-6;
        // Adding and subtracting 1.5 * 2^23 rounds to an integer, to nearest even.
        const ROUND: f32 = 12_582_912.0;
        let clamped = self.min(self.splat(88.37), self.max(self.splat(LOWEST), x));
        let shifted = self.mul_add(clamped, self.splat(std::f32::consts::LOG2_E), self.splat(ROUND));
        let n = self.sub(shifted, self.splat(ROUND));
        let r = self.mul_add(n, self.splat(-LN2_HIGH), clamped);
        let r = self.mul_add(n, self.splat(-LN2_LOW), r);
        let mut p = self.splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.mul_add(p, r, self.splat(coefficient));
        }
        self.zero_below(x, LOWEST, self.mul(p, self.pow2(n)))
    }
}

/// How words of weights and activations multiply: one f32 per word, or two bf16.
pub(crate) trait Dot: Copy + Send + Sync + 'static {
    /// Elements in a word.
    const PER_WORD: usize;
    /// Sixteen words ready to multiply.
    type Words<S: Simd>: Copy;
    /// One word in every lane.
    type Splat<S: Simd>: Copy;

    /// # Safety
    /// `p` is readable for 16 words.
    unsafe fn load<S: Simd>(simd: S, p: *const u32) -> Self::Words<S>;
    fn splat<S: Simd>(simd: S, word: u32) -> Self::Splat<S>;
    fn dot<S: Simd>(simd: S, acc: S::V, a: Self::Splat<S>, b: Self::Words<S>) -> S::V;
    /// Packs up to `16 * PER_WORD` elements of `x` into 16 words of `out`, missing ones as zero; each element rounds once.
    /// # Safety
    /// `x` is readable for `n` f32, `out` writable for 16 words.
    unsafe fn pack<S: Simd>(simd: S, x: *const f32, n: usize, out: *mut u32);
    /// Widens 16 stored elements.
    /// # Safety
    /// `p` is readable for 16 stored elements.
    unsafe fn widen<S: Simd>(simd: S, p: *const u8) -> S::V;
    /// Rounds 16 lanes to stored elements.
    /// # Safety
    /// `p` is writable for 16 stored elements.
    unsafe fn narrow<S: Simd>(simd: S, p: *mut u8, v: S::V);
}

/// One f32 in a word.
#[derive(Clone, Copy)]
pub(crate) struct F32Words;

/// Two bf16 in a word, the even one low.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Words;

impl Dot for F32Words {
    const PER_WORD: usize = 1;
    type Words<S: Simd> = S::V;
    type Splat<S: Simd> = S::V;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const u32) -> S::V {
        // SAFETY: the caller's promise, and an f32 is as large as a word.
        unsafe { simd.load(p.cast()) }
    }
    #[inline(always)]
    fn splat<S: Simd>(simd: S, word: u32) -> S::V {
        simd.splat(f32::from_bits(word))
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, acc: S::V, a: S::V, b: S::V) -> S::V {
        simd.mul_add(a, b, acc)
    }
    #[inline(always)]
    unsafe fn pack<S: Simd>(simd: S, x: *const f32, n: usize, out: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe {
            let v = if n >= LANES {
                simd.load(x)
            } else {
                simd.load_partial(x, n, 0.0)
            };
            simd.store(out.cast(), v);
        }
    }
    #[inline(always)]
    unsafe fn widen<S: Simd>(simd: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise; vector loads need no alignment.
        unsafe { simd.load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn narrow<S: Simd>(simd: S, p: *mut u8, v: S::V) {
        // SAFETY: the caller's promise; vector stores need no alignment.
        unsafe { simd.store(p.cast(), v) }
    }
}

impl Dot for Bf16Words {
    const PER_WORD: usize = 2;
    type Words<S: Simd> = S::Pairs;
    type Splat<S: Simd> = S::PairSplat;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const u32) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { simd.load_pairs(p) }
    }
    #[inline(always)]
    fn splat<S: Simd>(simd: S, word: u32) -> S::PairSplat {
        simd.splat_pair(word)
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, acc: S::V, a: S::PairSplat, b: S::Pairs) -> S::V {
        simd.dot_pairs(acc, a, b)
    }
    #[inline(always)]
    unsafe fn pack<S: Simd>(simd: S, x: *const f32, n: usize, out: *mut u32) {
        let low = n.min(LANES);
        let high = n.saturating_sub(LANES).min(LANES);
        // SAFETY: low + high <= n elements are read, and 2 * 16 bf16 are 16 words.
        unsafe {
            let a = if low == LANES {
                simd.load(x)
            } else {
                simd.load_partial(x, low, 0.0)
            };
            let b = match high {
                LANES => simd.load(x.add(LANES)),
                0 => simd.splat(0.0),
                _ => simd.load_partial(x.add(LANES), high, 0.0),
            };
            simd.store_bf16(out.cast(), a);
            simd.store_bf16(out.cast::<u16>().add(LANES), b);
        }
    }
    #[inline(always)]
    unsafe fn widen<S: Simd>(simd: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise; vector loads need no alignment.
        unsafe { simd.load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn narrow<S: Simd>(simd: S, p: *mut u8, v: S::V) {
        // SAFETY: the caller's promise; vector stores need no alignment.
        unsafe { simd.store_bf16(p.cast(), v) }
    }
}

/// Rounds to bf16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if x.is_nan() {
        ((bits >> 16) | 0x40) as u16
    } else {
        rounded
    }
}

/// The value of a bf16.
#[inline(always)]
pub(crate) fn widen_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Work that is compiled for every instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// Must be `#[inline(always)]`, so that it is compiled with the features of its entry point.
    fn run<S: Simd>(self, simd: S) -> Self::Out;
}
