//! Values as Python writes them, which chat templates were made for: `str`, `repr` and `json.dumps`. No parsing.

use serde_json::{Number, Value};

/// How `json.dumps` is asked to write.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    /// Spaces per level; one line if absent.
    pub(super) indent: Option<usize>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between key and value.
    pub(super) key_separator: String,
    /// Write everything past ASCII as escapes.
    pub(super) ensure_ascii: bool,
    /// Order keys rather than keep their order.
    pub(super) sort_keys: bool,
}

impl JsonStyle {
    /// Python's own separators: no space ends a line.
    pub(super) fn new(indent: Option<usize>) -> JsonStyle {
        let item_separator = if indent.is_some() { "," } else { ", " };
        JsonStyle {
            indent,
            item_separator: item_separator.to_owned(),
            key_separator: ": ".to_owned(),
            ensure_ascii: false,
            sort_keys: false,
        }
    }
}

/// `json.dumps(value)`.
pub(super) fn json_dumps(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    write_json(&mut out, value, style, 0);
    out
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(boolean) => out.push_str(if *boolean { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&python_number(number)),
        Value::String(string) => write_json_string(out, string, style.ensure_ascii),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(&style.item_separator);
                }
                line(out, depth + 1);
                write_json(out, item, style, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            let mut fields: Vec<_> = fields.iter().collect();
            if style.sort_keys {
                fields.sort_by_key(|(key, _)| key.as_str());
            }
            for (i, (key, item)) in fields.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(&style.item_separator);
                }
                line(out, depth + 1);
                write_json_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_json(out, item, style, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
    }
}

fn write_json_string(out: &mut String, string: &str, ensure_ascii: bool) {
    out.push('"');
    for char in string.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            char if char < ' ' || (ensure_ascii && !(' '..='~').contains(&char)) => {
                let mut units = [0; 2];
                for unit in char.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            char => out.push(char),
        }
    }
    out.push('"');
}

/// `str(value)`: a string is itself, anything else its `repr`.
pub(super) fn python_str(value: &Value) -> String {
    match value {
        Value::String(string) => string.clone(),
        other => python_repr(other),
    }
}

/// `repr(value)`.
pub(super) fn python_repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(boolean) => if *boolean { "True" } else { "False" }.to_owned(),
        Value::Number(number) => python_number(number),
        Value::String(string) => repr_string(string),
        Value::Array(items) => format!("[{}]", items.iter().map(python_repr).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(key, value)| format!("{}: {}", repr_string(key), python_repr(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
    }
}

fn repr_string(string: &str) -> String {
    let quote = if string.contains('\'') && !string.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for char in string.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            char if char == quote => out.extend(['\\', char]),
            char if char.is_control() => out.push_str(&format!("\\x{:02x}", char as u32)),
            char => out.push(char),
        }
    }
    out.push(quote);
    out
}

fn python_number(number: &Number) -> String {
    match number.as_f64() {
        Some(float) if number.is_f64() => python_float(float),
        _ => number.to_string(),
    }
}

/// The shortest digits that round-trip; scientific below 1e-4 and from 1e16, with a sign and two digits in the exponent.
fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{float}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_like_python() {
        let value = json!({"b": [1, 2.0, 1e20, 1.5e-7, -0.25], "a": {"é\"\n\u{1}": null}, "e": [], "f": {}, "t": true});
        assert_eq!(
            json_dumps(&value, &JsonStyle::new(None)),
            r#"{"b": [1, 2.0, 1e+20, 1.5e-07, -0.25], "a": {"é\"\n\u0001": null}, "e": [], "f": {}, "t": true}"#
        );
        assert_eq!(
            json_dumps(&json!({"a": [1, {}]}), &JsonStyle::new(Some(2))),
            "{\n  \"a\": [\n    1,\n    {}\n  ]\n}"
        );
        let ascii = JsonStyle {
            ensure_ascii: true,
            sort_keys: true,
            ..JsonStyle::new(None)
        };
        assert_eq!(
            json_dumps(&json!({"b": "🌊", "a": "é"}), &ascii),
            r#"{"a": "\u00e9", "b": "\ud83c\udf0a"}"#
        );
        // <, > and & stay: chats are not HTML.
        assert_eq!(json_dumps(&json!("<a&b>'"), &JsonStyle::new(None)), r#""<a&b>'""#);
    }

    #[test]
    fn repr_like_python() {
        assert_eq!(
            python_repr(&json!({"type": "it's", "n": null, "b": [true, false], "q": "\"'\\", "f": 100000.0})),
            r#"{'type': "it's", 'n': None, 'b': [True, False], 'q': '"\'\\', 'f': 100000.0}"#
        );
        assert_eq!(python_str(&json!("it's")), "it's");
        assert_eq!(python_str(&json!(1e16)), "1e+16");
        assert_eq!(python_str(&json!(0.0001)), "0.0001");
    }
}
