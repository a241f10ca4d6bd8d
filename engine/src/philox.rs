//! Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//! Stateless: a word depends on (key, counter) alone. No distributions beyond the uniform ones needed here.

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;

/// Four random words of `(key, counter)`.
#[inline]
pub fn philox4x32(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let (mut key_0, mut key_1) = (key as u32, (key >> 32) as u32);
    let mut word = counter;
    for _ in 0..10 {
        let product_0 = u64::from(MULTIPLIER_0) * u64::from(word[0]);
        let product_1 = u64::from(MULTIPLIER_1) * u64::from(word[2]);
        word = [
            (product_1 >> 32) as u32 ^ word[1] ^ key_0,
            product_1 as u32,
            (product_0 >> 32) as u32 ^ word[3] ^ key_1,
            product_0 as u32,
        ];
        key_0 = key_0.wrapping_add(WEYL_0);
        key_1 = key_1.wrapping_add(WEYL_1);
    }
    word
}

/// A uniform number in [0, 1) with 53 random bits.
#[inline]
pub fn uniform_f64(key: u64, counter: [u32; 4]) -> f64 {
    let word = philox4x32(key, counter);
    let bits = (u64::from(word[0]) << 32 | u64::from(word[1])) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123.
    #[test]
    fn known_answers() {
        let key = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        assert_eq!(
            philox4x32(0, [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32(u64::MAX, [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                key(0xa409_3822, 0x299f_31d0),
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_in_range_and_spread() {
        let draws = (0..10).flat_map(|key| (0..10_000).map(move |i| uniform_f64(key, [i, 0, 0, 0])));
        // The mean of 100,000 draws has a standard deviation of 0.0009.
        let mean = draws.sum::<f64>() / 100_000.0;
        assert!((mean - 0.5).abs() < 0.004, "{mean}");
        assert!((0..10_000).all(|i| (0.0..1.0).contains(&uniform_f64(9, [i, 1, 2, 3]))));
    }
}
