//! Constraints over a vocabulary of bytes and a few longer tokens: random walks through them end in texts of the language.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::Constraint;
use serde_json::{Value, json};

use super::*;
use crate::text::Tokenizer;

/// Bytes are ids 0 to 255; then longer tokens; then two ends of sequence and a special token.
const LONGER: [&str; 7] = ["true", "fal", "\":", "\",\"", "{\"", "12", "  "];
const ENDS: [TokenId; 2] = [263, 264];
const SPECIAL: TokenId = 265;
const N_VOCAB: usize = 270;

/// What GPT-2's alphabet writes for a byte.
fn written(byte: u8) -> char {
    let is_itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if is_itself(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&other| !is_itself(other)).count() as u32;
    char::from_u32(0x100 + n_before).unwrap()
}

fn tokenizer() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(written(byte).to_string(), json!(byte));
    }
    for (id, text) in (256..).zip(LONGER) {
        vocab.insert(text.bytes().map(written).collect(), json!(id));
    }
    let added = |id: TokenId, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(ENDS[0], "<|end|>"), added(ENDS[1], "<|eot|>"), added(SPECIAL, "<|tool|>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(&serde_json::to_vec(&tokenizer).unwrap()).unwrap()
}

fn compiler() -> ConstraintCompiler {
    ConstraintCompiler::new(|| Ok((tokenizer(), ENDS.to_vec())), N_VOCAB)
}

fn schema(schema: Value) -> Constraint {
    Constraint::JsonSchema(schema.to_string().into())
}

fn group(compiler: &ConstraintCompiler, constraint: &Constraint, n: usize) -> GroupConstraint {
    GroupConstraint::new(compiler.compile(constraint).unwrap(), n)
}

/// A step of SplitMix64.
fn roll(seed: &mut u64, n: usize) -> usize {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) % n as u64) as usize
}

fn ids(set: &crate::sampler::TokenSet) -> Vec<TokenId> {
    (0..N_VOCAB as TokenId).filter(|&id| set.contains(id)).collect()
}

/// Ids of a random text of the language, its end included.
fn walk(compiler: &ConstraintCompiler, constraint: &Constraint, seed: u64) -> Vec<TokenId> {
    let mut seed = seed;
    let mut group = group(compiler, constraint, 1);
    let mut output = Vec::new();
    while !output.last().is_some_and(|last| ENDS.contains(last)) {
        let allowed = ids(group.allowed(0, &output).unwrap());
        assert_eq!(
            allowed.contains(&ENDS[0]),
            allowed.contains(&ENDS[1]),
            "both ends or none"
        );
        output.push(allowed[roll(&mut seed, allowed.len())]);
        assert!(output.len() < 4000, "{constraint:?} does not end");
    }
    output.pop();
    output
}

fn text(output: &[TokenId]) -> String {
    tokenizer().decode(output).unwrap()
}

#[test]
fn random_walks_are_valid_documents() {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "true"]}, "maxItems": 3},
            "at": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["name", "age", "at"],
        "additionalProperties": false,
        "$defs": {"point": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 12}], "minItems": 2, "items": false}},
        "x-guidance": {"whitespace_pattern": "[ \\n]{1,3}"},
    });
    let validator = jsonschema::validator_for(&person).unwrap();
    let compiler = compiler();
    for seed in 0..60 {
        let text = text(&walk(&compiler, &schema(person.clone()), seed));
        let document: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(validator.is_valid(&document), "{text}");
    }
}

#[test]
fn what_is_allowed_depends_on_the_output_alone() {
    let compiler = compiler();
    let constraint = schema(json!({"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 4}));
    let output = walk(&compiler, &constraint, 3);
    let mut straight = group(&compiler, &constraint, 2);
    let known: Vec<Vec<TokenId>> = (0..=output.len())
        .map(|n| ids(straight.allowed(0, &output[..n]).unwrap()))
        .collect();
    for n in 0..=output.len() {
        let mut anew = group(&compiler, &constraint, 1);
        assert_eq!(
            ids(anew.allowed(0, &output[..n]).unwrap()),
            known[n],
            "read at once up to {n}"
        );
        // One that has read more, and another choice that has read something else.
        assert_eq!(
            ids(straight.allowed(0, &output[..n]).unwrap()),
            known[n],
            "after going back to {n}"
        );
        let other = straight.allowed(1, &output[..1]).unwrap();
        assert_eq!(ids(other), known[1]);
    }
}

#[test]
fn an_end_may_come_exactly_where_the_text_is_complete() {
    let compiler = compiler();
    let constraint = Constraint::Regex("(true|12)( *x){0,2}".into());
    let whole = |text: &str| {
        let mut rest = text.strip_prefix("true").or(text.strip_prefix("12"))?;
        for _ in 0..2 {
            rest = rest.trim_start_matches(' ').strip_prefix('x').unwrap_or(rest);
        }
        rest.is_empty().then_some(())
    };
    let mut n_complete = 0;
    for mut seed in 0..40 {
        let mut group = group(&compiler, &constraint, 1);
        let mut output: Vec<TokenId> = Vec::new();
        for _ in 0..30 {
            let allowed = ids(group.allowed(0, &output).unwrap());
            let is_complete = whole(&text(&output)).is_some();
            assert_eq!(allowed.contains(&ENDS[0]), is_complete, "{:?}", text(&output));
            n_complete += usize::from(is_complete);
            let onward: Vec<TokenId> = allowed.into_iter().filter(|id| !ENDS.contains(id)).collect();
            if onward.is_empty() {
                break;
            }
            output.push(onward[roll(&mut seed, onward.len())]);
        }
    }
    assert!(n_complete > 40, "hardly any text was complete");
}

#[test]
fn where_nothing_follows_only_ends_are_allowed() {
    let compiler = compiler();
    let constraint = Constraint::Regex("a".into());
    let mut group = group(&compiler, &constraint, 1);
    assert_eq!(ids(group.allowed(0, &[]).unwrap()), [TokenId::from(b'a')]);
    assert_eq!(ids(group.allowed(0, &[TokenId::from(b'a')]).unwrap()), ENDS);
    let error = group.allowed(0, &[TokenId::from(b'b')]).unwrap_err();
    assert!(
        matches!(
            error,
            ConstraintError::Step {
                choice: 0,
                index: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn special_tokens_come_only_by_name_and_unknown_ids_never() {
    let compiler = compiler();
    let any = Constraint::Regex("(?s:.*)".into());
    let allowed = ids(group(&compiler, &any, 1).allowed(0, &[]).unwrap());
    assert!(
        !allowed.contains(&SPECIAL) && allowed.iter().all(|&id| id < SPECIAL),
        "{allowed:?}"
    );
    let named = Constraint::Grammar("start: <|tool|> \"12\"".into());
    let mut group = group(&compiler, &named, 1);
    assert_eq!(ids(group.allowed(0, &[]).unwrap()), [SPECIAL]);
    assert!(
        ids(group.allowed(0, &[SPECIAL]).unwrap()).contains(&261),
        "the token of `12`"
    );
}

#[test]
fn what_cannot_be_compiled_is_said() {
    let compiler = compiler();
    let cases = [
        Constraint::JsonSchema("{".into()),
        schema(json!({"type": "strange"})),
        schema(json!({"not": {"type": "string"}})),
        schema(json!({"$ref": "#/$defs/absent"})),
        Constraint::Regex("(".into()),
        Constraint::Regex("(?=a)b".into()),
        Constraint::Grammar("root ::= \"a\"".into()),
        Constraint::Grammar("start: absent".into()),
        Constraint::Regex("a".repeat(MAX_CONSTRAINT_BYTES + 1).into()),
    ];
    for constraint in cases {
        let error = compiler
            .compile(&constraint)
            .map(|_| ())
            .expect_err(&format!("{constraint:?}"));
        let ConstraintError::Invalid(message) = &error else {
            panic!("{error:?}")
        };
        assert!(
            !message.is_empty() && !message.contains('\n') && message.len() < 2000,
            "{message}"
        );
    }
    let no_end = ConstraintCompiler::new(|| Ok((tokenizer(), Vec::new())), N_VOCAB);
    let error = no_end.compile(&Constraint::Regex("a".into())).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this model cannot be constrained: it has no end-of-sequence token"
    );
}

#[test]
fn equal_constraints_are_compiled_once() {
    let compiler = compiler();
    let first = compiler.compile(&Constraint::Regex("ab".into())).unwrap();
    let second = compiler.clone().compile(&Constraint::Regex("ab".into())).unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    for n in 0..40 {
        compiler.compile(&Constraint::Regex(format!("a{n}").into())).unwrap();
    }
    let again = compiler.compile(&Constraint::Regex("ab".into())).unwrap();
    assert!(!Arc::ptr_eq(&first, &again), "what is kept is bounded");
}

/// Tokenizers of every family: byte-level, and SentencePiece with byte fallback. Texts are decoded by the tokenizer itself.
#[test]
fn every_kind_of_vocabulary_is_matched_by_its_bytes() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tokenizers");
    let schema = json!({
        "type": "object",
        "properties": {"né": {"type": "string", "maxLength": 12}, "list": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
        "required": ["né", "list"],
        "additionalProperties": false,
        "x-guidance": {"whitespace_pattern": " "},
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let constraint = Constraint::JsonSchema(schema.to_string().into());
    for name in ["gemma2", "llama2", "llama3", "mistral", "phi3", "qwen", "qwen_chatml"] {
        let bytes = std::fs::read(folder.join(name).join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
        let config = std::fs::read(folder.join(name).join("tokenizer_config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        let eos = config["eos_token"]
            .as_str()
            .or(config["eos_token"]["content"].as_str())
            .unwrap();
        let eos = tokenizer.token_to_id(eos).unwrap();
        let n_vocab = tokenizer.n_ids() + 3;
        let of = tokenizer.clone();
        let compiler = ConstraintCompiler::new(move || Ok((of.clone(), vec![eos])), n_vocab);
        for mut seed in 0..8 {
            let mut group = group(&compiler, &constraint, 1);
            let mut output = Vec::new();
            loop {
                let set = group.allowed(0, &output).unwrap();
                let allowed: Vec<TokenId> = (0..n_vocab as TokenId).filter(|&id| set.contains(id)).collect();
                let next = allowed[roll(&mut seed, allowed.len())];
                if next == eos {
                    break;
                }
                output.push(next);
                assert!(output.len() < 1000);
            }
            let text = tokenizer.decode(&output).unwrap();
            let document: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}: {text}"));
            assert!(validator.is_valid(&document), "{name}: {text}");
        }
    }
}
