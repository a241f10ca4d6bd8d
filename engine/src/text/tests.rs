//! Golden tests of tokenizers, streams and chat templates, made with an independent implementation (tests/data).

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{ChatTemplateError, Tokenizer};
use crate::model::ModelFolder;

fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data")
}

fn json(path: PathBuf) -> Value {
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

fn names_in(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(data().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

fn tokenizer(name: &str) -> Tokenizer {
    let path = data().join("tokenizers").join(name).join("tokenizer.json");
    Tokenizer::from_bytes(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Streams the ids; the pieces' concatenation and the tail.
fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (String, String) {
    let mut stream = tokenizer.stream();
    let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    (pieces, stream.flush().unwrap())
}

/// The pieces are those of the case, as a whole, and with the tail they are the full decode where that is defined.
fn check_stream(tokenizer: &Tokenizer, ids: &[u32], case: &Value, full: &str, what: &str) {
    let (pieces, tail) = stream(tokenizer, ids);
    let expected: String = case["stream_pieces"].as_array().unwrap().iter().map(text).collect();
    match case["stream_tail"].as_str() {
        Some(_) => assert_eq!(pieces.clone() + &tail, full, "{what}"),
        None => {
            assert_eq!(pieces, expected, "{what}");
            assert!(
                !tail.is_empty() && tail.chars().all(|char| char == '\u{fffd}'),
                "{what}: {tail:?}"
            );
        }
    }
    let n_broken = |text: &str| text.matches('\u{fffd}').count();
    assert!(
        n_broken(&pieces) <= n_broken(full),
        "{what}: part of a character in {pieces:?}"
    );
}

#[test]
fn encode_decode_and_stream_cases() {
    for name in names_in("tokenizers") {
        let tokenizer = tokenizer(&name);
        let cases = json(data().join("tokenizers").join(&name).join("cases.json"));
        for case in cases["encode"].as_array().unwrap() {
            let what = format!("{name} encode {}", case["index"]);
            let (plain, with_special) = (ids(&case["ids"]), ids(&case["ids_with_special"]));
            assert_eq!(tokenizer.encode(text(&case["text"])).unwrap(), plain, "{what}");
            assert_eq!(
                tokenizer.encode_with_special_tokens(text(&case["text"])).unwrap(),
                with_special,
                "{what}"
            );
            assert_eq!(
                tokenizer.decode_with_special_tokens(&plain).unwrap(),
                text(&case["decoded"]),
                "{what}"
            );
            assert_eq!(
                tokenizer.decode(&plain).unwrap(),
                text(&case["decoded_skip_special"]),
                "{what}"
            );
            let decoded = tokenizer.decode_with_special_tokens(&with_special).unwrap();
            assert_eq!(decoded, text(&case["decoded_with_special"]), "{what}");
            check_stream(&tokenizer, &plain, case, text(&case["decoded_skip_special"]), &what);
            let tokens: Vec<String> = plain.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
            assert_eq!(
                tokens,
                case["tokens"].as_array().unwrap().iter().map(text).collect::<Vec<_>>(),
                "{what}"
            );
        }
        for case in cases["decode"].as_array().unwrap() {
            let what = format!("{name} decode {}", case["index"]);
            let ids = ids(&case["ids"]);
            assert_eq!(
                tokenizer.decode_with_special_tokens(&ids).unwrap(),
                text(&case["decoded"]),
                "{what}"
            );
            assert_eq!(
                tokenizer.decode(&ids).unwrap(),
                text(&case["decoded_skip_special"]),
                "{what}"
            );
            check_stream(&tokenizer, &ids, case, text(&case["decoded_skip_special"]), &what);
        }
    }
}

/// With special tokens shown, a stream still equals the full decode.
#[test]
fn streams_with_special_tokens() {
    for name in names_in("tokenizers") {
        let tokenizer = tokenizer(&name);
        let cases = json(data().join("tokenizers").join(&name).join("cases.json"));
        for case in cases["encode"].as_array().unwrap() {
            let ids = ids(&case["ids_with_special"]);
            let mut stream = tokenizer.stream_with_special_tokens();
            let mut got: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            got += &stream.flush().unwrap();
            assert_eq!(got, text(&case["decoded_with_special"]), "{name} {}", case["index"]);
        }
    }
}

#[test]
fn ids_past_the_vocabulary_are_nothing() {
    let tokenizer = tokenizer("llama3");
    let hello = tokenizer.encode("Hello").unwrap();
    let mut odd = vec![u32::MAX, 4_000_000];
    odd.extend(&hello);
    odd.push(tokenizer.n_ids() as u32);
    assert_eq!(stream(&tokenizer, &odd), ("Hello".to_owned(), String::new()));
    assert_eq!(tokenizer.decode(&odd).unwrap(), "Hello");
    assert!(!tokenizer.knows(u32::MAX));
}

/// A model's folder may hold the template of a chat case where no tokenizer folder does.
fn template_folder(name: &str) -> PathBuf {
    let tokenizer = data().join("tokenizers").join(name);
    if tokenizer.exists() {
        tokenizer
    } else {
        data().join("models").join(name)
    }
}

/// Tokenizer folders have no config.json: any model's will do.
fn folder_of(name: &str) -> ModelFolder {
    let directory = template_folder(name);
    let config = data().join("models/llama3-tied-ropescaled/config.json");
    let mut files: Vec<(&str, &'static [u8])> = vec![("config.json", std::fs::read(config).unwrap().leak())];
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        if let Ok(bytes) = std::fs::read(directory.join(file)) {
            files.push((file, bytes.leak()));
        }
    }
    ModelFolder::from_embedded(&files).unwrap()
}

#[test]
fn chat_cases() {
    for name in names_in("chat") {
        let folder = folder_of(&name);
        let (template, tokenizer) = (
            folder.chat_template().unwrap().unwrap(),
            folder.tokenizer().unwrap().unwrap(),
        );
        let cases = json(data().join("chat").join(format!("{name}.json")));
        for case in cases["cases"].as_array().unwrap() {
            let what = format!("{name} {}", case["name"]);
            let extra: Map<String, Value> = case["template_kwargs"].as_object().cloned().unwrap_or_default();
            let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
            let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
            let got = template.render(&case["messages"], tools, add_generation_prompt, &extra);
            if let Some(error) = case["error"].as_str() {
                let got = got.expect_err(&what);
                if let Some(message) = error.strip_prefix("TemplateError: ") {
                    assert_eq!(got, ChatTemplateError::Raised(message.to_owned()), "{what}");
                }
                continue;
            }
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(got, text(&case["rendered"]), "{what}");
            assert_eq!(tokenizer.encode(&got).unwrap(), ids(&case["ids"]), "{what}");
        }
    }
}

/// Found by the fuzzer: the library unwraps what it has not checked.
#[test]
fn a_file_that_makes_much_of_little_is_an_error() {
    let tokenizer = |normalizer: Value, decoder: Value| {
        let model = serde_json::json!({"type": "BPE", "vocab": {"a": 0}, "merges": []});
        let file = serde_json::json!({
            "version": "1.0", "normalizer": normalizer, "decoder": decoder, "model": model
        });
        Tokenizer::from_bytes(file.to_string().as_bytes())
    };
    let replace = |pattern: &str, content: &str| serde_json::json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    let prepend = |text: &str| serde_json::json!({"type": "Prepend", "prepend": text});
    let sequence = |name: &str, steps: &[Value]| serde_json::json!({"type": "Sequence", name: steps});
    let none = Value::Null;
    let spaces = " ".repeat(17);
    for normalizer in [
        sequence("normalizers", &[replace(" ", &spaces), replace(" ", &spaces)]),
        sequence(
            "normalizers",
            &[prepend(&spaces), sequence("normalizers", &[replace(" ", &spaces)])],
        ),
        serde_json::json!({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y".repeat(256)}),
        prepend(&"x".repeat(256)),
    ] {
        let error = tokenizer(normalizer.clone(), none.clone()).expect_err("much of little");
        assert!(
            error.to_string().starts_with("normalizer: may make "),
            "{error}: {normalizer}"
        );
    }
    let decoder = sequence("decoders", &[replace("a", &"a".repeat(300))]);
    let error = tokenizer(none.clone(), decoder).expect_err("much of little");
    assert_eq!(
        error.to_string(),
        "decoder: may make 300 bytes of each, expected at most 256"
    );
    // As Llama 2's.
    let normalizer = sequence("normalizers", &[prepend("\u{2581}"), replace(" ", "\u{2581}")]);
    let decoder = sequence("decoders", &[replace("\u{2581}", " ")]);
    assert!(tokenizer(normalizer, decoder).is_ok());
}

#[test]
fn a_file_that_the_library_panics_at_is_an_error() {
    let bytes = br#"{"version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": "no"}, "model":
        {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    let mut bytes = bytes.to_vec();
    bytes.retain(|byte| *byte != b'\n');
    let at = bytes.windows(4).position(|word| word == b"\"no\"").expect("the value");
    bytes[at] = 0x17;
    let error = Tokenizer::from_bytes(&bytes).expect_err("not JSON");
    assert!(error.to_string().contains("the tokenizer library panicked"), "{error}");
}
