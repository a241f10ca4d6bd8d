//! Texts of structural tags, read token by token as instances match them.

use baton_engine::constraint::{ConstraintCompiler, GroupConstraint};

use super::super::tests::{BOS, EOS, byte_tokenizer};
use super::*;

/// What has been read of a text before it left the language, and whether it may end there. `<|begin|>` is a token.
fn read(tag: &Value, text: &str) -> (String, bool) {
    let compiler = ConstraintCompiler::new(|| Ok((byte_tokenizer(), vec![EOS])), 260);
    let grammar = constraint("response_format", tag, Some(&byte_tokenizer())).unwrap();
    let compiled = compiler.compile(&grammar);
    let compiled = compiled.unwrap_or_else(|error| panic!("{error}\n{}", grammar.text()));
    let mut group = GroupConstraint::new(compiled, 1);
    let ids = byte_tokenizer().encode(text).unwrap();
    let mut output = Vec::new();
    for id in ids {
        if !group.allowed(0, &output).unwrap().contains(id) {
            break;
        }
        output.push(id);
    }
    let may_end = group.allowed(0, &output).unwrap().contains(EOS);
    (byte_tokenizer().decode_with_special_tokens(&output).unwrap(), may_end)
}

fn check(tag: &Value, good: &[&str], bad: &[(&str, &str)]) {
    for text in good {
        assert_eq!(read(tag, text), ((*text).to_owned(), true), "{tag}");
    }
    for (text, until) in bad {
        let (was_read, may_end) = read(tag, text);
        assert!(
            was_read == *until && !(was_read == *text && may_end),
            "{text}: {was_read} {may_end}"
        );
    }
}

const SCHEMA: &str = r#"{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}"#;

fn schema() -> Value {
    serde_json::from_str(SCHEMA).unwrap()
}

#[test]
fn free_text_is_free_until_a_trigger_comes() {
    let legacy = json!({
        "type": "structural_tag", "triggers": ["<f="],
        "structures": [
            {"begin": "<f=a>", "schema": schema(), "end": "</f>"},
            {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
        ],
    });
    let content = |schema: Value| json!({"type": "json_schema", "json_schema": schema});
    let tags = json!([
        {"type": "tag", "begin": "<f=a>", "content": content(schema()), "end": "</f>"},
        {"type": "tag", "begin": "<f=b>", "content": content(json!({"type": "boolean"})), "end": ["</f>"]},
    ]);
    let mut format = json!({"type": "triggered_tags", "triggers": ["<f="], "tags": tags});
    let good = [
        "",
        "just text, 1 < 2",
        r#"see <f=a>{"x": 1}</f> and <f=b>true</f>."#,
        "<f=b>false</f><f=b>true</f>",
    ];
    let bad = [
        ("<f=c>", "<f="),
        (r#"<f=a>{"y": 1}"#, r#"<f=a>{""#),
        (r#"<f=a>{"x": 1} and"#, r#"<f=a>{"x": 1}"#),
        ("<f=b>true", "<f=b>true"),
    ];
    for tag in [&legacy, &json!({"format": format})] {
        check(tag, &good, &bad);
    }
    format["stop_after_first"] = json!(true);
    let tag = json!({ "format": format });
    check(
        &tag,
        &["text", "text <f=b>true</f>"],
        &[("<f=b>true</f> ", "<f=b>true</f>")],
    );
    format["at_least_one"] = json!(true);
    let tag = json!({ "format": format });
    check(&tag, &["<f=b>true</f>"], &[("text", ""), ("", "")]);
    format["stop_after_first"] = json!(false);
    let tag = json!({ "format": format });
    check(
        &tag,
        &["<f=b>true</f> and <f=b>true</f>"],
        &[("text", ""), ("<f=b>true</f> <f=", "<f=b>true</f> <f=")],
    );
}

#[test]
fn parts_are_put_together() {
    let text = |value: &str| json!({"type": "const_string", "value": value});
    let thought = json!({"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "</u>"]});
    let number = json!({"type": "regex", "pattern": "[0-9]+/[0-9]+"});
    let sequence = json!({"format": {"type": "sequence", "elements": [thought, number, {"type": "any_text"}]}});
    check(
        &sequence,
        &["<t>a < b</t>1/2", "<t></u>10/2, so\nit is"],
        &[("1/2", ""), ("<t>a</t>x", "<t>a</t>"), ("<t>a</t>1", "<t>a</t>1")],
    );
    let or = json!({"type": "or", "elements": [text("yes"), text("no")]});
    let repeat = |kind: &str| json!({"format": {"type": kind, "min": 1, "max": 2, "content": or}});
    check(&repeat("repeat"), &["yes", "yesno"], &[("", ""), ("yesnoyes", "yesno")]);
    check(&repeat("optional"), &["", "no"], &[("nono", "no")]);
    check(&repeat("star"), &["", "nonoyes"], &[("n!", "n")]);
    check(&repeat("plus"), &["no", "nono"], &[("", "")]);
    let item = json!({"type": "tag", "begin": "[", "content": number, "end": "]"});
    let list = json!({"format": {"type": "tags_with_separator", "tags": [item], "separator": ", "}});
    check(
        &list,
        &["", "[1/2]", "[1/2], [3/4]"],
        &[("[1/2][", "[1/2]"), ("[1/2], ", "[1/2], ")],
    );
}

#[test]
fn marks_that_are_special_tokens_are_meant_as_tokens() {
    let content = json!({"type": "json_schema", "json_schema": schema()});
    let tag = json!({"type": "tag", "begin": "<|begin|>call ", "content": content, "end": "<|begin|>"});
    let triggered = json!({"format": {"type": "triggered_tags", "triggers": ["<|begin|>"], "tags": [tag]}});
    assert!(
        constraint("f", &triggered, Some(&byte_tokenizer()))
            .unwrap()
            .text()
            .contains(&format!("<[{BOS}]>"))
    );
    check(
        &triggered,
        &["plain", r#"first <|begin|>call {"x": 1}<|begin|> done"#],
        &[("a<|begin|>no", "a<|begin|>")],
    );
    let thought = json!({"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "<|begin|>"});
    let answer = json!({"type": "const_string", "value": "42"});
    let sequence = json!({"format": {"type": "sequence", "elements": [thought, answer]}});
    check(
        &sequence,
        &["hm\n<|begin|>42", "<|begin|>42"],
        &[("hm", "hm"), ("hm<|begin|>4 ", "hm<|begin|>4")],
    );
}

#[test]
fn what_is_wrong_is_named_by_its_place() {
    let any_text = json!({"type": "any_text"});
    let tag = |begin: &str, end: Value| json!({"type": "tag", "begin": begin, "content": any_text, "end": end});
    let triggered = |tag: Value| json!({"format": {"type": "triggered_tags", "triggers": ["<"], "tags": [tag]}});
    let cases = [
        (
            json!({}),
            "r is without format, expected format, or structures with triggers",
        ),
        (
            json!({"format": {"type": "token"}}),
            "r.format.type is \"token\", expected const_string",
        ),
        (
            json!({"format": {"type": "grammar", "grammar": "root ::= \"a\""}}),
            "r.format.type is \"grammar\"",
        ),
        (json!({"format": []}), "r.format.type is missing"),
        (
            json!({"format": {"type": "const_string", "value": "x".repeat(MAX_CONSTRAINT_BYTES)}}),
            "r is a structural tag of 262",
        ),
        (json!({"format": {"type": "const_string"}}), "r.format.value is missing"),
        (
            json!({"format": {"type": "regex", "pattern": ""}}),
            "r.format.pattern is empty",
        ),
        (
            json!({"format": {"type": "or", "elements": []}}),
            "r.format.elements is an array of 0",
        ),
        (
            json!({"format": {"type": "sequence", "elements": [any_text, any_text]}}),
            "r.format.elements[0] is any_text, expected at the end",
        ),
        (
            json!({"format": {"type": "any_text", "excludes": ["x"]}}),
            "r.format.excludes is an array of 1",
        ),
        (
            json!({"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}),
            "r.format.style is \"qwen_xml\"",
        ),
        (
            json!({"format": {"type": "repeat", "min": 2, "max": 1, "content": any_text}}),
            "a repeat of other counts",
        ),
        (
            triggered(tag("[", json!("x"))),
            "r.format.tags[0].begin is \"[\", expected a text that begins",
        ),
        (triggered(tag("<", json!(""))), "r.format.tags[0].end is empty"),
        (
            triggered(tag("<", json!("a<|begin|>"))),
            "r.format.tags[0].end is text before a special token",
        ),
        (
            json!({"structures": [], "triggers": ["<"]}),
            "r.structures is an array of 0",
        ),
        (
            json!({"structures": [1], "triggers": ["<"]}),
            "r.structures[0] is a number",
        ),
        (
            json!({"structures": [{"begin": "<a>", "end": ""}]}),
            "r.triggers is missing",
        ),
    ];
    for (value, expected) in cases {
        let error = constraint("r", &value, Some(&byte_tokenizer())).expect_err(&value.to_string());
        assert!(error.message.contains(expected), "{value}: {error}");
        assert_eq!(error.param.as_deref(), Some("r"));
    }
}
