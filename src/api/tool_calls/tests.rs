//! The parsers over texts as models write them, cut everywhere.

use proptest::prelude::*;

use super::*;

const FORMATS: [ToolCallFormat; 3] = [ToolCallFormat::Hermes, ToolCallFormat::Llama3, ToolCallFormat::Mistral];

fn parser(format: ToolCallFormat) -> ToolCallParser {
    ToolCallParser::new(format, ["weather".to_owned(), "f".to_owned()].into())
}

/// What came of an answer: its content, and name, id and arguments of each call.
type Parsed = (String, Vec<(String, Option<String>, String)>);

fn collect(pieces: impl IntoIterator<Item = Piece>) -> Parsed {
    let mut parsed = Parsed::default();
    for piece in pieces {
        match piece {
            Piece::Text(text) => parsed.0.push_str(&text),
            Piece::Call { name, id } => parsed.1.push((name, id, String::new())),
            Piece::Arguments(arguments) => parsed.1.last_mut().expect("a call has begun").2.push_str(&arguments),
        }
    }
    parsed
}

fn whole(format: ToolCallFormat, text: &str) -> Parsed {
    let mut parser = parser(format);
    let mut pieces = parser.push(text);
    pieces.extend(parser.finish());
    collect(pieces)
}

fn in_parts<'a>(format: ToolCallFormat, parts: impl IntoIterator<Item = &'a str>) -> Parsed {
    let mut parser = parser(format);
    let mut pieces: Vec<Piece> = parts.into_iter().flat_map(|part| parser.push(part)).collect();
    pieces.extend(parser.finish());
    collect(pieces)
}

/// Content and calls of `text`, which must be the same wherever it is cut.
fn parse(format: ToolCallFormat, text: &str) -> (String, Vec<(String, String)>) {
    let expected = whole(format, text);
    let cuts: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
    for &at in &cuts {
        assert_eq!(
            in_parts(format, [&text[..at], &text[at..]]),
            expected,
            "{text:?} cut at {at}"
        );
    }
    let singly = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]);
    assert_eq!(in_parts(format, singly), expected, "{text:?} character by character");
    let calls = expected.1.into_iter().map(|(name, _, arguments)| (name, arguments));
    (expected.0, calls.collect())
}

fn check(format: ToolCallFormat, text: &str, content: &str, calls: &[(&str, &str)]) {
    let owned = |&(name, arguments): &(&str, &str)| (name.to_owned(), arguments.to_owned());
    let expected = (content.to_owned(), calls.iter().map(owned).collect());
    assert_eq!(parse(format, text), expected, "{text:?}");
}

#[test]
fn hermes_calls() {
    let check = |text, content, calls: &[_]| check(ToolCallFormat::Hermes, text, content, calls);
    check(
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\", \"days\": 3}}\n</tool_call>",
        "",
        &[("weather", "{\"city\": \"Köln\", \"days\": 3}")],
    );
    check(
        "Let me see.\n\n<tool_call>{\"arguments\": {\"a\": [1, {\"b\": \"}\"}]}, \"name\": \"f\"}</tool_call>\n<tool_call>\n{\"name\":\"g\",\"arguments\":{}}\n</tool_call>\n",
        "Let me see.",
        &[("f", "{\"a\": [1, {\"b\": \"}\"}]}"), ("g", "{}")],
    );
    check("a < b <tool> <tool_cal", "a < b <tool> <tool_cal", &[]);
    check("<tool_call>{\"name\": \"f\"}</tool_call>", "", &[("f", "{}")]);
    check("<tool_call>{\"name\": \"f\", \"arguments\": null}", "", &[("f", "{}")]);
    check(
        r#"<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call> done"#,
        "done",
        &[("f", "{\"a\": 1}")],
    );
    check(
        "<tool_call>{\"id\": 7, \"name\": \"f\", \"arguments\": {\"a\":1 }, \"x\": [2]}</tool_call>",
        "",
        &[("f", "{\"a\":1 }")],
    );
}

#[test]
fn what_is_no_call_is_content() {
    let check = |text| check(ToolCallFormat::Hermes, text, text, &[]);
    check("<tool_call>weather(city)</tool_call>");
    check("<tool_call>{'name': 'f'}</tool_call>");
    check("<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call> ");
    check("<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>");
    check("<tool_call>{\"arguments\": {}}</tool_call>");
    check("<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>");
    check("<tool_call>{\"name\": \"f\", \"arguments\": \"[1]\"}</tool_call>");
    check("  \n<tool_call>{\"name\": \"f\", \"argu");
    check(" \n ");
    let endless = format!("<tool_call>{{\"x\": \"{}", "y".repeat(LONGEST_HEAD + 9));
    check_halves(ToolCallFormat::Hermes, &endless, &endless);
    let blank = format!("a<tool_call>{}b", "\n".repeat(LONGEST_OPENING));
    check_halves(ToolCallFormat::Hermes, &blank, &blank);
}

/// Like `check`, for texts that are too long to be cut everywhere.
fn check_halves(format: ToolCallFormat, text: &str, content: &str) {
    for part in [1, 7, 100, 1000, text.len()] {
        let parts = text
            .as_bytes()
            .chunks(part)
            .map(|part| std::str::from_utf8(part).expect("ASCII"));
        assert_eq!(in_parts(format, parts), (content.to_owned(), Vec::new()));
    }
}

#[test]
fn a_call_that_breaks_off_keeps_what_it_had_and_the_rest_is_content() {
    let check = |text, content, calls: &[_]| check(ToolCallFormat::Hermes, text, content, calls);
    check(
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 'x'}}</tool_call>",
        "'x'}}</tool_call>",
        &[("f", "{\"a\": ")],
    );
    check(
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x",
        "",
        &[("f", "{\"a\": \"x")],
    );
    check(
        "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
        "<tool_call>",
        &[("f", "{}")],
    );
}

#[test]
fn llama_calls() {
    let check = |text, content, calls: &[_]| check(ToolCallFormat::Llama3, text, content, calls);
    check(
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}",
        "",
        &[("weather", "{\"city\": \"Rome\"}")],
    );
    check(
        "\n<|python_tag|>{\"type\": \"function\", \"name\": \"g\", \"parameters\": {}}; {\"name\": \"f\", \"arguments\": {\"n\": 1}}",
        "",
        &[("g", "{}"), ("f", "{\"n\": 1}")],
    );
    check("Use <|python_tag|>{\"name\":\"f\"}", "Use", &[("f", "{}")]);
    // Any JSON begins like a call: only a known name makes it one, and only at the beginning.
    let answer = "{\"name\": \"Ada\", \"parameters\": {}}";
    check(answer, answer, &[]);
    check("{\"a\": 1}", "{\"a\": 1}", &[]);
    let later = "It is {\"name\": \"f\", \"parameters\": {}}";
    check(later, later, &[]);
    let code = "<|python_tag|>print(1)";
    check(code, code, &[]);
    check("{\"name\": \"f\", \"parameters\": {}}; and", "; and", &[("f", "{}")]);
}

#[test]
fn mistral_calls() {
    let check = |text, content, calls: &[_]| check(ToolCallFormat::Mistral, text, content, calls);
    check(
        "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}, {\"arguments\": {}, \"name\": \"f\"}]",
        "",
        &[("weather", "{\"city\": \"Oslo\"}"), ("f", "{}")],
    );
    check(
        "Yes. [TOOL_CALLS]weather{\"city\": \"Oslo\"}[TOOL_CALLS]f[ARGS]{}",
        "Yes.",
        &[("weather", "{\"city\": \"Oslo\"}"), ("f", "{}")],
    );
    check(
        "[TOOL_CALLS]{\"name\": \"f\", \"arguments\": {}} x",
        "x",
        &[("f", "{}")],
    );
    for content in [
        "[TOOL_CALLS]two words{}",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS] [1]",
        "[TOOL_CALLS]f",
        "[TOOL",
        "[1, 2]",
    ] {
        check(content, content, &[]);
    }
    let with_id = whole(
        ToolCallFormat::Mistral,
        "[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{\"x\": 1}",
    );
    assert_eq!(
        with_id.1,
        [("f".to_owned(), Some("a1b2c3d4e".to_owned()), "{\"x\": 1}".to_owned())]
    );
}

#[test]
fn nothing_is_held_back_but_the_possible_beginning_of_a_call() {
    let said = |format, parts: &[&str]| -> Vec<String> {
        let mut parser = parser(format);
        parts.iter().map(|part| collect(parser.push(part)).0).collect()
    };
    assert_eq!(
        said(ToolCallFormat::Hermes, &["Hi ", "there <", "b> <tool", "s", " \n", "x"]),
        ["Hi", " there", " <b>", " <tools", "", " \nx"]
    );
    assert_eq!(said(ToolCallFormat::Llama3, &["So", " {", "a"]), ["So", " {", "a"]);
    let long_blank = " ".repeat(LONGEST_BLANK + 5);
    assert_eq!(said(ToolCallFormat::Hermes, &[&long_blank])[0].len(), 5);
    // Arguments come as they are written, once the name is known.
    let mut parser = parser(ToolCallFormat::Hermes);
    assert_eq!(parser.push("<tool_call>{\"name\": \"f\", \"arguments\": "), []);
    let call = Piece::Call {
        name: "f".to_owned(),
        id: None,
    };
    assert_eq!(parser.push("{\"a"), [call, Piece::Arguments("{\"a".to_owned())]);
    assert_eq!(parser.push("\": 1"), [Piece::Arguments("\": 1".to_owned())]);
    assert_eq!(parser.push("}}</tool"), [Piece::Arguments("}".to_owned())]);
    assert_eq!(parser.finish(), [Piece::Text("</tool".to_owned())]);
}

/// A call as a model of `format` writes it.
fn written(format: ToolCallFormat, calls: &[(String, String)], is_new: bool) -> String {
    let object = |key: &str, (name, arguments): &(String, String)| {
        format!("{{\"name\": {}, \"{key}\": {arguments}}}", serde_json::json!(name))
    };
    let each = |key| calls.iter().map(move |call| object(key, call));
    match (format, is_new) {
        (ToolCallFormat::Hermes, _) => {
            let calls = each("arguments").map(|call| format!("<tool_call>\n{call}\n</tool_call>"));
            calls.collect::<Vec<_>>().join("\n")
        }
        (ToolCallFormat::Llama3, _) => format!("<|python_tag|>{}", each("parameters").collect::<Vec<_>>().join("; ")),
        (ToolCallFormat::Mistral, false) => {
            format!("[TOOL_CALLS] [{}]", each("arguments").collect::<Vec<_>>().join(", "))
        }
        (ToolCallFormat::Mistral, true) => calls
            .iter()
            .map(|(name, arguments)| format!("[TOOL_CALLS]{name}[ARGS]{arguments}"))
            .collect(),
    }
}

/// Objects of small values whose strings hold what parsers look for.
fn arguments() -> impl Strategy<Value = String> {
    let texts = vec![
        "",
        "x",
        "é\"}",
        "</tool_call>",
        "<tool_call>{",
        "[TOOL_CALLS]",
        "; {",
        "\n\\",
        "]",
    ];
    let leaf = prop_oneof![
        prop::sample::select(texts).prop_map(|text| serde_json::json!(text)),
        any::<i32>().prop_map(|n| serde_json::json!(n)),
        any::<bool>().prop_map(|b| serde_json::json!([b, null])),
    ];
    let inner = prop::collection::btree_map("[a-c]{0,2}", leaf, 0..3);
    (inner, any::<bool>()).prop_map(|(map, is_pretty)| match is_pretty {
        true => serde_json::to_string_pretty(&map).expect("a map of texts"),
        false => serde_json::to_string(&map).expect("a map of texts"),
    })
}

/// Pieces of which calls are made, in any order.
const FRAGMENTS: [&str; 28] = [
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[",
    "]",
    ",",
    ";",
    "{",
    "}",
    "{\"name\": ",
    "\"name\"",
    "\"f\"",
    "\"g\"",
    ", \"arguments\": ",
    ", \"parameters\": ",
    "{}",
    "{\"a\": [1, \"é\"]}",
    ":",
    " ",
    "\n\n",
    "word",
    "\u{3000}",
    "null",
    "f",
];

fn cut<'a>(text: &'a str, cuts: &[usize]) -> Vec<&'a str> {
    let mut places: Vec<usize> = cuts
        .iter()
        .map(|cut| text.floor_char_boundary(cut % (text.len() + 1)))
        .collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

fn formats() -> impl Strategy<Value = ToolCallFormat> {
    prop::sample::select(FORMATS.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Of any text: the same comes out however it was cut, and if no call was found, it is the text itself.
    #[test]
    fn cutting_does_not_matter_and_nothing_is_lost(
        format in formats(),
        fragments in prop::collection::vec(prop::sample::select(FRAGMENTS.to_vec()), 0..16),
        cuts in prop::collection::vec(0usize..400, 0..8),
    ) {
        let text = fragments.concat();
        let expected = whole(format, &text);
        prop_assert_eq!(&in_parts(format, cut(&text, &cuts)), &expected, "{}", text);
        let singly: Vec<String> = text.chars().map(String::from).collect();
        prop_assert_eq!(&in_parts(format, singly.iter().map(String::as_str)), &expected, "{}", text);
        if expected.1.is_empty() {
            prop_assert_eq!(expected.0, text);
        }
    }

    /// Written calls come out as they went in, with the content before them.
    #[test]
    fn written_calls_are_read_back(
        format in formats(),
        content in "[a-z.é]{0,3}( [a-z<.é]{1,5}){0,3}",
        calls in prop::collection::vec(("[a-z_]{1,8}", arguments()), 1..4),
        is_new in any::<bool>(),
        gap in prop::sample::select(vec!["", " ", "\n\n"]),
        cuts in prop::collection::vec(0usize..1000, 0..12),
    ) {
        let text = format!("{content}{gap}{}", written(format, &calls, is_new));
        let (said, found) = in_parts(format, cut(&text, &cuts));
        prop_assert_eq!(said, content.trim_end());
        let found: Vec<_> = found.into_iter().map(|(name, _, arguments)| (name, arguments)).collect();
        prop_assert_eq!(found, calls);
    }
}
