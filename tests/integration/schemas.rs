//! Random JSON schemas whose documents are short: strings, arrays and depth are bounded. The same seed, the same schema.

use serde_json::{Value, json};

/// Numbers in an order that a seed gives (SplitMix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        (!all.is_empty()).then(|| &all[self.roll(all.len() as u64) as usize])
    }

    fn text(&mut self, all: &[&'static str]) -> &'static str {
        self.pick(all).expect("some text")
    }
}

/// Written with the letters `abcdeflnrstu` alone, which every vocabulary of the tests has.
const NAMES: [&str; 8] = ["a", "b", "late", "table", "card", "under", "lead", "fact"];
const TEXTS: [&str; 6] = ["red", "blue", "a", "salt", "null", "12"];

/// An object, an array, or what may be anything.
pub fn schema(seed: u64) -> Value {
    let mut dice = Dice(seed);
    let mut schema = match dice.roll(4) {
        0 | 1 => object(&mut dice, 2),
        2 => array(&mut dice, 2),
        _ => any(&mut dice, 2),
    };
    schema["$defs"] =
        json!({ "pair": { "type": "array", "items": { "type": "boolean" }, "minItems": 2, "maxItems": 2 } });
    schema
}

fn any(dice: &mut Dice, depth: u64) -> Value {
    let n_kinds = if depth == 0 { 10 } else { 14 };
    match dice.roll(n_kinds) {
        0 | 1 => json!({ "type": "string", "maxLength": dice.roll(7) }),
        2 => json!({ "type": "string", "pattern": format!("^[a-d]{{1,{}}}(1|2)?$", 1 + dice.roll(4)) }),
        3 => json!({ "type": "integer", "minimum": -(dice.roll(300) as i64), "maximum": dice.roll(2000) }),
        4 => json!({ "type": ["boolean", "null"] }),
        5 => json!({ "enum": [dice.text(&TEXTS), dice.roll(50), Value::Null, false] }),
        6 => json!({ "const": dice.text(&TEXTS) }),
        7 => json!({ "$ref": "#/$defs/pair" }),
        8 => json!({ "type": "string", "minLength": 1, "maxLength": 3 }),
        9 => json!({ "type": "integer", "enum": [1, 12, 123] }),
        10 => json!({ "anyOf": [any(dice, 0), array(dice, depth - 1)] }),
        11 => array(dice, depth - 1),
        _ => object(dice, depth - 1),
    }
}

fn array(dice: &mut Dice, depth: u64) -> Value {
    let least = dice.roll(3);
    json!({ "type": "array", "items": any(dice, depth), "minItems": least, "maxItems": least + dice.roll(3) })
}

fn object(dice: &mut Dice, depth: u64) -> Value {
    let mut properties = serde_json::Map::new();
    let mut required = Vec::new();
    for _ in 0..dice.roll(5) {
        let name = dice.text(&NAMES);
        properties.insert(name.to_owned(), any(dice, depth));
        if dice.roll(2) == 0 && !required.contains(&name) {
            required.push(name);
        }
    }
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}
