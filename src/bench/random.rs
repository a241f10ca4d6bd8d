//! A small seeded generator (SplitMix64, Steele and others 2014), so that two runs of a benchmark send the same load.

/// The generator.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A stream of its own for each (seed, stream).
    pub fn new(seed: u64, stream: u64) -> SplitMix64 {
        let mut mixer = SplitMix64(stream);
        SplitMix64(seed ^ mixer.next_u64())
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Uniform below `bound`, which is above 0. Biased by less than `bound / 2^64`.
    pub fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u32
    }

    /// Uniform in (0, 1].
    pub fn open_unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -self.open_unit().ln()
    }

    /// Normal with mean 0 and deviation 1 (Box and Muller 1958; the second of each pair is not used).
    pub fn normal(&mut self) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        radius * (std::f64::consts::TAU * self.open_unit()).cos()
    }

    /// Gamma of `shape` above 0 and scale 1, so of mean `shape` (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.gamma(shape + 1.0) * self.open_unit().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        // Rejects fewer than one draw in twenty, whatever the shape.
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.open_unit().ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
                return d * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let draw = |seed, stream| SplitMix64::new(seed, stream).next_u64();
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
    }

    #[test]
    fn the_first_value_is_the_published_one() {
        // The reference implementation's first output for the state 0.
        assert_eq!(SplitMix64(0).next_u64(), 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        let mut random = SplitMix64::new(0, 0);
        let mut seen = [false; 7];
        for _ in 0..1000 {
            seen[random.below(7) as usize] = true;
            let unit = random.open_unit();
            assert!(unit > 0.0 && unit <= 1.0);
        }
        assert_eq!(seen, [true; 7]);
    }

    #[test]
    fn samplers_have_their_mean_and_variance() {
        type Draw = fn(&mut SplitMix64) -> f64;
        let cases: [(&str, f64, f64, Draw); 5] = [
            ("exponential", 1.0, 1.0, SplitMix64::exponential),
            ("normal", 0.0, 1.0, SplitMix64::normal),
            ("gamma 0.16", 0.16, 0.16, |random| random.gamma(0.16)),
            ("gamma 1", 1.0, 1.0, |random| random.gamma(1.0)),
            ("gamma 7.5", 7.5, 7.5, |random| random.gamma(7.5)),
        ];
        for (name, mean, variance, draw) in cases {
            let mut random = SplitMix64::new(5, 0);
            let draws: Vec<f64> = (0..100_000).map(|_| draw(&mut random)).collect();
            let found_mean = draws.iter().sum::<f64>() / 1e5;
            let found_variance = draws.iter().map(|x| (x - found_mean).powi(2)).sum::<f64>() / 1e5;
            // Five standard errors of the mean; the variance of a skewed sample strays more.
            assert!(
                (found_mean - mean).abs() < 5.0 * (variance / 1e5).sqrt(),
                "{name}: mean {found_mean}"
            );
            assert!(
                (found_variance / variance - 1.0).abs() < 0.08,
                "{name}: variance {found_variance}"
            );
        }
    }
}
