//! Keys and shared secrets, which no log, error or `Debug` output shows. Comparison in constant time.

use std::fmt;

use subtle::ConstantTimeEq as _;

use super::setting::Setting;

/// A secret text of visible ASCII characters, fit for a header.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// A new random secret of 64 hexadecimal characters.
    pub fn random() -> Secret {
        Secret(format!(
            "{}{}",
            uuid::Uuid::new_v4().simple(),
            uuid::Uuid::new_v4().simple()
        ))
    }

    /// The text itself, for a header or a child's environment, nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `offered` is this secret, in a time that does not depend on where they differ.
    pub fn matches(&self, offered: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(offered).into()
    }
}

impl Setting for Secret {
    const EXPECTED: &'static str = "a secret of 1 to 512 visible ASCII characters without spaces";

    fn parse(text: &str) -> Option<Self> {
        let fits = (1..=512).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Secret(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_hides_the_text() {
        let secret = Secret::parse("correct-horse").expect("a valid secret");
        assert!(!format!("{:?}", Some(&secret)).contains("horse"));
        assert_eq!(secret.expose(), "correct-horse");
    }

    #[test]
    fn only_the_same_bytes_match() {
        let secret = Secret::parse("abc").expect("a valid secret");
        assert!(secret.matches(b"abc"));
        for other in [&b"abd"[..], b"ab", b"abcd", b""] {
            assert!(!secret.matches(other));
        }
    }

    #[test]
    fn texts_that_no_header_can_carry_are_refused() {
        for text in ["", "a b", "a\n", "clé"] {
            assert!(Secret::parse(text).is_none(), "{text:?}");
        }
        assert!(Secret::parse(Secret::random().expose()).is_some());
    }
}
