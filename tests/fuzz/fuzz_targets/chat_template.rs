//! Chat templates: what comes from a model's folder is not trusted with the process.
#![no_main]

use baton_engine::text::ChatTemplate;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|source: &str| {
    let templates = [("default".to_owned(), source.to_owned())];
    if let Ok(template) = ChatTemplate::new(&templates, Some("<s>"), Some("</s>")) {
        let messages = json!([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}]);
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
        let _ = template.render(&messages, None, true, &serde_json::Map::new());
        let _ = template.render(&messages, Some(&tools), false, &serde_json::Map::new());
    }
});
