//! Sizes such as `2GiB` and durations such as `250ms`, read and printed. No arithmetic.

use std::fmt;
use std::time::Duration;

use super::setting::Setting;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

impl Setting for ByteSize {
    const EXPECTED: &'static str = "a size above zero with its unit, such as 2GiB or 512MiB";

    fn parse(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let (_, scale) = SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?;
        let bytes = scaled(number, *scale)?;
        (bytes > 0).then_some(ByteSize(bytes))
    }
}

/// So many hundredths of something, from 1 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percent(pub u8);

impl Setting for Percent {
    const EXPECTED: &'static str = "a share from 1% to 100%";

    fn parse(text: &str) -> Option<Self> {
        let percent = text.trim().strip_suffix('%')?.parse().ok()?;
        (1..=100).contains(&percent).then_some(Percent(percent))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// Memory of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// So much.
    Size(ByteSize),
    /// So many hundredths of what a card has left once weights and activations are there.
    PercentOfFree(u8),
}

impl Setting for KvMemory {
    const EXPECTED: &'static str =
        "a size above zero with its unit, such as 2GiB, or a share of a card's free memory, such as 90%";

    fn parse(text: &str) -> Option<Self> {
        match Percent::parse(text) {
            Some(Percent(percent)) => Some(KvMemory::PercentOfFree(percent)),
            None => ByteSize::parse(text).map(KvMemory::Size),
        }
    }
}

impl fmt::Display for KvMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvMemory::Size(size) => size.fmt(f),
            KvMemory::PercentOfFree(percent) => write!(f, "{percent}%"),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SIZE_UNITS
            .iter()
            .find(|(_, scale)| self.0 > 0 && self.0.is_multiple_of(*scale));
        let (unit, scale) = exact.copied().unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / scale)
    }
}

/// A length of time, above zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

const SPAN_UNITS: [(&str, u64); 5] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
];

impl Setting for Span {
    const EXPECTED: &'static str = "a duration above zero with its unit, such as 5s or 250ms";

    fn parse(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let (_, scale) = SPAN_UNITS.iter().find(|(name, _)| *name == unit)?;
        let nanos = scaled(number, *scale)?;
        (nanos > 0).then_some(Span(Duration::from_nanos(nanos)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        let exact = SPAN_UNITS.iter().find(|(_, scale)| nanos.is_multiple_of(*scale));
        let (unit, scale) = exact.copied().unwrap_or(("us", 1_000));
        write!(f, "{}{unit}", nanos / scale)
    }
}

/// `1.5GiB` as `("1.5", "GiB")`; `None` without both.
fn split_unit(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit_at);
    Some((number.trim_end(), unit))
}

/// `number * scale`, exactly for whole numbers; `None` unless it is plain decimal and fits.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let plain = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !plain(whole) || !plain(fraction) || fraction.len() > 9 {
        return None;
    }
    let denominator = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let numerator = whole.parse::<u128>().ok()?.checked_mul(denominator)? + fraction.parse::<u128>().ok()?;
    u64::try_from(numerator.checked_mul(u128::from(scale))? / denominator).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_in_both_families_of_units() {
        for (text, bytes) in [
            ("2GiB", 2 << 30),
            ("512 MiB", 512 << 20),
            ("1.5gib", 3 << 29),
            ("2GB", 2_000_000_000),
            ("7B", 7),
        ] {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "2",
            "GiB",
            "-1GiB",
            "0GiB",
            "2GiBs",
            "1e3MiB",
            "1..5GiB",
            "99999999999TiB",
            "0.1B",
            "1.GiB",
        ] {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
    }

    #[test]
    fn kv_memory_is_a_size_or_a_share() {
        assert_eq!(KvMemory::parse("1MiB"), Some(KvMemory::Size(ByteSize(1 << 20))));
        assert_eq!(KvMemory::parse("90%"), Some(KvMemory::PercentOfFree(90)));
        for text in ["0%", "101%", "%", "-1%", "1.5%", "90 percent", "0.9"] {
            assert_eq!(KvMemory::parse(text), None, "{text}");
        }
        assert_eq!(KvMemory::PercentOfFree(7).to_string(), "7%");
    }

    #[test]
    fn durations_are_read_and_units_are_required() {
        assert_eq!(Span::parse("5s"), Some(Span(Duration::from_secs(5))));
        assert_eq!(Span::parse("250ms"), Some(Span(Duration::from_millis(250))));
        assert_eq!(Span::parse("1.5m"), Some(Span(Duration::from_secs(90))));
        for text in ["5", "0s", "-5s", "5 parsecs", "s", "5S"] {
            assert_eq!(Span::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn printing_and_reading_a_size_gives_it_back(bytes in 1_u64..) {
            prop_assert_eq!(ByteSize::parse(&ByteSize(bytes).to_string()), Some(ByteSize(bytes)));
        }

        #[test]
        fn printing_and_reading_a_duration_gives_it_back(micros in 1_u64..10_000_000_000) {
            let span = Span(Duration::from_micros(micros));
            prop_assert_eq!(Span::parse(&span.to_string()), Some(span));
        }
    }
}
