//! JSON that comes character by character: whether it can still become a value, and how deep in it one is. Builds nothing,
//! holds no text.

/// Deeper nesting is taken for broken: as deep as the parser of request bodies goes.
const DEEPEST: usize = 127;

/// What a character leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The value goes on.
    Open,
    /// With this character the value is whole.
    Done,
    /// No value goes on like this.
    Broken,
}

/// What is expected next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expects {
    /// A value.
    Value,
    /// A value, or the end of the empty array.
    ValueOrEnd,
    /// A key.
    Key,
    /// A key, or the end of the empty object.
    KeyOrEnd,
    /// The colon after a key.
    Colon,
    /// A comma, or the end of the container.
    CommaOrEnd,
    /// More of a string.
    Text {
        /// The string is a key.
        is_key: bool,
    },
    /// The character after a backslash.
    Escape {
        /// The string is a key.
        is_key: bool,
    },
    /// Hexadecimal digits of an escape.
    Hex {
        /// The string is a key.
        is_key: bool,
        /// How many.
        n_left: u8,
    },
    /// More of a number.
    Number(Number),
    /// The rest of `true`, `false` or `null`.
    Word(&'static str),
    /// Nothing: the value is whole.
    Nothing,
}

/// Where in a number one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// After the minus.
    Minus,
    /// After a leading zero.
    Zero,
    /// In the digits.
    Integer,
    /// After the point.
    Point,
    /// In the digits after the point.
    Fraction,
    /// After the `e`.
    Exponent,
    /// After the exponent's sign.
    ExponentSign,
    /// In the exponent's digits.
    ExponentDigits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Object,
    Array,
}

/// Follows one value, which is an object (RFC 8259).
#[derive(Clone, Debug)]
pub struct JsonScanner {
    open: Vec<Container>,
    expects: Expects,
}

impl JsonScanner {
    /// Before the value's first character.
    pub fn new() -> JsonScanner {
        JsonScanner {
            open: Vec::new(),
            expects: Expects::Value,
        }
    }

    /// How many objects and arrays are open.
    pub fn depth(&self) -> usize {
        self.open.len()
    }

    /// What is expected next.
    pub fn expects(&self) -> Expects {
        self.expects
    }

    /// Takes the next character. After `Done` or `Broken` there is no next.
    pub fn push(&mut self, character: char) -> Step {
        match self.next(character) {
            None => Step::Broken,
            Some(expects) => {
                self.expects = expects;
                match expects {
                    Expects::Nothing => Step::Done,
                    _ => Step::Open,
                }
            }
        }
    }

    fn next(&mut self, character: char) -> Option<Expects> {
        let is_blank = matches!(character, ' ' | '\n' | '\r' | '\t');
        match (self.expects, character) {
            (
                Expects::Value
                | Expects::ValueOrEnd
                | Expects::Key
                | Expects::KeyOrEnd
                | Expects::Colon
                | Expects::CommaOrEnd,
                _,
            ) if is_blank => Some(self.expects),
            (Expects::ValueOrEnd, ']') | (Expects::KeyOrEnd, '}') => self.close(character),
            (Expects::Value | Expects::ValueOrEnd, _) => self.value(character),
            (Expects::Key | Expects::KeyOrEnd, '"') => Some(Expects::Text { is_key: true }),
            (Expects::Colon, ':') => Some(Expects::Value),
            (Expects::CommaOrEnd, ',') => match self.open.last()? {
                Container::Object => Some(Expects::Key),
                Container::Array => Some(Expects::Value),
            },
            (Expects::CommaOrEnd, '}' | ']') => self.close(character),
            (Expects::Text { is_key: true }, '"') => Some(Expects::Colon),
            (Expects::Text { is_key: false }, '"') => Some(self.after_value()),
            (Expects::Text { is_key }, '\\') => Some(Expects::Escape { is_key }),
            (Expects::Text { is_key }, '\u{20}'..) => Some(Expects::Text { is_key }),
            (Expects::Escape { is_key }, 'u') => Some(Expects::Hex { is_key, n_left: 4 }),
            (Expects::Escape { is_key }, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => {
                Some(Expects::Text { is_key })
            }
            (Expects::Hex { is_key, n_left }, _) if character.is_ascii_hexdigit() => match n_left {
                1 => Some(Expects::Text { is_key }),
                _ => Some(Expects::Hex {
                    is_key,
                    n_left: n_left - 1,
                }),
            },
            (Expects::Word(rest), _) => match rest.strip_prefix(character)? {
                "" => Some(self.after_value()),
                rest => Some(Expects::Word(rest)),
            },
            (Expects::Number(number), _) => self.number(number, character),
            _ => None,
        }
    }

    fn value(&mut self, character: char) -> Option<Expects> {
        // The whole value is an object, so that its end is seen without what follows.
        if self.open.is_empty() && character != '{' {
            return None;
        }
        match character {
            '{' => self.enter(Container::Object, Expects::KeyOrEnd),
            '[' => self.enter(Container::Array, Expects::ValueOrEnd),
            '"' => Some(Expects::Text { is_key: false }),
            't' => Some(Expects::Word("rue")),
            'f' => Some(Expects::Word("alse")),
            'n' => Some(Expects::Word("ull")),
            '-' => Some(Expects::Number(Number::Minus)),
            '0' => Some(Expects::Number(Number::Zero)),
            '1'..='9' => Some(Expects::Number(Number::Integer)),
            _ => None,
        }
    }

    fn enter(&mut self, container: Container, expects: Expects) -> Option<Expects> {
        self.open.push(container);
        (self.open.len() <= DEEPEST).then_some(expects)
    }

    fn close(&mut self, character: char) -> Option<Expects> {
        match (self.open.pop()?, character) {
            (Container::Object, '}') | (Container::Array, ']') => Some(self.after_value()),
            _ => None,
        }
    }

    fn after_value(&self) -> Expects {
        match self.open.is_empty() {
            true => Expects::Nothing,
            false => Expects::CommaOrEnd,
        }
    }

    fn number(&mut self, number: Number, character: char) -> Option<Expects> {
        let next = match (number, character) {
            (Number::Minus, '0') => Number::Zero,
            (Number::Minus, '1'..='9') | (Number::Integer, '0'..='9') => Number::Integer,
            (Number::Zero | Number::Integer, '.') => Number::Point,
            (Number::Point | Number::Fraction, '0'..='9') => Number::Fraction,
            (Number::Zero | Number::Integer | Number::Fraction, 'e' | 'E') => Number::Exponent,
            (Number::Exponent, '+' | '-') => Number::ExponentSign,
            (Number::Exponent | Number::ExponentSign | Number::ExponentDigits, '0'..='9') => Number::ExponentDigits,
            (Number::Zero | Number::Integer | Number::Fraction | Number::ExponentDigits, _) => {
                // A number ends with the character after it.
                self.expects = Expects::CommaOrEnd;
                return self.next(character);
            }
            _ => return None,
        };
        Some(Expects::Number(next))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// How far a text is an object: bytes up to its end, or `None`.
    fn object(text: &str) -> Option<usize> {
        let mut scanner = JsonScanner::new();
        for (at, character) in text.char_indices() {
            match scanner.push(character) {
                Step::Open => {}
                Step::Done => return Some(at + character.len_utf8()),
                Step::Broken => return None,
            }
        }
        None
    }

    proptest! {
        /// Of texts that are almost JSON: whole exactly when the parser of request bodies says so, and never past the end.
        #[test]
        fn agrees_with_the_parser(pieces in prop::collection::vec(
            prop::sample::select(vec!["{", "}", "[", "]", ",", ":", "\"a\"", "\"", "\\n", "\\u00e9", "é", " ", "\n",
                "\t", "0", "1", "-", ".5", "e-2", "true", "null", "fals", "e", "\"k\":", "{\"k\":1}", "[1,2]", "\u{1}"]),
            0..14,
        )) {
            let text = format!("{{{}", pieces.concat());
            let mut values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
            let expected = match values.next() {
                Some(Ok(_)) => Some(values.byte_offset()),
                Some(Err(_)) | None => None,
            };
            prop_assert_eq!(object(&text), expected, "{}", text);
        }

        /// What a writer of JSON writes is whole at its last byte.
        #[test]
        fn takes_what_is_written(numbers in prop::collection::vec(any::<f64>(), 0..4), text in ".*", depth in 0usize..60) {
            let value = serde_json::json!({"numbers": numbers, "text": text, text.clone(): null});
            let value = (0..depth).fold(value, |inner, _| serde_json::json!({"in": [inner]}));
            for written in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
                prop_assert_eq!(object(&written), Some(written.len()));
            }
        }
    }

    #[test]
    fn nesting_has_a_limit() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(object(&nested(DEEPEST - 1)).is_some());
        assert_eq!(object(&nested(DEEPEST)), None);
        assert_eq!(object(&"[".repeat(9)), None, "only objects");
    }
}
