//! tokenizer.json, and what a tokenizer that could be read makes of a text. Panics of the tokenizer library are caught where
//! it is called, and are none of ours; all others count.
#![no_main]

use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::sync::Once;

use baton_engine::text::Tokenizer;
use libfuzzer_sys::fuzz_target;

fn spare_the_library() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let abort = take_hook();
        let is_library = |info: &PanicHookInfo<'_>| {
            let file = info.location().map_or("", |location| location.file());
            file.contains("/tokenizers-")
        };
        set_hook(Box::new(move |info| {
            if !is_library(info) {
                abort(info);
            }
        }));
    });
}

fuzz_target!(|data: &[u8]| {
    spare_the_library();
    if let Ok(tokenizer) = Tokenizer::from_bytes(data)
        && let Ok(ids) = tokenizer.encode("a b<|x|> \u{e9}\u{1f642}")
    {
        let _ = tokenizer.decode(&ids);
        let _ = tokenizer.decode(&[0, u32::MAX]);
    }
});
